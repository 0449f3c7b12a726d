"""The gRPC server behind the listener: it runs while somebody is connected to rpc.sock.

Its threads wake up several times a second, whether anybody calls or not, and most clients never
come here (`direct_calls`). So the first connection starts it, and it stops once nobody has been
connected for `inner_idle_seconds`. Who comes while it starts or stops waits, and is served. One
that cannot start or stop ends the daemon, as one that accepts nobody any more does.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, suppress

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from dgcache_proto.v1 import dgcache_pb2 as pb
from dgcache_proto.v1 import dgcache_pb2_grpc
from dgcached.admission import AdmissionInterceptor
from dgcached.limits import Limits
from dgcached.logs import event
from dgcached.registry import Registry
from dgcached.sockets import INNER_SOCKET, Listeners

_NAME = pb.DESCRIPTOR.services_by_name["ReferenceCache"].full_name
_HEALTH_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class InnerServer:
    """Starts and stops the server; everything happens in the event loop, one after another."""

    def __init__(
        self,
        service: dgcache_pb2_grpc.ReferenceCacheServicer,
        registry: Registry,
        listeners: Listeners,
        limits: Limits,
        *,
        own_change: Callable[[bool], AbstractContextManager[None]],
        give_up: Callable[[str], None],
    ) -> None:
        """Do nothing yet.

        Args:
            service: what it serves.
            registry: who is connected.
            listeners: tell where its socket is.
            limits: the bounds.
            own_change: lends the right to make its socket (True) or to take it away.
            give_up: ends the daemon and is told why.
        """
        self._service = service
        self._registry = registry
        self._listeners = listeners
        self._limits = limits
        self._own_change = own_change
        self._give_up = give_up
        self._turn = asyncio.Lock()
        self._server: aio.Server | None = None
        self._health = HealthServicer()
        self._changing: set[asyncio.Task[None]] = set()
        self._used_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def path(self) -> str:
        """Where it listens while it runs."""
        return self._listeners.path_of(INNER_SOCKET)

    async def ready(self) -> None:
        """Return once it accepts; whoever is cancelled meanwhile stops nothing.

        Raises:
            OSError: it does not, and the daemon ends.
        """
        self._used_at = time.monotonic()
        if self._server is None or self._turn.locked():
            await asyncio.shield(self._in_a_task(self._start_if_stopped()))
        if self._server is None:
            raise OSError(0, "the inner server does not run")

    def unused(self) -> None:
        """Tell that nobody may be connected any more."""
        if self._timer is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._limits.inner_idle_seconds, self._on_timer)

    async def close(self) -> None:
        """Stop for good: no new calls, and those in progress get `drain_seconds`."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        async with self._turn:
            server, self._server = self._server, None
            if server is not None:
                await self._health.enter_graceful_shutdown()
                await server.stop(self._limits.drain_seconds)

    def _in_a_task(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)
        return task

    async def _start_if_stopped(self) -> None:
        async with self._turn:
            if self._server is not None or self._closed:
                return
            try:
                async with asyncio.timeout(self._limits.inner_change_seconds):
                    self._server = await self._started()
            except Exception as error:  # whatever it is, nobody would be served
                self._closed = True
                self._give_up(f"the inner server does not start: {error or type(error).__name__}")

    async def _started(self) -> aio.Server:
        server = self._made()
        with self._own_change(True):
            self._listeners.make_inner_directory()
            server.add_insecure_port(f"unix:{self.path}")
            os.chmod(self.path, 0o600)  # noqa: PTH101 - gRPC made it with whatever the umask left
        await server.start()
        for name in ("", _NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        event(logging.DEBUG, "inner-started")
        return server

    def _made(self) -> aio.Server:
        limits = self._limits
        server = aio.server(
            interceptors=[AdmissionInterceptor(self._registry)],
            options=[
                ("grpc.max_concurrent_streams", limits.streams_per_connection),
                ("grpc.max_receive_message_length", limits.message_bytes),
                ("grpc.max_send_message_length", limits.message_bytes),
                ("grpc.server_handshake_timeout_ms", int(limits.handshake_seconds * 1000)),
                ("grpc.so_reuseport", 0),
                # a client that waits for a lease sees by pings that this process still runs
                ("grpc.http2.min_ping_interval_without_data_ms", limits.ping_interval_ms),
            ],
        )
        dgcache_pb2_grpc.add_ReferenceCacheServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((_NAME, _HEALTH_NAME, reflection.SERVICE_NAME), server)
        return server

    def _on_timer(self) -> None:
        self._timer = None
        if self._registry.connections:
            return  # the last one tells
        if time.monotonic() - self._used_at < self._limits.inner_idle_seconds:
            self.unused()
            return
        self._in_a_task(self._stop_if_unused())

    async def _stop_if_unused(self) -> None:
        async with self._turn:
            if self._server is None or self._closed or self._registry.connections:
                return
            server, self._server = self._server, None
            with self._own_change(False):
                try:
                    async with asyncio.timeout(self._limits.inner_change_seconds):
                        await server.stop(0)
                except TimeoutError:
                    self._closed = True
                    self._give_up("the inner server does not stop")
                with suppress(OSError):
                    os.unlink(self.path)  # noqa: PTH108 - a text
            event(logging.DEBUG, "inner-stopped")
