"""Cases 38, 44 and 45: what is no protocol, on either socket, and every field at its extremes.

Whoever sends it is closed or refused, and nobody else: a bystander is served meanwhile.
"""

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from dgcache_core.runtime_directory import RPC_SOCKET
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.bystander import Bystander, bystander
from tests.support.http2 import PREFACE, SETTINGS
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


@pytest.fixture(scope="module")
def serving() -> Iterator[Daemon]:
    """A daemon that waits half a second for a handshake, and lives through all of these."""
    with running(limits={"handshake_seconds": 0.5}) as daemon:
        yield daemon
        assert daemon.process.poll() is None, daemon.logged()
        assert "Traceback" not in daemon.logged()


@pytest.fixture(scope="module")
def lasting(serving: Daemon) -> Iterator[Bystander]:
    """One bystander for all of them."""
    with bystander(serving.directory) as started:
        yield started


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame of any kind (RFC 9113, 4.1), also of none."""
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    )


ON_RPC = {
    "random bytes": os.urandom(100_000),
    "zeros": bytes(100_000),
    "HTTP/1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an upgrade": b"GET / HTTP/1.1\r\nHost: l\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "a TLS hello": bytes.fromhex("16030100c8010000c40303") + os.urandom(200),
    "a frame of 16 MiB": PREFACE
    + SETTINGS
    + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"
    + bytes(16 * MIB),
    "a frame of no kind": PREFACE + SETTINGS + frame(0xFE, 0xFF, 1, b"x" * 1000),
    "data on no stream": PREFACE + SETTINGS + frame(0, 0, 99, b"x" * 1000),
    "headers that are none": PREFACE + SETTINGS + frame(1, 4, 1, os.urandom(500)),
    "a window of nothing": PREFACE + SETTINGS + frame(8, 0, 0, bytes(4)),
}


@pytest.mark.parametrize("kind", ON_RPC)
def test_38_what_is_no_grpc_ends_its_own_connection(
    serving: Daemon, lasting: Bystander, kind: str
) -> None:
    """From twenty peers at once; each connection is gone in the end."""
    with Client(serving.directory) as client:
        eventually(lambda: client.status().connections == 2)
        with lasting.undisturbed():
            for _ in range(20):
                with connected(str(serving.directory / RPC_SOCKET), socket.SOCK_STREAM) as wrong:
                    with suppress(ConnectionError):
                        wrong.sendall(ON_RPC[kind])
                    with suppress(OSError):
                        wrong.shutdown(socket.SHUT_WR)
                    read_to_end(wrong)
            assert client.store(b"meanwhile")
        eventually(lambda: client.status().connections == 2)


# -- 44: every field of every request --------------------------------------------------------------

SERVICES = [
    pb.DESCRIPTOR.services_by_name["ReferenceCache"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
]
METHODS = [method for service in SERVICES for method in service.methods]
NUMBERS = {
    FieldDescriptor.TYPE_UINT64: [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1],
    FieldDescriptor.TYPE_UINT32: [0, 1, 2**31, 2**32 - 1],
    FieldDescriptor.TYPE_INT32: [0, -1, -(2**31), 2**31 - 1],
    FieldDescriptor.TYPE_ENUM: [0, 99, -1, 2**31 - 1],
    FieldDescriptor.TYPE_DOUBLE: [0.0, -1.0, 1e308, float("inf"), float("-inf"), float("nan")],
    FieldDescriptor.TYPE_BOOL: [False, True],
}
TEXTS = ["", "\0", "a\0b", "b" * 256, "é" * 128, "p" * 1025, "\n\x1b[2J", "x" * MIB, "x" * 5 * MIB]
BYTES = [b"", b"\0", bytes(31), bytes(32), bytes(33), bytes(MIB), bytes(5 * MIB)]
WIRE_TYPES = range(8)
ALLOWED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,  # what health does not have
}
QUIET_SECONDS = 0.5
"""What a stream gets that has nothing to tell, and so no end."""


def valid(kind: Descriptor) -> Any:
    """Return a message of which every field makes sense."""
    message = GetMessageClass(kind)()
    for field in kind.fields:
        if field.name == "deltaspace":
            message.deltaspace.CopyFrom(SPACE)
        elif field.name == "sha256":
            message.sha256 = secrets.token_bytes(32)
        elif field.name == "request_id":
            message.request_id = secrets.randbits(60)
        elif field.name == "begin":
            message.begin.CopyFrom(valid(field.message_type))
    return message


def values(field: FieldDescriptor) -> list[Any]:
    """Return its extremes."""
    if field.type == FieldDescriptor.TYPE_STRING:
        return TEXTS
    return BYTES if field.type == FieldDescriptor.TYPE_BYTES else NUMBERS[field.type]


def tag(field: FieldDescriptor, wire_type: int) -> bytes:
    """Return what stands before a field's value (protobuf's encoding)."""
    number, raw = field.number << 3 | wire_type, b""
    while number > 127:
        raw, number = raw + bytes([number & 127 | 128]), number >> 7
    return raw + bytes([number])


def with_length(raw: bytes) -> bytes:
    """Return bytes behind their length, which is below 16,384."""
    return bytes([len(raw) & 127 | 128, len(raw) >> 7]) + raw


def extremes(kind: Descriptor) -> Iterator[bytes]:
    """Yield every message that differs from a valid one in one field."""
    for field in kind.fields:
        for raw in (b"\xff" * 20, b"\xff\xfe", b"\xff\xff\xff\xff\x0f", b""):
            for wire_type in WIRE_TYPES:  # the wrong type, a length past the end, no number at all
                yield valid(kind).SerializeToString() + tag(field, wire_type) + raw
        if field.type == FieldDescriptor.TYPE_STRING:
            yield valid(kind).SerializeToString() + tag(field, 2) + b"\x02\xff\xfe"  # no UTF-8
        if field.message_type is None:
            for value in values(field):
                message = valid(kind)
                setattr(message, field.name, value)
                yield message.SerializeToString()
            continue
        without = valid(kind)
        without.ClearField(field.name)
        yield without.SerializeToString()
        for inner in extremes(field.message_type):
            if len(inner) < 1 << 14:
                yield without.SerializeToString() + tag(field, 2) + with_length(inner)
    whole = valid(kind).SerializeToString()
    yield from (whole[:-1], whole + b"\x00\x01", whole + b"\x0b" * 200, whole + b"\xf2\x7f\x03new")


def outcome(client: Client, method: MethodDescriptor, raw: bytes) -> grpc.StatusCode:
    """Call with these bytes, take the first answer, and return how it ended."""
    sort = ("stream" if method.client_streaming else "unary") + (
        "_stream" if method.server_streaming else "_unary"
    )
    call = getattr(client.channel, sort)(
        f"/{method.containing_service.full_name}/{method.name}", None, None
    )
    request = iter([raw]) if method.client_streaming else raw
    seconds = QUIET_SECONDS if method.name == "Watch" else 10
    try:
        answer = call(request, timeout=seconds, metadata=client.metadata)
        if method.server_streaming:
            next(iter(answer), None)
            answer.cancel()
    except grpc.RpcError as error:
        quiet = method.name == "Watch" and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return grpc.StatusCode.OK if quiet else error.code()
    return grpc.StatusCode.OK


def drop_what_came(client: Client) -> None:
    """Close the descriptors and abort the stores that an extreme began."""
    assert client.session is not None
    while True:
        client.session.settimeout(0.0)
        try:
            announced, descriptor = client.receive()
        except BlockingIOError:
            return
        finally:
            client.session.settimeout(20)
        os.close(descriptor)
        with suppress(grpc.RpcError):
            client.call("AbortStore", pb.AbortStoreRequest(request_id=announced.request_id))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_44_every_field_at_its_extremes_is_refused_or_served(
    serving: Daemon, lasting: Bystander, method: MethodDescriptor
) -> None:
    """Numbers, texts, bytes, enumerations, messages that are missing, cut, of the wrong type or of
    no type: an answer, or a status of the contract, and never an error of the daemon's own."""
    seen: dict[grpc.StatusCode, int] = {}
    with Client(serving.directory) as client, lasting.undisturbed(may_miss=True):
        for raw in extremes(method.input_type):
            code = outcome(client, method, raw)
            assert code in ALLOWED | {grpc.StatusCode.OK}, (code, raw[:200])
            seen[code] = seen.get(code, 0) + 1
            drop_what_came(client)
        print({code.name: count for code, count in seen.items()})
        eventually(lambda: client.status().store.reserved_bytes == 0)
        eventually(lambda: client.status().stores_in_progress == 0)
    assert "x" * 100 not in serving.logged()


