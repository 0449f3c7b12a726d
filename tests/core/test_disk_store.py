"""What is kept on disk comes back, within the budget and its time, and tells nothing by itself."""

import os
import stat
from pathlib import Path

import pytest

from dgcache_core.aead import CHUNK_BYTES, Frame
from dgcache_core.disk_format import MIN_HEADER_BYTES, body_bytes
from dgcache_core.disk_records import DiskEventKind, StoredBlob
from dgcache_core.disk_store import DiskStore
from dgcache_core.errors import (
    CacheCorruptionError,
    CacheFullError,
    CacheUnavailableError,
    MissReason,
)
from dgcache_core.keyslab import KeySlab
from dgcache_core.ledger import FileState
from dgcache_core.memory import anonymous_memory, page_rounded
from dgcache_core.references import Deltaspace

from .support import NIGHTLY, RELEASES, content, digest_of, flip
from .tier import DAY, MIB, Tier, plaintext, some

FILE_BYTES = page_rounded(MIN_HEADER_BYTES + body_bytes(Frame(5000, 0, 0)))


@pytest.mark.parametrize(
    "size",
    [0, 1, 5000, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES + 7],
)
@pytest.mark.parametrize("key", [None, bytes(32)], ids=["ephemeral", "persistent"])
def test_what_is_kept_is_loaded(tier: Tier, size: int, key: bytes | None) -> None:
    """Byte for byte, at every boundary, with frame, deltaspaces and what is left of its time."""
    store, data = tier.open(key), content(size)
    stored = tier.blob(data, [RELEASES, NIGHTLY])
    assert store.keep(stored)
    tier.advance(100)
    loaded = store.load(stored.sha256, anonymous_memory, tier.slab)
    assert loaded is not None
    assert loaded.frame == stored.frame
    assert loaded.deltaspaces == [NIGHTLY, RELEASES]
    assert loaded.expires_in_seconds == DAY - 100
    assert bytes(loaded.blob) == bytes(stored.blob)
    assert plaintext(loaded) == data
    assert not tier.events


def test_what_is_not_there_is_a_miss(tier: Tier) -> None:
    """None, and a reason; no event."""
    store, digest = tier.open(), digest_of(b"unknown")
    assert tier.load(store, digest) is None
    assert not store.contains(digest)
    assert store.miss_reason(digest) is MissReason.UNKNOWN
    assert store.forget(digest) == 0
    assert not tier.events


def test_a_blob_is_written_once(tier: Tier) -> None:
    """Kept again, the file stays the very same; the deltaspace is bound to it."""
    store = tier.open()
    digest = tier.keep(store, b"content")
    before = tier.only_file().stat()
    tier.keep(store, b"content", [NIGHTLY])
    after = tier.only_file().stat()
    assert (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns)
    (entry,) = store.entries()
    assert (entry.sha256, entry.deltaspaces) == (digest, [NIGHTLY, RELEASES])
    assert store.status().counters.keeps == 1


def test_a_file_is_private_from_its_first_moment(
    tier: Tier, monkeypatch: pytest.MonkeyPatch, any_umask: None
) -> None:
    """0600 in directories of 0700, made exclusively, whatever the umask."""
    opens = []
    real_open = os.open

    def watched(path: "str | Path", flags: int, mode: int = 0o777, **rest: int) -> int:
        if flags & os.O_CREAT:
            opens.append((flags, mode))
        return real_open(path, flags, mode, **rest)

    for umask in (0, 0o777):
        os.umask(umask)
        store = tier.open()
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", watched)
            tier.keep(store, str(umask).encode())
    os.umask(0o022)
    for flags, mode in opens:
        assert flags & os.O_EXCL
        assert flags & os.O_NOFOLLOW
        assert mode == 0o600
    assert len(opens) == 2
    for path in tier.path.rglob("*"):
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_files_tell_nothing_of_what_is_in_them(tier: Tier) -> None:
    """Neither names nor bytes hold content, digest, bucket, prefix, or a key."""
    space = Deltaspace("secret-bucket-name", "secret/prefix")
    data = b"plaintext of a reference " * 1000
    store, stored = tier.open(), tier.blob(data, [space])
    assert store.keep(stored)
    seen = b"".join(
        str(path).encode() + (path.read_bytes() if path.is_file() else b"")
        for path in tier.path.rglob("*")
    )
    secrets = [
        *(b"plaintext of", b"secret-bucket-name", b"secret/prefix"),
        *(bytes(stored.key), bytes(stored.key).hex().encode()),
        *(stored.sha256.encode(), bytes.fromhex(stored.sha256)),
    ]
    assert [seen.count(secret) for secret in secrets] == [0] * len(secrets)
    assert bytes(stored.blob[-1000:]) in seen  # what is sealed is there as it is


def test_the_length_of_names_does_not_show(tier: Tier) -> None:
    """Two entries of one size have files of one size."""
    store = tier.open()
    tier.keep(store, content(5000, 1), [Deltaspace("b", "")])
    tier.keep(store, content(5000, 2), [Deltaspace("b" * 200, "p" * 200)])
    assert len({path.stat().st_size for path in tier.files()}) == 1


