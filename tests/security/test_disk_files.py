"""The disk tier in other hands: its files changed, put together, put back, signed by another key.

Each case is played against running daemons, under their eyes or between two of their lives.
"""

import mmap
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dgcache_core.aead import CHUNK_BYTES, TAG_BYTES
from dgcache_core.disk_format import PREFIX_BYTES
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.disk_daemon import NEVER, Home, fill, following, found, lines, reference
from tests.support.disk_regions import FIRST_CHUNK, HEADER_REGIONS
from tests.support.turned_clocks import turned_clocks
from tests.support.wire import Client, eventually

YEAR = 365 * 86_400
BIG = 2 * CHUNK_BYTES + 100
"""Two whole chunks and a short one."""

CHUNK = CHUNK_BYTES + TAG_BYTES
REGIONS = {
    **HEADER_REGIONS,
    "first chunk": FIRST_CHUNK,
    "first chunk, middle": FIRST_CHUNK + CHUNK_BYTES // 2,
    "first chunk, tag": FIRST_CHUNK + CHUNK_BYTES,
    "second chunk": FIRST_CHUNK + CHUNK + 1,
    "last chunk": FIRST_CHUNK + 2 * CHUNK,
    "last tag, end": FIRST_CHUNK + 2 * CHUNK + 100 + TAG_BYTES - 1,
}
FOREIGN = {"magic", "version", "key id"}
"""A file with another one of these is no file of ours: nobody touches it."""


@pytest.fixture
def home(short_directory: Path) -> Home:
    """Where the daemons of one test live."""
    return Home(short_directory.resolve())


def flip(file: Path, offset: int, bit: int) -> None:
    """Change one bit in place, and give the file the times it had."""
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1 << bit]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def kept(home: Home, count: int, size: int = BIG) -> list[bytes]:
    """Fill a tier, end its daemon, and return the digests."""
    with home.daemon(memory_mb=8, disk_mb=128) as running, Client(running.directory) as client:
        digests = fill(client, count, size)
        running.stop()
    assert len(home.files()) == count
    return digests


def answers(client: Client, digests: list[bytes], size: int) -> int:
    """Ask for all; each answer is right or none. Return how many were none."""
    served = [found(client, digest) for digest in digests]
    right = [reference(number, size) for number in range(len(digests))]
    assert all(data in (None, right[number]) for number, data in enumerate(served))
    return served.count(None)


# -- 25 and 26, on disk ----------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["while it runs", "between two lives"])
def test_25_a_bit_flipped_in_a_file_is_found(home: Home, when: str) -> None:
    """One bit in every region, one region in each file: nothing of any of them is served."""
    digests = kept(home, len(REGIONS))
    files = home.files()

    def flip_all() -> None:
        for number, (file, offset) in enumerate(zip(files, REGIONS.values(), strict=True)):
            flip(file, offset, number % 8)

    if when == "between two lives":
        flip_all()
    limits = {"watch_mechanisms": ()}  # nobody looks before the lookups do
    with (
        home.daemon(memory_mb=8, disk_mb=128, limits=limits) as daemon,
        Client(daemon.directory) as client,
    ):
        if when == "while it runs":
            assert client.status().disk.entries == len(digests)
            flip_all()
        assert answers(client, digests, BIG) == len(digests)
        status = client.status()
        assert status.disk.entries == 0
        if when == "while it runs":
            assert status.security_events["security"] == len(digests)
            assert not home.files()
        else:
            others = status.disk.foreign_files + status.disk.other_key_files
            assert others >= len(FOREIGN)
            assert status.security_events["corrupt"] >= len(digests) - len(FOREIGN) - 3
        assert fill(client, 2, BIG) == digests[:2]
        assert answers(client, digests[:2], BIG) == 0


def swapped(file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes())
    first, second = (
        slice(FIRST_CHUNK, FIRST_CHUNK + CHUNK),
        slice(FIRST_CHUNK + CHUNK, FIRST_CHUNK + 2 * CHUNK),
    )
    data[first], data[second] = data[second], data[first]
    file.write_bytes(data)


def truncated(file: Path, other: Path) -> None:
    os.truncate(file, FIRST_CHUNK + CHUNK)


def extended(file: Path, other: Path) -> None:
    with file.open("ab") as opened:
        opened.write(other.read_bytes()[FIRST_CHUNK : FIRST_CHUNK + CHUNK])


def foreign_chunk(file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes())
    data[FIRST_CHUNK : FIRST_CHUNK + CHUNK] = other.read_bytes()[FIRST_CHUNK : FIRST_CHUNK + CHUNK]
    file.write_bytes(data)


def foreign_header(file: Path, other: Path) -> None:
    file.write_bytes(other.read_bytes()[:FIRST_CHUNK] + file.read_bytes()[FIRST_CHUNK:])


