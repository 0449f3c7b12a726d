"""Whatever packets come on session.sock, neither end is harmed, and each keeps to its contract.

The client ends with a session, an answer, a descriptor, or CacheUnavailableError, and leaves no
descriptor open but those it returns. The daemon answers each call once, as documented, ends the
session of whoever sends anything else, keeps nothing of it, and serves the others.
"""

import math
import os
import socket
import time
from array import array
from contextlib import suppress
from pathlib import Path

from google.protobuf.message import DecodeError
from grpc import StatusCode

from dgcache.session import Session, _receive_within, _understood
from dgcache_core.errors import CacheUnavailableError
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import SECONDS

from .live import landmark, live, session
from .rpc import DOCUMENTED, SERVICE, request_of
from .structure import Choices, edited
from .worlds import lasting, open_descriptors, require_descriptors

HELLO = pb.SessionMessage(
    hello=pb.Hello(
        protocol=2,
        oldest_protocol=1,
        build="0.1.0",
        session_id=bytes(16),
        limits=pb.Limits(max_entry_bytes=1 << 20, calls_per_session=16),
    )
).SerializeToString()
ALIVE = pb.SessionMessage(alive=pb.Alive()).SerializeToString()
ANSWER = pb.SessionMessage(answer=pb.Answer(call_id=1, response=b"x")).SerializeToString()
CODES = {code.value[0] for code in DOCUMENTED} | {
    code.value[0]
    for code in (
        *(StatusCode.DEADLINE_EXCEEDED, StatusCode.UNIMPLEMENTED, StatusCode.OUT_OF_RANGE),
        StatusCode.UNAVAILABLE,
    )
}
"""What a call may end with."""
MOST_CALLS = 16
IDS = (0, 1, 2, 2**64 - 1)
MOST_PACKETS = 80  # more than a session keeps unclaimed
LONGEST_PACKET = 5000  # longer than either end reads


def run(data: bytes) -> None:
    """Hold the invariant for one input."""
    choices = Choices(data)
    if choices.below(8) == 7:
        _to_the_daemon(choices)
    else:
        _to_the_client(choices)


def _to_the_client(choices: Choices) -> None:
    before = open_descriptors()
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, ours:
        theirs.setblocking(False)
        _send(theirs, edited(HELLO, Choices(choices.piece())), choices.below(8) // 7)
        wanted = [choices.of(IDS) for _ in range(choices.below(4))]
        for _ in range(MOST_PACKETS):
            if not choices:
                break
            _send(theirs, _packet(choices), choices.of((1, 1, 1, 1, 1, 0, 2, 3)))
        theirs.shutdown(socket.SHUT_WR)
        _take(ours, wanted)
    require_descriptors(before)


def _take(connection: socket.socket, wanted: list[int]) -> None:
    """Be the client: hear the Hello, take what comes, close."""
    directory_fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    with suppress(CacheUnavailableError):
        try:
            hello = _understood(_receive_within(connection, time.monotonic() + SECONDS))
        except BaseException:
            os.close(directory_fd)
            raise
        assert hello.protocol >= 1
        over = Session(connection, Path("/"), directory_fd, hello)
        try:
            if len(wanted) > 2:
                over.call("Status", b"", SECONDS)
            for request_id in wanted:
                os.close(over.take_descriptor(request_id, SECONDS))
        finally:
            over.close()


def _to_the_daemon(choices: Choices) -> None:
    at = lasting(live)
    with session(at) as (connection, _):
        asked, ended = 0, False
        while choices and asked < MOST_CALLS and not ended:
            packet = _call(choices) if choices.below(2) else choices.piece()[:LONGEST_PACKET]
            descriptors = choices.below(8) // 6
            with suppress(OSError):  # it refuses descriptors (Linux 6.16)
                _send(connection, packet, descriptors)
                ended = descriptors > 0 or not _is_call(packet)
                asked += not ended
        connection.settimeout(SECONDS)
        if ended:
            assert not _answers(connection, None), "the session was not ended"
        else:
            codes = _answers(connection, asked)
            assert set(codes) <= CODES, codes
    at.require_well(may_miss=True)


def _call(choices: Choices) -> bytes:
    """Return a call of any method, now and then with something wrong in it."""
    method = choices.of(SERVICE.methods)
    call = pb.Call(
        id=choices.of(IDS),
        method=choices.of((method.name, method.name, method.name, "", "Nothing")),
        request=request_of(method, choices),
        timeout_seconds=choices.of((0.05, 0.05, 0.2, 0.2, 0.0, -1.0, math.nan, 1e9)),
    )
    honest = call.SerializeToString()
    return edited(honest, Choices(choices.piece())) if choices.below(4) == 3 else honest


def _is_call(packet: bytes) -> bool:
    """Judge by the contract; an unknown method is a call, whose answer says so."""
    try:
        call = pb.Call.FromString(packet)
    except DecodeError:
        return False
    return 0 < len(packet) <= 4096 and call.method != "" and 0 < call.timeout_seconds <= 86_400


def _answers(connection: socket.socket, count: int | None) -> list[int]:
    """Return the codes of the next answers, or, where None, hear the session end."""
    codes: list[int] = []
    while count is None or len(codes) < count:
        try:
            packet, ancillary, _, _ = connection.recvmsg(
                1 << 16, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
            )
        except (ConnectionResetError, BrokenPipeError):
            packet, ancillary = b"", []
        for _, _, data in ancillary:
            os.close(array("i", data)[0])
        if not packet:
            break
        message = pb.SessionMessage.FromString(packet)
        if message.WhichOneof("kind") == "answer":
            landmark("answer", message.answer.code)
            codes.append(message.answer.code)
    assert count is None or len(codes) == count, "a call was not answered"
    return [] if count is None else codes


def _packet(choices: Choices) -> bytes:
    how = choices.below(8)
    if how == 0:
        return choices.piece()[:LONGEST_PACKET]
    if how == 1:
        return choices.of((HELLO, ALIVE, ANSWER))
    announced = pb.Descriptor(request_id=choices.of(IDS), purpose=1)
    honest = pb.SessionMessage(descriptor=announced).SerializeToString()
    return edited(honest, Choices(choices.piece())) if how == 2 else honest


def _send(connection: socket.socket, packet: bytes, descriptors: int) -> None:
    """Send a packet with so many descriptors; a queue that is full takes no more."""
    opened = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(descriptors)]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", opened))] if opened else []
    try:
        with suppress(BlockingIOError):
            connection.sendmsg([packet], rights)
    finally:
        for descriptor in opened:
            os.close(descriptor)
