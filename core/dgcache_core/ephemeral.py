"""A directory of this process's own for nameless files, and the removal of those of the dead.

Below a vetted directory each process makes `<machine>-<random>`, 0700, and holds a flock(2) on it
for as long as it lives: the lock tells living from dead, no pid is asked. Entries are files without
a name (`memory.unnamed_files`), so what a dead process leaves is its empty directory; where a file
system has no O_TMPFILE, and SIGKILL came within the moment in which a file has a name, also one
file, which is still empty then. Both go when the next process of this user and machine starts.

The rules:

- a directory is removed only by its owner, or by whoever got its lock; its owner checks, once it
  has the lock, that the directory was not removed in between;
- nothing is removed that has not a name of ours, of this machine (homes are shared, and a lock is
  not seen everywhere), or is not mine and 0700. No link is followed: every step is by descriptor;
- a forked child closes its copies and no more. It neither removes its parent's directory nor
  unlocks it (flock belongs to the open file description, which the two share).

No signal handler is installed: that is the program's to do, not a library's. An exception, SIGINT
(KeyboardInterrupt) and an ordinary end remove the directory; SIGTERM, unless the program handles
it, and SIGKILL leave it, empty, to the next start.
"""

import fcntl
import mmap
import os
import re
import secrets
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dgcache_core.directories import open_private_directory, open_private_subdirectory
from dgcache_core.errors import CacheFullError, CacheRefusedError, CacheUnavailableError
from dgcache_core.memory import is_momentary_name, unnamed_files
from dgcache_core.runtime_directory import machine_key

_RANDOM_BYTES = 16
_MAX_LOOKED_AT = 256
"""Names that one start looks at: 12 ms where each is a living process's, 140 ms where each is a
dead one's."""
_MAX_TRIES = 64
"""Each is lost only to a process that starts within the same microseconds."""


class EphemeralDirectory:
    """A private, locked directory, gone after `close`, or after the process. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Make it below `path`, which is made where it is missing, and remove those of the dead.

        Raises:
            CacheRefusedError: a check of `path` failed.
            CacheUnavailableError: no directory can be made or locked there.
            CacheFullError: no file can be made in it.
        """
        self._lock = threading.Lock()
        self._held = _Held()
        self._at_exit = weakref.finalize(self, self._held.remove)
        _open_directories.add(self)
        try:
            self._held.parent = open_private_directory(path, create=True)
            self._held.name, self._held.own = _make(self._held.parent, path)
            self._allocate = unnamed_files(self._held.own)
            self.allocate(mmap.PAGESIZE).close()  # a file system without such files says so now
            remove_dead(self._held.parent, path)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise CacheUnavailableError(f"{path}: {error.strerror}") from error
            raise

    def allocate(self, size: int) -> mmap.mmap:
        """Return a mapping of a nameless file; see `memory.Allocate`."""
        with self._lock:
            if self._held.own < 0:
                raise CacheFullError("this cache is closed")
            return self._allocate(size)

    def close(self) -> None:
        """Remove the directory and give its lock back. A second call does nothing.

        Mappings stay valid.
        """
        with self._lock:
            self._at_exit()

    def _leave_to_parent(self) -> None:
        self._lock = threading.Lock()  # a thread that this process does not have may hold it
        self._held.close()


@dataclass(slots=True)
class _Held:
    """What there is to give back. In a forked child it is closed, so nothing is removed."""

    parent: int = -1
    own: int = -1
    name: str = ""

    def remove(self) -> None:
        if self.own >= 0:
            with suppress(OSError):
                _remove(self.parent, self.name, self.own)
        self.close()

    def close(self) -> None:
        for descriptor in (self.parent, self.own):
            if descriptor >= 0:
                os.close(descriptor)
        self.parent = self.own = -1


def remove_dead(parent: int, path: Path) -> None:
    """Remove the directories of processes that are dead; look at a bounded number of names.

    Args:
        parent: the descriptor of the directory that they are in, which was vetted.
        path: what messages call it.
    """
    for name in list(islice(_names(parent), _MAX_LOOKED_AT)):
        with suppress(OSError, CacheRefusedError):  # removed meanwhile, or none of ours
            descriptor = open_private_subdirectory(parent, name, path / name)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(parent, name, descriptor)
            finally:
                os.close(descriptor)


def _make(parent: int, path: Path) -> tuple[str, int]:
    """Make a directory and lock it. Until it is locked, others take it for one of the dead."""
    for _ in range(_MAX_TRIES):
        name = f"{machine_key()}-{secrets.token_hex(_RANDOM_BYTES)}"
        with suppress(FileNotFoundError):
            descriptor = open_private_subdirectory(parent, name, path / name, create=True)
            try:
                if _is_locked(parent, name, descriptor):
                    return name, descriptor
                os.close(descriptor)
            except BaseException:
                os.close(descriptor)
                with suppress(OSError):
                    os.rmdir(name, dir_fd=parent)
                raise
    raise CacheUnavailableError(f"{path}: other processes remove what is made there")


def _is_locked(parent: int, name: str, descriptor: int) -> bool:
    """Lock a new directory; False where another process got it first, and removes it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def _names(parent: int) -> Iterator[str]:
    pattern = re.compile(rf"{machine_key()}-[0-9a-f]{{{2 * _RANDOM_BYTES}}}")
    with os.scandir(parent) as found:
        yield from (entry.name for entry in found if pattern.fullmatch(entry.name))


def _remove(parent: int, name: str, descriptor: int) -> None:
    """Remove a locked directory; something of somebody else in it keeps it there."""
    with os.scandir(descriptor) as found:
        for entry in islice(found, _MAX_LOOKED_AT):
            if is_momentary_name(entry.name):
                with suppress(OSError):
                    os.unlink(entry.name, dir_fd=descriptor)
    os.rmdir(name, dir_fd=parent)


_open_directories: "weakref.WeakSet[EphemeralDirectory]" = weakref.WeakSet()
_kept_over_fork: "list[list[EphemeralDirectory]]" = []
"""Until the child has closed it, no directory is garbage there, which would remove it."""


def _before_fork() -> None:
    _kept_over_fork.append(list(_open_directories))


def _after_fork_in_parent() -> None:
    _kept_over_fork.pop()


def _after_fork_in_child() -> None:
    for directory in _open_directories:
        directory._leave_to_parent()
    _kept_over_fork.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
