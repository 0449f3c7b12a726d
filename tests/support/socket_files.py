"""What a daemon makes in the directory of its sockets, and programs that are run to their end."""

import stat
import subprocess
import sys
from pathlib import Path

from tests.support.wire import SECONDS, own_environment

FILES = {"rpc.sock": 0o600, "session.sock": 0o600, "daemon.lock": 0o600, "inner": 0o700}


def run(*argv: str | Path, umask: int = -1, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run one of our programs to its end."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, argv)],
        env={**own_environment(), **environ},
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
        check=False,
        umask=umask,
    )


def modes(directory: Path) -> dict[str, int]:
    """Return the mode of everything in a directory."""
    return {path.name: stat.S_IMODE(path.lstat().st_mode) for path in directory.iterdir()}
