"""Measures many clients at once: 8 that are busy, 64 that come together, and how it scales.

`python -m benchmarks.bench_clients OUT --place DIR` uses the daemon that DG_CACHE_SOCKET_DIR leads
to. Every client is a process of its own.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench_daemon import connected, put, require_unheld, store_status
from benchmarks.bench_figures import MEGABYTE, Chart, Figure, Group, Panel, percentile, save
from benchmarks.bench_store import parse
from benchmarks.clients import Answer, Clients, running_clients
from dgcache import ReferenceCache
from dgcache_cli.bench.content_addressed import ContentAddressed

COUNTS = (1, 2, 4, 8, 16, 32, 64)
_QUICK_COUNTS = (1, 8, 32)
_SIZES_MB = (1, 10, 100)
_QUICK_SIZES_MB = (1, 10)
_BUSY = 8
_SECONDS_A_ROUND = 0.4
_QUICK_SECONDS = 0.2
_BUSY_P99_MS = 3.0
_MOST_MB_AT_ONCE = 1600
_BUSY_P50_MS = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the figures."""
    arguments = parse(argv, "Measure many clients of the daemon.")
    rounds = arguments.rounds
    complete = rounds > 1
    counts, sizes = (COUNTS, _SIZES_MB) if complete else (_QUICK_COUNTS, _QUICK_SIZES_MB)
    seconds = _SECONDS_A_ROUND if complete else _QUICK_SECONDS
    data = memoryview(os.urandom(max(_SIZES_MB) * MEGABYTE))
    directory = arguments.place / "directory"
    directory.mkdir(mode=0o700)
    if arguments.busy_only:
        with connected() as cache, running_clients(_BUSY, directory) as clients:
            save(arguments.out, [busy(cache, clients, data, rounds)])
        return 0
    with connected() as cache, running_clients(max(counts), directory) as clients:
        groups = [
            busy(cache, clients, data, rounds),
            together(cache, clients, data, max(counts), rounds),
            scaling(cache, clients, data, counts, sizes, seconds, arguments.place),
        ]
    save(arguments.out, groups)
    return 0


def busy(cache: ReferenceCache, clients: Clients, data: memoryview, rounds: int) -> Group:
    """Measure gets of what is held by 8 clients that do nothing else."""
    sha256 = put(cache, data, 10)
    clients.do("hold", sha256, clients=1)
    took: list[float] = []
    alone: list[float] = []
    failures: list[str] = []
    for _ in range(rounds + 1):
        alone += clients.do("gets", sha256, clients=1, seconds=_SECONDS_A_ROUND).milliseconds
        answer = clients.do("gets", sha256, clients=_BUSY, seconds=2 * _SECONDS_A_ROUND)
        took += answer.milliseconds
        failures += answer.failures
    clients.do("release", sha256, clients=1)
    return Group(
        f"get of what is held, {_BUSY} busy clients",
        f"`get` and `close` of 10 MB that somebody holds, by {_BUSY} processes at once on "
        f"{os.cpu_count()} logical processors, without a pause",
        [
            Figure("one client, p50", percentile(alone, 0.5), "ms", at_most=_BUSY_P50_MS),
            Figure("one client, p99", percentile(alone, 0.99), "ms"),
            Figure(f"{_BUSY} clients, p50", percentile(took, 0.5), "ms"),
            Figure(f"{_BUSY} clients, p99", percentile(took, 0.99), "ms", at_most=_BUSY_P99_MS),
            Figure(f"{_BUSY} clients, failures", len(failures), "", at_most=0),
        ],
    )


def together(
    cache: ReferenceCache, clients: Clients, data: memoryview, count: int, rounds: int
) -> Group:
    """Measure what happens when all clients want what nobody holds at the same moment."""
    sha256 = put(cache, data, 100)
    decrypted, failed, seconds = [], [], []
    for _ in range(rounds):
        require_unheld(cache)
        before = store_status(cache)
        answer = clients.do("hold", sha256, clients=count)
        after = store_status(cache)
        clients.do("release", sha256, clients=count)
        hits, shared = (after[name] - before[name] for name in ("hits", "shared_hits"))
        decrypted.append(hits - shared)
        failed.append(len(answer.failures))
        seconds.append(max(answer.milliseconds))
    cache.clear()
    return Group(
        f"{count} clients at once",
        f"{count} processes `get` 100 MB that nobody holds at the same moment, and hold it",
        [
            Figure("decryptions", max(decrypted), "", at_most=1),
            Figure("failures", max(failed), "", at_most=0),
            Figure("the last has it after", sorted(seconds)[len(seconds) // 2], "ms"),
        ],
    )


def scaling(
    cache: ReferenceCache,
    clients: Clients,
    data: memoryview,
    counts: Sequence[int],
    sizes: Sequence[int],
    seconds: float,
    place: Path,
) -> Group:
    """Measure throughput and p99 by the number of clients, beside the plain directory."""
    source = place / "scaling.bin"
    files = ContentAddressed(place / "directory")
    figures: list[Figure] = []
    throughput, slowest = [], []
    for size in sizes:
        source.write_bytes(data[: size * MEGABYTE])
        files.write_ref("bench", "app", source)
        sha256 = put(cache, data, size)
        curves: dict[str, list[tuple[float, float]]] = {}
        p99: dict[str, list[tuple[float, float]]] = {}
        for count in counts:
            for name, what in (("dg-cached", "reads"), ("directory, SHA-256 at use", "directory")):
                if what == "directory" and count * size > _MOST_MB_AT_ONCE:
                    continue  # each of them reads the whole file into memory to hash it
                answer = clients.do(what, sha256, clients=count, seconds=seconds)
                _require_none(answer)
                rate = len(answer.milliseconds) * size / 1000 / answer.seconds
                worst = percentile(answer.milliseconds, 0.99)
                curves.setdefault(name, []).append((count, rate))
                p99.setdefault(name, []).append((count, worst))
                figures.append(Figure(f"{size} MB, {count} clients, {name}", rate, "GB/s"))
                figures.append(Figure(f"{size} MB, {count} clients, {name}, p99", worst, "ms"))
        throughput.append(Panel(f"{size} MB", curves))
        slowest.append(Panel(f"{size} MB", p99))
        cache.clear()
        files.clear()
    return Group(
        "scaling",
        "`get`, every byte read through the path, `close`, again and again by so many processes, "
        "beside the same with a plain directory, where each process hashes the file before it "
        "reads it. Throughput is the bytes read by all of them. With one client the plaintext is "
        "still in memory from its last get",
        figures,
        [
            Chart("throughput", "Bytes read by all clients", "clients", "GB/s", throughput),
            Chart("p99", "One get and read, 99th percentile", "clients", "ms", slowest),
        ],
    )


def _require_none(answer: Answer) -> None:
    if answer.failures:
        raise RuntimeError(f"{len(answer.failures)} failures, the first: {answer.failures[0]}")


if __name__ == "__main__":
    sys.exit(main())
