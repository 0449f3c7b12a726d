"""Whatever is done to a file of the tier, it is never served, and somebody hears of it."""

import mmap
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from dgcache_core.aead import CHUNK_BYTES, TAG_BYTES
from dgcache_core.disk_format import MIN_HEADER_BYTES, PREFIX_BYTES
from dgcache_core.disk_records import DiskEventKind
from dgcache_core.disk_store import DiskStore
from dgcache_core.errors import CacheCorruptionError, MissReason
from dgcache_core.ledger import FileState
from dgcache_core.memory import anonymous_memory
from dgcache_core.references import Sha256
from tests.support.disk_regions import FIRST_CHUNK, HEADER_REGIONS

from .support import content
from .tier import Tier, make_it_look_untouched, plaintext, rewrite

DATA = content(2 * CHUNK_BYTES + 100)  # two whole chunks and a short one
SECURITY, CORRUPT, REMOVED, FOREIGN = (
    DiskEventKind.SECURITY,
    DiskEventKind.CORRUPT,
    DiskEventKind.REMOVED,
    DiskEventKind.FOREIGN,
)

REGIONS = {
    **HEADER_REGIONS,
    "first chunk, first byte": FIRST_CHUNK,
    "first chunk, middle": FIRST_CHUNK + CHUNK_BYTES // 2,
    "first chunk, tag": FIRST_CHUNK + CHUNK_BYTES,
    "second chunk": FIRST_CHUNK + CHUNK_BYTES + TAG_BYTES + 1,
    "last chunk": -TAG_BYTES - 1,
    "last tag": -1,
}


def flip_in(path: Path, position: int) -> None:
    """Change one byte of a file in place."""
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes((byte[0] ^ 0x80,)))


def refused(tier: Tier, store: DiskStore, digest: Sha256) -> DiskEventKind:
    """Assert that a load fails, drops the entry, counts it, and tells it once."""
    corruptions = store.status().counters.corruptions
    with pytest.raises(CacheCorruptionError):
        store.load(digest, anonymous_memory, tier.slab)
    assert store.load(digest, anonymous_memory, tier.slab) is None
    assert store.miss_reason(digest) is MissReason.DROPPED_CORRUPT
    assert store.status().counters.corruptions == corruptions + 1
    assert store.status().entries == store.status().bytes == 0
    (kind,) = tier.take_events()
    return kind


def goes_on(tier: Tier, store: DiskStore) -> None:
    """Assert that the same content can be kept and loaded again."""
    assert tier.load(store, tier.keep(store, DATA)) == DATA
    assert store.status().enabled


@pytest.mark.parametrize("region", REGIONS)
def test_a_byte_changed_under_a_running_tier_is_never_served(tier: Tier, region: str) -> None:
    """Wherever it is, the ledger sees it before the file is read."""
    store = tier.open()
    digest = tier.keep(store, DATA)
    path = tier.only_file()
    before = path.stat()
    flip_in(path, REGIONS[region])
    make_it_look_untouched(path, before)
    assert refused(tier, store, digest) is SECURITY
    assert not tier.files()
    goes_on(tier, store)


@pytest.mark.parametrize("region", REGIONS)
def test_a_byte_changed_between_two_lives_is_never_served(tier: Tier, region: str) -> None:
    """Here no ledger helps: the signature, the seal, or the chunk's check does."""
    store = tier.open()
    digest = tier.keep(store, DATA)
    tier.close()
    path = tier.only_file()
    flip_in(path, REGIONS[region])
    store = tier.open()
    foreign = region in ("magic", "version", "key id")
    if store.contains(digest):  # the header is whole
        if region.startswith("seal"):
            assert refused(tier, store, digest) is CORRUPT
        else:
            loaded = store.load(digest, anonymous_memory, tier.slab)
            assert loaded is not None
            with pytest.raises(CacheCorruptionError):
                plaintext(loaded)
            assert store.drop_corrupt(digest)
            assert tier.take_events() == [CORRUPT]
        assert store.status().counters.corruptions == 1
        assert not store.drop_corrupt(digest)
    assert not store.contains(digest)
    assert path.exists() == foreign
    if foreign:
        counters = store.status().counters
        assert counters.foreign_files + counters.other_key_files == 1
    goes_on(tier, store)


