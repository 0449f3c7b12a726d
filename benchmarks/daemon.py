"""dg-cached as a child in the foreground: ready when the block begins, gone when it ends."""

import contextlib
import os
import secrets
import select
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.processes import last_words, leashed
from benchmarks.testbed import TestbedError, end_process

START_SECONDS = 30.0
STOP_SECONDS = 15.0


@contextlib.contextmanager
def running_daemon(
    program: Path, *arguments: str, environment: Mapping[str, str], log: Path
) -> Iterator[int]:
    """Run dg-cached, its log in `log`; yield its process id.

    Raises:
        TestbedError: it does not say that it is ready in time; its log is in the message.
    """
    with _notifications() as (listener, address), log.open("wb") as output:
        process = leashed(
            [str(program), *arguments], output, {**environment, "NOTIFY_SOCKET": address}
        )
        try:
            _wait_until_ready(process, listener, log)
            yield process.pid
        finally:
            end_process(process, STOP_SECONDS)


@contextlib.contextmanager
def _notifications() -> Iterator[tuple[socket.socket, str]]:
    """Listen for sd_notify(3) under an abstract name, which leaves no file."""
    name = f"dg-cached-{secrets.token_hex(16)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as listener:
        listener.bind(f"\0{name}")
        yield listener, f"@{name}"


def _wait_until_ready(
    process: "subprocess.Popen[bytes]", listener: socket.socket, log: Path
) -> None:
    deadline = time.monotonic() + START_SECONDS
    ended = os.pidfd_open(process.pid)
    try:
        while True:
            left = max(0, deadline - time.monotonic())
            ready, _, _ = select.select([listener.fileno(), ended], [], [], left)
            told = listener.fileno() in ready
            if told and b"READY=1" in listener.recv(4096).split(b"\n"):
                return
            if not told:
                what = "ended" if ready else f"was not ready within {START_SECONDS:.0f} s"
                raise TestbedError(f"dg-cached {what}: {last_words(log)}")
    finally:
        os.close(ended)
