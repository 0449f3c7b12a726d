"""session.sock: each connection is a session, alive exactly as long as its socket.

The daemon speaks first (Hello) and later sends descriptors, and answers to the calls that come here
(`direct_calls`). A packet of the client is one of at most 4096 bytes from the very process that
connected (SCM_CREDENTIALS, unix(7)), with no descriptor: the kernel drops those, and any other
packet ends the session. A session owns its deposits and its leases: its end aborts those and passes
these on.
"""

import asyncio
import errno
import fcntl
import logging
import resource
import secrets
import socket
import struct
import termios
from array import array
from collections.abc import Callable
from contextlib import suppress

from dgcache_core.errors import (
    CacheError,
    CacheFullError,
    CacheRefusedError,
    CacheUnavailableError,
)
from dgcache_core.peers import require_same_user
from dgcache_proto.v1 import dgcache_pb2
from dgcached.accepting import Accepting
from dgcached.deposits import Deposit
from dgcached.limits import Limits
from dgcached.logs import event
from dgcached.refused_peers import RefusedPeers
from dgcached.registry import Peer, Registry, identify
from dgcached.repeated import Repeated

_LONGEST_PACKET = 4096
_UCRED = struct.Struct("=iII")
_ONLY_CREDENTIALS = socket.CMSG_LEN(_UCRED.size)
"""Room for who sends, and for no descriptor: the kernel drops it and sets MSG_CTRUNC."""
_UNREAD_BYTES = 768
"""What the kernel charges a socket for a descriptor that was not read yet, or a little less."""
_ALWAYS_ADMITTED = 2
"""So many unread descriptors each session may have, whatever all others have."""


