"""Measures the store itself, in one process: what encryption costs, without sockets.

`python -m benchmarks.bench_store OUT --rounds N` runs in whichever environment shall be measured
and writes its figures to OUT. Every lookup and every store is followed, or preceded, by what it is
held against, over the same bytes.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.bench_figures import MEGABYTE, Figure, Group, milliseconds, of, ratios, save
from dgcache_core.disk_names import tier_directory
from dgcache_core.disk_store import DiskStore
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Deltaspace, Sha256
from dgcache_core.sealed_files import create_memory_file, write_at
from dgcache_core.store import ResidentStore
from dgcache_core.tiered_store import TieredStore, spill_to

SIZES_MB = (1, 10, 100, 500)
SAMPLES_A_ROUND = {1: 20, 10: 8, 100: 3, 500: 1}
PIECE_BYTES = 1 << 20

_DELTASPACE = Deltaspace("bench", "store")
_BUDGET_BYTES = 2048 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the figures."""
    arguments = parse(argv, "Measure the store in this process.")
    sizes, rounds = arguments.sizes, arguments.rounds
    data = memoryview(os.urandom(max(sizes) * MEGABYTE))
    groups = [lookups(data, sizes, rounds), stores(data, rounds), disk_hits(data, sizes, rounds)]
    save(arguments.out, groups)
    return 0


def lookups(data: memoryview, sizes: Sequence[int], rounds: int) -> Group:
    """Measure `MemoryStore.lookup` against the floor."""
    figures = []
    for size in sizes:
        with _store() as store:
            view = data[: size * MEGABYTE]
            sha256 = _put(store, view)
            looked_up, floor = [], []
            for _ in range(rounds * SAMPLES_A_ROUND[size]):
                floor.append(write_memory_file(view))
                looked_up.append(_lookup(store, sha256))
            figures += against_floor(f"{size} MB", looked_up, floor)
    return Group(
        "lookup of what nobody holds, in the store",
        f"`MemoryStore.lookup` in one process, against {FLOOR}",
        figures,
    )


def stores(data: memoryview, rounds: int) -> Group:
    """Measure an ingest from memory against hashing alone."""
    view = data[: 100 * MEGABYTE]
    stored, hashed = [], []
    with _store() as store:
        for _ in range(rounds):
            hashed.append(milliseconds(lambda: hashlib.sha256(view)))
            stored.append(milliseconds(lambda: _put(store, view)))
            store.evict(_DELTASPACE)
    return Group(
        "store of 100 MB, in the store",
        "`MemoryStore.begin`, `fill`, `commit` from memory, against `hashlib.sha256` over the same "
        "bytes in the same round",
        [
            of("SHA-256 of 100 MB alone", hashed, "ms"),
            of("100 MB hashed, encrypted and kept", stored, "ms"),
            of("against SHA-256 alone", ratios(stored, hashed), "x"),
        ],
    )


def disk_hits(data: memoryview, sizes: Sequence[int], rounds: int) -> Group:
    """Measure lookups that memory answers, and lookups that bring the reference back from disk."""
    figures = []
    for size in [size for size in sizes if size < max(SIZES_MB)]:
        with _tiers() as store:
            sha256 = _put(store, data[: size * MEGABYTE])
            from_memory, from_disk = [], []
            for _ in range(rounds * SAMPLES_A_ROUND[size]):
                from_memory.append(_lookup(store, sha256))
                _empty_memory(store)
                from_disk.append(_lookup(store, sha256))
            figures += [
                of(f"{size} MB, memory hit", from_memory, "ms"),
                of(f"{size} MB, disk hit", from_disk, "ms"),
                of(
                    f"{size} MB, against the memory hit",
                    ratios(from_disk, from_memory),
                    "x",
                    at_most=2,
                ),
            ]
    return Group(
        "disk hit from the page cache, in the store",
        "`TieredStore.lookup` of what memory has and nobody holds, then of the same when memory "
        "was emptied: its file is read and checked, and the blob decrypted; ephemeral key",
        figures,
    )


FLOOR = (
    "the floor: the same bytes, ready as plaintext, written with pwrite(2) in pieces of 1 MiB into "
    "a fresh memfd by one thread, just before each lookup; the memory file of the measurement "
    "before was freed each time, so that both find the kernel's page allocator warm"
)


def write_memory_file(plaintext: memoryview) -> float:
    """Write plaintext into a fresh memory file; return the milliseconds. Freeing is not counted."""
    descriptor = -1

    def write() -> None:
        nonlocal descriptor
        descriptor = create_memory_file()
        for offset in range(0, len(plaintext), PIECE_BYTES):
            write_at(descriptor, plaintext[offset : offset + PIECE_BYTES], offset)

    try:
        return milliseconds(write)
    finally:
        os.close(descriptor)


def against_floor(
    name: str, looked_up: Sequence[float], floor: Sequence[float], **target: float
) -> list[Figure]:
    """Return the lookup, the floor, and their ratio pair by pair."""
    return [
        of(f"{name}, lookup", looked_up, "ms"),
        of(f"{name}, floor", floor, "ms"),
        of(f"{name}, against the floor", ratios(looked_up, floor), "x", **target),
    ]


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Read the command line of a measuring program."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--largest", type=int, default=max(SIZES_MB), help="of the sizes, in MB")
    parser.add_argument("--stock", type=Path, help="a Python that has DeltaGlider 6.2.0")
    parser.add_argument("--place", type=Path, help="a private directory for files")
    parser.add_argument("--busy-only", action="store_true", help="of many clients, the 8 busy ones")
    arguments = parser.parse_args(argv)
    arguments.sizes = [size for size in SIZES_MB if size <= arguments.largest]
    return arguments


@contextmanager
def _store() -> Iterator[MemoryStore]:
    store = MemoryStore(_BUDGET_BYTES, 3600, may_fork=False, max_entries=16)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _tiers() -> Iterator[TieredStore]:
    with TemporaryDirectory(prefix="dg-cached-bench-") as place:
        disk = DiskStore(tier_directory(Path(place).resolve()), _BUDGET_BYTES, key=None)
        memory = MemoryStore(
            _BUDGET_BYTES, 3600, may_fork=False, max_entries=16, spill=spill_to(disk)
        )
        with closing(TieredStore(memory, disk, flush_seconds=0)) as store:
            yield store


def _empty_memory(store: TieredStore) -> None:
    store.set_limit(0)
    store.set_limit(_BUDGET_BYTES)
    if store.entries()[0].tier != "disk":
        raise RuntimeError("the reference is still in memory: this lookup would not ask the disk")


def _put(store: ResidentStore, data: memoryview) -> Sha256:
    at = 0

    def read(into: memoryview) -> int:
        nonlocal at
        piece = data[at : at + len(into)]
        into[: len(piece)] = piece
        at += len(piece)
        return len(piece)

    with store.begin(len(data), _DELTASPACE) as ingest:
        ingest.fill(read)
        return ingest.commit()


def _lookup(store: ResidentStore, sha256: Sha256) -> float:
    """Return the milliseconds of one lookup that decrypts."""
    held: list[int] = []
    before = store.status().counters
    took = milliseconds(lambda: held.append(store.lookup(_DELTASPACE, sha256).fd))
    os.close(held[0])
    after = store.status().counters  # this also frees the plaintext, which nobody holds now
    if (after.hits - before.hits, after.shared_hits - before.shared_hits) != (1, 0):
        raise RuntimeError("the plaintext was still held: this lookup decrypted nothing")
    return took


if __name__ == "__main__":
    sys.exit(main())
