"""`python -m tests.soak --minutes 15`: run the soak; exit status 1 if an invariant is broken."""

import argparse
import os
import secrets
import sys
from contextlib import ExitStack

from tests.soak.report import invariants, show
from tests.soak.run import PARTS, Progress, harm, soak

_EPILOG = """\
It needs root, because it mounts small file systems, makes a control group, and looks at the
daemon's descriptors. The clock of one daemon is stepped where libfaketime is installed."""


def main() -> int:
    """Run the soak as the command line says."""
    arguments = _parse()
    seconds = arguments.minutes * 60
    if arguments.schedule:
        for part, faults in enumerate(harm(arguments.seed + 1, seconds, PARTS), 1):
            for fault in faults:
                print(f"part {part} {fault.at_seconds:9.2f} s  {fault.kind}  {fault.choice}")
        return 0
    if os.geteuid() != 0:
        print("the soak needs root: sudo make soak", file=sys.stderr)
        return 2
    print(f"seed {arguments.seed}", file=sys.stderr)
    with ExitStack() as stack:
        outcome = soak(
            arguments.seed,
            seconds,
            clients=arguments.clients,
            warm_up_seconds=max(10.0, min(300.0, seconds / 3)),
            say=_progress(stack),
        )
    show(outcome, json=arguments.json)
    return 0 if all(one.holds for one in invariants(outcome)) else 1


def _progress(stack: ExitStack) -> Progress:
    if not sys.stderr.isatty():
        return lambda _: None
    from rich.console import Console

    status = stack.enter_context(Console(stderr=True).status("starting"))
    return status.update


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, epilog=_EPILOG
    )
    parser.add_argument("--minutes", type=float, default=15, help="of the soak (default 15)")
    parser.add_argument("--clients", type=int, default=4, help="at each of the two daemons")
    parser.add_argument(
        "--seed", type=int, default=secrets.randbelow(1 << 31), help="of an earlier run"
    )
    parser.add_argument("--schedule", action="store_true", help="only print the faults")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
