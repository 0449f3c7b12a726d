"""The daemon itself, without a fallback: for those who ask about it, and for what falls back."""

import os
from typing import TYPE_CHECKING

from dgcache.session import Session
from dgcache_core.errors import CacheError

if TYPE_CHECKING:
    from dgcache.remote import DaemonBackend
    from dgcache.settings import Settings


def connect(settings: "Settings") -> "DaemonBackend":
    """Return the daemon's backend, without a fallback.

    Raises:
        CacheUnavailableError: there is no daemon that can be used.
        CacheRefusedError: a directory or the daemon's uid failed its check.
    """
    session = Session.connect(settings.socket_dir, os.environ, settings.connect_timeout_ms / 1000)
    from dgcache.remote import DaemonBackend  # loaded only now that there is a daemon

    try:
        return DaemonBackend(session, settings.transport or "grpc")
    except CacheError:
        session.close()
        raise
