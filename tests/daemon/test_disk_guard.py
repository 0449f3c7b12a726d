"""What others do to the disk tier of a running daemon is told at once, and never served."""

import itertools
import json
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dgcache_core.disk_format import PREFIX_BYTES
from tests.support.disk_daemon import NEVER, Home, fill, following, found, lines, reference
from tests.support.wire import Client, eventually

MECHANISMS = ["fanotify", "inotify"]
with_both = pytest.mark.parametrize("mechanism", MECHANISMS)


@pytest.fixture
def home(short_directory: Path) -> Home:
    """Where the daemons of one test live."""
    return Home(short_directory.resolve())


# -- while it runs ---------------------------------------------------------------------------------


def write(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-100, os.SEEK_END)
        opened.write(b"theirs")


def replace(file: Path) -> None:
    theirs = file.parent.parent.parent.parent / "theirs"
    theirs.write_bytes(file.read_bytes())
    theirs.chmod(0o600)
    theirs.rename(file)


def link(file: Path) -> None:
    (file.parent.parent.parent.parent / "link").hardlink_to(file)


def link_beside(file: Path) -> None:
    (file.parent / "beside").hardlink_to(file)


def open_up(file: Path) -> None:
    file.chmod(0o644)


CHANGES: list[tuple[Callable[[Path], None], str, float]] = [
    (write, "security", NEVER),
    (replace, "security", NEVER),
    (open_up, "security", NEVER),
    (Path.unlink, "removed", NEVER),
    (link, "security", 0.3),  # neither mechanism tells of a name that is made elsewhere
]


@with_both
@pytest.mark.parametrize(
    ("change", "kind", "audit_seconds"), CHANGES, ids=[one[0].__name__ for one in CHANGES]
)
def test_a_foreign_change_is_an_event_at_once_and_never_served(
    home: Home, mechanism: str, change: Callable[[Path], None], kind: str, audit_seconds: float
) -> None:
    """In the log, in the counters, for followers and `dg-cache events`; the entry is gone."""
    limits = {"watch_mechanisms": [mechanism], "audit_seconds": audit_seconds}
    with home.daemon(limits=limits) as daemon, Client(daemon.directory) as client:
        digests = fill(client, 20)
        assert client.status().monitor.mechanism == mechanism
        file = home.files()[0]
        name = str(file.relative_to(home.tier))
        before = client.status().disk.entries
        with following(client) as events:
            change(file)
            assert next(events) == (kind, name)
        assert not file.exists()
        status = client.status()
        assert status.disk.entries == before - 1
        assert status.security_events == {kind: 1}
        (said,) = lines(daemon, "security")
        assert name in said
        (told,) = map(json.loads, home.cli("events", "--json").splitlines())
        assert (told["kind"], told["fields"]["name"]) == (kind, name)
        served = [found(client, digest) for digest in digests]
        assert served.count(None) == 1
        assert [data for data in served if data] == [
            reference(number) for number, data in enumerate(served) if data
        ]
        assert client.status().security_events == {kind: 1}


@with_both
def test_three_thousand_files_of_its_own_raise_no_alarm(home: Home, mechanism: str) -> None:
    """Written, read back and removed, while everything is audited all the time; one of theirs
    among them is the only event."""
    limits = {"watch_mechanisms": [mechanism], "audit_seconds": 0.2}
    with (
        home.daemon(persistent=False, memory_mb=0.25, disk_mb=2, limits=limits) as daemon,
        Client(daemon.directory) as client,
    ):
        digests = []
        for first in range(0, 3000, 100):
            digests += fill(client, 100, size=2000, first=first)
            for number in range(first, first + 100, 10):
                assert found(client, digests[number]) == reference(number, 2000)
        disk = client.status().disk
        assert disk.keeps > 2900
        assert disk.evictions > 2000
        assert disk.loads > 100
        assert client.status().monitor.disabled_reason == ""
        assert not client.status().security_events
        with following(client) as events:
            file = home.files()[0]
            write(file)
            assert next(events) == ("security", str(file.relative_to(home.tier)))
        assert client.status().security_events == {"security": 1}


@with_both
def test_what_is_done_while_events_are_lost_is_found(home: Home, mechanism: str) -> None:
    """The daemon is stopped while the kernel's queue overflows; one change is behind it."""
    size = int(Path(f"/proc/sys/fs/{mechanism}/max_queued_events").read_text())
    limits = {"watch_mechanisms": [mechanism]}
    with home.daemon(limits=limits) as daemon, Client(daemon.directory) as client:
        fill(client, 12)
        file = home.files()[0]
        os.kill(daemon.pid, signal.SIGSTOP)
        for number in range(max(10_000, size)):
            beside = file.parent / str(number)
            beside.touch()
            beside.unlink()
        write(file)
        os.kill(daemon.pid, signal.SIGCONT)
        name = str(file.relative_to(home.tier))
        with following(client) as events:
            assert ("security", name) in itertools.islice(events, 2)
        assert client.status().monitor.rescans >= 1
        assert not file.exists()


