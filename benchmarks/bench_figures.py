"""What a measurement gives: figures with the target they are held to, and how they travel.

The measuring programs run in two environments and write their groups as JSON; nothing but the
standard library is imported here.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value; `low` and `high` are the extremes of the rounds it is the median of."""

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def target(self) -> str:
        """What was aimed at, empty where the figure is only told."""
        if self.at_most is not None:
            return f"≤ {shown(self.at_most, self.unit)}"
        if self.at_least is not None:
            return f"≥ {shown(self.at_least, self.unit)}"
        return ""

    @property
    def measured(self) -> str:
        """The value with its unit."""
        return shown(self.value, self.unit)

    @property
    def spread(self) -> str:
        """The lowest and the highest round, empty where there is one value only."""
        if self.low is None or self.high is None:
            return ""
        return f"{shown(self.low, self.unit)} to {shown(self.high, self.unit)}"

    @property
    def met(self) -> bool | None:
        """Tell whether the target was met; None without one."""
        if self.at_most is not None:
            return self.value <= self.at_most
        if self.at_least is not None:
            return self.value >= self.at_least
        return None

    @property
    def verdict(self) -> str:
        """Say met, or missed and by how much; empty without a target."""
        if self.met is None:
            return ""
        return "met" if self.met else f"missed by {self._shortfall}"

    @property
    def _shortfall(self) -> str:
        target = self.at_most if self.at_most is not None else self.at_least
        off = abs(self.value - (target or 0))
        share = math.ceil(100 * off / target) if target else 0
        return f"{share} %" if target else shown(off, self.unit)


Line = list[tuple[float, float]]
"""Points of a curve."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One part of a chart: curves by name, on logarithmic scales."""

    title: str
    lines: dict[str, Line]


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves, drawn into performance-`name`.svg."""

    name: str
    title: str
    across: str
    up: str
    panels: list[Panel]


@dataclass(frozen=True, slots=True)
class Group:
    """Figures that were measured together, and how."""

    title: str
    how: str
    figures: list[Figure] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Versions:
    """What a figure depends on besides the machine."""

    python: str
    cryptography: str
    grpcio: str
    others: dict[str, str] = field(default_factory=dict)


def shown(value: float, unit: str) -> str:
    """Return a value as people read it: three digits, then its unit."""
    if unit == "x":
        return f"{value:.2f}x"
    if math.isinf(value):
        return f"no {unit} measured"
    digits = f"{value:.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"
    return f"{digits} {unit}".strip()


def of(name: str, samples: Sequence[float], unit: str, **target: float) -> Figure:
    """Return the median of the samples as a figure."""
    return Figure(name, median(samples), unit, min(samples), max(samples), **target)


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the smallest sample that at least this share of all does not exceed."""
    return sorted(samples)[max(0, math.ceil(share * len(samples)) - 1)]


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Divide what was measured one after the other, pair by pair."""
    return [a / b for a, b in zip(above, below, strict=True)]


def break_even(ours: Line, theirs: Line) -> float | None:
    """Return the size from which on ours takes no longer; None where it never does.

    Between two measured sizes both are taken as straight on logarithmic scales. Where ours is
    faster at every size, it is the smallest that was measured.
    """
    logs = [
        (math.log(x), math.log(mine / other))
        for (x, mine), (_, other) in zip(ours, theirs, strict=True)
    ]
    behind = [number for number, (_, slower) in enumerate(logs) if slower > 0]
    if not behind:
        return ours[0][0]
    if behind[-1] == len(logs) - 1:
        return None
    (x, above), (beyond, below) = logs[behind[-1]], logs[behind[-1] + 1]
    return math.exp(x + (beyond - x) * above / (above - below))


def pays_from(name: str, ours: Line, theirs: Line) -> Figure:
    """Return the break-even as a figure, in MB; infinite where there is none."""
    size = break_even(ours, theirs)
    return Figure(f"{name}, pays from", math.inf if size is None else size, "MB")


def milliseconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def resident_megabytes(pid: int) -> float:
    """Return what a process takes: resident pages and page tables, in MB.

    From /proc/PID/status, which everybody may read; a daemon shows nobody but root its smaps
    (proc_pid_status(5)). Shared libraries are counted as if they were its own.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    taken = [int(line.split()[1]) for line in lines if line.startswith(("VmRSS:", "VmPTE:"))]
    return sum(taken) * 1024 / MEGABYTE


def own_versions() -> Versions:
    """Return the versions of this process."""
    return Versions(platform.python_version(), version("cryptography"), version("grpcio"))


def save(path: Path, groups: Sequence[Group], *, versions: dict[str, str] | None = None) -> None:
    """Write groups, and the versions of this process, for the program that started it.

    Args:
        path: the file.
        groups: what was measured.
        versions: of what else was measured.
    """
    own = replace(own_versions(), others=versions or {})
    told = {"versions": asdict(own), "groups": [asdict(group) for group in groups]}
    path.write_text(json.dumps(told))


def load(path: Path) -> tuple[Versions, list[Group]]:
    """Read what `save` wrote."""
    told: dict[str, Any] = json.loads(path.read_text())
    return Versions(**told["versions"]), [_group(group) for group in told["groups"]]


def _group(told: dict[str, Any]) -> Group:
    figures = [Figure(**figure) for figure in told["figures"]]
    return Group(told["title"], told["how"], figures, [_chart(one) for one in told["charts"]])


def _chart(told: dict[str, Any]) -> Chart:
    panels = [
        Panel(
            panel["title"],
            {name: [(x, y) for x, y in line] for name, line in panel["lines"].items()},
        )
        for panel in told["panels"]
    ]
    return Chart(told["name"], told["title"], told["across"], told["up"], panels)
