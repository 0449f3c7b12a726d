"""Deposits: whatever the writer does, nothing wrong is kept and the room comes back."""

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.refused_syscalls import refusing_meanwhile
from tests.support.wire import (
    MIB,
    SECONDS,
    SPACE,
    Client,
    Daemon,
    as_user,
    eventually,
    refused,
    running,
    sha256,
)

DATA = b"the bytes of a reference"


def nothing_is_kept(client: Client) -> bool:
    status = client.status()
    return (status.store.reserved_bytes, status.store.entries, status.stores_in_progress) == (
        0,
        0,
        0,
    )


def pour(write_end: int, data: bytes) -> None:
    """Write all and close; a reader that gave up is no error here."""
    try:
        with os.fdopen(write_end, "wb", buffering=0) as pipe:
            left = memoryview(data)
            while left:
                left = left[pipe.write(left) or 0 :]
    except BrokenPipeError:
        pass


@pytest.mark.parametrize("length", [0, 1, MIB - 1, MIB, MIB + 1, 5 * MIB])
def test_a_right_deposit_is_kept(client: Client, length: int) -> None:
    """At every boundary of the chunks."""
    data = os.urandom(length)
    request_id, write_end = client.begin(length, sha256(data))
    pour(write_end, data)
    assert client.commit(request_id) == sha256(data)
    with os.fdopen(client.lookup(sha256(data)), "rb") as handout:
        assert handout.read() == data
    assert client.status().store.reserved_bytes == 0


def test_room_is_reserved_before_a_byte_is_sent(client: Client) -> None:
    """And given back by an abort, after which the pipe has no reader."""
    request_id, write_end = client.begin(7 * MIB)
    status = client.status()
    assert status.store.reserved_bytes >= 7 * MIB
    assert status.stores_in_progress == 1
    client.call("AbortStore", pb.AbortStoreRequest(request_id=request_id))
    eventually(lambda: nothing_is_kept(client))
    with pytest.raises(BrokenPipeError):
        os.write(write_end, b"x")
    os.close(write_end)
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        client.commit(request_id)


def test_an_abort_at_the_end_of_the_bytes_is_no_half_of_one(client: Client) -> None:
    """Whether it comes before, with, or after the last byte, the room comes back at once."""
    for _ in range(50):
        request_id, write_end = client.begin(1)
        os.write(write_end, b"x")
        os.close(write_end)
        client.call("AbortStore", pb.AbortStoreRequest(request_id=request_id))
    eventually(lambda: nothing_is_kept(client), 5)


def test_a_store_is_committed_once(client: Client) -> None:
    """The second time it is unknown; an abort afterwards takes nothing away."""
    request_id, write_end = client.begin(len(DATA))
    pour(write_end, DATA)
    digest = client.commit(request_id)
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        client.commit(request_id)
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        client.call("AbortStore", pb.AbortStoreRequest(request_id=request_id))
    os.close(client.lookup(digest))


def test_stores_that_begin_together_under_one_request_id_are_one(client: Client) -> None:
    """The first is kept as it is; every other is refused, and its room is free again."""
    request = pb.BeginStoreRequest(request_id=77, deltaspace=SPACE, size=len(DATA))
    futures = [
        client.stub.BeginStore.future(request, timeout=SECONDS, metadata=client.metadata)
        for _ in range(8)
    ]
    errors = [future.exception(SECONDS) for future in futures]
    assert errors.count(None) == 1
    assert {error.code() for error in errors if error is not None} == {
        grpc.StatusCode.INVALID_ARGUMENT
    }
    _, write_end = client.receive()
    eventually(lambda: client.status().stores_in_progress == 1)
    pour(write_end, DATA)
    assert client.commit(77) == sha256(DATA)
    assert client.status().store.reserved_bytes == 0


def test_a_store_of_another_session_cannot_be_ended(client: Client, daemon: Daemon) -> None:
    """Neither committed nor aborted: request ids are the session's own."""
    request_id, write_end = client.begin(len(DATA))
    with Client(daemon.directory) as other:
        for method in ("CommitStore", "AbortStore"):
            request = getattr(pb, f"{method}Request")(request_id=request_id)
            with refused(grpc.StatusCode.INVALID_ARGUMENT):
                other.call(method, request)
    pour(write_end, DATA)
    assert client.commit(request_id) == sha256(DATA)


def test_a_request_id_in_use_is_refused(client: Client) -> None:
    """The store that has it goes on."""
    request_id, write_end = client.begin(len(DATA))
    request = pb.BeginStoreRequest(request_id=request_id, deltaspace=SPACE, size=1)
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        client.call("BeginStore", request)
    pour(write_end, DATA)
    assert client.commit(request_id) == sha256(DATA)
    assert client.status().store.reserved_bytes == 0


