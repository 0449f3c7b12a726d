"""Strangers at the sockets: each is told of once, and a flood of them in few events.

The first refusal of a user is an event at once, with the pid. What follows within the window is
counted and told in one event at its end; while it goes on, windows get longer. A table of so many
users has a bound; the others in it share one window, so that whoever has many uids (a user
namespace gives 65,536) turns the ring of events no faster.

Used from the event loop alone.
"""

from typing import Final

from dgcache_core.peers import PeerCredentials
from dgcached.limits import Limits
from dgcached.security_events import SecurityEvents
from dgcached.windows import Windows

KIND = "peer-refused"
_OTHERS: Final = -1
_Refusal = tuple[str, PeerCredentials]


class RefusedPeers:
    """Tells of refused peers until it is closed."""

    def __init__(self, security: SecurityEvents, limits: Limits) -> None:
        self._security = security
        self._most_uids = limits.refused_uids
        self._windows: Windows[int, _Refusal] = Windows(
            limits.refused_seconds,
            limits.refused_most_seconds,
            tell=self._tell,
            tell_further=self._tell_further,
        )

    def report(self, socket: str, credentials: PeerCredentials) -> None:
        """Tell of a refusal, now or at the end of its user's window."""
        uid = credentials.uid
        if uid not in self._windows and len(self._windows) >= self._most_uids:
            uid = _OTHERS
        self._windows.take(uid, (socket, credentials))

    def close(self) -> None:
        """Tell what is not told yet."""
        self._windows.close()

    def _tell(self, _: int, refusal: _Refusal) -> None:
        socket, credentials = refusal
        self._security.report(KIND, socket=socket, uid=credentials.uid, pid=credentials.pid)

    def _tell_further(self, uid: int, refusal: _Refusal, times: int) -> None:
        socket, credentials = refusal
        self._security.report(
            KIND,
            socket=socket,
            uid="others" if uid == _OTHERS else uid,
            last_pid=credentials.pid,
            times=times,
        )
