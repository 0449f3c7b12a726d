"""What the tests of the disk tier share: a tier to open again and again, hand clocks."""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgcache_core.aead import Frame
from dgcache_core.disk_records import DiskEvent, DiskEventKind, LoadedBlob, StoredBlob
from dgcache_core.disk_store import DiskStore
from dgcache_core.keyslab import KeySlab
from dgcache_core.memory import anonymous_memory
from dgcache_core.references import Deltaspace, Sha256

from .sealing import opened, sealed
from .support import RELEASES, HandClock, content, digest_of

TIER_KEY = bytes(range(201, 233))
OTHER_TIER_KEY = bytes(range(1, 33))
MIB = 1 << 20
DAY = 86_400
YEAR = 365 * DAY
NOW = 1_800_000_000.0


@dataclass
class Tier:
    """A directory, two clocks, and the stores that were opened on it."""

    path: Path
    clock: HandClock = field(default_factory=HandClock)
    wall: HandClock = field(default_factory=HandClock)
    events: list[DiskEvent] = field(default_factory=list)
    made: list[Path] = field(default_factory=list)
    slab: KeySlab = field(default_factory=lambda: KeySlab(64, may_fork=True))
    stores: list[DiskStore] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wall.now = NOW

    def open(
        self, key: bytes | None = TIER_KEY, max_bytes: int = 32 * MIB, **options: Any
    ) -> DiskStore:
        """Close the store before, if any, and open the directory once more."""
        self.close()
        self.stores.append(
            DiskStore(
                self.path,
                max_bytes,
                key=key,
                clock=self.clock,
                wall_clock=self.wall,
                on_event=self.events.append,
                on_directory=self.made.append,
                **options,
            )
        )
        return self.stores[-1]

    def close(self) -> None:
        """Close every store; a second call does nothing."""
        for store in self.stores:
            store.close()

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks."""
        self.clock.advance(seconds)
        self.wall.advance(seconds)

    def blob(
        self, data: bytes, deltaspaces: Iterable[Deltaspace] = (RELEASES,), ttl: int = DAY
    ) -> StoredBlob:
        """Seal some bytes as memory does."""
        now = int(self.wall.now)
        frame = Frame(len(data), now, now + ttl)
        key = os.urandom(32)
        view = memoryview(sealed(data, key, frame))
        return StoredBlob(frame, digest_of(data), view, memoryview(key), list(deltaspaces))

    def keep(
        self, store: DiskStore, data: bytes, deltaspaces: Iterable[Deltaspace] = (RELEASES,)
    ) -> Sha256:
        """Write some bytes, which must succeed, and return their digest."""
        assert store.keep(self.blob(data, deltaspaces)), self.events
        return digest_of(data)

    def load(self, store: DiskStore, sha256: Sha256) -> bytes | None:
        """Load, check and decrypt a blob; None is a miss."""
        loaded = store.load(sha256, anonymous_memory, self.slab)
        return None if loaded is None else plaintext(loaded)

    def files(self) -> list[Path]:
        """Return the files of entries."""
        return sorted(path for path in self.path.glob("??/??/*") if path.is_file())

    def only_file(self) -> Path:
        """Return the one file there is, when what is done to it now has another time."""
        (path,) = self.files()
        self.tick()
        return path

    def tick(self) -> None:
        """Wait until the clock of the file system has moved on.

        Before Linux 6.13 it does so every 1 to 10 ms; two changes in one tick have the same time.
        """
        probe = self.path.parent / "tick"
        probe.touch()
        begun, deadline = probe.stat().st_ctime_ns, time.monotonic() + 1
        while probe.stat().st_ctime_ns == begun:
            assert time.monotonic() < deadline
            probe.touch()
        probe.unlink()

    def take_events(self) -> list[DiskEventKind]:
        """Return the kinds of the events since the last call."""
        kinds = [event.kind for event in self.events]
        self.events.clear()
        return kinds


def plaintext(loaded: LoadedBlob) -> bytes:
    """Decrypt a loaded blob, whose every chunk must pass, and give it back."""
    try:
        frame, sha256, plain = opened(bytes(loaded.blob), bytes(loaded.key.view))
        assert (frame, sha256) == (loaded.frame, loaded.sha256)
        return plain
    finally:
        loaded.key.erase()
        loaded.blob.close()


def rewrite(path: Path, data: bytes) -> None:
    """Change a file in place, as somebody else would."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def make_it_look_untouched(path: Path, before: os.stat_result) -> None:
    """Give a file the times it had, as far as anybody can."""
    with suppress(FileNotFoundError):
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def some(count: int, size: int = 5000) -> list[bytes]:
    """Return different contents of one size."""
    return [content(size, seed) for seed in range(count)]
