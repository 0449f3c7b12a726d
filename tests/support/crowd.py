"""Many client processes that ask for one reference at the same moment, and what they did.

Every process is real, imports the SDK once, and is told what to do line by line. A fetch writes
into a journal when it starts and ends, and takes as long as it is told, or until it is killed.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.wire import eventually

_WORKER = """\
import hashlib, json, os, sys, threading, time
import dgcache, dgcache.grpc_transport, dgcache.remote, dgcache.cache
def note(journal, what):
    with open(journal, "a") as lines:
        lines.write(f"{what} {os.getpid()} {time.monotonic()}\\n")
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    settings = dgcache.Settings.from_environment(**{
        **order["settings"], "connect_timeout_ms": 30000,
        "socket_dir": __import__("pathlib").Path(order["socket_dir"])})
    def fetch():
        note(order["journal"], "start")
        threading.Event().wait(order["fetch_seconds"])
        if order["fetch_fails"]:
            note(order["journal"], "end")
            raise OSError("the source is away")
        note(order["journal"], "end")
        return bytes.fromhex(order["data"]) * order["times"]
    started = time.monotonic()
    answer = {"pid": os.getpid()}
    try:
        with dgcache.open(settings) as cache:
            answer["backend"] = cache.backend
            with cache.get_or_fetch("b", "p", order["sha256"], fetch) as reference:
                answer["right"] = (
                    hashlib.sha256(reference.buffer()).hexdigest() == order["sha256"])
                answer["source"] = reference.source
            answer["still"] = cache.backend
    except BaseException as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    answer["seconds"] = time.monotonic() - started
    print(json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class Fetches:
    """What the journal tells."""

    started: list[int]
    most_at_once: int


class Crowd:
    """Processes that wait for orders."""

    def __init__(self, processes: "list[subprocess.Popen[str]]") -> None:
        self.processes = processes
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

    def order(
        self,
        socket_dir: Path,
        journal: Path,
        data: bytes,
        sha256: str,
        *,
        count: int | None = None,
        times: int = 1,
        fetch_seconds: float = 0.0,
        fetch_fails: bool = False,
        **settings: Any,
    ) -> None:
        """Let `count` of them (default: all) get or fetch `data * times`."""
        order = {
            "socket_dir": str(socket_dir),
            "journal": str(journal),
            "data": data.hex(),
            "times": times,
            "sha256": sha256,
            "fetch_seconds": fetch_seconds,
            "fetch_fails": fetch_fails,
            "settings": settings,
        }
        for process in self.processes[:count]:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()

    def answers(self, count: int | None = None) -> list[dict[str, Any]]:
        """Return what each that lives answers."""
        answers = []
        for process in self.processes[:count]:
            assert process.stdout is not None
            line = process.stdout.readline()
            if line:
                answers.append(json.loads(line))
        return answers

    def kill(self, pid: int) -> None:
        """SIGKILL one of them."""
        victim = next(process for process in self.processes if process.pid == pid)
        victim.kill()
        victim.wait(20)


@contextmanager
def crowd(size: int) -> Iterator[Crowd]:
    """Lend `size` client processes."""
    with ExitStack() as stack:
        processes = []
        for _ in range(size):
            process = subprocess.Popen(
                [sys.executable, "-c", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(_end, process)
            processes.append(process)
        yield Crowd(processes)


def _end(process: "subprocess.Popen[str]") -> None:
    with suppress(OSError):
        process.kill()


def fetches(journal: Path) -> Fetches:
    """Read the journal."""
    started, running, most = [], 0, 0
    lines = [line.split() for line in journal.read_text().splitlines()] if journal.exists() else []
    for what, pid, _ in sorted(lines, key=lambda line: float(line[2])):
        running += 1 if what == "start" else -1
        most = max(most, running)
        if what == "start":
            started.append(int(pid))
    return Fetches(started, most)


def first_fetcher(journal: Path, number: int = 1) -> int:
    """Wait until `number` fetches have started and return the pid of the last of them."""
    condition: Callable[[], bool] = lambda: len(fetches(journal).started) >= number  # noqa: E731
    eventually(condition)
    return fetches(journal).started[number - 1]
