"""Calls that come on the session's own socket: the same service, admission, errors and deadlines.

Each is a task; as many as `calls_per_session` of a session are served at once, and as many again
may wait, for a lease too. A client that sends more, or what is no call, loses its session, which
ends its calls. An answer that its client does not read waits, and is one of those in progress
until it is sent, so that a client that never reads soon has no session. Nothing here blocks the
event loop, nor is anything kept but these tasks.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from dgcache_core.errors import (
    CacheError,
    CacheFullError,
    CacheMissError,
    CacheUnavailableError,
    InvalidReferenceError,
)
from dgcache_proto.v1 import dgcache_pb2 as pb
from dgcache_proto.v1 import dgcache_pb2_grpc
from dgcached.admission import served_on
from dgcached.limits import Limits
from dgcached.logs import event
from dgcached.sessions import Session
from dgcached.statuses import status_of

_LONGEST_MESSAGE = 2048
"""Characters; a deltaspace that is named in it has fewer."""

_Method = tuple[type[Message], Callable[[Any, Any], Awaitable[Message]]]


class DirectCalls:
    """The calls in progress on the sessions' own sockets."""

    def __init__(self, service: dgcache_pb2_grpc.ReferenceCacheServicer, limits: Limits) -> None:
        """Serve `service`'s methods of one request and one response."""
        self._methods = _methods_of(service)
        self._limits = limits
        self._calls: dict[Session, set[asyncio.Task[None]]] = {}
        self._stopping = False
        self._timer: asyncio.TimerHandle | None = None

    def take(self, session: Session, packet: bytes) -> None:
        """Begin the call that a packet is.

        Raises:
            InvalidReferenceError: it is none.
            CacheFullError: the session has too many in progress.
        """
        call = self._parsed(packet)
        calls = self._calls.setdefault(session, set())
        if len(calls) >= 2 * self._limits.calls_per_session:
            raise CacheFullError("too many calls at once")
        task = asyncio.get_running_loop().create_task(self._serve(session, call))
        calls.add(task)
        task.add_done_callback(partial(self._forget, session))
        self._set_timer()

    def end_session(self, session: Session) -> None:
        """The session is over: so are its calls."""
        for task in self._calls.pop(session, ()):
            task.cancel()

    async def drain(self) -> None:
        """Return when what is in progress has ended; the end of its session ends it. What comes now
        is refused."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        tasks = {task for calls in self._calls.values() for task in calls}
        if tasks:
            await asyncio.wait(tasks)

    def _parsed(self, packet: bytes) -> pb.Call:
        try:
            call = pb.Call.FromString(packet)
        except DecodeError as error:
            raise InvalidReferenceError("a packet that does not parse") from error
        seconds = call.timeout_seconds
        if not call.method or not 0 < seconds <= self._limits.longest_call_seconds:  # nan, too
            raise InvalidReferenceError("a packet that is no call")
        return call

    def _forget(self, session: Session, task: "asyncio.Task[None]") -> None:
        calls = self._calls.get(session)
        if calls is not None:
            calls.discard(task)
            if not calls:
                del self._calls[session]

    async def _serve(self, session: Session, call: pb.Call) -> None:
        answer = await self._answer(session, call)
        answer.call_id = call.id
        with suppress(CacheUnavailableError):
            await session.answer(answer)

    async def _answer(self, session: Session, call: pb.Call) -> pb.Answer:
        try:
            async with asyncio.timeout(call.timeout_seconds):
                response = await self._response(session, call)
        except CacheError as error:
            reason = str(error.reason) if isinstance(error, CacheMissError) else ""
            return _refusal(status_of(error), str(error), reason)
        except NotImplementedError:
            return _refusal(grpc.StatusCode.UNIMPLEMENTED, "there is no such method here")
        except TimeoutError:
            return _refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        except Exception as error:  # a bug ends its call and no other, as gRPC has it
            event(logging.ERROR, "call-failed", method=call.method, error=type(error).__name__)
            return _refusal(grpc.StatusCode.UNKNOWN, f"unexpected {type(error).__name__}")
        if response.ByteSize() > self._limits.answer_bytes:
            return _refusal(grpc.StatusCode.OUT_OF_RANGE, "the response is longer than a packet")
        return pb.Answer(response=response.SerializeToString())

    async def _response(self, session: Session, call: pb.Call) -> Message:
        if self._stopping:
            raise CacheUnavailableError("the daemon is stopping")
        if call.method not in self._methods:
            raise NotImplementedError
        kind, behaviour = self._methods[call.method]
        try:
            request = kind.FromString(call.request)
        except DecodeError as error:
            raise InvalidReferenceError("the message does not parse") from error
        return await served_on(session, lambda: behaviour(request, None))

    def _set_timer(self) -> None:
        if self._timer is None and not self._stopping:
            self._timer = asyncio.get_running_loop().call_later(
                self._limits.alive_seconds, self._tell_alive
            )

    def _tell_alive(self) -> None:
        """Tell whoever waits for an answer and reads; who has something unread hears enough."""
        self._timer = None
        for session in self._calls:
            with suppress(CacheError, OSError):
                if session.unread == 0:
                    session.send(pb.SessionMessage(alive=pb.Alive()))
        if self._calls:
            self._set_timer()


def _methods_of(service: dgcache_pb2_grpc.ReferenceCacheServicer) -> dict[str, _Method]:
    return {
        method.name: (GetMessageClass(method.input_type), getattr(service, method.name))
        for method in pb.DESCRIPTOR.services_by_name["ReferenceCache"].methods
        if not method.client_streaming and not method.server_streaming
    }


def _refusal(code: grpc.StatusCode, message: str, miss_reason: str = "") -> pb.Answer:
    number: int = code.value[0]
    return pb.Answer(code=number, message=message[:_LONGEST_MESSAGE], miss_reason=miss_reason)
