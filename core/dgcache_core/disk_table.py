"""The index of the disk tier with its lock, its files, and what there is to say about them.

The lock is held for microseconds and never during I/O. An entry leaves the index before its file is
removed, and a name on which we are at work is *busy* from before the first system call until after
the last: whoever finds a file changed asks once more whether the entry is still in the index, and
so never mistakes our own work for somebody else's.
"""

import errno
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dgcache_core.clock import Clock
from dgcache_core.disk_files import TierDirectory
from dgcache_core.disk_index import DiskEntry, DiskIndex
from dgcache_core.disk_records import DiskCounters, DiskEvent, DiskEventKind, OnDiskEvent
from dgcache_core.errors import CacheRefusedError, MissReason
from dgcache_core.memory import page_rounded
from dgcache_core.references import Deltaspace, Sha256

_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN, errno.EFBIG)
_REMEMBERED_MISSES = 4096
_FIRST_RETRY_SECONDS = 60.0
_LAST_RETRY_SECONDS = 3600.0
_PROBE_BYTES = 1 << 20


@dataclass(slots=True)
class Admission:
    """Room for one file that is being written, and its name."""

    name: str
    room: int


class DiskTable:
    """What every part of the tier works on. Thread-safe."""

    def __init__(
        self, directory: TierDirectory, max_bytes: int, clock: Clock, on_event: OnDiskEvent
    ) -> None:
        self.lock = threading.Lock()
        self.directory = directory
        self.index = DiskIndex(max_bytes)
        self.counters = DiskCounters()
        self.clock = clock
        self.disabled_reason = ""
        self.works = 0
        """How often a name became busy: unchanged means that nothing of ours happened between."""
        self._on_event = on_event
        self._busy: set[str] = set()
        self._past: OrderedDict[Sha256, MissReason] = OrderedDict()
        self._retry_at = 0.0
        self._retry_seconds = _FIRST_RETRY_SECONDS
        self._wanted_bytes = 0

    # -- looking ---------------------------------------------------------------------------------

    def find(self, sha256: Sha256) -> DiskEntry | None:
        """Return the entry of a digest; one that has expired is removed."""
        with self.lock:
            entry = self.index.get(sha256)
            if entry is None or entry.expires > self.clock():
                return entry
        self.expire([entry])
        return None

    def is_busy(self, name: str) -> bool:
        """Tell whether we are writing or removing a file of this name."""
        with self.lock:
            return name in self._busy

    def is_known(self, name: str) -> bool:
        """Tell whether a name is an entry's or busy."""
        with self.lock:
            return name in self._busy or self.index.named(name) is not None

    def why_absent(self, sha256: Sha256) -> MissReason | None:
        """Return why there is no entry of a digest, or None where there is one."""
        if self.find(sha256) is not None:
            return None
        with self.lock:
            return self._past.get(sha256, MissReason.UNKNOWN)

    # -- adding ----------------------------------------------------------------------------------

    @contextmanager
    def busy(self, name: str) -> Iterator[None]:
        """Mark a name as one we are at work on."""
        with self.lock:
            self._begin(name)
        try:
            yield
        finally:
            self._end(name)

    @contextmanager
    def admission(self, name: str, size: int) -> Iterator[Admission | None]:
        """Make room for a file by removing what was used longest ago, and make its name busy.

        None where it is an entry's, somebody is at work on it, or there can be no room.
        """
        room = page_rounded(size)
        with self.lock:
            taken = name in self._busy or self.index.named(name) is not None
            victims = None if taken else self.index.victims(room, entries=1)
            if victims is not None:
                self._begin(name)
                self.index.reserved_bytes += room
                for victim in victims:
                    self._take_out(victim, MissReason.EVICTED)
                self.counters.evictions += len(victims)
        if victims is None:
            yield None
            return
        admission = Admission(name, room)
        try:
            for victim in victims:
                self._unlink(victim.name)
            yield admission
        finally:
            with self.lock:
                self.index.reserved_bytes -= admission.room
            self._end(name)

    def add(
        self, entry: DiskEntry, deltaspaces: list[Deltaspace], admission: Admission | None
    ) -> bool:
        """Take in a file that was just written, or one of a former life; tell whether it was new.

        Args:
            entry: the file.
            deltaspaces: what it serves.
            admission: the room that was made for it; None for a file of a former life.
        """
        with self.lock:
            other = self.index.get(entry.sha256)
            if admission is None:
                if entry.name in self._busy or other is not None:
                    return False
            else:
                self.index.reserved_bytes -= admission.room
                admission.room = 0
                self._past.pop(entry.sha256, None)
                if other is not None:  # of another generation, under another name
                    self._take_out(other, None)
            self.index.add(entry, deltaspaces, former_life=admission is None)
        if other is not None:
            self._unlink(other.name)
        return True

    # -- removing --------------------------------------------------------------------------------

    def remove(self, entries: Iterable[DiskEntry], reason: MissReason | None) -> list[DiskEntry]:
        """Remove entries and their files; return those that were there."""
        with self.lock:
            present = [entry for entry in entries if self.index.has(entry)]
            for entry in present:
                self._take_out(entry, reason)
        for entry in present:
            self._unlink(entry.name)
        return present

    def expire(self, entries: Iterable[DiskEntry]) -> None:
        """Remove entries whose time is over."""
        gone = self.remove(entries, MissReason.EXPIRED)
        with self.lock:
            self.counters.expirations += len(gone)

    def drop(self, entry: DiskEntry, kind: DiskEventKind, message: str) -> bool:
        """Remove a bad entry and say so; False where we had removed it ourselves meanwhile."""
        bad = kind is not DiskEventKind.REMOVED
        if not self.remove([entry], MissReason.DROPPED_CORRUPT if bad else None):
            return False
        if bad:
            with self.lock:
                self.counters.corruptions += 1
        self.tell(kind, entry.name, message)
        return True

    def remove_stray(self, name: str) -> None:
        """Remove a file that is in no index, unless we are at work on it."""
        with self.lock:
            if name in self._busy or self.index.named(name) is not None:
                return
            self._begin(name)
        self._unlink(name)

    def remember(self, sha256: Sha256, reason: MissReason) -> None:
        """Keep in mind why a digest is not here; the lock is held."""
        self._past[sha256] = reason
        self._past.move_to_end(sha256)
        if len(self._past) > _REMEMBERED_MISSES:
            self._past.popitem(last=False)

    # -- saying ----------------------------------------------------------------------------------

    def tell(self, kind: DiskEventKind, name: str, message: str) -> None:
        """Pass an event on. The lock is not held."""
        if kind in (DiskEventKind.SECURITY, DiskEventKind.DISABLED):
            with self.lock:
                self.counters.alarms += 1
        self._on_event(DiskEvent(kind, name, message))

    def note_failure(self, error: OSError, wanted_bytes: int = 0) -> None:
        """The system said no: turn the tier off and say so once, unless it is a passing lack."""
        if error.errno in _PASSING:
            return
        with self.lock:
            if self.disabled_reason:
                return
            self.disabled_reason = error.strerror or str(error)
            self._wanted_bytes = max(wanted_bytes, _PROBE_BYTES)
            self._retry_at = self.clock() + self._retry_seconds
        self.tell(
            DiskEventKind.DISABLED,
            "",
            f"the disk tier in {self.directory.path} is off: {self.disabled_reason}",
        )

    def note_if_gone(self) -> bool:
        """Tell whether the whole directory was removed; the tier is off then."""
        if not self.directory.is_gone:
            return False
        self.note_failure(FileNotFoundError(errno.ENOENT, "its directory was removed"))
        return True

    def try_again(self) -> None:
        """Turn the tier on again where a file of the size that failed can be made."""
        with self.lock:
            if not self.disabled_reason or self.clock() < self._retry_at:
                return
        try:
            if self.directory.is_gone:
                raise FileNotFoundError(errno.ENOENT, "the directory was removed")
            with self.directory.new_file(self._wanted_bytes):
                pass
        except (OSError, CacheRefusedError):
            with self.lock:
                self._retry_seconds = min(2 * self._retry_seconds, _LAST_RETRY_SECONDS)
                self._retry_at = self.clock() + self._retry_seconds
            return
        with self.lock:
            self.disabled_reason = ""
        self.tell(DiskEventKind.ENABLED, "", f"the disk tier in {self.directory.path} is on again")

    def seconds_to_next_sweep(self) -> float | None:
        """Return how long until something expires or the next try, or None."""
        with self.lock:
            if self.disabled_reason:
                return max(0.0, self._retry_at - self.clock())
            expiry = self.index.next_expiry()
            return None if expiry is None else max(0.0, expiry - self.clock())

    # -- the lock is held in _begin and _take_out, and not in the others -------------------------

    def _begin(self, name: str) -> None:
        self._busy.add(name)
        self.works += 1

    def _end(self, name: str) -> None:
        with self.lock:
            self._busy.discard(name)

    def _take_out(self, entry: DiskEntry, reason: MissReason | None) -> None:
        self.index.remove(entry)
        self._begin(entry.name)
        if reason is not None:
            self.remember(entry.sha256, reason)

    def _unlink(self, name: str) -> None:
        """Remove the file of a busy name, which is busy no more then."""
        try:
            self.directory.unlink(name)
        except FileNotFoundError:
            pass
        except CacheRefusedError as error:
            if not self.directory.remove_links(name):
                self.tell(DiskEventKind.FOREIGN, name, str(error))
        except OSError as error:
            self.note_failure(error)
        finally:
            self._end(name)
