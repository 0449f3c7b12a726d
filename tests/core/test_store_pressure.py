"""A lower limit takes what is idle, and nothing that somebody reads, holds or stores."""

import io
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from dgcache_core.errors import CacheFullError, CacheMissError, MissReason
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Deltaspace
from dgcache_core.store import Freed

from .conftest import MIB
from .support import NIGHTLY, RELEASES, content, digest_of, get, held, put, read_all
from .test_store_budget import SEALED, SMALL, fill, stored

MakeStore = Callable[..., MemoryStore]


def test_a_lower_limit_evicts_what_was_used_longest_ago(make_store: MakeStore) -> None:
    """As many as needed, with `pressure` as the reason, and counted apart from other evictions."""
    store = make_store(max_bytes=8 * SEALED)
    digests = fill(store, 5)
    get(store, digests[0], Deltaspace("b", "0"))
    assert store.set_limit(3 * SEALED) == Freed(entries=2, bytes=2 * SEALED)
    assert stored(store) == [digests[3], digests[4], digests[0]]
    status = store.status()
    assert (status.limit_bytes, status.max_bytes) == (3 * SEALED, 8 * SEALED)
    assert (status.counters.pressure_evictions, status.counters.evictions) == (2, 0)
    with pytest.raises(CacheMissError) as miss:
        store.lookup(Deltaspace("b", "1"), digests[1])
    assert miss.value.reason is MissReason.PRESSURE
    assert store.status().counters.misses[MissReason.PRESSURE] == 1


def test_new_entries_keep_to_the_limit_in_force(make_store: MakeStore) -> None:
    """They evict as ever; what is too large for now is refused, and the reason is not its size."""
    store = make_store(max_bytes=64 * SEALED)
    store.set_limit(4 * SEALED)
    fill(store, 6)
    assert len(store.entries()) == 4
    assert store.status().counters.evictions == 2
    large = content(3 * SEALED)
    assert len(large) <= store.max_entry_bytes
    with pytest.raises(CacheFullError, match="memory is short"):
        put(store, large, expected=digest_of(large))
    assert store.miss_reason(RELEASES, digest_of(large)) is MissReason.PRESSURE
    store.set_limit(64 * SEALED)
    assert get(store, put(store, large)) == large


def test_a_higher_limit_is_the_budget_at_the_most(store: MemoryStore) -> None:
    """Raising it frees nothing, and more than the budget means the budget."""
    store.set_limit(MIB)
    assert store.set_limit(1 << 60) == Freed()
    assert store.status().limit_bytes == store.status().max_bytes == 32 * MIB
    store.set_limit(-5)
    assert store.status().limit_bytes == 0


def test_a_held_handout_stays_readable_to_its_end(make_store: MakeStore) -> None:
    """At a limit of nothing its entry goes, its bytes stay, and count until they are let go."""
    store = make_store(max_bytes=32 * MIB)
    data = content(5 * MIB)
    digest = put(store, data)
    with held(store.lookup(RELEASES, digest)) as handout:
        assert store.set_limit(0).entries == 1
        assert store.status().handout_bytes == 5 * MIB
        assert read_all(handout) == data
    assert store.set_limit(0) == Freed()
    assert store.status().handout_bytes == 0


def test_what_is_being_read_is_not_evicted(store: MemoryStore) -> None:
    """An entry in decryption stays; the lookup that reads it ends well, the next limit takes it."""
    data = content(3 * MIB)
    digest = put(store, data)
    during: list[Freed] = []
    decrypt = store._decrypt

    def decrypt_under_pressure(entry: object) -> int:
        during.append(store.set_limit(0))
        return decrypt(entry)  # type: ignore[arg-type]

    with ExitStack() as stack:
        store._decrypt = decrypt_under_pressure  # type: ignore[assignment, method-assign]
        handout = stack.enter_context(held(store.lookup(RELEASES, digest)))
        assert during == [Freed()]
        assert read_all(handout) == data
        assert store.set_limit(0).entries == 1


def test_a_store_in_progress_ends_well(store: MemoryStore) -> None:
    """What was reserved stays reserved; what was stored meanwhile leaves at the next limit."""
    data = content(2 * MIB)
    with store.begin(len(data), NIGHTLY) as ingest:
        store.set_limit(0)
        ingest.fill(io.BytesIO(data).readinto)
        assert ingest.commit() == digest_of(data)
    assert len(store.entries()) == 1
    assert store.set_limit(0).entries == 1
    assert store.status().blob_bytes == 0


def test_the_largest_entry_that_clients_hear_of_does_not_change(store: MemoryStore) -> None:
    """They hear it once, in Hello; a limit passes."""
    before = store.max_entry_bytes
    store.set_limit(MIB)
    assert store.max_entry_bytes == before == store.status().max_entry_bytes


def test_a_closed_store_has_a_limit_too(store: MemoryStore) -> None:
    """The watcher may come a moment too late."""
    put(store, content(SMALL))
    store.close()
    assert store.set_limit(0) == Freed()
