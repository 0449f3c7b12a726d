"""What a former life left: with its key it is found again, else it is removed or left alone."""

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dgcache_core import disk_scan, disk_store
from dgcache_core.disk_format import VERSION
from dgcache_core.disk_names import tier_directory
from dgcache_core.disk_records import DiskEventKind
from dgcache_core.disk_store import DiskStore
from dgcache_core.errors import (
    CacheRefusedError,
    CacheUnavailableError,
    MissReason,
    SettingsError,
)
from dgcache_core.ledger import FileState
from dgcache_core.memory import anonymous_memory
from dgcache_core.runtime_directory import machine_key

from .support import NIGHTLY, RELEASES, content, digest_of, run_python
from .tier import DAY, OTHER_TIER_KEY, TIER_KEY, YEAR, Tier, rewrite, some

SECURITY, CORRUPT, FOREIGN = (
    DiskEventKind.SECURITY,
    DiskEventKind.CORRUPT,
    DiskEventKind.FOREIGN,
)


def test_with_its_key_a_tier_outlives_the_process(tier: Tier) -> None:
    """Contents, deltaspaces, what is left of the time, and the order in which they leave."""
    store = tier.open()
    digests = []
    for data in some(3):
        digests.append(tier.keep(store, data, [RELEASES, NIGHTLY]))
        tier.advance(10)
    store = tier.open()
    assert [entry.sha256 for entry in store.entries()] == digests[::-1]
    assert [entry.expires_in_seconds for entry in store.entries()] == [DAY - 10, DAY - 20, DAY - 30]
    assert store.entries()[0].age_seconds == 10
    assert store.entries()[0].deltaspaces == [NIGHTLY, RELEASES]
    assert [tier.load(store, digest) for digest in digests] == some(3)
    status = store.status()
    assert (status.entries, status.bindings, status.is_scanned) == (3, 6, True)
    assert not tier.events


def test_a_tier_outlives_a_real_process(tier: Tier) -> None:
    """Written by one process that is killed, read by another."""
    program = """
import os, sys
from pathlib import Path
from typing import Any
from dgcache_core.disk_store import DiskStore
from tests.core.tier import TIER_KEY, Tier
tier = Tier(Path(sys.argv[1]))
store = tier.open()
tier.keep(store, b"written by somebody who is no more")
os.kill(os.getpid(), 9)
"""
    with pytest.raises(AssertionError, match="exit status -9"):
        run_python(program, str(tier.path))
    digest = digest_of(b"written by somebody who is no more")
    assert tier.load(tier.open(), digest) == b"written by somebody who is no more"


def test_a_later_binding_is_forgotten_with_the_process(tier: Tier) -> None:
    """Only the deltaspaces that were known at the time of writing are in the file."""
    store = tier.open()
    digest = tier.keep(store, b"content", [RELEASES])
    store.bind(NIGHTLY, digest)
    assert store.entries()[0].deltaspaces == [NIGHTLY, RELEASES]
    store = tier.open()
    assert store.entries()[0].deltaspaces == [RELEASES]
    assert store.evict(RELEASES).entries == 1
    assert not tier.files()


def test_files_of_a_lost_key_are_removed(tier: Tier) -> None:
    """An ephemeral key died with its process, however that ended."""
    store = tier.open(None)
    digest = tier.keep(store, b"content")
    store._ring.close(store._directory.close)  # as a kill would: without the tidying
    assert tier.files()
    for key in (None, TIER_KEY):
        store = tier.open(key)
        assert not tier.files()
        assert not store.contains(digest)
    assert not tier.events


def test_files_of_another_key_are_left_alone_and_counted(tier: Tier) -> None:
    """They are found again by whoever has that key, also after we have cleared ours."""
    digest = tier.keep(tier.open(TIER_KEY), b"content")
    store = tier.open(OTHER_TIER_KEY)
    assert not store.contains(digest)
    assert store.status().counters.other_key_files == 1
    tier.keep(store, b"content")
    assert store.clear(rekey=True).entries == 1
    store = tier.open(None)
    store.clear(rekey=True)
    assert tier.load(tier.open(TIER_KEY), digest) == b"content"
    assert not tier.events


