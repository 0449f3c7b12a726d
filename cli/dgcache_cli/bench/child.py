"""A process that uses one implementation, so that it can be attacked and killed from outside.

`python -m dgcache_cli.bench.child NAME DIRECTORY SOURCE` reads one command a line, as JSON, and
answers each with one line. It ends with its standard input. Its umask is 022, the common one.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dgcache_cli.bench.implementations import by_name
from dgcache_cli.bench.port import Contender
from dgcache_cli.bench.traces import holds_plaintext
from dgcache_core.errors import CacheError

BUDGET_MB = 64


class _Victim:
    """What the commands do."""

    def __init__(self, contender: Contender, place: Path, source: Path) -> None:
        self._contender = contender
        self._place = place
        self._source = source
        self._held = ExitStack()

    def put(self) -> None:
        self._held.close()
        self._contender.clear()
        self._contender.write(self._source)

    def get(self, sha256: str) -> str:
        return str(self._held.enter_context(self._contender.read(sha256)))

    def release(self) -> None:
        self._held.close()

    def evict(self) -> None:
        self._held.close()
        self._contender.evict()

    def holds_plaintext(self) -> bool:
        """Look into files that have no name any more: only their owner can."""
        return holds_plaintext(self._place, self._source.read_bytes())


def main() -> int:
    """Serve commands until there are no more."""
    name, directory, source = sys.argv[1:]
    os.umask(0o022)
    place = Path(directory)
    with by_name(name).opened(place, BUDGET_MB) as contender:
        victim = _Victim(contender, place, Path(source))
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            print(json.dumps(_answer(getattr(victim, command), arguments)), flush=True)
        victim.release()
    return 0


def _answer(command: Callable[..., Any], arguments: list[str]) -> dict[str, Any]:
    try:
        return {"value": command(*arguments)}
    except (CacheError, OSError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.exit(main())
