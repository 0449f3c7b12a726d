"""Memory over disk: what memory evicts is found again, and what was removed is not."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from dgcache_core.aead import Frame
from dgcache_core.disk_format import MIN_HEADER_BYTES, body_bytes
from dgcache_core.disk_records import DiskEventKind, LoadedBlob, StoredBlob
from dgcache_core.errors import (
    CacheCorruptionError,
    CacheFullError,
    CacheMissError,
    CacheUnavailableError,
    MissReason,
)
from dgcache_core.keyslab import KeySlab
from dgcache_core.memory import Allocate, page_rounded
from dgcache_core.references import Deltaspace, Sha256
from dgcache_core.store import Freed
from tests.support.wire import eventually

from .support import NIGHTLY, RELEASES, content, digest_of, flip, get, held, put, read_all
from .test_disk_trouble import in_a_small_file_system, needs_mounts
from .test_store_budget import SEALED, SMALL
from .tier import DAY, MIB, Tier, rewrite
from .tiers import Gate, Spill, Tiers, budgets_checked

FILE = page_rounded(MIN_HEADER_BYTES + body_bytes(Frame(SMALL, 0, 0)))
THREE = 3 * SEALED + page_rounded(SMALL)
"""Room for three small references and the plaintext of one."""

ON_BOTH = pytest.mark.parametrize("key", [None, bytes(range(32))], ids=["ephemeral", "persistent"])


@pytest.fixture
def tiers(tier: Tier) -> Iterator[Tiers]:
    """Both tiers over a directory of this test's own."""
    made = Tiers(tier)
    yield made
    made.close()


def small(seed: int) -> bytes:
    """Return one of many small references."""
    return content(SMALL, seed)


def fill(tiers: Tiers, count: int) -> list[Sha256]:
    """Store small references, each in a deltaspace of its own; return them oldest first."""
    return [
        put(tiers.opened[-1][1], small(seed), Deltaspace("b", str(seed))) for seed in range(count)
    ]


# -- between the tiers -----------------------------------------------------------------------------


@ON_BOTH
def test_what_memory_evicts_comes_back_from_disk(tiers: Tiers, key: bytes | None) -> None:
    """Byte for byte, with its deltaspaces and its age; the file stays where it is."""
    store = tiers.open(THREE, key=key)
    digests = fill(tiers, 5)
    assert (tiers.in_memory(), tiers.on_disk()) == (digests[2:], digests[:2])
    tiers.tier.advance(100)
    for seed, digest in enumerate(digests):
        assert get(store, digest, Deltaspace("b", str(seed))) == small(seed)
    (first,) = [entry for entry in store.entries() if entry.sha256 == digests[0]]
    assert first.deltaspaces == [Deltaspace("b", "0")]
    assert (first.age_seconds, first.expires_in_seconds) == (100, DAY - 100)
    assert set(tiers.on_disk()) == set(digests)
    assert store.disk_status().counters.keeps == 5
    assert not tiers.tier.events


def test_what_fits_into_memory_costs_no_write(tiers: Tiers) -> None:
    """Only eviction writes."""
    store = tiers.open(THREE)
    for seed, digest in enumerate(fill(tiers, 3)):
        assert get(store, digest) == small(seed)
    assert tiers.tier.files() == []
    assert store.disk_status().counters.keeps == 0


def test_a_reference_is_written_once(tiers: Tiers) -> None:
    """It is brought back and evicted again and again, and its file stays the very same."""
    store = tiers.open(2 * SEALED + page_rounded(SMALL))
    digests = fill(tiers, 4)
    for _ in range(3):
        for seed, digest in enumerate(digests):
            assert get(store, digest) == small(seed)
    counters = store.disk_status().counters
    assert counters.keeps == 4
    assert counters.loads >= 8


