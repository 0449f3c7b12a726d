"""The disk tier of real daemons: what outlives them, what nobody can read, what they go on without.

What others do to its files is in `test_disk_guard`.
"""

import base64
import json
import random
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.disk_daemon import Home, fill, found, lines, reference
from tests.support.refused_syscalls import refusing_meanwhile
from tests.support.wire import Client, eventually, sha256


@pytest.fixture
def home(short_directory: Path) -> Home:
    """Where the daemons of one test live."""
    return Home(short_directory.resolve())


# -- from one life to the next ---------------------------------------------------------------------


def test_with_a_key_that_lasts_the_next_daemon_is_warm(home: Home) -> None:
    """What memory had and what was on disk is served after SIGTERM and a start, without a store."""
    with home.daemon() as daemon, Client(daemon.directory) as client:
        digests = fill(client, 20)
        before = client.status()
        assert 0 < before.store.entries < 20
        assert before.disk.persistent
        assert daemon.stop() == 0
        assert not lines(daemon, "security")
    with home.daemon() as daemon, Client(daemon.directory) as client:
        assert client.status().disk.entries == 20
        assert [found(client, digest) for digest in digests] == [reference(n) for n in range(20)]
        status = client.status()
        assert (status.store.stores, status.disk.loads) == (0, 20)
        assert not status.security_events


def test_what_a_job_lists_and_what_status_says(home: Home) -> None:
    """`ls --json` names the tier of each; `status` and `status --json` tell of the disk."""
    with home.daemon() as daemon, Client(daemon.directory) as client:
        digests = fill(client, 20)
        listed = json.loads(home.cli("ls", "--json"))
        tiers = {entry["sha256"]: entry["tier"] for entry in listed}
        assert set(tiers) == {digest.hex() for digest in digests}
        assert tiers[digests[0].hex()] == "disk"
        assert tiers[digests[-1].hex()] == "memory"
        assert "on disk" in home.cli("ls")
        disk = json.loads(home.cli("status", "--json"))["disk"]
        assert disk["entries"] == list(tiers.values()).count("disk")
        assert disk["enabled"]
        assert "outlives the daemon" in home.cli("status")


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_without_a_key_nothing_outlives_the_daemon(home: Home, end: signal.Signals) -> None:
    """In order, it removes its files; killed, the next one does, and nobody could read them."""
    with home.daemon(persistent=False) as daemon, Client(daemon.directory) as client:
        digests = fill(client, 20)
        left = home.files()
        assert left
        daemon.stop(end)
    assert (home.files() == []) == (end == signal.SIGTERM)
    with home.daemon(persistent=False) as daemon, Client(daemon.directory) as client:
        assert [found(client, digest) for digest in digests] == [None] * 20
        assert home.files() == []
        assert not client.status().security_events
        fill(client, 20)
        assert home.files()


def test_entries_of_another_key_are_left_alone(home: Home) -> None:
    """Neither served nor removed nor a reason for an alarm; with their key they are back."""
    with home.daemon() as daemon, Client(daemon.directory) as client:
        digests = fill(client, 12)
        daemon.stop()
    theirs, key = {path: path.read_bytes() for path in home.files()}, home.key.read_text()
    home.new_key()
    for persistent in (True, False):
        with home.daemon(persistent=persistent) as daemon, Client(daemon.directory) as client:
            assert [found(client, digest) for digest in digests] == [None] * 12
            fill(client, 12, first=50)
            status = client.status()
            assert status.disk.other_key_files >= 12
            assert not status.security_events
            daemon.stop()
        assert {path: path.read_bytes() for path in theirs} == theirs
    home.key.write_text(key)
    with home.daemon() as daemon, Client(daemon.directory) as client:
        assert found(client, digests[0]) == reference(0)


def test_the_second_daemon_on_a_directory_says_so_and_serves_from_memory(home: Home) -> None:
    """The first has it undisturbed."""
    with home.daemon() as first, Client(first.directory) as client:
        digests = fill(client, 20)
        with home.daemon(sockets=home.base / "t") as second, Client(second.directory) as other:
            (said,) = lines(second, "disk-disabled")
            assert "used by another process" in said
            theirs = fill(other, 20, first=50)
            assert found(other, theirs[-1]) == reference(69)
            assert found(other, theirs[0]) is None
            status = other.status()
            assert not status.disk.enabled
            assert "used by another process" in status.disk.disabled_reason
            assert second.stop() == 0
        assert [found(client, digest) for digest in digests] == [reference(n) for n in range(20)]
        assert not client.status().security_events


