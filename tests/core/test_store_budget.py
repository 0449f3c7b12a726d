"""The budget is never exceeded; what was handed out longest ago makes room."""

import mmap
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgcache_core.aead import Frame
from dgcache_core.errors import CacheFullError, CacheMissError, MissReason
from dgcache_core.memory import page_rounded
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Deltaspace, Sha256

from .conftest import MIB
from .support import DETERMINISTIC, NIGHTLY, RELEASES, content, digest_of, get, held, put, read_all

PAGE = mmap.PAGESIZE
SMALL = 3 * PAGE  # of plaintext: four pages sealed
SEALED = page_rounded(Frame(SMALL, 0, 0).sealed_bytes)

MakeStore = Callable[..., MemoryStore]


def used(store: MemoryStore) -> int:
    """Return what counts against the budget, and assert that it is within."""
    status = store.status()
    total = status.blob_bytes + status.handout_bytes + status.reserved_bytes
    assert total <= status.max_bytes
    return total


def fill(store: MemoryStore, count: int) -> list[Sha256]:
    """Store small blobs and return their digests, oldest first."""
    return [put(store, content(SMALL, seed), Deltaspace("b", str(seed))) for seed in range(count)]


def stored(store: MemoryStore) -> list[Sha256]:
    """Return the digests in the store, least recently used first."""
    return [entry.sha256 for entry in reversed(store.entries())]


def test_the_one_handed_out_longest_ago_leaves_first(make_store: MakeStore) -> None:
    """Storing counts as use, looking up does; asking whether it is there does not."""
    store = make_store(max_bytes=3 * SEALED + page_rounded(SMALL))
    a, b, c = fill(store, 3)
    get(store, a, Deltaspace("b", "0"))
    store.miss_reason(RELEASES, b)
    store.entries()
    assert stored(store) == [b, c, a]
    d = put(store, content(SMALL, 7))
    e = put(store, content(SMALL, 8))
    assert stored(store) == [a, d, e]
    assert store.status().counters.evictions == 2


def test_no_more_is_evicted_than_is_needed(make_store: MakeStore) -> None:
    """One small blob makes room for one small blob; with room for one nobody leaves."""
    store = make_store(max_bytes=5 * SEALED)
    digests = fill(store, 5)
    put(store, content(SMALL, 9))
    assert stored(store)[:-1] == digests[1:]
    store.evict(Deltaspace("b", "2"))
    put(store, content(SMALL, 10))
    assert store.status().counters.evictions == 1


def test_everything_counts_ciphertext_handouts_and_stores_in_progress(store: MemoryStore) -> None:
    """In whole pages, and each is given back when it ends."""
    digest = put(store, content(SMALL))
    assert used(store) == SEALED
    with held(store.lookup(RELEASES, digest)):
        assert used(store) == SEALED + SMALL
        with store.begin(SMALL, NIGHTLY):
            assert used(store) == 2 * SEALED + SMALL
        assert used(store) == SEALED + SMALL
    assert used(store) == SEALED
    store.clear()
    assert used(store) == 0


def test_room_is_reserved_before_it_is_filled(make_store: MakeStore) -> None:
    """Stores in progress that fill the budget leave no room for another, empty as they are."""
    store = make_store(max_bytes=3 * SEALED)
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(store.begin(SMALL, RELEASES))
        assert used(store) == 3 * SEALED
        with pytest.raises(CacheFullError, match="in use"):
            store.begin(SMALL, RELEASES)
        assert used(store) == 3 * SEALED
    assert used(store) == 0


def test_what_is_too_large_is_refused_before_anybody_leaves(make_store: MakeStore) -> None:
    """A blob over the budget evicts nobody, whatever its size."""
    store = make_store(max_bytes=4 * SEALED)
    digests = fill(store, 3)
    with pytest.raises(CacheFullError, match="DG_CACHE_MEMORY_SIZE_MB"):
        store.begin(store.max_entry_bytes + 1, RELEASES)
    with pytest.raises(CacheFullError):
        store.begin(1 << 50, RELEASES)
    assert stored(store) == digests
    assert store.status().counters.evictions == 0
    assert store.status().counters.refused_stores == 2


def test_what_would_not_fit_if_all_left_evicts_nobody(make_store: MakeStore) -> None:
    """Held and in progress are 11 of 16 pages: for 7 nobody leaves in vain."""
    store = make_store(max_bytes=4 * SEALED)
    digests = fill(store, 2)
    with (
        held(store.lookup(RELEASES, digests[1])),
        store.begin(SMALL, RELEASES),
        store.begin(SMALL, RELEASES),
    ):
        before, evictions = stored(store), store.status().counters.evictions
        with pytest.raises(CacheFullError, match="in use"):
            store.begin(2 * SMALL, RELEASES)
        assert (stored(store), store.status().counters.evictions) == (before, evictions)
        assert before


