"""One search of one target, under atheris; the arguments after the target are libFuzzer's.

What breaks the invariant is written to crashes/ once for each place that raises, and the search
goes on; what kills the interpreter, or takes too long, ends it (libFuzzer writes that input).
"""

import hashlib
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import atheris

from .corpus import HERE, store

_REPOSITORY = HERE.parents[1]
_INSTRUMENTED = ["dgcache_core", "dgcache", "dgcached", "tomllib", "tests.fuzz"]


class Finder:
    """Calls a target's `run` and notes what it raises."""

    def __init__(self, crashes: Path, run: Callable[[bytes], None], *, writes: bool) -> None:
        self._crashes = crashes
        self._run = run
        self._writes = writes
        self._seen: set[str] = set()

    def __call__(self, data: bytes) -> None:
        """Run once."""
        try:
            self._run(data)
        except Exception as error:
            place = _place(error)
            if place in self._seen or not self._writes:
                return
            self._seen.add(place)
            path = store(self._crashes, data, f"{type(error).__name__}-")
            print(f"FINDING {path.name}: {place}", file=sys.stderr)
            traceback.print_exc()


def _place(error: BaseException) -> str:
    """Return where an error was raised, so that one mistake is one finding."""
    frames = [
        f"{frame.name}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_REPOSITORY)
    ]
    return f"{type(error).__name__} in {frames[-1] if frames else 'nowhere'}"


def _restartable(target: str) -> str:
    """Return a program that libFuzzer can start again as itself, for a merge."""
    name = hashlib.sha256(f"{sys.executable}{_REPOSITORY}{target}".encode()).hexdigest()[:16]
    path = Path(os.environ.get("TMPDIR", "/tmp"), f"dgf-{os.getpid()}-{name}")
    again = f'exec "{sys.executable}" -m tests.fuzz.search {target} "$@"'
    path.write_text(f'#!/bin/sh\ncd "{_REPOSITORY}" && {again}\n')
    path.chmod(0o700)
    return str(path)


def main(target: str, options: list[str]) -> None:
    """Search until libFuzzer's options end it; does not return."""
    with atheris.instrument_imports(include=_INSTRUMENTED):
        module = import_module(f"tests.fuzz.{target}")
        from .live import landmarks
    for one in landmarks():
        atheris.instrument_func(one)
    crashes = HERE / "crashes" / target
    crashes.mkdir(parents=True, exist_ok=True)
    atheris.Setup(
        [_restartable(target), *options, f"-artifact_prefix={crashes}/"],
        Finder(crashes, module.run, writes=not any(one.startswith("-merge") for one in options)),
        internal_libfuzzer=True,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