@pytest.mark.parametrize("years", [-10, 10])
def test_after_a_jump_of_the_wall_clock_entries_have_expired(tier: Tier, years: int) -> None:
    """Ten years later they are too old; ten years earlier they were made in the future."""
    digest = tier.keep(tier.open(), b"content")
    tier.wall.advance(years * YEAR)
    store = tier.open()
    assert not store.contains(digest)
    assert not tier.files()
    assert store.status().counters.expirations == 1
    assert not tier.events


def test_an_entry_expires_at_its_second_across_restarts(tier: Tier) -> None:
    """What is left is counted from when it was made, not from when it was found."""
    digest = tier.keep(tier.open(), b"content")
    tier.advance(DAY - 1)
    store = tier.open()
    assert store.contains(digest)
    tier.clock.advance(1)
    assert not store.contains(digest)
    tier.keep(store, b"other")
    tier.advance(DAY)
    assert not tier.open().contains(digest_of(b"other"))


def test_a_smaller_budget_is_kept_from_the_start(tier: Tier) -> None:
    """The oldest leave; nobody is told, since nothing is wrong."""
    store = tier.open()
    digests = []
    for data in some(6):
        digests.append(tier.keep(store, data))
        tier.advance(1)
    store = tier.open(max_bytes=2 * 8192)
    assert [store.contains(digest) for digest in digests] == [False] * 4 + [True] * 2
    assert len(tier.files()) == 2
    assert not tier.events


# -- a new generation ----------------------------------------------------------------------------


def copies_of(tier: Tier) -> dict[Path, bytes]:
    """Copy every file of every entry."""
    return {path: path.read_bytes() for path in tier.files()}


def restore(files: dict[Path, bytes]) -> None:
    """Put files back, as whoever kept a copy would."""
    for path, data in files.items():
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o600)


@pytest.mark.parametrize("key", [None, TIER_KEY])
def test_a_cleared_tier_with_new_keys_reads_no_copy_of_before(
    tier: Tier, key: bytes | None
) -> None:
    """Restored at once or between two lives, with names and all: nothing opens."""
    store = tier.open(key)
    digests = [tier.keep(store, data) for data in some(3)]
    copies = copies_of(tier)
    freed = store.clear(rekey=True)
    assert (freed.entries, freed.bytes) == (3, 15_000)
    assert not tier.files()
    restore(copies)
    assert not any(map(store.contains, digests))
    kept = tier.keep(store, b"afterwards")
    assert tier.load(store, kept) == b"afterwards"
    restore(copies)
    store = tier.open(key)
    assert not any(map(store.contains, digests))
    assert not set(copies) & set(tier.files())  # unreadable for ever, so removed
    assert store.contains(kept) == (key is not None)
    assert not tier.events


def test_without_new_keys_a_copy_can_be_restored_between_two_lives(tier: Tier) -> None:
    """The limit that SECURITY.md tells of, bounded by the time an entry has."""
    store = tier.open()
    digest = tier.keep(store, b"content")
    copies = copies_of(tier)
    store.clear()
    tier.close()
    restore(copies)
    assert tier.load(tier.open(), digest) == b"content"
    tier.close()
    tier.advance(DAY)
    restore(copies)
    assert not tier.open().contains(digest)


def test_nothing_restored_while_we_run_is_taken_in(tier: Tier) -> None:
    """Also where the scan has not yet come to it: it was changed after we had opened."""
    store = tier.open()
    digest = tier.keep(store, b"content")
    copies = copies_of(tier)
    store.clear()
    store = open_unscanned(tier)
    tier.tick()
    restore(copies)
    assert not store.contains(digest)
    assert tier.take_events() == [SECURITY]
    assert not tier.files()


