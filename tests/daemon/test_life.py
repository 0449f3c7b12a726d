"""How the daemon ends, and what is left of it."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import (
    MIB,
    SECONDS,
    SPACE,
    Client,
    Daemon,
    connected,
    ended_well,
    eventually,
    own_environment,
    read_to_end,
    running,
    script_running,
)


@pytest.fixture
def own() -> Iterator[Daemon]:
    """A daemon of this test alone, which it may end; a writer's own limit comes much later."""
    with running(limits={"drain_seconds": 2, "deposit_idle_seconds": 90}) as daemon:
        yield daemon


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_daemon(own: Daemon, number: int) -> None:
    """With exit status 0."""
    ended_well(own, own.stop(number))


def test_an_idle_session_does_not_keep_the_daemon(own: Daemon) -> None:
    """Its socket reads end of file, so that its client knows at once."""
    with Client(own.directory) as client:
        assert client.store(b"data")
        assert client.session is not None
        ended_well(own, own.stop())
        assert read_to_end(client.session) == b""


def test_nobody_is_let_in_while_draining(own: Daemon) -> None:
    """The names go first: a new client finds no daemon and falls back at once."""
    with Client(own.directory) as client:
        _, write_end = client.begin(4)
        own.process.send_signal(signal.SIGTERM)
        eventually(lambda: not (own.directory / "rpc.sock").exists())
        with pytest.raises(FileNotFoundError):
            connected(str(own.directory / "session.sock"), socket.SOCK_SEQPACKET)
        os.close(write_end)
        ended_well(own, own.process.wait(SECONDS))


def test_a_start_during_a_stop_gets_a_daemon(short_directory: Path) -> None:
    """`dg-cache start` waits for the one that is ending, and starts the next."""
    place = short_directory / "s"
    environ = own_environment() | {
        "DG_CACHE_SOCKET_DIR": str(place),
        "XDG_STATE_HOME": str(short_directory),
    }
    argv = [sys.executable, "-m", "dgcache_cli"]
    with running(place, limits={"drain_seconds": 2}) as ending, Client(place) as client:
        request_id, write_end = client.begin(4)
        request = pb.CommitStoreRequest(request_id=request_id)
        call = client.stub.CommitStore.future(request, metadata=client.metadata, timeout=SECONDS)
        client.status()
        ending.process.send_signal(signal.SIGTERM)
        eventually(lambda: not (place / "session.sock").exists())
        started = subprocess.run(
            [*argv, "start"], env=environ, capture_output=True, text=True, timeout=40, check=False
        )
        os.close(write_end)
        call.cancel()
        subprocess.run([*argv, "stop"], env=environ, capture_output=True, timeout=40, check=False)
    assert (started.returncode, started.stderr) == (0, "")


# Begins to read a reference and is stopped by whoever started it.
_READER = """
import os, grpc
from dgcache_proto.v1 import dgcache_pb2 as pb, dgcache_pb2_grpc
channel = grpc.insecure_channel(f"unix:{sys.argv[1]}/rpc.sock")
request = pb.ReadRequest(
    deltaspace=pb.Deltaspace(bucket="bucket", prefix="releases"), sha256=bytes.fromhex(sys.argv[2])
)
stream = dgcache_pb2_grpc.ReferenceCacheStub(channel).Read(request)
print(next(stream).size, flush=True)
sys.stdin.read()
"""


def test_a_client_that_is_stopped_does_not_keep_the_daemon(own: Daemon) -> None:
    """What it does not take never leaves gRPC, which would wait for it without an end."""
    data = os.urandom(24 * MIB)
    with Client(own.directory) as client:
        digest = client.store(data)
        with script_running(None, _READER, own.directory, digest.hex()) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == f"{len(data)}\n"
            reader.send_signal(signal.SIGSTOP)
            ended_well(own, own.stop())


@pytest.mark.parametrize("phase", ["stored", "held", "storing", "streaming"])
def test_a_killed_daemon_leaves_no_plaintext(short_directory: Path, phase: str) -> None:
    """Not one byte of a reference in any file below its directories, whenever kill -9 comes."""
    marker = secrets.token_hex(32).encode()
    data = marker * (3 * MIB // len(marker))
    places = {name: short_directory / name for name in ("run", "state", "tmp", "home")}
    for place in places.values():
        place.mkdir(0o700)
    environ = {
        "XDG_STATE_HOME": str(places["state"]),
        "TMPDIR": str(places["tmp"]),
        "HOME": str(places["home"]),
    }
    options = ("--memory-size-mb", "64", "--log-file", str(places["state"] / "log"), "--verbose")
    with (
        running(places["run"], environ=environ, options=options) as daemon,
        Client(places["run"]) as client,
        ExitStack() as stack,
    ):
        digest = client.store(data)
        if phase == "held":
            stack.callback(os.close, client.lookup(digest))
        elif phase == "storing":
            _, write_end = client.begin(2 * len(data))
            stack.callback(os.close, write_end)
            os.write(write_end, data[: 1 << 16])
        elif phase == "streaming":
            next(client.stub.Read(pb.ReadRequest(deltaspace=SPACE, sha256=digest)))
        assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
        files = [path for path in short_directory.rglob("*") if path.is_file()]
        assert files
        for path in [*files, daemon.log]:
            assert marker not in path.read_bytes(), path
