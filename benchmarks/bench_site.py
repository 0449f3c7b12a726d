"""Where measurements run: one private directory, daemons that are gone afterwards, programs."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.bench_figures import Group, Versions, load
from benchmarks.daemon import running_daemon
from benchmarks.demo import Show
from benchmarks.processes import last_words, run
from benchmarks.testbed import ROOT, clean_environment
from benchmarks.workshop import socket_directory, workshop
from dgcache_cli.bench.interruption import Interruption

CHILD_SECONDS = 300.0
_BUDGET_MB = 2560


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    rounds: int
    largest_mb: int
    downloads_mb: tuple[int, ...]
    download_rounds: int
    idle_seconds: float
    complete: bool
    """Whether DeltaGlider's cryptography and other implementations are measured as well."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where measurements run, and how they are shown and ended."""

    place: Path
    plan: Plan
    interruption: Interruption
    show: Show
    console: Console

    @property
    def rounds(self) -> int:
        """How often."""
        return self.plan.rounds

    def environment(self, sockets: Path) -> dict[str, str]:
        """Return the environment of whatever shall use the daemon in `sockets`."""
        return clean_environment(
            {
                "HOME": str(self.place / "home"),
                "TMPDIR": str(self.place / "tmp"),
                "DG_CACHE_SOCKET_DIR": str(sockets),
                "DG_CACHE_MEMORY_SIZE_MB": str(_BUDGET_MB),
            }
        )

    @contextmanager
    def daemon(self, programs: Path) -> Iterator[tuple[int, dict[str, str]]]:
        """Run a fresh dg-cached of one environment; yield its pid and its clients' environment."""
        with ExitStack() as stack:
            apart = stack.enter_context(workshop(self.place / "daemons"))
            sockets, _ = stack.enter_context(socket_directory(apart))
            environment = self.environment(sockets)
            pid = stack.enter_context(
                running_daemon(programs / "dg-cached", environment=environment, log=apart / "log")
            )
            yield pid, environment

    def run(
        self, environment: Mapping[str, str], *command: str, seconds: float = CHILD_SECONDS
    ) -> str:
        """Run one measuring program and return the last line it printed."""
        log = self.place / "output"
        run(
            command,
            environment=environment,
            directory=ROOT,
            log=log,
            seconds=seconds,
            interruption=self.interruption,
        )
        return last_words(log).rpartition("\n")[2]

    def figures(
        self,
        environment: Mapping[str, str],
        programs: Path,
        module: str,
        *options: str,
        rounds: int | None = None,
    ) -> tuple[Versions, list[Group]]:
        """Run a measuring module in one environment and return what it found."""
        with workshop(self.place / "measuring") as place:
            out = place / "figures.json"
            self.run(
                environment,
                *(str(programs / "python"), "-m", f"benchmarks.{module}", str(out)),
                *("--rounds", str(self.rounds if rounds is None else rounds)),
                *("--largest", str(self.plan.largest_mb), "--place", str(place), *options),
            )
            return load(out)