# -- removing ------------------------------------------------------------------------------------


def test_a_forgotten_entry_is_gone_with_its_file(tier: Tier) -> None:
    """Its content's bytes are returned; a second time there is nothing."""
    store = tier.open()
    digest = tier.keep(store, content(5000))
    assert store.forget(digest) == 5000
    assert not tier.files()
    assert tier.load(store, digest) is None
    assert store.miss_reason(digest) is MissReason.EVICTED
    assert store.forget(digest) == 0


def test_the_last_binding_that_goes_frees_the_entry(tier: Tier) -> None:
    """Content is counted: one deltaspace of two leaves it, also where it was bound later."""
    store = tier.open()
    shared = tier.keep(store, content(5000), [RELEASES])
    own = tier.keep(store, content(6000), [RELEASES])
    store.bind(NIGHTLY, shared)
    freed = store.evict(RELEASES)
    assert (freed.entries, freed.bytes) == (1, 6000)
    assert store.contains(shared)
    assert not store.contains(own)
    freed = store.evict(NIGHTLY)
    assert (freed.entries, freed.bytes) == (1, 5000)
    assert not tier.files()
    assert store.evict(NIGHTLY).entries == 0


def test_a_cleared_tier_is_empty(tier: Tier) -> None:
    """Every entry's file is gone, and the tier goes on."""
    store = tier.open()
    digests = [tier.keep(store, data) for data in some(5)]
    freed = store.clear()
    assert (freed.entries, freed.bytes) == (5, 25_000)
    assert not tier.files()
    assert not any(map(store.contains, digests))
    tier.keep(store, b"afterwards")
    assert not tier.events


def test_the_one_used_longest_ago_leaves_first(tier: Tier) -> None:
    """A load counts as use; the budget is never exceeded."""
    store = tier.open(max_bytes=3 * FILE_BYTES)
    one, two, three = (tier.keep(store, data) for data in some(3))
    assert tier.load(store, one) is not None
    four = tier.keep(store, content(5000, seed=4))
    assert [store.contains(digest) for digest in (one, two, three, four)] == [1, 0, 1, 1]
    assert store.miss_reason(two) is MissReason.EVICTED
    assert store.status().counters.evictions == 1
    assert store.status().bytes == 3 * FILE_BYTES
    assert len(tier.files()) == 3


def test_the_budget_counts_what_files_take(tier: Tier) -> None:
    """200 entries later the files on disk are no more than the budget."""
    store = tier.open(max_bytes=20 * FILE_BYTES)
    for data in some(200):
        tier.keep(store, data)
        on_disk = sum(page_rounded(path.stat().st_size) for path in tier.files())
        assert on_disk == store.status().bytes <= 20 * FILE_BYTES
    assert [entry.sha256 for entry in store.entries()] == [
        digest_of(data) for data in some(200)[:-21:-1]
    ]


def test_what_exceeds_the_budget_is_refused_and_evicts_nobody(tier: Tier) -> None:
    """A blob that could never fit is not written at all."""
    store = tier.open(max_bytes=3 * FILE_BYTES)
    small = tier.keep(store, content(5000))
    large = tier.blob(content(3 * FILE_BYTES))
    assert not store.keep(large)
    assert store.contains(small)
    assert store.miss_reason(large.sha256) is MissReason.TOO_LARGE
    assert not tier.events


def test_an_expired_entry_is_gone(tier: Tier) -> None:
    """A load finds nothing, and a sweep removes the files of all."""
    store = tier.open()
    digests = [tier.keep(store, data) for data in some(3)]
    tier.advance(DAY - 1)
    assert tier.load(store, digests[0]) is not None
    tier.advance(1)
    assert tier.load(store, digests[0]) is None
    assert store.miss_reason(digests[1]) is MissReason.EXPIRED
    assert not store.entries()
    store.sweep()
    assert not tier.files()
    assert store.status().counters.expirations == 3


@pytest.mark.parametrize("jump", [-10, 10])
def test_a_jump_of_the_wall_clock_changes_no_entry_of_this_life(tier: Tier, jump: int) -> None:
    """Within one life only the clock that does not jump counts."""
    store = tier.open()
    digest = tier.keep(store, b"content")
    tier.wall.advance(jump * 365 * DAY)
    store.sweep()
    assert tier.load(store, digest) == b"content"
    tier.clock.advance(DAY)
    assert tier.load(store, digest) is None


def test_what_has_expired_is_not_written(tier: Tier) -> None:
    """By the wall clock, by what the caller says is left, and where it is from the future."""
    store = tier.open()
    stored = tier.blob(b"content")
    tier.wall.advance(-1)
    assert not store.keep(stored)
    tier.wall.advance(DAY + 1)
    assert not store.keep(stored)
    left = StoredBlob(
        stored.frame, stored.sha256, stored.blob, stored.key, [RELEASES], expires_in_seconds=0
    )
    assert not store.keep(left)
    assert not tier.files()