def test_what_is_held_is_not_room(make_store: MakeStore) -> None:
    """Plaintext that clients hold cannot be evicted: what does not fit beside it is refused,
    and fits when it is let go of."""
    store = make_store(max_bytes=2 * SEALED + SMALL - PAGE)
    a = put(store, content(SMALL))
    with held(store.lookup(RELEASES, a)):
        with (
            pytest.raises(CacheFullError),
            store.begin(SMALL, NIGHTLY),
            store.begin(SMALL, NIGHTLY),
        ):
            pass
        assert used(store) <= 2 * SEALED + SMALL - PAGE
    put(store, content(SMALL, 1), NIGHTLY)
    put(store, content(SMALL, 2), NIGHTLY)
    used(store)


def test_a_lookup_makes_room_for_its_plaintext_but_not_by_its_own_blob(
    make_store: MakeStore,
) -> None:
    """The others leave, the one that is being read stays."""
    store = make_store(max_bytes=3 * SEALED)
    a, _, _ = fill(store, 3)
    assert get(store, a) == content(SMALL, 0)
    assert a in stored(store)
    assert store.status().counters.evictions == 1


def test_a_lookup_without_room_is_refused_and_costs_nothing(make_store: MakeStore) -> None:
    """A store in progress leaves no room for the plaintext: later there is."""
    store = make_store(max_bytes=2 * SEALED + SMALL - PAGE)
    digest = put(store, content(SMALL))
    with store.begin(SMALL, NIGHTLY):
        with pytest.raises(CacheFullError, match="in use"):
            store.lookup(RELEASES, digest)
        assert used(store) == 2 * SEALED
    assert get(store, digest) == content(SMALL)
    assert store.status().counters.hits == 1


@DETERMINISTIC
@given(st.integers(0, 1 << 34))
def test_the_largest_entry_fits_beside_its_plaintext(max_bytes: int) -> None:
    """Whatever the budget, `max_entry_bytes` and one handout of it are within."""
    store = object.__new__(MemoryStore)
    store._max_bytes = max_bytes
    largest = store.max_entry_bytes
    both = page_rounded(Frame(largest, 0, 0).sealed_bytes) + page_rounded(largest)
    assert largest == 0 or both <= max_bytes
    more = largest + 2 * PAGE + 64
    assert page_rounded(Frame(more, 0, 0).sealed_bytes) + page_rounded(more) > max_bytes


@pytest.mark.parametrize("max_bytes", [256 << 10, MIB, 7 * MIB + 123])
def test_the_largest_entry_can_really_be_stored_and_handed_out(
    make_store: MakeStore, max_bytes: int
) -> None:
    """A full store makes way for it."""
    store = make_store(max_bytes=max_bytes)
    fill(store, 12)
    data = content(store.max_entry_bytes)
    digest = put(store, data)
    assert get(store, digest) == data
    used(store)


def test_without_a_key_slot_the_oldest_makes_room(make_store: MakeStore) -> None:
    """Four slots hold four entries: a fifth takes the slot of the least recently used."""
    store = make_store(max_entries=4)
    digests = fill(store, 5)
    assert stored(store) == digests[1:]
    assert store.miss_reason(RELEASES, digests[0]) is MissReason.EVICTED


def test_a_store_refused_for_want_of_a_key_slot_keeps_no_room(make_store: MakeStore) -> None:
    """Every slot in use by a store in progress: CacheFullError, and the budget is as before."""
    store = make_store(max_entries=1)
    with store.begin(SMALL, RELEASES):
        for _ in range(5):
            with pytest.raises(CacheFullError, match="key"):
                store.begin(SMALL, RELEASES)
        assert used(store) == SEALED
    assert used(store) == 0
    assert put(store, b"fits") == digest_of(b"fits")


@pytest.mark.parametrize("seed", range(3))
def test_the_budget_holds_at_every_moment_with_many_threads(
    make_store: MakeStore, seed: int
) -> None:
    """Four threads store, look up, hold, evict and clear; a fifth looks at the sum all the while;
    whatever is handed out is what was asked for."""
    store = make_store(max_bytes=40 * SEALED, max_entries=24)
    references = {
        digest_of(data): data for data in (content(n * PAGE + n, seed) for n in range(0, 60, 4))
    }
    done, too_much = Event(), []

    def watch() -> None:
        while not done.is_set():
            with store._lock:
                if store._used_bytes > store._max_bytes or store._reserved_bytes < 0:
                    too_much.append(store._used_bytes)

    def work(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        space = Deltaspace("bucket", str(number % 2))
        with ExitStack() as holding:
            for _ in range(120):
                digest, data = chance.choice(list(references.items()))
                try:
                    match chance.randrange(10):
                        case 0 | 1 | 2:
                            put(store, data, space, digest)
                        case 8:
                            store.evict(space)
                        case 9:
                            holding.pop_all().close()
                        case step:
                            handout = holding.enter_context(held(store.lookup(space, digest)))
                            assert read_all(handout) == data
                            if step < 6:
                                holding.pop_all().close()
                except (CacheMissError, CacheFullError):
                    continue

    watcher = Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
    finally:
        done.set()
        watcher.join()
    assert not too_much
    assert store.status().counters.hits > 0
    store.clear()
    assert used(store) == 0
    assert len(store._keys._free) == 24