@with_both
def test_more_directories_than_may_be_watched_are_audited(home: Home, mechanism: str) -> None:
    """The tier makes a directory for nearly each file; what is not watched is found later."""
    limits = {"watch_mechanisms": [mechanism], "watched_directories": 4, "audit_seconds": 0.3}
    with home.daemon(limits=limits) as daemon, Client(daemon.directory) as client:
        fill(client, 20)
        eventually(lambda: client.status().monitor.disabled_reason)
        with following(client) as events:
            files = home.files()
            for file in files:
                write(file)
            told = set(itertools.islice(events, len(files)))
        assert {name for _, name in told} == {str(file.relative_to(home.tier)) for file in files}
        assert {kind for kind, _ in told} == {"security"}
        assert len(lines(daemon, "monitor-limited")) == 1


@with_both
def test_the_tier_of_a_former_life_is_watched_from_the_start(home: Home, mechanism: str) -> None:
    """Directories that were there before are watched as those that are made later."""
    with home.daemon() as daemon, Client(daemon.directory) as client:
        fill(client, 12)
        daemon.stop()
    limits = {"watch_mechanisms": [mechanism]}
    with home.daemon(limits=limits) as daemon, Client(daemon.directory) as client:
        with following(client) as events:
            for file in home.files():
                name = str(file.relative_to(home.tier))
                write(file)
                assert next(events) == ("security", name)
        assert client.status().disk.entries == 0


def test_the_generations_file_is_watched(home: Home) -> None:
    """Who changes it takes everything away from the next life; that is told now."""
    with home.daemon() as daemon, Client(daemon.directory) as client:
        digests = fill(client, 12)
        (generation,) = home.tier.glob("generation-*")
        with following(client) as events:
            generation.write_bytes(generation.read_bytes()[::-1])
            assert next(events) == ("security", generation.name)
        daemon.stop()
    with home.daemon() as daemon, Client(daemon.directory) as client:
        assert [found(client, digest) for digest in digests] == [None] * 12
        with following(client) as events:
            assert next(events) == ("security", generation.name)


# -- before it starts ------------------------------------------------------------------------------


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def in_the_header(file: Path) -> None:
    os.truncate(file, PREFIX_BYTES + 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def oversized_header(file: Path) -> None:
    put(file, 8, struct.pack(">I", 1 << 31))


def wrong_magic(file: Path) -> None:
    put(file, 0, b"ABCD")


def future_version(file: Path) -> None:
    put(file, 4, struct.pack(">H", 99))


def directory(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "theirs").touch()


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def symlink(file: Path) -> None:
    file.unlink()
    file.symlink_to("/etc/passwd")


def put(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)


BAD = [truncated, in_the_header, empty, oversized_header, write]
FOREIGN = [wrong_magic, future_version, directory, fifo]


@pytest.mark.parametrize("make", [*BAD, *FOREIGN, symlink], ids=lambda make: make.__name__)
def test_a_bad_file_is_a_clear_event_and_no_entry(home: Home, make: Callable[[Path], None]) -> None:
    """Ours and bad: removed. Not ours: left as it is. Nothing keeps the daemon from starting."""
    with home.daemon() as daemon, Client(daemon.directory) as client:
        digests = fill(client, 12)
        daemon.stop()
    file = home.files()[0]
    name = str(file.relative_to(home.tier))
    make(file)
    left = file.lstat()
    with home.daemon() as daemon, Client(daemon.directory) as client:
        served = [found(client, digest) for digest in digests]
        assert served.count(None) == 1
        assert all(data in (None, reference(number)) for number, data in enumerate(served))
        with following(client) as events:
            kind, said = next(events)
        assert said == name
        assert name in lines(daemon, "security")[0]
        in_use = {"entry-dropped": 1} if make is write else {}  # the chunks are judged by a lookup
        assert dict(client.status().security_events) == {kind: 1, **in_use}
        daemon.stop()
    if make in FOREIGN:
        assert kind == "foreign"
        now = file.lstat()
        assert (now.st_ino, now.st_mtime_ns, now.st_size) == (
            left.st_ino,
            left.st_mtime_ns,
            left.st_size,
        )
    else:
        assert kind == ("security" if make is symlink else "corrupt")
        assert not file.is_symlink()
        assert not file.exists()


def test_a_hundred_thousand_foreign_files_keep_nobody_waiting(home: Home) -> None:
    """In the top directory and where entries are: a start takes three seconds longer at the most on
    a busy host, no file is touched, the entries of ours are served, and the log has a bound."""
    with home.daemon() as daemon, Client(daemon.directory) as client:
        digests = fill(client, 12)
        daemon.stop()
    begun = time.monotonic()
    with home.daemon() as daemon:
        quick = time.monotonic() - begun
        daemon.stop()
    crowded = home.files()[0].parent
    for number in range(50_000):
        (home.tier / f"theirs-{number}").touch()
        os.close(os.open(crowded / f"{number:060x}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        if number % 10 == 0:
            put_junk(crowded / f"{number:060x}")
    begun = time.monotonic()
    with home.daemon() as daemon, Client(daemon.directory) as client:
        assert time.monotonic() - begun < quick + 3
        assert [found(client, digest) for digest in digests] == [reference(n) for n in range(12)]
        eventually(lambda: client.status().disk.foreign_files >= 55_000, 60)
        assert len(daemon.logged().splitlines()) < 200
        daemon.stop()
    assert len(list(home.tier.glob("theirs-*"))) == 50_000


def put_junk(file: Path) -> None:
    file.write_bytes(b"somebody else's, of some length, and not ours at all" * 4)
