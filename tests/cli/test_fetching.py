"""`dg-cache get --fetch` on a busy host: a daemon that is there is waited for, and one fetches."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cli.test_commands import DATA, DIGEST
from tests.support.wire import Daemon, own_environment, running

CROWD = 32
BURNERS = 4 * (os.cpu_count() or 1)
BURN = "import time\nend = time.monotonic() + 120\nwhile time.monotonic() < end: pass"


@pytest.fixture
def serving() -> Iterator[Daemon]:
    with running() as daemon:
        yield daemon


@pytest.fixture
def busy() -> Iterator[None]:
    """Processes that do nothing but compute, and end by themselves."""
    with ExitStack() as stack:
        for _ in range(BURNERS):
            burner = stack.enter_context(subprocess.Popen([sys.executable, "-c", BURN]))
            stack.callback(burner.kill)
        yield


def getting(daemon: Daemon, base: Path) -> "subprocess.Popen[bytes]":
    """Start a process that gets the reference; a fetch leaves a line in the journal."""
    (base / "reference").write_bytes(DATA)
    fetch = f"echo fetch >> {base}/journal; cat {base}/reference"
    return subprocess.Popen(
        [sys.executable, "-m", "dgcache_cli", "get", "b/p", DIGEST, "--fetch", fetch],
        env={**own_environment(), "DG_CACHE_SOCKET_DIR": str(daemon.directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def fetches(base: Path) -> int:
    journal = base / "journal"
    return journal.read_text().count("fetch") if journal.exists() else 0


@pytest.mark.usefixtures("busy")
def test_32_cold_processes_on_a_busy_host_make_one_fetch(serving: Daemon, tmp_path: Path) -> None:
    """The daemon gets the CPU late, and every process waits for its word."""
    with ExitStack() as stack:
        processes = [stack.enter_context(getting(serving, tmp_path)) for _ in range(CROWD)]
        for process in processes:
            stack.callback(process.kill)
        said = [process.communicate(timeout=180) for process in processes]
    assert [out == DATA for out, _ in said] == [True] * CROWD
    assert not [err for _, err in said if b"in-process" in err]
    assert fetches(tmp_path) == 1


def test_a_daemon_that_says_hello_late_is_waited_for(serving: Daemon, tmp_path: Path) -> None:
    """It has the reference and does not run until a second after the process was started."""
    with getting(serving, tmp_path) as first:
        assert first.communicate(timeout=60)[0] == DATA
    os.kill(serving.pid, signal.SIGSTOP)
    waker = threading.Timer(1.0, os.kill, (serving.pid, signal.SIGCONT))
    waker.start()
    try:
        with getting(serving, tmp_path) as second:
            assert second.communicate(timeout=60)[0] == DATA
    finally:
        waker.join()
    assert fetches(tmp_path) == 1
