"""Run one program, bounded, measured, and gone when this returns or raises.

A signal never raises in the middle of something: `Interruption` notes it, and whoever waits or
works in steps asks. A child is a process group of its own, so that Ctrl-C reaches us alone and we
end what we started, by its id, in order: SIGINT, which lets DeltaGlider remove its directory in
/tmp, then SIGKILL.

Peak memory is wait4(2)'s ru_maxrss: the largest resident set among the child and those it waited
for (xdelta3). The kernel starts that mark at what we held at exec(2), so this process must stay
smaller than what it measures: files are read in blocks here.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.testbed import ROOT
from dgcache_cli.bench.interruption import Interruption

KIBIBYTE = 1 << 10
INTERRUPT_SECONDS = 15.0


class ProcessFailedError(Exception):
    """A program ended with an error or took too long; the message holds its last words."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one program took."""

    seconds: float
    peak_bytes: int


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: Path,
    log: Path,
    seconds: float,
    interruption: Interruption,
) -> Measured:
    """Run a program to its end and return what it took.

    Args:
        command: program and arguments.
        environment: its whole environment.
        directory: where it runs.
        log: file for its output, written anew.
        seconds: how long it may take.
        interruption: what ends it early.

    Raises:
        ProcessFailedError: it ended with another status than 0, or did not end in time.
        Interrupted: a signal came; the program and its children are gone.
    """
    with log.open("wb") as output:
        interruption.check()
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    with _ended_at_last(process), _pidfd(process) as ended:
        ready, _, _ = select.select([ended, interruption.fileno()], [], [], seconds)
        took = time.monotonic() - start
        interruption.check()
        if ended not in ready:
            raise ProcessFailedError(f"{_shown(command)} did not end within {seconds:.0f} s")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise ProcessFailedError(
            f"{_shown(command)} ended with status {process.returncode}: {last_words(log)}"
        )
    return Measured(took, usage.ru_maxrss * KIBIBYTE)


def leashed(
    command: Sequence[str], output: IO[bytes], environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a server that ends with this process, its output in a file; it is the caller's to end.

    By default it has this process's environment.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.leash", str(os.getpid()), *command],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        process_group=0,
    )


def last_words(log: Path) -> str:
    """Return the end of a log."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        return file.read().decode(errors="replace").strip()


@contextlib.contextmanager
def _pidfd(process: "subprocess.Popen[bytes]") -> Iterator[int]:
    descriptor = os.pidfd_open(process.pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _ended_at_last(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """End the process group of a child that is still there.

    The child is not waited for before the last signal, so that its id, the group's, stays ours.
    """
    try:
        yield
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGINT)
            with _pidfd(process) as ended:
                select.select([ended], [], [], INTERRUPT_SECONDS)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _shown(command: Sequence[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])
