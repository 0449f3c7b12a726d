"""Memory over disk: what memory has no room for goes to disk, a disk hit comes back to memory.

Both tiers keep the same sealed bytes, so that nothing is encrypted twice: spilling writes them as
they are, with their key wrapped; restoring reads them into memory, where a lookup checks every
chunk as always. The disk is never believed, and never needed: where it fails, it says so once and
the store goes on with memory alone.

Both tiers may have a reference at once. It counts as one: for `entries`, and for what `evict` and
`clear` say they freed.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from dgcache_core.disk_records import DiskEntryInfo, DiskStatus, StoredBlob
from dgcache_core.disk_store import DiskStore
from dgcache_core.errors import CacheCorruptionError, CacheError, MissReason
from dgcache_core.handouts import Handout
from dgcache_core.memory_store import MemoryIngest, MemoryStore
from dgcache_core.references import Deltaspace, Sha256
from dgcache_core.store import EntryInfo, Freed, StoreStatus

_LONGEST_RESTORE_SECONDS = 60.0


class TieredStore:
    """A `MemoryStore` over a `DiskStore`. Implements `ResidentStore`; everything may block."""

    def __init__(self, memory: MemoryStore, disk: DiskStore, *, flush_seconds: float) -> None:
        """Join two tiers, which are this store's to close.

        Args:
            memory: the upper tier, whose `spill` is `spill_to(disk)`.
            disk: the lower tier.
            flush_seconds: what `close` may take to write memory to a disk tier that outlives it.
        """
        self._memory = memory
        self._disk = disk
        self._flush_seconds = flush_seconds
        self._lock = threading.Lock()
        self._restored = threading.Condition(self._lock)
        self._restoring: set[Sha256] = set()

    def lookup(self, deltaspace: Deltaspace, sha256: Sha256) -> Handout:
        """See `Store.lookup`. A reference that only the disk has is restored first."""
        self._restore_if_missing(deltaspace, sha256)
        try:
            return self._memory.lookup(deltaspace, sha256)
        except CacheCorruptionError:
            self._disk.drop_corrupt(sha256)  # the same bytes may be there
            raise

    def lookup_shared(self, deltaspace: Deltaspace, sha256: Sha256) -> Handout | None:
        """See `ResidentStore.lookup_shared`."""
        if self._is_only_on_disk(deltaspace, sha256):
            return None
        return self._memory.lookup_shared(deltaspace, sha256)

    def miss_reason(self, deltaspace: Deltaspace, sha256: Sha256) -> MissReason | None:
        """See `Store.miss_reason`."""
        reason = self._memory.miss_reason(deltaspace, sha256)
        return None if reason is None or self._disk.contains(sha256) else reason

    def begin(
        self,
        size: int,
        deltaspace: Deltaspace,
        *,
        expected: Sha256 | None = None,
        stored_by: str = "",
    ) -> MemoryIngest:
        """See `Store.begin`."""
        return self._memory.begin(size, deltaspace, expected=expected, stored_by=stored_by)

    def evict(self, deltaspace: Deltaspace) -> Freed:
        """See `Store.evict`."""
        before = self._sizes()
        self._memory.evict(deltaspace)
        self._disk.evict(deltaspace)
        return self._freed_since(before)

    def clear(self, *, rekey: bool = False) -> Freed:
        """See `Store.clear`."""
        before = self._sizes()
        self._memory.clear(rekey=rekey)
        self._disk.clear(rekey=rekey)
        return self._freed_since(before)

    def set_limit(self, max_bytes: int) -> Freed:
        """See `MemoryStore.set_limit`; what leaves memory goes to disk."""
        return self._memory.set_limit(max_bytes)

    def sweep(self) -> None:
        """See `Store.sweep`."""
        self._memory.sweep()
        self._disk.sweep()

    def entries(self) -> list[EntryInfo]:
        """See `Store.entries`: those in memory, then those that only the disk has."""
        in_memory = self._memory.entries()
        seen = {entry.sha256 for entry in in_memory}
        return in_memory + [
            _entry_info(entry) for entry in self._disk.entries() if entry.sha256 not in seen
        ]

    def status(self) -> StoreStatus:
        """See `Store.status`: that of memory. `disk_status` has the rest."""
        return self._memory.status()

    def disk_status(self) -> DiskStatus:
        """Return how full the disk tier is."""
        return self._disk.status()

    def close(self) -> None:
        """See `Store.close`. A disk tier that outlives this life gets what memory has."""
        if self._disk.status().persistent:
            self._memory.flush(self._flush_seconds)
        self._memory.close()
        self._disk.close()

    @property
    def max_entry_bytes(self) -> int:
        """The largest blob there can be."""
        return self._memory.max_entry_bytes

    def seconds_to_next_expiry(self) -> float | None:
        """See `MemoryStore.seconds_to_next_expiry`; the disk is swept when memory is."""
        return self._memory.seconds_to_next_expiry()

    @property
    def handouts_outstanding(self) -> int:
        """See `MemoryStore.handouts_outstanding`."""
        return self._memory.handouts_outstanding

    def _is_only_on_disk(self, deltaspace: Deltaspace, sha256: Sha256) -> bool:
        return self._memory.miss_reason(deltaspace, sha256) is not None and self._disk.contains(
            sha256
        )

    def _restore_if_missing(self, deltaspace: Deltaspace, sha256: Sha256) -> None:
        """Bring it back, once for all who ask at the same time."""
        if not self._is_only_on_disk(deltaspace, sha256):
            return
        with self._alone(sha256):
            if self._memory.miss_reason(deltaspace, sha256) is not None:
                self._memory.restore(lambda allocate, keys: self._disk.load(sha256, allocate, keys))

    @contextmanager
    def _alone(self, sha256: Sha256) -> Iterator[None]:
        with self._lock:
            self._restored.wait_for(lambda: sha256 not in self._restoring, _LONGEST_RESTORE_SECONDS)
            self._restoring.add(sha256)
        try:
            yield
        finally:
            with self._lock:
                self._restoring.discard(sha256)
                self._restored.notify_all()

    def _sizes(self) -> dict[Sha256, int]:
        return {entry.sha256: entry.size for entry in self.entries()}

    def _freed_since(self, before: dict[Sha256, int]) -> Freed:
        after = self._sizes()
        gone = [size for sha256, size in before.items() if sha256 not in after]
        return Freed(len(gone), sum(gone))


def spill_to(disk: DiskStore) -> Callable[[StoredBlob], None]:
    """Return a `MemoryStore`'s spill that keeps blobs on disk; a failure only loses the copy."""

    def spill(stored: StoredBlob) -> None:
        with suppress(CacheError):
            disk.keep(stored)

    return spill


def _entry_info(entry: DiskEntryInfo) -> EntryInfo:
    return EntryInfo(
        sha256=entry.sha256,
        size=entry.size,
        deltaspaces=entry.deltaspaces,
        age_seconds=entry.age_seconds,
        expires_in_seconds=entry.expires_in_seconds,
        idle_seconds=entry.age_seconds,
        hits=entry.loads,
        stored_by="",
        held=False,
        tier="disk",
    )
