"""Calls over gRPC on rpc.sock, with the session's id as metadata.

The one module of the client that imports grpc; whoever needs no gRPC never loads it.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import grpc

from dgcache.session import Session
from dgcache.statuses import error_of
from dgcache_core.errors import CacheUnavailableError
from dgcache_core.runtime_directory import RPC_SOCKET
from dgcache_proto.v1 import dgcache_pb2_grpc

if TYPE_CHECKING:
    from google.protobuf.message import Message

M = TypeVar("M", bound="Message")

_CHANNEL_OPTIONS = [
    # the target names a descriptor by number, which another cache of this process may get later
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.default_authority", "localhost"),
    ("grpc.initial_reconnect_backoff_ms", 20),
    # also the time one attempt may take (grpc raises it to 100 ms, which a busy host exceeds); the
    # deadline of the call is what bounds the wait
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 100),
    # a wait for somebody else's fetch may be long; a daemon that is stopped meanwhile shows in 8 s
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.http2.max_pings_without_data", 0),
]


class GrpcTransport:
    """Implements `Transport` over one channel."""

    def __init__(self, session: Session) -> None:
        """Open a channel to where the session's daemon is; it connects at its first call."""
        self._channel = grpc.insecure_channel(
            f"unix:/proc/self/fd/{session.directory_fd}/{RPC_SOCKET}", options=_CHANNEL_OPTIONS
        )
        self._stub = dgcache_pb2_grpc.ReferenceCacheStub(self._channel)
        self._metadata = (("dg-session", session.hello.session_id.hex()),)

    def call(self, method: str, request: "Message", kind: type[M], seconds: float) -> M:  # noqa: ARG002 - the stub knows it
        """See `Transport`."""
        make = getattr(self._stub, method)
        try:
            return cast(M, make(request, timeout=seconds, metadata=self._metadata))
        except grpc.RpcError as error:
            _raise_for(error)
        except ValueError as error:  # another thread found the daemon lost and closed the channel
            raise CacheUnavailableError(f"the session is over: {error}") from error

    def stream(self, method: str, request: "Message", seconds: float | None) -> Iterator["Message"]:
        """See `Transport`."""
        stream = getattr(self._stub, method)(request, timeout=seconds, metadata=self._metadata)
        try:
            yield from stream
        except grpc.RpcError as error:
            _raise_for(error)
        finally:
            stream.cancel()

    def close(self) -> None:
        """See `Transport`."""
        self._channel.close()


def _raise_for(error: grpc.RpcError) -> NoReturn:
    trailing: dict[str, Any] = dict(error.trailing_metadata() or ())  # type: ignore[arg-type]
    code: int = error.code().value[0]
    reason = str(trailing.get("dg-miss-reason"))
    raise error_of(code, error.details() or "", reason) from error
