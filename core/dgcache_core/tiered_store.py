"""Memory over disk: what memory has no room for goes to disk, a disk hit comes back to memory.

Both tiers keep the same sealed bytes, so that nothing is encrypted twice: spilling writes them as
they are, with their key wrapped; restoring reads them into memory, where a lookup checks every
chunk as always. The disk is never believed, and never needed: where it fails, it says so once and
the store goes on with memory alone.

Both tiers may have a reference at once. It counts as one: for `entries`, and for what `evict` and
`clear` say they freed. Those two wait for what is on its way between the tiers: nothing that they
removed comes back from the other one.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from dgcache_core.disk_records import DiskEntryInfo, DiskStatus, StoredBlob
from dgcache_core.disk_store import DiskStore
from dgcache_core.errors import CacheCorruptionError, CacheError, CacheMissError, MissReason
from dgcache_core.handouts import Handout
from dgcache_core.memory_store import MemoryIngest, MemoryStore
from dgcache_core.references import Deltaspace, Sha256
from dgcache_core.store import EntryInfo, Freed, StoreStatus

_LONGEST_RESTORE_SECONDS = 60.0
_MOST_RESTORES = 3
"""How often a lookup brings a reference back: others may need its room before it is decrypted."""
_TOLD_BY_THE_DISK = (MissReason.EXPIRED, MissReason.DROPPED_CORRUPT)


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
        self._removals = 0  # in progress: nothing is restored meanwhile

    def lookup(self, deltaspace: Deltaspace, sha256: Sha256) -> Handout:
        """See `Store.lookup`. A reference that only the disk has is restored first."""
        for _ in range(_MOST_RESTORES - 1):
            try:
                return self._restore_and_look_up(deltaspace, sha256)
            except CacheMissError:
                if not self._disk.contains(sha256):
                    raise
        return self._restore_and_look_up(deltaspace, sha256)

    def lookup_now(self, deltaspace: Deltaspace, sha256: Sha256) -> Handout | None:
        """See `ResidentStore.lookup_now`. Asks the disk for nothing."""
        if self._memory.miss_reason(deltaspace, sha256) is not None and not self._disk.lacks(
            sha256
        ):
            return None
        try:
            return self._memory.lookup_now(deltaspace, sha256)
        except CacheMissError:
            if self._disk.lacks(sha256):
                raise
            return None  # it has just gone to disk

    def miss_reason(self, deltaspace: Deltaspace, sha256: Sha256) -> MissReason | None:
        """See `Store.miss_reason`."""
        if self._is_only_on_disk(deltaspace, sha256):
            return None
        return self._memory.miss_reason(deltaspace, sha256)

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
        with self._no_restores():
            before = self._sizes()
            self._memory.evict(deltaspace)
            self._memory.await_spills()
            self._disk.evict(deltaspace)
            return self._freed_since(before)

    def clear(self, *, rekey: bool = False) -> Freed:
        """See `Store.clear`. One tier is cleared also where the other has no new keys.

        Raises:
            CacheUnavailableError: rekey, and the disk tier could write no new generation: what it
                has is still there.
        """
        with self._no_restores():
            before = self._sizes()
            try:
                self._memory.clear(rekey=rekey)
            finally:
                self._memory.await_spills()
                self._disk.clear(rekey=rekey)
            return self._freed_since(before)

    def set_limit(self, max_bytes: int) -> Freed:
        """See `MemoryStore.set_limit`; what leaves memory goes to disk."""
        return self._memory.set_limit(max_bytes)

    def sweep(self) -> None:
        """See `Store.sweep`."""
        try:
            self._memory.sweep()
        finally:
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
        disk = self._disk.status()
        if disk.persistent:
            self._memory.flush(self._flush_seconds, disk.max_bytes)
        self._memory.close()
        self._disk.close()

    @property
    def max_entry_bytes(self) -> int:
        """The largest blob there can be."""
        return self._memory.max_entry_bytes

    def seconds_to_next_expiry(self) -> float | None:
        """Return how long until a sweep has something to do in one of the tiers, or None."""
        both = self._memory.seconds_to_next_expiry(), self._disk.seconds_to_next_sweep()
        return min((seconds for seconds in both if seconds is not None), default=None)

    @property
    def handouts_outstanding(self) -> int:
        """See `MemoryStore.handouts_outstanding`."""
        return self._memory.handouts_outstanding

    def _is_only_on_disk(self, deltaspace: Deltaspace, sha256: Sha256) -> bool:
        if self._memory.miss_reason(deltaspace, sha256) is None:
            return False
        reason = self._disk.miss_reason(sha256)
        if reason in _TOLD_BY_THE_DISK:
            self._memory.explain_absence(sha256, reason)
        return reason is None

    def _restore_and_look_up(self, deltaspace: Deltaspace, sha256: Sha256) -> Handout:
        self._restore_if_missing(deltaspace, sha256)
        try:
            return self._memory.lookup(deltaspace, sha256)
        except CacheCorruptionError:
            self._disk.drop_corrupt(sha256)  # the same bytes may be there
            raise

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
            self._restored.wait_for(
                lambda: sha256 not in self._restoring and not self._removals,
                _LONGEST_RESTORE_SECONDS,
            )
            self._restoring.add(sha256)
        try:
            yield
        finally:
            with self._lock:
                self._restoring.discard(sha256)
                self._restored.notify_all()

    @contextmanager
    def _no_restores(self) -> Iterator[None]:
        with self._lock:
            self._removals += 1
            self._restored.wait_for(lambda: not self._restoring, _LONGEST_RESTORE_SECONDS)
        try:
            yield
        finally:
            with self._lock:
                self._removals -= 1
                self._restored.notify_all()

    def _sizes(self) -> dict[Sha256, int]:
        return {entry.sha256: entry.size for entry in self.entries()}

    def _freed_since(self, before: dict[Sha256, int]) -> Freed:
        after = self._sizes()
        gone = {sha256: size for sha256, size in before.items() if sha256 not in after}
        self._disk.explain_absence(gone, MissReason.EVICTED)
        return Freed(len(gone), sum(gone.values()))


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
