"""Inputs that are kept: seeds by hand, a small corpus of each target, and every crash for ever.

A search replaces the corpus by what reaches more, and leaves the others alone.
"""

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
CORPUS_BYTES = 32 << 10
"""For each target, so that all stay below 200 kB."""
CORPUS_INPUTS = 200
"""For each target: what reaches a live daemon counts as new far more often than it is."""


def corpus_of(target: str) -> list[Path]:
    """Return what a search has left."""
    return _files(HERE / "corpus" / target)


def seeds_of(target: str) -> list[Path]:
    """Return what somebody thought of."""
    return _files(HERE / "seeds" / target)


def crashes_of(target: str) -> list[Path]:
    """Return what once broke a target."""
    return _files(HERE / "crashes" / target)


def seed(target: str, directory: Path) -> None:
    """Copy all of it to where a search begins."""
    directory.mkdir()
    for path in (*seeds_of(target), *corpus_of(target), *crashes_of(target)):
        shutil.copy(path, directory / path.name)


def keep_some(target: str, source: Path) -> str:
    """Replace the corpus by inputs of `source` of every size that fit; tell how many those are."""
    found = sorted((path.read_bytes() for path in _files(source)), key=lambda one: (len(one), one))
    inputs = found[:: -(-len(found) // CORPUS_INPUTS) or 1]
    for path in corpus_of(target):
        path.unlink()
    room, kept = CORPUS_BYTES, 0
    for data in inputs:
        room -= len(data)
        if room < 0:
            break
        store(HERE / "corpus" / target, data)
        kept += 1
    return f"{kept} of {len(found)} inputs"


def store(directory: Path, data: bytes, prefix: str = "") -> Path:
    """Write an input under a name that follows from it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / (prefix + hashlib.sha256(data).hexdigest()[:16])
    path.write_bytes(data)
    return path


def _files(directory: Path) -> list[Path]:
    files: Iterable[Path] = directory.iterdir() if directory.is_dir() else ()
    return sorted(path for path in files if path.is_file() and not path.name.startswith("."))
