"""What was measured, as a table for the terminal and as docs/performance.md."""

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich import box
from rich.console import RenderableType
from rich.table import Table

from benchmarks.bench_figures import Figure, Group, Versions


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


def document(chapters: Sequence[Chapter], rounds: int, command: str) -> str:
    """Return docs/performance.md."""
    lines = [
        "# Performance",
        "",
        f"Written by `{command}` on {datetime.now(UTC):%Y-%m-%d}; run it again to measure your own "
        "machine. Nothing here is written by hand.",
        "",
        *_machine(chapters),
        "",
        f"Each figure is a median; the lowest and the highest value stand beside it. {rounds} "
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
    ]
    for chapter in chapters:
        lines += ["", f"## {chapter.title}", *_chapter(chapter)]
    return "\n".join(lines) + "\n"


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


def _machine(chapters: Sequence[Chapter]) -> list[str]:
    cryptographies = [one.versions.cryptography for one in chapters if one.versions is not None]
    rows = {
        "processor": f"{_processor()}, {os.cpu_count()} logical processors",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "cryptography": " and ".join(dict.fromkeys(cryptographies)),
        "grpcio": " and ".join(
            dict.fromkeys(one.versions.grpcio for one in chapters if one.versions is not None)
        ),
    }
    return ["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows.items())]


def _processor() -> str:
    """Return the processor's name (proc_cpuinfo(5)), or the architecture where it has none."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, text = line.partition(":")
        if name.strip() == "model name":
            return text.strip()
    return platform.machine()
