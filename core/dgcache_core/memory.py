"""Where encrypted bytes live: one mapping per entry, which returns to the system whole.

Two kinds: anonymous memory, and a file without a name in a given directory (open(2), O_TMPFILE),
which the kernel frees with its last descriptor, also after kill -9.
"""

import errno
import mmap
import os
import re
from collections.abc import Callable
from contextlib import suppress

from dgcache_core.errors import CacheFullError

_NAMELESS = os.O_TMPFILE | os.O_EXCL  # O_EXCL: nobody can give it a name later (open(2))
_MOMENTARY = re.compile(r"[0-9a-f]{32}|\.nfs[0-9a-f]+")  # NFS names what was unlinked while open

Allocate = Callable[[int], mmap.mmap]
"""Returns a zeroed, writable mapping of that many bytes; raises CacheFullError."""

_HUGE_PAGES_FROM_BYTES = 4 << 20
"""Fewer page faults: a put of 10 MB takes 0.87, one of 100 MB 0.6 times as long. What does not fill
a huge page (2 MiB), at both ends of a mapping, has small ones, so that no memory is lost."""


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
        mapping.madvise(mmap.MADV_DONTDUMP)
    except OSError as error:
        raise CacheFullError(f"the system has no {size} bytes of memory left") from error
    if size >= _HUGE_PAGES_FROM_BYTES:
        with suppress(OSError):  # EINVAL on a kernel without them; and what it costs is time alone
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def unnamed_files(directory_fd: int) -> Allocate:
    """Return an allocator of mappings of nameless files in an open directory.

    The blocks are reserved before they are mapped: a full disk is an error here, not a SIGBUS
    later.
    """

    def allocate(size: int) -> mmap.mmap:
        try:
            descriptor = os.open(
                f"/proc/self/fd/{directory_fd}", _NAMELESS | os.O_RDWR | os.O_CLOEXEC, 0o600
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


def is_momentary_name(name: str) -> bool:
    """Tell whether a name is one that an entry's file may have where there is no O_TMPFILE."""
    return _MOMENTARY.fullmatch(name) is not None


def _named_for_a_moment(directory_fd: int) -> int:
    """For file systems without O_TMPFILE: a file that loses its name before it has any content."""
    name = os.urandom(16).hex()
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=directory_fd)
    except OSError as error:
        raise CacheFullError(f"no file can be made: {error.strerror}") from error
    try:
        os.unlink(name, dir_fd=directory_fd)
    except OSError as error:
        os.close(descriptor)
        raise CacheFullError(f"a file keeps its name: {error.strerror}") from error
    return descriptor
