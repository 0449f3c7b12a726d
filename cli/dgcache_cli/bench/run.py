"""One bench from the beginning to the end: all implementations, in one directory, in one run."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import psutil

from dgcache_cli.bench.attacks import attack
from dgcache_cli.bench.code_lines import code_lines
from dgcache_cli.bench.findings import AT_MOST, Findings, found, verdicts
from dgcache_cli.bench.implementations import IMPLEMENTATIONS
from dgcache_cli.bench.interruption import Interruption
from dgcache_cli.bench.place import (
    file_system_of,
    own_directory,
    own_place,
    random_file,
    require_room,
)
from dgcache_cli.bench.port import Contender
from dgcache_cli.bench.port_calls import calls
from dgcache_cli.bench.timing import Samples, digest_of, measure
from dgcache_core.settings import MEBIBYTE

MEGABYTE = 1_000_000
_ENTRIES_IN_A_BUDGET = 3
"""The largest reference is just under half of a budget: twice is not enough."""

Step = Callable[[str], None]


def steps(sizes_mb: Sequence[float], runs: int) -> int:
    """Return how often `run` says what it does."""
    return len(IMPLEMENTATIONS) * (1 + len(sizes_mb) * (runs + 1))


def run(
    sizes_mb: Sequence[float],
    runs: int,
    environ: Mapping[str, str],
    deltaglider: str,
    interruption: Interruption,
    step: Step,
) -> Findings:
    """Measure and attack everything.

    Args:
        sizes_mb: sizes of references in MB of 1,000,000 bytes.
        runs: rounds that count.
        environ: for the private daemon.
        deltaglider: a Python that has DeltaGlider, for dg-cached's port.
        interruption: what ends it early.
        step: told what comes next.

    Raises:
        Interrupted: a signal came; everything is gone.
        CacheFullError: there is no room for the largest size.
        CacheError: an implementation does not work here.
    """

    def before(what: str) -> None:
        interruption.check()
        step(what)

    require_room(_bytes(max(sizes_mb)))
    with own_directory() as base:
        machine = _machine(base)
        samples = _timed(base, sizes_mb, runs, environ, before)
        implementations = []
        for row in IMPLEMENTATIONS:
            before(f"{row.title}: attacked")
            withstood = attack(row, base, environ)
            port = calls(row, base, environ, deltaglider)
            implementations.append(found(row, samples, withstood, code_lines(row.modules), port))
        interruption.check()
    return Findings(runs, [*sizes_mb], machine, AT_MOST, implementations, verdicts(samples))


def _timed(
    base: Path, sizes_mb: Sequence[float], runs: int, environ: Mapping[str, str], before: Step
) -> dict[float, Samples]:
    budget_mb = 64 + _ENTRIES_IN_A_BUDGET * _bytes(max(sizes_mb)) // MEBIBYTE
    samples: dict[float, Samples] = {}
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for row in IMPLEMENTATIONS:
            place = own_place(base, row.name)
            stack.enter_context(row.site(place, budget_mb, environ))
            contenders[row.name] = stack.enter_context(row.opened(place, budget_mb))
        for size_mb in sizes_mb:
            source = random_file(base / "source.bin", _bytes(size_mb))
            samples[size_mb] = measure(
                contenders,
                source,
                digest_of(source),
                runs,
                lambda name, size_mb=size_mb: before(f"{size_mb:g} MB: {name}"),  # type: ignore[misc]
            )
    return samples


def _bytes(size_mb: float) -> int:
    return round(size_mb * MEGABYTE)


def _machine(base: Path) -> dict[str, str]:
    """Tell what the figures depend on, the load of others included."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} logical processors",
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "cryptography": version("cryptography"),
        "grpcio": version("grpcio"),
        "file system": file_system_of(base),
        "load before": f"{os.getloadavg()[0]:.1f} processes on average in the last minute",
    }


def _processor() -> str:
    """Return the processor's name (proc_cpuinfo(5)), or the architecture where it has none."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, text = line.partition(":")
        if name.strip() == "model name":
            return text.strip()
    return platform.machine()
