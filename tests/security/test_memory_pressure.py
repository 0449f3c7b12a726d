"""Case 67, memory pressure: a daemon in a control group, and a neighbour that takes it all."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import grpc
import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.memory_group import Hog, MemoryGroup, memory_group
from tests.support.wire import (
    MIB,
    SECONDS,
    Client,
    Daemon,
    eventually,
    own_environment,
    refused,
    running,
    trailing,
)

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a control group"),
]

LIMITS = {
    "pressure_look_seconds": 0.1,
    "pressure_calm_seconds": 1.0,
    "pressure_step_seconds": 0.1,
}
GROUP_BYTES = 320 * MIB
BUDGET_MIB = 128
ENTRY_BYTES = 8 * MIB
ENTRIES = 14


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    """A group of 320 MiB."""
    with memory_group(GROUP_BYTES) as made:
        yield made


@contextmanager
def daemon_in(group: MemoryGroup) -> Iterator[Daemon]:
    """Run a daemon there with a budget of 128 MiB and little patience."""
    options = ("--memory-size-mb", str(BUDGET_MIB))
    with running(prefix=group.prefix, limits=LIMITS, options=options) as daemon:
        yield daemon


def space(number: int) -> pb.Deltaspace:
    """Return a deltaspace for each entry."""
    return pb.Deltaspace(bucket="b", prefix=str(number))


def filled(client: Client) -> list[bytes]:
    """Store 112 MiB and return the digests, oldest first."""
    return [client.store(os.urandom(ENTRY_BYTES), space(number)) for number in range(ENTRIES)]


def squeeze(hog: Hog, group: MemoryGroup, client: Client) -> None:
    """Take the group's memory a piece at a time until the cache is at its floor."""

    def shrinks() -> int:
        return client.status().pressure.shrinks

    before = -1
    while client.status().pressure.limit_bytes > 32 * MIB:
        eventually(partial(lambda seen: shrinks() > seen, before))
        before = shrinks()
        hog.fill_up(GROUP_BYTES)
    hog.fill_up(GROUP_BYTES)  # so that it stays there


def said_by_status(daemon: Daemon) -> str:
    """Return what `dg-cache status` tells of it, in one line."""
    said = subprocess.run(
        [sys.executable, "-m", "dgcache_cli", "status"],
        env={**own_environment(), "DG_CACHE_SOCKET_DIR": str(daemon.directory)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    return " ".join(said.stdout.split())


def test_67_the_cache_gives_way_to_its_neighbours_and_grows_back(group: MemoryGroup) -> None:
    """It sheds, oldest first, and says so; nobody is killed; when the hog ends it grows back."""
    with daemon_in(group) as daemon, Client(daemon.directory) as client:
        digests = filled(client)
        assert client.status().pressure.shrinks == 0
        with Hog(group).running() as hog:
            squeeze(hog, group, client)
            # more than there would have been: without the cache's giving way somebody were killed
            assert hog.taken_bytes + ENTRIES * ENTRY_BYTES > GROUP_BYTES
            status = client.status()
            assert status.store.limit_bytes == status.pressure.limit_bytes == 32 * MIB
            assert status.store.max_bytes == BUDGET_MIB * MIB
            assert status.store.blob_bytes <= 32 * MIB
            assert status.store.pressure_evictions == ENTRIES - status.store.entries >= 10
            assert str(group.path) in status.pressure.cause
            assert status.pressure.seconds_since < 60
            with refused(grpc.StatusCode.NOT_FOUND) as miss:
                client.lookup(digests[0], space(0))
            assert trailing(miss[0])["dg-miss-reason"] == "pressure"
            os.close(client.lookup(digests[-1], space(ENTRIES - 1)))
            assert "limited to 33.6 MB of 134 MB; lowered" in said_by_status(daemon)
        eventually(lambda: client.status().pressure.limit_bytes == BUDGET_MIB * MIB)
        assert "over, again 134 MB; lowered" in said_by_status(daemon)
        filled(client)
        assert client.status().store.entries >= ENTRIES
        assert client.status().pressure.shrinks == status.pressure.shrinks
        assert daemon.process.poll() is None
        log = daemon.logged().splitlines()
    assert group.kills() == 0

    shed = [line for line in log if "memory-pressure " in line]
    assert len(shed) == status.pressure.shrinks
    assert all(re.search(r"WARNING .*limit_bytes=\d+ .*cause=.*control group", x) for x in shed)
    grown = [line for line in log if "memory-pressure-eased" in line]
    assert all("INFO" in line for line in grown)
    assert f"limit_bytes={BUDGET_MIB * MIB}" in grown[-1]


def test_67_a_held_handout_stays_readable_to_its_end(group: MemoryGroup) -> None:
    """Its entry leaves for want of memory, its bytes do not while somebody holds them."""
    data = os.urandom(ENTRY_BYTES)
    with daemon_in(group) as daemon, Client(daemon.directory) as client:
        held = client.lookup(client.store(data))
        filled(client)
        with Hog(group).running() as hog:
            squeeze(hog, group, client)
            status = client.status().store
            assert (status.handouts, status.handout_bytes) == (1, ENTRY_BYTES)
            assert os.pread(held, ENTRY_BYTES + 1, 0) == data
            os.close(held)
            eventually(lambda: client.status().store.handout_bytes == 0)
    assert group.kills() == 0
