"""What the tests of both tiers together share: memory over disk on hand clocks, opened again."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dgcache_core.disk_records import StoredBlob
from dgcache_core.disk_store import DiskStore
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Sha256
from dgcache_core.tiered_store import TieredStore, spill_to

from .tier import DAY, MIB, TIER_KEY, Tier

Spill = Callable[[StoredBlob], None]


@dataclass
class Tiers:
    """A tier's directory and the stores over it that were opened, one after the other."""

    tier: Tier
    opened: list[tuple[MemoryStore, TieredStore]] = field(default_factory=list)

    def open(
        self,
        memory_bytes: int = MIB,
        disk_bytes: int = 32 * MIB,
        *,
        key: bytes | None = TIER_KEY,
        ttl_seconds: float = DAY,
        max_entries: int = 64,
        flush_seconds: float = 60.0,
        around: Callable[[Spill], Spill] = lambda spill: spill,
        **options: Any,
    ) -> TieredStore:
        """Close what was open and open it once more; `around` changes how memory spills."""
        self.close()
        disk = self.tier.open(key, disk_bytes, **options)
        memory = MemoryStore(
            memory_bytes,
            ttl_seconds,
            may_fork=True,
            max_entries=max_entries,
            clock=self.tier.clock,
            wall_clock=self.tier.wall,
            spill=around(spill_to(disk)),
        )
        self.opened.append((memory, TieredStore(memory, disk, flush_seconds=flush_seconds)))
        return self.opened[-1][1]

    @property
    def memory(self) -> MemoryStore:
        """The upper tier."""
        return self.opened[-1][0]

    @property
    def disk(self) -> DiskStore:
        """The lower tier."""
        return self.tier.stores[-1]

    def close(self) -> None:
        """Close every store; a second call does nothing."""
        for _, store in self.opened:
            store.close()

    def in_memory(self) -> list[Sha256]:
        """Return what memory has, least recently used first."""
        return [entry.sha256 for entry in reversed(self.memory.entries())]

    def on_disk(self) -> list[Sha256]:
        """Return what the disk has, next to leave first."""
        return [entry.sha256 for entry in reversed(self.disk.entries())]


class Gate:
    """Holds spills back: each says that it has begun, and waits until it may go on."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.open = threading.Event()
        self.count = 0

    def __call__(self, spill: Spill) -> Spill:
        """Put the gate before a spill."""

        def gated(stored: StoredBlob) -> None:
            self.count += 1
            self.begun.release()
            assert self.open.wait(20)
            spill(stored)

        return gated

    def await_one(self) -> None:
        """Wait until one more spill has begun."""
        assert self.begun.acquire(timeout=20)


class CheckedLock:
    """A lock that looks at what it covers before it is given away."""

    def __init__(self, is_well: Callable[[], bool]) -> None:
        self._lock = threading.Lock()
        self._is_well = is_well
        self.releases = 0
        self.failures = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """See `threading.Lock`."""
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        """Look, and release."""
        self.releases += 1
        self.failures += not self._is_well()
        self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def budgets_checked(tiers: Tiers) -> tuple[CheckedLock, CheckedLock]:
    """Let both tiers be looked at whenever a lock of theirs is given away."""
    memory, table = tiers.memory, tiers.disk._table
    above = CheckedLock(lambda: memory._used_bytes <= memory._limit_bytes)
    below = CheckedLock(
        lambda: table.index.bytes + table.index.reserved_bytes <= table.index.max_bytes
    )
    memory._lock = above  # type: ignore[assignment]
    memory._opened = threading.Condition(above)  # type: ignore[arg-type]
    table.lock = below  # type: ignore[assignment]
    return above, below
