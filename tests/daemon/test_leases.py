"""Leases on the wire: whose they are, what ends them, and what a wait costs its session."""

import math
import os
import secrets

import grpc
import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import (
    SECONDS,
    SPACE,
    Client,
    Daemon,
    eventually,
    refused,
    running,
    sha256,
    trailing,
)

DATA = secrets.token_bytes(1000)
DIGEST = sha256(DATA)
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
HUGE = sha256(b"of something huge")  # remembered as such for a minute


def request(
    client: Client, wait_seconds: float = SECONDS, digest: bytes = DIGEST
) -> pb.LookupRequest:
    return pb.LookupRequest(
        request_id=client.next_id(),
        deltaspace=SPACE,
        sha256=digest,
        on_miss=pb.LookupRequest.ON_MISS_LEASE,
        wait_seconds=wait_seconds,
    )


def leased(client: Client, digest: bytes = DIGEST) -> pb.Lease:
    lease: pb.Lease = client.call("Lookup", request(client, digest=digest)).lease
    assert lease.id
    return lease


def waiting(
    client: Client, wait_seconds: float = SECONDS, digest: bytes = DIGEST
) -> "grpc.Future[pb.LookupResponse]":
    """Ask without blocking this thread."""
    return client.stub.Lookup.future(
        request(client, wait_seconds, digest), timeout=SECONDS, metadata=client.metadata
    )


def test_a_lease_tells_why_it_missed_and_how_long_it_lasts(client: Client) -> None:
    """So that a client can say so."""
    lease = leased(client)
    assert (lease.miss_reason, lease.seconds) == ("unknown", client.hello.limits.lease_seconds)
    assert client.status().leases.held == 1


def test_only_the_holders_session_can_release(daemon: Daemon, client: Client) -> None:
    """Anybody else's word changes nothing."""
    lease = leased(client)
    with Client(daemon.directory) as other:
        other.call("ReleaseLease", pb.ReleaseLeaseRequest(lease_id=lease.id))
        assert client.status().leases.held == 1
    client.call("ReleaseLease", pb.ReleaseLeaseRequest(lease_id=lease.id))
    assert client.status().leases.held == 0
    client.call("ReleaseLease", pb.ReleaseLeaseRequest(lease_id=lease.id))  # no error


def test_releasing_needs_a_session(daemon: Daemon) -> None:
    """As everything that belongs to one."""
    with Client(daemon.directory, session=False) as client, refused(UNAUTHENTICATED):
        client.call("ReleaseLease", pb.ReleaseLeaseRequest(lease_id=1))


def test_the_end_of_a_session_passes_the_lease_on(daemon: Daemon, client: Client) -> None:
    """Without a word from its process."""
    with Client(daemon.directory) as holder:
        leased(holder)
        future = waiting(client)
        eventually(lambda: client.status().leases.waiting == 1)
    assert future.result(SECONDS).lease.id
    assert client.status().leases.passed_on >= 1


def test_a_wait_ends_with_its_session(daemon: Daemon, client: Client) -> None:
    """Also where the connection that carries the call stays open."""
    with Client(daemon.directory) as holder, Client(daemon.directory) as leaving:
        leased(holder)
        future = waiting(leaving)
        eventually(lambda: client.status().leases.waiting == 1)
        assert leaving.session is not None
        leaving.session.close()
        error = future.exception(SECONDS / 2)
        assert isinstance(error, grpc.RpcError)
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert client.status().leases.waiting == 0


def test_a_store_answers_those_who_wait_with_the_handout(daemon: Daemon, client: Client) -> None:
    """Whoever stores it."""
    with Client(daemon.directory) as holder, Client(daemon.directory) as third:
        leased(holder)
        future = waiting(client)
        eventually(lambda: client.status().leases.waiting == 1)
        third.store(DATA)
        assert future.result(SECONDS).size == len(DATA)
        _, descriptor = client.receive()
        with os.fdopen(descriptor, "rb") as handout:
            assert handout.read() == DATA


def test_what_is_refused_releases_everybody(daemon: Daemon, client: Client) -> None:
    """A BeginStore that is too large says so for all who wait; nobody waits again for a while."""
    with Client(daemon.directory) as holder:
        leased(holder, HUGE)
        future = waiting(client, digest=HUGE)
        eventually(lambda: client.status().leases.waiting == 1)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            holder.begin(1 << 40, HUGE)
        error = future.exception(SECONDS)
        assert isinstance(error, grpc.RpcError)
        assert error.code() is grpc.StatusCode.NOT_FOUND
        with refused(grpc.StatusCode.NOT_FOUND) as errors:
            client.call("Lookup", request(client, digest=HUGE))
    assert trailing(errors[0])["dg-miss-reason"] == "too_large"


def test_one_who_stops_waiting_is_not_given_a_lease(daemon: Daemon, client: Client) -> None:
    """A cancelled call leaves the line, and the lease goes to the one behind it."""
    with Client(daemon.directory) as holder, Client(daemon.directory) as third:
        lease = leased(holder)
        gone = waiting(client)
        eventually(lambda: client.status().leases.waiting == 1)
        behind = waiting(third)
        eventually(lambda: client.status().leases.waiting == 2)
        gone.cancel()
        eventually(lambda: client.status().leases.waiting == 1)
        holder.call("ReleaseLease", pb.ReleaseLeaseRequest(lease_id=lease.id))
        assert behind.result(SECONDS).lease.id


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf, 3601.0])
def test_a_wait_of_no_sense_is_an_invalid_argument(client: Client, seconds: float) -> None:
    """At most an hour."""
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        client.call("Lookup", request(client, seconds))


def test_waits_do_not_count_as_calls_of_their_session() -> None:
    """The store that ends them can be the same session's."""
    with running(limits={"calls_per_session": 2}) as daemon, Client(daemon.directory) as client:
        leased(client)
        futures = [waiting(client) for _ in range(6)]
        eventually(lambda: client.status().leases.waiting == 6)
        client.store(DATA)
        assert [future.result(SECONDS).size for future in futures] == [len(DATA)] * 6


def test_a_daemon_that_stops_lets_nobody_wait(client: Client) -> None:
    """SIGTERM with somebody in the line: the answer comes at once, and the exit in time."""
    with running() as daemon, Client(daemon.directory) as holder:
        leased(holder)
        with Client(daemon.directory) as other:
            future = waiting(other)
            eventually(lambda: other.status().leases.waiting == 1)
            daemon.process.terminate()
            error = future.exception(SECONDS)
            assert isinstance(error, grpc.RpcError)
            assert error.code() is grpc.StatusCode.NOT_FOUND
        assert daemon.process.wait(SECONDS) == 0


def test_pings_of_a_client_that_waits_are_welcome() -> None:
    """One a second for three seconds: more strikes than gRPC forgives by default."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.default_authority", "local"),
        ("grpc.keepalive_time_ms", 1100),
        ("grpc.http2.ping_timeout_ms", 5000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    with running() as daemon, Client(daemon.directory) as holder:
        leased(holder)
        with (
            Client(daemon.directory) as client,
            grpc.insecure_channel(f"unix:{client.path('rpc.sock')}", options=options) as channel,
        ):
            client.stub = type(client.stub)(channel)  # type: ignore[no-untyped-call]
            future = waiting(client, wait_seconds=5)
            lease = future.result(SECONDS).lease  # its budget over, beside the holder
            assert lease.id
