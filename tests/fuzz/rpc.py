"""Whatever messages come on rpc.sock, the daemon lives, serves others, and answers as documented.

No call ends with INTERNAL or UNKNOWN, and what a client took is given back when it goes. A run is a
few calls of one session to a live daemon: of every method, with bytes as they are or with messages
whose fields are at their extremes; what stores and lookups send on the session is used and closed.
"""

import math
import os
import re
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.core.support import content
from tests.support.wire import SECONDS, sha256

from .live import Live, code_of, landmark, live, session, take_descriptors
from .structure import Choices, edited
from .worlds import lasting

SERVICE = pb.DESCRIPTOR.services_by_name["ReferenceCache"]
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
OF_HEALTH = ("Check", "Watch")
"""A newer grpcio-health-checking has List as well, which its own servicer leaves unimplemented."""
METHODS = [
    *SERVICE.methods,
    *(HEALTH.methods_by_name[name] for name in OF_HEALTH),
    *REFLECTION.methods,
]

DOCUMENTED = {
    *(StatusCode.OK, StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED),
    *(StatusCode.INVALID_ARGUMENT, StatusCode.RESOURCE_EXHAUSTED, StatusCode.NOT_FOUND),
}
PATIENCE = {"Lookup": 0.25, "Watch": 0.05, "CommitStore": 2.0, "Write": 2.0}
"""Seconds, of calls that may wait: theirs, and no others', may end at the deadline."""
STORES = {"CommitStore", "Write"}
"""Calls of which a store may have been given up: UNAVAILABLE."""
MAKES_ROOM = {"Clear", "BeginStore", "Write"}

MOST_CALLS = 6
STREAMED = content(200, 3)
STORED = (b"", b"x", STREAMED, STREAMED * 2)
"""What may come back of what is stored here."""
DIGESTS = [b"", bytes(32), bytes(31), b"\xff" * 32, sha256(STREAMED), sha256(b"")]
TEXTS = ["", "b", "bucket", "releases", "a\0b", "é" * 128, "b" * 255, "p" * 1024, "p" * 1025]
DOUBLES = [0.0, 0.01, 0.05, 3600.0, 3600.1, -1.0, math.nan, math.inf, -math.inf, 1e308, 5e-324]


def run(data: bytes) -> None:
    """Hold the invariant for one input."""
    at = lasting(live)
    choices = Choices(data)
    makes_room = False
    with session(at) as (connection, metadata):
        for _ in range(MOST_CALLS):
            if not choices:
                break
            method = choices.of(METHODS)
            whose = choices.of((metadata, metadata, metadata, (), (("dg-session", "0" * 32),)))
            requests = [request_of(method, choices) for _ in range(_messages(method, choices))]
            code, details = _call(at, method, requests, whose)
            _require_documented(method.name, code, details)
            makes_room |= method.name in MAKES_ROOM
            for announced, descriptor in take_descriptors(connection):
                _use(announced, descriptor, choices)
    at.require_well(may_miss=makes_room)


def _messages(method: Any, choices: Choices) -> int:
    return choices.below(5) if method.client_streaming else 1


def request_of(method: Any, choices: Choices) -> bytes:
    """Return a message in its own bytes, or what is none."""
    how = choices.below(4)
    if how == 0:
        return choices.piece()
    made = _made(method.input_type._concrete_class(), choices).SerializeToString()
    return edited(made, Choices(choices.piece())) if how == 1 else made


def _made(message: Message, choices: Choices) -> Message:
    """Fill in the fields of a message."""
    for field in message.DESCRIPTOR.fields:
        if choices.below(8) == 7:
            continue
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            part = getattr(message, field.name)
            part.SetInParent()
            _made(part, choices)
        else:
            setattr(message, field.name, _value(field, choices))
    return message


def _value(field: FieldDescriptor, choices: Choices) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        which = choices.below(len(TEXTS) + 1)
        return TEXTS[which] if which < len(TEXTS) else choices.piece().decode(errors="ignore")
    if field.type == FieldDescriptor.TYPE_BYTES:
        which = choices.below(len(DIGESTS) + 2)
        if which == len(DIGESTS):
            return STREAMED
        return DIGESTS[which] if which < len(DIGESTS) else choices.piece()
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return choices.of(DOUBLES)
    if field.type in (FieldDescriptor.TYPE_BOOL, FieldDescriptor.TYPE_ENUM):
        return choices.below(2)
    number = choices.extreme() if choices.below(2) else choices.of((0, 1, 2, len(STREAMED)))
    return number % (2**64 if field.type == FieldDescriptor.TYPE_UINT64 else 2**31)


def _call(
    at: Live, method: Any, requests: list[bytes], metadata: tuple[tuple[str, str], ...]
) -> tuple[StatusCode, str]:
    """Make a call with bytes and return its status."""
    kind = "_".join(
        "stream" if streams else "unary"
        for streams in (method.client_streaming, method.server_streaming)
    )
    path = f"/{method.containing_service.full_name}/{method.name}"
    sends: Any = iter(requests) if method.client_streaming else requests[0]
    make = getattr(at.client.channel, kind)(path)
    answers = 0
    try:
        answer = make(sends, timeout=PATIENCE.get(method.name, SECONDS), metadata=metadata)
        answers = sum(map(len, answer)) if method.server_streaming else len(answer)
    except grpc.RpcError as error:
        landmark(path, code_of(error), re.sub(r"\d+|'.*'", "", str(error.details())))
        return code_of(error), str(error.details())
    landmark(path, "answer", answers.bit_length())
    return StatusCode.OK, ""


def _require_documented(name: str, code: StatusCode, details: str) -> None:
    allowed = set(DOCUMENTED)
    if name in PATIENCE:
        allowed.add(StatusCode.DEADLINE_EXCEEDED)
    if name in STORES:
        allowed.add(StatusCode.UNAVAILABLE)
    assert code in allowed, (name, code, details)


def _use(announced: pb.Descriptor, descriptor: int, choices: Choices) -> None:
    """Do with a descriptor what it is for: write a store's bytes, or none, or too many."""
    landmark("descriptor", announced.purpose)
    try:
        if announced.purpose == pb.Descriptor.PURPOSE_DEPOSIT:
            with suppress(BrokenPipeError):  # a pipe that is empty has room for this
                os.write(descriptor, choices.of((STREAMED, b"", STREAMED * 2, b"x")))
        else:
            assert os.pread(descriptor, 4096, 0) in STORED
    finally:
        os.close(descriptor)
