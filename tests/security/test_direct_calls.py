"""Calls on the session's own socket: the answers are gRPC's, and abuse gains nothing."""

import math
import os
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import (
    FOREIGN_UID,
    MIB,
    SPACE,
    Client,
    Daemon,
    ended_well,
    eventually,
    read_to_end,
    running,
    sha256,
    trailing,
)

DATA = b"what everybody else goes on getting"
ABSENT = sha256(b"never stored")


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    with running() as daemon:
        yield daemon
        assert daemon.process.poll() is None, daemon.logged()
        assert "Traceback" not in daemon.logged()


@pytest.fixture
def daemon(shared: Daemon) -> Daemon:
    with Client(shared.directory, session=False) as client:
        eventually(lambda: client.status().sessions == 0)
        client.stub.Clear(pb.ClearRequest(), timeout=10)
    return shared


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with Client(daemon.directory) as connected:
        yield connected


def call(method: str, request: Message | bytes, call_id: int = 1, seconds: float = 10.0) -> bytes:
    """Return a packet."""
    packed = request if isinstance(request, bytes) else request.SerializeToString()
    return pb.Call(
        id=call_id, method=method, request=packed, timeout_seconds=seconds
    ).SerializeToString()


def heard(client: Client) -> tuple[pb.SessionMessage, list[int]]:
    """Return the next packet that is more than a sign of life, and its descriptors."""
    assert client.session is not None
    while True:
        packet, ancillary, _, _ = client.session.recvmsg(
            1 << 16, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
        )
        rights = array("i")
        for _, _, data in ancillary:
            rights.frombytes(data)
        message = pb.SessionMessage.FromString(packet)
        if message.WhichOneof("kind") != "alive":
            return message, rights.tolist()


def asked(
    client: Client, method: str, request: Message | bytes, seconds: float = 10.0
) -> pb.Answer:
    """Make a call on the session; descriptors that come before its answer are closed."""
    assert client.session is not None
    client.session.send(call(method, request, 7))
    while True:
        message, descriptors = heard(client)
        for descriptor in descriptors:
            os.close(descriptor)
        if message.WhichOneof("kind") == "answer":
            assert message.answer.call_id == 7
            return message.answer


def require_ended(client: Client, daemon: Daemon, reason: str) -> None:
    """The session is over, the log says why, and who asks next is served."""
    assert client.session is not None
    read_to_end(client.session)
    eventually(lambda: f'session-ended reason="{reason}"' in daemon.logged())
    with (
        Client(daemon.directory) as bystander,
        os.fdopen(bystander.lookup(bystander.store(DATA)), "rb") as handout,
    ):
        assert handout.read() == DATA


SAME = [
    ("Lookup", pb.LookupRequest(request_id=1, deltaspace=SPACE, sha256=ABSENT)),
    ("Lookup", pb.LookupRequest(request_id=1, deltaspace=SPACE, sha256=b"short")),
    ("Lookup", pb.LookupRequest(request_id=1, sha256=ABSENT)),
    (
        "Lookup",
        pb.LookupRequest(
            request_id=1, deltaspace=SPACE, sha256=ABSENT, on_miss=1, wait_seconds=math.nan
        ),
    ),
    ("BeginStore", pb.BeginStoreRequest(request_id=1, deltaspace=SPACE, size=1 << 40)),
    ("CommitStore", pb.CommitStoreRequest(request_id=99)),
    ("AbortStore", pb.AbortStoreRequest(request_id=99)),
    ("Contains", pb.ContainsRequest(deltaspace=SPACE, sha256=ABSENT)),
    ("Contains", b"\xff\xff\xff"),
    ("ReleaseLease", pb.ReleaseLeaseRequest(lease_id=5)),
    ("Evict", pb.EvictRequest(deltaspace=SPACE)),
    ("Clear", pb.ClearRequest()),
    ("List", pb.ListRequest()),
    ("List", pb.ListRequest(after_sha256=b"short")),
    ("Nothing", b""),
    ("Watch", b""),
]


@pytest.mark.parametrize(
    ("method", "request_"), SAME, ids=lambda one: one if isinstance(one, str) else ""
)
def test_both_ways_give_the_same_answer(
    client: Client, method: str, request_: Message | bytes
) -> None:
    """Status, message, reason of a miss, and response, byte by byte. Streams are gRPC's alone."""
    packed = request_ if isinstance(request_, bytes) else request_.SerializeToString()
    over_grpc = client.channel.unary_unary(f"/dgcache.v1.ReferenceCache/{method}")
    code, message, reason, response = grpc.StatusCode.OK, "", "", b""
    if method == "Watch":
        code = grpc.StatusCode.UNIMPLEMENTED
    else:
        try:
            response = over_grpc(packed, timeout=10, metadata=client.metadata)
        except grpc.RpcError as error:
            code, message = error.code(), str(error.details())
            reason = trailing(error).get("dg-miss-reason", "")
    answer = asked(client, method, packed)
    assert answer.code == code.value[0]
    if code is not grpc.StatusCode.UNIMPLEMENTED:
        assert (answer.message, answer.miss_reason) == (message, reason)
        assert answer.response == response


