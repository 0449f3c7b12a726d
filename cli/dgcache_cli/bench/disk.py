"""The disk tier as a contender: memory over disk, with memory emptied before each read.

A write is a store and its way to disk; a read brings the reference back into memory and hands it
out. The files are as a daemon writes them, under a key that ends with the process.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from dgcache.reference import Reference
from dgcache_cli.bench.port import BUCKET, PREFIX
from dgcache_core.disk_names import tier_directory
from dgcache_core.disk_store import DiskStore
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Deltaspace, Sha256
from dgcache_core.settings import MEBIBYTE
from dgcache_core.tiered_store import TieredStore, spill_to

_DAY_SECONDS = 86_400.0
_DELTASPACE = Deltaspace(BUCKET, PREFIX)


class DiskContender:
    """A contender on a `TieredStore`."""

    shares = True

    def __init__(self, store: TieredStore, budget_bytes: int) -> None:
        """Use a store, which stays the caller's to close."""
        self._store = store
        self._budget_bytes = budget_bytes

    def write(self, source: Path) -> None:
        """See `Contender`."""
        size = source.stat().st_size
        with (
            source.open("rb", buffering=0) as file,
            self._store.begin(size, _DELTASPACE) as ingest,
        ):
            ingest.fill(file.readinto)
            ingest.commit()
        self.settle()

    @contextmanager
    def read(self, sha256: str) -> Iterator[Path]:
        """See `Contender`."""
        handout = self._store.lookup(_DELTASPACE, Sha256(sha256))
        with Reference(handout, source="disk", on_close=self._store.sweep) as reference:
            yield reference.path

    def evict(self) -> None:
        """See `Contender`."""
        self._store.evict(_DELTASPACE)

    def clear(self) -> None:
        """See `Contender`."""
        self._store.clear()

    def settle(self) -> None:
        """See `Contender`: what is in memory goes to disk, and memory has room again."""
        self._store.sweep()
        self._store.set_limit(0)
        self._store.set_limit(self._budget_bytes)


@contextmanager
def opened_on_disk(place: Path, size_mb: int) -> Iterator[DiskContender]:
    """Open a memory tier over a disk tier below `place`, each with this budget."""
    budget_bytes = size_mb * MEBIBYTE
    disk = DiskStore(tier_directory(place), budget_bytes, key=None)
    memory = MemoryStore(budget_bytes, _DAY_SECONDS, may_fork=True, spill=spill_to(disk))
    with closing(TieredStore(memory, disk, flush_seconds=0)) as store:
        yield DiskContender(store, budget_bytes)
