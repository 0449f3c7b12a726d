"""The encrypted LRU: blobs in mappings of their own, keys in a locked page, a budget in bytes.

One lock covers the tables (entries, bindings, handouts, reservations) and is held for microseconds;
encryption and decryption happen outside it, on entries that are pinned meanwhile. The rules:

- everything counts against the limit in force, which is `max_bytes` unless `set_limit` lowered it:
  ciphertext, plaintext that is held, and what is reserved for stores and lookups in progress.
  Space is reserved before it is filled;
- the entry handed out longest ago leaves first; one that is being read never does;
- where there is a tier below, what leaves for want of room is written there first, outside the
  lock, and still counts meanwhile; who needs the room waits for it;
- a blob leaves crypto-erased: its key is zeroed before its mapping is unmapped;
- a failed check hands out nothing, drops the entry and is counted;
- a closed store answers with errors at once; what is in progress then ends by itself, and the last
  of it takes the keys away.
"""

import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from dgcache_core.aead import (
    BODY_OFFSET,
    CHUNK_BYTES,
    TAG_BYTES,
    Frame,
)
from dgcache_core.clock import Clock, boottime_seconds
from dgcache_core.disk_records import LoadedBlob, StoredBlob
from dgcache_core.errors import (
    CacheCorruptionError,
    CacheError,
    CacheFullError,
    CacheMissError,
    CacheUnavailableError,
    InvalidReferenceError,
    MissReason,
)
from dgcache_core.handouts import Handout, Handouts
from dgcache_core.ingest import Sealing
from dgcache_core.keyslab import KeySlab, KeySlot
from dgcache_core.memory import Allocate, anonymous_memory, page_rounded
from dgcache_core.memory_entries import Entry, EntryTable, release
from dgcache_core.opening import open_blob
from dgcache_core.references import Deltaspace, Sha256
from dgcache_core.scratch import ScratchPool
from dgcache_core.store import Counters, EntryInfo, Freed, ReadInto, StoreStatus

_LONGEST_OPENING_SECONDS = 60.0
_LONGEST_SPILL_SECONDS = 30.0

Spill = Callable[[StoredBlob], None]
Load = Callable[[Allocate, KeySlab], LoadedBlob | None]


