"""The bench's own directory: made, checked for room, and gone at the end.

It is made where $TMPDIR says, as DeltaGlider's caches are. Its mode lets others pass, as /tmp does,
since what keeps them out must be the implementation's own doing; nothing of the user's is in it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from dgcache_core.errors import CacheFullError

_FILES = 6
"""Source, ciphertext of Fernet twice (4/3 each) and what it decrypted; with some to spare."""
_COPIES = 12
"""What was measured: 11 times the file, most of it while Fernet works."""
_MARGIN_BYTES = 256 << 20


def require_room(largest_bytes: int) -> None:
    """Check that there is disk and memory for references of this size.

    Raises:
        CacheFullError: there is not; the message says how much is missing where.
    """
    directory = tempfile.gettempdir()
    disk, memory = shutil.disk_usage(directory).free, psutil.virtual_memory().available
    for what, free, factor in (
        (f"disk in {directory}", disk, _FILES),
        ("memory", memory, _COPIES),
    ):
        needed = factor * largest_bytes + _MARGIN_BYTES
        if free < needed:
            raise CacheFullError(
                f"a bench of {largest_bytes / 1e6:.0f} MB needs {needed / 1e6:.0f} MB of {what}, "
                f"there are {free / 1e6:.0f}: choose smaller --sizes"
            )


@contextmanager
def own_directory() -> Iterator[Path]:
    """Make a directory and remove it with everything in it, also where this process is killed."""
    with tempfile.TemporaryDirectory(prefix="dgb-", ignore_cleanup_errors=True) as name:
        place = Path(name)
        place.chmod(0o711)
        with _guarded(place):
            yield place


@contextmanager
def _guarded(place: Path) -> Iterator[None]:
    """Have a process stand by that clears up if this one is killed; see `guard`."""
    guard = subprocess.Popen(
        [sys.executable, "-m", "dgcache_cli.bench.guard", str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        guard.kill()
        guard.communicate()


def own_place(base: Path, name: str) -> Path:
    """Make a directory for one implementation that others may pass through, as /tmp."""
    place = base / name
    place.mkdir()
    place.chmod(0o711)
    return place


def random_file(path: Path, size: int) -> Path:
    """Write a file of random bytes, in the page cache when this returns."""
    with path.open("wb") as file:
        left = size
        while left:
            left -= file.write(os.urandom(min(left, 1 << 20)))
    return path


def file_system_of(path: Path) -> str:
    """Return the type of the file system that holds a path, as the kernel names it."""
    partitions = psutil.disk_partitions(all=True)
    holding = [one for one in partitions if path.resolve().is_relative_to(one.mountpoint)]
    return max(holding, key=lambda one: len(one.mountpoint)).fstype if holding else "unknown"