def foreign_file(file: Path, other: Path) -> None:
    file.write_bytes(other.read_bytes())


def older_version(file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes())
    data[4:6] = (1).to_bytes(2, "big")
    file.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [swapped, truncated, extended, foreign_chunk, foreign_header, foreign_file, older_version],
    ids=lambda change: change.__name__,
)
def test_26_a_file_put_together_between_two_lives_is_refused(
    home: Home, change: Callable[[Path, Path], None]
) -> None:
    """From its own parts or from another entry's, where no ledger remembers what it was."""
    digests = kept(home, 2)
    file, other = home.files()
    change(file, other)
    with home.daemon(memory_mb=8) as daemon, Client(daemon.directory) as client:
        assert answers(client, digests, BIG) == 1
        status = client.status()
        seen = status.disk.corruptions + status.disk.foreign_files + status.store.corruptions
        assert seen >= 1
        if change is not older_version:
            assert lines(daemon, "security")
            assert status.security_events


# -- 27 --------------------------------------------------------------------------------------------


def overwrite(file: Path, keep: ExitStack) -> None:
    flip(file, -100 + file.stat().st_size, 1)


def replace(file: Path, keep: ExitStack) -> None:
    theirs = outside(file, "theirs")
    theirs.write_bytes(file.read_bytes())
    theirs.chmod(0o600)
    theirs.rename(file)


def another_entry(file: Path, keep: ExitStack) -> None:
    other = next(path for path in file.parents[2].glob("??/??/*") if path != file)
    theirs = outside(file, "theirs")
    theirs.write_bytes(other.read_bytes())
    theirs.chmod(0o600)
    theirs.rename(file)


def hard_link(file: Path, keep: ExitStack) -> None:
    outside(file, "link").hardlink_to(file)


def map_and_write(file: Path, keep: ExitStack) -> None:
    """The descriptor is closed before, and the mapping stays."""
    with file.open("r+b") as opened:
        mapping = keep.enter_context(mmap.mmap(opened.fileno(), 0))
    mapping[len(mapping) - 100] ^= 1


def open_up(file: Path, keep: ExitStack) -> None:
    file.chmod(0o644)


def symlink(file: Path, keep: ExitStack) -> None:
    theirs = outside(file, "theirs")
    shutil.copyfile(file, theirs)
    theirs.chmod(0o600)
    outside(file, "symlink").symlink_to(theirs)
    outside(file, "symlink").rename(file)


def unlink_and_symlink(file: Path, keep: ExitStack) -> None:
    """The daemon may look before, between and after."""
    theirs = outside(file, "theirs")
    shutil.copyfile(file, theirs)
    theirs.chmod(0o600)
    file.unlink()
    file.symlink_to(theirs)


def outside(file: Path, name: str) -> Path:
    """Return a name beside the tier, on the same file system."""
    return file.parents[3] / name


WAYS: list[tuple[Callable[[Path, ExitStack], None], float]] = [
    *((change, NEVER) for change in (overwrite, replace, another_entry, open_up)),
    # neither mechanism tells of a name made elsewhere, nor of a write through a mapping
    (hard_link, 0.3),
    (map_and_write, 0.3),
    (symlink, NEVER),
    (unlink_and_symlink, NEVER),
]
by_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way[0].__name__)


def timed_mappings(file: Path) -> bool:
    """Tell whether a write through a mapping changes the times of a file here; not on tmpfs."""
    probe = outside(file, "probe")
    probe.write_bytes(bytes(5000))
    before = probe.stat().st_mtime_ns
    with probe.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapping:
        eventually(lambda: time.time_ns() > before + 20_000_000)
        mapping[0] = 1
    changed = probe.stat().st_mtime_ns != before
    probe.unlink()
    return changed


@pytest.mark.parametrize("mechanism", ["fanotify", "inotify"])
@by_way
def test_27_a_changed_file_is_an_alarm_and_never_served(
    home: Home, mechanism: str, way: tuple[Callable[[Path, ExitStack], None], float]
) -> None:
    """In the log, in the counters, for those who follow; the entry is gone, all others are served,
    and what a link leads to is left alone."""
    change, audit_seconds = way
    # the daemon may clear the place, and the link in it, before it sees that there was one
    alarms = ("security", "removed") if change is unlink_and_symlink else ("security",)
    limits = {"watch_mechanisms": [mechanism], "audit_seconds": audit_seconds}
    with (
        home.daemon(limits=limits) as daemon,
        Client(daemon.directory) as client,
        ExitStack() as keep,
    ):
        digests = fill(client, 20)
        file = home.files()[0]
        if change is map_and_write and not timed_mappings(file):
            pytest.skip("this file system does not time writes through a mapping")
        name, before = str(file.relative_to(home.tier)), client.status().disk.entries
        with following(client) as events:
            change(file, keep)
            told = next(events)
            while told[0] not in alarms or told[1] != name:
                told = next(events)
        eventually(lambda: not os.path.lexists(file))
        status = client.status()
        assert (status.disk.entries, status.monitor.mechanism) == (before - 1, mechanism)
        assert status.security_events[told[0]] >= 1
        assert [line for line in lines(daemon, told[0]) if name in line]
        assert answers(client, digests, len(reference(0))) == 1
        theirs = outside(file, "link" if change is hard_link else "theirs")
        assert theirs.exists() == (change in (hard_link, symlink, unlink_and_symlink))