def test_a_clock_set_back_between_two_lives_is_no_alarm(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was changed in the future counts as expired, whatever its header says."""
    tier.keep(tier.open(), b"content")
    tier.close()
    seconds = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: seconds)
    store = tier.open()
    assert store.status().entries == 0
    assert store.status().counters.expirations == 1
    assert not tier.files()
    assert not tier.events


def generation_file(tier: Tier) -> Path:
    """Return the one file that keeps the generation."""
    (path,) = tier.path.glob("generation-*")
    return path


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: rewrite(path, bytes(byte ^ 1 for byte in path.read_bytes())),
        lambda path: rewrite(path, b""),
        lambda path: rewrite(path, path.read_bytes() + b"\0"),
        lambda path: path.chmod(0o644),
        lambda path: path.with_name("aside").hardlink_to(path),
        lambda path: (
            path.rename(path.with_name("x")).rename(path.with_name("y")) and path.symlink_to("y")
        ),
        lambda path: path.unlink() or os.mkfifo(path, 0o600),
    ],
    ids=["flipped", "emptied", "longer", "mode", "hard link", "link", "FIFO"],
)
def test_a_damaged_generation_begins_a_new_one(tier: Tier, damage: "object") -> None:
    """An alarm, entries that nobody can read are removed, and the tier works."""
    digest = tier.keep(tier.open(), b"content")
    tier.close()
    damage(generation_file(tier))  # type: ignore[operator] # one of the above
    store = tier.open()
    assert tier.take_events() == [SECURITY]
    assert not store.contains(digest)
    assert tier.load(store, tier.keep(store, b"content")) == b"content"
    assert tier.load(tier.open(), digest) == b"content"
    assert not tier.events


def test_a_generation_of_another_key_is_refused(tier: Tier) -> None:
    """Each key signs its own."""
    tier.open(TIER_KEY)
    other = generation_file(tier)
    tier.open(OTHER_TIER_KEY)
    (mine,) = set(tier.path.glob("generation-*")) - {other}
    tier.close()
    rewrite(mine, other.read_bytes())
    tier.open(OTHER_TIER_KEY)
    assert tier.take_events() == [SECURITY]


def test_a_changed_generation_or_lock_is_one_finding(tier: Tier) -> None:
    """The audit names each once; our own new generation is none."""
    store = tier.open()
    store.clear(rekey=True)
    assert store.audit_all() == []
    path = generation_file(tier)
    rewrite(path, path.read_bytes())
    (finding,) = store.audit(path.name)
    assert finding.kind is SECURITY
    (tier.path / "tier.lock").chmod(0o640)
    (finding,) = store.audit_all()
    assert finding.name == "tier.lock"
    assert store.audit_all() == store.audit(path) == []
    assert tier.take_events() == [SECURITY, SECURITY]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
def test_a_new_generation_that_cannot_be_kept_is_none(
    tier: Tier, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The error says so, nothing is removed, and the old keys go on being the keys."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = tier.open()
    digest = tier.keep(store, b"content")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CacheUnavailableError, match="No space"):
            store.clear(rekey=True)
    tier.advance(61)
    store.sweep()
    assert tier.take_events() == [DiskEventKind.DISABLED, DiskEventKind.ENABLED]
    assert tier.load(store, digest) == b"content"
    assert tier.load(tier.open(), digest) == b"content"


# -- what should not be there --------------------------------------------------------------------


def some_place(tier: Tier) -> Path:
    """Return a path that an entry could have, in directories that exist."""
    directory = tier.path / "ab" / "cd"
    directory.mkdir(0o700, parents=True, exist_ok=True)
    directory.parent.chmod(0o700)
    return directory / ("0" * 60)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"somebody's notes"),
        lambda path: path.write_bytes(b"DGCD" + (VERSION + 1).to_bytes(2, "big") + bytes(5000)),
        lambda path: path.write_bytes(bytes(5000)),
        lambda path: path.mkdir(),
        os.mkfifo,
    ],
    ids=["text", "future version", "zeros", "directory", "FIFO"],
)
def test_what_is_not_ours_is_left_alone_counted_and_told(tier: Tier, make: "object") -> None:
    """Never removed, never served, never waited for."""
    path = some_place(tier)
    tier.path.chmod(0o700)
    make(path)  # type: ignore[operator] # one of the above
    path.chmod(0o600)
    before = FileState.of(path.lstat())
    store = tier.open()
    assert tier.take_events() == [FOREIGN]
    assert store.status().counters.foreign_files == 1
    assert store.status().entries == 0
    store.clear()
    store.close()
    assert FileState.of(path.lstat()) == before


def test_a_link_where_a_file_should_be_is_removed(tier: Tier, short_directory: Path) -> None:
    """The link, not what it leads to; a dangling one as well."""
    path = some_place(tier)
    tier.path.chmod(0o700)
    precious = short_directory / "precious"
    precious.write_bytes(b"precious")
    path.symlink_to(precious)
    path.with_name("1" * 60).symlink_to(short_directory / "nowhere")
    tier.open()
    assert tier.take_events() == [SECURITY, SECURITY]
    assert not tier.files()
    assert precious.read_bytes() == b"precious"


def test_an_impossible_header_length_is_refused_and_the_file_removed(tier: Tier) -> None:
    """Ours by its prefix, and nobody allocates 4 GiB for it."""
    tier.keep(tier.open(), b"content")
    tier.close()
    with tier.only_file().open("r+b") as file:
        file.seek(8)
        file.write(b"\xff\xff\xff\xff")
    tier.open()
    assert tier.take_events() == [CORRUPT]
    assert not tier.files()


def test_files_left_half_written_are_removed(tier: Tier) -> None:
    """Whatever a killed process was writing goes; what only lies there stays."""
    new = tier.path / "new"
    new.mkdir(0o700, parents=True)
    tier.path.chmod(0o700)
    half = new / ("0123456789abcdef" * 2)
    half.write_bytes(b"half")
    (new / ("f" * 32)).symlink_to("/etc/passwd")
    (new / "notes").write_bytes(b"notes")
    (new / ("a" * 32)).mkdir()
    tier.open()
    assert sorted(path.name for path in new.iterdir()) == ["a" * 32, "notes"]
    assert Path("/etc/passwd").exists()


@pytest.fixture
def quick_tier() -> Iterator[Tier]:
    """A tier in memory, where there is such a place: 100,000 files are made faster there."""
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="dgt-", dir=shared_memory if shared_memory.is_dir() else None
    ) as directory:
        made = Tier(Path(directory).resolve() / "tier")
        yield made
        made.close()
        made.slab.close()


@pytest.mark.parametrize("where", [".", "ab/cd", "entries"])
def test_a_tier_among_100_000_foreign_files_starts_at_once(quick_tier: Tier, where: str) -> None:
    """In less than two seconds, and it serves what it has; the files stay as they are.

    At the top, in a directory of entries, and under names that entries have.
    """
    tier = quick_tier
    digest = tier.keep(tier.open(), b"content")
    tier.close()
    some_place(tier)
    directory = tier.path / ("ab/cd" if where == "entries" else where)
    name_of = "{:060x}" if where == "entries" else "foreign-{}"
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    for number in range(100_000):
        file = os.open(name_of.format(number), os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd)
        os.write(file, b"x")
        os.close(file)
    os.close(fd)
    begun = time.monotonic()
    store = tier.open()
    assert time.monotonic() - begun < 2
    assert tier.load(store, digest) == b"content"
    tier.keep(store, b"more")
    while not store.status().is_scanned:
        store.sweep()
    assert store.status().counters.foreign_files == 100_000
    assert store.status().entries == 2
    store.clear()
    store.close()
    with os.scandir(directory) as listing:
        assert sum(entry.is_file() for entry in listing) >= 100_000
    assert len(tier.events) <= 100


# -- the scan goes on while the tier serves ------------------------------------------------------


def open_unscanned(tier: Tier) -> DiskStore:
    """Open a tier that has had no time yet to look at what is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_store, "_SCAN_SECONDS", 0.0)
        return tier.open()


