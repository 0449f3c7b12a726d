"""rpc.sock: checks who connects, then carries bytes to the inner gRPC server and back.

Both transports are paused from the start and resumed when both ends stand, or the first bytes would
be lost. Each direction buffers at most `relay_buffer_bytes` and then pauses its source, so that a
reader that never reads stops its own writer and nobody else.

gRPC greets whoever it accepts. After some errors of accept(2), ENOMEM for one, it accepts nobody
ever again and says so in the log alone; so a relay that stays or ends ungreeted makes the listener
look, and `give_up` ends a daemon that would live on and serve nobody.
"""

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from dgcache_core.errors import CacheRefusedError
from dgcache_core.peers import require_same_user
from dgcached.accepting import Accepting
from dgcached.control_frames import ControlFrames
from dgcached.inner_server import InnerServer
from dgcached.limits import Limits
from dgcached.logs import event
from dgcached.refused_peers import RefusedPeers
from dgcached.registry import Registry, identify
from dgcached.repeated import Repeated

_GREETINGS_AWAITED = 3
"""Looks, one after another, before the inner server counts as deaf."""
_READ_BYTES = 64 << 10
"""Read at once, in each direction of a relay."""


class Listener:
    """Serves rpc.sock until it is closed."""

    def __init__(
        self,
        listening: socket.socket,
        inner_server: InnerServer,
        registry: Registry,
        limits: Limits,
        *,
        give_up: Callable[[str], None],
        refused: RefusedPeers,
        repeated: Repeated,
    ) -> None:
        self._inner_server = inner_server
        self._registry = registry
        self._limits = limits
        self._give_up = give_up
        self._refused = refused
        self._repeated = repeated
        self._look: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._accepting = Accepting("rpc", listening, self._relay)
        self._starting: set[asyncio.Task[object]] = set()
        self._open: set[_Outer] = set()
        self._all_closed = asyncio.Event()

    async def start(self) -> None:
        """Begin to accept."""
        self._accepting.listening.setblocking(False)
        self._accepting.start()

    async def listen_on(self, listening: socket.socket) -> None:
        """Accept there from now on, and not where it was; connections go on."""
        self.stop_accepting()
        self._accepting.listening = listening
        await self.start()

    def stop_accepting(self) -> None:
        """Let nobody else in; what is connected goes on."""
        self._accepting.stop()
        self._accepting.listening.close()

    def _relay(self, connection: socket.socket) -> None:
        task: asyncio.Task[object] = self._loop.create_task(self._begin(connection))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _begin(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: _Outer(self), connection)
        except OSError as error:
            connection.close()
            self._report_failed_accept(error)

    async def close(self) -> None:
        """Let the relays carry to the clients what the inner server has sent, then end them.

        The inner server has closed its ends by now, so a relay ends by itself behind the last byte.
        `stop_accepting` comes first.
        """
        if self._look is not None:
            self._look.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.flush_seconds):
                while self._open:
                    self._all_closed.clear()
                    await self._all_closed.wait()
        for outer in list(self._open):
            outer.end()
            outer.transport.abort()

    def _forget(self, outer: "_Outer") -> None:
        self._open.discard(outer)
        if not self._open:
            self._all_closed.set()
            self._inner_server.unused()

    def _report_failed_accept(self, error: OSError) -> None:
        self._repeated.event(logging.ERROR, "accept-failed", socket="rpc", reason=error.strerror)

    def _admit(self, outer: "_Outer", connection: socket.socket) -> "_Inner | None":
        """Check the peer and open the inner end, or refuse."""
        peer = identify(connection)
        try:
            require_same_user(peer.credentials)
        except CacheRefusedError:
            self._refused.report("rpc", peer.credentials)
            return None
        if self._registry.connections >= self._limits.connections:
            self._repeated.event(
                logging.WARNING,
                "limit-reached",
                limit="connections",
                of={"pid": peer.credentials.pid},
            )
            return None
        credentials = peer.credentials
        event(logging.DEBUG, "admitted", socket="rpc", uid=credentials.uid, pid=credentials.pid)
        inner = _Inner(outer, secrets.token_hex(16))
        self._registry.add_connection(inner.name, peer)
        self._open.add(outer)
        return inner

    def _suspect(self) -> None:
        """gRPC said nothing on a relay: see whether it does on another."""
        if self._look is None or self._look.done():
            self._look = asyncio.ensure_future(self._require_greetings())

    async def _require_greetings(self) -> None:
        for _ in range(_GREETINGS_AWAITED):
            if await self._is_greeted():
                self._inner_server.unused()
                return
        self._give_up("the inner server accepts nobody any more")

    async def _is_greeted(self) -> bool:
        """Connect to the inner server, past the registry, and wait for its first byte."""
        seconds = self._limits.handshake_seconds
        try:
            await self._inner_server.ready()
            inner = self._connect_inner(secrets.token_hex(16))
        except OSError:  # its backlog is full: it may only be busy
            await asyncio.sleep(seconds)
            return False
        with inner, suppress(OSError, TimeoutError):
            async with asyncio.timeout(seconds):
                return bool(await asyncio.get_running_loop().sock_recv(inner, 1))
        return False

    def _connect_inner(self, name: str) -> socket.socket:
        inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            inner.bind("\0" + name)
            inner.connect(self._inner_server.path)
        except OSError:
            inner.close()
            raise
        return inner