def test_what_is_left_may_be_told_by_a_clock_that_does_not_jump(tier: Tier) -> None:
    """Then a jump between a store in memory and its way to disk does no harm."""
    store, stored = tier.open(), tier.blob(b"content")
    tier.wall.advance(-10 * 365 * DAY)
    left = StoredBlob(
        stored.frame, stored.sha256, stored.blob, stored.key, [RELEASES], expires_in_seconds=50
    )
    assert store.keep(left)
    (entry,) = store.entries()
    assert (entry.expires_in_seconds, entry.age_seconds) == (50, DAY - 50)


# -- what is wrong in memory ---------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 20, 40, 70, 90, 5000, -1])
def test_what_rotted_in_memory_is_never_made_durable(tier: Tier, position: int) -> None:
    """Header, seal, chunk and tag are checked before a file has its name."""
    store, stored = tier.open(), tier.blob(content(3 * MIB))
    flip(stored.blob, position)
    assert not store.keep(stored)
    assert not tier.files()
    assert not list((tier.path / "new").iterdir())
    assert tier.take_events() == [DiskEventKind.CORRUPT]
    assert store.status().enabled


def test_a_blob_of_another_reference_is_not_written(tier: Tier) -> None:
    """The digest it is announced with must be the one it vouches for."""
    store, stored = tier.open(), tier.blob(b"content")
    wrong = StoredBlob(stored.frame, digest_of(b"other"), stored.blob, stored.key, [RELEASES])
    assert not store.keep(wrong)
    assert not tier.files()


def test_a_load_without_room_leaves_everything_as_it_was(tier: Tier) -> None:
    """No memory or no key slot is the caller's trouble: the entry stays."""
    store = tier.open()
    digest = tier.keep(store, b"content")
    one_slot = KeySlab(1, may_fork=True)
    taken = one_slot.new_key()

    def no_memory(_: int) -> "object":
        raise CacheFullError("no memory")

    with pytest.raises(CacheFullError):
        store.load(digest, anonymous_memory, one_slot)
    with pytest.raises(CacheFullError):
        store.load(digest, no_memory, tier.slab)  # type: ignore[arg-type] # it returns nothing
    taken.erase()
    loaded = store.load(digest, anonymous_memory, one_slot)
    assert loaded is not None
    assert plaintext(loaded) == b"content"
    one_slot.close()
    assert not tier.events


def test_a_failed_load_gives_its_slot_back(tier: Tier) -> None:
    """The seal fails after the key was unwrapped: the slot is free again, the mapping closed."""
    store = tier.open()
    digest = tier.keep(store, b"content")
    one_slot = KeySlab(1, may_fork=True)
    path = tier.only_file()
    with path.open("r+b") as file:
        file.seek(MIN_HEADER_BYTES)  # the first byte of the seal
        file.write(b"\0" if path.read_bytes()[MIN_HEADER_BYTES] else b"\1")
    entry = store._table.index.get(digest)
    assert entry is not None
    entry.ledger = FileState.of(path.stat())  # as if the disk itself had rotted
    with pytest.raises(CacheCorruptionError, match="header failed its check"):
        store.load(digest, anonymous_memory, one_slot)
    assert one_slot.has_free_slot
    one_slot.close()
    assert not tier.files()


# -- closing -------------------------------------------------------------------------------------


def test_a_closed_store_says_no_to_everything(tier: Tier) -> None:
    """Nothing is raised, except where new keys were asked for: that promise was not kept."""
    store = tier.open()
    digest, stored = tier.keep(store, b"content"), tier.blob(b"other")
    store.close()
    store.close()
    assert not store.keep(stored)
    assert store.load(digest, anonymous_memory, tier.slab) is None
    assert not store.contains(digest)
    assert store.forget(digest) == 0
    assert store.evict(RELEASES).entries == 0
    assert store.audit_all() == store.audit(tier.only_file()) == []
    assert store.watched_directories() == []
    store.sweep()
    assert not store.drop_corrupt(digest)
    assert store.clear().entries == 0
    with pytest.raises(CacheUnavailableError, match="closed"):
        store.clear(rekey=True)


def test_an_ephemeral_tier_leaves_no_entry_behind(tier: Tier) -> None:
    """Closed, it removes its files: nobody could ever read them."""
    store = tier.open(None)
    tier.keep(store, b"content")
    store.close()
    assert not tier.files()
    assert not DiskStore.status(store).persistent


def test_directories_are_told_of_as_they_are_made(tier: Tier) -> None:
    """Whoever watches knows each directory that entries are in, once."""
    store = tier.open()
    for data in some(20):
        tier.keep(store, data)
    parents = {path.parent for path in tier.files()}
    assert parents <= set(tier.made)
    assert len(tier.made) == len(set(tier.made))
    assert set(store.watched_directories()) == set(tier.made) | {tier.path}
