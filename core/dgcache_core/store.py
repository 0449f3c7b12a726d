"""What a store is to those who use it, whatever its blobs live in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from dgcache_core.errors import MissReason
from dgcache_core.handouts import Handout
from dgcache_core.references import Deltaspace, Sha256

ReadInto = Callable[[memoryview], int]
"""Fills a part of the buffer and returns how many bytes; 0 is the end. May raise."""


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """One entry, for people. Times are seconds: ages and what is left, not dates."""

    sha256: Sha256
    size: int
    deltaspaces: list[Deltaspace]
    age_seconds: float
    expires_in_seconds: float
    idle_seconds: float
    hits: int
    stored_by: str
    held: bool
    tier: str = "memory"


@dataclass(frozen=True, slots=True)
class Freed:
    """What an eviction gave back."""

    entries: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Counters:
    """What happened since the store was made."""

    hits: int = 0
    shared_hits: int = 0
    hit_bytes: int = 0
    stores: int = 0
    stored_bytes: int = 0
    refused_stores: int = 0
    evictions: int = 0
    pressure_evictions: int = 0
    expirations: int = 0
    corruptions: int = 0
    misses: dict[MissReason, int] = field(default_factory=lambda: dict.fromkeys(MissReason, 0))


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """How full the store is. Bytes are whole pages, as the system counts them."""

    entries: int
    bindings: int
    max_bytes: int
    max_entry_bytes: int
    blob_bytes: int
    handout_bytes: int
    reserved_bytes: int
    handouts: int
    shares_handouts: bool
    key_protection: str
    counters: Counters
    limit_bytes: int
    """The limit in force: `max_bytes`, or less while memory is short."""


class Ingest(Protocol):
    """A store in progress: fill it once, then commit or abort; as a context it aborts itself."""

    def fill(self, read: ReadInto) -> None:
        """Take exactly the announced bytes from `read`.

        Raises:
            InvalidReferenceError: there are fewer or more.
        """

    def commit(self) -> Sha256:
        """Make the blob visible and return its digest.

        Raises:
            InvalidReferenceError: it is not filled, or its digest is not the expected one.
        """

    def abort(self) -> None:
        """Keep nothing. Does nothing after a commit or an earlier abort."""

    def __enter__(self) -> "Ingest": ...

    def __exit__(self, *_: object) -> None: ...


class Store(Protocol):
    """Where blobs live. Thread-safe. Raises only `dgcache_core.errors`."""

    def lookup(self, deltaspace: Deltaspace, sha256: Sha256) -> Handout:
        """Return a validated handout and count it as use; the deltaspace is bound to the blob.

        Raises:
            CacheMissError: it is not here; `reason` says why.
            CacheCorruptionError: a check failed; the entry is gone.
            CacheFullError: there is no room for its plaintext.
        """

    def begin(
        self,
        size: int,
        deltaspace: Deltaspace,
        *,
        expected: Sha256 | None = None,
        stored_by: str = "",
    ) -> Ingest:
        """Reserve room for a blob of `size` bytes.

        Raises:
            CacheFullError: it is larger than `max_entry_bytes`, or what is held leaves no room.
        """

    def miss_reason(self, deltaspace: Deltaspace, sha256: Sha256) -> MissReason | None:
        """Return why a lookup would miss, or None where it would hit. Counts as no use."""

    def evict(self, deltaspace: Deltaspace) -> Freed:
        """Unbind a deltaspace; blobs that serve no other are freed."""

    def clear(self, *, rekey: bool = False) -> Freed:
        """Free every entry. What is held stays with its holders.

        Args:
            rekey: make every key anew: nothing from before can be read with what is there
                afterwards. A lookup in progress ends well; a store in progress is refused at its
                commit (CacheFullError).

        Raises:
            CacheFullError: there is no memory for new keys; every entry was freed, and nothing is
                stored until a later rekey succeeds.
            CacheUnavailableError: rekey on a closed store.
        """

    def sweep(self) -> None:
        """Free what has expired and what nobody holds any more.

        Raises:
            CacheUnavailableError: of some handouts the system did not tell whether they are held;
                they stay, and everything else is done.
        """

    def entries(self) -> list[EntryInfo]:
        """Return every entry, most recently used first."""

    def status(self) -> StoreStatus:
        """Return how full the store is and what happened so far."""

    def close(self) -> None:
        """Erase every key and give all memory back."""


class ResidentStore(Store, Protocol):
    """A store that a daemon keeps: what it needs to look after it."""

    @property
    def max_entry_bytes(self) -> int:
        """The largest blob there can be, in bytes of plaintext."""

    def lookup_now(self, deltaspace: Deltaspace, sha256: Sha256) -> Handout | None:
        """Return a handout if that takes no waiting and one chunk's decryption at most, else None.

        Raises:
            CacheError: as `lookup`.
        """

    def set_limit(self, max_bytes: int) -> Freed:
        """Put another limit in force, at most the budget; what is idle leaves until it fits."""

    def seconds_to_next_expiry(self) -> float | None:
        """Return how long until the oldest entry expires, or None where there is none."""

    @property
    def handouts_outstanding(self) -> int:
        """How many plaintexts were held at the last sweep."""
