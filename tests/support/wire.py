"""A real daemon, and clients that speak to its sockets by themselves, without the SDK.

`Daemon` is a process of its own with smaller limits where a test wants them; `Client` is one
session and one channel; `as_user` runs a script as a second real user. Every wait has a bound.
"""

import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc

from dgcache_proto.v1 import dgcache_pb2 as pb
from dgcache_proto.v1 import dgcache_pb2_grpc

SECONDS = 20.0
"""The longest wait for anything that must happen."""
_START_SECONDS = 60.0  # of an interpreter and its imports, where many are started at once

SPACE = pb.Deltaspace(bucket="bucket", prefix="releases")
MIB = 1 << 20
OWNER_UID, FOREIGN_UID = 54_321, 54_322
"""Two ordinary users; the kernel needs no account for a uid to be real."""

_FIRST_PACKET = 4096

# The daemon's own `main`, with other limits, or as another user where root starts it: everything is
# imported before, since that user may not be able to read the interpreter's files.
_DRIVER = """\
import json, os, sys
from functools import partial
import asyncinotify, dgcached.main, dgcached.server, dgcached.logs
wish = json.loads(sys.argv[1])
dgcached.main.Limits = partial(dgcached.main.Limits, **wish["limits"])
dgcached.server.MemoryStore = partial(dgcached.server.MemoryStore, **wish["store"])
dgcached.logs.MAX_LOG_BYTES = wish["log_bytes"] or dgcached.logs.MAX_LOG_BYTES
if wish["uid"] is not None:
    os.setgroups([])
    os.setresgid(wish["uid"], wish["uid"], wish["uid"])
    os.setresuid(wish["uid"], wish["uid"], wish["uid"])
sys.exit(dgcached.main.main(sys.argv[2:]))
"""

_BECOME = """\
import ctypes, os, select, socket, struct, sys
def become(uid):
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
def enter_user_namespace(inner_uid):
    uid, libc = os.geteuid(), ctypes.CDLL(None, use_errno=True)
    libc.prctl(4, 1, 0, 0, 0)  # dumpable again, or the files in /proc/self are root's
    if libc.unshare(0x10000000) != 0:
        print("no user namespace:", os.strerror(ctypes.get_errno()))
        sys.exit(0)
    with open("/proc/self/uid_map", "w") as uid_map:
        uid_map.write(f"{inner_uid} {uid} 1")
def heard(path, kind, first=b""):
    with socket.socket(socket.AF_UNIX, kind) as connection:
        connection.settimeout(20)
        connection.connect(path)
        try:
            if first:
                connection.send(first)
            return connection.recv(4096)
        except (ConnectionResetError, BrokenPipeError):
            return b""
"""


