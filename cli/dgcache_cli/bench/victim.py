"""The other end of `child`: starts a process that uses an implementation, asks it, kills it.

Every answer has a deadline. A process whose standard input ends, ends: none is left behind by a
bench that is killed.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from dgcache_core.errors import CacheUnavailableError

ANSWER_SECONDS = 30.0


class RefusedError(Exception):
    """The implementation said no; the message is its own."""


class Victim:
    """A running process that uses one implementation."""

    def __init__(self, name: str, place: Path, source: Path) -> None:
        """Start it; `end` must be called."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dgcache_cli.bench.child", name, str(place), str(source)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # Ctrl-C in a terminal is for us
        )
        pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
        self._stdin, self._stdout, self._stderr = (cast(IO[bytes], pipe) for pipe in pipes)

    def __call__(self, command: str, *arguments: str) -> Any:
        """Have it do something and return its answer.

        Raises:
            RefusedError: the implementation raised.
            CacheUnavailableError: the process ended, or did not answer in time.
        """
        try:
            self._stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
            self._stdin.flush()
            answer = json.loads(self._line())
        except (BrokenPipeError, ValueError) as error:
            raise CacheUnavailableError(f"a bench process ended: {self._last_words()}") from error
        if "error" in answer:
            raise RefusedError(answer["error"])
        return answer["value"]

    def kill(self) -> None:
        """End it with SIGKILL, as the kernel does when memory is short."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Let it end by itself, in time."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._stdout.close()
        self._stderr.close()

    def _line(self) -> bytes:
        """Return one line of its output; empty where it ended."""
        deadline = time.monotonic() + ANSWER_SECONDS
        line = b""
        while not line.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._stdout], [], [], left)[0]:
                raise CacheUnavailableError("a bench process does not answer")
            piece = os.read(self._stdout.fileno(), 1 << 16)
            if not piece:
                return b""
            line += piece
        return line

    def _last_words(self) -> str:
        self.kill()
        words = self._stderr.read().decode(errors="replace").strip()
        return words.rpartition("\n")[2] or "without a word"


@contextmanager
def victim(name: str, place: Path, source: Path) -> Iterator[Victim]:
    """Run a process that uses an implementation while the block runs."""
    process = Victim(name, place, source)
    try:
        yield process
    finally:
        process.end()