class _End(asyncio.BufferedProtocol):
    """One end of a relay; `other` is where its bytes go.

    All ends read into one buffer: the event loop fills it and has it copied before it reads again.
    By default it would allocate 256 KiB for every read, and what is freed is overwritten (`heap`).
    """

    _buffer = memoryview(bytearray(_READ_BYTES))
    transport: asyncio.Transport
    other: "_End | None" = None
    early: bytes = b""

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._received(bytes(self._buffer[:nbytes]))  # the transport may keep what it is given

    def _hold(self, transport: asyncio.BaseTransport, buffer_bytes: int) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.pause_reading()
        self.transport.set_write_buffer_limits(high=buffer_bytes)

    def _received(self, data: bytes) -> None:
        if self.other is not None:
            self.other.transport.write(data)
            return
        # CPython 3.11.2 (Debian 12) starts reading after connection_made, paused or not, and takes
        # a second pause for done: what came is kept, and no more comes.
        self.early += data
        self.transport.resume_reading()
        self.transport.pause_reading()

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None:
            self.other.transport.resume_reading()


class _Outer(_End):
    """The client's end. It owns the relay."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._inner: _Inner | None = None
        self._joining: asyncio.Task[None] | None = None
        self._spoke = False
        self._control = ControlFrames(listener._limits.control_frames_per_second)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._hold(transport, self._listener._limits.relay_buffer_bytes)
        try:
            self._inner = self._listener._admit(self, transport.get_extra_info("socket"))
        except OSError as error:  # the kernel does not tell who it is: nobody, then
            self._listener._report_failed_accept(error)
        if self._inner is None:
            self.transport.abort()
            return
        self._joining = asyncio.ensure_future(self._join(self._inner))

    async def _join(self, inner: "_Inner") -> None:
        loop = asyncio.get_running_loop()
        try:
            await self._listener._inner_server.ready()
            connection = self._listener._connect_inner(inner.name)
            try:
                await loop.create_unix_connection(lambda: inner, sock=connection)
            except OSError:
                connection.close()
                raise
        except OSError as error:
            self._listener._repeated.event(logging.ERROR, "relay-failed", reason=error.strerror)
            self.end()
            return
        self.other, inner.other = inner, self
        inner.transport.write(self.early)
        self.transport.write(inner.early)
        inner.transport.resume_reading()
        self.transport.resume_reading()
        loop.call_later(self._listener._limits.handshake_seconds, self._end_if_silent)

    def _received(self, data: bytes) -> None:
        self._spoke = True
        if self._control.too_many(data):
            self._cut_off()
            return
        super()._received(data)

    def _cut_off(self) -> None:
        """End a flood, and carry nothing of it any further."""
        inner = self._inner
        if inner is None:
            return
        peer = self._listener._registry.peer_of(inner.name)
        self._listener._repeated.event(
            logging.WARNING, "limit-reached", limit="control_frames", of={"peer": peer}
        )
        self.end()
        if inner.other is not None:
            inner.transport.abort()
        self.transport.abort()

    def _end_if_silent(self) -> None:
        if self._inner is not None and not self._inner.greeted:
            self._listener._suspect()
        if not self._spoke:
            self.end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end()
        self._listener._forget(self)

    def end(self) -> None:
        """Take the name out of the registry, then close both ends."""
        inner, self._inner = self._inner, None
        if inner is None:
            return
        self._listener._registry.remove_connection(inner.name)
        if not inner.greeted:
            self._listener._suspect()
        if self._joining is not None and not self._joining.done() and inner.other is None:
            self._joining.cancel()
        if inner.other is not None:
            inner.transport.close()
        self.transport.close()


class _Inner(_End):
    """The end towards the gRPC server, bound to the abstract name `name`."""

    def __init__(self, outer: _Outer, name: str) -> None:
        self._outer = outer
        self.name = name
        self.greeted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._hold(transport, self._outer._listener._limits.relay_buffer_bytes)

    def _received(self, data: bytes) -> None:
        self.greeted = True
        super()._received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._outer.end()