def test_a_full_memory_tier_is_written_at_the_end(home: Home) -> None:
    """32 MiB in references of 100 kB, within the seconds that the limits give."""
    with home.daemon(memory_mb=32, disk_mb=64) as daemon, Client(daemon.directory) as client:
        digests = fill(client, 250)
        assert home.files() == []
        begun = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - begun < 10
    with home.daemon(memory_mb=32, disk_mb=64) as daemon, Client(daemon.directory) as client:
        assert client.status().disk.entries == 250
        assert found(client, digests[7]) == reference(7)


def test_the_end_comes_though_the_disk_is_too_slow_for_everything(home: Home) -> None:
    """What was used last is written first; after the limit nothing more is."""
    limits = {"disk_flush_seconds": 0.05}
    with home.daemon(memory_mb=32, limits=limits) as daemon, Client(daemon.directory) as client:
        digests = fill(client, 200)
        assert daemon.stop(seconds=5) == 0
    with home.daemon() as daemon, Client(daemon.directory) as client:
        assert 0 < client.status().disk.entries < 200
        assert found(client, digests[-1]) == reference(199)
        assert found(client, digests[0]) is None


def test_killed_at_any_moment_what_is_found_is_whole_or_absent(home: Home) -> None:
    """Twenty times SIGKILL while it spills; every file that has its name is served, and right."""
    moments, served = random.Random(7), 0
    for number in range(21):
        left = len(home.files()) if number else 0
        with home.daemon(memory_mb=0.5) as daemon, Client(daemon.directory) as client:
            assert client.status().disk.entries == left
            assert list((home.tier / "new").glob("*")) == []
            for one in range(30 * max(0, number - 3), 30 * number):
                data = found(client, sha256(reference(one)))
                assert data in (None, reference(one))
                served += data is not None
            killing = threading.Timer(moments.uniform(0.02, 0.3), daemon.process.kill)
            killing.start()
            with suppress(grpc.RpcError, OSError):
                fill(client, 30, first=30 * number)
            killing.join()
            daemon.process.wait(20)
            assert not lines(daemon, "security")
    assert served > 200


@pytest.mark.root
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, which refuses the calls")
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_file_that_cannot_be_made_durable_is_not_left(home: Home, number: int) -> None:
    """Of the file, of a directory that is made for it, or behind its name: no stranger is seen."""
    with home.daemon() as daemon, Client(daemon.directory) as client:
        trace = home.base / "trace"
        with refusing_meanwhile(daemon.pid, "fsync", "ENOSPC", trace, number=number):
            fill(client, 20)
            eventually(lambda: client.status().disk.disabled_reason)
        assert client.status().disk.entries == len(home.files())
        assert not client.status().security_events
        assert list((home.tier / "new").iterdir()) == []


def test_no_file_tells_anything(home: Home) -> None:
    """Neither content nor digest nor bucket nor prefix nor key, while it runs and afterwards."""
    key = home.new_key()
    space = pb.Deltaspace(bucket="a-very-secret-bucket", prefix="a/secret/prefix")
    data = [reference(number) for number in range(20)]
    with home.daemon() as daemon, Client(daemon.directory) as client:
        digests = [client.store(one, space) for one in data]
        while_running = home.everything()
        assert len(home.files()) > 5
        daemon.stop()
    afterwards = home.everything()
    secrets = [b"reference ", b"of a job", b"a-very-secret", b"a/secret", key]
    secrets += [
        base64.b64encode(key),
        key.hex().encode(),
        *digests,
        *(digest.hex().encode() for digest in digests),
    ]
    for seen in (while_running, afterwards):
        text = b"\0".join([*(name.encode() for name in seen), *seen.values()])
        assert len(text) > 1_000_000
        assert [secret for secret in secrets if secret in text] == []


def test_an_idle_daemon_removes_what_has_expired(home: Home) -> None:
    """Nobody calls; only the disk has something; its time comes."""
    with home.daemon() as daemon, Client(daemon.directory) as client:
        fill(client, 5)
        daemon.stop()
    short = ("--ttl-seconds", "3")
    with home.daemon(more=short) as daemon, Client(daemon.directory) as client:
        fill(client, 5, first=20)
        daemon.stop()
    assert len(home.files()) == 10
    with home.daemon():
        eventually(lambda: len(home.files()) == 5)


# -- a disk in trouble -----------------------------------------------------------------------------
