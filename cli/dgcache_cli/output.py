"""How things are printed: for people, in tables that fit 80 columns, or as JSON for programs.

rich is imported where something is drawn, and json where it is printed: most calls do neither.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = [
    "counted",
    "human_seconds",
    "human_size",
    "print_fields",
    "print_json",
    "print_table",
    "progress",
]

_BAR_FROM_BYTES = 16 << 20


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    import json

    print(json.dumps(value, indent=2, default=str))


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields:
        table.add_row(name, Text(value))
    console = Console(highlight=False)
    with console.capture() as drawn:
        console.print(table)
    for line in drawn.get().splitlines():  # without the blanks that fill the table
        print(line.rstrip())


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], folding: Sequence[int] = (0,)
) -> None:
    """Print rows under a heading; the columns of `folding` may fold, the others stay whole."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index not in folding)
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)


def human_size(size: int) -> str:
    """Return a size as people read it, in decimal units."""
    from dgcache.report import megabytes

    return megabytes(size)


def human_seconds(seconds: float) -> str:
    """Return a duration in its two largest units."""
    left = max(0, round(seconds))
    parts: list[str] = []
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Draw a bar on standard error while the block runs, if that is a terminal and worth it."""
    if not sys.stderr.isatty() or (total is not None and total < _BAR_FROM_BYTES):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bars:
        task = bars.add_task(what, total=total)
        yield lambda count: bars.advance(task, count)


@contextmanager
def counted(total: int) -> Iterator[Callable[[str], None]]:
    """Draw a bar of steps on standard error while the block runs, if that is a terminal.

    What it yields is told what comes next, once a step.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=total)
        yield lambda what: bars.update(task, advance=1, description=what)