@pytest.mark.parametrize("region", REGIONS)
def test_a_disk_that_rots_without_a_trace_is_never_served(tier: Tier, region: str) -> None:
    """The ledger fits, because no system call changed the file: the checks do not."""
    store = tier.open()
    digest = tier.keep(store, DATA)
    path = tier.only_file()
    flip_in(path, REGIONS[region])
    entry = store._table.index.get(digest)
    assert entry is not None
    entry.ledger = FileState.of(path.stat())
    if "chunk" in region or region == "last tag":
        loaded = store.load(digest, anonymous_memory, tier.slab)
        assert loaded is not None
        with pytest.raises(CacheCorruptionError):
            plaintext(loaded)
        assert store.drop_corrupt(digest)
        assert tier.take_events() == [CORRUPT]
    else:
        assert refused(tier, store, digest) is CORRUPT
    assert not tier.files()
    goes_on(tier, store)


@pytest.mark.parametrize("length", [0, 10, PREFIX_BYTES, MIN_HEADER_BYTES, FIRST_CHUNK, 100_000])
def test_a_file_cut_off_is_never_served(tier: Tier, length: int) -> None:
    """Under the running tier, and found by the next one."""
    store = tier.open()
    digest = tier.keep(store, DATA)
    os.truncate(tier.only_file(), length)
    assert refused(tier, store, digest) is SECURITY
    digest = tier.keep(store, DATA)
    tier.close()
    os.truncate(tier.only_file(), length)
    store = tier.open()
    assert tier.take_events() == [CORRUPT]
    assert not store.contains(digest)
    assert not tier.files()
    goes_on(tier, store)


def test_a_file_made_longer_is_never_served(tier: Tier) -> None:
    """A byte at the end is a byte too many."""
    store = tier.open()
    digest = tier.keep(store, DATA)
    tier.close()
    with tier.only_file().open("ab") as file:
        file.write(b"\0")
    store = tier.open()
    assert tier.take_events() == [CORRUPT]
    assert not store.contains(digest)


def test_an_older_signed_file_is_refused_within_one_life(tier: Tier) -> None:
    """Restored in place, or by rename: both are signed by us, and neither is what we wrote last."""
    store = tier.open()
    digest = tier.keep(store, DATA)
    path = tier.only_file()
    older = path.read_bytes()
    for restore in (
        lambda: rewrite(path, older),
        lambda: (tier.path / "older").write_bytes(older) and (tier.path / "older").rename(path),
    ):
        store.forget(digest)
        tier.keep(store, DATA)
        before = path.stat()
        assert len(older) == before.st_size
        restore()
        path.chmod(0o600)
        make_it_look_untouched(path, before)
        assert refused(tier, store, digest) is SECURITY


def test_an_older_signed_file_is_refused_by_its_signature_too(tier: Tier) -> None:
    """Were the ledger forged, the remembered MAC still tells the two apart."""
    store = tier.open()
    digest = tier.keep(store, DATA)
    path = tier.only_file()
    older = path.read_bytes()
    store.forget(digest)
    tier.keep(store, DATA)
    rewrite(path, older)
    entry = store._table.index.get(digest)
    assert entry is not None
    entry.ledger = FileState.of(path.stat())
    assert refused(tier, store, digest) is CORRUPT


def test_a_file_put_back_after_its_removal_is_not_found(tier: Tier) -> None:
    """What we removed is in no index, whatever is there."""
    store = tier.open()
    digest = tier.keep(store, DATA)
    path = tier.only_file()
    older = path.read_bytes()
    store.forget(digest)
    path.write_bytes(older)
    path.chmod(0o600)
    assert store.load(digest, anonymous_memory, tier.slab) is None
    assert not store.contains(digest)
    goes_on(tier, store)  # and is replaced by what is kept next


