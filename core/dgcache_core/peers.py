"""The peer rule of both sides: the other end of a socket is exactly my own effective user.

The kernel freezes the credentials at connect(2) and listen(2) (unix(7), SO_PEERCRED). The uid is
what is trusted; the pid is kept for logs and to bind a session to its connection, never to admit.
"""

import os
import socket
import struct
from dataclasses import dataclass

from dgcache_core.errors import CacheRefusedError

OVERFLOW_UID = 65534
"""How every unmapped uid looks from inside a user namespace (user_namespaces(7))."""

_UCRED = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """Who is at the other end of a Unix socket, as the kernel saw it."""

    pid: int
    uid: int
    gid: int


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """Return the credentials of the process that connected (or that listens)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return PeerCredentials(*_UCRED.unpack(raw))


def require_same_user(peer: PeerCredentials) -> None:
    """Refuse everybody but the user this process runs as, root included.

    Raises:
        CacheRefusedError: the uids differ, or either is the overflow uid, which may be anybody.
    """
    own_uid = os.geteuid()
    if OVERFLOW_UID in (peer.uid, own_uid):
        raise CacheRefusedError(
            f"peer uid {peer.uid} or own uid {own_uid} is the overflow uid: it may be anybody"
        )
    if peer.uid != own_uid:
        raise CacheRefusedError(f"peer uid {peer.uid} is not the own uid {own_uid}")
