"""The tables of the memory tier: which blobs there are, in which order they leave, and what was.

A blob is in three orders: by digest, by last use, and by expiry. It leaves all of them at once; its
memory goes when nobody reads it any more, crypto-erased: the key is zeroed before the mapping is
unmapped. Not thread-safe: the store's lock covers it.
"""

import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from dgcache_core.aead import Frame
from dgcache_core.bindings import Bindings
from dgcache_core.errors import MissReason
from dgcache_core.keyslab import KeySlot
from dgcache_core.memory import page_rounded
from dgcache_core.references import Deltaspace, Sha256
from dgcache_core.store import EntryInfo

_REMEMBERED_MISSES = 4096


@dataclass(slots=True, eq=False)
class Entry:
    """One blob. `readers` pin it; `dropped` says that it is in no table any more."""

    frame: Frame
    sha256: Sha256
    blob: mmap.mmap
    key: KeySlot
    stored_by: str
    created: float
    expires: float
    last_used: float
    hits: int = 0
    readers: int = 0
    dropped: bool = False

    @property
    def bytes(self) -> int:
        """What its ciphertext takes: whole pages."""
        return page_rounded(self.frame.sealed_bytes)


class EntryTable:
    """Every blob that is here, and why some are not any more."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Sha256, Entry] = OrderedDict()  # least recently used first
        self._by_expiry: dict[Sha256, None] = {}  # the next to expire first
        self._past: OrderedDict[Sha256, MissReason] = OrderedDict()
        self.bindings = Bindings()
        self.blob_bytes = 0
        """Of ciphertext, that of dropped entries included until nobody reads them."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sha256: Sha256) -> bool:
        return sha256 in self._entries

    def __getitem__(self, sha256: Sha256) -> Entry:
        return self._entries[sha256]

    def get(self, sha256: Sha256) -> Entry | None:
        """Return the entry of a digest, or None."""
        return self._entries.get(sha256)

    def all(self) -> list[Entry]:
        """Return every entry, least recently used first."""
        return list(self._entries.values())

    def idle(self) -> list[Entry]:
        """Return those that nobody reads, least recently used first."""
        return [entry for entry in self._entries.values() if not entry.readers]

    def next_to_expire(self) -> Entry | None:
        """Return the entry that expires first, or None."""
        sha256 = next(iter(self._by_expiry), None)
        return None if sha256 is None else self._entries[sha256]

    def why_absent(self, deltaspace: Deltaspace, sha256: Sha256) -> MissReason:
        """Return why a digest has no entry."""
        if sha256 in self._past:
            return self._past[sha256]
        if self.bindings.current(deltaspace) is not None:
            return MissReason.DIGEST_CHANGED
        return MissReason.UNKNOWN

    def described(self, now: float, is_held: Callable[[Sha256], bool]) -> list[EntryInfo]:
        """Return every entry for people, most recently used first."""
        return [
            EntryInfo(
                sha256=entry.sha256,
                size=entry.frame.size,
                deltaspaces=self.bindings.deltaspaces(entry.sha256),
                age_seconds=now - entry.created,
                expires_in_seconds=entry.expires - now,
                idle_seconds=now - entry.last_used,
                hits=entry.hits,
                stored_by=entry.stored_by,
                held=is_held(entry.sha256),
            )
            for entry in reversed(self._entries.values())
        ]

    def enter(self, entry: Entry, deltaspaces: Iterable[Deltaspace]) -> None:
        """Take in an entry whose digest has none."""
        last = next(reversed(self._by_expiry), None)
        self._entries[entry.sha256] = entry
        self._by_expiry[entry.sha256] = None
        if last is not None and self._entries[last].expires > entry.expires:
            in_order = sorted(self._entries.values(), key=lambda one: one.expires)
            self._by_expiry = dict.fromkeys(one.sha256 for one in in_order)
        self.blob_bytes += entry.bytes
        self._past.pop(entry.sha256, None)
        for deltaspace in deltaspaces:
            self.bindings.bind(deltaspace, entry.sha256)

    def use(self, entry: Entry, deltaspace: Deltaspace, now: float) -> None:
        """Note that an entry was handed out, and for which deltaspace."""
        entry.last_used = now
        entry.hits += 1
        if not entry.dropped:
            self._entries.move_to_end(entry.sha256)
            self.bindings.bind(deltaspace, entry.sha256)

    def drop(self, entry: Entry, reason: MissReason | None) -> bool:
        """Take an entry out of every order; False where it is out already."""
        if entry.dropped:
            return False
        entry.dropped = True
        del self._entries[entry.sha256]
        del self._by_expiry[entry.sha256]
        self.bindings.forget(entry.sha256)
        if reason is not None:
            self.remember(entry.sha256, reason)
        if not entry.readers:
            self._free(entry)
        return True

    def unpin(self, entry: Entry) -> None:
        """One reads it less; the last reader of a dropped entry takes its memory away."""
        entry.readers -= 1
        if entry.dropped and not entry.readers:
            self._free(entry)

    def remember(self, sha256: Sha256, reason: MissReason) -> None:
        """Note why a digest is not here (any more)."""
        self._past[sha256] = reason
        self._past.move_to_end(sha256)
        if len(self._past) > _REMEMBERED_MISSES:
            self._past.popitem(last=False)

    def _free(self, entry: Entry) -> None:
        release(entry.key, entry.blob)
        self.blob_bytes -= entry.bytes


def release(key: KeySlot, blob: mmap.mmap) -> None:
    """Erase a blob's key, then give its memory back."""
    key.erase()
    with suppress(BufferError):  # a traceback holds a view: the mapping goes with that one
        blob.close()