# Begins a store, writes a part of it, says so, and waits for its end.
WRITER = """
from pathlib import Path
from tests.support.wire import Client
client = Client(Path(sys.argv[1]))
request_id, write_end = client.begin(5 << 20)
os.write(write_end, bytes(1000))
if sys.argv[2] == "commit":
    from dgcache_proto.v1 import dgcache_pb2 as pb
    call = client.stub.CommitStore.future(
        pb.CommitStoreRequest(request_id=request_id), metadata=client.metadata)
print("begun", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def strict() -> Iterator[Daemon]:
    """A daemon that waits for nobody."""
    limits = {
        "deposit_idle_seconds": 0.3,
        "deposit_bytes_per_second": 1_000_000,
        "commit_seconds": 0.3,
        "stores_at_once": 4,
    }
    with running(limits=limits) as daemon:
        yield daemon


@pytest.fixture
def hurried(strict: Daemon) -> Iterator[Client]:
    """Its client, with nothing stored."""
    with Client(strict.directory) as client:
        client.call("Clear", pb.ClearRequest())
        yield client


def test_a_commit_that_waits_does_not_outlive_the_session(client: Client) -> None:
    """The end of a session aborts its stores, also one whose commit waits for the last bytes."""
    request_id, write_end = client.begin(len(DATA))
    call = client.stub.CommitStore.future(
        pb.CommitStoreRequest(request_id=request_id), metadata=client.metadata, timeout=SECONDS
    )
    assert client.call("Status", pb.StatusRequest()).stores_in_progress == 1
    assert client.session is not None
    client.session.shutdown(socket.SHUT_RDWR)
    eventually(lambda: client.status().sessions == 0)
    eventually(lambda: nothing_is_kept(client), 5)
    pour(write_end, DATA)
    assert call.code() is not grpc.StatusCode.OK


def test_a_complete_deposit_that_nobody_commits_is_dropped(hurried: Client) -> None:
    """After `commit_seconds` its room is somebody else's."""
    request_id, write_end = hurried.begin(len(DATA))
    pour(write_end, DATA)
    eventually(lambda: nothing_is_kept(hurried))
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        hurried.commit(request_id)


def test_the_id_of_a_store_that_ended_by_itself_is_forgotten(hurried: Client) -> None:
    """A session's table of stores does not grow with those that nobody ended."""
    request_id, write_end = hurried.begin(1)
    os.close(write_end)
    eventually(lambda: nothing_is_kept(hurried))
    request = pb.BeginStoreRequest(request_id=request_id, deltaspace=SPACE, size=1)

    def forgotten() -> bool:
        try:
            hurried.call("BeginStore", request)
        except grpc.RpcError:
            return False
        os.close(hurried.receive()[1])
        return True

    eventually(forgotten, 5)


def test_stores_at_once_are_limited(hurried: Client) -> None:
    """The fifth is refused, and admitted when one of the four has ended."""
    begun = [hurried.begin(len(DATA)) for _ in range(4)]
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
        hurried.begin(len(DATA))
    for request_id, write_end in begun:
        pour(write_end, DATA)
        hurried.commit(request_id)
    hurried.store(DATA)


def test_stores_that_nobody_ends_are_bounded() -> None:
    """Those that failed by themselves count until they are forgotten; ending one makes room."""
    with running(limits={"deposits_per_session": 4}) as daemon, Client(daemon.directory) as client:
        begun = [client.begin(1) for _ in range(4)]
        for _, write_end in begun:
            os.close(write_end)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            client.begin(1)
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            client.commit(begun[0][0])
        assert client.store(DATA)


def test_deposits_that_nobody_commits_cannot_use_up_the_budget() -> None:
    """When every key is taken by such deposits, what is refused then leaves no reservation."""
    limits = {"commit_seconds": 0.5}
    with (
        running(limits=limits, store={"max_entries": 4}) as daemon,
        Client(daemon.directory) as client,
    ):
        for _ in range(4):
            os.close(client.begin(0)[1])
        for _ in range(3):
            with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
                client.begin(MIB)
        eventually(lambda: nothing_is_kept(client), 5)
        assert client.store(DATA)


def test_a_writer_is_not_stopped_by_anothers_end(client: Client, daemon: Daemon) -> None:
    """Sessions come and go meanwhile."""
    request_id, write_end = client.begin(len(DATA))
    as_user(None, WRITER, daemon.directory, "write")
    pour(write_end, DATA)
    assert client.commit(request_id) == sha256(DATA)


@pytest.mark.root
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, which refuses the calls")
@pytest.mark.parametrize("call", ["ioctl", "pipe2", "eventfd2"])
def test_a_store_that_gets_no_pipe_leaves_nothing_behind(
    client: Client, daemon: Daemon, short_directory: Path, call: str
) -> None:
    """Whatever of its pipe is refused: no room, no place and no descriptor stays taken."""
    client.store(b"everything that a store needs is there")
    before = daemon.descriptors()
    with refusing_meanwhile(daemon.pid, call, "ENOMEM", short_directory / "trace"):
        for _ in range(3):
            with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
                client.begin(100_000)
    status = client.status()
    assert (status.store.reserved_bytes, status.stores_in_progress) == (0, 0)
    eventually(lambda: daemon.descriptors() <= before)
