"""What was measured, as a table for the terminal and as docs/performance.md.

What did not help is written by hand, in notes.md beside this module, and taken over each time.
"""

import os
import platform
import ssl
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich import box
from rich.console import RenderableType
from rich.table import Table

from benchmarks.bench_charts import draw, file_name
from benchmarks.bench_figures import Chart, Figure, Group, Versions
from benchmarks.peers import PEERS

NOTES = Path(__file__).with_name("notes.md")


@dataclass(frozen=True, slots=True)
class Chapter:
    """Groups that were measured in one environment."""

    title: str
    versions: Versions | None
    groups: Sequence[Group]


def judged(chapters: Sequence[Chapter]) -> Iterator[tuple[Chapter, Group, Figure]]:
    """Yield every figure that is held to a target."""
    for chapter in chapters:
        for group in chapter.groups:
            for figure in group.figures:
                if figure.met is not None:
                    yield chapter, group, figure


def table(chapters: Sequence[Chapter]) -> RenderableType:
    """Return the figures that have a target; it reads well in 80 columns and in a pipe."""
    shown = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False, collapse_padding=True)
    shown.add_column("figure")
    for name in ("target", "measured"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("", no_wrap=True)
    heading = ""
    for chapter, group, figure in judged(chapters):
        if heading != (heading := f"{chapter.title}: {group.title}"):
            shown.add_section()
            shown.add_row(heading)
        style = None if figure.met else "red"
        shown.add_row(
            f"  {figure.name}", figure.target, figure.measured, figure.verdict, style=style
        )
    return shown


def summary(chapters: Sequence[Chapter]) -> str:
    """Say how many targets were met."""
    verdicts = [figure.met for _, _, figure in judged(chapters)]
    return f"{sum(map(bool, verdicts))} of {len(verdicts)} targets met."


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the bench."""

    chapters: Sequence[Chapter]
    rounds: int
    command: str
    left_out: str
    """What this run did not measure, as a sentence; empty where it measured all."""
    programs: dict[str, str]
    """Versions of what was measured besides Python's packages."""
    load_before: float
    """Processes that wanted a processor, on average, in the minute before."""


def write(run: Run, path: Path) -> None:
    """Write docs/performance.md and the charts beside it."""
    path.write_text(document(run, path))
    for chart in _charts(run.chapters):
        draw(chart, path.with_name(file_name(path, chart)))


def _charts(chapters: Sequence[Chapter]) -> Iterator[Chart]:
    for chapter in chapters:
        for group in chapter.groups:
            yield from group.charts


def document(run: Run, path: Path) -> str:
    """Return docs/performance.md."""
    chapters = run.chapters
    lines = [
        "# Performance",
        "",
        f"Written by `{run.command}` on {datetime.now(UTC):%Y-%m-%d}; run it again to measure your "
        "own machine. Nothing here is written by hand but what did not help, at the end, and what "
        f"is said of the peers. {run.left_out}".rstrip(),
        "",
        *_machine(run),
        "",
        f"Each figure is a median; the lowest and the highest value stand beside it. {run.rounds} "
        "rounds; what is compared runs in turn, A B A B, and a ratio is the median of the ratios "
        "of what ran one after the other, so that a machine which is busy for a while is so for "
        "both. 1 MB is 1,000,000 bytes. All data is random.",
        "",
        "## Targets",
        "",
        summary(chapters),
        "",
        "| figure | target | measured | |",
        "| --- | ---: | ---: | --- |",
        *(
            f"| {chapter.title}: {group.title}, {figure.name} | {figure.target} "
            f"| {figure.measured} | {_emphasised(figure)} |"
            for chapter, group, figure in judged(chapters)
        ),
        "",
        "## Charts",
        *(
            line
            for chart in _charts(chapters)
            for line in ("", f"![{chart.title}]({file_name(path, chart)})")
        ),
        "",
        "## Peers",
        "",
        "A `get` goes from the digest to a path that xdelta3 can read, its bytes checked. "
        "dg-cached authenticates every chunk with AES-256-GCM under a key of the entry, hands out "
        "a sealed memory file that nobody can change any more, keeps ciphertext only, and answers "
        "only its own user.",
        "",
        "| peer | what its get is | what it protects, and what not |",
        "| --- | --- | --- |",
        *(f"| {peer.name} | {peer.how} | {peer.protects} |" for peer in PEERS),
    ]
    for chapter in chapters:
        lines += ["", f"## {chapter.title}", *_chapter(chapter)]
    return "\n".join(lines) + "\n\n" + NOTES.read_text()


def _chapter(chapter: Chapter) -> Iterator[str]:
    if chapter.versions is not None:
        versions = chapter.versions
        yield ""
        yield (
            f"Python {versions.python}, cryptography {versions.cryptography}, "
            f"grpcio {versions.grpcio}, on both sides."
        )
    for group in chapter.groups:
        yield from ("", f"### {group.title[0].upper()}{group.title[1:]}", "")
        yield f"{group.how[0].upper()}{group.how[1:]}."
        yield from ("", "| figure | median | lowest to highest | target | |")
        yield "| --- | ---: | ---: | ---: | --- |"
        for figure in group.figures:
            yield (
                f"| {figure.name} | {figure.measured} | {figure.spread} "
                f"| {figure.target} | {_emphasised(figure)} |"
            )


def _emphasised(figure: Figure) -> str:
    return f"**{figure.verdict}**" if figure.met is False else figure.verdict


def _machine(run: Run) -> list[str]:
    versions = [one.versions for one in run.chapters if one.versions is not None]
    rows = {
        "processor": f"{_processor()}, {os.cpu_count()} logical processors",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB",
        "kernel": f"{platform.system()} {platform.release()}",
        "load before": f"{run.load_before:.1f} processes on average in the last minute",
        "Python": platform.python_version(),
        "OpenSSL (hashlib)": ssl.OPENSSL_VERSION,
        "cryptography": _each(one.cryptography for one in versions),
        "grpcio": _each(one.grpcio for one in versions),
        **{name: number for one in versions for name, number in one.others.items()},
        **run.programs,
    }
    return ["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows.items())]


def _each(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def _processor() -> str:
    """Return the processor's name (proc_cpuinfo(5)), or the architecture where it has none."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, text = line.partition(":")
        if name.strip() == "model name":
            return text.strip()
    return platform.machine()
