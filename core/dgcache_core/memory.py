"""Where encrypted bytes live: one mapping per entry, which returns to the system whole.

Two kinds: anonymous memory, and a file without a name in a given directory (open(2), O_TMPFILE),
which the kernel frees with its last descriptor, also after kill -9.
"""

import errno
import mmap
import os
import tempfile
from collections.abc import Callable

from dgcache_core.errors import CacheFullError

Allocate = Callable[[int], mmap.mmap]
"""Returns a zeroed, writable mapping of that many bytes; raises CacheFullError."""

_HUGE_PAGES_FROM_BYTES = 64 << 20
"""From here on a half-used last huge page (2 MiB) is less than 3 % of the entry, and a fill is
1.6 times faster for having fewer page faults."""


def page_rounded(size: int) -> int:
    """Return what `size` bytes really take: whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def anonymous_memory(size: int) -> mmap.mmap:
    """Map memory of no file.

    Raises:
        CacheFullError: the system has none.
    """
    try:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise CacheFullError(f"the system has no {size} bytes of memory left") from error
    mapping.madvise(mmap.MADV_DONTDUMP)
    if size >= _HUGE_PAGES_FROM_BYTES:
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without transparent huge pages
                raise
    return mapping


def unnamed_files(directory_fd: int) -> Allocate:
    """Return an allocator of mappings of nameless files in an open directory.

    The blocks are reserved before they are mapped: a full disk is an error here, not a SIGBUS
    later.
    """

    def allocate(size: int) -> mmap.mmap:
        try:
            descriptor = os.open(
                f"/proc/self/fd/{directory_fd}", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise CacheFullError(f"no file can be made: {error.strerror}") from error
            descriptor = _named_for_a_moment(directory_fd)
        try:
            os.posix_fallocate(descriptor, 0, size)
            return mmap.mmap(descriptor, size)
        except OSError as error:
            raise CacheFullError(f"no room for {size} bytes: {error.strerror}") from error
        finally:
            os.close(descriptor)

    return allocate


def _named_for_a_moment(directory_fd: int) -> int:
    """For file systems without O_TMPFILE: a file whose name is removed at once."""
    try:
        descriptor, path = tempfile.mkstemp(dir=f"/proc/self/fd/{directory_fd}", prefix=".")
    except OSError as error:
        raise CacheFullError(f"no file can be made: {error.strerror}") from error
    os.unlink(path)  # noqa: PTH108 - the path leads through a descriptor, pathlib adds nothing
    return descriptor
