"""Measures the main job: whole processes of `deltaglider cp`, warm, without and with dg-cached.

One version of an archive is downloaded again and again, in turn: by DeltaGlider as it is, through
a daemon on the newest cryptography, through one on the cryptography that DeltaGlider allows, and by
DeltaGlider with a cache that always has its reference as a file on tmpfs, unchecked: the best there
could be. The client is DeltaGlider's own environment each time.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import dgcache
from benchmarks.archives import write_version
from benchmarks.bench_figures import MEGABYTE, Figure, Group, of, ratios
from benchmarks.demo import BUCKET, Bench, Way
from benchmarks.processes import Measured
from benchmarks.testbed import REFERENCE_SUFFIX, TestbedError

SLOWER_BY = 2.8
OVER_TMPFS = 1.05
MEMORY_SHARE = 0.25
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to download, and what its processes took."""

    name: str
    bench: Bench
    way: Way
    seconds: list[float] = field(default_factory=list)
    peak_megabytes: list[float] = field(default_factory=list)
    reference_gets: list[float] = field(default_factory=list)


def downloads(
    stock: Contender,
    cached: Sequence[Contender],
    tmpfs: Contender,
    megabytes: int,
    rounds: int,
    *,
    step: Callable[[str], AbstractContextManager[None]],
) -> Group:
    """Upload two versions, then measure downloads of the second one."""
    everyone = (stock, *cached, tmpfs)
    with step(f"uploads of {megabytes} MB"):
        url, sha256 = _upload(cached[0], megabytes)
        key = f"{tmpfs.way.prefix}{REFERENCE_SUFFIX}"
        tmpfs.bench.server.save(BUCKET, key, Path(tmpfs.way.command[-1]))
    with step(f"first downloads of {megabytes} MB"):
        for contender in everyone:
            _download(contender, url, sha256)  # now every daemon has the reference
    for number in range(1, rounds + 1):
        with step(f"downloads of {megabytes} MB, {number} of {rounds}"):
            for contender in everyone:
                measured, gets = _download(contender, url, sha256)
                contender.seconds.append(measured.seconds)
                contender.peak_megabytes.append(measured.peak_bytes / MEGABYTE)
                contender.reference_gets.append(gets)
    figures = [*_times(stock, cached, tmpfs, megabytes), *_memory(stock, cached, megabytes)]
    with step("memory files held"):
        figures += [_held(contender, url, sha256) for contender in cached]
    return Group(
        f"deltaglider cp, a download of {megabytes} MB",
        "wall time of whole processes, start to end, warm, from an S3 server on loopback without a "
        "limit on its speed; the bytes that arrived were compared each time. Memory is the largest "
        "resident set of the process and of the xdelta3 it starts (wait4(2), ru_maxrss); sealed "
        "memory files are not in it and are told apart, and the daemon's own memory stands above. "
        "GETs of reference.bin were counted at the server",
        figures,
    )


def _times(
    stock: Contender, cached: Sequence[Contender], tmpfs: Contender, megabytes: int
) -> list[Figure]:
    large = megabytes == 100
    faster = {"at_least": SLOWER_BY} if large else {}
    over = {"at_most": OVER_TMPFS} if large else {}
    figures = [of(f"{one.name}, time", one.seconds, "s") for one in (stock, *cached, tmpfs)]
    for one in cached:
        times = ratios(stock.seconds, one.seconds)
        figures.append(of(f"{one.name}, times faster", times, "x", **faster))
        against = ratios(one.seconds, tmpfs.seconds)
        figures.append(of(f"{one.name}, against the reference on tmpfs", against, "x", **over))
    return figures


def _memory(stock: Contender, cached: Sequence[Contender], megabytes: int) -> list[Figure]:
    target = {"at_most": MEMORY_SHARE} if megabytes == 100 else {}
    figures = [of("stock, peak memory", stock.peak_megabytes, "MB")]
    for one in cached:
        figures.append(of(f"{one.name}, peak memory", one.peak_megabytes, "MB"))
    for one in cached:
        share = ratios(one.peak_megabytes, stock.peak_megabytes)
        figures.append(of(f"{one.name}, share of stock's memory", share, "x", **target))
    figures.append(of("stock, GETs of the reference", stock.reference_gets, ""))
    for one in cached:
        name = f"{one.name}, GETs of the reference"
        figures.append(Figure(name, max(one.reference_gets), "", at_most=0))
    return figures


def _upload(contender: Contender, megabytes: int) -> tuple[str, str]:
    """Store two versions; return where the second one is, and its digest."""
    bench = contender.bench
    url = digest = ""
    for version in (1, 2):
        path = bench.place / f"app-1.{version}.zip"
        check = bench.interruption.check
        write_version(path, megabytes=megabytes, version=version, after_member=check)
        url, digest = contender.way.url(path.name), bench.sha256(path)
        bench.copy(contender.way, str(path), url)
        path.unlink()
    return url, digest


def _download(contender: Contender, url: str, sha256: str) -> tuple[Measured, int]:
    bench = contender.bench
    arrived = bench.place / "download.zip"
    measured, gets = bench.copy(contender.way, url, str(arrived))
    if bench.sha256(arrived) != sha256:
        raise TestbedError(f"{contender.name}: other bytes arrived than were stored")
    arrived.unlink()
    return measured, gets


def _held(contender: Contender, url: str, sha256: str) -> Figure:
    """Ask the daemon again and again, during one more download, how much is held."""
    directory = Path(contender.bench.environment["DG_CACHE_SOCKET_DIR"])
    with _watched(directory) as held:
        _download(contender, url, sha256)
    return Figure(f"{contender.name}, memory files held", max(held) / MEGABYTE, "MB")


@contextmanager
def _watched(socket_dir: Path) -> Iterator[list[int]]:
    held = [0]
    ended = threading.Event()
    settings = dgcache.Settings(socket_dir=socket_dir, connect_timeout_ms=5000)

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            held.append(cache.status()["store"]["handout_bytes"])

    with dgcache.open(settings) as cache:
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield held
        finally:
            ended.set()
            watcher.join()
