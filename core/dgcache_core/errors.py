"""What can go wrong, named for what the caller can do about it.

No foreign exception (`OSError`, `InvalidTag`, `grpc.RpcError`) leaves the public API: each is
raised `from` one of these. No message holds key material, a session id, or content.
"""

from enum import StrEnum


class MissReason(StrEnum):
    """Why a reference is not in the cache."""

    UNKNOWN = "unknown"
    DIGEST_CHANGED = "digest_changed"
    EXPIRED = "expired"
    EVICTED = "evicted"
    PRESSURE = "pressure"
    TOO_LARGE = "too_large"
    DROPPED_CORRUPT = "dropped_corrupt"


class CacheError(Exception):
    """Anything the cache says no with."""


class CacheMissError(CacheError):
    """The reference is not here: fetch it and store it. `reason` says why."""

    def __init__(self, message: str, reason: MissReason = MissReason.UNKNOWN) -> None:
        super().__init__(message)
        self.reason = reason


class CacheCorruptionError(CacheError):
    """A check failed, nothing was handed out, the entry is gone: fetch it again."""


class CacheFullError(CacheError):
    """There is no room (too large, or an admission limit): go on without the cache."""


class CacheRefusedError(CacheError):
    """A peer, a session or a directory failed its check: the message names the mending command."""


class CacheUnavailableError(CacheError):
    """The daemon is absent, stopped, too slow, or of another version."""


class DaemonAbsentError(CacheUnavailableError):
    """No daemon runs: there is no directory, no socket, or nobody listens on it."""


class InvalidReferenceError(CacheError):
    """The digest, bucket, prefix, size or source is not what it must be: mend the call."""


class SettingsError(CacheError):
    """A setting does not parse or is out of range: mend the named setting."""
