"""Bytes that are no protocol, on every socket: whoever sends them is closed, and nobody else."""

from collections.abc import Iterator

import grpc
import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import (
    SPACE,
    Client,
    Daemon,
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
