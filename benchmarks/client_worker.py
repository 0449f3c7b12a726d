"""One client of the daemon as a real process, told over a pipe what to do and when.

`python -m benchmarks.client_worker DIRECTORY` opens its session, writes the line `ready`, then
obeys one order a line, as JSON: `{"do": "gets" | "reads" | "directory" | "hold" | "release",
"sha256": …, "from": …, "until": …}`. The times are of CLOCK_MONOTONIC, the same for all
processes, so that no order has to be waited for when the clients begin together. It answers each
order with a line of JSON: the milliseconds of every operation, and how many failed. It ends with
its standard input.

- gets: `get` and `close`, again and again.
- reads: `get`, read to the last byte through the path, `close`, again and again.
- directory: the same with the plain directory and SHA-256 at use.
- hold: one `get`, which is kept until `release`.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bench_daemon import connected, get
from dgcache import Reference, ReferenceCache
from dgcache_cli.bench.content_addressed import ContentAddressed
from dgcache_cli.bench.port import PIECE_BYTES
from dgcache_core.errors import CacheError

_buffer = bytearray(PIECE_BYTES)


def main() -> int:
    """Obey until standard input ends."""
    held: list[Reference] = []
    with connected() as cache:
        files = ContentAddressed(Path(sys.argv[1]))
        print("ready", flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            print(json.dumps(_obeyed(cache, files, held, order)), flush=True)
        for reference in held:
            reference.close()
    return 0


def _obeyed(
    cache: ReferenceCache, files: ContentAddressed, held: list[Reference], order: dict[str, Any]
) -> dict[str, Any]:
    sha256 = order["sha256"]
    operations: dict[str, Callable[[], object]] = {
        "gets": lambda: get(cache, sha256).close(),
        "reads": lambda: _read_through(cache, sha256),
        "directory": lambda: _read(files.get_validated_ref("bench", "app", sha256)),
        "hold": lambda: held.append(get(cache, sha256)),
        "release": lambda: held.pop().close(),
    }
    _sleep_until(order["from"])
    return _repeated(operations[order["do"]], order["until"])


def _repeated(operation: Callable[[], object], until: float) -> dict[str, Any]:
    """Do it at least once, and on until the time has come."""
    took, failures = [], []
    while True:
        start = time.monotonic()
        try:
            operation()
        except (CacheError, RuntimeError, OSError) as error:
            failures.append(str(error))
        took.append((time.monotonic() - start) * 1000)
        if time.monotonic() >= until:
            return {"ms": took, "failures": failures, "ended": time.monotonic()}


def _read_through(cache: ReferenceCache, sha256: str) -> None:
    with get(cache, sha256) as reference:
        _read(reference.path)


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.readinto(_buffer):
            pass


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))  # all begin at once; nothing is waited for


if __name__ == "__main__":
    sys.exit(main())
