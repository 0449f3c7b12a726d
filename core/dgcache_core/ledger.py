"""What our files were when we last wrote them, so that a change by anybody else is seen.

A row has what stat(2) tells, taken right after our own write. The kernel gives every write, chmod,
link and rename a new ctime, which nobody can set back (inode(7)), so a row that still matches says:
nobody wrote since. What it cannot see: a write through a mapping that was already dirty, and before
Linux 6.13 one of the same size in the same tick of the clock as ours (at most 10 ms). So it raises
alarms and proves no bytes; what is read is authenticated all the same.

Our own changes happen inside `own_change`, between whose ends `compare` finds nothing wrong with
the names it was given. One lock covers the rows and the look at the file, so that a comparison sees
either the state before a change of ours with its row, or the one after it. Thread-safe.

Names are relative to a directory's descriptor and never followed where they are links; "." is the
directory itself. Of a directory only who it is and who may use it counts, not what is in it.
"""

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Self


class ChangeKind(StrEnum):
    """What somebody else did to a file of ours."""

    OVERWRITTEN = "overwritten"
    REPLACED = "replaced"
    LINKED = "linked"
    CHMOD = "chmod"
    DELETED = "deleted"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class Change:
    """The difference between a row and the file now. `detail` has the fields, before and after."""

    kind: ChangeKind
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})"


@dataclass(frozen=True, slots=True)
class FileState:
    """What stat(2) tells of a file that counts: who it is, who may use it, and its last change."""

    dev: int
    ino: int
    type: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Take down what matters; of a directory, not what is in it."""
        contents = (status.st_nlink, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return cls(
            status.st_dev,
            status.st_ino,
            stat.S_IFMT(status.st_mode),
            stat.S_IMODE(status.st_mode),
            status.st_uid,
            status.st_gid,
            *((0, 0, 0, 0) if stat.S_ISDIR(status.st_mode) else contents),
        )

    def change_to(self, now: "FileState") -> Change:
        """Name the difference to another state, which there must be."""
        kind = next(
            kind
            for kind, fields in _KINDS
            if any(getattr(self, field) != getattr(now, field) for field in fields)
        )
        shown = (
            f"{field}={_shown(field, self)}->{_shown(field, now)}"
            for field in ("ino", "size", "nlink", "mode", "uid", "gid")
            if getattr(self, field) != getattr(now, field)
        )
        return Change(kind, " ".join(shown) or "times alone")


_KINDS: tuple[tuple[ChangeKind, tuple[str, ...]], ...] = (
    (ChangeKind.REPLACED, ("dev", "ino", "type")),
    (ChangeKind.OVERWRITTEN, ("size", "mtime_ns")),
    (ChangeKind.LINKED, ("nlink",)),
    (ChangeKind.CHMOD, ("mode", "uid", "gid")),
    # whoever puts the mtime back, or takes a link away again, cannot put this one back
    (ChangeKind.OVERWRITTEN, ("ctime_ns",)),
)
"""The worst comes first: it names the change where several fields differ."""


class Ledger:
    """The rows of the files in one directory."""

    def __init__(self) -> None:
        self._rows: dict[str, FileState] = {}
        self._changing: dict[str, int] = {}
        self._lock = threading.Lock()

    def record(self, dir_fd: int, name: str) -> None:
        """Take the file as it is now for ours, or forget it where it is not there.

        Args:
            dir_fd: the directory's descriptor.
            name: the file's name in it.

        Raises:
            OSError: it cannot be looked at.
        """
        with self._lock:
            self._record(dir_fd, name)

    def forget(self, name: str) -> None:
        """Strike a row out: the file is not ours any more."""
        with self._lock:
            self._rows.pop(name, None)

    def names(self) -> list[str]:
        """Return the names that have a row."""
        with self._lock:
            return list(self._rows)

    @contextmanager
    def own_change(self, dir_fd: int, *names: str) -> Iterator[None]:
        """Let us change these files; each is recorded at the end, or forgotten where it is gone.

        Name the temporary file of a write, too. Changes of one name may overlap. What somebody else
        does meanwhile is taken for ours, so do no more inside than the change itself.

        Raises:
            OSError: a file cannot be looked at afterwards.
        """
        with self._lock:
            for name in names:
                self._changing[name] = self._changing.get(name, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                try:
                    for name in names:
                        self._record(dir_fd, name)
                finally:
                    for name in names:
                        self._end(name)

    def compare(self, dir_fd: int, name: str) -> Change | None:
        """Return what somebody else did to the file since its row was taken, None for nothing.

        A file without a row is FOREIGN. No row is changed: whoever asked records or forgets.

        Raises:
            OSError: it cannot be looked at.
        """
        with self._lock:
            if name in self._changing:
                return None
            before, now = self._rows.get(name), _look(dir_fd, name)
        if before == now:
            return None
        if now is None:
            return Change(ChangeKind.DELETED, "")
        if before is None:
            return Change(ChangeKind.FOREIGN, f"uid={now.uid} mode={now.mode:04o}")
        return before.change_to(now)

    def _record(self, dir_fd: int, name: str) -> None:
        row = _look(dir_fd, name)
        if row is None:
            self._rows.pop(name, None)
        else:
            self._rows[name] = row

    def _end(self, name: str) -> None:
        self._changing[name] -= 1
        if not self._changing[name]:
            del self._changing[name]


def _look(dir_fd: int, name: str) -> FileState | None:
    try:
        return FileState.of(os.stat(name, dir_fd=dir_fd, follow_symlinks=False))
    except FileNotFoundError:
        return None


def _shown(field: str, row: FileState) -> str:
    value: int = getattr(row, field)
    return f"{value:04o}" if field == "mode" else str(value)
