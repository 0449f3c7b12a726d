"""An idle daemon sleeps: gRPC runs while somebody is connected to rpc.sock, and not otherwise."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

import dgcache
from dgcache import Settings
from tests.support.http2 import Http2Peer
from tests.support.wire import SECONDS, Client, Daemon, ended_well, eventually, running

WINDOW_SECONDS = 10.0
VERBOSE = ("--memory-size-mb", "64", "--verbose")


def wake_ups(daemon: Daemon) -> dict[str, int]:
    """Return how often each thread went to sleep by its own will so far (proc(5))."""
    found = {}
    for task in Path(f"/proc/{daemon.pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            lines = (task / "status").read_text().splitlines()
            (line,) = (line for line in lines if line.startswith("voluntary_ctxt_switches:"))
            found[f"{task.name} {(task / 'comm').read_text().strip()}"] = int(line.split()[1])
    return found


def in_a_window(daemon: Daemon) -> dict[str, int]:
    before = wake_ups(daemon)
    threading.Event().wait(WINDOW_SECONDS)
    return {name: times - before.get(name, 0) for name, times in wake_ups(daemon).items()}


@pytest.fixture
def hasty() -> Iterator[Daemon]:
    """A daemon whose inner server stops soon."""
    with running(limits={"inner_idle_seconds": 0.2}, options=VERBOSE) as daemon:
        yield daemon


def stopped(daemon: Daemon, times: int) -> None:
    eventually(lambda: daemon.logged().count("inner-stopped") >= times)


@pytest.mark.parametrize("transport", ["direct", "grpc"])
def test_an_idle_daemon_wakes_up_at_most_once_a_second(hasty: Daemon, transport: str) -> None:
    """With a reference in it, over all threads; what it does once after a use is over by the last
    of five windows (a host that runs short of memory wakes it up, too)."""
    settings = Settings(socket_dir=hasty.directory, connect_timeout_ms=20_000, transport=transport)
    with dgcache.open(settings) as cache:
        cache.put("bucket", "prefix", b"reference")
        assert cache.backend == "dg-cached"
    assert (transport == "grpc") == ("inner-started" in hasty.logged())
    if transport == "grpc":
        stopped(hasty, 1)
    windows = []
    while len(windows) < 5 and (not windows or sum(windows[-1].values()) > WINDOW_SECONDS):
        windows.append(in_a_window(hasty))
    assert sum(windows[-1].values()) <= WINDOW_SECONDS, windows


def test_who_comes_after_a_stop_is_served(hasty: Daemon) -> None:
    """Again and again, and with no descriptor or thread more each time."""
    counts = []
    for number in range(1, 6):
        with Client(hasty.directory) as client:
            assert client.status().pid == hasty.pid
            assert (hasty.directory / "inner/inner.sock").stat().st_mode & 0o777 == 0o600
        stopped(hasty, number)
        eventually(lambda: not (hasty.directory / "inner/inner.sock").exists())
        counts.append((hasty.descriptors(), len(wake_ups(hasty))))
    assert counts[-1] <= counts[1]
    assert "security" not in hasty.logged()
    ended_well(hasty, hasty.stop())


def test_all_who_come_at_once_while_it_starts_are_served() -> None:
    """One start for all of them; it goes on as long as one of them is there."""
    with running(limits={"inner_idle_seconds": 0.0}, options=VERBOSE) as daemon:
        with ExitStack() as stack:
            peers = [stack.enter_context(Http2Peer(daemon.directory)) for _ in range(32)]
            assert peers
            with Client(daemon.directory) as client:
                assert client.status().connections == 33
            assert daemon.logged().count("inner-started") == 1
            assert "inner-stopped" not in daemon.logged()
        stopped(daemon, 1)
        ended_well(daemon, daemon.stop())


def test_who_leaves_before_it_runs_ends_nothing() -> None:
    """A connection that is gone at once, over and over, in the middle of starts and stops."""
    with running(limits={"inner_idle_seconds": 0.0}, options=VERBOSE) as daemon:
        for _ in range(100):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as passing:
                passing.connect(str(daemon.directory / "rpc.sock"))
        with Client(daemon.directory) as client:
            assert client.status().pid == daemon.pid
        assert daemon.process.poll() is None
        assert "giving-up" not in daemon.logged()
        assert daemon.stop() == 0, daemon.logged()


def test_one_that_cannot_start_ends_the_daemon() -> None:
    """Whoever starts it the next time gets everything anew."""
    with running(options=VERBOSE) as daemon:
        (daemon.directory / "inner/inner.sock").mkdir()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(SECONDS)
            connection.connect(str(daemon.directory / "rpc.sock"))
            assert connection.recv(1) == b""
        assert daemon.process.wait(SECONDS) == 72
        assert "the inner server does not start" in daemon.logged()
