"""Whatever packets come on session.sock, neither end is harmed, and each keeps to its contract.

The client ends with a session, a descriptor, or CacheUnavailableError, and leaves no descriptor
open but those it returns. The daemon ends the session of whoever sends anything, keeps nothing of
it, and serves the others.
"""

import os
import socket
import time
from array import array
from contextlib import suppress
from pathlib import Path

from dgcache.session import Session, _receive_within, _understood
from dgcache_core.errors import CacheUnavailableError
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import SECONDS, read_to_end

from .live import live, session
from .structure import Choices, edited
from .worlds import lasting, open_descriptors, require_descriptors

HELLO = pb.SessionMessage(
    hello=pb.Hello(
        protocol=1,
        oldest_protocol=1,
        build="0.1.0",
        session_id=bytes(16),
        limits=pb.Limits(max_entry_bytes=1 << 20, calls_per_session=16),
    )
).SerializeToString()
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
        theirs.close()
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
            for request_id in wanted:
                os.close(over.take_descriptor(request_id, SECONDS))
        finally:
            over.close()


def _to_the_daemon(choices: Choices) -> None:
    at = lasting(live)
    with session(at) as (connection, _):
        spoke = False
        while choices:
            with suppress(OSError):  # it has ended the session, or refuses descriptors (Linux 6.17)
                _send(connection, choices.piece()[:LONGEST_PACKET], choices.below(4))
                spoke = True
        connection.settimeout(SECONDS)
        assert not spoke or read_to_end(connection) == b"", "the session was not ended"
    at.require_well()


def _packet(choices: Choices) -> bytes:
    how = choices.below(8)
    if how == 0:
        return choices.piece()[:LONGEST_PACKET]
    if how == 1:
        return HELLO
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
