"""Rotated keys: nothing from before can be read with them, and what is in progress ends well."""

import io
from collections.abc import Callable

import pytest

import dgcache_core.memory_store as module
from dgcache_core.errors import CacheFullError, CacheUnavailableError, MissReason
from dgcache_core.memory_store import MemoryStore
from dgcache_core.store import Freed

from .conftest import MIB
from .support import NIGHTLY, RELEASES, content, digest_of, get, held, put, read_all, run_python
from .test_keyslab import is_mapped

MakeStore = Callable[..., MemoryStore]


@pytest.fixture(params=[False, True], ids=["never forks", "may fork"])
def store(request: pytest.FixtureRequest, make_store: MakeStore) -> MemoryStore:
    """An empty store of 32 MiB with keys of either kind."""
    return make_store(may_fork=request.param)


def test_a_rekey_frees_everything_and_makes_the_keys_anew(store: MemoryStore) -> None:
    """The entries are evicted, the old region is gone, and the store goes on with another."""
    digest = put(store, content(5000))
    old = store._keys._address
    assert store.clear(rekey=True) == Freed(entries=1, bytes=5000)
    assert store.miss_reason(RELEASES, digest) is MissReason.EVICTED
    assert store._keys._address != 0
    assert old == store._keys._address or not is_mapped(old)
    assert get(store, put(store, content(5000))) == content(5000)


def test_a_clear_alone_keeps_the_region(store: MemoryStore) -> None:
    """Its keys are erased all the same."""
    put(store, content(5000))
    keys = store._keys
    store.clear()
    assert store._keys is keys
    assert not any(keys._view)


def test_a_lookup_in_progress_ends_well(store: MemoryStore) -> None:
    """It has its key until it is done; then the old region goes."""
    data = content(3 * MIB)
    digest = put(store, data)
    old = store._keys
    decrypt = store._decrypt

    def decrypt_in_a_rekey(entry: object) -> int:
        store.clear(rekey=True)
        assert old._address
        return decrypt(entry)  # type: ignore[arg-type]

    store._decrypt = decrypt_in_a_rekey  # type: ignore[assignment, method-assign]
    with held(store.lookup(RELEASES, digest)) as handout:
        assert read_all(handout) == data
    assert old._address == 0
    assert store.entries() == []


@pytest.mark.parametrize("filled", [False, True], ids=["before its bytes", "after its bytes"])
def test_a_store_in_progress_is_refused(store: MemoryStore, filled: bool) -> None:
    """Its blob has a key from before: nothing is kept or stays reserved, and it is counted."""
    data = content(2 * MIB)
    old = store._keys
    with store.begin(len(data), NIGHTLY) as ingest:
        if not filled:
            store.clear(rekey=True)
        ingest.fill(io.BytesIO(data).readinto)
        if filled:
            store.clear(rekey=True)
        assert old._address
        with pytest.raises(CacheFullError, match="rotated"):
            ingest.commit()
    assert old._address == 0
    status = store.status()
    assert (status.entries, status.blob_bytes, status.reserved_bytes) == (0, 0, 0)
    assert status.counters.refused_stores == 1
    assert get(store, put(store, data)) == data


def test_a_store_that_is_aborted_takes_the_old_region_with_it(store: MemoryStore) -> None:
    """Also where it never saw a byte."""
    old = store._keys
    with store.begin(1000, NIGHTLY):
        store.clear(rekey=True)
        assert old._address
    assert old._address == 0


def test_a_held_handout_stays(store: MemoryStore) -> None:
    """It is plaintext already, and its holder's."""
    data = content(5000)
    with held(store.lookup(RELEASES, put(store, data))) as handout:
        store.clear(rekey=True)
        assert read_all(handout) == data
        put(store, data)
        with held(store.lookup(RELEASES, digest_of(data))) as again:
            assert read_all(again) == data


def test_a_closed_store_cannot_be_rekeyed(store: MemoryStore) -> None:
    """It has no keys, and makes none."""
    store.close()
    with pytest.raises(CacheUnavailableError):
        store.clear(rekey=True)
    assert store._keys._address == 0


@pytest.mark.parametrize("error", [MemoryError("none"), OSError(12, "none")])
def test_without_memory_for_new_keys_nothing_is_stored(
    store: MemoryStore, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails closed: the old keys are gone, stores are refused, and a later rekey mends it."""
    put(store, content(5000))
    make, old = store._make_keys, store._keys

    def refuse() -> module.KeySlab:
        raise error

    monkeypatch.setattr(store, "_make_keys", refuse)
    with pytest.raises(CacheFullError, match="no memory for new keys"):
        store.clear(rekey=True)
    assert old._address == 0
    assert store.entries() == []
    with pytest.raises(CacheFullError):
        put(store, content(5000))
    monkeypatch.setattr(store, "_make_keys", make)
    store.clear(rekey=True)
    assert get(store, put(store, content(5000))) == content(5000)


RACE = """
import io, os, re, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from dgcache_core.errors import CacheFullError, CacheMissError
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Deltaspace
store = MemoryStore(128 << 20, 1000, may_fork=sys.argv[1] == "may fork", max_entries=64)
space = Deltaspace("b", "p")
data = [os.urandom(size) for size in (0, 100, 300_000, 5 << 20)]
ended = threading.Event()
done = dict(stored=0, refused=0, found=0, missed=0)
digests = {}
def store_some():
    while not ended.is_set():
        for one in data:
            try:
                with store.begin(len(one), space) as ingest:
                    ingest.fill(io.BytesIO(one).readinto)
                    digests[ingest.commit()] = one
                done["stored"] += 1
            except CacheFullError:
                done["refused"] += 1
def look_some_up():
    while not ended.is_set():
        for digest, one in list(digests.items()):
            try:
                handout = store.lookup(space, digest)
            except CacheMissError:
                done["missed"] += 1
                continue
            assert os.pread(handout.fd, len(one) + 1, 0) == one
            os.close(handout.fd)
            done["found"] += 1
with ThreadPoolExecutor(5) as threads:
    work = [threads.submit(job) for job in (store_some, store_some, look_some_up, look_some_up)]
    try:
        turns = 0
        while turns < 400 or not all(done.values()):
            store.clear(rekey=True)
            turns += 1
            assert turns < 20_000 and not any(one.done() for one in work), done
    finally:
        ended.set()
    for one in work:
        one.result()
store.clear(rekey=True)
status = store.status()
assert (status.entries, status.blob_bytes, status.reserved_bytes) == (0, 0, 0), status
regions = re.findall("secretmem|VmFlags:.* wf", Path("/proc/self/smaps").read_text())
print(len(regions), store._in_progress)
"""


@pytest.mark.parametrize("kind", ["never forks", "may fork"])
def test_many_lookups_and_stores_survive_many_rekeys(kind: str) -> None:
    """Each ends well or with one of the cache's errors, every byte found is right, no region of
    keys is left but the last, and nobody reads a page that is gone (that would be SIGSEGV)."""
    assert run_python(RACE, kind, timeout=100) == "1 0"
