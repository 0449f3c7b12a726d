"""dg-cached itself as contenders: the in-process stores and a private daemon, through the SDK.

The daemon is started for the bench in a directory of the bench. Neither the user's settings nor the
user's daemon are looked at.
"""

import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from dgcache import Settings, launcher
from dgcache.cache import ReferenceCache
from dgcache_cli.bench.guard import SOCKETS
from dgcache_cli.bench.port import BUCKET, PREFIX
from dgcache_core.errors import CacheUnavailableError

_CONNECT_TIMEOUT_MS = 5000
_SETTLE_SECONDS = 10.0
_END_SECONDS = 30.0


class SdkContender:
    """A contender on a `ReferenceCache` that must go on being served by one backend."""

    shares = True

    def __init__(self, cache: ReferenceCache, backend: str) -> None:
        """Use a cache, which stays the caller's to close."""
        self._cache = cache
        self._backend = backend

    def write(self, source: Path) -> None:
        """See `Contender`."""
        self._cache.put(BUCKET, PREFIX, source)

    @contextmanager
    def read(self, sha256: str) -> Iterator[Path]:
        """See `Contender`.

        Raises:
            CacheUnavailableError: another backend answered: what is measured would not be this one.
        """
        with self._cache.get(BUCKET, PREFIX, sha256) as reference:
            if reference.source != self._backend:
                raise CacheUnavailableError(f"{reference.source} answered for {self._backend}")
            yield reference.path

    def evict(self) -> None:
        """See `Contender`."""
        self._cache.evict(BUCKET, PREFIX)

    def clear(self) -> None:
        """See `Contender`."""
        self._cache.clear()

    def settle(self) -> None:
        """See `Contender`: asking for its status makes a store look who holds what."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while (store := self._cache.status()["store"]) is not None and store["handout_bytes"]:
            if time.monotonic() > deadline:
                raise CacheUnavailableError(f"{self._backend} goes on holding what nobody holds")


@contextmanager
def opened(backend: str, place: Path, size_mb: int) -> Iterator[ReferenceCache]:
    """Open a cache on one backend, all of it below `place`.

    Raises:
        CacheUnavailableError: that backend cannot be used.
    """
    settings = Settings(
        backend=backend,
        fallback_size_mb=size_mb,
        connect_timeout_ms=_CONNECT_TIMEOUT_MS,
        socket_dir=_sockets(place),
        cache_dir=place,
    )
    with ReferenceCache(settings) as cache:
        if cache.backend != backend:
            raise CacheUnavailableError(f"{cache.backend} serves where {backend} was asked for")
        yield cache


@contextmanager
def running_daemon(
    place: Path, size_mb: int, environ: Mapping[str, str], options: tuple[str, ...] = ()
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a private daemon below `place` while the block runs; no signal may raise in here."""
    process = launcher.start(
        _private(environ, place),
        _sockets(place),
        options=("--memory-size-mb", str(size_mb), *options),
        log_file=place / "log" / "dg-cached.log",
    )
    if process is None:
        raise CacheUnavailableError(f"somebody else's daemon serves in {_sockets(place)}")
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def running_daemon_with_disk(
    place: Path, size_mb: int, environ: Mapping[str, str]
) -> AbstractContextManager["subprocess.Popen[bytes]"]:
    """Run a private daemon with a disk tier; see `running_daemon`."""
    tier = ("--disk-size-mb", str(size_mb), "--cache-dir", str(place / "daemon"))
    return running_daemon(place, size_mb, environ, tier)


def _sockets(place: Path) -> Path:
    return place / SOCKETS


def _private(environ: Mapping[str, str], place: Path) -> dict[str, str]:
    """Return an environment without the user's settings and configuration file."""
    kept = {k: v for k, v in environ.items() if not k.startswith(("DG_", "XDG_"))}
    return {
        **kept,
        "DG_CACHE_SOCKET_DIR": str(_sockets(place)),
        "XDG_CONFIG_HOME": str(place / "config"),
        "TMPDIR": str(place),
    }
