"""Strangers at the sockets: each is told of once, and a flood of them in few events.

The first refusal of a user is an event at once, with the pid. What follows within the window is
counted and told in one event at its end; while it goes on, windows get longer. A table of so many
users has a bound; the others in it share one window, so that whoever has many uids (a user
namespace gives 65,536) turns the ring of events no faster.

Used from the event loop alone.
"""

import asyncio
from dataclasses import dataclass

from dgcache_core.peers import PeerCredentials
from dgcached.limits import Limits
from dgcached.security_events import SecurityEvents

KIND = "peer-refused"
_OTHERS = -1


@dataclass(slots=True)
class _Window:
    """What one user did since it was told of."""

    seconds: float
    timer: asyncio.TimerHandle
    further: int = 0
    socket: str = ""
    pid: int = 0


class RefusedPeers:
    """Tells of refused peers until it is closed."""

    def __init__(self, security: SecurityEvents, limits: Limits) -> None:
        self._security = security
        self._limits = limits
        self._windows: dict[int, _Window] = {}
        self._loop = asyncio.get_running_loop()

    def report(self, socket: str, credentials: PeerCredentials) -> None:
        """Tell of a refusal, now or at the end of its user's window."""
        uid = credentials.uid
        if uid not in self._windows and len(self._windows) >= self._limits.refused_uids:
            uid = _OTHERS
        window = self._windows.get(uid)
        if window is None:
            self._open(uid, self._limits.refused_seconds)
            self._security.report(KIND, socket=socket, uid=credentials.uid, pid=credentials.pid)
            return
        window.further += 1
        window.socket, window.pid = socket, credentials.pid

    def close(self) -> None:
        """Tell what is not told yet."""
        for uid, window in self._windows.items():
            window.timer.cancel()
            self._tell(uid, window)
        self._windows.clear()

    def _open(self, uid: int, seconds: float) -> None:
        timer = self._loop.call_later(seconds, self._end, uid)
        self._windows[uid] = _Window(seconds, timer)

    def _end(self, uid: int) -> None:
        window = self._windows.pop(uid)
        self._tell(uid, window)
        if window.further:
            self._open(uid, min(2 * window.seconds, self._limits.refused_most_seconds))

    def _tell(self, uid: int, window: _Window) -> None:
        if window.further:
            self._security.report(
                KIND,
                socket=window.socket,
                uid="others" if uid == _OTHERS else uid,
                last_pid=window.pid,
                times=window.further,
            )
