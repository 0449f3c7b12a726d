"""Walks that cannot be led out of the directory they begin in, and what they find there.

Every name is opened relative to the descriptor of the directory it stands in and never through a
link (openat(2) with O_NOFOLLOW; CWE-59, CWE-367). A directory on another mount is not entered, even
where it is the same file system bound twice. Entries and depth are bounded, and a walk that met its
bound says so.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice

Identity = tuple[int, int]
"""Device and inode: what a name led to when it was looked at."""

_NODE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a walk goes."""

    max_entries: int = 200_000
    max_depth: int = 64


@dataclass(frozen=True, slots=True)
class Rules:
    """What a walk is about.

    Args:
        bounds: where it stops.
        kept: directories that are not touched wherever they stand.
        is_plaintext: tells from its name whether a file holds what must not be read.
        is_expected: tells from its name and status whether a file may be there.
        otherwise: why one stays that may not.
    """

    bounds: Bounds = Bounds()
    kept: frozenset[Identity] = frozenset()
    is_plaintext: Callable[[str], bool] = lambda _name: False
    is_expected: Callable[[str, os.stat_result], bool] = lambda _name, _status: True
    otherwise: str = "it is not a file of DeltaGlider's"


@dataclass(slots=True)
class Survey:
    """What a tree holds. Paths are relative to where the walk began; None where there is none."""

    entries: int = 0
    files: int = 0
    size: int = 0
    """Bytes that removing our own files frees."""
    readable: int = 0
    """Files of ours that others can read, the directories above them considered."""
    plaintext: int = 0
    exposed: int = 0
    """Plaintext files of ours, and those of them that others can read."""
    writable: int = 0
    """Files and directories of ours that others can write to."""
    linked: int = 0
    """Files of ours that have a second name, here or elsewhere."""
    foreign: int = 0
    newest: float = 0.0
    """The latest modification in it, in seconds since the epoch."""
    unexpected: str | None = None
    unreadable: str | None = None
    mount: str | None = None
    stopped: str | None = None

    @property
    def is_complete(self) -> bool:
        """Tell whether everything was seen."""
        return self.unreadable is None and self.stopped is None


def identity(status: os.stat_result) -> Identity:
    """Return what tells an inode from all others."""
    return status.st_dev, status.st_ino


def mount_of(descriptor: int) -> str:
    """Return the id of the mount a descriptor is on (proc(5), fdinfo).

    Raises:
        OSError: /proc is not there.
    """
    with open(f"/proc/self/fdinfo/{descriptor}") as lines:  # noqa: PTH123
        return next(line for line in lines if line.startswith("mnt_id:"))


@contextmanager
def opened_node(name: str, dir_fd: int) -> Iterator[int]:
    """Lend an O_PATH descriptor of what stands under a name, a link itself included."""
    node = os.open(name, _NODE, dir_fd=dir_fd)
    try:
        yield node
    finally:
        os.close(node)


@contextmanager
def opened_directory(node: int) -> Iterator[int]:
    """Lend a readable descriptor of the directory that `node` is."""
    directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=node)
    try:
        yield directory
    finally:
        os.close(directory)


def bits_for_others(status: os.stat_result) -> int:
    """Return what others may do (r 4, w 2, x 1); a group other than our own is others."""
    mode = stat.S_IMODE(status.st_mode)
    return (mode | (mode >> 3 if status.st_gid != os.getegid() else 0)) & 7


def survey(parent: int, name: str, rules: Rules, result: Survey, *, reachable: bool) -> None:
    """Add what stands under `name` in the directory `parent` to `result`; change nothing.

    Args:
        reachable: whether others can come as far as `parent`.

    Raises:
        OSError: `name` is gone, or /proc is not there.
    """
    _Surveyor(rules, mount_of(parent), result).look_at(parent, name, name, 0, reachable=reachable)


class Walker:
    """What survey and removal share: the rules, the mount they stay on, the bounds."""

    def __init__(self, rules: Rules, mount: str) -> None:
        self.rules = rules
        self.mount = mount
        self.own_uid = os.geteuid()

    def names(self, directory: int, seen: int) -> list[str]:
        """Return the names in a directory, at most one more than the budget has left."""
        with os.scandir(directory) as entries:
            left = max(0, self.rules.bounds.max_entries - seen)
            return [entry.name for entry in islice(entries, left + 1)]

    def too_many(self) -> str:
        """Say that the bound on entries was met."""
        return f"stopped after {self.rules.bounds.max_entries} entries"

    def too_deep(self) -> str:
        """Say that the bound on depth was met."""
        return f"stopped {self.rules.bounds.max_depth} directories deep"


class _Surveyor(Walker):
    def __init__(self, rules: Rules, mount: str, result: Survey) -> None:
        super().__init__(rules, mount)
        self._result = result

    def look_at(self, parent: int, name: str, path: str, depth: int, *, reachable: bool) -> None:
        result = self._result
        if result.entries >= self.rules.bounds.max_entries:
            result.stopped = self.too_many()
            return
        with opened_node(name, parent) as node:
            status = os.fstat(node)
            if identity(status) in self.rules.kept:
                return
            result.entries += 1
            result.newest = max(result.newest, status.st_mtime)
            result.foreign += status.st_uid != self.own_uid
            if stat.S_ISDIR(status.st_mode):
                self._look_into(node, status, path, depth, reachable=reachable)
            else:
                self._look_at_file(status, name, path, reachable=reachable)

    def _look_at_file(
        self, status: os.stat_result, name: str, path: str, *, reachable: bool
    ) -> None:
        result = self._result
        result.files += 1
        if not self.rules.is_expected(name, status):
            result.unexpected = result.unexpected or path
        if status.st_uid != self.own_uid or stat.S_ISLNK(status.st_mode):
            return
        result.linked += status.st_nlink > 1
        result.size += status.st_size if status.st_nlink == 1 else 0
        is_plaintext = self.rules.is_plaintext(name)
        result.plaintext += is_plaintext
        if reachable:
            bits = bits_for_others(status)
            result.readable += bool(bits & 4)
            result.exposed += is_plaintext and bool(bits & 4)
            result.writable += bool(bits & 2)

    def _look_into(
        self, node: int, status: os.stat_result, path: str, depth: int, *, reachable: bool
    ) -> None:
        result, bits = self._result, bits_for_others(status)
        if status.st_uid == self.own_uid and reachable:
            result.writable += bits & 3 == 3
        if mount_of(node) != self.mount:
            result.mount = result.mount or path
            return
        if depth >= self.rules.bounds.max_depth:
            result.stopped = self.too_deep()
            return
        try:
            with opened_directory(node) as directory:
                for name in self.names(directory, result.entries):
                    with suppress(FileNotFoundError):
                        self.look_at(
                            directory,
                            name,
                            f"{path}/{name}",
                            depth + 1,
                            reachable=reachable and bool(bits & 1),
                        )
        except OSError:
            result.unreadable = result.unreadable or path