def test_a_store_and_a_lookup_need_no_other_socket(daemon: Daemon) -> None:
    """The descriptor comes before the answer, as over gRPC."""
    data = os.urandom(MIB + 1)
    with Client(daemon.directory) as client:
        assert client.session is not None
        begin = pb.BeginStoreRequest(request_id=3, deltaspace=SPACE, size=len(data))
        client.session.send(call("BeginStore", begin))
        message, (write_end,) = heard(client)
        assert message.descriptor == pb.Descriptor(request_id=3, purpose=2)
        assert heard(client)[0].answer.code == 0
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(data)
        stored = asked(client, "CommitStore", pb.CommitStoreRequest(request_id=3))
        digest = pb.CommitStoreResponse.FromString(stored.response).sha256
        assert digest == sha256(data)
        lookup = pb.LookupRequest(request_id=4, deltaspace=SPACE, sha256=digest)
        client.session.send(call("Lookup", lookup))
        message, (handout,) = heard(client)
        assert message.descriptor == pb.Descriptor(request_id=4, purpose=1)
        with os.fdopen(handout, "rb") as file:
            assert file.read() == data
        answer = heard(client)[0].answer
        assert pb.LookupResponse.FromString(answer.response).size == len(data)


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"\xff" * 64, "a packet that does not parse"),
        (b"x", "a packet that does not parse"),
        (call("", b""), "a packet that is no call"),
        (call("Status", b"", 1, 0.0), "a packet that is no call"),
        (call("Status", b"", 1, -1.0), "a packet that is no call"),
        (call("Status", b"", 1, math.nan), "a packet that is no call"),
        (call("Status", b"", 1, math.inf), "a packet that is no call"),
        (call("Status", b"", 1, 86_401.0), "a packet that is no call"),
        (call("Status", bytes(4096)), "a packet of more than 4096 bytes"),
        (bytes(100_000), "a packet of more than 4096 bytes"),
    ],
    ids=[
        "garbage",
        "cut-off",
        "nothing",
        "zero",
        "negative",
        "nan",
        "inf",
        "long",
        "large",
        "vast",
    ],
)
def test_what_is_no_call_ends_its_session(
    daemon: Daemon, client: Client, packet: bytes, reason: str
) -> None:
    """Nothing of it is done, the log names the rule, and the others are served."""
    assert client.session is not None
    client.session.send(packet)
    require_ended(client, daemon, reason)


def test_a_packet_with_a_descriptor_ends_its_session(daemon: Daemon, client: Client) -> None:
    """The daemon never has it: not even to close, which may block (a FUSE file)."""
    assert client.session is not None
    read_end, write_end = os.pipe()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [write_end]))]
    try:
        with suppress(PermissionError):  # SO_PASSRIGHTS, Linux 6.16
            client.session.sendmsg([call("Status", b"")], rights)
            os.close(write_end)
            write_end = -1
            require_ended(client, daemon, "a packet with descriptors")
            assert os.read(read_end, 1) == b"", "somebody has the other end"
    finally:
        for descriptor in (read_end, write_end):
            if descriptor >= 0:
                os.close(descriptor)


_OTHER = """\
import os, socket, sys
uid, packet = int(sys.argv[2]), bytes.fromhex(sys.argv[3])
session = socket.socket(fileno=int(sys.argv[1]))
if uid:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
session.send(packet)
"""


@pytest.mark.parametrize("uid", [0, FOREIGN_UID], ids=["same-user", "another-user"])
def test_who_was_given_a_session_cannot_use_it(daemon: Daemon, client: Client, uid: int) -> None:
    """Another process's packet ends it, though the socket is the right one: nothing is done."""
    if uid and os.geteuid() != 0:
        pytest.skip("needs root: it makes a second real user")
    assert client.session is not None
    client.store(b"kept")
    descriptor = client.session.fileno()
    argv = [sys.executable, "-c", _OTHER, str(descriptor), str(uid), call("Clear", b"").hex()]
    subprocess.run(argv, check=True, pass_fds=[descriptor], timeout=60)
    read_to_end(client.session)
    eventually(lambda: 'reason="a packet of another process"' in daemon.logged())
    assert client.status().store.entries == 1