class MemoryStore:
    """An encrypted, content-addressed LRU within a byte budget. Implements `Store`."""

    def __init__(
        self,
        max_bytes: int,
        ttl_seconds: float,
        *,
        may_fork: bool,
        max_entries: int = 4096,
        allocate: Allocate = anonymous_memory,
        clock: Clock = boottime_seconds,
        wall_clock: Clock = time.time,
        spill: Spill | None = None,
    ) -> None:
        """Make an empty store.

        Args:
            max_bytes: the budget, in bytes.
            ttl_seconds: how long an entry lives after it was stored.
            may_fork: True where the process may fork; see `KeySlab`.
            max_entries: how many entries (and keys) there can be.
            allocate: where ciphertext lives.
            clock: seconds, for expiry and order.
            wall_clock: seconds since the epoch, which are written into each blob.
            spill: keeps what leaves for want of room; must not raise.
        """
        self._spill = spill
        self._max_bytes = max_bytes
        self._limit_bytes = max_bytes
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._wall_clock = wall_clock
        self._allocate = allocate
        self._make_keys = partial(KeySlab, max_entries, may_fork=may_fork)
        self._keys = self._make_keys()
        self._helpers: Executor = ThreadPoolExecutor(2, thread_name_prefix="dg-cache-crypto")
        self._scratch = ScratchPool(CHUNK_BYTES, keep=8)
        self._lock = threading.Lock()
        self._opened = threading.Condition(self._lock)
        self._entries = EntryTable()
        self._handouts = Handouts()
        self._opening: set[Sha256] = set()
        self._reserved_bytes = 0
        self._counters = Counters()
        self._leaving_bytes = 0  # of entries that are being spilled
        self._spills: set[object] = set()  # one for each that is being written
        self._promised_keys = 0  # of those that are being restored
        self._in_progress = 0  # stores and decryptions, which need keys, helpers and buffers
        self._closed = False

    # -- handing out ---------------------------------------------------------------------------

    def lookup(self, deltaspace: Deltaspace, sha256: Sha256) -> Handout:
        """See `Store.lookup`. Plaintext that somebody holds is shared, else decrypted once."""
        with self._lock:
            handout = self._shared_handout(deltaspace, sha256)
            if handout is not None:
                return handout
            entry = self._begin_opening(sha256)
        return self._opened_handout(entry, deltaspace)

    def lookup_now(self, deltaspace: Deltaspace, sha256: Sha256) -> Handout | None:
        """See `ResidentStore.lookup_now`."""
        with self._lock:
            entry = self._require(deltaspace, sha256)
            if sha256 in self._opening:
                return None
            handout = self._shared_handout(deltaspace, sha256)
            if handout is not None:
                return handout
            room = page_rounded(entry.frame.size)
            if entry.frame.chunks > 1 or self._used_bytes + room > self._limit_bytes:
                return None
            self._begin_opening(sha256)
        return self._opened_handout(entry, deltaspace)

    def miss_reason(self, deltaspace: Deltaspace, sha256: Sha256) -> MissReason | None:
        """See `Store.miss_reason`."""
        with self._lock:
            self._expire()
            return None if sha256 in self._entries else self._entries.why_absent(deltaspace, sha256)

    # -- storing -------------------------------------------------------------------------------

    def begin(
        self,
        size: int,
        deltaspace: Deltaspace,
        *,
        expected: Sha256 | None = None,
        stored_by: str = "",
    ) -> "MemoryIngest":
        """See `Store.begin`."""
        if size < 0:
            raise InvalidReferenceError(f"a size is not negative, got {size}")
        now = int(self._wall_clock())
        frame = Frame(size, now, now + int(self._ttl_seconds))
        room = page_rounded(frame.sealed_bytes)
        with self._lock:
            self._require_open()
            self._in_progress += 1
            try:
                self._require_admissible(size)
                key = self._new_key()
                try:
                    self._reserve(room)
                except BaseException:
                    key.erase()
                    raise
            except CacheError:
                self._counters.refused_stores += 1
                if expected is not None and size > self.max_entry_bytes:
                    self._entries.remember(expected, MissReason.TOO_LARGE)
                elif expected is not None and size > _largest_entry(self._limit_bytes):
                    self._entries.remember(expected, MissReason.PRESSURE)
                self._end_progress()
                raise
        try:
            blob = self._allocate(frame.sealed_bytes)
        except BaseException:
            key.erase()
            with self._lock:
                self._reserved_bytes -= room
                self._counters.refused_stores += 1
                self._end_progress()
            raise
        sealing = Sealing(frame, key.view, memoryview(blob), self._helpers, self._scratch)
        return MemoryIngest(self, sealing, blob, key, deltaspace, expected, stored_by)

    def _adopt(self, ingest: "MemoryIngest", sha256: Sha256) -> None:
        """Take over a complete blob; it replaces an older one of the same digest."""
        now = self._clock()
        entry = Entry(
            frame=ingest.frame,
            sha256=sha256,
            blob=ingest.blob,
            key=ingest.key,
            stored_by=ingest.stored_by,
            created=now,
            expires=now + self._ttl_seconds,
            last_used=now,
        )
        with self._lock:
            self._require_open()
            if not self._keys.owns(ingest.key):
                self._counters.refused_stores += 1
                raise CacheFullError("the keys were rotated during this store; store it again")
            self._reserved_bytes -= entry.bytes
            self._end_progress()
            deltaspaces = self._entries.bindings.deltaspaces(sha256)
            if sha256 in self._entries:
                self._entries.drop(self._entries[sha256], None)
            self._entries.enter(entry, (*deltaspaces, ingest.deltaspace))
            self._counters.stores += 1
            self._counters.stored_bytes += entry.frame.size

    def _count_refusal(self) -> None:
        with self._lock:
            self._counters.refused_stores += 1

    def _abandon(self, ingest: "MemoryIngest") -> None:
        release(ingest.key, ingest.blob)
        with self._lock:
            self._reserved_bytes -= page_rounded(ingest.frame.sealed_bytes)
            self._end_progress()

    # -- the tier below --------------------------------------------------------------------------

    def restore(self, load: Load) -> bool:
        """Take a sealed blob back from the tier below, within the budget.

        Nothing of it is believed here: the checks of a lookup are made over this private copy.

        Args:
            load: reads it into the memory and key that it is given; None where it has none.

        Raises:
            CacheFullError: there is no room for it.
        """
        reserved = 0

        def allocate(size: int) -> mmap.mmap:
            nonlocal reserved
            with self._lock:
                self._require_open()
                self._reserve(page_rounded(size))
                reserved = page_rounded(size)
            return self._allocate(size)

        with self._lock:
            self._require_open()
            self._free_a_slot()
            self._promised_keys += 1
            self._in_progress += 1
        loaded: LoadedBlob | None = None
        try:
            loaded = load(allocate, self._keys)
        finally:
            with self._lock:
                self._reserved_bytes -= reserved
                self._promised_keys -= 1
                if loaded is not None:
                    self._take_back(loaded)
                self._end_progress()
        return loaded is not None

    def _take_back(self, loaded: LoadedBlob) -> None:
        now = self._clock()
        entry = Entry(
            frame=loaded.frame,
            sha256=loaded.sha256,
            blob=loaded.blob,
            key=loaded.key,
            stored_by="",
            created=now - (self._ttl_seconds - loaded.expires_in_seconds),
            expires=now + loaded.expires_in_seconds,
            last_used=now,
        )
        unwanted = self._closed or not self._keys.owns(loaded.key)
        if unwanted or entry.sha256 in self._entries:
            release(loaded.key, loaded.blob)
        else:
            self._entries.enter(entry, loaded.deltaspaces)

    def flush(self, seconds: float, max_bytes: int) -> None:
        """Write entries to the tier below, the most recently used first.

        Args:
            seconds: no write begins later.
            max_bytes: what the tier below has room for: what came after that would take the place
                of what was used more recently.
        """
        deadline = time.monotonic() + seconds
        with self._lock:
            for entry in reversed(self._entries.all()):
                max_bytes -= entry.bytes + mmap.PAGESIZE  # the tier's own header
                if self._spill is None or max_bytes < 0 or time.monotonic() >= deadline:
                    return
                if not entry.dropped:
                    self._spill_unlocked(entry, self._spill)

    def await_spills(self) -> None:
        """Wait until what is being written to the tier below now is there, or has failed."""
        with self._lock:
            begun = set(self._spills)
            self._opened.wait_for(lambda: not begun & self._spills, _LONGEST_SPILL_SECONDS)

    def explain_absence(self, sha256: Sha256, reason: MissReason) -> None:
        """Remember why the tier below does not have it any more, unless it is here."""
        with self._lock:
            if sha256 not in self._entries:
                self._entries.remember(sha256, reason)

    # -- removing ------------------------------------------------------------------------------

    def evict(self, deltaspace: Deltaspace) -> Freed:
        """See `Store.evict`."""
        with self._lock:
            return self._drop_all(
                [
                    self._entries[sha256]
                    for sha256 in self._entries.bindings.unbind(deltaspace)
                    if sha256 in self._entries
                ]
            )

    def clear(self, *, rekey: bool = False) -> Freed:
        """See `Store.clear`. The old region of keys goes with the last use of one of them."""
        with self._lock:
            if rekey:
                self._require_open()
            freed = self._drop_all(self._entries.all())
            if rekey:
                self._rotate_keys()
        self._scratch.close()
        return freed

    def set_limit(self, max_bytes: int) -> Freed:
        """Put another limit in force; what is idle leaves, oldest use first, until it fits.

        What is being read, held or in progress stays, so the store may be over its limit for a
        while; call again then. New entries and plaintexts are admitted by the limit in force.

        Args:
            max_bytes: more than the budget means the budget.

        Returns:
            how many entries left, and the memory they gave back, in bytes of whole pages.
        """
        with self._lock:
            self._limit_bytes = max(0, min(max_bytes, self._max_bytes))
            self._expire()
            self._handouts.sweep()
            freed: list[Entry] = []
            for entry in self._entries.idle():
                if self._used_bytes <= self._limit_bytes:
                    break
                if entry.dropped or entry.readers:
                    continue  # since the lock was given away
                if self._evict_one(entry, MissReason.PRESSURE):
                    freed.append(entry)
            return Freed(len(freed), sum(entry.bytes for entry in freed))

    def sweep(self) -> None:
        """See `Store.sweep`."""
        with self._lock:
            self._expire()
            self._handouts.sweep()
            refusal = self._handouts.refusal
        if refusal:
            raise CacheUnavailableError(f"whether handouts are held could not be asked: {refusal}")

    def close(self) -> None:
        """See `Store.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._drop_all(self._entries.all())
            self._handouts.close()
            self._in_progress += 1
            self._end_progress()

    # -- looking -------------------------------------------------------------------------------

    def entries(self) -> list[EntryInfo]:
        """See `Store.entries`."""
        with self._lock:
            self._expire()
            self._handouts.sweep()
            return self._entries.described(self._clock(), self._handouts.is_held)

    def status(self) -> StoreStatus:
        """See `Store.status`."""
        with self._lock:
            self._expire()
            self._handouts.sweep()
            return StoreStatus(
                entries=len(self._entries),
                bindings=len(self._entries.bindings),
                max_bytes=self._max_bytes,
                max_entry_bytes=self.max_entry_bytes,
                blob_bytes=self._entries.blob_bytes,
                handout_bytes=self._handouts.held_bytes,
                reserved_bytes=self._reserved_bytes,
                handouts=len(self._handouts),
                shares_handouts=self._handouts.can_share,
                key_protection=str(self._keys.protection),
                counters=replace(self._counters, misses=dict(self._counters.misses)),
                limit_bytes=self._limit_bytes,
            )

    @property
    def max_entry_bytes(self) -> int:
        """The largest blob there can be: ciphertext and one plaintext must fit side by side.

        Of the budget, whatever the limit in force: clients hear it once, and that one passes.
        """
        return _largest_entry(self._max_bytes)

    def seconds_to_next_expiry(self) -> float | None:
        """Return how long until the oldest entry expires, or None where there is none."""
        with self._lock:
            first = self._entries.next_to_expire()
            return None if first is None else first.expires - self._clock()

    @property
    def handouts_outstanding(self) -> int:
        """How many plaintexts were in memory at the last sweep."""
        return self._handouts.outstanding

    # -- without the lock ------------------------------------------------------------------------

    def _opened_handout(self, entry: Entry, deltaspace: Deltaspace) -> Handout:
        """End what `_begin_opening` began."""
        room = page_rounded(entry.frame.size)
        try:
            memory_file = self._decrypt(entry)
        except BaseException as error:
            with self._lock:
                if isinstance(error, CacheCorruptionError):
                    self._drop(entry, MissReason.DROPPED_CORRUPT)
                self._end_opening(entry, room)
            if isinstance(error, OSError):
                raise CacheFullError(f"no memory file: {error.strerror}") from error
            raise
        with self._lock:
            self._end_opening(entry, room)
            if self._closed:
                os.close(memory_file)
                raise _closed_error()
            handout = self._handouts.add(entry.sha256, memory_file, entry.frame.size)
            self._count_hit(entry, deltaspace)
            return handout

    def _decrypt(self, entry: Entry) -> int:
        return open_blob(
            entry.frame, entry.sha256, entry.blob, entry.key.view, self._helpers, self._scratch
        )

    # -- the lock is held in everything below ----------------------------------------------------

    def _require(self, deltaspace: Deltaspace, sha256: Sha256) -> Entry:
        self._require_open()
        self._expire()
        entry = self._entries.get(sha256)
        if entry is None:
            reason = self._entries.why_absent(deltaspace, sha256)
            self._counters.misses[reason] += 1
            raise CacheMissError(f"no reference {sha256} for {deltaspace}: {reason}", reason)
        return entry

    def _shared_handout(self, deltaspace: Deltaspace, sha256: Sha256) -> Handout | None:
        """Wait while somebody else decrypts this blob, then share what came of it."""
        deadline = time.monotonic() + _LONGEST_OPENING_SECONDS
        while True:
            entry = self._require(deltaspace, sha256)
            handout = self._handouts.open_shared(sha256)
            if handout is not None:
                self._counters.shared_hits += 1
                self._count_hit(entry, deltaspace)
                return handout
            if sha256 not in self._opening:
                return None
            if not self._opened.wait(deadline - time.monotonic()):
                raise CacheFullError(f"decrypting {sha256} takes too long")

    def _count_hit(self, entry: Entry, deltaspace: Deltaspace) -> None:
        self._entries.use(entry, deltaspace, self._clock())
        self._counters.hits += 1
        self._counters.hit_bytes += entry.frame.size

    def _require_admissible(self, size: int) -> None:
        if size > self.max_entry_bytes:
            raise CacheFullError(
                f"{size} bytes are more than the {self.max_entry_bytes} that one reference may "
                f"have in a cache of {self._max_bytes} bytes (DG_CACHE_MEMORY_SIZE_MB)"
            )
        if size > _largest_entry(self._limit_bytes):
            raise CacheFullError(
                f"{size} bytes are too many while memory is short: the cache is limited to "
                f"{self._limit_bytes} of its {self._max_bytes} bytes for now"
            )

    def _reserve(self, room: int) -> None:
        """Make room by evicting what was handed out longest ago, then reserve it.

        With a tier below the lock is given away meanwhile: what the caller relies on afterwards
        must be pinned.
        """
        if self._used_bytes + room > self._limit_bytes:
            self._expire()
            self._handouts.sweep()
            self._shed(room)
            self._require_open()
        self._reserved_bytes += room

    def _shed(self, room: int) -> None:
        deadline = time.monotonic() + _LONGEST_SPILL_SECONDS
        while (missing := self._used_bytes + room - self._limit_bytes) > 0:
            idle = self._entries.idle()
            if sum(entry.bytes for entry in idle) + self._leaving_bytes < missing:
                raise CacheFullError(f"no room for {room} bytes: the rest of the cache is in use")
            if not idle:  # what is missing is being spilled by somebody else
                if not self._opened.wait(deadline - time.monotonic()):
                    raise CacheFullError(f"no room for {room} bytes: the disk tier is too slow")
                continue
            for entry in idle:
                if missing <= 0 or entry.dropped or entry.readers:
                    break
                missing -= entry.bytes
                self._evict_one(entry)

    def _rotate_keys(self) -> None:
        """The old region goes first where nobody uses it: RLIMIT_MEMLOCK may not hold both."""
        self._keys.retire()
        try:
            self._keys = self._make_keys()
        except (MemoryError, OSError) as error:
            raise CacheFullError("no memory for new keys; rotate them again later") from error

    def _new_key(self) -> KeySlot:
        self._free_a_slot()
        return self._keys.new_key()

    def _free_a_slot(self) -> None:
        deadline = time.monotonic() + _LONGEST_SPILL_SECONDS
        while self._keys.free_slots <= self._promised_keys:
            oldest = next(iter(self._entries.idle()), None)
            if oldest is not None:
                self._evict_one(oldest)
            elif not self._spills or not self._opened.wait(deadline - time.monotonic()):
                return

    def _evict_one(self, entry: Entry, reason: MissReason = MissReason.EVICTED) -> bool:
        """Let an idle entry leave for the tier below; False where it does not leave after all."""
        if self._spill is not None:
            self._spill_unlocked(entry, self._spill)
            if entry.dropped or entry.readers:
                return False  # gone, or wanted again in the meantime
        self._drop(entry, reason)
        if reason is MissReason.PRESSURE:
            self._counters.pressure_evictions += 1
        else:
            self._counters.evictions += 1
        return True

    def _spill_unlocked(self, entry: Entry, spill: Spill) -> None:
        """Give the lock away while the entry, pinned, is written to the tier below."""
        entry.readers += 1
        self._leaving_bytes += entry.bytes
        this = object()
        self._spills.add(this)
        deltaspaces = self._entries.bindings.deltaspaces(entry.sha256)
        self._lock.release()
        try:
            with memoryview(entry.blob) as blob:
                spill(
                    StoredBlob(
                        entry.frame,
                        entry.sha256,
                        blob,
                        entry.key.view,
                        deltaspaces,
                        entry.expires - self._clock(),
                    )
                )
        finally:
            self._lock.acquire()
            self._leaving_bytes -= entry.bytes
            self._spills.discard(this)
            self._entries.unpin(entry)
            self._opened.notify_all()

    @property
    def _used_bytes(self) -> int:
        return self._entries.blob_bytes + self._handouts.held_bytes + self._reserved_bytes

    def _expire(self) -> None:
        now = self._clock()
        while (entry := self._entries.next_to_expire()) is not None and entry.expires <= now:
            self._drop(entry, MissReason.EXPIRED)
            self._counters.expirations += 1

    def _drop_all(self, entries: list[Entry]) -> Freed:
        for entry in entries:
            self._drop(entry, MissReason.EVICTED)
        return Freed(len(entries), sum(entry.frame.size for entry in entries))

    def _drop(self, entry: Entry, reason: MissReason) -> None:
        if self._entries.drop(entry, reason) and reason is MissReason.DROPPED_CORRUPT:
            self._counters.corruptions += 1

    def _require_open(self) -> None:
        if self._closed:
            raise _closed_error()

    def _end_progress(self) -> None:
        """The last in progress on a closed store takes away what all of them needed."""
        self._in_progress -= 1
        if self._closed and not self._in_progress:
            self._helpers.shutdown(wait=False)
            self._scratch.close()
            self._keys.close()

    def _begin_opening(self, sha256: Sha256) -> Entry:
        """Pin an entry and reserve room for its plaintext."""
        entry = self._entries[sha256]
        entry.readers += 1
        self._opening.add(sha256)
        self._in_progress += 1
        try:
            self._reserve(page_rounded(entry.frame.size))
        except BaseException:  # whatever it is: who waits for this opening must not wait on
            self._end_opening(entry, 0)
            raise
        return entry

    def _end_opening(self, entry: Entry, room: int) -> None:
        self._reserved_bytes -= room
        self._opening.discard(entry.sha256)
        self._opened.notify_all()
        self._entries.unpin(entry)
        self._end_progress()


def _largest_entry(max_bytes: int) -> int:
    whole = max_bytes - BODY_OFFSET - TAG_BYTES - 2 * mmap.PAGESIZE
    return max(0, whole * CHUNK_BYTES // (2 * CHUNK_BYTES + TAG_BYTES))


def _closed_error() -> CacheUnavailableError:
    return CacheUnavailableError("this store is closed")


class MemoryIngest:
    """A store in progress in a `MemoryStore`. Implements `Ingest`; used by one thread at a time."""

    def __init__(
        self,
        store: MemoryStore,
        sealing: Sealing,
        blob: mmap.mmap,
        key: KeySlot,
        deltaspace: Deltaspace,
        expected: Sha256 | None,
        stored_by: str,
    ) -> None:
        self.frame = sealing.frame
        self.blob = blob
        self.key = key
        self.deltaspace = deltaspace
        self.stored_by = stored_by
        self._store = store
        self._sealing = sealing
        self._expected = expected
        self._ended = False

    def fill(self, read: ReadInto) -> None:
        """See `Ingest.fill`."""
        self._sealing.fill(read)

    def commit(self) -> Sha256:
        """See `Ingest.commit`. After an error the store in progress is aborted."""
        if self._ended:
            raise InvalidReferenceError("this store was ended before")
        try:
            sha256 = self._sealing.finish(self._expected)
        except InvalidReferenceError:
            self.abort()
            self._store._count_refusal()
            raise
        self._sealing.release()
        try:
            self._store._adopt(self, sha256)
        except (CacheUnavailableError, CacheFullError):
            self.abort()
            raise
        self._ended = True
        return sha256

    def abort(self) -> None:
        """See `Ingest.abort`."""
        if not self._ended:
            self._ended = True
            self._sealing.release()
            self._store._abandon(self)

    def __enter__(self) -> "MemoryIngest":
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()
