"""dg-cached's SDK: references by digest, from a warm daemon or from an in-process cache.

    import dgcache

    with dgcache.open() as cache:
        with cache.get_or_fetch("bucket", "prefix", sha256, fetch) as reference:
            subprocess.run(["xdelta3", "-d", "-s", reference.path, delta, out], check=True)

Importing this package loads neither grpc nor cryptography; they come with their first use.
"""

from typing import TYPE_CHECKING

from dgcache.settings import Settings
from dgcache_core.errors import (
    CacheCorruptionError,
    CacheError,
    CacheFullError,
    CacheMissError,
    CacheRefusedError,
    CacheUnavailableError,
    InvalidReferenceError,
    MissReason,
    SettingsError,
)

if TYPE_CHECKING:
    from dgcache.cache import ReferenceCache
    from dgcache.reference import Reference

__all__ = [
    "CacheCorruptionError",
    "CacheError",
    "CacheFullError",
    "CacheMissError",
    "CacheRefusedError",
    "CacheUnavailableError",
    "InvalidReferenceError",
    "MissReason",
    "Reference",
    "ReferenceCache",
    "Settings",
    "SettingsError",
    "open",
]


def open(settings: Settings | None = None) -> "ReferenceCache":  # noqa: A001 - `dgcache.open`, as `gzip.open`
    """Return a cache: the daemon's where one can be used, else an in-process one.

    Decides within `settings.connect_timeout_ms`; `.backend` tells which it is.

    Args:
        settings: how to use the cache; read from the environment where None.

    Raises:
        SettingsError: a setting does not parse or is out of range.
        CacheUnavailableError: this is not Linux; the message says what is missing.
    """
    from dgcache.platform import require_linux

    require_linux()
    from dgcache.cache import ReferenceCache

    return ReferenceCache(settings if settings is not None else Settings.from_environment())


def __getattr__(name: str) -> object:
    """Load the classes when they are first named (PEP 562): they need Linux."""
    if name == "ReferenceCache":
        from dgcache.cache import ReferenceCache

        return ReferenceCache
    if name == "Reference":
        from dgcache.reference import Reference

        return Reference
    raise AttributeError(f"module 'dgcache' has no attribute {name!r}")
