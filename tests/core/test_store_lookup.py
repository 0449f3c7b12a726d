"""A lookup hands out exactly the bytes of the digest, sealed, or says why not."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from dgcache_core.aead import CHUNK_BYTES
from dgcache_core.errors import CacheMissError, MissReason
from dgcache_core.memory_store import MemoryStore
from dgcache_core.opening import _TWO_THREADS_FROM_BYTES
from dgcache_core.references import Sha256
from dgcache_core.sealed_files import require_sealed

from .conftest import MIB
from .support import NIGHTLY, RELEASES, HandClock, content, digest_of, get, held, put, read_all

DATA = content(10_000)
OTHER = content(10_000, seed=1)


@pytest.mark.parametrize(
    "size",
    [
        0,
        1,
        4096,
        CHUNK_BYTES - 1,
        CHUNK_BYTES,
        CHUNK_BYTES + 1,
        3 * CHUNK_BYTES + 7,
        _TWO_THREADS_FROM_BYTES - 1,
        _TWO_THREADS_FROM_BYTES,
        _TWO_THREADS_FROM_BYTES + CHUNK_BYTES + 1,
    ],
)
def test_what_was_stored_is_handed_out(store: MemoryStore, size: int) -> None:
    """At every boundary of chunks and of the second thread, and sealed each time."""
    data = content(size)
    digest = put(store, data)
    assert digest == digest_of(data)
    with held(store.lookup(RELEASES, digest)) as handout:
        assert (handout.size, handout.sha256) == (size, digest)
        require_sealed(handout.fd, size)
        assert read_all(handout) == data


def test_plaintext_stands_nowhere_in_a_store_that_hands_out_nothing(store: MemoryStore) -> None:
    """Neither in the blob nor in what is kept for reuse."""
    data = content(2 * CHUNK_BYTES)
    digest = put(store, data)
    assert get(store, digest) == data
    for piece in (data[:32], data[CHUNK_BYTES : CHUNK_BYTES + 32], data[-32:]):
        assert store._entries[digest].blob.find(piece) == -1
    assert all(not any(buffer[:]) for buffer in store._scratch._idle)


def test_a_held_handout_is_shared(store: MemoryStore) -> None:
    """The second client gets the same file, and nothing is decrypted for it."""
    digest = put(store, DATA)
    with held(store.lookup(RELEASES, digest)) as one, held(store.lookup(RELEASES, digest)) as two:
        assert os.fstat(one.fd).st_ino == os.fstat(two.fd).st_ino
        counters = store.status().counters
        assert (counters.hits, counters.shared_hits) == (2, 1)
    store.sweep()
    with held(store.lookup(RELEASES, digest)):
        assert store.status().counters.shared_hits == 1, "nobody held it any more"


def test_many_simultaneous_lookups_decrypt_once(store: MemoryStore) -> None:
    """Sixteen threads ask for the same blob at the same moment: one decrypts, fifteen share."""
    data = content(9 * MIB)
    digest = put(store, data)
    together = Barrier(16)

    def look_up(_: int) -> int:
        together.wait()
        return store.lookup(RELEASES, digest).fd

    with ThreadPoolExecutor(16) as threads:
        descriptors = list(threads.map(look_up, range(16)))
    counters = store.status().counters
    assert (counters.hits, counters.shared_hits) == (16, 15)
    assert len({os.fstat(fd).st_ino for fd in descriptors}) == 1
    assert store.status().handout_bytes == 9 * MIB
    for fd in descriptors:
        os.close(fd)


def test_a_lookup_is_answered_by_the_digest_whatever_the_deltaspace(store: MemoryStore) -> None:
    """The deltaspace that asked is bound to the blob from then on."""
    digest = put(store, DATA, RELEASES)
    assert get(store, digest, NIGHTLY) == DATA
    [entry] = store.entries()
    assert entry.deltaspaces == [NIGHTLY, RELEASES]


def test_a_lookup_now_decrypts_one_chunk_at_most(store: MemoryStore) -> None:
    """`lookup_now` gives what is held or small, None where it takes longer, and misses."""
    small = put(store, b"x" * CHUNK_BYTES)
    opened = store.lookup_now(RELEASES, small)
    assert opened is not None
    with held(opened):
        assert read_all(opened) == b"x" * CHUNK_BYTES
    data = content(CHUNK_BYTES + 1)
    digest = put(store, data)
    assert store.lookup_now(RELEASES, digest) is None
    with held(store.lookup(RELEASES, digest)):
        shared = store.lookup_now(NIGHTLY, digest)
        assert shared is not None
        with held(shared):
            assert read_all(shared) == data
    with pytest.raises(CacheMissError):
        store.lookup_now(RELEASES, digest_of(b"unknown"))
    assert store.status().counters.misses[MissReason.DIGEST_CHANGED] == 1


def test_a_lookup_now_evicts_nothing(make_store: Callable[..., MemoryStore]) -> None:
    """Making room may wait for a disk; where there is none, a worker has to do it."""
    store = make_store(3 * CHUNK_BYTES)
    digests = [put(store, content(900_000, seed)) for seed in range(3)]
    assert store.lookup_now(RELEASES, digests[2]) is None
    assert len(store.entries()) == 3
    with held(store.lookup(RELEASES, digests[2])):
        assert len(store.entries()) < 3


def test_entries_tell_what_people_ask(store: MemoryStore, clock: HandClock) -> None:
    """Age, what is left, idle time, hits, size, who stored it, and whether it is held."""
    with store.begin(4, RELEASES, stored_by="pid 7") as ingest:
        ingest.fill(iter_reader(b"data"))
        digest = ingest.commit()
    clock.advance(100)
    with held(store.lookup(RELEASES, digest)):
        clock.advance(10)
        [entry] = store.entries()
        assert (entry.age_seconds, entry.idle_seconds) == (110, 10)
        assert entry.expires_in_seconds == 86_400 - 110
        assert (entry.sha256, entry.size, entry.hits) == (digest, 4, 1)
        assert (entry.stored_by, entry.held) == ("pid 7", True)
    assert [entry.held for entry in store.entries()] == [False]


def iter_reader(data: bytes) -> Callable[[memoryview], int]:
    """Return a source that gives one byte at a time."""
    bytes_left = iter(data)

    def read(into: memoryview) -> int:
        for byte in bytes_left:
            into[0] = byte
            return 1
        return 0

    return read


def test_a_status_is_a_copy(store: MemoryStore) -> None:
    """What is told once does not change when the store does."""
    before = store.status()
    with pytest.raises(CacheMissError):
        store.lookup(RELEASES, digest_of(DATA))
    get(store, put(store, DATA))
    assert (before.entries, before.counters.hits, before.counters.stores) == (0, 0, 0)
    assert set(before.counters.misses.values()) == {0}


# -- why not -----------------------------------------------------------------------------------


def miss(store: MemoryStore, digest: Sha256) -> MissReason:
    """Return why a lookup misses; it is counted, and `miss_reason` says the same, uncounted."""
    foretold = store.miss_reason(RELEASES, digest)
    before = store.status().counters.misses
    with pytest.raises(CacheMissError, match=digest) as refusal:
        store.lookup(RELEASES, digest)
    reason = refusal.value.reason
    assert reason == foretold
    assert store.status().counters.misses == before | {reason: before[reason] + 1}
    return reason


def test_what_was_never_here_is_unknown(store: MemoryStore) -> None:
    """An empty store knows nothing."""
    assert miss(store, digest_of(DATA)) is MissReason.UNKNOWN


def test_another_digest_in_a_known_deltaspace_is_digest_changed(store: MemoryStore) -> None:
    """The deltaspace has a reference, and it is not the one asked for."""
    put(store, OTHER)
    assert miss(store, digest_of(DATA)) is MissReason.DIGEST_CHANGED


def test_what_expired_is_expired(store: MemoryStore, clock: HandClock) -> None:
    """After its time, and not a moment before."""
    digest = put(store, DATA)
    clock.advance(86_400 - 0.001)
    assert get(store, digest) == DATA
    clock.advance(0.001)
    assert miss(store, digest) is MissReason.EXPIRED


@pytest.mark.parametrize("how", ["evict", "clear", "lru"])
def test_what_was_evicted_is_evicted(make_store: Callable[..., MemoryStore], how: str) -> None:
    """By name, with all others, or because room was needed."""
    store = make_store(max_bytes=MIB)
    digest = put(store, DATA)
    if how == "evict":
        store.evict(RELEASES)
    elif how == "clear":
        store.clear()
    else:
        for seed in range(3):
            put(store, content(400_000, seed), NIGHTLY)
    assert miss(store, digest) is MissReason.EVICTED


def test_what_was_too_large_is_too_large(store: MemoryStore) -> None:
    """A declared digest that was refused for its size is remembered."""
    digest = digest_of(b"a large one")
    with pytest.raises(Exception, match="DG_CACHE_MEMORY_SIZE_MB"):
        store.begin(store.max_entry_bytes + 1, RELEASES, expected=digest)
    assert miss(store, digest) is MissReason.TOO_LARGE


def test_what_was_corrupt_is_dropped_corrupt(store: MemoryStore) -> None:
    """Until it is stored again."""
    digest = put(store, DATA)
    store._entries[digest].blob[200] ^= 1
    with pytest.raises(Exception, match="check"):
        store.lookup(RELEASES, digest)
    assert miss(store, digest) is MissReason.DROPPED_CORRUPT
    put(store, DATA)
    assert store.miss_reason(RELEASES, digest) is None


def test_the_memory_of_misses_is_bounded(store: MemoryStore) -> None:
    """The one remembered longest ago is forgotten first."""
    first, last = digest_of(b"0"), digest_of(b"4096")
    for n in range(4097):
        with pytest.raises(Exception, match="bytes"):
            store.begin(1 << 40, NIGHTLY, expected=digest_of(str(n).encode()))
    assert store.miss_reason(RELEASES, first) is MissReason.UNKNOWN
    assert store.miss_reason(RELEASES, last) is MissReason.TOO_LARGE
