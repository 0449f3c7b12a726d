"""events: what the daemon saw happen to its files and sockets that it did not do itself."""

import argparse
import json
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dgcache import Settings
from dgcache.connecting import connect
from dgcache_cli import exits
from dgcache_cli.patience import patient

_EPILOG = """\
The daemon keeps the last 256 security events; `dropped` tells how many came before one and are not
kept any more, or came too fast for --follow. They are in the log, too, with priority crit:

  journalctl --user --unit dg-cached --priority crit
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this group's commands."""
    events = commands.add_parser(
        "events",
        help="security events: what others did to the cache's files",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    events.add_argument("-f", "--follow", action="store_true", help="go on with new ones")
    events.add_argument("--json", action="store_true", help="print one JSON object per line")
    events.set_defaults(run=_events)


def _events(arguments: argparse.Namespace) -> int:
    backend = connect(patient(Settings.from_environment()))
    describe = json.dumps if arguments.json else _described
    seen = False
    try:
        for event in backend.events(follow=arguments.follow):
            seen = True
            print(describe(event))
            sys.stdout.flush()  # who follows through a pipe waits for the line
        if not (seen or arguments.json):
            print("no security events")
    finally:
        backend.close()
    return exits.OK


def _described(event: Mapping[str, Any]) -> str:
    when = datetime.fromtimestamp(event["time_seconds"]).astimezone().isoformat(" ", "seconds")
    fields = (f"{name}={_quoted(value)}" for name, value in sorted(event["fields"].items()))
    lost = [f"({event['dropped']} before it are lost)"] if event["dropped"] else []
    return " ".join([when, event["severity"], event["kind"], *fields, *lost])


def _quoted(value: str) -> str:
    """A value comes from outside: it must neither forge a line nor steer the terminal."""
    return (
        value if value.isascii() and value.isprintable() and " " not in value else json.dumps(value)
    )