def test_44_metadata_of_any_size_does_no_harm(serving: Daemon, lasting: Bystander) -> None:
    """gRPC itself refuses headers over its limit."""
    with Client(serving.directory) as client, lasting.undisturbed():
        for name in ("dg-session", "another"):
            with pytest.raises(grpc.RpcError):
                client.stub.Status(
                    pb.StatusRequest(), timeout=10, metadata=((name, "0" * 200_000),)
                )
        assert client.store(b"afterwards")


# -- 45: session.sock ------------------------------------------------------------------------------

ON_SESSION = {
    "a byte": b"\0",
    "nothing": b"",
    "a message": pb.SessionMessage(hello=pb.Hello(protocol=1)).SerializeToString(),
    "random bytes": os.urandom(4096),
    "more than is read": os.urandom(100_000),
}


@pytest.mark.parametrize("kind", ON_SESSION)
def test_45_a_packet_of_a_client_ends_its_session(
    serving: Daemon, lasting: Bystander, kind: str
) -> None:
    """In version 1 the client has nothing to say there; its deposits end with the session, twenty
    times over, and the log has a line a second at the most."""
    lines, begun = serving.logged().count("session-ended"), time.monotonic()
    with Client(serving.directory) as client, lasting.undisturbed():
        for _ in range(20):
            with Client(serving.directory) as talker:
                _, write_end = talker.begin(MIB)
                assert talker.session is not None
                talker.session.send(ON_SESSION[kind])
                assert read_to_end(talker.session) == b""
                with refused(grpc.StatusCode.UNAUTHENTICATED):
                    talker.begin(1)
                os.close(write_end)
        eventually(lambda: client.status().store.reserved_bytes == 0)
        eventually(lambda: client.status().sessions == 2)
        assert client.store(b"a bystander's")
    further = serving.logged().count("session-ended") - lines
    assert further <= 2 + time.monotonic() - begun
