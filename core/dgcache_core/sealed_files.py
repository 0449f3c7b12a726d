"""Sealed memory files: plaintext that can be handed to anybody and changed by nobody.

A memfd with the four seals refuses every write, truncation, growth, hole and writable mapping, by
root as well (memfd_create(2), fcntl(2) "File Sealing"). It has no name in any file system.
"""

import errno
import fcntl
import os
import stat

from dgcache_core.errors import CacheCorruptionError

_ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MFD_NOEXEC_SEAL = 8  # Linux 6.3: the file can never become executable


def create_memory_file() -> int:
    """Return the descriptor of an empty, writable memory file that can be sealed."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("dg-cache", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create("dg-cache", flags)


def seal(descriptor: int) -> None:
    """Make the file's bytes and length final. No writable mapping of it may exist."""
    os.fchmod(descriptor, 0o400)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _ALL_SEALS)


def open_again(descriptor: int) -> int:
    """Return a read-only descriptor of the same file with an offset and flags of its own.

    A descriptor that is merely passed on shares both with its origin (unix(7), SCM_RIGHTS).
    """
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def require_sealed(descriptor: int, size: int) -> None:
    """Check that nobody can change the file any more and that it has this size.

    Raises:
        CacheCorruptionError: a seal is missing, the size differs, or it is no regular file.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise CacheCorruptionError("the descriptor is not a sealed memory file") from error
    status = os.fstat(descriptor)
    if seals & _ALL_SEALS != _ALL_SEALS or not stat.S_ISREG(status.st_mode):
        raise CacheCorruptionError("the descriptor can still be changed by somebody")
    if status.st_size != size:
        raise CacheCorruptionError(f"the descriptor holds {status.st_size} bytes, not {size}")


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`: pwrite(2) may take less."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data = data[written:]
        offset += written


def read_at(descriptor: int, into: memoryview, offset: int) -> int:
    """Fill `into` from `offset` on; return how many bytes there were."""
    filled = 0
    while filled < len(into):
        count = os.preadv(descriptor, [into[filled:]], offset + filled)
        if not count:
            break
        filled += count
    return filled
