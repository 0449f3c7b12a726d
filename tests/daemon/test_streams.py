"""Read and Write: the same bytes and the same checks, for clients without descriptors."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import MIB, SECONDS, SPACE, Client, eventually, refused, running, sha256

CHUNK = MIB
LENGTHS = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK]


def begin(size: int, expected: bytes = b"") -> pb.WriteRequest:
    return pb.WriteRequest(
        begin=pb.WriteBegin(deltaspace=SPACE, size=size, expected_sha256=expected)
    )


def pieces(data: bytes, size: int = CHUNK) -> list[pb.WriteRequest]:
    return [pb.WriteRequest(data=data[at : at + size]) for at in range(0, len(data), size)]


def write(client: Client, *messages: pb.WriteRequest) -> bytes:
    digest: bytes = client.stub.Write(iter(messages), timeout=SECONDS).sha256
    return digest


def read(client: Client, digest: bytes) -> list[pb.ReadResponse]:
    return list(client.stub.Read(pb.ReadRequest(deltaspace=SPACE, sha256=digest), timeout=SECONDS))


def nothing_is_kept(client: Client) -> bool:
    status = client.status()
    return (status.store.reserved_bytes, status.store.entries, status.stores_in_progress) == (
        0,
        0,
        0,
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_bytes_come_back_as_they_were_written(client: Client, length: int) -> None:
    """At every boundary; the first answer has the size, none more than a mebibyte."""
    data = os.urandom(length)
    digest = write(client, begin(length, sha256(data)), *pieces(data))
    assert digest == sha256(data)
    first, *rest = read(client, digest)
    assert (first.size, first.data) == (length, b"")
    assert b"".join(answer.data for answer in rest) == data
    assert all(0 < len(answer.data) <= CHUNK for answer in rest)


@pytest.mark.parametrize("size", [1, 1000, 3 * CHUNK])
def test_pieces_of_any_size_are_taken(client: Client, size: int) -> None:
    """Empty ones, too."""
    data = os.urandom(max(2000, 2 * size) if size > 1 else 100)
    messages = [begin(len(data)), pb.WriteRequest(data=b""), *pieces(data, size)]
    assert write(client, *messages, pb.WriteRequest(data=b"")) == sha256(data)


def test_the_two_ways_store_the_same(client: Client) -> None:
    """What one way stored, the other reads."""
    digest = client.store(b"by pipe")
    assert read(client, digest)[1].data == b"by pipe"
    digest = write(client, begin(9), pb.WriteRequest(data=b"by stream"))
    with os.fdopen(client.lookup(digest), "rb") as handout:
        assert handout.read() == b"by stream"


DATA = b"abc"
WRONG = {
    "nothing at all": [],
    "no begin": [pb.WriteRequest(data=DATA)],
    "an empty first message": [pb.WriteRequest(), begin(3), *pieces(DATA)],
    "too few bytes": [begin(4), *pieces(DATA)],
    "no bytes": [begin(1)],
    "too many bytes": [begin(2), *pieces(DATA)],
    "bytes for an empty reference": [begin(0), *pieces(DATA)],
    "another digest": [begin(3, sha256(b"other")), *pieces(DATA)],
    "a digest that is none": [begin(3, b"short"), *pieces(DATA)],
    "a second begin": [begin(3), begin(3), *pieces(DATA)],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_write_keeps_nothing(client: Client, kind: str) -> None:
    """INVALID_ARGUMENT, and the reservation is given back."""
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        write(client, *WRONG[kind])
    eventually(lambda: nothing_is_kept(client))


def test_a_write_that_is_too_large_is_refused_at_its_begin(client: Client) -> None:
    """Nobody sends 33 MiB to hear at the end that there was no room."""
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
        write(client, begin(client.hello.limits.max_entry_bytes + 1))
    assert nothing_is_kept(client)


class _Held:
    """Messages that stop after the given ones until `end`."""

    def __init__(self, *messages: pb.WriteRequest) -> None:
        self._messages = messages
        self._ended = threading.Event()
        self.sent = threading.Event()

    def __iter__(self) -> Iterator[pb.WriteRequest]:
        yield from self._messages
        self.sent.set()
        self._ended.wait(SECONDS)

    def end(self) -> None:
        self._ended.set()


@pytest.mark.parametrize(
    ("size", "sent"),
    [(5 * CHUNK, 0), (5 * CHUNK, 1), (5 * CHUNK, 5 * CHUNK // 2), (5 * CHUNK, 5 * CHUNK), (1, 1)],
)
def test_a_write_that_is_cancelled_keeps_nothing(client: Client, size: int, sent: int) -> None:
    """Before, amid and after the bytes: a client that goes away before it said that this is the
    end stores nothing and leaves no reservation."""
    messages = _Held(begin(size), *pieces(os.urandom(sent)))
    call = client.stub.Write.future(iter(messages), timeout=SECONDS)
    assert messages.sent.wait(SECONDS)
    eventually(lambda: client.status().stores_in_progress == 1)
    for _ in range(20):  # calls that come after the bytes on the same connection
        assert client.status().stores_in_progress == 1
    assert client.status().store.reserved_bytes > size
    call.cancel()
    messages.end()
    eventually(lambda: nothing_is_kept(client), 8)  # before the idle limit would


def test_a_writer_that_stalls_is_told_so() -> None:
    """The call ends at the limit; it does not wait for the client's next message."""
    limits = {"deposit_idle_seconds": 0.2}
    with running(limits=limits) as daemon, Client(daemon.directory) as client:
        messages = _Held(begin(100), *pieces(b"some"))
        with refused(grpc.StatusCode.UNAVAILABLE):
            client.stub.Write(iter(messages), timeout=10)
        messages.end()
        eventually(lambda: nothing_is_kept(client))


@contextmanager
def streaming(client: Client, digest: bytes) -> Iterator[Iterator[pb.ReadResponse]]:
    """Begin a Read whose bytes are too many for buffers, and leave it in progress."""
    call = client.stub.Read(pb.ReadRequest(deltaspace=SPACE, sha256=digest), timeout=SECONDS)
    try:
        assert next(call).size == 16 * MIB
        yield call
    finally:
        call.cancel()


def test_reads_at_once_are_limited() -> None:
    """Over all connections, before anything is decrypted: RESOURCE_EXHAUSTED, and a descriptor may
    be had all the same. A place is free again when its stream ends, is cancelled, or was for
    nothing."""
    with (
        running(limits={"reads_at_once": 2}) as daemon,
        Client(daemon.directory) as client,
        Client(daemon.directory) as other,
    ):
        assert client.hello.limits.reads_at_once == 2
        data = os.urandom(16 * MIB)
        digest = client.store(data)
        for _ in range(3):
            with refused(grpc.StatusCode.NOT_FOUND):
                read(client, bytes(32))
        with streaming(client, digest) as first:
            with streaming(other, digest):
                assert client.status().reads_in_progress == 2
                with refused(grpc.StatusCode.RESOURCE_EXHAUSTED) as errors:
                    read(client, digest)
                assert "2 byte streams are in progress" in str(errors[0].details())
                with os.fdopen(client.lookup(digest), "rb") as handout:
                    assert handout.read() == data
            eventually(lambda: client.status().reads_in_progress == 1)
            assert b"".join(part.data for part in read(other, digest)) == data
            assert b"".join(part.data for part in first) == data
        eventually(lambda: client.status().reads_in_progress == 0)
        with streaming(client, digest), streaming(client, digest):
            pass
        eventually(lambda: client.status().reads_in_progress == 0)
        eventually(lambda: client.status().store.handouts == 0)
