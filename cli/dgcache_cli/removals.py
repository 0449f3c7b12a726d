"""Removes what is ours in a tree, whatever happens to the tree meanwhile.

It walks as `trees` does. Only what has our own uid goes; links are removed, never followed. A
directory of ours is closed to everybody else (0700) before it is emptied, so that nobody changes
names in it meanwhile; where it has to stay it gets its mode back.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from dgcache_cli.trees import (
    Identity,
    Rules,
    Walker,
    identity,
    mount_of,
    opened_directory,
    opened_node,
)

_LISTED_LEFT = 20
_PRIVATE = 0o700


@dataclass(frozen=True, slots=True)
class Left:
    """An entry that was not removed; `by_rule` where it never may be."""

    path: str
    reason: str
    by_rule: bool


@dataclass(slots=True)
class Removal:
    """What a removal did. `left` names the first few; `failed` counts what should have gone."""

    entries: int = 0
    size: int = 0
    left: list[Left] = field(default_factory=list)
    left_entries: int = 0
    failed: int = 0
    stopped: str | None = None

    def leave(self, path: str, reason: str, *, by_rule: bool) -> None:
        """Note an entry that stays."""
        self.left_entries += 1
        self.failed += not by_rule
        if len(self.left) < _LISTED_LEFT:
            self.left.append(Left(path, reason, by_rule))


def remove(parent: int, name: str, expected: Identity, rules: Rules, result: Removal) -> None:
    """Remove what is ours under `name` in the directory `parent`, and add to `result` what went.

    Args:
        expected: what `name` was when it was judged; anything else stays.

    Raises:
        OSError: /proc is not there.
    """
    _Remover(rules, mount_of(parent), result).take(parent, name, name, 0, expected)


class _Remover(Walker):
    def __init__(self, rules: Rules, mount: str, result: Removal) -> None:
        super().__init__(rules, mount)
        self._result = result
        self._seen = 0

    def take(
        self, parent: int, name: str, path: str, depth: int, expected: Identity | None = None
    ) -> None:
        """Remove one entry with what is below it, as far as it is ours."""
        if self._seen >= self.rules.bounds.max_entries:
            self._result.stopped = self.too_many()
            return
        self._seen += 1
        try:
            with opened_node(name, parent) as node:
                status = os.fstat(node)
                if expected not in (None, identity(status)):
                    self._result.leave(path, "it was replaced meanwhile", by_rule=False)
                elif identity(status) in self.rules.kept:
                    self._result.leave(path, "dg-cached uses it", by_rule=True)
                elif stat.S_ISDIR(status.st_mode):
                    self._take_directory(parent, name, node, status, path, depth)
                else:
                    self._take_file(parent, name, status, path)
        except FileNotFoundError:  # somebody else removed it
            return
        except OSError as error:
            self._result.leave(path, _explained(error), by_rule=False)

    def _take_file(self, parent: int, name: str, status: os.stat_result, path: str) -> None:
        if status.st_uid != self.own_uid:
            self._result.leave(path, f"it belongs to uid {status.st_uid}", by_rule=True)
            return
        if not self.rules.is_expected(name, status):
            self._result.leave(path, self.rules.otherwise, by_rule=True)
            return
        os.unlink(name, dir_fd=parent)
        self._result.entries += 1
        self._result.size += status.st_size if status.st_nlink == 1 else 0

    def _take_directory(
        self, parent: int, name: str, node: int, status: os.stat_result, path: str, depth: int
    ) -> None:
        if mount_of(node) != self.mount:
            self._result.leave(path, "something is mounted there", by_rule=True)
            return
        if depth >= self.rules.bounds.max_depth:
            self._result.leave(path, self.too_deep(), by_rule=False)
            return
        if status.st_uid != self.own_uid:
            with suppress(PermissionError):
                self._empty(node, path, depth)
            self._result.leave(path, f"it belongs to uid {status.st_uid}", by_rule=True)
            return
        before = self._result.left_entries
        with _closed_to_others(node, status) as stays:
            self._empty(node, path, depth)
            if self._result.left_entries > before or self._result.stopped is not None:
                return  # what is in it was said
            os.rmdir(name, dir_fd=parent)
            stays.clear()
        self._result.entries += 1

    def _empty(self, node: int, path: str, depth: int) -> None:
        with opened_directory(node) as directory:
            for name in self.names(directory, self._seen):
                self.take(directory, name, f"{path}/{name}", depth + 1)


@contextmanager
def _closed_to_others(node: int, status: os.stat_result) -> Iterator[list[bool]]:
    """Make a directory of ours 0700 while the block runs; clear the list where it is gone.

    Modes are looked at in every call, so that one who had it open before is shut out as well.
    """
    stays = [True]
    mode = stat.S_IMODE(status.st_mode)
    itself = f"/proc/self/fd/{node}"
    if mode & 0o777 != _PRIVATE:
        os.chmod(itself, _PRIVATE)  # noqa: PTH101 - that very inode
    try:
        yield stays
    finally:
        if stays and mode & 0o777 != _PRIVATE:
            with suppress(OSError):
                os.chmod(itself, mode)  # noqa: PTH101


def _explained(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return "it cannot be removed (immutable, or in a sticky directory): see lsattr -d"
    if error.errno == errno.EBUSY:
        return "something is mounted there: see findmnt"
    return (error.strerror or str(error)).lower()
