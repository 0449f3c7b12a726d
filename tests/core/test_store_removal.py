"""What leaves the store leaves it whole: key zeroed, memory back, holders undisturbed."""

import json
from collections.abc import Callable

import pytest

from dgcache_core.errors import CacheMissError, MissReason
from dgcache_core.memory_store import MemoryStore
from dgcache_core.store import Freed

from .support import (
    NIGHTLY,
    RELEASES,
    HandClock,
    content,
    get,
    held,
    put,
    read_all,
    run_python,
)

DATA = content(10_000)
OTHER = content(20_000)


def test_evicting_the_last_binding_frees_the_blob(store: MemoryStore) -> None:
    """It says what it freed; nothing is left of it."""
    digest = put(store, DATA)
    assert store.evict(RELEASES) == Freed(entries=1, bytes=10_000)
    status = store.status()
    assert (status.entries, status.bindings, status.blob_bytes) == (0, 0, 0)
    with pytest.raises(CacheMissError):
        store.lookup(RELEASES, digest)


def test_evicting_a_shared_blob_leaves_it_to_the_others(store: MemoryStore) -> None:
    """Only the last of its deltaspaces takes it along."""
    digest = put(store, DATA, RELEASES)
    put(store, DATA, NIGHTLY)
    assert store.evict(RELEASES) == Freed()
    assert store.entries()[0].deltaspaces == [NIGHTLY]
    assert get(store, digest, NIGHTLY) == DATA
    assert store.evict(NIGHTLY) == Freed(entries=1, bytes=10_000)


def test_evicting_a_deltaspace_frees_each_of_its_own_blobs(store: MemoryStore) -> None:
    """All that were ever bound to it and serve nobody else; others stay."""
    put(store, DATA)
    put(store, OTHER)
    stays = put(store, content(5), NIGHTLY)
    assert store.evict(RELEASES) == Freed(entries=2, bytes=30_000)
    assert [entry.sha256 for entry in store.entries()] == [stays]


def test_evicting_what_is_not_there_frees_nothing(store: MemoryStore) -> None:
    """Twice is as good as once."""
    put(store, DATA)
    assert store.evict(NIGHTLY) == Freed()
    store.evict(RELEASES)
    assert store.evict(RELEASES) == Freed()


def test_clear_frees_everything(store: MemoryStore) -> None:
    """Entries, bindings, memory and keys; the counters go on."""
    digests = [put(store, DATA), put(store, OTHER), put(store, b"", NIGHTLY)]
    assert store.clear() == Freed(entries=3, bytes=30_000)
    status = store.status()
    assert (status.entries, status.bindings, status.blob_bytes) == (0, 0, 0)
    assert status.counters.stores == 3
    assert store.clear() == Freed()
    assert all(store.miss_reason(RELEASES, one) is MissReason.EVICTED for one in digests)


@pytest.mark.parametrize("how", ["evict", "clear", "expire", "close"])
def test_a_key_is_zero_when_its_entry_is_gone(
    make_store: Callable[..., MemoryStore], clock: HandClock, how: str
) -> None:
    """Crypto-erased: the whole page of keys is zero, and the old key's view is dead."""
    store = make_store()
    digest = put(store, DATA)
    slot, blob = store._entries[digest].key, store._entries[digest].blob
    assert any(store._keys._view)
    if how == "expire":
        clock.advance(86_401)
        store.sweep()
    elif how == "evict":
        store.evict(RELEASES)
    else:
        getattr(store, how)()
    if how != "close":
        assert not any(store._keys._view)
        assert len(store._keys._free) == 64
    assert "erased" in repr(slot)
    assert blob.closed


@pytest.mark.parametrize("how", ["evict", "clear", "expire", "close"])
def test_what_is_held_survives_its_entry(
    make_store: Callable[..., MemoryStore], clock: HandClock, how: str
) -> None:
    """The holder reads on to the end; its bytes count until it lets go."""
    store = make_store()
    digest = put(store, DATA)
    with held(store.lookup(RELEASES, digest)) as handout:
        if how == "expire":
            clock.advance(86_401)
            store.sweep()
        elif how == "evict":
            store.evict(RELEASES)
        else:
            getattr(store, how)()
        assert read_all(handout) == DATA
        if how != "close":
            assert store.status().handout_bytes == 12_288
            assert store.miss_reason(RELEASES, digest) is not None
    if how != "close":
        assert store.status().handout_bytes == 0


