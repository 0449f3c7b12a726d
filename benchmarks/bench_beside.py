"""Measures what the search for a daemon costs where there is none, by size, in one process.

`python -m benchmarks.bench_beside OUT --rounds N` runs with a DG_CACHE_SOCKET_DIR that leads
nowhere: one cache looks for the daemon, in vain, again and again; the other was told never to.
"""

import os
import sys
from collections.abc import Sequence
from statistics import median

import dgcache
from benchmarks.bench_figures import MEGABYTE, Figure, Group, milliseconds, of, save
from benchmarks.bench_store import SAMPLES_A_ROUND, parse
from dgcache import ReferenceCache, Settings

SLOWER_MS = 1.0
SLOWER_SHARE = 0.02
_BUDGET_MB = 1200


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the figures."""
    arguments = parse(argv, "Measure the SDK where there is no daemon.")
    data = memoryview(os.urandom(max(arguments.sizes) * MEGABYTE))
    with (
        dgcache.open(Settings.from_environment(fallback_size_mb=_BUDGET_MB)) as absent,
        dgcache.open(Settings(backend="memory", fallback_size_mb=_BUDGET_MB)) as direct,
    ):
        figures = [
            figure
            for size in arguments.sizes
            for figure in _of_size(absent, direct, data, size, arguments.rounds)
        ]
        if absent.backend != "memory":
            raise RuntimeError(f"the backend is {absent.backend}")
    save(arguments.out, [Group("get and put, daemon absent", _HOW, figures)])
    return 0


_HOW = (
    "`put` from memory and `get` of what nobody holds, in one process, by a cache that looked for "
    "a daemon where none is and one that was told `backend='memory'`, in turn; the medians' "
    f"difference is held to {SLOWER_MS:g} ms or {SLOWER_SHARE:.0%}, whichever is more"
)


def excess(name: str, absent: Sequence[float], direct: Sequence[float]) -> list[Figure]:
    """Return both, and by how much the first is slower, held to its target."""
    allowed = max(SLOWER_MS, SLOWER_SHARE * median(direct))
    more = median(absent) - median(direct)
    return [
        of(f"{name}, daemon absent", absent, "ms"),
        of(f"{name}, in-process asked for", direct, "ms"),
        Figure(f"{name}: more where absent", more, "ms", at_most=allowed),
    ]


def _of_size(
    absent: ReferenceCache, direct: ReferenceCache, data: memoryview, size: int, rounds: int
) -> list[Figure]:
    view = data[: size * MEGABYTE]
    puts: dict[str, list[float]] = {"absent": [], "direct": []}
    gets: dict[str, list[float]] = {"absent": [], "direct": []}
    turns = [("absent", absent), ("direct", direct)]
    for number in range(1 + rounds * SAMPLES_A_ROUND[size]):
        for name, cache in turns:
            put, got = _once(cache, view)
            if number:  # the first is on cold memory
                puts[name].append(put)
                gets[name].append(got)
        turns.reverse()
    return [
        *excess(f"{size} MB, put", puts["absent"], puts["direct"]),
        *excess(f"{size} MB, get", gets["absent"], gets["direct"]),
    ]


def _once(cache: ReferenceCache, view: memoryview) -> tuple[float, float]:
    digests: list[str] = []
    put = milliseconds(lambda: digests.append(cache.put("bench", "beside", view)))
    got = milliseconds(lambda: cache.get("bench", "beside", digests[0]).close())
    cache.clear()
    return put, got


if __name__ == "__main__":
    sys.exit(main())