def test_what_is_asked_for_is_found_before_the_scan_has_come_to_it(tier: Tier) -> None:
    """By load, by `contains`, by `forget`, and by a second keep, which writes nothing."""
    store = tier.open()
    digests = [tier.keep(store, data) for data in some(8)]
    inodes = {path.stat().st_ino for path in tier.files()}
    store = open_unscanned(tier)
    assert not store.status().is_scanned
    assert tier.load(store, digests[0]) == some(8)[0]
    assert store.contains(digests[1])
    assert store.forget(digests[2]) == 5000
    tier.keep(store, some(8)[3])
    assert store.status().entries == 3
    assert {path.stat().st_ino for path in tier.files()} < inodes
    store.sweep()
    assert store.status().is_scanned
    assert store.status().entries == 7
    assert not tier.events


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EIO])
@pytest.mark.parametrize(("errors", "alarms"), [(3, 0), (400, 1)])
def test_what_could_not_be_looked_at_for_now_is_looked_at_again(
    tier: Tier, monkeypatch: pytest.MonkeyPatch, error: int, errors: int, alarms: int
) -> None:
    """No descriptor, or a bad disk: that makes no stranger's file, unless it goes on and on."""
    store = tier.open()
    for data in some(8):
        tier.keep(store, data)
    judge, left = disk_scan.judge_file, errors

    def judge_later(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(error, os.strerror(error))
        return judge(*arguments)

    monkeypatch.setattr(disk_scan, "judge_file", judge_later)
    status = tier.open().status()
    assert status.is_scanned
    assert status.entries == (0 if alarms else 8)
    assert {event.kind for event in tier.events} == ({DiskEventKind.FOREIGN} if alarms else set())


def test_what_is_evicted_and_cleared_is_all_there_is(tier: Tier) -> None:
    """Both finish the scan first: nothing of a former life stays behind."""
    store = tier.open()
    for data in some(6):
        tier.keep(store, data, [RELEASES])
    tier.keep(store, b"other", [NIGHTLY])
    assert open_unscanned(tier).evict(RELEASES).entries == 6
    assert len(tier.files()) == 1
    assert open_unscanned(tier).clear().entries == 1
    assert not tier.files()


def test_what_is_written_during_the_scan_is_no_finding_of_it(tier: Tier) -> None:
    """The scan meets files of this life, and takes them for what they are."""
    store = tier.open()
    for data in some(5):
        tier.keep(store, data)
    store = open_unscanned(tier)
    later = [tier.keep(store, content(6000, seed)) for seed in range(5)]
    store.forget(later[0])
    store.sweep()
    assert store.status().entries == 9
    assert not tier.events


# -- opening -------------------------------------------------------------------------------------


def test_a_second_user_of_the_directory_is_refused(tier: Tier) -> None:
    """It is told which directory; when the first has closed, it is free."""
    store = tier.open()
    with pytest.raises(CacheUnavailableError, match="another process"):
        DiskStore(tier.path, 1 << 20, key=None)
    store.close()
    DiskStore(tier.path, 1 << 20, key=None).close()


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o1700])
def test_a_directory_that_is_not_private_is_refused(tier: Tier, mode: int) -> None:
    """As every directory of ours."""
    tier.path.mkdir()
    tier.path.chmod(mode)
    with pytest.raises(CacheRefusedError, match="0700"):
        tier.open()


def test_a_key_of_another_length_leaves_the_directory_free(tier: Tier) -> None:
    """Nothing is left open, nothing locked."""
    with pytest.raises(SettingsError):
        tier.open(bytes(31))
    tier.open()


@pytest.mark.parametrize("name", ["tier.lock", "generation"])
def test_a_directory_in_the_place_of_a_file_of_ours_is_refused(tier: Tier, name: str) -> None:
    """The message names what is in the way."""
    tier.open()
    path = generation_file(tier) if name == "generation" else tier.path / name
    tier.close()
    path.unlink()
    path.mkdir()
    with pytest.raises(CacheRefusedError, match=name):
        tier.open()


def test_the_directory_is_the_machines_own(tmp_path: Path) -> None:
    """Homes are shared over NFS, and locks are not."""
    path = tier_directory(tmp_path)
    assert path == tmp_path / "v2" / "disk" / machine_key()


def test_reasons_are_this_lifes_own(tier: Tier) -> None:
    """After a restart nobody knows why something is not here."""
    store = tier.open()
    digest = tier.keep(store, b"content")
    store.forget(digest)
    store = tier.open()
    assert store.miss_reason(digest) is MissReason.UNKNOWN
    assert store.load(digest, anonymous_memory, tier.slab) is None
