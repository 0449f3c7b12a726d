"""Bytes that are no protocol, on every socket: whoever sends them is closed, and nobody else."""

import os
import socket
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import (
    SPACE,
    Client,
    Daemon,
    connected,
    eventually,
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


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """A daemon that waits half a second for a handshake."""
    with running(limits={"handshake_seconds": 0.5}) as daemon:
        yield daemon
        assert daemon.process.poll() is None, daemon.logged()
        assert "Traceback" not in daemon.logged()


def wrong_descriptors(kind: str, stack: ExitStack, directory: Path) -> list[int]:
    """Open what a daemon should never hold."""

    def opened(descriptor: int) -> int:
        stack.callback(os.close, descriptor)
        return descriptor

    if kind == "a FIFO":
        os.mkfifo(directory / "fifo")
        return [opened(os.open(directory / "fifo", os.O_RDWR))]
    if kind == "/dev/zero":
        return [opened(os.open("/dev/zero", os.O_RDWR))]
    if kind == "a path":
        return [opened(os.open("/", os.O_PATH))]
    if kind == "a socket":
        return [end.fileno() for end in map(stack.enter_context, socket.socketpair())]
    null = opened(os.open("/dev/null", os.O_RDONLY))
    return [opened(os.dup(null)) for _ in range(200)]


@pytest.mark.root
@pytest.mark.parametrize("name", ["session.sock", "rpc.sock"])
@pytest.mark.parametrize("kind", ["a FIFO", "/dev/zero", "a path", "a socket", "200 at once"])
def test_descriptors_sent_to_the_daemon_do_not_arrive(
    client: Client, daemon: Daemon, short_directory: Path, name: str, kind: str
) -> None:
    """Closing somebody's descriptor can block for ever: the sender is refused, or the kernel drops
    them. The daemon has not one descriptor more than the connection itself needs."""
    sort = socket.SOCK_SEQPACKET if name == "session.sock" else socket.SOCK_STREAM
    assert client.status().connections == 1

    def settled() -> bool:
        """What an earlier test let go of is closed in the loop's next turn, not in the same."""
        first = daemon.descriptors()
        client.status()
        return daemon.descriptors() == first

    eventually(settled)
    before = daemon.descriptors()
    with ExitStack() as stack:
        descriptors = array("i", wrong_descriptors(kind, stack, short_directory))
        sender = stack.enter_context(connected(str(daemon.directory / name), sort))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
        with suppress(PermissionError):
            sender.sendmsg([PREFACE + SETTINGS], rights)
        assert client.store(b"meanwhile")
        own = 1 if name == "session.sock" else 3  # a relay has two ends, and gRPC's own
        assert daemon.descriptors() <= before + own
    eventually(lambda: daemon.descriptors() == before)


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
