"""Client processes: each slot has one at a time, and another as soon as it has ended.

What they print is added up here. `finish` lets every operation in progress end; one that does not
within its budget is a failed operation.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak.client import BUDGET_SECONDS
from tests.support.wire import own_environment

ROOT = Path(__file__).parents[2]
_MAX_KEPT_FAILURES = 50
_GRACE_SECONDS = BUDGET_SECONDS + 15


@dataclass
class Tally:
    """What all clients did. Thread-safe."""

    operations: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    bytes_compared: int = 0
    bytes_stored: int = 0
    wrong_bytes: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0
    lives: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, answer: Mapping[str, Any], who: str) -> None:
        """Count one operation."""
        with self._lock:
            self.operations[answer["op"]] += 1
            if "source" in answer:
                self.sources[answer["source"]] += 1
            if "note" in answer:
                self.notes[f"{answer['op']}: {answer['note']}"] += 1
            self.bytes_compared += answer.get("bytes", 0)
            self.bytes_stored += answer.get("put_bytes", 0)
            self.wrong_bytes += answer.get("wrong", 0)
            self.slowest_seconds = max(self.slowest_seconds, answer["seconds"])
        if answer.get("failed"):
            self.fail(f"{who}: {answer['op']}: {answer['failed']}")

    def fail(self, what: str) -> None:
        """Count a failed operation."""
        with self._lock:
            self.failed += 1
            if len(self.failures) < _MAX_KEPT_FAILURES:
                self.failures.append(what[:2000])

    def began(self) -> None:
        """Count a client's life."""
        with self._lock:
            self.lives += 1


class Slot:
    """One place for a client process."""

    def __init__(self, name: str, plan: Mapping[str, Any], tally: Tally, temporary: Path) -> None:
        """Describe it; `start` starts the first process."""
        self.name, self._plan, self._tally = name, plan, tally
        self._environment = {**own_environment(), "TMPDIR": str(temporary)}
        self._lives = 0
        self._killed: set[int] = set()
        self._finishing = threading.Event()
        self._keeper: threading.Thread | None = None
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Keep a process there until `finish`."""
        self._finishing.clear()
        self._keeper = threading.Thread(target=self._keep, name=self.name)
        self._keeper.start()

    def signal(self, number: int) -> int | None:
        """Send a signal to the process that is there, if one is, and return its pid."""
        process = self.process
        if process is None or process.poll() is not None:
            return None
        if number == signal.SIGKILL:
            self._killed.add(process.pid)
        process.send_signal(number)
        return process.pid

    def finish(self) -> None:
        """Tell the process to end after its operation."""
        self._finishing.set()
        process = self.process
        if process is not None and process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()

    def join(self) -> None:
        """Wait for the end, and kill what does not come to one."""
        assert self._keeper is not None
        self._keeper.join(_GRACE_SECONDS)
        if self._keeper.is_alive():
            self._tally.fail(f"{self.name}: hung, and was killed")
            self.signal(signal.SIGKILL)
            self._keeper.join(20)

    def _keep(self) -> None:
        while not self._finishing.is_set():
            self._live()

    def _live(self) -> None:
        self._lives += 1
        self._tally.began()
        plan = {**self._plan, "chance": f"{self._plan['seed']}/{self.name}/{self._lives}"}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.client", json.dumps(plan)],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.process = process
        complaint: list[str] = []
        listener = threading.Thread(target=lambda: complaint.extend(process.stderr or ()))
        listener.start()
        with process:
            if self._finishing.is_set():
                self.finish()
            for line in process.stdout or ():
                if line.endswith("}\n"):  # the last one of a killed process may be cut off
                    self._tally.add(json.loads(line), self.name)
            status = process.wait()
            self._end_children(process.pid)
            listener.join(20)
        if status != 0 and process.pid not in self._killed:
            self._tally.fail(
                f"{self.name} ended with status {status}: {''.join(complaint)[-1500:]}"
            )

    def _end_children(self, pid: int) -> None:
        """A command that a killed client had started has nobody left to answer."""
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