def test_plaintext_still_held_of_an_evicted_blob_is_not_handed_out(store: MemoryStore) -> None:
    """Evicted is evicted: only when it is stored again is what is held shared again."""
    digest = put(store, DATA)
    with held(store.lookup(RELEASES, digest)):
        store.clear()
        with pytest.raises(CacheMissError):
            store.lookup(RELEASES, digest)
        with pytest.raises(CacheMissError):
            store.lookup_now(RELEASES, digest)
        put(store, DATA)
        assert get(store, digest) == DATA


def test_nobody_holds_it_then_the_sweep_closes_it(store: MemoryStore) -> None:
    """Our own descriptor goes with the last holder's."""
    digest = put(store, DATA)
    with held(store.lookup(RELEASES, digest)):
        store.sweep()
        assert store.handouts_outstanding == 1
    store.sweep()
    assert store.handouts_outstanding == 0


# -- expiry --------------------------------------------------------------------------------------


def test_an_entry_expires_by_the_time_it_was_stored_not_used(
    make_store: Callable[..., MemoryStore], clock: HandClock
) -> None:
    """Use does not prolong it; storing it again does."""
    store = make_store(ttl_seconds=100)
    used_often, again = put(store, DATA), put(store, OTHER)
    for _ in range(3):
        clock.advance(30)
        get(store, used_often)
    put(store, OTHER)
    clock.advance(10)
    assert store.miss_reason(RELEASES, used_often) is MissReason.EXPIRED
    assert get(store, again) == OTHER
    assert store.status().counters.expirations == 1


def test_each_entry_expires_in_its_turn(
    make_store: Callable[..., MemoryStore], clock: HandClock
) -> None:
    """And the store can tell when the next one will."""
    store = make_store(ttl_seconds=100)
    assert store.seconds_to_next_expiry() is None
    digests = []
    for seed in range(3):
        digests.append(put(store, content(100, seed)))
        clock.advance(10)
    assert store.seconds_to_next_expiry() == 70
    clock.advance(70)
    assert [entry.sha256 for entry in store.entries()] == [digests[2], digests[1]]
    assert store.seconds_to_next_expiry() == 10
    clock.advance(20)
    assert store.status().entries == 0
    assert store.seconds_to_next_expiry() is None


@pytest.mark.parametrize("look", ["status", "entries", "sweep", "miss_reason", "lookup"])
def test_whoever_looks_finds_no_expired_entry(
    store: MemoryStore, clock: HandClock, look: str
) -> None:
    """Each way of looking frees what has expired first."""
    digest = put(store, DATA)
    clock.advance(86_400)
    if look == "lookup":
        with pytest.raises(CacheMissError):
            store.lookup(RELEASES, digest)
    elif look == "miss_reason":
        assert store.miss_reason(RELEASES, digest) is MissReason.EXPIRED
    else:
        getattr(store, look)()
    assert not store._entries
    assert store._entries.blob_bytes == 0


def test_an_expired_entry_leaves_before_a_living_one(
    make_store: Callable[..., MemoryStore], clock: HandClock
) -> None:
    """Room is first taken from what has expired, though it was used last."""
    store = make_store(max_bytes=1 << 20, ttl_seconds=100)
    old = put(store, content(300_000))
    clock.advance(60)
    young = put(store, content(300_000, 1))
    get(store, old)
    clock.advance(60)
    put(store, content(400_000, 2))
    assert store.miss_reason(RELEASES, old) is MissReason.EXPIRED
    assert get(store, young) == content(300_000, 1)
    assert store.status().counters.evictions == 0


MEMORY = """
import io, json, mmap, os
from pathlib import Path
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Deltaspace
space = Deltaspace("b", "p")
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
def put(size):
    with store.begin(size, space) as ingest:
        ingest.fill(io.BytesIO(bytes(size)).readinto)
        return ingest.commit()
store = MemoryStore(400 << 20, 100, may_fork=True)
put(1 << 20)
store.clear()
before = resident()
digests = [put(size << 20) for size in (9, 11, 70)]
os.close(store.lookup(space, digests[0]).fd)
full = resident()
store.clear()
after = resident()
print(json.dumps({"grew": full - before, "kept": after - before}))
"""


def test_after_clear_the_memory_is_back() -> None:
    """90 MiB were resident, at most 3 % more; of them less than 20 MB are after clear()."""
    seen = json.loads(run_python(MEMORY))
    assert 90 << 20 < seen["grew"] < (90 << 20) * 1.03 + (20 << 20)
    assert seen["kept"] < 20 << 20
