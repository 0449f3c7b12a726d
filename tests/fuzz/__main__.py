"""`make fuzz`: searches with atheris, a target at a time, and says what it found.

Needs the group `fuzz` of pyproject.toml. A process for each target does the search (`search`);
this one starts it again after a crash of the interpreter, shows how it goes, and adds up.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from . import TARGETS
from .corpus import crashes_of, keep_some, seed

_PULSE = re.compile(r"^#(\d+)\s.*?cov: (\d+).*?exec/s: (\d+)")
_SHOW_EVERY_SECONDS = 30.0
_GRACE_SECONDS = 30.0
_SLOWEST_INPUT_SECONDS = 20
_LONGEST_INPUT_BYTES = 4096
_FEWEST_SECONDS = 2.0


@dataclass
class Outcome:
    """What the search of one target came to."""

    target: str
    seconds: float = 0.0
    executions: int = 0
    edges: int = 0
    findings: int = 0

    @property
    def row(self) -> str:
        """The line of the final table."""
        rate = self.executions / self.seconds if self.seconds else 0.0
        return (
            f"{self.target:16} {self.seconds / 60:8.1f} {self.executions:12,} {rate:8.0f} "
            f"{self.edges:7} {self.findings:9}"
        )


def main() -> int:
    """Search every target in turn; the status is 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one")
    wanted = parser.parse_args()
    outcomes: list[Outcome] = []
    try:
        for target in wanted.target or TARGETS:
            outcomes.append(Outcome(target))
            search_for(outcomes[-1], wanted.minutes * 60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(f"\n{'target':16} {'minutes':>8} {'executions':>12} {'exec/s':>8} {'edges':>7}  findings")
    for outcome in outcomes:
        print(outcome.row)
    return any(outcome.findings for outcome in outcomes)


def search_for(outcome: Outcome, seconds: float) -> None:
    """Search one target, again after each crash, and keep what is new in the corpus."""
    known = set(crashes_of(outcome.target))
    print(f"{outcome.target}: {seconds / 60:g} minutes", flush=True)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="dgf-", dir=memory) as base:
        corpus = Path(base, "corpus")
        seed(outcome.target, corpus)
        begun = time.monotonic()
        try:
            while (left := begun + seconds - time.monotonic()) > _FEWEST_SECONDS:
                _search_once(outcome, Path(base), left)
        finally:
            outcome.seconds = time.monotonic() - begun
            outcome.findings = len(set(crashes_of(outcome.target)) - known)
            _keep(outcome.target, corpus, Path(base, "merged"))


def _search_once(outcome: Outcome, base: Path, seconds: float) -> None:
    before, shown = outcome.executions, 0.0
    options = [
        f"-max_total_time={int(seconds) + 1}",
        f"-timeout={_SLOWEST_INPUT_SECONDS}",
        f"-max_len={_LONGEST_INPUT_BYTES}",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
        str(base / "corpus"),
    ]
    with _searching(outcome.target, base, options) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if pulse := _PULSE.match(line):
                executions, outcome.edges, rate = map(int, pulse.groups())
                outcome.executions = before + executions
                if time.monotonic() - shown > _SHOW_EVERY_SECONDS:
                    shown = time.monotonic()
                    print(
                        f"  {outcome.executions:,} executions, {rate}/s, {outcome.edges} edges",
                        flush=True,
                    )
            elif line.startswith("stat::number_of_executed_units:"):
                outcome.executions = before + int(line.split()[1])
            elif not line.startswith(("stat::", "INFO:", "#", "Done ")):
                print(f"  {line.rstrip()}", flush=True)


@contextmanager
def _searching(target: str, base: Path, options: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """Run the search in a session of its own, and end all that is in it: daemons outlive it."""
    (base / "t").mkdir(exist_ok=True)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.search", target, *options],
        env={**os.environ, "TMPDIR": str(base / "t")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
            _end_group(process.pid)


def _end_group(group: int) -> None:
    """Kill what is left, and wait until it is gone: a daemon puts its sockets back until then."""
    deadline, pause = time.monotonic() + _GRACE_SECONDS, threading.Event()
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, signal.SIGKILL)
            pause.wait(0.01)


def _keep(target: str, found: Path, merged: Path) -> None:
    """Let libFuzzer choose the inputs that together reach everything, and keep some."""
    merged.mkdir()
    options = ["-merge=1", str(merged), str(found)]
    with _searching(target, merged.parent, options) as process:
        assert process.stdout is not None
        for _ in process.stdout:
            pass
        process.wait()
    source = merged if process.returncode == 0 and any(merged.iterdir()) else found
    print(f"  corpus: {keep_some(target, source)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