class Session:
    """One client, as long as it is connected."""

    def __init__(
        self,
        connection: socket.socket,
        peer: Peer,
        limits: Limits,
        may_have_more: Callable[[], bool] = lambda: True,
    ) -> None:
        """Take over a connection; `may_have_more` tells whether unread descriptors may grow."""
        self.id = secrets.token_bytes(16)
        self.peer = peer
        self.calls = asyncio.Semaphore(limits.calls_per_session)
        self.answering = asyncio.Lock()
        self.deposits: dict[int, Deposit] = {}
        self.connection = connection
        self.is_over = False
        self._may_have_more = may_have_more

    @property
    def unread(self) -> int:
        """How many packets the client has not read yet, about (unix(7), SIOCOUTQ)."""
        queued = fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))
        queued_bytes: int = struct.unpack("=i", queued)[0]
        return -(-queued_bytes // _UNREAD_BYTES)

    def send(self, message: dgcache_pb2.SessionMessage, descriptor: int | None = None) -> None:
        """Send one packet, with a descriptor that stays the caller's to close.

        Raises:
            CacheFullError: the client holds as many unread descriptors as it may.
            CacheUnavailableError: the session is over.
        """
        ancillary = []
        if descriptor is not None:
            self._require_a_reader()
            rights = array("i", [descriptor])
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        try:
            self.connection.sendmsg([message.SerializeToString()], ancillary, flags)
        except BlockingIOError as error:
            raise CacheFullError("this session has too many descriptors it has not read") from error
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise CacheFullError("this user has too many unread descriptors") from error
            raise CacheUnavailableError(f"the session is over: {error.strerror}") from error

    def send_descriptor(
        self, request_id: int, purpose: "dgcache_pb2.Descriptor.Purpose.ValueType", descriptor: int
    ) -> None:
        """Send a descriptor for a call. Raises as `send`."""
        announced = dgcache_pb2.Descriptor(request_id=request_id, purpose=purpose)
        self.send(dgcache_pb2.SessionMessage(descriptor=announced), descriptor)

    async def answer(self, answer: dgcache_pb2.Answer) -> None:
        """Send the answer to a call, behind those before it, once the client has read enough.

        Raises:
            CacheUnavailableError: the session is over.
        """
        packet = dgcache_pb2.SessionMessage(answer=answer).SerializeToString()
        async with self.answering:
            try:
                await asyncio.get_running_loop().sock_sendall(self.connection, packet)
            except OSError as error:
                raise CacheUnavailableError(f"the session is over: {error.strerror}") from error

    def require_own(self, ancillary: list[tuple[int, int, bytes]], flags: int) -> None:
        """Refuse a packet that is not whole, brings descriptors, or is of another process.

        A process that inherited the socket, or was given it, is another.

        Raises:
            CacheRefusedError: it is so.
        """
        if flags & socket.MSG_TRUNC:
            raise CacheRefusedError(f"a packet of more than {_LONGEST_PACKET} bytes")
        if flags & socket.MSG_CTRUNC:
            raise CacheRefusedError("a packet with descriptors")
        own = self.peer.credentials
        senders = [
            _UCRED.unpack(data)[:2]
            for level, kind, data in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
        ]
        if senders != [(own.pid, own.uid)]:
            raise CacheRefusedError("a packet of another process")

    def _require_a_reader(self) -> None:
        try:
            crowded = self.unread >= _ALWAYS_ADMITTED and not self._may_have_more()
        except OSError as error:
            raise CacheUnavailableError(f"the session is over: {error.strerror}") from error
        if crowded:
            raise CacheFullError("there are too many descriptors that nobody has read")

    def __repr__(self) -> str:
        return f"<Session of {self.peer}>"


class SessionListener:
    """Serves session.sock until it is closed."""

    def __init__(
        self,
        listening: socket.socket,
        registry: Registry,
        limits: Limits,
        hello: dgcache_pb2.Hello,
        on_end: Callable[[Session], None],
        refused: RefusedPeers,
        repeated: Repeated,
        on_packet: Callable[[Session, bytes], None],
    ) -> None:
        """Serve `listening`.

        Args:
            listening: the socket.
            registry: where sessions are entered.
            limits: the bounds.
            hello: what each session hears first, but for its id.
            on_end: hears of every session that is over.
            refused: counts strangers.
            on_packet: hears of every packet of a session's own process; a CacheError of it ends the
                session.
        """
        self._on_end = on_end
        self._on_packet = on_packet
        self._refused = refused
        self._repeated = repeated
        self._registry = registry
        self._limits = limits
        self._hello = hello
        self._loop = asyncio.get_running_loop()
        self._accepting = Accepting("session", listening, self._take)
        # The kernel bounds them for all of a user's processes by RLIMIT_NOFILE (ETOOMANYREFS). A
        # quarter, and two of each session, leave room for who reads what it is sent.
        self._most_unread = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4

    def start(self) -> None:
        """Begin to accept."""
        self._accepting.start()

    def listen_on(self, listening: socket.socket) -> None:
        """Accept there from now on, and not where it was; sessions go on."""
        self.stop_accepting()
        self._accepting.listening = listening
        self.start()

    def stop_accepting(self) -> None:
        """Let nobody else in."""
        self._accepting.stop()

    def close(self) -> None:
        """End every session; `stop_accepting` comes first."""
        for session in self._registry.sessions:
            self._end(session)

    def _take(self, connection: socket.socket) -> None:
        session = None
        try:
            session = self._admit(connection)
        except OSError as error:  # the kernel does not tell who it is: nobody, then
            self._repeated.event(
                logging.ERROR, "accept-failed", socket="session", reason=error.strerror
            )
        if session is None:
            connection.close()

    def _admit(self, connection: socket.socket) -> Session | None:
        peer = identify(connection)
        try:
            require_same_user(peer.credentials)
        except CacheRefusedError:
            self._refused.report("session", peer.credentials)
            return None
        if len(self._registry.sessions) >= self._limits.sessions:
            self._repeated.event(
                logging.WARNING,
                "limit-reached",
                limit="sessions",
                of={"pid": peer.credentials.pid},
            )
            return None
        credentials = peer.credentials
        event(logging.DEBUG, "admitted", socket="session", uid=credentials.uid, pid=credentials.pid)
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, self._limits.unread_descriptor_bytes
        )
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        session = Session(connection, peer, self._limits, self._may_have_more)
        hello = dgcache_pb2.Hello()
        hello.CopyFrom(self._hello)
        hello.session_id = session.id
        try:
            session.send(dgcache_pb2.SessionMessage(hello=hello))
        except (CacheFullError, CacheUnavailableError):
            return None
        self._registry.add_session(session)
        self._loop.add_reader(connection, self._read, session)
        return session

    def _may_have_more(self) -> bool:
        return sum(session.unread for session in self._registry.sessions) < self._most_unread

    def _read(self, session: Session) -> None:
        try:
            packet, ancillary, flags, _ = session.connection.recvmsg(
                _LONGEST_PACKET, _ONLY_CREDENTIALS
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            packet = b""
        if not packet:
            self._end(session)
            return
        try:
            session.require_own(ancillary, flags)
            self._on_packet(session, packet)
        except CacheError as error:
            self._repeated.event(
                logging.WARNING, "session-ended", reason=str(error), of={"peer": session.peer}
            )
            self._end(session)

    def _end(self, session: Session) -> None:
        session.is_over = True
        self._registry.remove_session(session)
        self._loop.remove_reader(session.connection)
        self._loop.remove_writer(session.connection)
        for deposit in session.deposits.values():
            deposit.cancel()
        session.deposits.clear()
        self._on_end(session)
        with suppress(OSError):
            session.connection.close()
