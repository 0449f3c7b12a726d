"""What tells that something happened in a directory: fanotify where it may be used, else inotify.

A watcher says where to look, and no more: both mechanisms lose events when their queue overflows,
see no write through a hard link elsewhere, and a write through a mapping only when the writer
closes. What happened is for the ledger to say.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from dgcached.fanotify import Fanotify, WatchedHandle

ITSELF = "."
"""The name of a directory in its own notices."""


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory below one that somebody holds open for as long as it is watched."""

    fd: int
    name: str = ITSELF

    @property
    def path(self) -> str:
        """A path that no rename above can redirect (proc_pid_fd(5))."""
        return f"/proc/self/fd/{self.fd}/{self.name}"


@dataclass(frozen=True, slots=True)
class Notice:
    """Something happened to `name` in `directory`; without a directory, events were lost."""

    directory: Directory | None
    name: str = ""
    is_over: bool = False
    """The directory is gone, and is not watched any more."""


OVERFLOW = Notice(None)


class Watcher(Protocol):
    """One mechanism. Used inside one event loop; whoever made it closes it."""

    mechanism: str

    def add(self, directory: Directory) -> None:
        """Begin to watch a directory, or go on.

        Raises:
            OSError: it cannot be watched.
        """

    async def read(self) -> list[Notice]:
        """Wait for the next notices; the same thing may be told several times."""

    def close(self) -> None:
        """Give everything back."""


class FanotifyWatcher:
    """See fanotify(7): events of this very process are known by its pid, and left out."""

    mechanism = "fanotify"

    def __init__(self) -> None:
        """Raises OSError where it may not be used."""
        self._group = Fanotify()
        # two file systems may give the same handle: then both directories are looked at
        self._directories: dict[WatchedHandle, set[Directory]] = {}

    def add(self, directory: Directory) -> None:
        """See `Watcher`."""
        self._directories.setdefault(self._group.mark(directory.path), set()).add(directory)

    async def read(self) -> list[Notice]:
        """See `Watcher`."""
        notices: list[Notice] = []
        while not notices:
            await _readable(self._group.fd)
            for event in self._group.read():
                if event.handle is None:
                    notices.append(OVERFLOW)
                    continue
                is_over = event.is_over and event.name == ITSELF
                directories: Iterable[Directory] = (
                    self._directories.pop(event.handle, ())
                    if is_over
                    else self._directories.get(event.handle, ())
                )
                notices.extend(Notice(one, event.name, is_over) for one in directories)
        return notices

    def close(self) -> None:
        """See `Watcher`."""
        self._group.close()


class InotifyWatcher:
    """See inotify(7). It cannot tell who did it, so that our own events are told, too."""

    mechanism = "inotify"

    def __init__(self) -> None:
        """Raises OSError where no instance is left."""
        from asyncinotify import Inotify, Mask  # looks for libc by a program: 10 ms

        self._mask = (
            Mask.MODIFY | Mask.CLOSE_WRITE | Mask.ATTRIB | Mask.CREATE | Mask.DELETE | Mask.MOVE
        ) | (Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.ONLYDIR)
        self._lost, self._is_over = Mask.Q_OVERFLOW, Mask.IGNORED
        self._inotify = Inotify(cache_size=64)
        self._directories: dict[int, Directory] = {}

    def add(self, directory: Directory) -> None:
        """See `Watcher`."""
        watch = self._inotify.add_watch(directory.path, self._mask)
        self._directories[watch.wd] = directory

    async def read(self) -> list[Notice]:
        """See `Watcher`."""
        event = await self._inotify.get()
        if self._lost in event.mask:
            return [OVERFLOW]
        wd = event.watch.wd if event.watch is not None else -1
        is_over = self._is_over in event.mask
        directory = self._directories.pop(wd, None) if is_over else self._directories.get(wd)
        if directory is None:
            return []
        return [Notice(directory, str(event.name or ITSELF), is_over)]

    def close(self) -> None:
        """See `Watcher`."""
        self._inotify.close()


MECHANISMS: dict[str, type[FanotifyWatcher] | type[InotifyWatcher]] = {
    "fanotify": FanotifyWatcher,
    "inotify": InotifyWatcher,
}


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(descriptor, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
