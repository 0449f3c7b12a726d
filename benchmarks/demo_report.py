"""What the demo measured, as one table that reads well in 80 columns, without colour, in a pipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich import box
from rich.console import RenderableType
from rich.table import Table

from benchmarks.archives import MEGABYTE


@dataclass(frozen=True, slots=True)
class Result:
    """One process of DeltaGlider: what it took, and whether it did what it should.

    `remark` is what dg-cached's SDK said about itself, such as why it could not use the daemon.
    """

    seconds: float
    peak_bytes: int
    reference_gets: int
    identical: bool
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """The same command without and with dg-cached."""

    name: str
    stock: Result
    cached: Result


@dataclass(frozen=True, slots=True)
class Phase:
    """Runs of one kind, the first of which finds dg-cached without the reference."""

    name: str
    pairs: Sequence[Pair]

    @property
    def warm(self) -> Sequence[Pair]:
        """All runs but the first."""
        return self.pairs[1:]


def failures(phases: Sequence[Phase]) -> list[str]:
    """Return what must not be: a byte that differs, or a reference fetched in a warm run."""
    differing = [
        f"{pair.name}, {way}: the bytes differ"
        for phase in phases
        for pair in phase.pairs
        for way, result in (("stock", pair.stock), ("dg-cached", pair.cached))
        if not result.identical
    ]
    fetching = [
        f"{pair.name}, dg-cached: a warm run fetched the reference{_why(pair.cached)}"
        for phase in phases
        for pair in phase.warm
        if pair.cached.reference_gets
    ]
    return differing + fetching


def table(phases: Sequence[Phase]) -> RenderableType:
    """Return the table: a row for each process, medians and ratios below each phase."""
    shown = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False, collapse_padding=True)
    shown.add_column("\nprocess", no_wrap=True)
    for way in ("stock", "dg-cached"):
        for what in ("time", "memory", "GETs"):
            head = f"{way if what == 'time' else ''}\n{what}"
            shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column("\nbytes", no_wrap=True)
    for phase in phases:
        for pair in phase.pairs:
            same = pair.stock.identical and pair.cached.identical
            shown.add_row(
                pair.name,
                *_cells(pair.stock),
                *_cells(pair.cached),
                "identical" if same else "DIFFERENT",
            )
        shown.add_section()
        stock, cached = (_medians([getattr(p, way) for p in phase.warm]) for way in _WAYS)
        shown.add_row(f"median of 2-{len(phase.pairs)}", *_figures(stock), *_figures(cached))
        shown.add_row(
            "stock / dg-cached",
            *("", "", ""),
            f"{stock[0] / cached[0]:.1f}x",
            f"{stock[1] / cached[1]:.1f}x",
        )
        shown.add_section()
    return shown


_WAYS = ("stock", "cached")


def _why(result: Result) -> str:
    return f" ({result.remark})" if result.remark else ""


def _cells(result: Result) -> tuple[str, str, str]:
    return _figures((result.seconds, result.peak_bytes, result.reference_gets))


def _medians(results: Sequence[Result]) -> tuple[float, float, float]:
    return (
        median(result.seconds for result in results),
        median(result.peak_bytes for result in results),
        median(result.reference_gets for result in results),
    )


def _figures(figures: tuple[float, float, float]) -> tuple[str, str, str]:
    seconds, peak_bytes, gets = figures
    return f"{seconds:.2f} s", f"{peak_bytes / MEGABYTE:.0f} MB", f"{gets:g}"