def test_a_flood_of_calls_nobody_reads_the_answers_of_ends_at_a_limit(daemon: Daemon) -> None:
    """As many wait as may, then the session is over, and what it began is given back."""
    with Client(daemon.directory) as bystander, Client(daemon.directory) as client:
        digest = bystander.store(DATA)
        assert client.session is not None
        client.session.setblocking(False)
        sent = 0
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while sent < 1_000_000:
                lookup = pb.LookupRequest(request_id=sent, deltaspace=SPACE, sha256=digest)
                try:
                    client.session.send(call("Lookup", lookup, sent))
                    sent += 1
                except BlockingIOError:
                    os.close(bystander.lookup(digest))
        eventually(lambda: 'session-ended reason="too many calls at once"' in daemon.logged())
        client.session.setblocking(True)
        with suppress(ConnectionResetError):
            while True:
                packet, ancillary, _, _ = client.session.recvmsg(1 << 16, socket.CMSG_SPACE(4))
                for _, _, data in ancillary:
                    os.close(array("i", data)[0])
                if not packet:
                    break
        eventually(lambda: bystander.status().sessions == 1)
        eventually(lambda: bystander.status().store.handout_bytes == 0)


def test_answers_wait_for_a_reader_who_comes_late(daemon: Daemon, client: Client) -> None:
    """They are more than the socket holds; none is lost and none comes twice."""
    assert client.session is not None
    calls = 2 * client.hello.limits.calls_per_session
    for number in range(calls):
        client.session.send(call("Status", b"", number))
    with Client(daemon.directory) as bystander:
        for _ in range(20):  # by then all have been served, and some answers do not fit
            bystander.status()
    answers = [heard(client)[0].answer for _ in range(calls)]
    assert sorted(answer.call_id for answer in answers) == list(range(calls))
    assert {answer.code for answer in answers} == {0}


@contextmanager
def lease(client: Client, digest: bytes) -> Iterator[None]:
    """Hold the lease of a digest."""
    request = pb.LookupRequest(request_id=1, deltaspace=SPACE, sha256=digest, on_miss=1)
    answer = client.call("Lookup", request)
    yield
    with suppress(grpc.RpcError):
        client.call("ReleaseLease", pb.ReleaseLeaseRequest(lease_id=answer.lease.id))


def waiting(digest: bytes, call_id: int, seconds: float = 60.0) -> bytes:
    """Return the packet of a call that waits for somebody's fetch."""
    request = pb.LookupRequest(
        request_id=call_id, deltaspace=SPACE, sha256=digest, on_miss=1, wait_seconds=600
    )
    return call("Lookup", request, call_id, seconds)


def test_calls_that_wait_block_neither_their_session_nor_the_daemon(
    daemon: Daemon, client: Client
) -> None:
    """All but one of those a session may have wait; the store that ends them is its own."""
    assert client.session is not None
    most = 2 * client.hello.limits.calls_per_session
    with Client(daemon.directory) as holder, lease(holder, sha256(DATA)):
        for number in range(1, most):
            client.session.send(waiting(sha256(DATA), 1000 + number))
        eventually(lambda: holder.status().leases.waiting == most - 1)
        assert (
            asked(client, "Contains", pb.ContainsRequest(deltaspace=SPACE, sha256=ABSENT)).code == 0
        )
        client.session.close()
        client.session = None
        eventually(lambda: holder.status().leases.waiting == 0)


def test_a_deadline_ends_a_call_in_the_daemon_too(daemon: Daemon, client: Client) -> None:
    """Its place in the line is given up, and the session goes on."""
    assert client.session is not None
    with Client(daemon.directory) as holder, lease(holder, ABSENT):
        client.session.send(waiting(ABSENT, 9, 0.2))
        answer = heard(client)[0].answer
        assert (answer.call_id, answer.code) == (9, grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
        eventually(lambda: holder.status().leases.waiting == 0)
        assert asked(client, "Status", b"").code == 0


def test_a_daemon_that_stops_answers_who_waits(short_directory: Any) -> None:
    """And refuses what comes meanwhile; it ends in good order."""
    with (
        running(short_directory / "s") as daemon,
        Client(daemon.directory) as holder,
        Client(daemon.directory) as client,
        lease(holder, ABSENT),
    ):
        assert client.session is not None
        client.session.send(waiting(ABSENT, 9))
        eventually(lambda: holder.status().leases.waiting == 1)
        status = daemon.stop(signal.SIGTERM)
        answer = heard(client)[0].answer
        assert (answer.call_id, answer.code) == (9, grpc.StatusCode.NOT_FOUND.value[0])
        ended_well(daemon, status)
