"""What a run of DeltaGlider can leave outside the clone: its directory in /tmp.

DeltaGlider 6.2.0 makes `/tmp/deltaglider-…` whatever TMPDIR says, and removes it when it exits as
it should; one that is killed leaves it, with whatever reference was in it.

So this is for after a DeltaGlider of ours did not end well. A directory that is new since may as
well belong to another one of this user that is running now. Its owner sees the same /tmp, and has
loaded cryptography, which DeltaGlider imports first, from another environment than this one, which
has no DeltaGlider. Where nobody alive fits that, the directory is nobody's.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

_DIRECTORY = Path("/tmp")  # noqa: S108 - DeltaGlider's own choice
_OWNERS_MARK = "/cryptography/hazmat/bindings/_rust"


def deltaglider_directories() -> frozenset[Path]:
    """Return the directories in /tmp that some DeltaGlider of this user made."""
    found = set()
    for path in _DIRECTORY.glob("deltaglider-*"):
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_uid == os.geteuid():
                found.add(path)
    return frozenset(found)


def remove_orphans(before: frozenset[Path]) -> str:
    """Remove the directories that are new since `before` and nobody's; tell what was done."""
    fresh = sorted(deltaglider_directories() - before)
    names = " ".join(map(str, fresh))
    if not fresh:
        return ""
    if any(_possible_owners()):
        return f"left alone, another DeltaGlider may be using it: {names}"
    for path in fresh:
        shutil.rmtree(path, ignore_errors=True)
    return f"removed what DeltaGlider left: {names}"


def _possible_owners() -> Iterator[Path]:
    for process in Path("/proc").glob("[1-9]*"):
        with contextlib.suppress(OSError):  # it ended, or, as dg-cached, it lets nobody look
            if process.stat().st_uid == os.geteuid() and _may_own(process):
                yield process


def _may_own(process: Path) -> bool:
    if (process / "comm").read_text() == "dg-cached\n":
        return False
    mapped = [line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()]
    return any(
        _OWNERS_MARK in path and not path.startswith(f"{sys.prefix}/") for path in mapped
    ) and os.path.samestat((process / "root/tmp").stat(), _DIRECTORY.stat())
