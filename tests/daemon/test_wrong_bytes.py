"""Bytes that are no protocol, on every socket: whoever sends them is closed, and nobody else."""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress

import grpc
import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import (
    MIB,
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


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame (RFC 9113, 4.1)."""
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    )


ON_RPC = {
    "random bytes": os.urandom(100_000),
    "zeros": bytes(100_000),
    "HTTP/1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a TLS hello": bytes.fromhex("16030100c8010000c40303") + os.urandom(200),
    "a frame of 16 MiB": PREFACE
    + SETTINGS
    + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"
    + bytes(16 * MIB),
    "a frame of no kind": PREFACE + SETTINGS + frame(0xFE, 0xFF, 1, b"x" * 1000),
    "data on no stream": PREFACE + SETTINGS + frame(0, 0, 99, b"x" * 1000),
    "headers that are none": PREFACE + SETTINGS + frame(1, 4, 1, os.urandom(500)),
    "a window of nothing": PREFACE + SETTINGS + frame(8, 0, 0, bytes(4)),
    "many pings": PREFACE + SETTINGS + frame(6, 0, 0, bytes(8)) * 20_000,
    "many settings": PREFACE + SETTINGS * 20_000,
    "endless headers": PREFACE + SETTINGS + frame(1, 0, 1, b"") + frame(9, 0, 1, bytes(9000)) * 500,
    "resets": PREFACE + SETTINGS + frame(3, 0, 1, bytes(4)) * 20_000,
}


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """A daemon that waits half a second for a handshake."""
    with running(limits={"handshake_seconds": 0.5}) as daemon:
        yield daemon
        assert daemon.process.poll() is None, daemon.logged()
        assert "Traceback" not in daemon.logged()


@pytest.mark.parametrize("kind", ON_RPC)
def test_what_is_no_grpc_ends_its_own_connection(client: Client, daemon: Daemon, kind: str) -> None:
    """A bystander is served meanwhile, and the connection is gone in the end."""
    assert client.store(b"before")
    with connected(str(daemon.directory / "rpc.sock"), socket.SOCK_STREAM) as wrong:
        with suppress(ConnectionError):
            wrong.sendall(ON_RPC[kind])
        assert client.store(b"meanwhile")
        with suppress(OSError):
            wrong.shutdown(socket.SHUT_WR)
        read_to_end(wrong)
    eventually(lambda: client.status().connections == 1)


def test_rapid_resets_do_not_stop_a_bystander(client: Client, daemon: Daemon) -> None:
    """Streams opened and cancelled at once, thousands of them (CVE-2023-44487)."""
    with Client(daemon.directory) as hasty:
        request = pb.ContainsRequest(deltaspace=SPACE, sha256=bytes(32))
        for number in range(2000):
            hasty.stub.Contains.future(request, timeout=10).cancel()
            if number % 100 == 0:
                assert client.store(b"meanwhile")


ON_SESSION = {
    "a byte": b"\0",
    "nothing": b"",
    "a message": pb.SessionMessage(hello=pb.Hello(protocol=1)).SerializeToString(),
    "random bytes": os.urandom(4096),
    "more than is read": os.urandom(100_000),
}


@pytest.mark.parametrize("kind", ON_SESSION)
def test_a_packet_of_a_client_ends_its_session(client: Client, daemon: Daemon, kind: str) -> None:
    """In version 1 the client has nothing to say there; its deposits end with the session."""
    with Client(daemon.directory) as talker:
        _, write_end = talker.begin(MIB)
        assert talker.session is not None
        talker.session.send(ON_SESSION[kind])
        assert read_to_end(talker.session) == b""
        with refused(grpc.StatusCode.UNAUTHENTICATED):
            talker.begin(1)
        eventually(lambda: client.status().store.reserved_bytes == 0)
        os.close(write_end)
    assert client.store(b"a bystander's")


# Messages in protobuf's own bytes, each of which its parser must refuse.
MALFORMED = {
    "text": b"What is this?",
    "cut": pb.LookupRequest(deltaspace=SPACE, sha256=bytes(32)).SerializeToString()[:-1],
    "a length past the end": b"\x12\xff\xff\xff\xff\x0f",
    "an endless number": b"\x08" + b"\xff" * 20,
    "a group that never ends": b"\x0b" * 200,
    "a bucket that is no UTF-8": b"\x12\x04\x0a\x02\xff\xfe",
    "a field of number 0": b"\x00\x01",
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_message_is_an_invalid_argument(
    client: Client, daemon: Daemon, kind: str
) -> None:
    """It ends its call; the session and the connection go on, and nothing of it is logged."""
    before = daemon.logged()
    for method in ("Lookup", "BeginStore"):
        call = client.channel.unary_unary(f"/dgcache.v1.ReferenceCache/{method}")
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            call(MALFORMED[kind], timeout=10, metadata=client.metadata)
    stream = client.channel.stream_unary("/dgcache.v1.ReferenceCache/Write")
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        stream(iter([MALFORMED["cut"]]), timeout=10, metadata=client.metadata)
    assert client.store(b"afterwards")
    assert daemon.logged() == before
