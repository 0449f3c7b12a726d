"""When memory files are really gone: with the last that refers to them, an O_PATH descriptor too.

The kernel tells it to a watch on the file (inotify(7), IN_DELETE_SELF), which keeps its inode's
number for itself but none of its pages. Where no watch can be had, nothing is told.
"""

import os
import struct

_IN_DELETE_SELF, _IN_IGNORED = 0x400, 0x8000
_EVENT = struct.Struct("=iIII")
_BUFFER_BYTES = 1 << 16


class Departures:
    """Watches files that have no name. Not thread-safe."""

    def __init__(self) -> None:
        import ctypes  # clients know handouts, too, and watch none

        self._libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)

    def watch(self, descriptor: int) -> int | None:
        """Return what names the file in `take`; None where it cannot be watched."""
        if self._inotify < 0:
            return None
        path = f"/proc/self/fd/{descriptor}".encode()
        watch: int = self._libc.inotify_add_watch(self._inotify, path, _IN_DELETE_SELF)
        return watch if watch >= 0 else None

    def take(self) -> list[int]:
        """Return which of the watched files have gone since the last call."""
        gone: list[int] = []
        while events := self._read():
            at = 0
            while at < len(events):
                watch, mask, _, length = _EVENT.unpack_from(events, at)
                at += _EVENT.size + length
                if mask & _IN_IGNORED:
                    gone.append(watch)
        return gone

    def close(self) -> None:
        """Watch nothing more; a second call does nothing."""
        if self._inotify >= 0:
            os.close(self._inotify)
            self._inotify = -1

    def _read(self) -> bytes:
        if self._inotify < 0:
            return b""
        try:
            return os.read(self._inotify, _BUFFER_BYTES)
        except OSError:  # nothing was told, or it was refused: then the next call gets it
            return b""
