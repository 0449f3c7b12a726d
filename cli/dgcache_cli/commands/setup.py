"""config, completion: how dg-cache is set up on this account."""

import argparse
import os
from typing import Any

from dgcache import Settings
from dgcache.connecting import connect
from dgcache_cli import exits
from dgcache_cli.output import print_fields, print_json, print_table
from dgcache_cli.patience import patient
from dgcache_core.errors import CacheError
from dgcache_core.settings import ClientSettings, DaemonSettings, Resolved, as_text, declared


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this group's commands."""
    config = commands.add_parser("config", help="each effective setting and where it comes from")
    form = config.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument(
        "--example", action="store_true", help="print a settings file with every setting, commented"
    )
    config.set_defaults(run=_config)

    completion = commands.add_parser("completion", help="print completions for a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    completion.set_defaults(run=_completion)


def _config(arguments: argparse.Namespace) -> int:
    from dgcache_cli.example import example
    from dgcache_cli.findings import daemon_from_here, findings

    if arguments.example:
        print(example(), end="")
        return exits.OK
    client, here = Settings.resolved(), daemon_from_here(os.environ)
    status = _status_of_daemon(client.settings)
    found = findings(os.environ, client, status)
    shown = {
        "client": _effective(Settings, client),
        "daemon": None if status is None else status["settings"],
        "next_daemon": _effective(DaemonSettings, here),
    }
    if arguments.json:
        print_json({**shown, "findings": found})
        return exits.OK
    running = shown["daemon"]
    titles = {
        "client": shown["client"],
        "daemon" if running else "daemon: not running; dg-cache start would give it": (
            running or shown["next_daemon"]
        ),
    }
    for title, settings in titles.items():
        print(title)
        print_table(("setting", "value", "from"), [_row(one) for one in settings or []], (1, 2))
    print_fields([("finding", text) for text in found])
    return exits.OK


def _effective(
    kind: type[ClientSettings | DaemonSettings],
    resolved: "Resolved[Settings] | Resolved[DaemonSettings]",
) -> list[dict[str, Any]]:
    """Return each value with its origin; a key is "set" or not, and no more is told."""
    return [
        {
            "name": one.variable,
            "value": as_text(field, getattr(resolved.settings, field)),
            "origin": resolved.origins[field],
            "meaning": one.meaning,
        }
        for field, one in declared(kind).items()
    ]


def _row(one: dict[str, Any]) -> tuple[str, str, str]:
    said_already = one["origin"] == f"environment {one['name']}"
    return one["name"], one["value"], "environment" if said_already else one["origin"]


def _status_of_daemon(settings: Settings) -> dict[str, Any] | None:
    try:
        daemon = connect(patient(settings))
    except CacheError:
        return None
    try:
        return daemon.status()
    finally:
        daemon.close()


def _completion(arguments: argparse.Namespace) -> int:
    import shtab

    from dgcache_cli.main import make_parser

    print(shtab.complete(make_parser(), shell=arguments.shell))
    return exits.OK
