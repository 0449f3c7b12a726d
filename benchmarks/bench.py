"""Measures everything docs/performance.md and docs/implementations.md say, and writes them.

`make bench` runs it, in less than ten minutes; `python -m benchmarks.bench --quick` takes less
than 90 seconds, with fewer rounds, sizes and clients, one cryptography, and without the comparison
of implementations. The store, the daemon, its peers, its memory and its absence are measured by
programs of their own, in the project's environment and in part once more in DeltaGlider's, which
has an older cryptography. Everything is in one private directory below `.demo/` in the clone and
removed at the end, also after Ctrl-C. The comparison of implementations is `dg-cache bench`, whose
directory is in /tmp, where DeltaGlider's caches are.

Exit status: 0, also where a target is missed: the figures tell by how much; 1 if something did not
work; 2 usage; 130, 143 after SIGINT, SIGTERM.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.bench_parts import (
    compare_implementations,
    deltaglider_chapter,
    environment_chapter,
    older_chapter,
)
from benchmarks.bench_report import Chapter, Run, summary, table, write
from benchmarks.bench_site import Plan, Site
from benchmarks.demo import Show
from benchmarks.processes import ProcessFailedError
from benchmarks.testbed import ROOT, TestbedError
from benchmarks.workshop import add_place_options, workshop
from benchmarks.xdelta3 import NoXdelta3Error, ensure_xdelta3
from dgcache_cli.bench.interruption import Interrupted, Interruption

EXIT_FAILED = 1
FULL = Plan(
    rounds=5,
    largest_mb=500,
    downloads_mb=(100, 10, 1),
    download_rounds=5,
    idle_seconds=10,
    complete=True,
)
QUICK = Plan(
    rounds=1,
    largest_mb=100,
    downloads_mb=(100,),
    download_rounds=1,
    idle_seconds=2,
    complete=False,
)
_LEFT_OUT = (
    "This was a quick run: few rounds, no 500 MB, peers up to 10 MB, 32 clients at the most, "
    "neither the store alone nor DeltaGlider's cryptography nor other implementations; "
    "`make bench` measures all."
)
_NEEDED_BYTES = 6 << 30
_STEPS_OF_A_CHAPTER = 9


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; return the exit status."""
    arguments = _parse(argv)
    console = Console(highlight=False)
    plan = QUICK if arguments.quick else FULL
    load = os.getloadavg()[0]
    try:
        _require_memory()
        ensure_xdelta3()
        with Interruption() as interruption:
            chapters = _measure(arguments, plan, console, interruption)
    except Interrupted as signal:
        console.print(f"{signal}: what ran was ended, what was made is removed")
        return signal.exit_status
    except (ProcessFailedError, TestbedError, NoXdelta3Error) as error:
        console.print(str(error), style="red", markup=False)
        return EXIT_FAILED
    command = "make bench QUICK=1" if arguments.quick else "make bench"
    left_out = _LEFT_OUT if arguments.quick else ""
    write(Run(chapters, plan.rounds, command, left_out, _programs(), load), arguments.output)
    console.print(table(chapters))
    console.print(f"{summary(chapters)} Every figure: {arguments.output.name}")
    if plan.complete:
        console.print(f"Other implementations: {_implementations_document(arguments).name}")
    return 0


def _measure(
    arguments: argparse.Namespace, plan: Plan, console: Console, interruption: Interruption
) -> list[Chapter]:
    here, theirs = Path(sys.executable).parent, arguments.environment / "bin"
    for program in (here / "dg-cached", theirs / "dg-cached", theirs / "deltaglider"):
        if not program.exists():
            raise TestbedError(f"{program} is missing: run make environments")
    steps = _STEPS_OF_A_CHAPTER + len(plan.downloads_mb) * (plan.download_rounds + 3)
    show = Show(console, steps + (3 if plan.complete else 0))
    with ExitStack() as stack:
        place = stack.enter_context(workshop(arguments.work))
        for name in ("home", "tmp"):
            (place / name).mkdir(mode=0o700)
        site = Site(place, plan, interruption, show, console)
        stack.enter_context(show.shown())
        chapters = [environment_chapter(site, here, theirs)]
        if plan.complete:
            chapters.append(older_chapter(site, theirs))
        chapters.append(deltaglider_chapter(site, here, theirs))
        if plan.complete:
            document = _implementations_document(arguments)
            compare_implementations(site, here, theirs, document)
        return chapters


def _implementations_document(arguments: argparse.Namespace) -> Path:
    output: Path = arguments.output
    return output.with_name("implementations.md")


def _programs() -> dict[str, str]:
    told = subprocess.run(
        ["xdelta3", "-V"],  # noqa: S607 - the one that DeltaGlider finds, too
        capture_output=True,
        check=False,
        text=True,
    )
    number = re.search(r"\d+\.\d+\.\d+", told.stdout + told.stderr)
    return {
        "DeltaGlider": "6.2.0",
        "xdelta3": number[0] if number else "unknown",
        "moto (S3 server)": version("moto"),
        "matplotlib (charts)": version("matplotlib"),
    }


def _require_memory() -> None:
    available = psutil.virtual_memory().available
    if available < _NEEDED_BYTES:
        raise TestbedError(
            f"{_NEEDED_BYTES / 1e9:.1f} GB of free memory are needed for references of 500 MB in "
            f"every peer and for 64 processes, there are {available / 1e9:.1f}"
        )


def _parse(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench",
        description="Measure dg-cached, print the figures and write docs/performance.md.",
    )
    parser.add_argument("--quick", action="store_true", help="less of everything, in 90 seconds")
    add_place_options(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "docs" / "performance.md",
        metavar="FILE",
        help="what is written, with its charts and implementations.md beside it "
        "(default: docs/performance.md)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
