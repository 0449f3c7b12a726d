"""Daemons and their homes, and who starts a daemon again when it has ended.

A household's sockets are in a directory of its own, its disk tier in a small tmpfs that the faults
fill, make read-only and spoil. `end` waits for whatever runs; what a household says of the lives of
its daemons (`ended`, `complaints`) is complete after it. Needs root.
"""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.soak.client import LEASE_SECONDS
from tests.support.disk_daemon import LOCK_READS_ONLY, Home
from tests.support.wire import Daemon

TMPFS_MB = 40
DISK_MB = 28
_QUICK: dict[str, Any] = {
    "audit_seconds": 5.0,
    "lease_seconds": LEASE_SECONDS,
    "pressure_look_seconds": 0.2,
    "pressure_calm_seconds": 1.0,
    "pressure_step_seconds": 0.2,
    "rebinds_per_minute": 600,
}
"""Bounds that differ from a user's, so that what takes minutes shows within a short run."""

_EXPECTED_STATUSES = {0, -9, -15, 72}
"""Ended in order, by a fault's SIGKILL, by a SIGTERM before its handler stood; or its sockets were
taken away more often than it mends."""


_UNSENT = re.compile(
    r"Traceback \(most recent call last\):\n"
    r'(?:  File "src/python/grpcio/[^\n]*\n)+'
    r"grpc\._cython\.cygrpc\.ExecuteBatchError: [^\n]*\n"
)
"""What gRPC prints, with no line of ours in it, when it cannot send a call's status any more."""


class Household:
    """One user's daemon."""

    def __init__(
        self,
        name: str,
        place: Path,
        *,
        memory_mb: float,
        persistent: bool,
        prefix: tuple[str, ...] = (),
        environ: dict[str, str] | None = None,
    ) -> None:
        """Describe it; `running` starts it."""
        self.name = name
        self.home = Home(place)
        self.home.cache.mkdir(mode=0o700)
        self.lives = 0
        self.ended: list[int] = []
        self.complaints: list[str] = []
        self.pids: list[int] = []
        self.unsent = 0
        self._memory_mb, self._persistent = memory_mb, persistent
        self._prefix = (*prefix, sys.executable, "-c", LOCK_READS_ONLY)
        self._environ = environ
        self._daemon: Daemon | None = None
        self._closing = threading.Event()
        self._serving = threading.Event()

    @contextmanager
    def running(self) -> Iterator["Household"]:
        """Keep a daemon running until the block ends."""
        with small_file_system(self.home.cache):
            keeper = threading.Thread(target=self._keep, name=self.name)
            keeper.start()
            try:
                if not self._serving.wait(60):
                    raise AssertionError(f"{self.name} did not start: {self.complaints}")
                yield self
            finally:
                self.end()
                keeper.join(90)

    @property
    def daemon(self) -> Daemon | None:
        """The daemon that lives now, if one does."""
        return self._daemon

    def end(self) -> None:
        """End the daemon as a supervisor would."""
        self._closing.set()
        daemon = self._daemon
        if daemon is not None:
            with suppress(ProcessLookupError):
                os.kill(daemon.pid, 18)  # SIGCONT: it may have been stopped
                daemon.process.terminate()

    def _keep(self) -> None:
        while not self._closing.is_set():
            try:
                self._live()
            except AssertionError as error:
                self.complaints.append(f"{self.name}: {error}"[:2000])
                self._closing.wait(1)

    def _live(self) -> None:
        with ExitStack() as stack:
            daemon = stack.enter_context(
                self.home.daemon(
                    persistent=self._persistent,
                    memory_mb=self._memory_mb,
                    disk_mb=DISK_MB,
                    limits=_QUICK,
                    prefix=self._prefix,
                    environ=self._environ,
                )
            )
            self.lives += 1
            self.pids.append(daemon.pid)
            self._daemon = daemon
            self._serving.set()
            if self._closing.is_set():
                daemon.process.terminate()
            status = daemon.process.wait()
            self._daemon = None
            self.ended.append(status)
            if status not in _EXPECTED_STATUSES:
                self.complaints.append(f"{self.name} ended by itself with status {status}")
            self._judge(daemon.logged())

    def _judge(self, log: str) -> None:
        log, unsent = _UNSENT.subn("", log)
        self.unsent += unsent
        if "Traceback" in log:
            at = log.index("Traceback")
            self.complaints.append(f"{self.name} logged: {log[max(0, at - 500) : at + 3000]}")


@contextmanager
def small_file_system(place: Path) -> Iterator[None]:
    """Have a file system of `TMPFS_MB` in memory there while the block runs."""
    size = f"size={TMPFS_MB}m,mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
