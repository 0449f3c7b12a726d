"""Where ciphertext lives: a mapping of its own, in no file that has a name, never a SIGBUS."""

import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgcache_core import memory
from dgcache_core.errors import CacheFullError
from dgcache_core.memory import anonymous_memory, page_rounded, unnamed_files

from .support import DETERMINISTIC, open_descriptors, run_python

PAGE = mmap.PAGESIZE
MIB = 1 << 20


@DETERMINISTIC
@given(st.integers(0, 1 << 50))
def test_sizes_are_rounded_up_to_whole_pages(size: int) -> None:
    """The result is the smallest number of whole pages that holds the size."""
    rounded = page_rounded(size)
    assert rounded % PAGE == 0
    assert size <= rounded < size + PAGE


@pytest.fixture
def directory_fd(tmp_path: Path) -> Iterator[int]:
    """An open directory."""
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 3 * MIB, 65 * MIB])
def test_anonymous_memory_is_zeroed_and_writable(size: int) -> None:
    """Exactly as long as asked for, from a byte to where huge pages begin."""
    with anonymous_memory(size) as mapping:
        assert len(mapping) == size
        assert (mapping[0], mapping[size - 1]) == (0, 0)
        mapping[size - 1] = 7
        assert mapping[size - 1] == 7


def test_anonymous_memory_stays_out_of_core_dumps() -> None:
    """The kernel's own account of the mapping has the flag `dd`: do not dump (proc(5))."""
    with anonymous_memory(5 * MIB) as mapping:
        anchor = ctypes.c_char.from_buffer(mapping)
        address = ctypes.addressof(anchor)
        del anchor
        assert "dd" in flags_of_mapping(address)


def flags_of_mapping(address: int) -> list[str]:
    """Return the VmFlags of the mapping that an address is in."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(one, 16) for one in first.split("-"))
            found = start <= address < end
        elif found and first == "VmFlags:":
            return rest.split()
    raise AssertionError("the address is in no mapping")


NO_MEMORY = """
import resource
from dgcache_core.errors import CacheFullError
from dgcache_core.memory import anonymous_memory
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try:
    anonymous_memory(2 << 30)
except CacheFullError as error:
    print(error)
"""


def test_memory_the_system_has_not_is_cache_full() -> None:
    """Where the process may not have more, the answer is CacheFullError and says how much."""
    assert run_python(NO_MEMORY) == f"the system has no {2 << 30} bytes of memory left"


@pytest.mark.parametrize("size", [1, PAGE, 3 * MIB])
def test_a_file_of_an_entry_has_no_name(directory_fd: int, tmp_path: Path, size: int) -> None:
    """While it is in use and afterwards, the directory is empty."""
    with unnamed_files(directory_fd)(size) as mapping:
        assert len(mapping) == size
        mapping[size - 1] = 7
        assert not list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_file_of_an_entry_has_no_name_where_the_file_system_needs_one(
    directory_fd: int, tmp_path: Path
) -> None:
    """Without O_TMPFILE the name lives for a moment only."""
    descriptor = memory._named_for_a_moment(directory_fd)
    assert not list(tmp_path.iterdir())
    assert os.fstat(descriptor).st_nlink == 0
    assert os.fstat(descriptor).st_mode & 0o777 == 0o600
    os.close(descriptor)


def test_the_blocks_are_there_before_they_are_written(directory_fd: int, tmp_path: Path) -> None:
    """Reserved, not sparse: the file system has given them away already."""
    before = open_descriptors()
    with unnamed_files(directory_fd)(16 * MIB):
        [(descriptor, target)] = open_descriptors() - before  # the one the mapping keeps
        assert target.startswith(str(tmp_path))
        assert os.fstat(descriptor).st_blocks * 512 >= 16 * MIB


def test_a_directory_that_is_gone_is_cache_full(tmp_path: Path) -> None:
    """No file can be made in it: an error of the cache, not one of the system."""
    gone = tmp_path / "gone"
    gone.mkdir()
    descriptor = os.open(gone, os.O_RDONLY | os.O_DIRECTORY)
    gone.rmdir()
    with pytest.raises(CacheFullError, match="no file can be made"):
        unnamed_files(descriptor)(PAGE)
    os.close(descriptor)


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "dgt", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this container does not let us mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.root
def test_a_full_disk_is_cache_full_and_not_a_sigbus(small_tmpfs: Path) -> None:
    """What does not fit is refused before it is mapped; what was taken for it is given back."""
    descriptor = os.open(small_tmpfs, os.O_RDONLY | os.O_DIRECTORY)
    allocate = unnamed_files(descriptor)
    with allocate(MIB // 2) as half:
        with pytest.raises(CacheFullError, match="no room for"):
            allocate(MIB)
        half[:] = b"x" * len(half)
    with allocate(MIB) as whole:
        whole[:] = b"x" * len(whole)
    os.close(descriptor)
