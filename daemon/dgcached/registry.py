"""Who is connected: the table that turns gRPC's name of a peer into credentials.

gRPC tells neither descriptor nor credentials of a Unix connection. So the listener checks them at
accept and gives the inner end of the relay a random abstract name, which is what `context.peer()`
shows. A name leaves the table *before* its socket closes: a closed abstract name can be bound by
anybody.
"""

import hashlib
import hmac
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgcache_core.peers import PeerCredentials, peer_credentials

if TYPE_CHECKING:
    from dgcached.sessions import Session

_SO_PEERPIDFD = 77  # Linux 6.5


@dataclass(frozen=True, slots=True)
class Peer:
    """A process at the other end, as it was when it connected.

    `process` is the inode of its pidfd: unique for the life of the system where the kernel has
    pidfs (6.9), so that a reused pid is not taken for the same process; 0 where it is not known.
    """

    credentials: PeerCredentials
    process: int

    def __str__(self) -> str:
        return f"uid {self.credentials.uid} pid {self.credentials.pid}"


def identify(connection: socket.socket) -> Peer:
    """Return who connected."""
    return Peer(peer_credentials(connection), _process_inode(connection))


def _process_inode(connection: socket.socket) -> int:
    try:
        pidfd = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        return 0
    try:
        return os.fstat(pidfd).st_ino
    finally:
        os.close(pidfd)


class Registry:
    """The connections and sessions that are open now."""

    def __init__(self) -> None:
        self._connections: dict[str, Peer] = {}
        self._sessions: dict[bytes, Session] = {}

    @property
    def connections(self) -> int:
        """How many connections to rpc.sock are open."""
        return len(self._connections)

    @property
    def sessions(self) -> "list[Session]":
        """The open sessions."""
        return list(self._sessions.values())

    def add_connection(self, name: str, peer: Peer) -> None:
        """Enter a relay by the abstract name of its inner end."""
        self._connections[name] = peer

    def remove_connection(self, name: str) -> None:
        """Forget a relay; its inner socket is still open."""
        self._connections.pop(name, None)

    def peer_of(self, grpc_peer: str) -> Peer | None:
        """Return who is behind `context.peer()`, or None for a connection that is not ours."""
        return self._connections.get(grpc_peer.removeprefix("unix-abstract:"))

    def add_session(self, session: "Session") -> None:
        """Enter a session by a hash of its id: looking up a guess tells nothing by its timing."""
        self._sessions[_hash(session.id)] = session

    def remove_session(self, session: "Session") -> None:
        """Forget a session."""
        self._sessions.pop(_hash(session.id), None)

    def session_of(self, peer: Peer, claimed_id: str) -> "Session | None":
        """Return the session with this id if it belongs to this very peer."""
        try:
            session_id = bytes.fromhex(claimed_id)
        except ValueError:
            return None
        session = self._sessions.get(_hash(session_id))
        if session is None or session.peer != peer:
            return None
        return session if hmac.compare_digest(session.id, session_id) else None


def _hash(session_id: bytes) -> bytes:
    return hashlib.sha256(session_id).digest()
