"""Admits calls: only through rpc.sock, and with a session only the session's own process.

It wraps every handler, those of health and reflection too, so that no service can forget it. It is
also where an error of the cache becomes a status of gRPC. Calls on a session's own socket come in
by `direct_calls`.
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from dgcache_core.errors import CacheError, CacheRefusedError, InvalidReferenceError
from dgcached.registry import Peer, Registry
from dgcached.sessions import Session
from dgcached.statuses import UnauthenticatedError, abort_with

SESSION_KEY = "dg-session"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes the call in progress."""

    peer: Peer
    session: Session | None

    def require_session(self) -> Session:
        """Return the session.

        Raises:
            UnauthenticatedError: the call has none.
        """
        if self.session is None:
            raise UnauthenticatedError("this call needs a session: connect to session.sock first")
        return self.session


_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Return who makes the call that this task serves."""
    return _caller.get()


async def served_on(session: Session, behaviour: Callable[[], Awaitable[T]]) -> T:
    """Serve a call that came on the session itself, in a task of its own.

    The session's peer was checked at its accept, and that the packet is from it, at its arrival.
    """
    _caller.set(Caller(session.peer, session))
    async with session.calls:
        return await behaviour()


class AdmissionInterceptor(aio.ServerInterceptor):
    """See the module."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def intercept_service(  # type: ignore[override] # its stub is generic in every method
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Return the handler, guarded."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        claimed = dict(handler_call_details.invocation_metadata or ()).get(SESSION_KEY)
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behaviour = getattr(handler, kind)
            if behaviour is not None:
                if kind.startswith("stream"):
                    behaviour = _of_parsed(behaviour)
                return _with_behaviour(handler, kind, self._guarded(behaviour, claimed))
        return handler

    def _guarded(self, behaviour: Callable[..., Any], claimed: Any) -> Callable[..., Any]:
        async def call(request: Any, context: aio.ServicerContext) -> Any:
            try:
                caller = self._admit(context, claimed)
                _require_parsed(request)
                if caller.session is None:
                    return await behaviour(request, context)
                async with caller.session.calls:
                    return await behaviour(request, context)
            except CacheError as error:
                await abort_with(context, error)

        async def stream(request: Any, context: aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                self._admit(context, claimed)
                _require_parsed(request)
                requests = _each_parsed(request) if hasattr(request, "__aiter__") else request
                async for response in behaviour(requests, context):
                    yield response
            except CacheError as error:
                await abort_with(context, error)

        return stream if inspect.isasyncgenfunction(behaviour) else call

    def _admit(self, context: aio.ServicerContext, claimed: Any) -> Caller:
        peer = self._registry.peer_of(context.peer())
        if peer is None:
            raise CacheRefusedError("this connection did not come through rpc.sock")
        session = None
        if claimed is not None:
            session = self._registry.session_of(peer, str(claimed))
            if session is None:
                raise UnauthenticatedError("there is no such session of this process")
        caller = Caller(peer, session)
        _caller.set(caller)
        return caller


def _with_behaviour(
    handler: grpc.RpcMethodHandler, kind: str, behaviour: Callable[..., Any]
) -> grpc.RpcMethodHandler:
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    guarded: grpc.RpcMethodHandler = make(
        behaviour,
        request_deserializer=_marking_malformed(handler.request_deserializer),
        response_serializer=handler.response_serializer,
    )
    return guarded


class _Malformed:
    """Stands for a message that does not parse. (grpc would end the call with UNKNOWN.)"""


def _marking_malformed(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if parse is None:
        return None

    def parse_or_mark(raw: bytes) -> Any:
        try:
            return parse(raw)
        except DecodeError:
            return _Malformed()

    return parse_or_mark


def _of_parsed(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    """Let a call of many messages end at the first that does not parse, as one of one does.

    A service that is not ours, such as reflection, would not know what to make of it.
    """

    async def each(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            _require_parsed(request)
            yield request

    async def call(requests: AsyncIterator[Any], context: aio.ServicerContext) -> Any:
        return await behaviour(each(requests), context)

    async def stream(
        requests: AsyncIterator[Any], context: aio.ServicerContext
    ) -> AsyncIterator[Any]:
        async for response in behaviour(each(requests), context):
            yield response

    return stream if inspect.isasyncgenfunction(behaviour) else call


def _require_parsed(request: Any) -> None:
    if isinstance(request, _Malformed):
        raise InvalidReferenceError("the message does not parse")


async def _each_parsed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Pass a stream of messages on, up to one that does not parse."""
    async for request in requests:
        _require_parsed(request)
        yield request
