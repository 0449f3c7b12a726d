"""Servers that dg-cached is compared with: children on a Unix socket, gone when the block ends.

Nothing of them is on disk but the socket. memcached refuses to run as root unless it is told as
whom, which is root then: it listens on one socket in a directory that is closed to others.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.processes import last_words, leashed
from benchmarks.testbed import TestbedError, end_process

START_SECONDS = 15.0
STOP_SECONDS = 10.0
_POLL_SECONDS = 0.01


def redis_program() -> str | None:
    """Return Valkey where it is installed, else Redis, else None."""
    return shutil.which("valkey-server") or shutil.which("redis-server")


def memcached_program() -> str | None:
    """Return memcached, or None."""
    return shutil.which("memcached")


@contextlib.contextmanager
def running_redis(program: str, place: Path) -> Iterator[Path]:
    """Run Valkey or Redis without persistence; yield its socket."""
    address = place / "redis.sock"
    command = [
        *(program, "--port", "0", "--unixsocket", str(address), "--unixsocketperm", "700"),
        *("--save", "", "--appendonly", "no", "--dir", str(place), "--daemonize", "no"),
    ]
    with _running(command, address, place / "redis.log"):
        yield address


@contextlib.contextmanager
def running_memcached(program: str, place: Path, megabytes: int) -> Iterator[Path]:
    """Run memcached with its default limit of 1 MiB an item; yield its socket."""
    address = place / "memcached.sock"
    command = [program, "-s", str(address), "-a", "0700", "-m", str(megabytes), "-U", "0"]
    if os.geteuid() == 0:
        command += ["-u", "root"]
    with _running(command, address, place / "memcached.log"):
        yield address


@contextlib.contextmanager
def _running(command: list[str], address: Path, log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = leashed(command, output)
    try:
        _wait_until_it_listens(process, address, log)
        yield
    finally:
        end_process(process, STOP_SECONDS)


def _wait_until_it_listens(process: "subprocess.Popen[bytes]", address: Path, log: Path) -> None:
    """Try to connect until it goes: neither server tells by itself when it is ready."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(address))
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(_POLL_SECONDS)
            raise TestbedError(f"{address.stem} ended with status {status}: {last_words(log)}")
        if time.monotonic() > deadline:
            raise TestbedError(f"{address.stem} does not listen: {last_words(log)}")