@pytest.mark.parametrize("mechanism", ["fanotify", "inotify"])
def test_27_a_link_in_the_place_of_a_removed_file_is_taken_away(home: Home, mechanism: str) -> None:
    """Put there only when the daemon knows no entry of that name any more: an alarm, and what it
    leads to is left alone; the same reference is kept there again."""
    limits = {"watch_mechanisms": [mechanism], "audit_seconds": NEVER}
    with home.daemon(limits=limits) as daemon, Client(daemon.directory) as client:
        digests = fill(client, 20)
        file = home.files()[0]
        name = str(file.relative_to(home.tier))
        theirs = outside(file, "theirs")
        shutil.copyfile(file, theirs)
        with following(client) as events:
            file.unlink()
            assert next(told for told in events if told[1] == name) == ("removed", name)
            file.symlink_to(theirs)
            assert next(told for told in events if told[1] == name) == ("security", name)
        assert not os.path.lexists(file)
        assert theirs.exists()
        assert answers(client, digests, len(reference(0))) == 1


@by_way
def test_27_a_changed_file_is_refused_where_nobody_watches(
    home: Home, way: tuple[Callable[[Path, ExitStack], None], float]
) -> None:
    """The lookup itself sees it, in mid-change as well: with a mapping that is still there."""
    limits = {"watch_mechanisms": ()}
    with (
        home.daemon(limits=limits) as daemon,
        Client(daemon.directory) as client,
        ExitStack() as keep,
    ):
        digests = fill(client, 20)
        file = home.files()[0]
        way[0](file, keep)
        assert answers(client, digests, len(reference(0))) == 1
        status = client.status()
        told = status.security_events
        assert told["security"] + told["corrupt"] == 1
        assert told["entry-dropped"] == 1
        assert lines(daemon, "security")
        assert not os.path.lexists(file)