def test_threads_that_ask_at_once_bring_it_back_once(tiers: Tiers) -> None:
    """One load and one decryption serve sixteen."""
    store = tiers.open(4 * MIB)
    digest = put(store, content(MIB))
    store.set_limit(0)
    store.set_limit(4 * MIB)
    assert (tiers.in_memory(), tiers.on_disk()) == ([], [digest])
    together = threading.Barrier(16)

    def ask(_: int) -> bytes:
        together.wait(20)
        return get(store, digest)

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == [content(MIB)] * 16
    assert store.disk_status().counters.loads == 1
    assert store.status().counters.hits == 16


def test_more_threads_than_room_all_get_what_they_ask_for(tiers: Tiers) -> None:
    """What one brings back pushes out what another just did; nobody gets a miss or wrong bytes."""
    store = tiers.open(10 * SEALED, max_entries=16)
    digests = fill(tiers, 24)
    chosen = random.Random(1)
    wanted = [chosen.randrange(24) for _ in range(300)]

    def ask(seed: int) -> bool:
        return get(store, digests[seed], Deltaspace("b", str(seed))) == small(seed)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(ask, wanted))
    assert store.status().counters.hits == 300


def test_the_disk_loses_what_was_used_longest_ago(tiers: Tiers) -> None:
    """Coming back counts as a use, and so does leaving memory again, though nothing is written."""
    store = tiers.open(THREE, 3 * FILE)
    digests = fill(tiers, 6)
    assert tiers.on_disk() == digests[:3]
    get(store, digests[0])  # on disk: the last to leave, and digests[3] is written
    assert tiers.on_disk() == [digests[2], digests[0], digests[3]]
    for seed in range(10, 13):
        get(store, digests[0])
        put(store, small(seed))
    assert digests[0] in tiers.in_memory()
    for seed in range(13, 16):  # the first of them lets it leave memory, which is a use of its file
        put(store, small(seed))
    assert digests[0] in tiers.on_disk()
    assert get(store, digests[0]) == small(0)


def test_what_was_stored_anew_lives_as_long_as_the_new_one(tiers: Tiers) -> None:
    """An older file of the same content does not shorten it, and its deltaspaces are kept."""
    store = tiers.open(THREE, ttl_seconds=100)
    digest = put(store, small(0), NIGHTLY)
    store.set_limit(0)
    store.set_limit(THREE)
    tiers.tier.advance(60)
    put(store, small(0), RELEASES)
    store.set_limit(0)
    store.set_limit(THREE)
    tiers.tier.advance(60)
    assert get(store, digest, RELEASES) == small(0)
    assert len(tiers.tier.files()) == 1


def test_a_reference_too_large_for_the_disk_leaves_memory_all_the_same(tiers: Tiers) -> None:
    """Memory may be larger than the disk tier."""
    store = tiers.open(4 * MIB, 16 * 4096)
    large = put(store, content(MIB))
    store.set_limit(0)
    assert store.miss_reason(RELEASES, large) is MissReason.PRESSURE
    assert store.entries() == []
    assert not tiers.tier.events


# -- budgets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_budgets_hold_at_every_moment(tiers: Tiers, seed: int) -> None:
    """Looked at whenever a lock is given away, while four threads store, look up and remove."""
    store = tiers.open(12 * SEALED, 8 * FILE, max_entries=10)
    above, below = budgets_checked(tiers)
    refusals: list[CacheFullError] = []

    def work(number: int) -> None:
        chosen = random.Random(f"{seed}-{number}")
        for _ in range(60):
            which = chosen.randrange(24)
            space = Deltaspace("b", str(which))
            try:
                if chosen.random() < 0.5:
                    put(store, small(which), space)
                elif chosen.random() < 0.05:
                    store.evict(space)
                else:
                    assert get(store, digest_of(small(which)), space) == small(which)
            except CacheMissError:
                continue
            except CacheFullError as error:
                refusals.append(error)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert (above.failures, below.failures) == (0, 0)
    assert above.releases > 500
    assert below.releases > 500
    assert refusals == []
    status = store.status()
    assert status.reserved_bytes == tiers.disk._table.index.reserved_bytes == 0
    assert tiers.memory._leaving_bytes == 0
    assert sum(path.stat().st_blocks for path in tiers.tier.files()) * 512 <= 8 * FILE
    assert not tiers.tier.events


