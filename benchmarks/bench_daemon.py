"""Measures the daemon through the SDK: lookups that are held and not, stores.

`python -m benchmarks.bench_daemon OUT --rounds N` uses the daemon that DG_CACHE_SOCKET_DIR leads to
and writes its figures to OUT. A lookup is `ReferenceCache.get` as a user calls it: the call, the
descriptor, the checks of its seals and size.
"""

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dgcache
from benchmarks.bench_figures import (
    MEGABYTE,
    Figure,
    Group,
    milliseconds,
    of,
    percentile,
    ratios,
    save,
)
from benchmarks.bench_store import (
    FLOOR,
    SAMPLES_A_ROUND,
    against_floor,
    parse,
    write_memory_file,
)
from dgcache import Reference, ReferenceCache

HELD_P50_MS = 1.0
FLAT = 1.25
LARGE_AGAINST_FLOOR = 1.25
SMALL_AGAINST_FLOOR = 2.2
PUT_FROM_FILE = 1.2
PUT_FROM_MEMORY = 1.35
PUTS_A_ROUND = {1: 8, 10: 3, 100: 1, 500: 1}

_HELD_LOOKUPS_A_ROUND = 100
_DROP_SECONDS = 10.0
_CONNECT_TIMEOUT_MS = 5000
_CALLS_A_ROUND = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the figures."""
    arguments = parse(argv, "Measure the daemon that DG_CACHE_SOCKET_DIR leads to.")
    sizes, rounds = arguments.sizes, arguments.rounds
    data = memoryview(os.urandom(max(sizes) * MEGABYTE))
    with connected() as cache:
        groups = [
            held(cache, data, sizes, rounds),
            unheld(cache, data, sizes, rounds),
            puts(cache, data, sizes, rounds),
        ]
    save(arguments.out, groups)
    return 0


def held(cache: ReferenceCache, data: memoryview, sizes: Sequence[int], rounds: int) -> Group:
    """Measure lookups of references that this process holds."""
    took: dict[int, list[list[float]]] = {size: [] for size in sizes}
    calls = []
    holding = {size: get(cache, put(cache, data, size)) for size in sizes}
    for _ in range(rounds):
        calls += [milliseconds(lambda: _contains(cache)) for _ in range(_CALLS_A_ROUND)]
        for size, reference in holding.items():
            before = store_status(cache)
            took[size].append(
                [_get_and_close(cache, reference.sha256) for _ in range(_HELD_LOOKUPS_A_ROUND)]
            )
            _require_hits(before, store_status(cache), shared=_HELD_LOOKUPS_A_ROUND)
    for reference in holding.values():
        reference.close()
    cache.clear()
    medians = {size: [percentile(samples, 0.5) for samples in took[size]] for size in sizes}
    figures = []
    for size in sizes:
        figures.append(of(f"{size} MB, p50", medians[size], "ms", at_most=HELD_P50_MS))
        everything = [sample for samples in took[size] for sample in samples]
        figures.append(Figure(f"{size} MB, p99", percentile(everything, 0.99), "ms"))
    largest, smallest = max(sizes), min(sizes)
    grown = ratios(medians[largest], medians[smallest])
    flat = f"{largest} MB against {smallest} MB, p50"
    figures.append(of(flat, grown, "x", at_most=FLAT))
    figures.append(of("for comparison: a call without a descriptor, p50", calls, "ms"))
    return Group(
        "lookup of what is held",
        f"`get` and `close` over the SDK while this process holds the reference, "
        f"{_HELD_LOOKUPS_A_ROUND} of each size in turn a round; the daemon counted each as shared",
        figures,
    )


def unheld(cache: ReferenceCache, data: memoryview, sizes: Sequence[int], rounds: int) -> Group:
    """Measure lookups of references that nobody holds, against the floor."""
    figures = []
    for size in sizes:
        sha256 = put(cache, data, size)
        looked_up, floor = [], []
        for _ in range(rounds * SAMPLES_A_ROUND[size]):
            floor.append(write_memory_file(data[: size * MEGABYTE]))
            looked_up.append(unheld_lookup(cache, sha256))
        target = LARGE_AGAINST_FLOOR if size >= 100 else SMALL_AGAINST_FLOOR
        figures += against_floor(f"{size} MB", looked_up, floor, at_most=target)
        cache.clear()
    return Group(
        "lookup of what nobody holds",
        f"`get` over the SDK, against {FLOOR}. Between two lookups the daemon was asked until it "
        "held no plaintext any more, and it counted each lookup as one that decrypted",
        figures,
    )


def puts(cache: ReferenceCache, data: memoryview, sizes: Sequence[int], rounds: int) -> Group:
    """Measure `put` from a file and from memory against hashing alone."""
    figures = []
    for size in sizes:
        view = data[: size * MEGABYTE]
        hashed, from_file, from_memory = [], [], []
        with tempfile.NamedTemporaryFile(prefix="bench-") as file:
            file.write(view)
            file.flush()
            for _ in range(rounds * PUTS_A_ROUND[size]):
                hashed.append(milliseconds(lambda view=view: hashlib.sha256(view)))  # type: ignore[misc]
                from_file.append(_put_anew(cache, Path(file.name)))
                from_memory.append(_put_anew(cache, view))
        cache.clear()
        figures += [
            of(f"{size} MB, SHA-256 alone", hashed, "ms"),
            of(f"{size} MB, from a file", from_file, "ms"),
            of(f"{size} MB, from memory", from_memory, "ms"),
            *_against_hashing(f"{size} MB, from a file", from_file, hashed, PUT_FROM_FILE),
            *_against_hashing(f"{size} MB, from memory", from_memory, hashed, PUT_FROM_MEMORY),
        ]
    return Group(
        "put",
        "`put` over the SDK of a file in the page cache and of bytes, evicted before, against "
        "`hashlib.sha256` over the same bytes in the same round",
        figures,
    )


def _against_hashing(
    name: str, took: Sequence[float], hashed: Sequence[float], at_most: float
) -> list[Figure]:
    return [of(f"{name}, against SHA-256 alone", ratios(took, hashed), "x", at_most=at_most)]


@contextmanager
def connected() -> Iterator[ReferenceCache]:
    """Lend a cache that is the daemon's for certain."""
    settings = dgcache.Settings.from_environment(connect_timeout_ms=_CONNECT_TIMEOUT_MS)
    with dgcache.open(settings) as cache:
        if cache.backend != "dg-cached":
            raise RuntimeError("there is no dg-cached where DG_CACHE_SOCKET_DIR leads to")
        yield cache


