"""Many clients at once, each a process of its own that was started before and stays connected."""

import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.testbed import ROOT, end_process

_START_SECONDS = 120.0
_ANSWER_SECONDS = 120.0
_STOP_SECONDS = 15.0
_LEAD_SECONDS = 0.1
"""Between an order and its beginning, so that every client has heard it by then."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What all clients of one order did together."""

    milliseconds: list[float]
    failures: list[str]
    seconds: float
    """From the common beginning until the last of them was done."""


class Clients:
    """Clients that are ready."""

    def __init__(self, processes: Sequence["subprocess.Popen[str]"]) -> None:
        """Use processes that said so."""
        self._processes = processes

    def do(self, what: str, sha256: str, *, clients: int, seconds: float = 0.0) -> Answer:
        """Let the first so many clients do it together, for that long, at least once each."""
        begin = time.monotonic() + _LEAD_SECONDS
        order = {"do": what, "sha256": sha256, "from": begin, "until": begin + seconds}
        asked = self._processes[:clients]
        for process in asked:
            _write(process, json.dumps(order))
        answers = [json.loads(_read(process, _ANSWER_SECONDS)) for process in asked]
        return Answer(
            [one for answer in answers for one in answer["ms"]],
            [one for answer in answers for one in answer["failures"]],
            max(answer["ended"] for answer in answers) - begin,
        )


@contextmanager
def running_clients(count: int, directory: Path) -> Iterator[Clients]:
    """Start so many; yield them when all are connected.

    Args:
        count: how many.
        directory: of the plain files that they read for comparison.
    """
    command = [sys.executable, "-m", "benchmarks.client_worker", str(directory)]
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                process_group=0,
            )
            stack.enter_context(process)
            stack.callback(end_process, process, _STOP_SECONDS)  # type: ignore[arg-type]
            processes.append(process)
        for process in processes:
            if _read(process, _START_SECONDS) != "ready\n":
                raise RuntimeError("a client did not begin")
        yield Clients(processes)


def _write(process: "subprocess.Popen[str]", line: str) -> None:
    if process.stdin is None:
        raise RuntimeError("a client without a pipe")
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def _read(process: "subprocess.Popen[str]", seconds: float) -> str:
    """Read one line: nothing is left in the buffer, since each order has one answer."""
    if process.stdout is None:
        raise RuntimeError("a client without a pipe")
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    if not ready:
        raise RuntimeError(f"a client did not answer within {seconds:.0f} s")
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a client ended")
    return line