def test_stores_that_need_room_wait_for_a_spill(tiers: Tiers) -> None:
    """Memory has room for two, both are being written: the stores wait, and none is refused."""
    gate = Gate()
    store = tiers.open(4 * SEALED, around=gate)
    above, _ = budgets_checked(tiers)
    fill(tiers, 4)
    with ThreadPoolExecutor(4) as pool:
        stores = [pool.submit(put, store, small(seed)) for seed in range(10, 14)]
        gate.await_one()
        assert store.status().entries == 4  # what is on its way still counts, and is still there
        assert get_shared_or_none(tiers, small(10)) is None
        assert not any(one.done() for one in stores)
        gate.open.set()
        digests = {one.result(20) for one in stores}
    assert set(tiers.in_memory()) == digests
    assert set(tiers.on_disk()) == {digest_of(small(seed)) for seed in range(4)}
    assert above.failures == 0


def get_shared_or_none(tiers: Tiers, data: bytes) -> object:
    """Ask as the daemon's loop does, which never waits."""
    try:
        return tiers.opened[-1][1].lookup_now(RELEASES, digest_of(data))
    except CacheMissError:
        return None


@pytest.mark.parametrize(
    ("memory_bytes", "max_entries"), [(3 * SEALED, 64), (64 * SEALED, 3)], ids=["bytes", "keys"]
)
def test_a_store_waits_for_what_leaves_anyway(
    tiers: Tiers, memory_bytes: int, max_entries: int
) -> None:
    """Everything is being written, one of it for nobody: its room, or its key, is waited for."""
    gate = Gate()
    store = tiers.open(memory_bytes, max_entries=max_entries, around=gate)
    fill(tiers, 3)
    with ThreadPoolExecutor(4) as pool:
        limiting = pool.submit(store.set_limit, 2 * SEALED)
        gate.await_one()
        store.set_limit(memory_bytes)
        stores = [pool.submit(put, store, small(seed)) for seed in (10, 11)]
        gate.await_one()
        gate.await_one()
        stores.append(pool.submit(put, store, small(12)))
        eventually(lambda: tiers.memory._opened._waiters)  # type: ignore[attr-defined]
        gate.open.set()
        assert limiting.result(20) == Freed(1, SEALED)
        stored = {one.result(20) for one in stores}
    kept = set(tiers.in_memory()) | set(tiers.on_disk())  # the one that ended first may leave again
    assert stored < kept
    assert len(kept) == 3 + 3


def test_a_lookup_of_what_is_being_written_is_a_hit(tiers: Tiers) -> None:
    """It is not evicted then: whoever wanted its room takes another's."""
    gate = Gate()
    store = tiers.open(THREE, around=gate)
    digests = fill(tiers, 3)
    with ThreadPoolExecutor(1) as pool:
        storing = pool.submit(put, store, small(10))
        gate.await_one()
        with held(tiers.memory.lookup(RELEASES, digests[2])) as handout:
            assert read_all(handout) == small(2)
        gate.open.set()
        storing.result(20)
    assert get(store, digests[0]) == small(0)


def test_a_lower_limit_spills(tiers: Tiers) -> None:
    """Memory pressure costs no reference, and what it gave back is told in bytes of memory."""
    store = tiers.open(8 * SEALED)
    digests = fill(tiers, 4)
    assert store.set_limit(2 * SEALED) == Freed(2, 2 * SEALED)
    assert (tiers.in_memory(), tiers.on_disk()) == (digests[2:], digests[:2])
    store.set_limit(8 * SEALED)
    assert [get(store, digest) for digest in digests] == [small(seed) for seed in range(4)]


