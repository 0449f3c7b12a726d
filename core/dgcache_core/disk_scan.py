"""What a former life left in the tier's directory: taken in again, removed, or left alone.

Each file is judged by its header alone, a few at a time, so that a start takes a second at most,
whatever there is; what is asked for meanwhile is judged at once. The rules:

- signed by our key and generation, whole, unexpired, in its own place: taken in;
- ours and bad in any way: removed, with an event. So is one that was changed after we had opened
  the directory: since then only we write here;
- of an ephemeral key that is gone, or of an earlier generation: nobody can read it, removed;
- of another key, of another format, no file at all: left alone and counted. Links are removed;
- what the system did not let us look at (no descriptor left, a bad disk) is tried again at the end.
"""

import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from dgcache_core.disk_files import require_own_file
from dgcache_core.disk_format import DiskHeader, Origin
from dgcache_core.disk_index import DiskEntry
from dgcache_core.disk_keyring import KeyRing
from dgcache_core.disk_reader import judge_file
from dgcache_core.disk_records import DiskEventKind
from dgcache_core.disk_table import DiskTable
from dgcache_core.errors import CacheCorruptionError, CacheRefusedError, MissReason
from dgcache_core.ledger import FileState
from dgcache_core.tier_keys import TierKeys

_MAX_EVENTS = 100
_MAX_TEMPORARIES = 10_000
_MAX_TRIED_AGAIN = 256


class FormerLife:
    """The scan of the directory. Thread-safe: one thread scans, the others wait for it."""

    def __init__(self, table: DiskTable, ring: KeyRing, wall_clock: Callable[[], float]) -> None:
        """Remove what was being written when the process before was killed; scan nothing yet."""
        self._table = table
        self._ring = ring
        self._wall_clock = wall_clock
        self._lock = threading.RLock()  # an event may be answered with a call
        self._names: Iterator[str | None] = table.directory.entry_names()
        self._again: deque[str] = deque()
        self._may_try_again = _MAX_TRIED_AGAIN
        self._events = 0
        self.is_done = False
        for count, name in enumerate(table.directory.temporaries()):
            if count == _MAX_TEMPORARIES:
                break
            table.remove_stray(name)
        table.counters.foreign_files += table.directory.foreign_names()

    def go_on(self, seconds: float = float("inf")) -> None:
        """Judge the files that are left, for at most that long.

        Raises:
            CacheUnavailableError: the store was closed.
        """
        deadline = time.monotonic() + seconds
        with self._lock, self._ring.lend() as keys:
            while not self.is_done and time.monotonic() < deadline:
                name = next(self._names, "")
                if name == "" and self._again:
                    self.judge(self._again.popleft(), keys)
                elif name == "":
                    self._end()
                elif name is None:
                    self._table.counters.foreign_files += 1
                else:
                    self.judge(name, keys)

    def judge(self, name: str, keys: TierKeys) -> None:
        """Take one file in, remove it, or leave it alone."""
        if self._table.is_known(name):
            return
        try:
            with self._table.directory.opened(name) as descriptor:
                self._judge(name, descriptor, keys)
        except FileNotFoundError:
            return
        except CacheCorruptionError as error:
            self._remove(name, DiskEventKind.CORRUPT, str(error))
        except CacheRefusedError as error:
            if self._table.directory.remove_links(name):
                self._tell(DiskEventKind.SECURITY, name, f"a link was removed: {error}")
            else:
                self._leave(name, str(error))
        except OSError as error:
            if self._may_try_again:
                self._may_try_again -= 1
                self._again.append(name)
                return
            self._leave(name, error.strerror or "it cannot be read")

    def _judge(self, name: str, descriptor: int, keys: TierKeys) -> None:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            self._leave(name, "it is not a regular file")
            return
        origin, header = judge_file(descriptor, keys, name)
        if origin is Origin.PAST:
            self._table.remove_stray(name)
        elif origin is Origin.OTHER_KEY:
            self._table.counters.other_key_files += 1
        elif header is None:
            self._leave(name, "it is not of this format")
        else:
            self._take_in(name, status, header)

    def _take_in(self, name: str, status: os.stat_result, header: DiskHeader) -> None:
        if not status.st_nlink:
            return  # we have just removed it ourselves
        frame, now = header.frame, self._wall_clock()
        from_the_future = status.st_ctime_ns > time.time_ns()  # the clock was set back
        if from_the_future or not frame.created_seconds <= now < frame.expires_seconds:
            self._table.remove_stray(name)
            self._table.counters.expirations += 1
            return
        try:
            ledger = require_own_file(name, status)
            if status.st_ctime_ns > self._table.directory.opened_ctime_ns:
                raise CacheRefusedError(f"{name} was put there by somebody else")
        except CacheRefusedError as error:
            self._remove(name, DiskEventKind.SECURITY, str(error))
            return
        self._add(name, header, ledger, now)

    def _add(self, name: str, header: DiskHeader, ledger: FileState, now: float) -> None:
        clock = self._table.clock()
        entry = DiskEntry(
            name=name,
            sha256=header.sha256,
            frame=header.frame,
            mac=header.mac,
            ledger=ledger,
            created=clock - (now - header.frame.created_seconds),
            expires=clock + (header.frame.expires_seconds - now),
        )
        self._table.add(entry, list(header.deltaspaces), None)

    def _end(self) -> None:
        """All is judged: what is over the budget leaves, oldest first."""
        self.is_done = True
        with self._table.lock:
            surplus = self._table.index.victims(0) or []
        gone = self._table.remove(surplus, MissReason.EVICTED)
        self._table.counters.evictions += len(gone)

    def _remove(self, name: str, kind: DiskEventKind, message: str) -> None:
        if self._table.is_known(name):
            return  # what was judged is gone: we have written there meanwhile
        self._table.remove_stray(name)
        with self._table.lock:
            self._table.counters.corruptions += 1
        self._tell(kind, name, message)

    def _leave(self, name: str, message: str) -> None:
        with self._table.lock:
            self._table.counters.foreign_files += 1
        self._tell(DiskEventKind.FOREIGN, name, f"left alone: {message}")

    def _tell(self, kind: DiskEventKind, name: str, message: str) -> None:
        self._events += 1
        if self._events <= _MAX_EVENTS:
            self._table.tell(kind, name, message)
