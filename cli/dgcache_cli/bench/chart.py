"""The chart: what a write and a read take, by size, as SVG or PNG. matplotlib is optional.

Times are on a logarithmic scale; the whiskers are the least and the most of all rounds.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dgcache_cli.bench.findings import Findings, Found, Spread, Timing
from dgcache_core.errors import CacheUnavailableError, InvalidReferenceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")
_INSTALL = "pip install 'dg-cached[bench]'"
_PANELS = {
    "write": "write",
    "path": "read: to a path",
    "last_byte": "read: to the last byte",
}


def require_drawable(path: Path) -> None:
    """Check, before anything is measured, that a chart can be drawn there.

    Raises:
        InvalidReferenceError: the suffix is unknown.
        CacheUnavailableError: matplotlib is missing; the message says how to install it.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidReferenceError(f"--chart {path}: draws {' or '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise CacheUnavailableError(f"--chart needs matplotlib: {_INSTALL}")


def draw(findings: Findings, path: Path) -> None:
    """Draw the findings into a file."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "dg-cached", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        panels = figure.subplots(1, len(_PANELS))
        for axes, (operation, title) in zip(panels, _PANELS.items(), strict=True):
            for index, one in enumerate(findings.implementations):
                _bars(axes, index, one, operation, findings)
            axes.set_title(title, fontsize=10)
            axes.set_yscale("log")
            axes.set_xticks(range(len(findings.sizes_mb)))
            axes.set_xticklabels([f"{size:g} MB" for size in findings.sizes_mb])
            axes.grid(axis="y", linewidth=0.4)
            axes.set_axisbelow(True)
        panels[0].set_ylabel("ms, less is better")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _bars(axes: "Axes", index: int, one: Found, operation: str, findings: Findings) -> None:
    width = 0.8 / len(findings.implementations)
    spreads = [_spread(timing, operation) for timing in one.timings]
    left = -0.4 + width * (index + 0.5)
    axes.bar(
        [position + left for position in range(len(spreads))],
        [spread.median for spread in spreads],
        width,
        yerr=(
            [spread.median - spread.low for spread in spreads],
            [spread.high - spread.median for spread in spreads],
        ),
        error_kw={"elinewidth": 0.6},
        label=one.title,
        color=f"C{index}",
    )


def _spread(timing: Timing, operation: str) -> Spread:
    spread: Spread = getattr(timing, f"{operation}_ms")
    return spread
