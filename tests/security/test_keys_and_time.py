"""Keys are used once; deadlines follow the clock that never jumps and goes on during suspend."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import grpc
import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.bystander_in_process import as_root
from tests.support.encryptions import encryptions
from tests.support.key_memory import keys_of
from tests.support.refused_syscalls import MEMFD_SECRET, refusing
from tests.support.turned_clocks import TurnedClocks, turned_clocks
from tests.support.wire import SECONDS, SPACE, Client, Daemon, eventually, running

_STORES, _LIVES = 100_000, 4
_YEAR = 365 * 86_400


def test_55_no_key_meets_a_nonce_twice_in_100_000_stores() -> None:
    """Through the store that serves, with room for few, so that every slot is used again and again;
    every encryption there is is noted, that of the seal too. Four processes have a part each, as
    four lives of a daemon would, and share no pair either."""
    with ProcessPoolExecutor(_LIVES, multiprocessing.get_context("spawn")) as lives:
        noted = list(lives.map(encryptions, [_STORES // _LIVES] * _LIVES))
    pairs = set().union(*(pairs for pairs, _ in noted))
    assert sum(times for _, times in noted) == len(pairs) == 2 * _STORES


@as_root
@pytest.mark.parametrize("between", ["nothing", "an eviction", "a clear"])
def test_56_the_same_digest_stored_again_gets_a_new_key(between: str) -> None:
    """As root sees it in the daemon's page of keys: one key each time, never one from before."""
    with (
        running(prefix=refusing(MEMFD_SECRET)) as daemon,
        Client(daemon.directory) as client,
    ):
        seen: set[bytes] = set()
        for _ in range(5):
            digest = client.store(b"the same content")
            (key,) = keys_of(daemon.pid)
            assert key not in seen
            seen.add(key)
            os.close(client.lookup(digest))
            if between == "an eviction":
                client.call("Evict", pb.EvictRequest(deltaspace=SPACE))
            elif between == "a clear":
                client.call("Clear", pb.ClearRequest())
            if between != "nothing":
                assert keys_of(daemon.pid) == set()


# -- 57 --------------------------------------------------------------------------------------------

LEASE_SECONDS = 600.0


@pytest.fixture
def clocks(short_directory: Path) -> Iterator[TurnedClocks]:
    """Clocks of a daemon that can be turned."""
    with turned_clocks(short_directory) as made:
        yield made


@pytest.fixture
def daemon(clocks: TurnedClocks) -> Iterator[Daemon]:
    """A daemon under them."""
    limits = {"lease_seconds": LEASE_SECONDS}
    with running(prefix=clocks.prefix, limits=limits) as made:
        yield made


def asked(client: Client) -> "grpc.Future[pb.LookupResponse]":
    """Ask for a lease, and wait longer than one lasts."""
    request = pb.LookupRequest(
        request_id=client.next_id(),
        deltaspace=SPACE,
        sha256=bytes(32),
        on_miss=pb.LookupRequest.ON_MISS_LEASE,
        wait_seconds=3000,
    )
    return client.stub.Lookup.future(request, timeout=2 * SECONDS, metadata=client.metadata)


@pytest.mark.parametrize("years", [-10, 10])
def test_57_a_lease_does_not_end_when_the_wall_clock_jumps(
    daemon: Daemon, clocks: TurnedClocks, years: int
) -> None:
    """Neither sooner nor later: the one who waits goes on waiting, and gets the bytes."""
    with Client(daemon.directory) as holder, Client(daemon.directory) as waiter:
        assert asked(holder).result(SECONDS).lease.id
        answer = asked(waiter)
        eventually(lambda: waiter.status().leases.waiting == 1)
        clocks.turn(wall=years * _YEAR)
        holder.store(b"another reference, so that the table is looked at")
        with pytest.raises(grpc.FutureTimeoutError):
            answer.result(1.5)
        assert waiter.status().leases.expired == 0
        clocks.turn(wall=years * _YEAR, boot=int(LEASE_SECONDS) + 1)
        assert answer.result(SECONDS).lease.id


def test_57_a_suspend_counts_and_is_noticed_soon(daemon: Daemon, clocks: TurnedClocks) -> None:
    """The machine slept longer than a lease lasts: timers have not moved on, boottime has. The one
    who waits is given a lease within seconds, with nobody else asking anything; one who slept less
    is not."""
    with Client(daemon.directory) as holder, Client(daemon.directory) as waiter:
        assert asked(holder).result(SECONDS).lease.id
        answer = asked(waiter)
        eventually(lambda: waiter.status().leases.waiting == 1)
        clocks.turn(boot=int(LEASE_SECONDS) - 100)
        with pytest.raises(grpc.FutureTimeoutError):
            answer.result(2.5)
        clocks.turn(boot=int(LEASE_SECONDS) + 1)
        begun = time.monotonic()
        assert answer.result(SECONDS).lease.id
        assert time.monotonic() - begun < 5
        assert waiter.status().leases.expired == 1
