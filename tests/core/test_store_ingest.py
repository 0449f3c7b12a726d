"""Exactly the announced bytes with the declared digest are stored, or nothing is kept."""

import hashlib
import io
from collections.abc import Callable, Iterator

import pytest

from dgcache_core.aead import CHUNK_BYTES
from dgcache_core.errors import CacheFullError, InvalidReferenceError, MissReason
from dgcache_core.memory_store import MemoryStore
from dgcache_core.store import Ingest, ReadInto
from tests.support.refused_syscalls import MADVISE, REFUSE

from .conftest import MIB
from .support import (
    NIGHTLY,
    RELEASES,
    content,
    digest_of,
    get,
    held,
    put,
    read_all,
    run_python,
)

SIZES = [1, 100, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5]


class SourceError(Exception):
    """What a source of the tests fails with."""


@pytest.fixture
def empty_store(store: MemoryStore) -> Iterator[MemoryStore]:
    """A store that must hold nothing when the test ends: no entry, room, key or counted store."""
    yield store
    status = store.status()
    assert (status.entries, status.bindings, status.blob_bytes) == (0, 0, 0)
    assert (status.reserved_bytes, status.counters.stores) == (0, 0)
    assert len(store._keys._free) == 64
    assert not any(memoryview(store._keys._view))


