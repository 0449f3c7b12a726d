"""The in-process cache: the same store as the daemon's, alive as long as this process."""

import os
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from dgcache.report import logger
from dgcache.settings import Settings
from dgcache.sources import Source
from dgcache_core.ephemeral import EphemeralDirectory
from dgcache_core.errors import CacheError, CacheUnavailableError, MissReason
from dgcache_core.handouts import Handout
from dgcache_core.memory import anonymous_memory
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Deltaspace, Sha256
from dgcache_core.settings import base_directory
from dgcache_core.store import EntryInfo, Freed

_MAX_ENTRIES = 512


class LocalBackend:
    """A `MemoryStore` of this process; `filesystem` keeps its ciphertext in nameless files.

    Nothing of it can outlive the process: the keys are in its memory, the files have no name. Of
    their directory see `dgcache_core.ephemeral`, also why no signal handler is installed.
    """

    def __init__(self, settings: Settings, name: str) -> None:
        self.name = name
        self._directory: EphemeralDirectory | None = None
        if name == "filesystem":
            base = base_directory(settings.cache_dir)
            self._directory = EphemeralDirectory(base / "v2" / "ephemeral")
        self._store = MemoryStore(
            settings.fallback_bytes,
            settings.ttl_seconds,
            may_fork=True,
            max_entries=_MAX_ENTRIES,
            allocate=self._directory.allocate if self._directory else anonymous_memory,
        )
        self.max_entry_bytes = self._store.max_entry_bytes

    def get(self, deltaspace: Deltaspace, sha256: Sha256) -> Handout:
        """See `Backend`."""
        return self._store.lookup(deltaspace, sha256)

    def put(self, deltaspace: Deltaspace, source: Source, expected: Sha256 | None) -> Sha256:
        """See `Backend`."""
        source.rewind()
        stored_by = f"uid {os.geteuid()} pid {os.getpid()}"
        with self._store.begin(
            source.size, deltaspace, expected=expected, stored_by=stored_by
        ) as ingest:
            ingest.fill(source.read_into)
            source.require_unchanged()
            return ingest.commit()

    def miss_reason(self, deltaspace: Deltaspace, sha256: Sha256) -> MissReason | None:
        """See `Backend`."""
        return self._store.miss_reason(deltaspace, sha256)

    def evict(self, deltaspace: Deltaspace) -> Freed:
        """See `Backend`."""
        return self._store.evict(deltaspace)

    def clear(self, *, rekey: bool = False) -> Freed:
        """See `Backend`."""
        return self._store.clear(rekey=rekey)

    def entries(self) -> list[EntryInfo]:
        """See `Backend`."""
        return self._store.entries()

    def status(self) -> dict[str, Any]:
        """See `Backend`."""
        status = asdict(self._store.status())
        counters = status.pop("counters")
        misses = counters.pop("misses")
        return {**status, **counters, "misses": {str(r): n for r, n in misses.items() if n}}

    def sweep(self) -> None:
        """See `Backend`."""
        with suppress(CacheUnavailableError):  # what the kernel did not tell of stays for now
            self._store.sweep()

    def close(self) -> None:
        """See `Backend`."""
        self._store.close()
        if self._directory is not None:
            self._directory.close()


def make_local(settings: Settings) -> tuple[LocalBackend, CacheError | None]:
    """Return the in-process cache that is wanted; memory, with the reason, where files fail."""
    if not settings.encryption:
        logger.warning(
            "DG_CACHE_ENCRYPTION=false: the in-process cache encrypts all the same; unset it"
        )
    if settings.backend == "filesystem":
        try:
            return LocalBackend(settings, "filesystem"), None
        except CacheError as error:
            return LocalBackend(settings, "memory"), error
    return LocalBackend(settings, "memory"), None
