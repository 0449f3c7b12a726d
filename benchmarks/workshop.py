"""The demo's own directory below `.demo/` in the clone, and nothing of it left behind.

Each run holds a lock (flock(2)) on its directory, taken before the directory has its name. What
has a name and no lock is from a run that was killed, and goes. The last run removes `.demo/`.
"""

import argparse
import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.testbed import ROOT
from dgcache_core.directories import open_private_directory
from dgcache_core.errors import CacheRefusedError

_UNNAMED = "new-"
_TRIES = 100


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where things are."""
    parser.add_argument(
        "--environment",
        type=Path,
        default=ROOT / ".venv-deltaglider",
        metavar="DIR",
        help="the environment that has DeltaGlider and dg-cached (default: .venv-deltaglider)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / ".demo",
        metavar="DIR",
        help="where everything is made and removed (default: .demo in the clone)",
    )


@contextlib.contextmanager
def workshop(base: Path) -> Iterator[Path]:
    """Make a private directory below `base`; remove it, and `base` if it is empty, at the end."""
    place, lock = _make(base)
    try:
        _remove_abandoned(base)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)
        with contextlib.suppress(OSError):  # another run is in there
            base.rmdir()


@contextlib.contextmanager
def socket_directory(place: Path) -> Iterator[tuple[Path, str]]:
    """Make a directory dg-cached accepts for its sockets, below `place` where that one passes.

    It does not where others may write to the clone or to a directory above it, as with umask 0002.

    Yields:
        The directory, and why it is not below `place`, empty where it is.
    """
    inside = place / "sockets"
    try:
        os.close(open_private_directory(inside, create=True))
    except CacheRefusedError as refusal:
        outside = Path(tempfile.mkdtemp(prefix="dg-cached-demo-", dir=_runtime_base()))
        try:
            yield outside, str(refusal)
        finally:
            shutil.rmtree(outside, ignore_errors=True)
    else:
        yield inside, ""


def _runtime_base() -> str:
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    return named if os.path.isabs(named) and os.access(named, os.W_OK | os.X_OK) else "/tmp"  # noqa: S108, PTH117


def _make(base: Path) -> tuple[Path, int]:
    """Return a new directory below `base` and the descriptor that holds its lock."""
    for _ in range(_TRIES):
        base.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # a run that ended has just removed `base`
            unnamed = Path(tempfile.mkdtemp(prefix=_UNNAMED, dir=base))
            lock = os.open(unnamed, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return unnamed.rename(base / unnamed.name.removeprefix(_UNNAMED)), lock
    raise FileNotFoundError(f"{base} is removed again and again")


def _remove_abandoned(base: Path) -> None:
    for entry in base.iterdir():
        if entry.name.startswith(_UNNAMED):
            continue
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry, ignore_errors=True)
            finally:
                os.close(descriptor)
