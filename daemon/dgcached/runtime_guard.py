"""Guards the runtime directory: what somebody else does there is seen, and undone where possible.

The lock makes the two sockets' names ours, so a socket that was removed, replaced or linked from
elsewhere is made again in its place, at once: clients find it, and what is connected goes on. This
holds for systemd's sockets, too. To exit instead would help nobody, since the unit does not notice
that its socket's file is gone and would go on listening where nobody can connect; until somebody
starts the socket unit again, clients are served on a socket of ours.

Modes are put back, except the directory's own: clients refuse it and name the command, since who
opened it may have put anything into it. A lock file that was taken away is taken again. What cannot
be made again ends the daemon in good order, so that the next one begins anew: the directory's path,
the directory and socket of the inner server. Who goes on taking sockets away ends it, too. Files of
other names concern nobody.
"""

import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from socket import socket

from dgcache_core.ledger import ChangeKind, Ledger
from dgcache_core.runtime_directory import DAEMON_LOCK, RPC_SOCKET, SESSION_SOCKET
from dgcached.limits import Limits
from dgcached.monitor import Audited, Finding
from dgcached.security_events import SecurityEvents
from dgcached.sockets import INNER_DIRECTORY, INNER_SOCKET, AlreadyServing, Listeners
from dgcached.watchers import ITSELF, Directory

_MINUTE_SECONDS = 60.0
_SOCKETS = (SESSION_SOCKET, RPC_SOCKET)
_MODES = {
    **dict.fromkeys((*_SOCKETS, INNER_SOCKET, DAEMON_LOCK), 0o600),
    INNER_DIRECTORY: 0o700,
}
_GUARDED = (ITSELF, *_MODES)
_GONE = (ChangeKind.DELETED, ChangeKind.REPLACED)


class RuntimeGuard:
    """Implements `Audited` for the directory of the sockets, and mends what it finds."""

    place = "runtime"
    on_new_directory: Callable[[Directory], None]

    def __init__(
        self,
        listeners: Listeners,
        security: SecurityEvents,
        limits: Limits,
        *,
        give_up: Callable[[str], None],
    ) -> None:
        """Do nothing yet; `give_up` ends the daemon and is told why."""
        self._listeners = listeners
        self._security = security
        self._give_up = give_up
        self._fd = listeners.directory_fd
        self._ledger = Ledger()
        self._in_place = True
        self._inner_runs = False
        self._rebound: deque[float] = deque(maxlen=limits.rebinds_per_minute)

    async def start(
        self,
        session_listen_on: Callable[[socket], None],
        rpc_listen_on: Callable[[socket], Awaitable[None]],
    ) -> None:
        """Take what is there for ours; a socket whose file is missing already is made again."""
        self._session_listen_on = session_listen_on
        self._rpc_listen_on = rpc_listen_on
        for name in _GUARDED:
            self._ledger.record(self._fd, name)
        for name in set(_SOCKETS) - set(self._ledger.names()):
            self._security.report("deleted", place=self.place, name=name)
            await self._bind_again(name)

    @contextmanager
    def change_of_inner(self, made: bool) -> Iterator[None]:
        """Let the inner server's socket be made or taken away by us while the block runs."""
        self._inner_runs = False
        with self._ledger.own_change(self._fd, INNER_SOCKET):
            yield
        self._inner_runs = made

    # -- auditing ------------------------------------------------------------------------------

    def watched_directories(self) -> list[Directory]:
        """See `Audited`."""
        return [Directory(self._fd), Directory(self._fd, INNER_DIRECTORY)]

    def audit(self, directory: Directory, name: str) -> Finding | None:
        """See `Audited`."""
        path = os.path.normpath(f"{directory.name}/{name}")
        return self._audit(path) if path in _GUARDED else None

    def audit_all(self) -> list[Finding]:
        """See `Audited`."""
        findings = map(self._audit, _GUARDED)
        return [finding for finding in findings if finding is not None]

    def _audit(self, name: str) -> Finding | None:
        if name == ITSELF and self._in_place and not self._listeners.is_in_place():
            self._in_place = False
            return Finding(ChangeKind.DELETED, name, f"{self._listeners.directory} leads elsewhere")
        is_ours = self._must_exist(name)
        change = self._ledger.compare(self._fd, name)
        if change is None:
            # no row and no file: somebody took it away while we made it, and the row found nothing
            missing = is_ours and name not in self._ledger.names() and self._must_exist(name)
            return Finding(ChangeKind.DELETED, name) if missing else None
        self._ledger.record(self._fd, name)
        return Finding(change.kind, name, change.detail)

    def _must_exist(self, name: str) -> bool:
        """Asked before and after a look, since the event loop may start or stop it meanwhile."""
        return name != INNER_SOCKET or self._inner_runs

    # -- mending -------------------------------------------------------------------------------

    async def mend(self, _: Audited, finding: Finding) -> None:
        """Undo what was done, or give up; runs in the event loop."""
        if not self._listeners.is_in_place():
            self._give_up(f"{self._listeners.directory} was taken away")
        elif finding.kind is ChangeKind.CHMOD and finding.name in _MODES:
            self._put_the_mode_back(finding.name)
        elif finding.kind in (*_GONE, ChangeKind.LINKED) and finding.name in _SOCKETS:
            await self._bind_again(finding.name)  # nobody listens behind the link then
        elif finding.kind in _GONE and finding.name == DAEMON_LOCK:
            self._lock_again()
        elif finding.kind in _GONE and finding.name in _MODES:
            self._give_up(f"{finding.name} was taken away")

    async def _bind_again(self, name: str) -> None:
        now = time.monotonic()
        full = len(self._rebound) == self._rebound.maxlen
        if full and now - self._rebound[0] < _MINUTE_SECONDS:
            self._give_up(f"somebody goes on taking {name} away")
            return
        self._rebound.append(now)
        try:
            with self._ledger.own_change(self._fd, name):
                old = self._listeners.bind_again(name)
        except OSError as error:
            self._give_up(f"{name} cannot be made again: {error.strerror}")
            return
        with old:
            if name == SESSION_SOCKET:
                self._session_listen_on(self._listeners.session)
            else:
                await self._rpc_listen_on(self._listeners.rpc)

    def _lock_again(self) -> None:
        try:
            with self._ledger.own_change(self._fd, DAEMON_LOCK):
                self._listeners.lock_again()
        except (OSError, AlreadyServing) as error:
            self._give_up(f"{DAEMON_LOCK} cannot be taken again: {error}")

    def _put_the_mode_back(self, name: str) -> None:
        with suppress(OSError), self._ledger.own_change(self._fd, name):
            node = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
            try:
                os.chmod(f"/proc/self/fd/{node}", _MODES[name])  # noqa: PTH101 - that very inode
            finally:
                os.close(node)
