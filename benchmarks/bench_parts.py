"""The parts of `make bench`, in the order in which they are measured."""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.bench_beside import excess
from benchmarks.bench_deltaglider import Contender, downloads
from benchmarks.bench_figures import (
    MEGABYTE,
    Chart,
    Figure,
    Group,
    Line,
    Panel,
    of,
    pays_from,
    resident_megabytes,
)
from benchmarks.bench_idle import SETTLE_SECONDS, wakeup_figures, wakeups
from benchmarks.bench_processes import cold, one_shot
from benchmarks.bench_report import Chapter
from benchmarks.bench_site import CHILD_SECONDS, Site
from benchmarks.demo import BUCKET, Bench, Way
from benchmarks.testbed import S3Server

_IMPLEMENTATIONS_SECONDS = 900.0
_IDLE_MB = 60
_WAKEUPS_A_SECOND = 1.0
_OLDER_ROUNDS = 2
_COLD_ROUNDS = 2
_TMPFS = "/dev/shm"  # noqa: S108 - POSIX shared memory is where tmpfs is on every Linux


def environment_chapter(site: Site, programs: Path, theirs: Path) -> Chapter:
    """Measure everything in the project's environment."""
    groups: list[Group] = []
    nowhere = site.environment(site.place / "nowhere")
    with site.show.step("the daemon, through the SDK"), site.daemon(programs) as (_, reached):
        groups += _over("direct", site, reached, programs, "bench_daemon")
        largest = () if site.plan.complete else ("--largest", "10")
        groups += _over("grpc", site, reached, programs, "bench_daemon", *largest)
    with site.show.step("its peers"), site.daemon(programs) as (_, reached):
        stock = ("--stock", str(theirs / "python"))
        direct = {**reached, "DG_CACHE_TRANSPORT": "direct"}
        versions, beside = site.figures(direct, programs, "bench_peers", *stock, *largest)
        groups += beside
    with site.show.step("many clients"), site.daemon(programs) as (_, reached):
        if site.plan.complete:
            groups += _over("grpc", site, reached, programs, "bench_clients", "--busy-only")
        groups += _over("direct", site, reached, programs, "bench_clients")
    with site.show.step("whole processes"), site.daemon(programs) as (_, reached):
        groups += _processes(site, programs, reached)
    with site.show.step("idle daemons"):
        groups.append(_idle(site, programs))
    with site.show.step("memory with references"), site.daemon(programs) as (_, reached):
        few = max(1, site.rounds // 3)
        groups += site.figures(reached, programs, "bench_memory", rounds=few)[1]
    with site.show.step("daemon absent"):
        groups.append(_first_use(site, programs, nowhere))
        groups += site.figures(nowhere, programs, "bench_beside", rounds=max(1, site.rounds // 2))[
            1
        ]
    with site.show.step("a budget of one lookup"):
        groups += _over("direct", site, nowhere, programs, "bench_budget")
        if site.plan.complete:
            groups += _over("grpc", site, nowhere, programs, "bench_budget")
    if site.plan.complete:
        with site.show.step("the store, in one process"):
            few = max(1, site.rounds // 2)
            groups += site.figures(nowhere, programs, "bench_store", rounds=few)[1]
    return Chapter(f"cryptography {versions.cryptography}", versions, groups)


def _over(
    transport: str,
    site: Site,
    reached: Mapping[str, str],
    programs: Path,
    module: str,
    *options: str,
) -> Iterator[Group]:
    """Measure with DG_CACHE_TRANSPORT set, and name it in the titles."""
    environment = {**reached, "DG_CACHE_TRANSPORT": transport}
    for group in site.figures(environment, programs, module, *options)[1]:
        yield replace(group, title=f"{group.title} ({transport})")


def older_chapter(site: Site, programs: Path) -> Chapter:
    """Measure what depends on cryptography in DeltaGlider's environment, with fewer rounds."""
    nowhere = site.environment(site.place / "nowhere")
    with site.show.step("an older cryptography"), site.daemon(programs) as (_, reached):
        versions, groups = site.figures(reached, programs, "bench_daemon", rounds=_OLDER_ROUNDS)
    with site.show.step("its store, in one process"):
        _, stored = site.figures(nowhere, programs, "bench_store", rounds=1)
    return Chapter(f"cryptography {versions.cryptography}", versions, [*groups, *stored])


def deltaglider_chapter(site: Site, here: Path, theirs: Path) -> Chapter:
    """Measure downloads by DeltaGlider's command line."""
    with ExitStack() as stack:
        server = stack.enter_context(S3Server(spool_directory=site.place / "tmp"))
        server.create_bucket(BUCKET)
        tmpfs = Path(stack.enter_context(_on_tmpfs())) / "reference.bin"
        daemons = {"dg-cached": here}
        if site.plan.complete:
            daemons["dg-cached on DeltaGlider's cryptography"] = theirs
        benches = {
            name: _bench(site, server, stack.enter_context(site.daemon(programs))[1])
            for name, programs in daemons.items()
        }
        first = benches["dg-cached"]
        groups = []
        times: dict[str, list[tuple[float, float]]] = {}
        for size in site.plan.downloads_mb:
            prefix = f"app-{size}"
            best = Way("reference on tmpfs", prefix, _tmpfs_command(theirs, tmpfs))
            through = Way("dg-cached", prefix, (str(theirs / "dg-cache"), "deltaglider"))
            stock = Way("stock", prefix, (str(theirs / "deltaglider"),))
            contenders = [
                Contender("stock", first, stock),
                *(Contender(name, bench, through) for name, bench in benches.items()),
                Contender(best.name, first, best),
            ]
            groups.append(
                downloads(
                    contenders[0],
                    contenders[1:-1],
                    contenders[-1],
                    size,
                    site.plan.download_rounds,
                    step=site.show.step,
                )
            )
            for one in contenders:
                times.setdefault(one.name, []).append((float(size), median(one.seconds)))
    if len(site.plan.downloads_mb) > 1:
        groups.append(_break_even({name: sorted(line) for name, line in times.items()}))
    return Chapter("DeltaGlider 6.2.0", None, groups)


def _break_even(times: Mapping[str, Line]) -> Group:
    chart = Chart(
        "downloads",
        "deltaglider cp, one warm download, whole processes: less is better",
        "size of the archive in MB",
        "s",
        [Panel("", dict(times))],
    )
    return Group(
        "from which size the daemon pays",
        "the size from which a whole `dg-cache deltaglider cp` takes no longer than stock's, "
        "between the sizes above, from an S3 server on loopback without a limit on its speed: any "
        "real network moves it down",
        [pays_from("dg-cached against stock", times["dg-cached"], times["stock"])],
        [chart],
    )


def compare_implementations(site: Site, here: Path, theirs: Path, document: Path) -> None:
    """Have `dg-cache bench` write its document and chart."""
    environment = site.environment(site.place / "nowhere")
    del environment["TMPDIR"]
    with site.show.step("other implementations"):
        site.run(
            environment,
            *(str(here / "dg-cache"), "bench", "--runs", str(site.rounds)),
            *("--deltaglider", str(theirs / "python")),
            *("--report", str(document), "--chart", str(document.with_suffix(".svg"))),
            seconds=_IMPLEMENTATIONS_SECONDS,
        )


def _processes(site: Site, programs: Path, reached: Mapping[str, str]) -> Iterator[Group]:
    yield one_shot(site, programs, reached)
    rounds = min(site.rounds, _COLD_ROUNDS)
    with S3Server(spool_directory=site.place / "tmp") as server:
        yield cold(site, programs, reached, server, rounds)


def _idle(site: Site, programs: Path) -> Group:
    taken: list[float] = []
    for _ in range(max(1, site.rounds // 2)):
        with site.daemon(programs) as (pid, _):
            taken.append(resident_megabytes(pid))
    seconds = site.plan.idle_seconds
    with site.daemon(programs) as (pid, reached):
        empty = wakeups(pid, seconds) if site.plan.complete else None
        one = site.place / "idle.bin"
        one.write_bytes(os.urandom(MEGABYTE))
        site.run(reached, str(programs / "dg-cache"), "put", "s3://bench/idle", str(one))
        full = wakeups(pid, seconds)
    return Group(
        "idle daemon",
        "resident pages, shared libraries included, and page tables (/proc/PID/status) of fresh "
        "daemons that have said that they are ready; and voluntary context switches of all their "
        f"threads (/proc/PID/task/TID/status) in {seconds:g} s, {SETTLE_SECONDS:g} s after the "
        "last call: a thread that sleeps, wakes and sleeps again adds one",
        [
            of("memory", taken, "MB", at_most=_IDLE_MB),
            *(_woken("empty", empty, seconds) if empty is not None else ()),
            *_woken("with 1 MB that nobody holds", full, seconds),
        ],
    )


def _woken(what: str, woken: "Counter[str]", seconds: float) -> list[Figure]:
    return wakeup_figures(what, woken, seconds, _WAKEUPS_A_SECOND)


def _first_use(site: Site, programs: Path, nowhere: Mapping[str, str]) -> Group:
    """Time fresh processes in turn: the daemon absent, and the in-process cache asked for."""
    cases = ("miss", "miss-memory", "hit", "hit-memory")
    took: dict[str, list[float]] = {case: [] for case in cases}
    processes = 4 * site.rounds
    for _ in range(processes):
        for case in cases:
            python = str(programs / "python")
            words = site.run(nowhere, python, "-m", "benchmarks.bench_absent", case)
            took[case].append(float(words))
    figures = [
        figure
        for case in ("miss", "hit")
        for figure in excess(f"first get, a {case}", took[case], took[f"{case}-memory"])
    ]
    return Group(
        "first use, daemon absent",
        "`import dgcache`, `dgcache.open()` and the first `get`, each in a fresh process whose "
        "DG_CACHE_SOCKET_DIR leads nowhere, against `dgcache.open(Settings(backend='memory'))`; "
        f"{processes} processes each, in turn. A hit follows a `put` of 1 MB, which is "
        "not counted",
        figures,
    )


def _bench(site: Site, server: S3Server, environment: Mapping[str, str]) -> Bench:
    return Bench(
        site.place,
        server,
        server.environment(environment),
        CHILD_SECONDS,
        site.interruption,
        site.console,
    )


def _tmpfs_command(theirs: Path, reference: Path) -> tuple[str, ...]:
    program = Path(__file__).with_name("tmpfs_deltaglider.py")
    return (str(theirs / "python"), "-P", str(program), str(reference))


@contextmanager
def _on_tmpfs() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="dg-cached-bench-", dir=_TMPFS) as name:
        yield name
