"""Whether somebody else changed the tier's files: what the kernel says now against the ledger.

The ledger of a file is taken after our own last write, so any difference was made by somebody else:
overwritten, replaced, linked, written through a mapping, given another mode. Such an entry is gone
at once. What the ledger does not see, the checks of header, seal and chunks do when the entry is
read: a write through a mapping whose page was dirty before, or of a file on tmpfs, which does not
time such writes; and a write in the same tick of the kernel's clock as our own last one (1 to 10 ms
before Linux 6.13).
"""

import stat
from pathlib import Path

from dgcache_core.disk_index import DiskEntry
from dgcache_core.disk_keyring import KeyRing
from dgcache_core.disk_names import GENERATION, LOCK, NEW, is_entry_name, is_level_name
from dgcache_core.disk_records import DiskEventKind, Finding
from dgcache_core.disk_scan import FormerLife
from dgcache_core.disk_table import DiskTable
from dgcache_core.errors import CacheRefusedError
from dgcache_core.ledger import FileState

_MOST_LOOKS = 16
"""At a stranger's file, while our own work goes on: one look beside it tells nothing."""


class Auditor:
    """Compares files with their ledgers. Thread-safe; own work never becomes a finding."""

    def __init__(self, table: DiskTable, ring: KeyRing, scan: FormerLife) -> None:
        self._table = table
        self._ring = ring
        self._scan = scan
        self._fixed: dict[str, FileState | None] = {}
        for name in (LOCK, ring.generation_name):
            self.take_down(name)

    def take_down(self, name: str) -> None:
        """Take the ledger of a file that is no entry, after our own write of it."""
        self._fixed[name] = self._look(name)

    def audit(self, name: str | Path) -> list[Finding]:
        """Look at what has this name, relative to the tier's directory or absolute."""
        relative = self._table.directory.relative(name)
        if relative in self._fixed:
            found = self._audit_fixed(relative)
        else:
            with self._table.lock:
                entry = self._table.index.named(relative)
            found = self._audit_entry(entry) if entry else self._audit_stranger(relative)
        return [found] if found else []

    def audit_all(self) -> list[Finding]:
        """Look at every entry, at the lock and at the generation's file."""
        with self._table.lock:
            entries = self._table.index.oldest_first()
        findings = [self._audit_fixed(name) for name in list(self._fixed)]
        findings += [self._audit_entry(entry) for entry in entries]
        return [finding for finding in findings if finding]

    def _audit_entry(self, entry: DiskEntry) -> Finding | None:
        kind = DiskEventKind.SECURITY
        try:
            now = self._look(entry.name)
        except CacheRefusedError as error:
            message = str(error)
        except OSError as error:
            self._table.note_failure(error)
            return None
        else:
            if now == entry.ledger:
                return None
            if now is None:
                if self._is_gone():
                    return None
                kind, message = DiskEventKind.REMOVED, "somebody else removed it"
            else:
                message = f"somebody else changed it: {entry.ledger.change_to(now)}"
        if not self._table.drop(entry, kind, message):
            return None
        return Finding(kind, entry.name, message)

    def _audit_fixed(self, name: str) -> Finding | None:
        """A finding here costs no entry; it is made once for each change."""
        try:
            now = self._look(name)
        except (CacheRefusedError, OSError):
            return None
        then = self._fixed[name]
        if now == then or self._table.is_busy(name) or self._is_gone():
            return None
        self._fixed[name] = now
        kind = DiskEventKind.SECURITY
        changes = "it is gone" if now is None else then.change_to(now) if then else "it is new"
        message = f"somebody else changed it: {changes}"
        self._table.tell(kind, name, message)
        return Finding(kind, name, message)

    def _audit_stranger(self, name: str) -> Finding | None:
        """Something that is in no index: it is never served, so it is only told; but no link stays
        in an entry's place, as at the next start."""
        for _ in range(_MOST_LOOKS):
            works = self._table.works
            if self._is_expected(name):
                return None
            try:
                now = self._look(name)
            except (CacheRefusedError, OSError):
                return None
            if now is None or self._is_expected(name):
                return None
            if self._table.works == works:
                break
        else:
            return None  # it may be what we were just writing or removing
        kind, message = DiskEventKind.FOREIGN, "somebody else put it there; it is not used"
        if is_entry_name(name) and stat.S_ISLNK(now.type):
            self._table.remove_stray(name)
            kind, message = DiskEventKind.SECURITY, "somebody else put a link there; it is removed"
        self._table.tell(kind, name, message)
        return Finding(kind, name, message)

    def _is_expected(self, name: str) -> bool:
        if name in ("", NEW) or name.startswith((f"{NEW}/", GENERATION)) or is_level_name(name):
            return True
        if is_entry_name(name):
            return self._table.is_known(name) or not self._scan.is_done
        return False

    def _look(self, name: str) -> FileState | None:
        try:
            return FileState.of(self._table.directory.look(name))
        except FileNotFoundError:
            return None

    def _is_gone(self) -> bool:
        """A directory that is gone altogether is one failure, not a finding for each file."""
        return self._table.note_if_gone()
