"""Draws the curves of docs/performance.md as SVG, with matplotlib.

The same figures give the same file: no date, and names of elements from a fixed salt.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.bench_figures import Chart, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS = "dg-cached"
_MARKS = "osD^vP*Xh"


def file_name(document: Path, chart: Chart) -> str:
    """Return the name of a chart's file, which is beside the document."""
    return f"{document.stem}-{chart.name}.svg"


def draw(chart: Chart, path: Path) -> None:
    """Draw one chart into a file."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "dg-cached", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 4.8), layout="constrained")
        panels = figure.subplots(1, len(chart.panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(panels, chart.panels, strict=True):
            for number, (name, line) in enumerate(panel.lines.items()):
                _curve(axes, number, name, line)
            axes.set_title(panel.title, fontsize=10)
            axes.set_xlabel(chart.across)
            _ticks(axes, sorted({x for line in panel.lines.values() for x, _ in line}))
        panels[0].set_ylabel(chart.up)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
        figure.suptitle(chart.title, fontsize=11)
        figure.savefig(path, metadata={"Date": None})


def _curve(axes: "Axes", number: int, name: str, line: Line) -> None:
    across, up = zip(*line, strict=True)
    ours = name == _OURS
    axes.plot(
        across,
        up,
        marker=_MARKS[number % len(_MARKS)],
        markersize=6 if ours else 4,
        linewidth=2.6 if ours else 1.2,
        color="black" if ours else f"C{number}",
        label=name,
    )


def _ticks(axes: "Axes", values: list[float]) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(linewidth=0.4)
    axes.set_axisbelow(True)
