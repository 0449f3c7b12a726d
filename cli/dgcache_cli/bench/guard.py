"""Clears up after a bench that was killed: ends its daemons, removes its directory.

`python -m dgcache_cli.bench.guard DIRECTORY` waits for the end of its standard input, a pipe that
the bench holds: however the bench ends, the kernel closes it. After one that ended as it should,
there is nothing left to do.
"""

import contextlib
import os
import shutil
import sys
from pathlib import Path

SOCKETS = "s"
"""What the directory of a daemon's sockets is called, below its implementation's."""


def main() -> int:
    """Wait, then clear up what is left."""
    directory = Path(sys.argv[1])
    while os.read(0, 1):
        pass
    if directory.exists():
        _clear_up(directory)
    return 0


def _clear_up(directory: Path) -> None:
    from dgcache import ending
    from dgcache_core.errors import CacheError

    for sockets in directory.glob(f"*/{SOCKETS}"):
        with contextlib.suppress(CacheError):  # it does not answer, or is no daemon any more
            ending.stop(sockets, {})
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
