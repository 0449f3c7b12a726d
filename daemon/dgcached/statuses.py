"""The one place where errors become gRPC status codes."""

import grpc
from grpc import aio

from dgcache_core.errors import (
    CacheCorruptionError,
    CacheError,
    CacheFullError,
    CacheMissError,
    CacheRefusedError,
    CacheUnavailableError,
    InvalidReferenceError,
)

MISS_REASON_KEY = "dg-miss-reason"

_CODES: dict[type[CacheError], grpc.StatusCode] = {
    CacheMissError: grpc.StatusCode.NOT_FOUND,
    CacheCorruptionError: grpc.StatusCode.DATA_LOSS,
    CacheFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    CacheRefusedError: grpc.StatusCode.PERMISSION_DENIED,
    CacheUnavailableError: grpc.StatusCode.UNAVAILABLE,
    InvalidReferenceError: grpc.StatusCode.INVALID_ARGUMENT,
}


class UnauthenticatedError(CacheRefusedError):
    """The session is missing, over, or of another process."""


def status_of(error: CacheError) -> grpc.StatusCode:
    """Return the status that stands for `error`."""
    if isinstance(error, UnauthenticatedError):
        return grpc.StatusCode.UNAUTHENTICATED
    return _CODES[type(error)]


async def abort_with(context: aio.ServicerContext, error: CacheError) -> None:
    """End the call with the status of `error`; a miss carries its reason."""
    trailing = ((MISS_REASON_KEY, str(error.reason)),) if isinstance(error, CacheMissError) else ()
    await context.abort(status_of(error), str(error), trailing)
