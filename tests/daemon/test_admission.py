"""Which calls need a session, and whose session it must be."""

import os
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import (
    SECONDS,
    SPACE,
    Client,
    Daemon,
    connected,
    eventually,
    refused,
)

DIGEST = bytes(32)
NEED_A_SESSION = {
    "Lookup": pb.LookupRequest(deltaspace=SPACE, sha256=DIGEST),
    "BeginStore": pb.BeginStoreRequest(deltaspace=SPACE, size=1),
    "CommitStore": pb.CommitStoreRequest(),
    "AbortStore": pb.AbortStoreRequest(),
}
NEED_NONE = {
    "Contains": pb.ContainsRequest(deltaspace=SPACE, sha256=DIGEST),
    "Evict": pb.EvictRequest(deltaspace=SPACE),
    "Clear": pb.ClearRequest(),
    "List": pb.ListRequest(),
    "Status": pb.StatusRequest(),
}


@pytest.mark.parametrize("method", NEED_A_SESSION)
def test_what_needs_a_session_is_refused_without_one(client: Client, method: str) -> None:
    """Descriptors can go to nobody, and a deposit would have no owner."""
    client.metadata = ()
    with refused(grpc.StatusCode.UNAUTHENTICATED):
        client.call(method, NEED_A_SESSION[method])


@pytest.mark.parametrize("method", NEED_NONE)
def test_what_needs_no_session_is_served_without_one(daemon: Daemon, method: str) -> None:
    """As the contract lists it."""
    with Client(daemon.directory, session=False) as client:
        client.call(method, NEED_NONE[method])


def test_streams_and_standard_services_are_served_without_a_session(daemon: Daemon) -> None:
    """Read, Write, health and reflection, for clients that cannot receive descriptors."""
    with Client(daemon.directory, session=False) as client:
        begin = pb.WriteBegin(deltaspace=SPACE, size=1)
        messages = [pb.WriteRequest(begin=begin), pb.WriteRequest(data=b"x")]
        digest = client.stub.Write(iter(messages), timeout=SECONDS).sha256
        read = client.stub.Read(pb.ReadRequest(deltaspace=SPACE, sha256=digest), timeout=SECONDS)
        assert b"".join(answer.data for answer in read) == b"x"
        for service in ("", "dgcache.v1.ReferenceCache"):
            health = client.health.Check(
                health_pb2.HealthCheckRequest(service=service), timeout=SECONDS
            )
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (listed,) = reflection.ServerReflectionInfo(iter([question]), timeout=SECONDS)
        names = {service.name for service in listed.list_services_response.service}
        assert {"dgcache.v1.ReferenceCache", "grpc.health.v1.Health"} <= names


def test_two_sessions_of_one_process_do_not_mix(client: Client, daemon: Daemon) -> None:
    """Each has its own request ids and gets its own descriptors."""
    with Client(daemon.directory) as other:
        assert other.hello.session_id != client.hello.session_id
        request_id, write_end = client.begin(1)
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(b"x")
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            other.commit(request_id)
        assert client.commit(request_id)


def test_a_session_ends_with_its_socket(client: Client) -> None:
    """Its id is worth nothing afterwards, even to the process that had it."""
    assert client.call("Status", pb.StatusRequest()).sessions == 1
    assert client.session is not None
    client.session.shutdown(socket.SHUT_RDWR)
    eventually(lambda: client.status().sessions == 0)
    with refused(grpc.StatusCode.UNAUTHENTICATED):
        client.call("Status", pb.StatusRequest())


def test_the_hello_says_who_speaks_and_what_is_allowed(client: Client, daemon: Daemon) -> None:
    """It is the first packet, comes unasked, and every session has an id of its own."""
    hello = client.hello
    assert (hello.protocol, hello.oldest_protocol, len(hello.session_id)) == (2, 1, 16)
    assert hello.limits.max_entry_bytes == client.status().store.max_entry_bytes
    assert hello.limits.max_message_bytes == 4 << 20
    with connected(str(daemon.directory / "session.sock"), socket.SOCK_SEQPACKET) as second:
        assert pb.SessionMessage.FromString(second.recv(4096)).hello.session_id != hello.session_id
