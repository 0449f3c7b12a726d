"""How calls reach the daemon: over gRPC on rpc.sock, or straight on the session.

Both carry the same messages to the same service and end in the same errors. gRPC is the contract;
the direct way saves a process that makes a few calls the import of grpc. It asks over gRPC as well
where it must: for streams, and for an answer that does not fit into a packet.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, TypeVar

from dgcache.session import DIRECT_PROTOCOL, Session
from dgcache.statuses import Status, error_of
from dgcache_core.errors import CacheUnavailableError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from dgcache.grpc_transport import GrpcTransport

M = TypeVar("M", bound="Message")


class Transport(Protocol):
    """Thread-safe. Raises only `dgcache_core.errors`."""

    def call(self, method: str, request: "Message", kind: type[M], seconds: float) -> M:
        """Make a call of `ReferenceCache` and return its answer, which is of that `kind`."""

    def stream(self, method: str, request: "Message", seconds: float | None) -> Iterator["Message"]:
        """Make a call with many answers, with or without a deadline; its end cancels it."""

    def close(self) -> None:
        """End what is in progress. The session stays its owner's to close."""


class DirectTransport:
    """Calls on the session's own socket."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def call(self, method: str, request: "Message", kind: type[M], seconds: float) -> M:
        """See `Transport`."""
        answer = self._session.call(method, request.SerializeToString(), seconds)
        if answer.code == Status.OK:
            return kind.FromString(answer.response)
        if answer.code == Status.OUT_OF_RANGE:
            return self._grpc.call(method, request, kind, seconds)
        raise error_of(answer.code, answer.message, answer.miss_reason)

    def stream(self, method: str, request: "Message", seconds: float | None) -> Iterator["Message"]:
        """See `Transport`."""
        return self._grpc.stream(method, request, seconds)

    def close(self) -> None:
        """See `Transport`."""
        self._session.interrupt()
        if "_grpc" in self.__dict__:
            self._grpc.close()

    @cached_property
    def _grpc(self) -> "GrpcTransport":
        from dgcache.grpc_transport import GrpcTransport

        return GrpcTransport(self._session)


def transport_on(session: Session, wanted: str) -> Transport:
    """Return the way for calls of a session: `grpc`, `direct`, or `auto`, the direct one if it is
    there.

    Raises:
        CacheUnavailableError: `direct` is wanted of a daemon that knows only gRPC.
    """
    speaks_it = session.hello.protocol >= DIRECT_PROTOCOL
    if wanted == "direct" and not speaks_it:
        raise CacheUnavailableError(
            f"the daemon ({session.hello.build}) takes calls over gRPC alone: "
            "use DG_CACHE_TRANSPORT=auto, or update it, then dg-cache restart"
        )
    if wanted != "grpc" and speaks_it:
        return DirectTransport(session)
    from dgcache.grpc_transport import GrpcTransport

    return GrpcTransport(session)