# -- 28 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in place", "by rename"])
def test_28_an_older_file_put_back_is_refused_in_one_life(home: Home, how: str) -> None:
    """It is signed, it is of the same reference, and it is not what was written last."""
    limits = {"watch_mechanisms": ()}
    with home.daemon(limits=limits) as daemon, Client(daemon.directory) as client:
        (digest, *_) = fill(client, 12)
        file, older = written_first(home)
        client.call("Clear", pb.ClearRequest())
        assert fill(client, 12)[0] == digest
        before = file.stat()
        assert file.read_bytes() != older
        if how == "in place":
            file.write_bytes(older)
        else:
            outside(file, "older").write_bytes(older)
            outside(file, "older").chmod(0o600)
            outside(file, "older").rename(file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert found(client, digest) is None
        assert client.status().security_events["security"] == 1
        assert client.store(reference(0)) == digest
        assert found(client, digest) == reference(0)


def written_first(home: Home) -> tuple[Path, bytes]:
    """Return the file that was written first, and what is in it."""
    file = min(home.files(), key=lambda path: path.stat().st_mtime_ns)
    return file, file.read_bytes()


def test_28_across_lives_an_older_file_lasts_until_it_expires(home: Home) -> None:
    """Nothing remembers what was there last: it is served, being right, until its own time ends,
    which nobody can change; SECURITY.md says so."""
    text = " ".join((Path(__file__).parents[2] / "SECURITY.md").read_text().split())
    assert "can restore an older state of all of it, until it expires" in text
    more = ("--ttl-seconds", "1000")
    with turned_clocks(home.base) as clocks:

        def life(wall: int) -> tuple[bytes | None, int]:
            clocks.turn(wall=wall, boot=wall)
            with (
                home.daemon(prefix=clocks.prefix, more=more) as daemon,
                Client(daemon.directory) as client,
            ):
                served = found(client, digest)
                entries = client.status().disk.entries
                daemon.stop()
                return served, entries

        with (
            home.daemon(prefix=clocks.prefix, more=more) as daemon,
            Client(daemon.directory) as client,
        ):
            digest = client.store(reference(0))
            daemon.stop()
        (file,) = home.files()
        older = file.read_bytes()
        with (
            home.daemon(prefix=clocks.prefix, more=more) as daemon,
            Client(daemon.directory) as client,
        ):
            client.call("Clear", pb.ClearRequest())
            daemon.stop()
        assert life(10) == (None, 0)
        put_back(file, older)
        assert life(900)[0] == reference(0)
        put_back(file, older)
        assert life(1100) == (None, 0)


def put_back(file: Path, older: bytes) -> None:
    """Put an older file where it was."""
    for directory in (file.parent.parent, file.parent):
        directory.mkdir(0o700, exist_ok=True)
    file.write_bytes(older)
    file.chmod(0o600)


# -- 29 --------------------------------------------------------------------------------------------


def test_29_files_signed_under_another_key_are_left_alone(home: Home) -> None:
    """Refused, counted, and as they were: name, bytes, inode and times; the other key's daemon
    serves them afterwards as before."""
    key = home.key.read_bytes()
    digests = kept(home, 3, 50_000)
    before = [(file, file.read_bytes(), identity(file)) for file in home.files()]
    home.new_key()
    with home.daemon() as daemon, Client(daemon.directory) as client:
        assert answers(client, digests, 50_000) == 3
        eventually(lambda: client.status().disk.other_key_files >= 3)
        fill(client, 12, first=50)
        daemon.stop()
    assert [(file, file.read_bytes(), identity(file)) for file, _, _ in before] == before
    home.key.write_bytes(key)
    with home.daemon() as daemon, Client(daemon.directory) as client:
        assert answers(client, digests, 50_000) == 0


def identity(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def test_29_a_file_with_our_key_s_name_and_another_s_signature_is_refused(home: Home) -> None:
    """Who only claims our key has a bad file of ours: an alarm, and it goes."""
    digests = kept(home, 1, 50_000)
    (ours,) = home.files()
    prefix = ours.read_bytes()[:PREFIX_BYTES]
    ours.unlink()
    first = home.key.read_bytes()
    home.new_key()
    with home.daemon() as daemon, Client(daemon.directory) as client:
        fill(client, 1, 50_000)
        daemon.stop()
    (theirs,) = home.files()
    put_back(ours, prefix + theirs.read_bytes()[PREFIX_BYTES:])
    home.key.write_bytes(first)
    with home.daemon() as daemon, Client(daemon.directory) as client:
        assert answers(client, digests, 50_000) == 1
        assert client.status().security_events == {"corrupt": 1}
    assert not ours.exists()
    assert theirs.exists()


# -- 30 --------------------------------------------------------------------------------------------


@pytest.fixture
def aged(home: Home) -> Iterator[tuple[Home, Callable[..., None], tuple[str, ...]]]:
    """A home whose daemons have clocks that can be turned."""
    with turned_clocks(home.base) as clocks:
        yield home, clocks.turn, clocks.prefix


def in_memory(client: Client) -> int:
    return client.status().store.entries


@pytest.mark.parametrize("years", [-10, 10])
def test_30_a_wall_clock_that_jumps_changes_nothing_in_memory(
    aged: tuple[Home, Callable[..., None], tuple[str, ...]], years: int
) -> None:
    """Nothing expires and nothing lives longer; time that really passes (boottime) still counts."""
    home, turn, prefix = aged
    with (
        home.daemon(prefix=prefix, more=("--ttl-seconds", "1000")) as daemon,
        Client(daemon.directory) as client,
    ):
        digest = client.store(reference(0))
        turn(wall=years * YEAR)
        assert found(client, digest) == reference(0)
        later = client.store(reference(1))
        turn(wall=0)
        assert found(client, later) == reference(1)
        turn(wall=years * YEAR, boot=900)
        assert [found(client, one) for one in (digest, later)] == [reference(0), reference(1)]
        turn(wall=years * YEAR, boot=1001)
        assert [found(client, one) for one in (digest, later)] == [None, None]
        assert in_memory(client) == 0


@pytest.mark.parametrize("years", [-10, 10])
def test_30_on_disk_an_entry_of_the_future_is_an_expired_one(
    aged: tuple[Home, Callable[..., None], tuple[str, ...]], years: int
) -> None:
    """Ten years later it has expired; ten years earlier it is not believed. In one life the wall
    clock counts for the disk no more than for memory."""
    home, turn, prefix = aged
    with home.daemon(prefix=prefix) as daemon, Client(daemon.directory) as client:
        digests = fill(client, 20)
        turn(wall=years * YEAR)
        assert answers(client, digests, len(reference(0))) == 0
        turn()
        daemon.stop()
    turn(wall=years * YEAR)
    with home.daemon(prefix=prefix) as daemon, Client(daemon.directory) as client:
        assert answers(client, digests, len(reference(0))) == len(digests)
        assert not client.status().security_events
        daemon.stop(signal.SIGTERM)
    assert not home.files()
