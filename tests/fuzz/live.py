"""A live daemon in a process of its own, and a bystander who must be served whatever happens."""

import os
import socket
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from zlib import crc32

import grpc

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.core.support import content
from tests.support.wire import SECONDS, Client, Daemon, connected, eventually, running

DATA = content(3000, 7)
SPACE = pb.Deltaspace(bucket="bystander", prefix="whose names nobody guesses")
_LANDMARKS = 1024
_REST_EVERY_RUNS = 16
_DESCRIPTORS_EVERY_RESTS = 8
_SLACK = 4


class Live:
    """The daemon and the bystander."""

    def __init__(self, daemon: Daemon, client: Client) -> None:
        self.daemon = daemon
        self.client = client
        self.digest = client.store(DATA, SPACE)
        self._runs = 0
        self._most_descriptors = 0

    def require_well(self, *, may_miss: bool = False) -> None:
        """Assert that the bystander is served and, now and then, that all is given back.

        Args:
            may_miss: somebody has cleared the cache or filled it, so that a miss is right, once.
        """
        self._runs += 1
        assert self.daemon.process.poll() is None, self.daemon.logged()[-3000:]
        try:
            self._require_served()
        except grpc.RpcError as error:
            if not may_miss or code_of(error) is not grpc.StatusCode.NOT_FOUND:
                raise
            eventually(self._is_at_rest)
            self.digest = self.client.store(DATA, SPACE)
            self._require_served()
        if self._runs % _REST_EVERY_RUNS == 0:
            self.require_rest()

    def _require_served(self) -> None:
        request = pb.ReadRequest(deltaspace=SPACE, sha256=self.digest)
        answers = list(self.client.stub.Read(request, timeout=SECONDS))
        assert b"".join(answer.data for answer in answers) == DATA

    def require_rest(self) -> None:
        """Assert that nothing is left of those who went away."""
        eventually(self._is_at_rest)
        assert "Traceback" not in self.daemon.logged(), self.daemon.logged()[-3000:]
        if os.geteuid() == 0 and self._runs % (_REST_EVERY_RUNS * _DESCRIPTORS_EVERY_RESTS) == 0:
            self.client.call("Clear", pb.ClearRequest())
            self.digest = self.client.store(DATA, SPACE)
            if not self._most_descriptors:
                self._most_descriptors = self.daemon.descriptors() + _SLACK
            eventually(lambda: self.daemon.descriptors() <= self._most_descriptors)

    def _is_at_rest(self) -> bool:
        status = self.client.status()
        return (
            (status.sessions, status.stores_in_progress) == (1, 0)
            and status.store.reserved_bytes == 0
            and (status.leases.held, status.leases.waiting) == (0, 0)
        )


@contextmanager
def live() -> Iterator[Live]:
    """Run a daemon and a bystander."""
    with running(limits={"lease_seconds": 5.0}) as daemon, Client(daemon.directory) as client:
        yield Live(daemon, client)


@contextmanager
def session(at: Live) -> Iterator[tuple[socket.socket, tuple[tuple[str, str], ...]]]:
    """Lend one more session and the metadata that names it."""
    path = at.client.path("session.sock")
    with connected(path, socket.SOCK_SEQPACKET) as connection:
        hello = pb.SessionMessage.FromString(connection.recv(4096)).hello
        connection.setblocking(False)
        yield connection, (("dg-session", hello.session_id.hex()),)


def take_descriptors(connection: socket.socket) -> list[tuple[pb.Descriptor, int]]:
    """Return what came on a session so far; the caller closes it."""
    taken = []
    while True:
        try:
            packet, ancillary, _, _ = connection.recvmsg(
                4096, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return taken
        if not packet:
            return taken
        rights = array("i")
        for _, _, data in ancillary:
            rights.frombytes(data)
        (descriptor,) = rights
        taken.append((pb.SessionMessage.FromString(packet).descriptor, descriptor))


def landmark(*what: object) -> None:
    """Give the search an edge of its own for everything that is seen of another process.

    The daemon's own code is out of its sight.
    """
    landmarks()[crc32(repr(what).encode()) % _LANDMARKS]()


@cache
def landmarks() -> list[object]:
    """Return the functions that stand for what was seen; `search` instruments each."""
    made: dict[str, object] = {}
    for index in range(_LANDMARKS):
        exec(f"def seen_{index}(): return {index}", made)
    return [made[f"seen_{index}"] for index in range(_LANDMARKS)]


def code_of(error: grpc.RpcError) -> grpc.StatusCode:
    """Return the status that a call ended with."""
    code: grpc.StatusCode = error.code()
    return code
