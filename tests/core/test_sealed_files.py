"""A sealed memory file can be read by whoever has it and changed by nobody, root included."""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dgcache_core.errors import CacheCorruptionError
from dgcache_core.sealed_files import (
    create_memory_file,
    open_again,
    require_sealed,
    seal,
    write_at,
)

from .support import content, run_python

DATA = content(10_000)
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 0x10


@pytest.fixture
def sealed() -> Iterator[int]:
    """The writable descriptor of a sealed file with DATA in it."""
    descriptor = create_memory_file()
    write_at(descriptor, memoryview(DATA), 0)
    seal(descriptor)
    yield descriptor
    os.close(descriptor)


def reopened(descriptor: int, flags: int) -> int:
    """Open the file anew through this process's directory of descriptors."""
    return os.open(f"/proc/{os.getpid()}/fd/{descriptor}", flags | os.O_CLOEXEC)


def allocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which Python has not."""
    libc = ctypes.CDLL(None, use_errno=True)
    span = ctypes.c_long(offset), ctypes.c_long(length)
    if libc.fallocate(descriptor, mode, *span) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def write_through_a_new_description(descriptor: int) -> None:
    """What a client with write permission on the path may try."""
    writable = reopened(descriptor, os.O_RDWR)
    try:
        os.pwrite(writable, b"x", 0)
    finally:
        os.close(writable)


ATTACKS: dict[str, Callable[[int], object]] = {
    "write": lambda fd: os.pwrite(fd, b"x", 0),
    "write at the end": lambda fd: os.pwrite(fd, b"x", len(DATA)),
    "write through a new description": write_through_a_new_description,
    "truncate": lambda fd: os.ftruncate(fd, 0),
    "shrink by one": lambda fd: os.ftruncate(fd, len(DATA) - 1),
    "grow": lambda fd: os.ftruncate(fd, len(DATA) + 1),
    "grow by fallocate": lambda fd: os.posix_fallocate(fd, 0, 1 << 20),
    "punch a hole": lambda fd: allocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, 4096),
    "zero a range": lambda fd: allocate(fd, ZERO_RANGE | KEEP_SIZE, 0, 4096),
    "map shared and writable": lambda fd: mmap.mmap(fd, len(DATA)),
    "open with O_TRUNC": lambda fd: os.close(reopened(fd, os.O_RDWR | os.O_TRUNC)),
    "truncate by path": lambda fd: os.truncate(f"/proc/self/fd/{fd}", 1),
    "add a seal": lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x10),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nobody_changes_a_sealed_file(sealed: int, attack: str) -> None:
    """Not even the process that wrote it, on the very descriptor it wrote with."""
    with pytest.raises(OSError, match=r"\[Errno \d+\]") as refusal:
        ATTACKS[attack](sealed)
    assert refusal.value.errno in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP)
    assert os.pread(sealed, len(DATA) + 1, 0) == DATA


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a not in ("zero a range", "add a seal")])
def test_each_attack_succeeds_on_a_file_that_is_not_sealed(attack: str) -> None:
    """The claims above can fail: before sealing everything tried there works."""
    descriptor = create_memory_file()
    write_at(descriptor, memoryview(DATA), 0)
    result = ATTACKS[attack](descriptor)
    if isinstance(result, mmap.mmap):
        result.close()
    os.close(descriptor)


def test_a_private_mapping_changes_only_itself(sealed: int) -> None:
    """Copy-on-write is allowed: what it writes nobody else sees."""
    with mmap.mmap(sealed, len(DATA), flags=mmap.MAP_PRIVATE) as private:
        private[:5] = b"xxxxx"
        assert os.pread(sealed, 5, 0) == DATA[:5]


def test_a_file_somebody_maps_for_writing_cannot_be_sealed() -> None:
    """The kernel refuses: a mapping made before would go on writing."""
    descriptor = create_memory_file()
    os.ftruncate(descriptor, 4096)
    with mmap.mmap(descriptor, 4096), pytest.raises(OSError, match="busy"):
        seal(descriptor)
    os.close(descriptor)


def test_a_sealed_file_is_readable_for_its_owner_only_and_never_executable(sealed: int) -> None:
    """Mode 0400, and on kernels with MFD_NOEXEC_SEAL it cannot become anything executable."""
    assert stat.S_IMODE(os.fstat(sealed).st_mode) == 0o400
    if fcntl.fcntl(sealed, fcntl.F_GET_SEALS) & 0x20:  # F_SEAL_EXEC
        with pytest.raises(PermissionError):
            os.fchmod(sealed, 0o700)


def test_a_memory_file_has_no_name_and_is_not_inherited(sealed: int) -> None:
    """It is in no file system, and a program that is started does not get it."""
    assert os.fstat(sealed).st_nlink == 0
    assert not os.get_inheritable(sealed)
    again = open_again(sealed)
    assert not os.get_inheritable(again)
    os.close(again)


def test_open_again_gives_an_offset_of_its_own(sealed: int) -> None:
    """Reading one description to the end leaves the other at its beginning."""
    one, other = open_again(sealed), open_again(sealed)
    assert os.read(one, len(DATA)) == DATA
    assert os.lseek(other, 0, os.SEEK_CUR) == 0
    assert os.read(other, len(DATA)) == DATA
    os.close(one)
    os.close(other)


def test_open_again_is_read_only(sealed: int) -> None:
    """The description itself does not write, whatever the seals say."""
    again = open_again(sealed)
    assert fcntl.fcntl(again, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(again, b"x")
    os.close(again)


@pytest.mark.parametrize("size", [0, 1, 10_000])
def test_a_sealed_file_of_the_right_size_is_accepted(size: int) -> None:
    """Both the writer's descriptor and a reader's pass, the empty file as well."""
    descriptor = create_memory_file()
    write_at(descriptor, memoryview(DATA[:size]), 0)
    seal(descriptor)
    again = open_again(descriptor)
    require_sealed(descriptor, size)
    require_sealed(again, size)
    os.close(again)
    os.close(descriptor)


@pytest.mark.parametrize("size", [0, len(DATA) - 1, len(DATA) + 1, -1, 1 << 62])
def test_a_sealed_file_of_another_size_is_refused(sealed: int, size: int) -> None:
    """The size that was announced is the size there is."""
    with pytest.raises(CacheCorruptionError, match="bytes"):
        require_sealed(sealed, size)


SEALS = {
    "seal": fcntl.F_SEAL_SEAL,
    "shrink": fcntl.F_SEAL_SHRINK,
    "grow": fcntl.F_SEAL_GROW,
    "write": fcntl.F_SEAL_WRITE,
}


@pytest.mark.parametrize("missing", [*SEALS, "all", "future write instead of write"])
def test_a_partly_sealed_file_is_refused(missing: str) -> None:
    """Each of the four seals is needed; the one against future writes only does not do."""
    descriptor = create_memory_file()
    if missing == "future write instead of write":
        seals = sum(SEALS.values()) - fcntl.F_SEAL_WRITE + 0x10
    else:
        seals = 0 if missing == "all" else sum(SEALS.values()) - SEALS[missing]
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(CacheCorruptionError, match="can still be changed"):
        require_sealed(descriptor, 0)
    os.close(descriptor)


def test_what_is_no_memory_file_is_refused(tmp_path: Path) -> None:
    """An ordinary file, a directory, both ends of a pipe, a device, and a closed number."""
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    reader, writer = os.pipe()
    others = [os.open(path, os.O_RDONLY) for path in (ordinary, tmp_path, Path("/dev/null"))]
    for descriptor in (*others, reader, writer):
        with pytest.raises(CacheCorruptionError):
            require_sealed(descriptor, 0)
        os.close(descriptor)
    with pytest.raises(CacheCorruptionError):
        require_sealed(reader, 0)


def test_write_at_writes_all_of_it_at_its_place() -> None:
    """Pieces written back to front are one file."""
    descriptor = create_memory_file()
    for offset in range(9000, -1, -1000):
        write_at(descriptor, memoryview(DATA)[offset : offset + 1000], offset)
    assert os.pread(descriptor, len(DATA) + 1, 0) == DATA
    os.close(descriptor)


SHORT_WRITES = """
import os, resource, signal
from dgcache_core.sealed_files import create_memory_file, write_at
descriptor = create_memory_file()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    write_at(descriptor, memoryview(b"x" * 9000), 0)
except OSError as error:
    print(os.fstat(descriptor).st_size, error.errno)
"""


def test_a_short_write_is_gone_on_with_until_the_error() -> None:
    """pwrite(2) takes what fits below a limit; the rest is an error, not silence."""
    assert run_python(SHORT_WRITES) == f"5000 {errno.EFBIG}"
