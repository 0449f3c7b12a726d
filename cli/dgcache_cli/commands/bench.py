"""bench: implementations of a reference cache, measured and attacked on this machine."""

import argparse
import errno
import os
import sys
from pathlib import Path

from dgcache_cli import exits
from dgcache_core.errors import (
    CacheError,
    CacheFullError,
    CacheUnavailableError,
    InvalidReferenceError,
)

_RUNS = 7
_QUICK_RUNS = 3
_MOST_RUNS = 1000
_MOST_MB = 10_000
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE})

_EPILOG = """\
examples:
  dg-cache bench --quick
  dg-cache bench --sizes 0.5,50 --runs 15 --json
  dg-cache bench --report bench.md --chart bench.svg

The daemon that is measured is a private one. Whatever is made, in a directory
below $TMPDIR, is removed at the end.
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this group's commands."""
    bench = commands.add_parser(
        "bench",
        help="compare implementations of such a cache on this machine",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument(
        "--sizes", type=_sizes, default="1,10,100", metavar="MB,...", help="default: 1,10,100"
    )
    bench.add_argument(
        "--runs", type=_runs, metavar="N", help=f"rounds at each size (default: {_RUNS})"
    )
    bench.add_argument("--quick", action="store_true", help=f"{_QUICK_RUNS} rounds")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.add_argument("--chart", type=Path, metavar="FILE", help="draw FILE.svg or FILE.png")
    bench.add_argument("--report", type=Path, metavar="FILE", help="write a Markdown document")
    bench.add_argument(
        "--deltaglider",
        default=sys.executable,
        metavar="PYTHON",
        help="an interpreter that has DeltaGlider and dg-cached (default: this one)",
    )
    bench.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from dgcache.platform import require_linux

    require_linux()
    from dgcache_cli.bench.chart import draw, require_drawable
    from dgcache_cli.bench.interruption import Interrupted, Interruption
    from dgcache_cli.bench.report import document, print_findings
    from dgcache_cli.bench.run import run, steps
    from dgcache_cli.output import counted, print_json

    if arguments.chart is not None:
        require_drawable(arguments.chart)
    for path in (arguments.chart, arguments.report):
        _require_writable(path)
    runs = arguments.runs or (_QUICK_RUNS if arguments.quick else _RUNS)
    try:
        with Interruption() as interruption, counted(steps(arguments.sizes, runs)) as step:
            findings = run(
                arguments.sizes, runs, os.environ, arguments.deltaglider, interruption, step
            )
    except Interrupted as signal:
        print(f"dg-cache: {signal}: what was made is removed", file=sys.stderr)
        return signal.exit_status
    except OSError as error:
        raise _without_room(error) from error
    if arguments.chart is not None:
        draw(findings, arguments.chart)
    if arguments.report is not None:
        chart = arguments.chart and os.path.relpath(arguments.chart, arguments.report.parent)
        arguments.report.write_text(document(findings, chart))
    if arguments.json:
        from dataclasses import asdict

        print_json(asdict(findings))
    else:
        print_findings(findings)
    return exits.OK


def _require_writable(path: Path | None) -> None:
    """Check before minutes of measuring; the directory is what may be missing."""
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise InvalidReferenceError(f"cannot write {path}: name a file in a writable directory")


def _without_room(error: OSError) -> CacheError:
    kind = CacheFullError if error.errno in _NO_ROOM else CacheUnavailableError
    return kind(f"the bench cannot go on: {error}")


def _sizes(text: str) -> list[float]:
    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 1,10,100") from None
    if not all(0.001 <= size <= _MOST_MB for size in sizes):
        raise argparse.ArgumentTypeError(f"sizes are from 0.001 to {_MOST_MB} MB")
    return sorted(set(sizes))


def _runs(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_RUNS:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {_MOST_RUNS}")
    return int(text)
