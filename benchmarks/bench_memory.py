"""Measures what the daemon's memory is: idle, with references, after `clear`.

`python -m benchmarks.bench_memory OUT --rounds N` uses the fresh daemon that DG_CACHE_SOCKET_DIR
leads to and writes its figures to OUT.
"""

import os
import sys
from collections.abc import Sequence

from benchmarks.bench_daemon import connected, store_status
from benchmarks.bench_figures import MEGABYTE, Figure, Group, of, resident_megabytes, save
from benchmarks.bench_store import parse
from dgcache import ReferenceCache

_SETS = ((50, 10), (10, 50), (5, 100))  # of so many MB each


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the figures."""
    arguments = parse(argv, "Measure the memory of the daemon that DG_CACHE_SOCKET_DIR leads to.")
    data = memoryview(os.urandom(max(count * size for count, size in _SETS) * MEGABYTE))
    with connected() as cache:
        save(arguments.out, [memory(cache, data, arguments.rounds)])
    return 0


def memory(cache: ReferenceCache, data: memoryview, rounds: int) -> Group:
    """Measure growth by stored bytes and what is left after `clear`, again and again."""
    pid = int(cache.status()["pid"])
    before = resident_megabytes(pid)
    costs: dict[tuple[int, int], list[float]] = {one: [] for one in _SETS}
    left = []
    for _ in range(rounds):
        for count, size in _SETS:
            empty = resident_megabytes(pid)
            _fill(cache, data, count, size)
            costs[count, size].append((resident_megabytes(pid) - empty) / (count * size))
            cache.clear()
            left.append(resident_megabytes(pid) - before)
    figures = [
        of(f"{count} x {size} MB stored, memory per stored byte", cost, "x", at_most=1.02)
        for (count, size), cost in costs.items()
    ]
    figures.append(Figure("with one client, empty", before, "MB", at_most=60))
    figures.append(of("after clear, above that", left, "MB", at_most=5))
    return Group(
        "memory with references",
        "growth of the daemon (resident pages and page tables, /proc/PID/status) when random "
        f"references were stored that nobody holds; stored and cleared {rounds} times in "
        "one daemon. Plaintext that somebody holds counts once more, in a memory file",
        figures,
    )


def _fill(cache: ReferenceCache, data: memoryview, count: int, size: int) -> None:
    for number in range(count):
        start = number * size * MEGABYTE
        cache.put("bench", f"memory/{number}", data[start : start + size * MEGABYTE])
    status = store_status(cache)
    if status["entries"] != count or status["handout_bytes"]:
        raise RuntimeError(f"the daemon has {status['entries']} references, not {count}")


if __name__ == "__main__":
    sys.exit(main())