class Daemon:
    """A running daemon. `log` is its standard error."""

    def __init__(self, directory: Path, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.directory = directory
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def logged(self) -> str:
        """Return what it logged so far."""
        return self.log.read_text(errors="replace")

    def descriptors(self) -> int:
        """Count its open descriptors; it is not dumpable, so only root may."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208 - no paths are wanted

    def stop(self, number: int = signal.SIGTERM, seconds: float = SECONDS) -> int:
        """Send a signal, wait for the end, and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def running(
    directory: Path | None = None,
    *,
    limits: Mapping[str, Any] | None = None,
    store: Mapping[str, int] | None = None,
    log_bytes: int = 0,
    options: tuple[str, ...] = ("--memory-size-mb", "64"),
    uid: int | None = None,
    environ: Mapping[str, str] | None = None,
    prefix: tuple[str, ...] = (),
    umask: int = -1,
) -> Iterator[Daemon]:
    """Run a daemon until the block ends.

    Args:
        directory: of its sockets; by default one of its own.
        limits: what differs from the default `Limits`.
        store: what differs in the arguments of its `MemoryStore`.
        log_bytes: of a log file, before it is rotated; 0 for the default.
        options: of its command line.
        uid: the user it runs as, where root starts it.
        environ: further variables.
        prefix: a program that starts it, such as prlimit(1).
        umask: it starts with; -1 for this process's own.
    """
    with tempfile.TemporaryDirectory(prefix="dgt-") as base:
        directory = directory or Path(base, "s")
        log = Path(base, "log")
        if uid is not None:
            os.chown(base, uid, uid)
        wish = {"limits": limits or {}, "store": store or {}, "log_bytes": log_bytes, "uid": uid}
        changed = any(value not in ({}, 0, None) for value in wish.values())
        program = ["-c", _DRIVER, json.dumps(wish)] if changed else ["-m", "dgcached"]
        argv = [*prefix, sys.executable, *program, *options, "--socket-dir", str(directory)]
        with log.open("wb") as stderr, _ready_socket() as (notices, address):
            process = subprocess.Popen(
                argv,
                env={**own_environment(), **(environ or {}), "NOTIFY_SOCKET": address},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                umask=umask,
            )
            try:
                _await_ready(process, notices, log)
                yield Daemon(directory, process, log)
            finally:
                process.kill()
                process.wait(SECONDS)


def own_environment() -> dict[str, str]:
    """Return this process's environment without any setting of ours."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("DG_", "XDG_", "LISTEN_"))}
    return {**own, "XDG_CONFIG_HOME": "/dev/null"}


@contextmanager
def _ready_socket() -> Iterator[tuple[socket.socket, str]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind("")  # the kernel chooses an abstract name (unix(7), autobind)
        yield notices, "@" + notices.getsockname()[1:].decode()


def _await_ready(process: "subprocess.Popen[bytes]", notices: socket.socket, log: Path) -> None:
    pidfd = os.pidfd_open(process.pid)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while notices.fileno() in poll([notices.fileno(), pidfd], deadline - time.monotonic()):
            if b"READY=1" in notices.recv(4096).split(b"\n"):
                return
        raise AssertionError(f"the daemon did not start: {log.read_text()}")
    finally:
        os.close(pidfd)


def poll(descriptors: list[int], seconds: float = SECONDS) -> list[int]:
    """Wait until one can be read, or its process has ended, and return which."""
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poller.poll(max(0.0, seconds) * 1000)]


def eventually(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Ask again until it is so, at most that long."""
    pause, deadline = threading.Event(), time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        pause.wait(0.01)


def sha256(data: bytes) -> bytes:
    """Return the digest as it travels."""
    return hashlib.sha256(data).digest()


class Client:
    """A session and a channel of this process."""

    def __init__(self, directory: Path, *, session: bool = True, rpc: str = "rpc.sock") -> None:
        self._directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._request_id = 0
        self.metadata: tuple[tuple[str, str], ...] = ()
        self.session: socket.socket | None = None
        if session:
            self.session = connected(self.path("session.sock"), socket.SOCK_SEQPACKET)
            self.hello = pb.SessionMessage.FromString(self.session.recv(_FIRST_PACKET)).hello
            self.metadata = (("dg-session", self.hello.session_id.hex()),)
        self.channel = grpc.insecure_channel(
            f"unix:{self.path(rpc)}",
            options=[("grpc.use_local_subchannel_pool", 1), ("grpc.default_authority", "local")],
        )
        self.stub = dgcache_pb2_grpc.ReferenceCacheStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def path(self, name: str) -> str:
        """Return a path of any length's socket that fits (unix(7))."""
        return f"/proc/self/fd/{self._directory_fd}/{name}"

    def call(self, method: str, request: Any, seconds: float = SECONDS) -> Any:
        """Make one call with this session's id."""
        return getattr(self.stub, method)(request, timeout=seconds, metadata=self.metadata)

    def next_id(self) -> int:
        """Return a request id that was not used."""
        self._request_id += 1
        return self._request_id

    def receive(self) -> tuple[pb.Descriptor, int]:
        """Take the next descriptor off the session; the caller closes it."""
        assert self.session is not None
        packet, ancillary, flags, _ = self.session.recvmsg(
            _FIRST_PACKET, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
        )
        rights = array("i")
        for _, _, data in ancillary:
            rights.frombytes(data)
        assert (len(rights), flags & socket.MSG_CTRUNC) == (1, 0)
        return pb.SessionMessage.FromString(packet).descriptor, rights[0]

    def _receive_for(self, request_id: int, purpose: Any) -> int:
        """Take the descriptor of a call; those of calls whose answer was lost are closed."""
        announced, descriptor = self.receive()
        while announced.request_id < request_id:
            os.close(descriptor)
            announced, descriptor = self.receive()
        if (announced.request_id, announced.purpose) != (request_id, purpose):
            os.close(descriptor)
            raise AssertionError(f"for call {request_id} there came {announced}")
        return descriptor

    def lookup(self, digest: bytes, deltaspace: pb.Deltaspace = SPACE) -> int:
        """Return a handout's descriptor; the caller closes it."""
        request_id = self.next_id()
        self.call(
            "Lookup",
            pb.LookupRequest(request_id=request_id, deltaspace=deltaspace, sha256=digest),
        )
        return self._receive_for(request_id, pb.Descriptor.PURPOSE_HANDOUT)

    def begin(
        self, size: int, expected: bytes = b"", deltaspace: pb.Deltaspace = SPACE
    ) -> tuple[int, int]:
        """Return a store's request id and the write end of its pipe; the caller closes it."""
        request_id = self.next_id()
        self.call(
            "BeginStore",
            pb.BeginStoreRequest(
                request_id=request_id, deltaspace=deltaspace, size=size, expected_sha256=expected
            ),
        )
        return request_id, self._receive_for(request_id, pb.Descriptor.PURPOSE_DEPOSIT)

    def commit(self, request_id: int) -> bytes:
        """End a store and return the digest."""
        digest: bytes = self.call(
            "CommitStore", pb.CommitStoreRequest(request_id=request_id)
        ).sha256
        return digest

    def store(self, data: bytes, deltaspace: pb.Deltaspace = SPACE) -> bytes:
        """Store some bytes and return their digest."""
        request_id, write_end = self.begin(len(data), b"", deltaspace)
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(data)
        return self.commit(request_id)

    def status(self) -> pb.StatusResponse:
        """Ask how the daemon is, without a session."""
        answer: pb.StatusResponse = self.stub.Status(pb.StatusRequest(), timeout=SECONDS)
        return answer

    def close(self) -> None:
        """Close everything."""
        self.channel.close()
        if self.session is not None:
            self.session.close()
        if self._directory_fd >= 0:
            os.close(self._directory_fd)
            self._directory_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def connected(path: str, kind: socket.SocketKind) -> socket.socket:
    """Connect and bound every later wait."""
    connection = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    connection.settimeout(SECONDS)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    """Return what comes until the other end closes."""
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except (ConnectionResetError, BrokenPipeError):
        pass
    return received


def ended_well(daemon: Daemon, status: int) -> None:
    """It says what it did, and takes the names of its sockets away."""
    assert status == 0, daemon.logged()
    assert [path.name for path in daemon.directory.iterdir()] == ["daemon.lock"]
    events = [line.split()[3] for line in daemon.logged().splitlines()]
    begun = [name for name in events if name != "landlock"][:1]
    assert begun + events[-2:] == ["started", "stopping", "stopped"]
    assert "security" not in events  # what it takes away itself is no alarm


@contextmanager
def refused(code: grpc.StatusCode) -> Iterator[list[grpc.RpcError]]:
    """Expect a call to end with this status; its error is in the list afterwards."""
    errors: list[grpc.RpcError] = []
    with pytest.raises(grpc.RpcError) as caught:
        yield errors
    assert caught.value.code() is code, caught.value
    errors.append(caught.value)


def trailing(error: grpc.RpcError) -> dict[str, str]:
    """Return the trailing metadata of a refused call."""
    return dict(error.trailing_metadata() or ())


def as_user(uid: int | None, script: str, *arguments: object) -> str:
    """Run a script as a second real user and return what it printed."""
    with script_running(uid, script, *arguments) as process:
        said, complaint = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, complaint
        return said.strip()


@contextmanager
def script_running(
    uid: int | None, script: str, *arguments: object
) -> "Iterator[subprocess.Popen[str]]":
    """Run a script as a user, or as ourselves, with pipes to it, and kill it in the end."""
    become = f"become({uid})\n" if uid is not None else ""
    with subprocess.Popen(
        [sys.executable, "-c", _BECOME + become + script, *map(str, arguments)],
        env=own_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # what it had no time to read
                process.stdin.close()