def put(cache: ReferenceCache, data: memoryview, size: int) -> str:
    """Store the first `size` MB and return their digest."""
    return cache.put("bench", f"{size}", data[: size * MEGABYTE])


def get(cache: ReferenceCache, sha256: str) -> Reference:
    """Look a reference up in the daemon, not in the fallback."""
    reference = cache.get("bench", "lookup", sha256)
    if reference.source != "dg-cached":
        reference.close()
        raise RuntimeError("the daemon was lost")
    return reference


def store_status(cache: ReferenceCache) -> dict[str, Any]:
    """Return the daemon's own figures; asking makes it look who holds what."""
    status: dict[str, Any] = cache.status()["store"]
    return status


def _contains(cache: ReferenceCache) -> None:
    cache.has("bench", "lookup", "0" * 64)


def _get_and_close(cache: ReferenceCache, sha256: str) -> float:
    return milliseconds(lambda: get(cache, sha256).close())


def unheld_lookup(cache: ReferenceCache, sha256: str) -> float:
    """Return the milliseconds of a lookup that decrypts, and see to it that the next one will."""
    before = store_status(cache)
    held_now: list[Reference] = []
    took = milliseconds(lambda: held_now.append(get(cache, sha256)))
    held_now.pop().close()
    _require_hits(before, require_unheld(cache), decrypted=1)
    return took


def require_unheld(cache: ReferenceCache) -> dict[str, Any]:
    """Ask until the daemon holds no plaintext any more; return its figures."""
    deadline = time.monotonic() + _DROP_SECONDS
    while (status := store_status(cache))["handout_bytes"]:
        if time.monotonic() > deadline:
            raise RuntimeError("the daemon goes on holding what nobody holds")
    return status


def _require_hits(
    before: dict[str, Any], after: dict[str, Any], *, shared: int = 0, decrypted: int = 0
) -> None:
    hits, shared_hits = (after[name] - before[name] for name in ("hits", "shared_hits"))
    if (hits - shared_hits, shared_hits) != (decrypted, shared):
        raise RuntimeError(
            f"the daemon counted {hits - shared_hits} lookups that decrypted and {shared_hits} "
            f"that shared, not {decrypted} and {shared}"
        )


def _put_anew(cache: ReferenceCache, source: Path | memoryview) -> float:
    cache.evict("bench", "put")
    return milliseconds(lambda: cache.put("bench", "put", source))


if __name__ == "__main__":
    sys.exit(main())
