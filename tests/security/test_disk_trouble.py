"""Case 69: a disk that is full, read-only or gone under a daemon that runs on it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.disk_daemon import LOCK_READS_ONLY, Home, fill, found, lines, reference
from tests.support.wire import Client, eventually

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system"),
]


@pytest.fixture
def small_disk(short_directory: Path) -> Iterator[Home]:
    """A file system of 4 MiB below the cache directory."""
    home = Home(short_directory.resolve())
    home.cache.mkdir(0o700)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", home.cache], check=True
    )
    try:
        yield home
    finally:
        subprocess.run(["umount", "--lazy", home.cache], check=True)


def fill_up(home: Home) -> None:
    with (home.cache / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while ballast.write(bytes(4096)):
            pass


def make_read_only(home: Home) -> None:
    subprocess.run(["mount", "-o", "remount,ro", home.cache], check=True)


def remove(home: Home) -> None:
    subprocess.run(["rm", "-r", home.cache / "v2"], check=True)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [(fill_up, "No space"), (make_read_only, "Read-only"), (remove, "removed|No such file")],
    ids=["full", "read-only", "removed"],
)
def test_69_a_disk_in_trouble_is_one_alarm_and_memory_goes_on(
    small_disk: Home, trouble: Callable[[Home], None], reason: str
) -> None:
    """One line in the log, one in `dg-cache status`; every put and get goes on."""
    home = small_disk
    with (
        home.daemon(
            prefix=(sys.executable, "-c", LOCK_READS_ONLY), limits={"audit_seconds": 0.2}
        ) as daemon,
        Client(daemon.directory) as client,
    ):
        fill(client, 12)
        assert client.status().disk.entries > 0
        trouble(home)
        for first in range(20, 60, 20):
            digests = fill(client, 20, first=first)
            assert [found(client, digest) for digest in digests[-5:]] == [
                reference(number) for number in range(first + 15, first + 20)
            ]
        eventually(lambda: not client.status().disk.enabled)
        assert re.search(reason, client.status().disk.disabled_reason)
        (said,) = lines(daemon, "disk-disabled")
        assert re.search(reason, said)
        assert f"switched off: {client.status().disk.disabled_reason}" in home.cli("status")
        assert client.stub.Clear(pb.ClearRequest(), timeout=20).freed_entries > 0
        assert daemon.stop() == 0
        assert len(lines(daemon, "disk-disabled")) == 1
        assert "Traceback" not in daemon.logged()


def test_69_a_full_disk_before_the_start_is_one_line(small_disk: Home) -> None:
    """And Status says why there is no disk tier."""
    fill_up(small_disk)
    with small_disk.daemon() as daemon, Client(daemon.directory) as client:
        fill(client, 20)
        assert len(lines(daemon, "disk-disabled")) == 1
        assert "No space" in small_disk.cli("status")