def test_what_a_lower_limit_freed_is_not_what_others_did(tiers: Tiers) -> None:
    """Others evict while the first entry is being written; that is not counted again."""
    gate = Gate()
    store = tiers.open(16 * SEALED, around=gate)
    fill(tiers, 4)
    with ThreadPoolExecutor(1) as pool:
        limiting = pool.submit(store.set_limit, SEALED)
        gate.await_one()
        tiers.memory.evict(Deltaspace("b", "1"))
        tiers.memory.evict(Deltaspace("b", "2"))
        gate.open.set()
        assert limiting.result(20) == Freed(1, SEALED)


def test_a_held_handout_survives(tiers: Tiers) -> None:
    """Eviction from memory, from disk, and clear leave its plaintext with its holder."""
    store = tiers.open(4 * SEALED, FILE)
    first = put(store, small(0))
    with held(store.lookup(RELEASES, first)) as handout:
        for seed in range(1, 6):
            put(store, small(seed))
        assert store.miss_reason(RELEASES, first) is MissReason.EVICTED
        assert read_all(handout) == small(0)
        store.clear(rekey=True)
        assert read_all(handout) == small(0)


# -- removing --------------------------------------------------------------------------------------


def test_evict_and_clear_count_a_reference_once(tiers: Tiers) -> None:
    """Whether memory has it, the disk, or both."""
    store = tiers.open(THREE)
    digests = fill(tiers, 5)
    get(store, digests[0], Deltaspace("b", "0"))
    assert set(tiers.in_memory()) & set(tiers.on_disk()) == {digests[0]}
    for seed in (0, 1, 4):  # on both, on disk, in memory
        assert store.evict(Deltaspace("b", str(seed))) == Freed(1, SMALL)
        assert store.evict(Deltaspace("b", str(seed))) == Freed()
        assert store.miss_reason(RELEASES, digests[seed]) is MissReason.EVICTED
    get(store, digests[2], Deltaspace("b", "2"))
    assert store.clear() == Freed(2, 2 * SMALL)
    assert store.entries() == []
    assert tiers.tier.files() == []


@ON_BOTH
def test_a_rekey_makes_both_tiers_unreadable(tiers: Tiers, key: bytes | None) -> None:
    """A copy of the files from before is worth nothing, and the store goes on with new keys."""
    store = tiers.open(THREE, key=key)
    digests = fill(tiers, 5)
    copies = {path: path.read_bytes() for path in tiers.tier.files()}
    assert store.clear(rekey=True) == Freed(5, 5 * SMALL)
    assert tiers.tier.files() == []
    fill(tiers, 5)
    store = tiers.open(THREE, key=key)
    tiers.close()
    for path, data in copies.items():
        path.write_bytes(data)
        path.chmod(0o600)
    store = tiers.open(THREE, key=key)
    for digest in digests[:2]:
        assert not tiers.disk.contains(digest) or key  # what was stored after it, with new keys
    for path, data in copies.items():
        assert not path.exists() or path.read_bytes() != data


def test_evict_unbinds_on_both_tiers(tiers: Tiers) -> None:
    """A reference of two deltaspaces goes with the second of them, wherever it is."""
    store = tiers.open(THREE)
    digest = put(store, small(0), RELEASES)
    get(store, digest, NIGHTLY)
    store.set_limit(0)
    store.set_limit(THREE)
    assert store.evict(RELEASES) == Freed()
    get(store, digest, NIGHTLY)
    assert store.evict(NIGHTLY) == Freed(1, SMALL)


