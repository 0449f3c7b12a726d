"""The disk tier: sealed blobs in encrypted, signed files, which outlive memory and, with a key, the
process.

A blob is written as it is in memory, behind a header that carries its key (`disk_format`). What is
promised:

- a file is visible only when it is whole and was checked; with a persistent key it is then on the
  disk as well (fsync(2)), with an ephemeral one it is left to the kernel, since nobody could read
  it afterwards anyway;
- a file that anybody else changed is never served: its ledger, its signature, the signature it had
  when we wrote it, and its blob's seal are checked at each load, its chunks where they are used;
- the tier keeps its budget by removing what was used longest ago; expiry is by a clock that does
  not jump, and by the wall clock across restarts, where what was made in the future has expired;
- the disk's troubles are nobody's error: full, read-only or gone, the tier says so once, turns
  itself off, and goes on answering "no"; `sweep` tries again after a minute, then ever less often;
- the deltaspaces of an entry are those it was written with; what is bound later is known until the
  process ends.

Across restarts an older state of the whole directory cannot be told from the present one: whoever
restores it brings back what has not expired, and nothing that was cleared with a new key
generation, unless the generation's file is restored as well.

Calls block on the disk; call them from worker threads. Only `load` and the `clear` of a new
generation raise, and only `dgcache_core.errors`.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from dgcache_core.clock import Clock, boottime_seconds
from dgcache_core.disk_audit import Auditor
from dgcache_core.disk_files import TierDirectory
from dgcache_core.disk_index import DiskEntry
from dgcache_core.disk_keyring import KeyRing
from dgcache_core.disk_reader import DiskReader
from dgcache_core.disk_records import (
    DiskEntryInfo,
    DiskEventKind,
    DiskStatus,
    Finding,
    LoadedBlob,
    OnDiskEvent,
    StoredBlob,
)
from dgcache_core.disk_scan import FormerLife
from dgcache_core.disk_table import DiskTable
from dgcache_core.disk_writer import DiskWriter
from dgcache_core.errors import (
    CacheFullError,
    CacheRefusedError,
    CacheUnavailableError,
    MissReason,
)
from dgcache_core.keyslab import KeySlab
from dgcache_core.memory import Allocate
from dgcache_core.references import Deltaspace, Sha256
from dgcache_core.store import Freed
from dgcache_core.tier_keys import TierKeys

_SCAN_SECONDS = 1.0


class DiskStore:
    """A content-addressed, encrypted, signed tier on disk within a byte budget. Thread-safe."""

    def __init__(
        self,
        directory: Path,
        max_bytes: int,
        *,
        key: memoryview | bytes | None,
        may_fork: bool = True,
        clock: Clock = boottime_seconds,
        wall_clock: Callable[[], float] = time.time,
        on_event: OnDiskEvent = lambda _: None,
        on_directory: Callable[[Path], None] = lambda _: None,
    ) -> None:
        """Open the tier and look for a second, at most, at what a former life left in it.

        Args:
            directory: see `disk_names.tier_directory`; made where it is missing.
            max_bytes: the budget, in bytes of files.
            key: 32 bytes, copied; None makes a key that dies with the process, and its files too.
            may_fork: True where the process may fork; see `KeySlab`.
            clock: seconds, for expiry and order within this life.
            wall_clock: seconds since the epoch, for expiry across restarts.
            on_event: called from any thread, without a lock held.
            on_directory: called with each directory of entries that is made.

        Raises:
            CacheRefusedError: a check of the directory failed.
            CacheUnavailableError: another process uses it, or the disk is full or read-only.
            SettingsError: the key does not have 32 bytes.
        """
        self._directory = TierDirectory(directory, on_directory)
        self._table = DiskTable(self._directory, max_bytes, clock, on_event)
        close: Callable[[], None] = self._directory.close
        try:
            self._ring = KeyRing(self._directory, key, may_fork=may_fork)
            close = partial(self._ring.close, self._directory.close)
            self._writer = DiskWriter(self._table, self._ring, wall_clock)
            self._reader = DiskReader(self._table)
            self._former_life = FormerLife(self._table, self._ring, wall_clock)
            self._auditor = Auditor(self._table, self._ring, self._former_life)
            if self._ring.tampering:
                self._table.tell(
                    DiskEventKind.SECURITY, self._ring.generation_name, self._ring.tampering
                )
            self._former_life.go_on(_SCAN_SECONDS)
        except BaseException as error:
            close()
            if isinstance(error, OSError):
                raise CacheUnavailableError(f"{directory}: {error.strerror}") from error
            raise

    # -- writing and reading ---------------------------------------------------------------------

    def keep(self, stored: StoredBlob) -> bool:
        """Write a blob unless it is here already, for as long; tell whether it is here now.

        That counts as a use. Each of its chunks is checked on the way, so that a blob that rotted
        in memory is refused (and told as an event) and never made durable.
        """
        try:
            with self._ring.lend() as keys:
                if self._is_off:
                    return False
                entry = self._find(keys, stored.sha256)
                if entry is not None and self._writer.is_as_fresh(entry, stored):
                    self._use(entry, stored.deltaspaces)
                    return True
                if entry is not None:  # the same content was stored anew and lives longer
                    self._table.remove([entry], None)
                if not self._writer.keep(keys, stored):
                    return False
                for deltaspace in stored.deltaspaces:
                    self.bind(deltaspace, stored.sha256)
                return True
        except CacheUnavailableError:
            return False

    def load(self, sha256: Sha256, allocate: Allocate, keys: KeySlab) -> LoadedBlob | None:
        """Copy a blob into memory, or return None where it is not here.

        Args:
            sha256: its digest.
            allocate: where its sealed bytes go.
            keys: where its key goes.

        Raises:
            CacheCorruptionError: a check failed; the entry and its file are gone.
            CacheFullError: no memory or no key slot.
        """
        try:
            with self._ring.lend() as tier_keys:
                if self._is_off:
                    return None
                entry = self._find(tier_keys, sha256)
                if entry is None:
                    return None
                return self._reader.load(tier_keys, entry, allocate, keys)
        except CacheUnavailableError:
            return None

    def contains(self, sha256: Sha256) -> bool:
        """Tell whether a load would hit, as far as is known without one. Counts as no use."""
        return self.miss_reason(sha256) is None

    def miss_reason(self, sha256: Sha256) -> MissReason | None:
        """Return why a load would miss, or None where it would hit."""
        with suppress(CacheUnavailableError), self._ring.lend() as keys:
            self._find(keys, sha256)
            return MissReason.UNKNOWN if self._is_off else self._table.why_absent(sha256)
        return MissReason.UNKNOWN

    def lacks(self, sha256: Sha256) -> bool:
        """Tell whether a load would surely miss, without asking the disk."""
        with self._table.lock:
            is_unknown = self._former_life.is_done and self._table.index.get(sha256) is None
            return self._is_off or is_unknown

    def explain_absence(self, gone: Iterable[Sha256], reason: MissReason) -> None:
        """Remember why references that are not here are not in the tier above either."""
        with self._table.lock:
            for sha256 in gone:
                if self._table.index.get(sha256) is None:
                    self._table.remember(sha256, reason)

    def bind(self, deltaspace: Deltaspace, sha256: Sha256) -> None:
        """Let a deltaspace name an entry until the process ends; its file is not written anew."""
        with self._table.lock:
            if self._table.index.get(sha256) is not None:
                self._table.index.bindings.bind(deltaspace, sha256)

    # -- removing --------------------------------------------------------------------------------

    def forget(self, sha256: Sha256) -> int:
        """Remove an entry and return how many bytes of content that freed."""
        with suppress(CacheUnavailableError), self._ring.lend() as keys:
            entry = self._find(keys, sha256)
            if entry is not None:
                return self._remove_all([entry]).bytes
        return 0

    def drop_corrupt(self, sha256: Sha256) -> bool:
        """Remove an entry of which a chunk failed its check where it was used, and say so."""
        with suppress(CacheUnavailableError), self._ring.lend():
            entry = self._table.find(sha256)
            return entry is not None and self._table.drop(
                entry, DiskEventKind.CORRUPT, "a chunk failed its check"
            )
        return False

    def evict(self, deltaspace: Deltaspace) -> Freed:
        """Unbind a deltaspace; entries that serve no other are removed."""
        with suppress(CacheUnavailableError):
            self._former_life.go_on()
            with self._ring.lend():
                with self._table.lock:
                    unbound = self._table.index.bindings.unbind(deltaspace)
                    entries = [self._table.index.get(sha256) for sha256 in unbound]
                return self._remove_all([entry for entry in entries if entry is not None])
        return Freed()

    def clear(self, *, rekey: bool = False) -> Freed:
        """Remove every entry of ours.

        Args:
            rekey: begin a new key generation first, so that even a copy of the files that was made
                before is unreadable.

        Raises:
            CacheUnavailableError: no new generation could be made durable, or the store is closed;
                nothing was removed.
        """
        try:
            with self._ring.lend():
                self._former_life.go_on()
                if rekey:
                    self._renew()
                with self._table.lock:
                    entries = self._table.index.oldest_first()
                return self._remove_all(entries)
        except CacheUnavailableError:
            if rekey:
                raise
            return Freed()  # closed

    def sweep(self) -> None:
        """Remove what has expired, go on with the scan, try again where the tier is off."""
        with suppress(CacheUnavailableError), self._ring.lend():
            self._table.try_again()
            with self._table.lock:
                expired = self._table.index.expired(self._table.clock())
            self._table.expire(expired)
            self._former_life.go_on(_SCAN_SECONDS)

    def seconds_to_next_sweep(self) -> float | None:
        """Return how long until a sweep has something to do, or None where nothing is waiting."""
        if not self._former_life.is_done:
            return 0.0
        return self._table.seconds_to_next_sweep()

    def close(self) -> None:
        """Zero the keys, give the directory to the next; files of an ephemeral key are removed."""
        with suppress(CacheUnavailableError):
            if not self._ring.is_persistent:
                self.clear()
            self._ring.close(self._directory.close)

    # -- looking ---------------------------------------------------------------------------------

    def audit(self, name: str | Path) -> list[Finding]:
        """Compare one file, named relative to the directory or absolute, with its ledger.

        An entry that somebody else changed is removed at once and told as an event.
        """
        with suppress(CacheUnavailableError), self._ring.lend():
            return [] if self._is_off else self._auditor.audit(name)
        return []

    def audit_all(self) -> list[Finding]:
        """Compare every file of ours with its ledger."""
        with suppress(CacheUnavailableError), self._ring.lend():
            return [] if self._is_off else self._auditor.audit_all()
        return []

    def watched_directories(self) -> list[Path]:
        """Return the directories that are worth watching; `on_directory` tells of new ones."""
        with suppress(CacheUnavailableError), self._ring.lend():
            return self._directory.directories()
        return []

    def is_own_write_in_progress(self, name: str | Path) -> bool:
        """Tell whether we are writing or removing the entry of this name at the moment."""
        return self._table.is_busy(self._directory.relative(name))

    def entries(self) -> list[DiskEntryInfo]:
        """Return every entry that is known so far, most recently used first."""
        with self._table.lock:
            return self._table.index.described(self._table.clock())

    def status(self) -> DiskStatus:
        """Return how full the tier is and what happened so far."""
        with self._table.lock:
            index = self._table.index
            return DiskStatus(
                directory=str(self._directory.path),
                enabled=not self._table.disabled_reason,
                disabled_reason=self._table.disabled_reason,
                persistent=self._ring.is_persistent,
                is_scanned=self._former_life.is_done,
                entries=len(index),
                bindings=len(index.bindings),
                bytes=index.bytes,
                max_bytes=index.max_bytes,
                key_protection=self._ring.protection,
                counters=replace(self._table.counters),
            )

    # -- inside: keys are lent in everything below -----------------------------------------------

    @property
    def _is_off(self) -> bool:
        return bool(self._table.disabled_reason)

    def _find(self, keys: TierKeys, sha256: Sha256) -> DiskEntry | None:
        entry = self._table.find(sha256)
        if entry is None and not self._former_life.is_done and not self._is_off:
            self._former_life.judge(keys.file_name(sha256), keys)
            entry = self._table.find(sha256)
        return entry

    def _use(self, entry: DiskEntry, deltaspaces: list[Deltaspace]) -> None:
        with self._table.lock:
            if self._table.index.has(entry):
                self._table.index.touch(entry)
                for deltaspace in deltaspaces:
                    self._table.index.bindings.bind(deltaspace, entry.sha256)

    def _renew(self) -> None:
        name = self._ring.generation_name
        try:
            with self._table.busy(name):
                self._ring.renew()
                self._auditor.take_down(name)
        except (OSError, CacheRefusedError, CacheFullError) as error:
            if isinstance(error, OSError):
                self._table.note_failure(error)
            raise CacheUnavailableError(f"no new key generation could be made: {error}") from error

    def _remove_all(self, entries: list[DiskEntry]) -> Freed:
        gone = self._table.remove(entries, MissReason.EVICTED)
        return Freed(len(gone), sum(entry.frame.size for entry in gone))
