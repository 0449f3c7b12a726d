"""The client's end of session.sock: decides whether there is a daemon, makes calls, and receives
descriptors and answers.

The decision imports neither grpc nor protobuf: protobuf comes with the first byte of a Hello.
"""

import itertools
import os
import select
import shlex
import socket
import stat
import struct
import threading
import time
from array import array
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dgcache_core.errors import CacheRefusedError, CacheUnavailableError, DaemonAbsentError
from dgcache_core.peers import peer_credentials, require_same_user
from dgcache_core.runtime_directory import (
    RPC_SOCKET,
    SESSION_SOCKET,
    candidates,
    open_where_served,
)

if TYPE_CHECKING:
    from dgcache_proto import messages as pb

T = TypeVar("T")

PROTOCOL = 2
OLDEST_PROTOCOL = 1
DIRECT_PROTOCOL = 2
"""From this one on the daemon takes calls on the session."""

_LONGEST_PACKET = 16 << 10
_SILENCE_SECONDS = 8.0
"""A daemon that has a call of ours in progress says more often that it lives."""
_TIMEVAL = struct.Struct("@ll")
_ONE_DESCRIPTOR = socket.CMSG_SPACE(4)
_MOST_UNCLAIMED = 64


class Session:
    """An open session. Thread-safe; whoever waits for something reads what is for others, too."""

    def __init__(
        self,
        connection: socket.socket,
        directory: Path,
        directory_fd: int,
        hello: "pb.Hello",
    ) -> None:
        self._connection = connection
        self._turn = threading.Condition()
        self._is_read = False
        self._heard_at = 0.0
        self._unclaimed: dict[int, int] = {}
        self._call_ids = itertools.count(1)
        self._awaited: set[int] = set()
        self._answers: dict[int, pb.Answer] = {}
        self.directory = directory
        self.directory_fd = directory_fd
        self.hello = hello

    @classmethod
    def connect(
        cls, socket_dir: Path | None, environ: Mapping[str, str], budget_seconds: float
    ) -> "Session":
        """Find the daemon, check that it is the own user's, and hear its Hello.

        Raises:
            DaemonAbsentError: there is none.
            CacheUnavailableError: it does not answer within the budget, or speaks another version
                of the protocol.
            CacheRefusedError: a directory, a socket or the daemon's uid failed its check.
        """
        deadline = time.monotonic() + budget_seconds
        directory, directory_fd = open_where_served(candidates(socket_dir, environ))
        connection: socket.socket | None = None
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
            _connect_within(connection, f"/proc/self/fd/{directory_fd}/{SESSION_SOCKET}", deadline)
            require_same_user(peer_credentials(connection))
            _require_own_socket(directory / RPC_SOCKET, directory_fd)
            packet = _receive_within(connection, deadline)
            return cls(connection, directory, directory_fd, _understood(packet))
        except BaseException as error:
            if connection is not None:
                connection.close()
            os.close(directory_fd)
            if isinstance(error, OSError):
                raise CacheUnavailableError(f"the session broke: {error.strerror}") from error
            raise

    def take_descriptor(self, request_id: int, budget_seconds: float) -> int:
        """Return the descriptor that came for a call; it is the caller's to close.

        Raises:
            CacheUnavailableError: the session is over, or nothing came within the budget.
        """
        return self._arrival(self._unclaimed, request_id, time.monotonic() + budget_seconds)

    def call(self, method: str, request: bytes, seconds: float) -> "pb.Answer":
        """Make a call on the session itself and return its answer, whatever its code.

        Args:
            method: of `ReferenceCache`.
            request: its message.
            seconds: the deadline, the daemon's too.

        Raises:
            CacheUnavailableError: the session is over, or the daemon stopped or too slow.
        """
        from dgcache_proto import messages as pb

        deadline = time.monotonic() + seconds
        call_id = next(self._call_ids)
        call = pb.Call(id=call_id, method=method, request=request, timeout_seconds=seconds)
        self._awaited.add(call_id)
        try:
            self._send(call.SerializeToString(), deadline)
            return self._arrival(self._answers, call_id, deadline)
        finally:
            self._awaited.discard(call_id)
            self._answers.pop(call_id, None)

    def interrupt(self) -> None:
        """End the session for every thread that waits on it, and every process that shares it."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the session; the daemon drops what it still owes us."""
        self._connection.close()
        for descriptor in self._unclaimed.values():
            os.close(descriptor)
        self._unclaimed.clear()
        if self.directory_fd >= 0:
            os.close(self.directory_fd)
            self.directory_fd = -1

    def _arrival(self, arrived: dict[int, T], key: int, deadline: float) -> T:
        """Take what comes under a key: one thread reads, for all, and the others wait for it."""
        started = time.monotonic()
        try:
            with self._turn:
                while key not in arrived:
                    if self._is_read:
                        if not self._turn.wait(max(0.0, deadline - time.monotonic())):
                            raise CacheUnavailableError("the daemon does not answer in time")
                    else:
                        silent = max(started, self._heard_at) + _SILENCE_SECONDS
                        self._read_for_all(min(deadline, silent))
                return arrived.pop(key)
        except (OSError, ValueError) as error:  # ValueError: another thread closed it
            raise CacheUnavailableError(f"the session broke: {error}") from error

    def _read_for_all(self, deadline: float) -> None:
        """Receive one packet with `_turn` let go of."""
        self._is_read = True
        self._turn.release()
        try:
            self._receive_one(deadline)
        finally:
            self._turn.acquire()
            self._is_read = False
            self._heard_at = time.monotonic()
            self._turn.notify_all()

    def _send(self, packet: bytes, deadline: float) -> None:
        while True:
            try:
                self._connection.send(packet, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                _wait_ready(self._connection, select.POLLOUT, deadline)
            except OSError as error:
                raise CacheUnavailableError(f"the session broke: {error.strerror}") from error
            else:
                return

    def _receive_one(self, deadline: float) -> None:
        _wait_ready(self._connection, select.POLLIN, deadline)
        packet, ancillary, flags, _ = self._connection.recvmsg(
            _LONGEST_PACKET, _ONE_DESCRIPTOR, socket.MSG_CMSG_CLOEXEC
        )
        descriptors = _descriptors(ancillary)
        try:
            self._sort(packet, descriptors, flags)
        except CacheUnavailableError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def _sort(self, packet: bytes, descriptors: list[int], flags: int) -> None:
        """Put what came where it is waited for."""
        if not packet:
            raise CacheUnavailableError("the daemon closed the session")
        message = _parsed(packet)
        kind = message.WhichOneof("kind")
        expected = 1 if kind == "descriptor" else 0
        whole = not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)
        if len(descriptors) != expected or not whole or len(self._unclaimed) >= _MOST_UNCLAIMED:
            raise CacheUnavailableError("a descriptor was lost on the way")
        if kind == "descriptor":
            request_id = message.descriptor.request_id
            if request_id in self._unclaimed:
                raise CacheUnavailableError("the daemon sent two descriptors for one call")
            self._unclaimed[request_id] = descriptors[0]
        elif kind == "answer":
            if message.answer.call_id in self._awaited:
                self._answers[message.answer.call_id] = message.answer
        elif kind != "alive":
            raise CacheUnavailableError("the daemon sent what nobody expects")


