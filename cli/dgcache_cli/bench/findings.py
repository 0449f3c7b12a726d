"""What a bench found, and how it stands to the roadmap's target. Plain data, ready for JSON.

The target is the roadmap's: less than 10 % slower than v5. It is judged for a write, for a read up
to the path, and for a read up to the last byte; against v5's path that nobody checked, and, for
reads, against v5 as its service used it, which hashed the file first. A ratio is the median of the
ratios of what was measured in the same round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from dgcache_cli.bench.attacks import Check, Withstood
from dgcache_cli.bench.implementations import BASELINE, CHECKED_BASELINE, Implementation
from dgcache_cli.bench.port_calls import PortCalls
from dgcache_cli.bench.timing import Sample, Samples, ratios

AT_MOST = 1.10
"""Less than 10 % degradation against v5 (the roadmap's success metric "Performance Maintained")."""

OPERATIONS = ("write", "path", "last_byte")
JUDGED = (
    *((BASELINE, operation) for operation in OPERATIONS),
    *((CHECKED_BASELINE, operation) for operation in OPERATIONS[1:]),
)
"""Baselines and operations; v5 wrote in one way only."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds: the median of all rounds, the least and the most."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Timing:
    """One implementation at one size. MB are 1,000,000 bytes."""

    size_mb: float
    write_ms: Spread
    path_ms: Spread
    last_byte_ms: Spread
    shared_ms: Spread | None
    write_mb_per_s: float
    read_mb_per_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the target is met; `ratio` is the time taken over the baseline's."""

    implementation: str
    size_mb: float
    operation: str
    baseline: str
    ratio: float
    met: bool


@dataclass(frozen=True, slots=True)
class Found:
    """All about one implementation."""

    name: str
    title: str
    about: str
    timings: list[Timing]
    checks: list[Check]
    warm_for_next_process: bool
    code_lines: int
    port_calls: PortCalls


@dataclass(frozen=True, slots=True)
class Findings:
    """All there is to show."""

    runs: int
    sizes_mb: list[float]
    machine: dict[str, str]
    target: float
    implementations: list[Found]
    verdicts: list[Verdict]

    def ratio(self, name: str, size_mb: float, operation: str, baseline: str) -> Verdict | None:
        """Return one verdict; None for what is not judged, as a baseline against itself."""
        wanted = (name, size_mb, operation, baseline)
        return next(
            (
                one
                for one in self.verdicts
                if (one.implementation, one.size_mb, one.operation, one.baseline) == wanted
            ),
            None,
        )


def found(
    row: Implementation,
    samples: Mapping[float, Samples],
    withstood: Withstood,
    lines: int,
    port: PortCalls,
) -> Found:
    """Put together what is known of one implementation; `samples` are by size in MB."""
    return Found(
        row.name,
        row.title,
        row.about,
        [_timing(size_mb, of_size[row.name]) for size_mb, of_size in samples.items()],
        withstood.checks,
        withstood.warm_for_next_process,
        lines,
        port,
    )


def verdicts(samples: Mapping[float, Samples]) -> list[Verdict]:
    """Judge every implementation that is no baseline."""
    return [
        _verdict(name, size_mb, operation, baseline, of_size)
        for size_mb, of_size in samples.items()
        for name in of_size
        if name not in (BASELINE, CHECKED_BASELINE)
        for baseline, operation in JUDGED
    ]


def _verdict(name: str, size_mb: float, operation: str, baseline: str, samples: Samples) -> Verdict:
    taken, base = (_seconds(samples[one], operation) for one in (name, baseline))
    ratio = median(ratios(taken, base))
    return Verdict(name, size_mb, operation, baseline, ratio, ratio < AT_MOST)


def _timing(size_mb: float, samples: Sequence[Sample]) -> Timing:
    write, path, last_byte = (_spread(_seconds(samples, one)) for one in OPERATIONS)
    shared = [one.shared for one in samples if one.shared is not None]
    return Timing(
        size_mb,
        write,
        path,
        last_byte,
        _spread(shared) if shared else None,
        size_mb / write.median * 1000,
        size_mb / last_byte.median * 1000,
    )


def _seconds(samples: Sequence[Sample], operation: str) -> list[float]:
    return [getattr(sample, operation) for sample in samples]


def _spread(seconds: Sequence[float]) -> Spread:
    return Spread(*(1000 * value for value in (median(seconds), min(seconds), max(seconds))))
