"""The encrypted LRU: what it keeps, what leaves first, and that nothing unchecked gets out."""

import hashlib
import os
import random
import threading
from collections.abc import Iterator

import pytest

from dgcache_core.aead import CHUNK_BYTES
from dgcache_core.errors import (
    CacheCorruptionError,
    CacheFullError,
    CacheMissError,
    InvalidReferenceError,
    MissReason,
)
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Deltaspace, Sha256

MIB = 1 << 20
SPACE = Deltaspace("bucket", "prefix")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Iterator[MemoryStore]:
    made = MemoryStore(64 * MIB, 100, may_fork=False, max_entries=64, clock=clock)
    yield made
    made.close()


def put(store: MemoryStore, data: bytes, space: Deltaspace = SPACE) -> Sha256:
    view = memoryview(data)
    at = 0

    def read(into: memoryview) -> int:
        nonlocal at
        piece = view[at : at + len(into)]
        into[: len(piece)] = piece
        at += len(piece)
        return len(piece)

    with store.begin(len(data), space) as ingest:
        ingest.fill(read)
        return ingest.commit()


def get(store: MemoryStore, sha256: Sha256, space: Deltaspace = SPACE) -> bytes:
    handout = store.lookup(space, sha256)
    try:
        return os.pread(handout.fd, handout.size + 1, 0)
    finally:
        os.close(handout.fd)


def used(store: MemoryStore) -> int:
    status = store.status()
    return status.blob_bytes + status.handout_bytes + status.reserved_bytes


def some_bytes(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def reason(store: MemoryStore, sha256: Sha256) -> MissReason:
    with pytest.raises(CacheMissError) as miss:
        store.lookup(SPACE, sha256)
    return miss.value.reason


def test_what_was_handed_out_longest_ago_leaves_first(store: MemoryStore, clock: Clock) -> None:
    """Being stored counts once, being handed out counts anew."""
    digests = []
    for seed in range(4):
        clock.now += 1
        digests.append(put(store, some_bytes(13 * MIB, seed)))
    get(store, digests[0])
    put(store, some_bytes(13 * MIB, 9))
    assert reason(store, digests[1]) is MissReason.EVICTED
    assert store.miss_reason(SPACE, digests[0]) is None


def test_the_budget_holds_at_every_moment(store: MemoryStore) -> None:
    """Stores and lookups of eight threads, watched by a ninth."""
    over: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if used(store) > 64 * MIB:
                over.append(used(store))

    def work(seed: int) -> None:
        for round_ in range(6):
            data = some_bytes(3 * MIB + seed, seed * 10 + round_)
            try:
                digest = put(store, data)
                assert get(store, digest) == data
            except (CacheFullError, CacheMissError):
                pass  # the others took the room; nothing is wrong with that

    watcher = threading.Thread(target=watch)
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in (watcher, *workers):
        thread.start()
    for thread in workers:
        thread.join(60)
    done.set()
    watcher.join(60)
    assert over == []
    assert store.status().reserved_bytes == 0


def test_a_reference_too_large_is_refused_before_anything_is_evicted(store: MemoryStore) -> None:
    """And the miss that follows says why."""
    kept = put(store, b"kept")
    too_large = Sha256(hashlib.sha256(b"too large").hexdigest())
    with pytest.raises(CacheFullError, match="one reference may have"):
        store.begin(store.max_entry_bytes + 1, SPACE, expected=too_large)
    assert store.miss_reason(SPACE, kept) is None
    assert reason(store, too_large) is MissReason.TOO_LARGE
    store.begin(store.max_entry_bytes, SPACE).abort()


def test_entries_expire(store: MemoryStore, clock: Clock) -> None:
    """By the clock of the store; what is held stays with its holder."""
    digest = put(store, b"bytes")
    handout = store.lookup(SPACE, digest)
    clock.now += 99
    assert store.miss_reason(SPACE, digest) is None
    clock.now += 1
    assert reason(store, digest) is MissReason.EXPIRED
    assert os.pread(handout.fd, 10, 0) == b"bytes"
    os.close(handout.fd)
    assert used(store) == 0


@pytest.mark.parametrize("length", [1, CHUNK_BYTES + 1, 9 * CHUNK_BYTES])
def test_a_flipped_bit_hands_out_nothing_and_drops_the_entry(
    store: MemoryStore, length: int
) -> None:
    """In the header, the seal, the first and the last chunk; also when two threads decrypt."""
    data = some_bytes(length)
    size = store.begin(length, SPACE)
    sealed = size.frame.sealed_bytes
    size.abort()
    for number, at in enumerate((0, 40, 80, 90, sealed - 20, sealed - 1), start=1):
        digest = put(store, data)
        store._entries[digest].blob[at] ^= 1
        with pytest.raises(CacheCorruptionError):
            store.lookup(SPACE, digest)
        assert reason(store, digest) is MissReason.DROPPED_CORRUPT
        assert store.status().counters.corruptions == number
        assert used(store) == 0
    assert get(store, put(store, data)) == data


def test_the_same_digest_stored_again_has_a_new_key(store: MemoryStore) -> None:
    """And its deltaspaces keep it."""
    other = Deltaspace("bucket", "other")
    digest = put(store, b"bytes")
    before = bytes(store._entries[digest].blob)
    put(store, b"bytes", other)
    assert bytes(store._entries[digest].blob) != before
    assert store.entries()[0].deltaspaces == [other, SPACE]


def test_many_lookups_at_once_decrypt_once(store: MemoryStore) -> None:
    """The others wait for the first and share what came of it."""
    data = some_bytes(12 * MIB)
    digest = put(store, data)
    barrier = threading.Barrier(16)
    handouts = []

    def look() -> None:
        barrier.wait(30)
        handouts.append(store.lookup(SPACE, digest))

    threads = [threading.Thread(target=look) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    counters = store.status().counters
    for handout in handouts:
        assert os.pread(handout.fd, handout.size, 0) == data
        os.close(handout.fd)
    assert (counters.hits, counters.shared_hits) == (16, 15)


@pytest.mark.parametrize(
    ("announced", "given"), [(3, b"four"), (5, b"four"), (0, b"x"), (2 * MIB, b"y" * MIB)]
)
def test_a_wrong_length_keeps_nothing(store: MemoryStore, announced: int, given: bytes) -> None:
    """Longer or shorter: the reservation and the key are free again."""
    left = memoryview(given)

    def read(into: memoryview) -> int:
        nonlocal left
        piece, left = left[: len(into)], left[len(into) :]
        into[: len(piece)] = piece
        return len(piece)

    with pytest.raises(InvalidReferenceError), store.begin(announced, SPACE) as ingest:
        ingest.fill(read)
    assert used(store) == 0
    assert store.entries() == []


def test_when_every_key_is_taken_the_oldest_entry_leaves(store: MemoryStore) -> None:
    """64 keys, 65 references."""
    digests = [put(store, bytes((seed,))) for seed in range(65)]
    assert reason(store, digests[0]) is MissReason.EVICTED
    assert get(store, digests[64]) == bytes((64,))


def test_clear_frees_everything_but_what_is_held(store: MemoryStore) -> None:
    """The holder's bytes still count until it lets go."""
    digest = put(store, some_bytes(MIB))
    handout = store.lookup(SPACE, digest)
    assert store.clear().entries == 1
    assert used(store) == MIB
    os.close(handout.fd)
    assert used(store) == 0