def test_a_file_under_the_name_of_another_is_never_served(tier: Tier) -> None:
    """Two files of ours exchanged between two lives: each has a name that is not its own."""
    store = tier.open()
    digests = [tier.keep(store, content(5000, seed)) for seed in range(2)]
    tier.close()
    one, other = tier.files()
    aside = tier.path / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    store = tier.open()
    assert not any(map(store.contains, digests))
    assert tier.take_events() == [CORRUPT, CORRUPT]


def a_link(path: Path, elsewhere: Path) -> None:
    shutil.copyfile(path, elsewhere)
    elsewhere.chmod(0o600)
    path.unlink()
    path.symlink_to(elsewhere)


def a_hard_link(path: Path, elsewhere: Path) -> None:
    elsewhere.hardlink_to(path)


def a_fifo(path: Path, elsewhere: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def a_directory(path: Path, elsewhere: Path) -> None:
    path.unlink()
    path.mkdir(0o700)


def a_socket(path: Path, elsewhere: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        directory = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
        listener.bind(f"/proc/self/fd/{directory}/s")
        os.close(directory)
    (path.parent / "s").rename(path)


def another_mode(path: Path, elsewhere: Path) -> None:
    path.chmod(0o644)


def no_mode(path: Path, elsewhere: Path) -> None:
    path.chmod(0)


def another_file(path: Path, elsewhere: Path) -> None:
    elsewhere.write_bytes(path.read_bytes())
    elsewhere.chmod(0o600)
    elsewhere.rename(path)


def a_write_through_a_mapping(path: Path, elsewhere: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[FIRST_CHUNK] ^= 1


def an_overwrite(path: Path, elsewhere: Path) -> None:
    flip_in(path, FIRST_CHUNK)


def skip_where_nobody_times_mappings(
    change: Callable[[Path, Path], None], path: Path, before: os.stat_result
) -> None:
    """On tmpfs only the chunk's check sees a write through a mapping."""
    if change is a_write_through_a_mapping and FileState.of(path.stat()) == FileState.of(before):
        pytest.skip("this file system does not time writes through a mapping")


CHANGES = [
    *(a_link, a_hard_link, a_fifo, a_directory, a_socket, another_mode, no_mode),
    *(another_file, a_write_through_a_mapping, an_overwrite),
]
LEFT_ALONE = (a_fifo, a_directory, a_socket)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_a_finding_and_gone(
    tier: Tier, change: Callable[[Path, Path], None]
) -> None:
    """The audit names it, raises an alarm, and invalidates the entry at once."""
    store = tier.open()
    digest = tier.keep(store, DATA)
    path, elsewhere = tier.only_file(), tier.path / "elsewhere"
    assert store.audit_all() == []
    before = path.stat()
    change(path, elsewhere)
    skip_where_nobody_times_mappings(change, path, before)
    if path.is_file():
        make_it_look_untouched(path, before)
    (finding,) = store.audit_all()
    assert (finding.kind, finding.name) == (SECURITY, str(path.relative_to(tier.path)))
    assert tier.take_events()[-1] is SECURITY
    assert store.load(digest, anonymous_memory, tier.slab) is None
    assert store.status().counters.alarms == 1
    assert store.audit_all() == []
    assert path.is_dir() == (change is a_directory)
    if change is a_link:
        assert not path.is_symlink()
        assert elsewhere.exists()  # the link went, not what it led to


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_refused_where_nobody_audits(
    tier: Tier, change: Callable[[Path, Path], None]
) -> None:
    """The load itself sees it, follows no link and waits for no FIFO."""
    store = tier.open()
    digest = tier.keep(store, DATA)
    path, elsewhere = tier.only_file(), tier.path / "elsewhere"
    before = path.stat()
    change(path, elsewhere)
    skip_where_nobody_times_mappings(change, path, before)
    with pytest.raises(CacheCorruptionError):
        store.load(digest, anonymous_memory, tier.slab)
    assert SECURITY in tier.take_events()
    assert store.load(digest, anonymous_memory, tier.slab) is None
    assert store.status().enabled
    if change is a_directory:
        assert not store.keep(tier.blob(DATA))  # it is in the way, and nothing of ours to remove
        assert store.status().enabled
    else:
        goes_on(tier, store)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_refused_by_the_next_life(
    tier: Tier, change: Callable[[Path, Path], None]
) -> None:
    """Found at start: an event each; ours and links are removed, what is no file is left alone."""
    store = tier.open()
    digest = tier.keep(store, DATA)
    tier.close()
    path, elsewhere = tier.only_file(), tier.path / "elsewhere"
    change(path, elsewhere)
    store = tier.open()
    kinds = tier.take_events()
    if change is another_file:  # whole, ours, and there before us: it is what it says it is
        assert tier.load(store, digest) == DATA
        return
    if change in (a_write_through_a_mapping, an_overwrite):  # the chunks are judged where used
        loaded = store.load(digest, anonymous_memory, tier.slab)
        assert loaded is not None
        with pytest.raises(CacheCorruptionError):
            plaintext(loaded)
        return
    left_alone = change in LEFT_ALONE or (change is no_mode and os.geteuid() != 0)
    assert kinds == [FOREIGN if left_alone else SECURITY]
    assert not store.contains(digest)
    assert os.path.lexists(path) == left_alone
    assert elsewhere.exists() == (change in (a_link, a_hard_link))


@pytest.mark.parametrize("level", [1, 2])
def test_a_link_instead_of_a_directory_is_removed_and_never_followed(
    tier: Tier, level: int, short_directory: Path
) -> None:
    """Neither the load nor the next write goes where it leads."""
    store = tier.open()
    digest = tier.keep(store, DATA)
    path = tier.only_file()
    directory = path.parent if level == 2 else path.parent.parent
    moved = short_directory / "moved"
    directory.rename(moved)
    directory.symlink_to(moved)
    before = sorted(moved.rglob("*"))
    assert refused(tier, store, digest) is SECURITY
    assert not directory.is_symlink()
    assert sorted(moved.rglob("*")) == before
    goes_on(tier, store)
    assert sorted(moved.rglob("*")) == before


@pytest.mark.parametrize("where", ["entries", "new"])
def test_a_link_in_the_way_of_a_write_is_removed(
    tier: Tier, short_directory: Path, where: str
) -> None:
    """The write fails this once, with an alarm, and the next one succeeds."""
    store = tier.open()
    digest = tier.keep(store, DATA)
    top = tier.path / "new" if where == "new" else tier.only_file().parent.parent
    store.forget(digest)
    shutil.rmtree(top)
    elsewhere = short_directory / "elsewhere"
    elsewhere.mkdir(0o700)
    top.symlink_to(elsewhere)
    assert not store.keep(tier.blob(DATA))
    assert tier.take_events() == [SECURITY]
    goes_on(tier, store)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777, 0o000])
def test_a_directory_open_to_others_is_refused(tier: Tier, mode: int) -> None:
    """Neither read nor written in; the rest of the tier goes on."""
    store = tier.open()
    digest = tier.keep(store, DATA)
    directory = tier.only_file().parent
    directory.chmod(mode)
    assert refused_by_directory(tier, store, digest)
    assert not store.keep(tier.blob(DATA))
    assert store.status().enabled
    directory.chmod(0o700)
    goes_on(tier, store)


def refused_by_directory(tier: Tier, store: DiskStore, digest: Sha256) -> bool:
    """Assert that a load is refused and the entry gone."""
    with pytest.raises(CacheCorruptionError):
        store.load(digest, anonymous_memory, tier.slab)
    return SECURITY in tier.take_events() and not store.contains(digest)


def test_a_removed_file_is_a_miss_and_no_alarm(tier: Tier) -> None:
    """Whoever tidies up does no harm: told as removed, by load and by audit."""
    store = tier.open()
    one, two = (tier.keep(store, content(5000, seed)) for seed in range(2))
    for path in tier.files():
        path.unlink()
    assert store.load(one, anonymous_memory, tier.slab) is None
    (finding,) = store.audit_all()
    assert finding.kind is REMOVED
    assert tier.take_events() == [REMOVED, REMOVED]
    assert not store.contains(two)
    assert store.status().counters.alarms == store.status().counters.corruptions == 0
    assert store.status().enabled
