"""Past a limit the daemon refuses, and everybody who was there before goes on."""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import (
    MIB,
    SECONDS,
    SPACE,
    Client,
    Daemon,
    connected,
    eventually,
    read_to_end,
    refused,
    running,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@pytest.fixture(scope="module")
def small() -> Iterator[Daemon]:
    """A daemon with few places and little patience."""
    limits = {"connections": 4, "sessions": 3, "handshake_seconds": 0.5}
    with running(limits=limits) as daemon:
        yield daemon
        assert daemon.process.poll() is None


def test_connections_over_the_limit_are_closed(small: Daemon) -> None:
    """At once and without a word; the fourth goes on, and a place that is free is given again."""
    with Client(small.directory) as client, ExitStack() as stack:
        eventually(lambda: client.status().connections == 1)
        for number in (2, 3, 4):
            one = stack.enter_context(
                connected(str(small.directory / "rpc.sock"), socket.SOCK_STREAM)
            )
            one.sendall(PREFACE + SETTINGS)
            assert one.recv(1)
            assert client.status().connections == number
        for _ in range(10):
            with connected(str(small.directory / "rpc.sock"), socket.SOCK_STREAM) as over:
                assert read_to_end(over) == b""
        assert client.status().connections == 4
        assert client.store(b"established")
        stack.close()
        eventually(lambda: client.status().connections == 1)
        with Client(small.directory) as another:
            assert another.store(b"another")
    assert "limit-reached limit=connections" in small.logged()


def test_sessions_over_the_limit_are_closed(small: Daemon) -> None:
    """Before their Hello; the established ones go on, and a free place is given again."""
    with Client(small.directory) as client, ExitStack() as stack:
        for _ in range(2):
            one = connected(str(small.directory / "session.sock"), socket.SOCK_SEQPACKET)
            assert stack.enter_context(one).recv(4096)
        for _ in range(10):
            with connected(str(small.directory / "session.sock"), socket.SOCK_SEQPACKET) as over:
                assert read_to_end(over) == b""
        assert client.status().sessions == 3
        assert client.store(b"established")
        stack.close()
        eventually(lambda: client.status().sessions == 1)
        with Client(small.directory) as another:
            assert another.store(b"another")
    assert "limit-reached limit=sessions" in small.logged()


def test_an_established_connection_may_be_idle(small: Daemon) -> None:
    """The limit is on the handshake: who has shaken hands is not thrown out for waiting."""
    with Client(small.directory) as client:
        assert client.store(b"before")
        with connected(str(small.directory / "rpc.sock"), socket.SOCK_STREAM) as silent:
            read_to_end(silent)  # which takes as long as the limit
        with connected(str(small.directory / "rpc.sock"), socket.SOCK_STREAM) as silent:
            read_to_end(silent)
        assert client.store(b"after")
        assert client.status().connections == 1


def test_a_message_over_the_limit_is_refused(client: Client) -> None:
    """RESOURCE_EXHAUSTED, and the connection goes on."""
    request = pb.ContainsRequest(deltaspace=SPACE, sha256=bytes(5 * MIB))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
        client.call("Contains", request)
    begin = pb.WriteRequest(begin=pb.WriteBegin(deltaspace=SPACE, size=5 * MIB))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
        client.stub.Write(iter([begin, pb.WriteRequest(data=bytes(5 * MIB))]), timeout=SECONDS)
    eventually(lambda: client.status().store.reserved_bytes == 0)
    assert client.store(b"still here")


def test_calls_over_a_sessions_limit_wait_and_are_served(client: Client) -> None:
    """A client keeps to what Hello tells it; 200 calls, no more than those at once, all succeed."""
    digest = client.store(os.urandom(MIB))
    request = pb.ContainsRequest(deltaspace=SPACE, sha256=digest)
    at_once = client.hello.limits.calls_per_session
    assert at_once == 16

    def contained(_: int) -> bool:
        answer = client.stub.Contains(request, metadata=client.metadata, timeout=SECONDS)
        return bool(answer.contained)

    with ThreadPoolExecutor(at_once) as threads:
        assert all(threads.map(contained, range(200)))


@pytest.mark.root
@pytest.mark.parametrize("free", [0, 1, 2])
def test_a_store_without_descriptors_loses_nothing(free: int) -> None:
    """Whichever of its descriptors is the one too many, it is refused as a full cache is, and
    neither room nor the descriptors it already had are lost."""
    with (
        running(prefix=("prlimit", "--nofile=80")) as daemon,
        Client(daemon.directory) as client,
    ):
        digest = client.store(b"there before")
        before = daemon.descriptors()
        with ExitStack() as stack:
            while daemon.descriptors() < 80 - free:
                path = str(daemon.directory / "session.sock")
                filler = stack.enter_context(connected(path, socket.SOCK_SEQPACKET))
                assert filler.recv(4096)
            for _ in range(3):
                with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
                    client.begin(MIB)
            eventually(lambda: daemon.descriptors() == 80 - free)
        eventually(lambda: client.status().sessions == 1)
        # at most as before, when the pipe of the first store may have been on its way out
        eventually(lambda: daemon.descriptors() <= before)
        assert client.status().store.reserved_bytes == 0
        os.close(client.lookup(digest))
        assert client.store(b"afterwards")
