"""Which entries the disk tier has, in what order they leave, and how many bytes they take.

Entries of a former life come before those of this one, oldest first; those of this life follow in
the order of their last use. Not thread-safe: the store's lock covers it.
"""

from dataclasses import dataclass

from dgcache_core.aead import Frame
from dgcache_core.bindings import Bindings
from dgcache_core.disk_records import DiskEntryInfo
from dgcache_core.ledger import FileState
from dgcache_core.memory import page_rounded
from dgcache_core.references import Deltaspace, Sha256

MAX_ENTRIES = 65_536

_FORMER_LIFE, _THIS_LIFE = 0, 1


@dataclass(slots=True, eq=False)
class DiskEntry:
    """One file: what it holds, and how it looked when we last wrote or judged it.

    `created` and `expires` are seconds of the clock that does not jump.
    """

    name: str
    sha256: Sha256
    frame: Frame
    mac: bytes
    ledger: FileState
    created: float
    expires: float
    loads: int = 0
    rank: tuple[int, int] = (_FORMER_LIFE, 0)

    @property
    def bytes(self) -> int:
        """What the file takes on the disk, in whole blocks of 4096."""
        return page_rounded(self.ledger.size)


class DiskIndex:
    """The table of entries, within a budget of bytes that also counts what is being written."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bindings = Bindings()
        self.bytes = 0
        self.reserved_bytes = 0
        self._entries: dict[Sha256, DiskEntry] = {}
        self._by_name: dict[str, DiskEntry] = {}
        self._uses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, sha256: Sha256) -> DiskEntry | None:
        """Return the entry of a digest."""
        return self._entries.get(sha256)

    def named(self, name: str) -> DiskEntry | None:
        """Return the entry of a file."""
        return self._by_name.get(name)

    def has(self, entry: DiskEntry) -> bool:
        """Tell whether this very entry is still in the table."""
        return self._entries.get(entry.sha256) is entry

    def add(self, entry: DiskEntry, deltaspaces: "list[Deltaspace]", *, former_life: bool) -> None:
        """Take an entry in; there is none of its digest."""
        self._entries[entry.sha256] = entry
        self._by_name[entry.name] = entry
        self.bytes += entry.bytes
        if former_life:
            entry.rank = (_FORMER_LIFE, entry.frame.created_seconds)
        else:
            self.touch(entry)
        for deltaspace in deltaspaces:
            self.bindings.bind(deltaspace, entry.sha256)

    def remove(self, entry: DiskEntry) -> None:
        """Take an entry out."""
        del self._entries[entry.sha256]
        del self._by_name[entry.name]
        self.bindings.forget(entry.sha256)
        self.bytes -= entry.bytes

    def touch(self, entry: DiskEntry) -> None:
        """Make an entry the last to leave."""
        self._uses += 1
        entry.rank = (_THIS_LIFE, self._uses)

    def oldest_first(self) -> list[DiskEntry]:
        """Return every entry in the order in which they leave."""
        return sorted(self._entries.values(), key=lambda entry: entry.rank)

    def next_expiry(self) -> float | None:
        """Return when the next entry expires, or None where there is none."""
        return min((entry.expires for entry in self._entries.values()), default=None)

    def expired(self, now: float) -> list[DiskEntry]:
        """Return the entries whose time is over."""
        return [entry for entry in self._entries.values() if entry.expires <= now]

    def described(self, now: float) -> list[DiskEntryInfo]:
        """Tell of every entry that has not expired, most recently used first."""
        return [
            DiskEntryInfo(
                sha256=entry.sha256,
                size=entry.frame.size,
                file_bytes=entry.bytes,
                deltaspaces=self.bindings.deltaspaces(entry.sha256),
                age_seconds=now - entry.created,
                expires_in_seconds=entry.expires - now,
                loads=entry.loads,
            )
            for entry in reversed(self.oldest_first())
            if entry.expires > now
        ]

    def victims(self, room: int, *, entries: int = 0) -> list[DiskEntry] | None:
        """Return whom to remove so that `room` bytes fit, or None where that would not do."""
        missing = self.bytes + self.reserved_bytes + room - self.max_bytes
        surplus = len(self) + entries - MAX_ENTRIES
        if missing > self.bytes:
            return None
        chosen: list[DiskEntry] = []
        if missing > 0 or surplus > 0:
            for entry in self.oldest_first():
                if missing <= 0 and surplus <= len(chosen):
                    break
                chosen.append(entry)
                missing -= entry.bytes
        return chosen
