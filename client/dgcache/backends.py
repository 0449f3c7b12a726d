"""What the cache can stand on: one interface for the daemon and for the in-process stores."""

from typing import Any, Protocol

from dgcache.sources import Source
from dgcache_core.errors import MissReason
from dgcache_core.handouts import Handout
from dgcache_core.references import Deltaspace, Sha256
from dgcache_core.store import EntryInfo, Freed


class Backend(Protocol):
    """Thread-safe. Raises only `dgcache_core.errors`."""

    name: str
    max_entry_bytes: int

    def get(self, deltaspace: Deltaspace, sha256: Sha256) -> Handout:
        """Return a handout; its descriptor is the caller's."""

    def put(self, deltaspace: Deltaspace, source: Source, expected: Sha256 | None) -> Sha256:
        """Store the source from its start and return its digest."""

    def miss_reason(self, deltaspace: Deltaspace, sha256: Sha256) -> MissReason | None:
        """Return why a get would miss, None where it would hit."""

    def evict(self, deltaspace: Deltaspace) -> Freed:
        """Unbind a deltaspace."""

    def clear(self, *, rekey: bool = False) -> Freed:
        """Free every entry, and with `rekey` make every key anew."""

    def entries(self) -> list[EntryInfo]:
        """Return every entry, most recently used first."""

    def status(self) -> dict[str, Any]:
        """Return figures, ready for JSON."""

    def sweep(self) -> None:
        """A reference was closed: give back what nobody holds."""

    def close(self) -> None:
        """Give everything back."""