@pytest.mark.parametrize("how", ["clear", "rekey", "evict"])
def test_what_was_removed_while_it_was_being_written_is_gone(tiers: Tiers, how: str) -> None:
    """The removal waits for the write and removes the file."""
    gate = Gate()
    store = tiers.open(THREE, around=gate)
    digests = fill(tiers, 3)
    remove = {
        "clear": store.clear,
        "rekey": lambda: store.clear(rekey=True),
        "evict": lambda: store.evict(Deltaspace("b", "0")),
    }[how]
    with ThreadPoolExecutor(2) as pool:
        storing = pool.submit(put, store, small(10))
        gate.await_one()
        removing = pool.submit(remove)
        eventually(lambda: digests[0] not in tiers.in_memory())
        assert not removing.done()
        gate.open.set()
        freed = removing.result(20)
        if how != "rekey":
            storing.result(20)
    assert freed.entries >= 1
    assert store.miss_reason(RELEASES, digests[0]) is not None
    assert digests[0] not in tiers.on_disk()
    with pytest.raises(CacheMissError):
        store.lookup(RELEASES, digests[0])


@pytest.mark.parametrize("how", ["clear", "evict"])
def test_what_was_removed_while_it_came_back_is_gone(
    tiers: Tiers, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal waits for the restore, and removes what it brought back."""
    store, space = tiers.open(THREE), Deltaspace("b", "0")
    digest = fill(tiers, 4)[0]
    read, go_on = threading.Event(), threading.Event()
    load = tiers.disk.load

    def slow_load(sha256: Sha256, allocate: Allocate, keys: KeySlab) -> LoadedBlob | None:
        loaded = load(sha256, allocate, keys)
        read.set()
        assert go_on.wait(20)
        return loaded

    monkeypatch.setattr(tiers.disk, "load", slow_load)
    with ThreadPoolExecutor(2) as pool:
        asking = pool.submit(store.lookup, space, digest)
        assert read.wait(20)
        removing = pool.submit(store.clear if how == "clear" else lambda: store.evict(space))
        eventually(lambda: store._removals)
        assert not removing.done()
        go_on.set()
        removing.result(20)
        with suppress(CacheMissError), held(asking.result(20)) as handout:
            assert read_all(handout) == small(0)  # it was quicker than the removal
    assert digest not in [*tiers.in_memory(), *tiers.on_disk()]


def test_a_rekey_that_the_disk_refuses_is_told_and_memory_is_cleared(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody believes a disk unreadable that is not."""
    store = tiers.open(THREE)
    fill(tiers, 5)

    def refuse() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiers.disk._ring, "renew", refuse)
    with pytest.raises(CacheUnavailableError, match="No space"):
        store.clear(rekey=True)
    assert tiers.in_memory() == []


