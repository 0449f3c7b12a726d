"""The main job, shown: DeltaGlider runs again and again, and downloads its reference once.

`make demo` runs it. It starts a real S3 server and a dg-cached of its own, makes five versions of
an archive, uploads them, and downloads the last one in five processes: with `deltaglider cp` as it
is, and with `dg-cache deltaglider cp`, in turn, so that a busy machine is as slow for both. Before
the downloads dg-cached is cleared: the first one shows what a miss costs.

What an upload stored is checked without DeltaGlider: both objects are read from S3 and decoded with
xdelta3. Everything is below `.demo/` in the clone and removed at the end, also after Ctrl-C.

Exit status: 0; 1 if a byte differs, a warm run fetched a reference, or something did not work;
2 usage; 130, 143 after SIGINT, SIGTERM.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.archives import write_version
from benchmarks.daemon import running_daemon
from benchmarks.demo_report import Pair, Phase, Result, failures, table
from benchmarks.leftovers import deltaglider_directories, remove_orphans
from benchmarks.processes import Measured, ProcessFailedError, run
from benchmarks.testbed import REFERENCE_SUFFIX, S3Server, TestbedError
from benchmarks.workshop import add_place_options, socket_directory, workshop
from benchmarks.xdelta3 import NoXdelta3Error, ensure_xdelta3
from dgcache_cli.bench.interruption import Interrupted, Interruption

VERSIONS = 5
RUNS = 5
BUCKET = "releases"
EXIT_FAILED = 1


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run DeltaGlider, and the prefix its objects are below."""

    name: str
    prefix: str
    command: tuple[str, ...]

    def url(self, name: str) -> str:
        """Return the full key: DeltaGlider 6.2.0 drops a prefix that ends in a slash."""
        return f"s3://{BUCKET}/{self.prefix}/{name}"


@dataclass(frozen=True, slots=True)
class Bench:
    """What every step needs."""

    place: Path
    server: S3Server
    environment: Mapping[str, str]
    seconds: float
    interruption: Interruption
    console: Console

    @property
    def output(self) -> Path:
        """What the last program wrote."""
        return self.place / "output"

    def run(self, *command: str) -> Measured:
        """Run one program to its end."""
        return run(
            command,
            environment=self.environment,
            directory=self.place,
            log=self.output,
            seconds=self.seconds,
            interruption=self.interruption,
        )

    def copy(self, way: Way, source: str, destination: str) -> tuple[Measured, int]:
        """Run `deltaglider cp`; return what it took and how often it fetched a reference."""
        self.server.reset_counts()
        before = deltaglider_directories()
        try:
            measured = self.run(*way.command, "cp", source, destination)
        except (Interrupted, ProcessFailedError):
            if told := remove_orphans(before):
                self.console.print(told)
            raise
        return measured, self.server.count("GET", REFERENCE_SUFFIX)

    def remark(self) -> str:
        """Return what dg-cached's SDK said about itself in the last program."""
        lines = self.output.read_text(errors="replace").splitlines()
        return " ".join(line for line in lines if line.startswith("dg-cache: "))

    def sha256(self, path: Path) -> str:
        """Return a file's digest, a block at a time."""
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                self.interruption.check()
        return digest.hexdigest()