def _connect_within(connection: socket.socket, path: str, deadline: float) -> None:
    """Connect; the kernel itself waits for room in the backlog, as long as SO_SNDTIMEO says.

    (A non-blocking connect on a full backlog would fail at once with EAGAIN, unix(7).)
    """
    left = max(0.001, deadline - time.monotonic())
    timeval = _TIMEVAL.pack(int(left), int(left % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    try:
        connection.connect(path)
    except ConnectionRefusedError as error:
        raise DaemonAbsentError(
            "nobody listens on the daemon's socket any more: start it with dg-cache start"
        ) from error
    except OSError as error:
        raise CacheUnavailableError(
            f"the daemon cannot be reached: {error.strerror}: see dg-cache status"
        ) from error


def _require_own_socket(path: Path, directory_fd: int) -> None:
    """Refuse a socket that another user left where gRPC connects, who tells nothing of its peer.

    A socket's file belongs to whoever bound it (unix(7)). The directory is closed to others by now,
    so that what is there stays there.
    """
    try:
        status = os.stat(path.name, dir_fd=directory_fd, follow_symlinks=False)
    except FileNotFoundError:
        return  # the first call fails
    if stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid():
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise CacheRefusedError(f"{path} is no socket: remove it with rm {shlex.quote(str(path))}")
    raise CacheRefusedError(
        f"{path} belongs to uid {status.st_uid}, not to uid {os.geteuid()}: "
        f"remove it with rm {shlex.quote(str(path))}, then dg-cache restart"
    )


def _receive_within(connection: socket.socket, deadline: float) -> bytes:
    _wait_ready(connection, select.POLLIN, deadline)
    packet = connection.recv(_LONGEST_PACKET)
    if not packet:
        raise CacheUnavailableError("the daemon closed the session at once: see dg-cache logs")
    return packet


def _wait_ready(connection: socket.socket, for_what: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(connection, for_what)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise CacheUnavailableError("the daemon does not answer: run dg-cache restart --force")


def _understood(packet: bytes) -> "pb.Hello":
    hello = _parsed(packet).hello
    if hello.protocol < OLDEST_PROTOCOL or hello.oldest_protocol > PROTOCOL:
        older = "daemon" if hello.protocol < OLDEST_PROTOCOL else "client"
        raise CacheUnavailableError(
            f"the daemon ({hello.build}) speaks protocol {hello.protocol}, this client {PROTOCOL}: "
            f"update the {older}, then dg-cache restart"
        )
    return hello


def _parsed(packet: bytes) -> "pb.SessionMessage":
    from google.protobuf.message import DecodeError

    from dgcache_proto import messages as pb

    try:
        return pb.SessionMessage.FromString(packet)
    except DecodeError as error:
        raise CacheUnavailableError("what listens there does not speak our protocol") from error


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    received = array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(data[: len(data) - len(data) % received.itemsize])
    return received.tolist()