def test_the_disk_is_cleared_though_memory_got_no_new_keys(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tier forgets what it can."""
    store = tiers.open(THREE)
    fill(tiers, 5)

    def refuse() -> None:
        raise MemoryError

    monkeypatch.setattr(tiers.memory, "_make_keys", refuse)
    with pytest.raises(CacheFullError):
        store.clear(rekey=True)
    assert store.entries() == []
    assert tiers.tier.files() == []


# -- looking ---------------------------------------------------------------------------------------


def test_entries_tell_which_tier_they_are_on(tiers: Tiers) -> None:
    """Memory first; what both have is in memory."""
    store = tiers.open(THREE)
    digests = fill(tiers, 5)
    told = [(entry.sha256, entry.tier) for entry in store.entries()]
    assert told == [
        *((digest, "memory") for digest in reversed(digests[2:])),
        *((digest, "disk") for digest in reversed(digests[:2])),
    ]
    on_disk = store.entries()[-1]
    assert (on_disk.size, on_disk.deltaspaces) == (SMALL, [Deltaspace("b", "0")])
    get(store, digests[0])
    assert [entry.tier for entry in store.entries()].count("disk") == 2
    assert len(store.entries()) == 5


def test_the_loop_is_never_sent_to_the_disk(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lookup_now` says None where only a worker may find out, and misses where it knows."""
    store = tiers.open(THREE)
    digests = fill(tiers, 5)
    store = tiers.open(THREE)

    def not_here(*_: object, **__: object) -> None:
        raise AssertionError("the disk was asked")

    with monkeypatch.context() as patch:
        patch.setattr(tiers.disk._former_life, "is_done", False)
        for name in ("opened", "look", "unlink"):
            patch.setattr(tiers.disk._directory, name, not_here)
        assert store.lookup_now(RELEASES, digests[0]) is None
        assert store.lookup_now(RELEASES, digest_of(b"unknown")) is None
        patch.setattr(tiers.disk._former_life, "is_done", True)
        tiers.tier.advance(2 * DAY)
        assert store.lookup_now(RELEASES, digests[1]) is None
        with pytest.raises(CacheMissError):
            store.lookup_now(RELEASES, digest_of(b"unknown"))


def test_time_is_over_on_both_tiers(tiers: Tiers) -> None:
    """At the same moment, with files and all, and the sweeper knows when that is."""
    store = tiers.open(THREE, ttl_seconds=100)
    digests = fill(tiers, 5)
    store = tiers.open(THREE, ttl_seconds=100)
    assert tiers.in_memory() == []
    assert store.seconds_to_next_expiry() == 100  # of what only the disk has
    tiers.tier.advance(99)
    assert get(store, digests[0]) == small(0)
    assert store.seconds_to_next_expiry() == 1
    tiers.tier.advance(1)
    for digest in digests:
        assert store.miss_reason(RELEASES, digest) is MissReason.EXPIRED
        with pytest.raises(CacheMissError) as miss:
            store.lookup(RELEASES, digest)
        assert miss.value.reason is MissReason.EXPIRED
    store.sweep()
    assert tiers.tier.files() == []
    assert store.seconds_to_next_expiry() is None


def test_the_next_sweep_is_due_when_the_disk_may_be_back(tiers: Tiers) -> None:
    """A tier that is off is tried again though nothing else happens."""
    store = tiers.open(THREE)
    tiers.disk._table.note_failure(OSError(5, "Input/output error"))
    assert store.seconds_to_next_expiry() == 60
    tiers.tier.advance(60)
    store.sweep()
    assert tiers.tier.take_events() == [DiskEventKind.DISABLED, DiskEventKind.ENABLED]


def test_a_miss_tells_its_reason(tiers: Tiers) -> None:
    """The last that happened, on whichever tier."""
    store = tiers.open(THREE, 2 * FILE)
    digests = fill(tiers, 6)
    assert tiers.on_disk() == digests[1:3]

    def reason(digest: Sha256, space: Deltaspace = RELEASES) -> MissReason | None:
        told = store.miss_reason(space, digest)
        if told is not None:
            with pytest.raises(CacheMissError) as miss:
                store.lookup(space, digest)
            assert miss.value.reason is told
        return told

    assert reason(digests[0]) is MissReason.EVICTED
    assert reason(digests[1]) is None
    assert reason(digest_of(b"unknown")) is MissReason.UNKNOWN
    assert reason(digest_of(b"unknown"), Deltaspace("b", "5")) is MissReason.DIGEST_CHANGED
    rewrite(next(p for p in tiers.tier.files() if p.name in name_of(tiers, digests[1])), b"other")
    tiers.disk.audit_all()
    assert reason(digests[1]) is MissReason.DROPPED_CORRUPT
    put(store, small(1))
    assert reason(digests[1]) is None
    store.clear()
    assert reason(digests[1]) is MissReason.EVICTED
    large = content(store.max_entry_bytes + 1)
    with pytest.raises(CacheFullError):
        put(store, large, expected=digest_of(large))
    assert reason(digest_of(large)) is MissReason.TOO_LARGE


def name_of(tiers: Tiers, digest: Sha256) -> str:
    """Return the name of a reference's file."""
    entry = tiers.disk._table.index.get(digest)
    assert entry is not None
    return entry.name


# -- corruption ------------------------------------------------------------------------------------


def test_a_corrupt_copy_in_memory_is_dropped_on_both_tiers(tiers: Tiers) -> None:
    """Nobody knows which of the two rotted first; nothing is handed out."""
    store = tiers.open(THREE)
    digest = fill(tiers, 4)[0]
    get(store, digest)
    store.sweep()
    flip(memoryview(tiers.memory._entries[digest].blob), SEALED - 5000)
    with pytest.raises(CacheCorruptionError):
        store.lookup(RELEASES, digest)
    assert digest not in [*tiers.in_memory(), *tiers.on_disk()]
    assert store.miss_reason(RELEASES, digest) is MissReason.DROPPED_CORRUPT
    assert tiers.tier.take_events() == [DiskEventKind.CORRUPT]
    assert store.status().counters.corruptions == 1


def test_a_copy_that_rotted_in_memory_is_never_written(tiers: Tiers) -> None:
    """It leaves, and says so."""
    store = tiers.open(THREE)
    digest = fill(tiers, 3)[0]
    flip(memoryview(tiers.memory._entries[digest].blob), SEALED - 5000)
    put(store, small(10))
    assert tiers.tier.files() == []
    assert store.miss_reason(RELEASES, digest) is not None
    assert tiers.tier.take_events() == [DiskEventKind.CORRUPT]


def test_a_changed_file_is_an_alarm_and_no_hit(tiers: Tiers) -> None:
    """CacheCorruptionError, dropped, and the next store makes it well."""
    store = tiers.open(THREE)
    digest = fill(tiers, 4)[0]
    path = tiers.tier.only_file()
    data = bytearray(path.read_bytes())
    flip(data, len(data) - 100)
    rewrite(path, bytes(data))
    with pytest.raises(CacheCorruptionError):
        store.lookup(RELEASES, digest)
    assert tiers.tier.take_events() == [DiskEventKind.SECURITY]
    assert tiers.tier.files() == []
    assert store.miss_reason(RELEASES, digest) is MissReason.DROPPED_CORRUPT
    assert store.status().reserved_bytes == 0
    assert get(store, put(store, small(0))) == small(0)


def test_a_chunk_that_rotted_on_disk_is_found_in_memory(
    tiers: Tiers,
) -> None:
    """Without a trace in the ledger, as a failing disk does it: both go, nothing is served."""
    store = tiers.open(THREE)
    digest = fill(tiers, 4)[0]
    entry = tiers.disk._table.index.get(digest)
    assert entry is not None
    path = tiers.tier.only_file()
    data = bytearray(path.read_bytes())
    flip(data, len(data) - 100)
    rewrite(path, bytes(data))
    entry.ledger = type(entry.ledger).of(path.stat())
    with pytest.raises(CacheCorruptionError):
        store.lookup(RELEASES, digest)
    assert tiers.tier.take_events() == [DiskEventKind.CORRUPT]
    assert not path.exists()
    assert digest not in [*tiers.in_memory(), *tiers.on_disk()]


# -- the end ---------------------------------------------------------------------------------------


def test_a_persistent_tier_gets_everything_at_the_end(tiers: Tiers) -> None:
    """The next life is warm without a store."""
    store = tiers.open(8 * SEALED)
    digests = fill(tiers, 3)
    assert tiers.tier.files() == []
    store = tiers.open(8 * SEALED)
    for seed, digest in enumerate(digests):
        assert get(store, digest, Deltaspace("b", str(seed))) == small(seed)
    assert store.evict(Deltaspace("b", "0")) == Freed(1, SMALL)


def test_a_tier_that_ends_with_the_process_gets_nothing(tiers: Tiers) -> None:
    """And leaves nothing."""
    written: list[StoredBlob] = []

    def watched(_: Spill) -> Spill:
        return written.append

    store = tiers.open(8 * SEALED, key=None, around=watched)
    fill(tiers, 3)
    store.close()
    assert written == []
    assert tiers.tier.files() == []


def test_the_end_keeps_what_was_used_last(tiers: Tiers) -> None:
    """Where the disk has less room than memory, whether it is there already or not."""
    store = tiers.open(7 * SEALED, 4 * FILE)
    digests = fill(tiers, 9)
    get(store, digests[1], Deltaspace("b", "1"))  # on both tiers now, and used last
    before = tiers.in_memory()
    store = tiers.open(7 * SEALED, 4 * FILE)
    warm = set(tiers.on_disk())
    assert digests[1] in warm
    assert set(before[-3:]) <= warm, "what was used last"


def test_the_end_takes_no_longer_than_it_may(tiers: Tiers) -> None:
    """No write begins after its time."""
    store = tiers.open(8 * SEALED, flush_seconds=0.0)
    fill(tiers, 3)
    store.close()
    assert tiers.tier.files() == []


# -- a disk in trouble -----------------------------------------------------------------------------

_UNDER_A_STORE = """
from contextlib import suppress
from dgcache_core.errors import CacheMissError, MissReason
from dgcache_core.store import Freed
from tests.core.support import RELEASES, get, put
from tests.core.tiers import Tiers
from tests.core.tier import DAY
tiers = Tiers(tier)
store = tiers.open(2 * MIB)
small = [content(300_000, seed) for seed in range(20)]
def goes_on_with_memory_alone():
    for data in small:  # far more than fits
        assert get(store, put(store, data)) == data
    for data in small[-2:]:
        assert get(store, digest_of(data)) == data
    for data in small[:8]:
        assert store.miss_reason(RELEASES, digest_of(data)) is MissReason.EVICTED
        try:
            get(store, digest_of(data))
        except CacheMissError:
            continue
        raise AssertionError
    store.sweep()
    assert store.set_limit(0).entries > 0
    store.set_limit(2 * MIB)
    put(store, small[0])
    assert store.evict(RELEASES).entries >= 1
    put(store, small[0])
    assert store.clear().entries == 1
"""


@needs_mounts
def test_a_full_disk_under_the_store(short_directory: Path) -> None:
    """Everything goes on with memory alone, with one alarm; with room again it spills again."""
    in_a_small_file_system(
        short_directory,
        _UNDER_A_STORE
        + """
with (place / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
    while ballast.write(bytes(4096)):
        pass
goes_on_with_memory_alone()
assert tier.take_events() == [DISABLED], tier.events
(place / "ballast").unlink()
tier.advance(61)
store.sweep()
assert tier.take_events() == [ENABLED]
digests = [put(store, data) for data in small[:8]]
assert [get(store, digest) for digest in digests] == small[:8]
tiers.close()
""",
    )


@needs_mounts
def test_a_read_only_disk_under_the_store(short_directory: Path) -> None:
    """As a full one; what is there cannot be removed, and is not served until it is."""
    in_a_small_file_system(
        short_directory,
        _UNDER_A_STORE
        + """
remount("ro")
goes_on_with_memory_alone()
assert tier.take_events() == [DISABLED], tier.events
remount("rw")
tier.advance(61)
store.sweep()
assert tier.take_events() == [ENABLED]
digests = [put(store, data) for data in small[:8]]
assert [get(store, digest) for digest in digests] == small[:8]
tiers.close()
""",
    )


@needs_mounts
def test_a_directory_removed_under_the_store(short_directory: Path) -> None:
    """As a full disk, until the next start."""
    in_a_small_file_system(
        short_directory,
        _UNDER_A_STORE
        + """
import shutil
for data in small[:8]:
    put(store, data)
shutil.rmtree(tier.path)
goes_on_with_memory_alone()
assert tier.take_events() == [DISABLED], tier.events
store.clear()
store = tiers.open(2 * MIB)
digests = [put(store, data) for data in small[:8]]
assert [get(store, digest) for digest in digests] == small[:8]
tiers.close()
""",
    )
