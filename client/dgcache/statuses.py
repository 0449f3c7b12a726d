"""The one place where a status of the daemon becomes an error of the cache.

The numbers are gRPC's (google.rpc.Code), whichever way a call went; grpc itself is not needed.
"""

from enum import IntEnum

from dgcache_core.errors import (
    CacheCorruptionError,
    CacheError,
    CacheFullError,
    CacheMissError,
    CacheRefusedError,
    CacheUnavailableError,
    InvalidReferenceError,
    MissReason,
)


class Status(IntEnum):
    """What a call may end with."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


_ERRORS: dict[int, type[CacheError]] = {
    Status.DATA_LOSS: CacheCorruptionError,
    Status.RESOURCE_EXHAUSTED: CacheFullError,
    Status.PERMISSION_DENIED: CacheRefusedError,
    Status.UNAUTHENTICATED: CacheRefusedError,
    Status.INVALID_ARGUMENT: InvalidReferenceError,
}


def error_of(code: int, message: str, reason: str) -> CacheError:
    """Return the error that a status stands for; `reason` is that of a miss."""
    if code == Status.NOT_FOUND:
        return CacheMissError(message, miss_reason(reason))
    if code in _ERRORS:
        return _ERRORS[code](message)
    name = Status(code).name.lower() if code in list(Status) else f"status {code}"
    return CacheUnavailableError(f"the daemon failed: {name}: {message}")


def miss_reason(text: str) -> MissReason:
    """Return the reason of a miss."""
    try:
        return MissReason(text)
    except ValueError:  # a newer daemon may know more reasons
        return MissReason.UNKNOWN
