"""Which processes have something open below a directory: descriptors, working directories, maps.

What the kernel does not show is not seen: processes of other users unless we are root, processes
that are not dumpable, and other pid namespaces (proc(5), ptrace(2)).
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has something open."""

    pid: int
    command: str


def find_holders(roots: Iterable[str]) -> dict[str, Holder]:
    """Return, for each of the absolute paths, the first process that has it or one below it open.

    Paths are compared as the kernel tells them, so `roots` must be without links.
    """
    wanted = set(roots)
    held: dict[str, Holder] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        if not wanted - held.keys():
            break
        for path in _paths_of(entry):
            for root in _with_parents(path.removesuffix(" (deleted)")):
                if root in wanted and root not in held:
                    held[root] = Holder(int(entry.name), _command(entry))
    return held


def _paths_of(process: Path) -> Iterator[str]:
    for name in ("cwd", "root", "exe"):
        with suppress(OSError):
            yield str((process / name).readlink())
    if process.name == str(os.getpid()):  # what we have open ourselves is for the walk
        return
    with suppress(OSError), os.scandir(process / "fd") as descriptors:
        for descriptor in descriptors:
            with suppress(OSError):
                yield os.readlink(descriptor.path)  # noqa: PTH115 - a string is what is compared
    with suppress(OSError), (process / "maps").open(errors="surrogateescape") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(None, 5)
            if len(fields) == 6 and fields[5].startswith("/"):
                yield fields[5].replace("\\012", "\n")


def _with_parents(path: str) -> Iterator[str]:
    while len(path) > 1 and path.startswith("/"):
        yield path
        path = path.rpartition("/")[0]


def _command(process: Path) -> str:
    try:
        return (process / "comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return "gone"