class Show:
    """Progress: a bar in a terminal, a line for each step elsewhere."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar inside the block."""
        with self._bar:
            yield

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Say what is done inside the block, and count it when it is done."""
        self._bar.update(self._task, description=f"{text:30}")
        start = time.monotonic()
        yield
        self._bar.advance(self._task)
        if not self._console.is_terminal:
            self._console.print(f"  {text:30} {time.monotonic() - start:6.2f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    arguments = _parse(argv)
    console = Console(highlight=False)
    try:
        ensure_xdelta3()
        with Interruption() as interruption:
            phases = _measure(arguments, console, interruption)
    except Interrupted as signal:
        console.print(f"{signal}: what ran was ended, what was made is removed")
        return signal.exit_status
    except (ProcessFailedError, TestbedError, NoXdelta3Error) as error:
        console.print(str(error), style="red", markup=False)
        return EXIT_FAILED
    return _judge(console, phases)


def _measure(
    arguments: argparse.Namespace, console: Console, interruption: Interruption
) -> list[Phase]:
    deltaglider = arguments.environment / "bin" / "deltaglider"
    dg_cache = arguments.environment / "bin" / "dg-cache"
    dg_cached = Path(sys.executable).parent / "dg-cached"
    for program in (deltaglider, dg_cache, dg_cached):
        if not program.exists():
            raise TestbedError(f"{program} is missing: run make environments")
    with ExitStack() as stack:
        place = stack.enter_context(workshop(arguments.work))
        sockets, reason = stack.enter_context(socket_directory(place))
        if reason:
            console.print(f"The sockets are in {sockets} until the end, not in the clone: {reason}")
        for name in ("home", "tmp", "versions"):
            (place / name).mkdir(mode=0o700)
        server = stack.enter_context(S3Server(spool_directory=place / "tmp"))
        environment = server.environment(
            {
                "HOME": str(place / "home"),
                "TMPDIR": str(place / "tmp"),  # DeltaGlider renames a download out of it
                "DG_CACHE_SOCKET_DIR": str(sockets),
                "DG_CACHE_MEMORY_SIZE_MB": str(4 * arguments.size + 16),
                "DG_CACHE_CONNECT_TIMEOUT_MS": "2000",  # a machine that is busy is no failure
            }
        )
        pid = stack.enter_context(
            running_daemon(dg_cached, environment=environment, log=place / "log")
        )
        server.create_bucket(BUCKET)
        seconds = 120 + 3 * arguments.size
        bench = Bench(place, server, environment, seconds, interruption, console)
        ways = (
            Way("stock", "stock", (str(deltaglider),)),
            Way("dg-cached", "cached", (str(dg_cache), "deltaglider")),
        )
        show = Show(console, VERSIONS + 2 * VERSIONS + 2 * RUNS)
        with show.shown():
            versions = _make_versions(bench, arguments.size, show)
            uploads = _upload(bench, ways, versions, show)
            bench.run(str(dg_cache), "clear")
            downloads = _download(bench, ways, versions, show)
        console.print(table([uploads, downloads]))
        console.print(_explain(arguments.size, _peak_megabytes(pid)))
        return [uploads, downloads]


def _make_versions(bench: Bench, megabytes: int, show: Show) -> dict[Path, str]:
    """Make the archives; return them with their digests."""
    versions = {}
    for version in range(1, VERSIONS + 1):
        path = bench.place / "versions" / f"app-1.{version}.zip"
        check = bench.interruption.check
        with show.step(f"make version {version} of {VERSIONS}"):
            write_version(path, megabytes=megabytes, version=version, after_member=check)
            versions[path] = bench.sha256(path)
    return versions


def _upload(bench: Bench, ways: tuple[Way, Way], versions: Mapping[Path, str], show: Show) -> Phase:
    def once(way: Way, path: Path) -> Result:
        measured, gets = bench.copy(way, str(path), way.url(path.name))
        remark = bench.remark()
        identical = _stored_sha256(bench, way, path.name) == versions[path]
        return Result(measured.seconds, measured.peak_bytes, gets, identical, remark)

    return _phase("upload", ways, list(versions), once, show)


def _download(
    bench: Bench, ways: tuple[Way, Way], versions: Mapping[Path, str], show: Show
) -> Phase:
    def once(way: Way, path: Path) -> Result:
        arrived = bench.place / "download.zip"
        measured, gets = bench.copy(way, way.url(path.name), str(arrived))
        identical = bench.sha256(arrived) == versions[path]
        arrived.unlink()
        return Result(measured.seconds, measured.peak_bytes, gets, identical, bench.remark())

    return _phase("download", ways, [list(versions)[-1]] * RUNS, once, show)


def _phase(
    name: str,
    ways: tuple[Way, Way],
    paths: Sequence[Path],
    once: Callable[[Way, Path], Result],
    show: Show,
) -> Phase:
    pairs = []
    for number, path in enumerate(paths, start=1):
        results = []
        for way in ways:
            with show.step(f"{name} {number} of {len(paths)}, {way.name}"):
                results.append(once(way, path))
        pairs.append(Pair(f"{name} {number}", *results))
    return Phase(name, pairs)


def _stored_sha256(bench: Bench, way: Way, name: str) -> str:
    """Return the digest of what S3 holds under a name, decoded with xdelta3 alone."""
    reference, delta, decoded = (bench.place / part for part in ("reference", "delta", "decoded"))
    bench.server.save(BUCKET, f"{way.prefix}{REFERENCE_SUFFIX}", reference)
    bench.server.save(BUCKET, f"{way.prefix}/{name}.delta", delta)
    bench.run("xdelta3", "-d", "-f", "-s", str(reference), str(delta), str(decoded))
    digest = bench.sha256(decoded)
    for path in (reference, delta, decoded):
        path.unlink()
    return digest


def _peak_megabytes(pid: int) -> float:
    """Return the largest resident set a living process had (proc(5), VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(
        int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line[:6] == "VmHWM:"
    )


def _explain(megabytes: int, daemon_megabytes: float) -> str:
    return (
        f"\nArchives of {megabytes} MB. GETs are those of reference.bin, counted at the S3 server. "
        f"Memory is the peak of one process, xdelta3 included; dg-cached, which serves them all, "
        f"took {daemon_megabytes:.0f} MB, and {megabytes} MB more while a reference is read. It "
        f"was cleared before download 1."
    )


def _judge(console: Console, phases: Sequence[Phase]) -> int:
    wrong = failures(phases)
    for line in wrong:
        console.print(f"FAILED: {line}", style="red")
    if not wrong:
        console.print(
            "All bytes are identical, and no warm run through dg-cached fetched a reference.",
            style="green",
        )
    return EXIT_FAILED if wrong else 0


def _parse(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="DeltaGlider with and without dg-cached, on five versions of an archive.",
    )
    parser.add_argument("--size", type=_size, default=100, metavar="MB", help="of one version")
    add_place_options(parser)
    return parser.parse_args(argv)


def _size(text: str) -> int:
    if text.isascii() and text.isdecimal() and 1 <= int(text) <= 2000:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number of MB from 1 to 2000, got {text!r}")


if __name__ == "__main__":
    sys.exit(main())
