"""A failed check hands out nothing, drops the entry, is counted, and leaves nothing behind."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from dgcache_core.aead import BODY_OFFSET, CHUNK_BYTES, HEADER_BYTES
from dgcache_core.errors import CacheCorruptionError, CacheError, CacheMissError, MissReason
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Sha256

from .conftest import MIB
from .support import NIGHTLY, RELEASES, content, get, held, open_descriptors, put, read_all

SIZES = [0, 1, 100, CHUNK_BYTES, 3 * CHUNK_BYTES + 5, 9 * MIB]
PLACES = {
    "magic": 0,
    "version": 5,
    "digest": HEADER_BYTES - 1,
    "seal": HEADER_BYTES,
    "first chunk": BODY_OFFSET,
    "last byte": -1,
}


def spoil(store: MemoryStore, digest: Sha256, position: int) -> None:
    """Flip a bit of an entry's blob in memory."""
    blob = store._entries[digest].blob
    blob[position % len(blob)] ^= 0x40


def assert_dropped(store: MemoryStore, digest: Sha256) -> None:
    """Assert that nothing of the entry is left, and that the store says why."""
    status = store.status()
    assert (status.entries, status.blob_bytes, status.bindings) == (0, 0, 0)
    assert (status.handouts, status.handout_bytes, status.reserved_bytes) == (0, 0, 0)
    assert (status.counters.corruptions, status.counters.hits) == (1, 0)
    assert len(store._keys._free) == 64
    assert not any(store._keys._view)
    assert store.miss_reason(RELEASES, digest) is MissReason.DROPPED_CORRUPT


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", PLACES)
def test_a_changed_blob_is_dropped_and_nothing_is_handed_out(
    store: MemoryStore, place: str, size: int
) -> None:
    """Wherever the change is, also only in the last chunk, with one thread or with two."""
    data = content(size)
    digest = put(store, data)
    spoil(store, digest, PLACES[place])
    before = open_descriptors()
    with pytest.raises(CacheCorruptionError):
        store.lookup(RELEASES, digest)
    assert open_descriptors() == before
    assert_dropped(store, digest)


@pytest.mark.parametrize("chunk", range(9))
def test_any_spoiled_chunk_is_found_by_either_thread(store: MemoryStore, chunk: int) -> None:
    """Two threads share the chunks: whichever meets the bad one, the lookup fails."""
    digest = put(store, content(9 * MIB))
    spoil(store, digest, BODY_OFFSET + chunk * (CHUNK_BYTES + 16) + 777)
    with pytest.raises(CacheCorruptionError):
        store.lookup(RELEASES, digest)
    assert_dropped(store, digest)


def test_chunks_spoiled_for_both_threads_are_one_corruption(store: MemoryStore) -> None:
    """Both threads fail; one error comes out."""
    digest = put(store, content(9 * MIB))
    for chunk in range(9):
        spoil(store, digest, BODY_OFFSET + chunk * (CHUNK_BYTES + 16))
    with pytest.raises(CacheCorruptionError):
        store.lookup(RELEASES, digest)
    assert_dropped(store, digest)


def test_an_error_that_is_kept_keeps_nothing_from_working(store: MemoryStore) -> None:
    """Its traceback may hold on to buffers: the blob is unmapped, and clear() goes on."""
    digest = put(store, content(9 * MIB))
    blob = store._entries[digest].blob
    spoil(store, digest, -1)
    with pytest.raises(CacheCorruptionError) as kept:
        store.lookup(RELEASES, digest)
    assert blob.closed
    store.clear()
    assert kept.value
    assert get(store, put(store, content(10))) == content(10)


def test_two_whole_blobs_swapped_are_refused(store: MemoryStore) -> None:
    """A blob that is authentic in itself is not the one this entry vouches for."""
    one, two = put(store, content(100)), put(store, content(100, 1))
    entries = store._entries
    entries[one].blob, entries[two].blob = entries[two].blob, entries[one].blob
    entries[one].key, entries[two].key = entries[two].key, entries[one].key
    for digest in (one, two):
        with pytest.raises(CacheCorruptionError):
            store.lookup(RELEASES, digest)
    assert store.status().counters.corruptions == 2


def test_a_zeroed_key_opens_nothing(store: MemoryStore) -> None:
    """What a forked child finds where the keys were does not decrypt anything."""
    digest = put(store, content(100))
    store._entries[digest].key.view[:] = bytes(32)
    with pytest.raises(CacheCorruptionError):
        store.lookup(RELEASES, digest)
    assert_dropped(store, digest)


def test_simultaneous_lookups_of_a_corrupt_blob_are_one_corruption(store: MemoryStore) -> None:
    """Eight threads: one finds it out, the others miss; nobody gets a byte."""
    digest = put(store, content(9 * MIB))
    spoil(store, digest, -1)
    together = Barrier(8)

    def look_up(_: int) -> CacheError | int:
        together.wait()
        try:
            return store.lookup(RELEASES, digest).fd
        except CacheError as error:
            return error

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(look_up, range(8)))
    kinds = sorted(type(answer).__name__ for answer in answers)
    assert kinds == ["CacheCorruptionError"] + ["CacheMissError"] * 7
    reasons = {answer.reason for answer in answers if isinstance(answer, CacheMissError)}
    assert reasons == {MissReason.DROPPED_CORRUPT}
    assert_dropped(store, digest)


def test_a_corrupt_entry_leaves_the_others_alone(store: MemoryStore) -> None:
    """Other entries, other deltaspaces and what is held go on."""
    bad, good = put(store, content(100)), put(store, content(100, 1), NIGHTLY)
    with held(store.lookup(NIGHTLY, good)) as handout:
        spoil(store, bad, -1)
        with pytest.raises(CacheCorruptionError):
            store.lookup(RELEASES, bad)
        assert read_all(handout) == content(100, 1)
    assert get(store, good, NIGHTLY) == content(100, 1)


def test_after_a_corruption_the_same_reference_can_be_stored_again(store: MemoryStore) -> None:
    """Fetch again, store again, hit again."""
    data = content(3 * MIB)
    digest = put(store, data)
    spoil(store, digest, 5000)
    with pytest.raises(CacheCorruptionError):
        store.lookup(RELEASES, digest)
    assert put(store, data) == digest
    assert get(store, digest) == data


def test_a_held_handout_is_checked_already(store: MemoryStore) -> None:
    """What was validated and sealed is shared, whatever becomes of the blob meanwhile; when
    nobody holds it any more, the change is found."""
    data = content(100)
    digest = put(store, data)
    with held(store.lookup(RELEASES, digest)) as handout:
        spoil(store, digest, -1)
        assert get(store, digest) == read_all(handout) == data
    store.sweep()
    with pytest.raises(CacheCorruptionError):
        store.lookup(RELEASES, digest)
