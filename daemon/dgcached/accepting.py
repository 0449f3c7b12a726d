"""Accepts on one of the two public sockets, one connection in each turn of the event loop.

Not by a server of asyncio's: without descriptors that calls accept() as often as the backlog is
long, every second, and from Python 3.13 on it removes the socket's file at its close, also one that
systemd made.
"""

import asyncio
import logging
import socket
from collections.abc import Callable

from dgcached.logs import event

_PAUSE_SECONDS = 1


class Accepting:
    """Calls `on_connection` with each new connection, non-blocking, from `start` to `stop`."""

    def __init__(
        self,
        name: str,
        listening: socket.socket,
        on_connection: Callable[[socket.socket], None],
    ) -> None:
        """Do nothing yet; `name` is what the log calls the socket."""
        self.listening = listening
        self._name = name
        self._on_connection = on_connection
        self._loop = asyncio.get_running_loop()
        self._resume: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to accept, or go on after a pause."""
        self._loop.add_reader(self.listening, self._accept)

    def stop(self) -> None:
        """Let nobody else in. The socket stays open."""
        if self._resume is not None:
            self._resume.cancel()
        self._loop.remove_reader(self.listening)

    def _accept(self) -> None:
        try:
            connection, _ = self.listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # EMFILE, ENFILE: pause, or the loop would spin on the same event
            event(logging.ERROR, "accept-failed", socket=self._name, reason=error.strerror)
            self._loop.remove_reader(self.listening)
            self._resume = self._loop.call_later(_PAUSE_SECONDS, self.start)
            return
        try:
            connection.setblocking(False)
        except OSError as error:
            connection.close()
            event(logging.ERROR, "accept-failed", socket=self._name, reason=error.strerror)
            return
        self._on_connection(connection)
