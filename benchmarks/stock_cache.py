"""DeltaGlider 6.2.0's own cache, as it is, asked from outside; runs in DeltaGlider's environment.

`python -m benchmarks.stock_cache DIRECTORY` reads one request a line, `write PATH`, `read SHA256`
or `clear`, and answers each with a line of JSON: the path, and the milliseconds its call took. It
ends with its standard input.

`read` is `get_validated_ref`, called directly: DeltaGlider itself asks `has_ref` before, which
never says yes, and downloads.
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaglider.adapters import ContentAddressedCache, EncryptedCache, Sha256Adapter

_BUCKET, _PREFIX = "bench", "app"


def main() -> int:
    """Answer until standard input ends."""
    logging.disable()
    hasher: Any = Sha256Adapter  # DeltaGlider's classes say nothing of their types
    files: Any = ContentAddressedCache
    stock: Any = EncryptedCache
    cache: Any = stock.from_env(files(Path(sys.argv[1]), hasher()))
    calls: dict[str, Callable[[str], Any]] = {
        "write": lambda argument: cache.write_ref(_BUCKET, _PREFIX, Path(argument)),
        "read": lambda argument: cache.get_validated_ref(_BUCKET, _PREFIX, argument),
        "clear": lambda _: cache.clear(),
    }
    for line in sys.stdin:
        verb, _, argument = line.rstrip("\n").partition(" ")
        start = time.perf_counter()
        path = calls[verb](argument)
        took = (time.perf_counter() - start) * 1000
        print(json.dumps({"path": str(path or ""), "ms": took}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
