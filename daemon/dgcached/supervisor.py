"""What systemd gives and wants: listening sockets and notifications, by its two small protocols.

sd_listen_fds(3) and sd_notify(3) are environment variables and one datagram; both man pages
suggest speaking them directly.
"""

import os
import socket
from contextlib import suppress

from dgcache_core.errors import CacheRefusedError

_FIRST_DESCRIPTOR = 3
_MOST_DESCRIPTORS = 64
_MICROSECONDS = 1_000_000


def take_listeners() -> list[socket.socket]:
    """Return the sockets that were handed over, and forget the variables that told of them.

    Raises:
        CacheRefusedError: what was handed over are not sockets.
    """
    own = os.environ.get("LISTEN_PID") == str(os.getpid())
    text = os.environ.get("LISTEN_FDS", "0")
    if own and not (text.isdecimal() and int(text) <= _MOST_DESCRIPTORS):
        raise CacheRefusedError(f"LISTEN_FDS={text!r} is not a number of descriptors")
    count = int(text) if own else 0
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    listeners = []
    for descriptor in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + count):
        try:
            os.set_inheritable(descriptor, False)
            listeners.append(socket.socket(fileno=descriptor))
        except OSError as error:
            raise CacheRefusedError(
                f"descriptor {descriptor} of LISTEN_FDS is no socket"
            ) from error
    return listeners


class Notifier:
    """Tells whoever started us how we are; silent where nobody asked.

    It is connected from the beginning: an abstract socket of somebody else is out of reach later.
    """

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._sender: socket.socket | None = None
        if not address:
            return
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        sender.settimeout(1)
        try:
            sender.connect("\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            sender.close()
        else:
            self._sender = sender

    def __enter__(self) -> "Notifier":
        return self

    def __exit__(self, *_: object) -> None:
        if self._sender is not None:
            self._sender.close()

    def fileno(self) -> int:
        """Return its descriptor, or -1."""
        return self._sender.fileno() if self._sender is not None else -1

    def notify(self, **states: str) -> None:
        """Send assignments such as READY="1". A supervisor that is gone, or too busy to take this
        one within a second, is no reason to stop; thread-safe."""
        if self._sender is None:
            return
        message = "\n".join(f"{name}={value}" for name, value in states.items())
        with suppress(OSError):
            self._sender.send(message.encode(errors="replace"))


def supervised_by_systemd() -> bool:
    """INVOCATION_ID is set for every process of a unit (systemd.exec(5)); SYSTEMD_EXEC_PID names
    the main one, so that a daemon started by hand from a unit's shell is not mistaken for it."""
    return os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())


def take_watchdog_interval() -> float | None:
    """Return the seconds between two signs of life, half of what is waited for them; None where
    nobody waits (sd_watchdog_enabled(3)). The variables that told of it are forgotten."""
    text = os.environ.pop("WATCHDOG_USEC", "")
    pid = os.environ.pop("WATCHDOG_PID", "")
    if pid not in ("", str(os.getpid())):
        return None
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        return None
    return int(text) / _MICROSECONDS / 2
