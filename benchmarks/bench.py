"""Measures everything docs/performance.md and docs/implementations.md say, and writes them.

`make bench` runs it; `python -m benchmarks.bench --quick` takes three rounds instead of seven. The
store, the daemon, its memory and its absence are measured by programs of their own, in the
project's environment and once more in DeltaGlider's, which has an older cryptography. Everything is
in one private directory below `.demo/` in the clone and removed at the end, also after Ctrl-C.
The comparison of implementations is `dg-cache bench`, whose directory is in /tmp, where
DeltaGlider's caches are.

Exit status: 0, also where a target is missed: the figures tell by how much; 1 if something did not
work; 2 usage; 130, 143 after SIGINT, SIGTERM.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console

from benchmarks.bench_deltaglider import Contender, downloads
from benchmarks.bench_figures import Figure, Group, Versions, load, of, resident_megabytes
from benchmarks.bench_report import Chapter, document, summary, table
from benchmarks.daemon import running_daemon
from benchmarks.demo import BUCKET, Bench, Show, Way
from benchmarks.processes import ProcessFailedError, last_words, run
from benchmarks.testbed import ROOT, S3Server, TestbedError, clean_environment
from benchmarks.workshop import add_place_options, socket_directory, workshop
from benchmarks.xdelta3 import NoXdelta3Error, ensure_xdelta3
from dgcache_cli.bench.interruption import Interrupted, Interruption

EXIT_FAILED = 1
ROUNDS = 7
QUICK_ROUNDS = 3
_CHILD_SECONDS = 300.0
_IMPLEMENTATIONS_SECONDS = 900.0
_BUDGET_MB = 2560
_NEEDED_BYTES = 3 << 30
_DOWNLOADED_MB = (100, 10, 1)


@dataclass(frozen=True, slots=True)
class Site:
    """Where measurements run, and how they are shown and ended."""

    place: Path
    rounds: int
    interruption: Interruption
    show: Show
    console: Console

    def environment(self, sockets: Path) -> dict[str, str]:
        """Return the environment of whatever shall use the daemon in `sockets`."""
        return clean_environment(
            {
                "HOME": str(self.place / "home"),
                "TMPDIR": str(self.place / "tmp"),
                "DG_CACHE_SOCKET_DIR": str(sockets),
                "DG_CACHE_MEMORY_SIZE_MB": str(_BUDGET_MB),
            }
        )

    @contextmanager
    def daemon(self, programs: Path) -> Iterator[tuple[int, dict[str, str]]]:
        """Run a fresh dg-cached of one environment; yield its pid and its clients' environment."""
        with ExitStack() as stack:
            apart = stack.enter_context(workshop(self.place / "daemons"))
            sockets, _ = stack.enter_context(socket_directory(apart))
            environment = self.environment(sockets)
            pid = stack.enter_context(
                running_daemon(programs / "dg-cached", environment=environment, log=apart / "log")
            )
            yield pid, environment

    def run(
        self, environment: Mapping[str, str], *command: str, seconds: float = _CHILD_SECONDS
    ) -> str:
        """Run one measuring program and return the last line it printed."""
        log = self.place / "output"
        run(
            command,
            environment=environment,
            directory=ROOT,
            log=log,
            seconds=seconds,
            interruption=self.interruption,
        )
        return last_words(log).rpartition("\n")[2]

    def figures(
        self, environment: Mapping[str, str], programs: Path, module: str, rounds: int
    ) -> tuple[Versions, list[Group]]:
        """Run a measuring module in one environment and return what it found."""
        out = self.place / "figures.json"
        python = str(programs / "python")
        self.run(
            environment, python, "-m", f"benchmarks.{module}", str(out), "--rounds", str(rounds)
        )
        return load(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; return the exit status."""
    arguments = _parse(argv)
    console = Console(highlight=False)
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    try:
        _require_memory()
        ensure_xdelta3()
        with Interruption() as interruption:
            chapters = _measure(arguments, rounds, console, interruption)
    except Interrupted as signal:
        console.print(f"{signal}: what ran was ended, what was made is removed")
        return signal.exit_status
    except (ProcessFailedError, TestbedError, NoXdelta3Error) as error:
        console.print(str(error), style="red", markup=False)
        return EXIT_FAILED
    command = "make bench QUICK=1" if arguments.quick else "make bench"
    arguments.output.write_text(document(chapters, rounds, command))
    console.print(table(chapters))
    console.print(f"{summary(chapters)} Every figure: {arguments.output.name}")
    console.print(f"Other implementations: {_implementations_document(arguments).name}")
    return 0


def _measure(
    arguments: argparse.Namespace, rounds: int, console: Console, interruption: Interruption
) -> list[Chapter]:
    here, theirs = Path(sys.executable).parent, arguments.environment / "bin"
    for program in (here / "dg-cached", theirs / "dg-cached", theirs / "deltaglider"):
        if not program.exists():
            raise TestbedError(f"{program} is missing: run make environments")
    sizes = _DOWNLOADED_MB[:1] if arguments.quick else _DOWNLOADED_MB
    show = Show(console, 2 * 5 + len(sizes) * (rounds + 3) + 1)
    with ExitStack() as stack:
        place = stack.enter_context(workshop(arguments.work))
        for name in ("home", "tmp"):
            (place / name).mkdir(mode=0o700)
        site = Site(place, rounds, interruption, show, console)
        stack.enter_context(show.shown())
        chapters = [_environment_chapter(site, programs) for programs in (here, theirs)]
        chapters.append(_deltaglider_chapter(site, here, theirs, sizes, chapters))
        _compare_implementations(site, here, theirs, _implementations_document(arguments))
        return chapters


def _implementations_document(arguments: argparse.Namespace) -> Path:
    output: Path = arguments.output
    return output.with_name("implementations.md")


def _compare_implementations(site: Site, here: Path, theirs: Path, document: Path) -> None:
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


def _environment_chapter(site: Site, programs: Path) -> Chapter:
    """Measure all that depends on one environment's cryptography."""
    groups: list[Group] = []
    nowhere = site.environment(site.place / "nowhere")
    with site.show.step("the store, in one process"):
        versions, in_store = site.figures(nowhere, programs, "bench_store", site.rounds)
    with site.show.step("the daemon, through the SDK"), site.daemon(programs) as (_, reached):
        groups += site.figures(reached, programs, "bench_daemon", site.rounds)[1]
    with site.show.step("idle daemons"):
        groups.append(_idle(site, programs))
    with site.show.step("memory with references"), site.daemon(programs) as (_, reached):
        groups += site.figures(reached, programs, "bench_memory", max(1, site.rounds // 2))[1]
    with site.show.step("daemon absent"):
        groups.append(_absent(site, programs, nowhere))
    return Chapter(f"cryptography {versions.cryptography}", versions, [*groups, *in_store])


def _idle(site: Site, programs: Path) -> Group:
    taken = []
    for _ in range(site.rounds):
        with site.daemon(programs) as (pid, _):
            taken.append(resident_megabytes(pid))
    return Group(
        "idle daemon",
        "resident pages, shared libraries included, and page tables (/proc/PID/status) of fresh "
        "daemons that have said that they are ready",
        [of("memory", taken, "MB", at_most=70)],
    )


def _absent(site: Site, programs: Path, nowhere: Mapping[str, str]) -> Group:
    """Time fresh processes in turn: the daemon absent, and the in-process cache asked for."""
    cases = ("miss", "miss-memory", "hit", "hit-memory")
    took: dict[str, list[float]] = {case: [] for case in cases}
    processes = 3 * site.rounds
    for _ in range(processes):
        for case in cases:
            python = str(programs / "python")
            words = site.run(nowhere, python, "-m", "benchmarks.bench_absent", case)
            took[case].append(float(words))
    figures = []
    for case in ("miss", "hit"):
        absent, direct = took[case], took[f"{case}-memory"]
        more = median(absent) - median(direct)
        figures += [
            of(f"first get, a {case}, daemon absent", absent, "ms"),
            of(f"first get, a {case}, in-process asked for", direct, "ms"),
            Figure(f"first get, a {case}: more where absent", more, "ms", at_most=5),
        ]
    return Group(
        "daemon absent",
        "`import dgcache`, `dgcache.open()` and the first `get`, each in a fresh process whose "
        "DG_CACHE_SOCKET_DIR leads nowhere, against `dgcache.open(Settings(backend='memory'))`; "
        f"{processes} processes each, in turn. A hit follows a `put` of 1 MB, which is "
        "not counted",
        figures,
    )


def _deltaglider_chapter(
    site: Site, here: Path, theirs: Path, sizes: Sequence[int], measured: Sequence[Chapter]
) -> Chapter:
    with ExitStack() as stack:
        server = stack.enter_context(S3Server(spool_directory=site.place / "tmp"))
        server.create_bucket(BUCKET)
        daemons = [stack.enter_context(site.daemon(programs))[1] for programs in (here, theirs)]
        benches = [
            Bench(
                site.place,
                server,
                server.environment(environment),
                _CHILD_SECONDS,
                site.interruption,
                site.console,
            )
            for environment in daemons
        ]
        names = [f"daemon on {chapter.title}" for chapter in measured]
        groups = []
        for size in sizes:
            prefix = f"app-{size}"
            stock = Way("stock", prefix, (str(theirs / "deltaglider"),))
            through = Way("dg-cached", prefix, (str(theirs / "dg-cache"), "deltaglider"))
            groups.append(
                downloads(
                    Contender("stock", benches[0], stock),
                    [
                        Contender(name, bench, through)
                        for name, bench in zip(names, benches, strict=True)
                    ],
                    size,
                    site.rounds,
                    step=site.show.step,
                )
            )
    return Chapter("DeltaGlider 6.2.0", None, groups)


def _require_memory() -> None:
    available = psutil.virtual_memory().available
    if available < _NEEDED_BYTES:
        raise TestbedError(
            f"{_NEEDED_BYTES / 1e9:.1f} GB of free memory are needed for references of 500 MB, "
            f"there are {available / 1e9:.1f}"
        )


def _parse(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench",
        description="Measure dg-cached, print the figures and write docs/performance.md.",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}"
    )
    add_place_options(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "docs" / "performance.md",
        metavar="FILE",
        help="what is written, and implementations.md beside it (default: docs/performance.md)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