def reader(data: bytes, error: Exception | None = None) -> ReadInto:
    """Return a source that gives what it has in uneven pieces, then ends or fails."""
    stream = io.BytesIO(data)

    def read(into: memoryview) -> int:
        count = stream.readinto(into[: 1 + len(into) * 2 // 3])
        if not count and error is not None:
            raise error
        return count

    return read


@pytest.mark.parametrize("size", [0, *SIZES])
@pytest.mark.parametrize("declared", [True, False])
def test_any_size_is_stored_in_pieces_of_any_size(
    store: MemoryStore, size: int, declared: bool
) -> None:
    """The digest comes out, whether it was declared or not."""
    data = content(size)
    expected = digest_of(data) if declared else None
    with store.begin(size, RELEASES, expected=expected) as ingest:
        ingest.fill(reader(data))
        assert ingest.commit() == digest_of(data)
    assert get(store, digest_of(data)) == data
    counters = store.status().counters
    assert (counters.stores, counters.stored_bytes) == (1, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("missing", [1, None])
def test_a_source_that_ends_early_is_refused(
    empty_store: MemoryStore, size: int, missing: int | None
) -> None:
    """A byte short, or empty: the message says how far it came."""
    got = 0 if missing is None else size - missing
    with (
        pytest.raises(InvalidReferenceError, match=f"after {got} of {size} bytes"),
        empty_store.begin(size, RELEASES) as ingest,
    ):
        ingest.fill(reader(content(size)[:got]))


@pytest.mark.parametrize("size", [0, *SIZES])
@pytest.mark.parametrize("extra", [1, 2 * CHUNK_BYTES])
def test_a_source_that_goes_on_is_refused(empty_store: MemoryStore, size: int, extra: int) -> None:
    """What grew while it was stored is not what was announced."""
    with (
        pytest.raises(InvalidReferenceError, match=f"more than the {size} bytes"),
        empty_store.begin(size, RELEASES) as ingest,
    ):
        ingest.fill(reader(content(size + extra)))


@pytest.mark.parametrize("size", [0, *SIZES])
def test_another_digest_than_declared_is_refused(empty_store: MemoryStore, size: int) -> None:
    """Both digests are named, and neither is found afterwards."""
    data, declared = content(size), digest_of(b"something else")
    with (
        pytest.raises(InvalidReferenceError, match=f"{declared}.*{digest_of(data)}"),
        empty_store.begin(size, RELEASES, expected=declared) as ingest,
    ):
        ingest.fill(reader(data))
        ingest.commit()
    for digest in (declared, digest_of(data)):
        assert empty_store.miss_reason(RELEASES, digest) is MissReason.UNKNOWN


@pytest.mark.parametrize("after", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 7, 3 * CHUNK_BYTES + 5])
def test_a_source_that_fails_keeps_nothing(empty_store: MemoryStore, after: int) -> None:
    """Its own error comes out, at whatever byte it happens, also where the end was expected."""
    size = 3 * CHUNK_BYTES + 5
    with pytest.raises(SourceError), empty_store.begin(size, RELEASES) as ingest:
        ingest.fill(reader(content(size)[:after], SourceError()))


def not_filled(ingest: Ingest) -> None:
    """Commit at once."""
    ingest.commit()


def filled_twice(ingest: Ingest) -> None:
    """Fill again with other bytes, which the first ones' digest does not name."""
    ingest.fill(reader(b"first"))
    ingest.fill(reader(b"other"))
    ingest.commit()


def filled_again_after_a_failure(ingest: Ingest) -> None:
    """Go on with a store whose source failed."""
    with pytest.raises(SourceError):
        ingest.fill(reader(b"fir", SourceError()))
    ingest.fill(reader(b"first"))
    ingest.commit()


def committed_after_a_failure(ingest: Ingest) -> None:
    """Commit what was filled only in part."""
    with pytest.raises(InvalidReferenceError):
        ingest.fill(reader(b"fir"))
    ingest.commit()


def committed_after_abort(ingest: Ingest) -> None:
    """Commit what was given up."""
    ingest.fill(reader(b"first"))
    ingest.abort()
    ingest.commit()


@pytest.mark.parametrize(
    "wrong",
    [
        not_filled,
        filled_twice,
        filled_again_after_a_failure,
        committed_after_a_failure,
        committed_after_abort,
    ],
)
def test_a_store_is_filled_once_and_committed_once_or_nothing_is_kept(
    empty_store: MemoryStore, wrong: Callable[[Ingest], None]
) -> None:
    """Any other order is refused: a digest never names bytes that were not hashed for it alone."""
    with pytest.raises(InvalidReferenceError), empty_store.begin(5, RELEASES) as ingest:
        wrong(ingest)


def test_bytes_stored_under_a_digest_always_have_it(store: MemoryStore) -> None:
    """Whatever order a caller finds, what a commit names is what a lookup gives."""
    with store.begin(3, RELEASES) as ingest:
        ingest.fill(reader(b"abc"))
        try:
            ingest.fill(reader(b"def"))
            digest = ingest.commit()
        except InvalidReferenceError:
            return
    assert hashlib.sha256(get(store, digest)).hexdigest() == digest


def test_committing_twice_is_refused_and_keeps_the_first(store: MemoryStore) -> None:
    """The entry stays; abort and the end of the block do nothing afterwards."""
    with store.begin(5, RELEASES) as ingest:
        ingest.fill(reader(b"first"))
        digest = ingest.commit()
        with pytest.raises(InvalidReferenceError, match="ended before"):
            ingest.commit()
        ingest.abort()
    assert get(store, digest) == b"first"


def test_aborting_twice_gives_the_room_back_once(empty_store: MemoryStore) -> None:
    """The count of reserved bytes never goes below zero."""
    with empty_store.begin(MIB, RELEASES) as ingest:
        ingest.abort()
        ingest.abort()


def test_a_negative_size_is_refused(empty_store: MemoryStore) -> None:
    """As the caller's mistake."""
    with pytest.raises(InvalidReferenceError, match="negative"):
        empty_store.begin(-1, RELEASES)


def test_memory_the_allocator_has_not_is_cache_full(make_store: Callable[..., MemoryStore]) -> None:
    """The reservation and the key go back, and the refusal is counted."""

    def no_memory(size: int) -> None:
        raise CacheFullError(f"no {size} bytes")

    store = make_store(allocate=no_memory)
    with pytest.raises(CacheFullError, match="bytes"):
        store.begin(100, RELEASES)
    status = store.status()
    assert (status.reserved_bytes, status.counters.refused_stores) == (0, 1)
    assert len(store._keys._free) == 64


REFUSED = (
    REFUSE
    + f"""
import errno
from dgcache_core.errors import CacheFullError
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Deltaspace
store = MemoryStore(1 << 20, 60, may_fork=False, max_entries=8)
refuse({MADVISE}, errno.ENOMEM)
for _ in range(9):
    try:
        store.begin(100_000, Deltaspace("bucket", "prefix"))
        sys.exit("it was stored")
    except CacheFullError:
        pass
status = store.status()
print(status.reserved_bytes, "reserved,", status.counters.refused_stores, "refused")
store.close()
"""
)


def test_memory_that_cannot_be_kept_out_of_dumps_is_cache_full() -> None:
    """The kernel refuses madvise(2); more often than there are keys."""
    assert run_python(REFUSED) == "0 reserved, 9 refused"


def test_many_stores_at_once_are_all_kept(store: MemoryStore) -> None:
    """Twelve in progress at the same time, ended in another order than begun."""
    contents = [content(1000, seed) for seed in range(12)]
    ingests = [store.begin(1000, RELEASES) for _ in contents]

    def nested(number: int) -> Callable[[memoryview], int]:
        """Each source, when it is read, fills the next: all buffers are lent at once."""
        source = reader(contents[number])
        begun = False

        def read(into: memoryview) -> int:
            nonlocal begun
            if not begun:
                begun = True
                if number + 1 < len(ingests):
                    ingests[number + 1].fill(nested(number + 1))
            return source(into)

        return read

    ingests[0].fill(nested(0))
    digests = [ingest.commit() for ingest in reversed(ingests)]
    assert [get(store, digest) for digest in reversed(digests)] == contents
    assert len(store._scratch._idle) <= 8


def test_an_error_that_is_kept_keeps_nothing_from_working(store: MemoryStore) -> None:
    """Its traceback holds on to buffers; clear() and the next store go on all the same."""
    with pytest.raises(SourceError) as kept, store.begin(10, RELEASES) as ingest:
        ingest.fill(reader(b"x", SourceError()))
    store.clear()
    assert get(store, put(store, b"next")) == b"next"
    assert kept.value


# -- storing the same again ---------------------------------------------------------------------


def test_the_same_digest_stored_again_has_another_key(store: MemoryStore) -> None:
    """One entry, one blob; the old key is zero; every binding stays; the ciphertext differs."""
    data = content(5000)
    digest = put(store, data, RELEASES)
    entry = store._entries[digest]
    old_key, old_blob = bytes(entry.key.view), bytes(entry.blob)
    assert put(store, data, NIGHTLY) == digest
    entry = store._entries[digest]
    assert bytes(entry.key.view) != old_key
    assert bytes(entry.blob)[100:] != old_blob[100:]
    assert old_key not in bytes(store._keys._view)
    status = store.status()
    assert (status.entries, status.blob_bytes) == (1, 8192)
    assert store.entries()[0].deltaspaces == [NIGHTLY, RELEASES]
    assert get(store, digest) == data


def test_storing_again_does_not_disturb_who_holds_it(store: MemoryStore) -> None:
    """The holder reads on, and the next lookup shares with him."""
    data = content(5000)
    digest = put(store, data)
    with held(store.lookup(RELEASES, digest)) as handout:
        put(store, data)
        assert read_all(handout) == data
        with held(store.lookup(RELEASES, digest)):
            assert store.status().counters.shared_hits == 1


def test_binding_a_deltaspace_anew_keeps_both_blobs(store: MemoryStore) -> None:
    """Staging and production under the same name both go on hitting."""
    one, two = put(store, b"staging"), put(store, b"production")
    for _ in range(3):
        assert get(store, one) == b"staging"
        assert get(store, two) == b"production"
    assert store.status().counters.misses[MissReason.DIGEST_CHANGED] == 0
