"""config, install, completion: how dg-cache is set up on this account."""

import argparse
import os
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from dgcache import Settings
from dgcache.cache import connect
from dgcache_cli import exits
from dgcache_cli.commands.daemon import patient
from dgcache_cli.output import print_fields, print_json, print_table
from dgcache_core.errors import CacheError, CacheUnavailableError, InvalidReferenceError
from dgcache_core.settings import ClientSettings, DaemonSettings, Resolved, as_text, declared

_UNITS = ("dg-cached.socket", "dg-cached.service")
_PLACEHOLDER = "@DG_CACHED@"


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this group's commands."""
    config = commands.add_parser("config", help="each effective setting and where it comes from")
    form = config.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument(
        "--example", action="store_true", help="print a settings file with every setting, commented"
    )
    config.set_defaults(run=_config)

    install = commands.add_parser("install", help="put the systemd user units in place")
    install.add_argument(
        "--units-only",
        action="store_true",
        required=True,
        help="write the units and nothing else: nothing is enabled or started",
    )
    install.set_defaults(run=_install)

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


def _install(_: argparse.Namespace) -> int:
    program = _daemon_program()
    directory = unit_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for unit in _UNITS:
            text = _unit_source(unit).replace(_PLACEHOLDER, str(program).replace("%", "%%"))
            _write_whole(directory / unit, text)
            print(f"wrote {directory / unit}")
    except OSError as error:
        raise InvalidReferenceError(f"cannot write to {directory}: {error.strerror}") from error
    if _runs_on_its_own():
        print(
            "first: dg-cache stop, since the units cannot serve beside the dg-cached that runs now"
        )
    print("next: systemctl --user daemon-reload && systemctl --user enable --now dg-cached.socket")
    return exits.OK


def _runs_on_its_own() -> bool:
    try:
        daemon = connect(patient(Settings.from_environment()))
    except CacheError:
        return False
    try:
        return bool(daemon.status()["supervisor"] != "systemd")
    finally:
        daemon.close()


def _daemon_program() -> Path:
    """Return the dg-cached beside this interpreter: the one that belongs to this installation."""
    beside = Path(sys.executable).with_name("dg-cached")
    found = str(beside) if beside.exists() else shutil.which("dg-cached")
    if found is None:
        raise CacheUnavailableError("dg-cached is not installed beside this dg-cache: reinstall it")
    return Path(found).absolute()


def unit_directory() -> Path:
    """Return where the user's own units are (systemd.unit(5))."""
    config = os.environ.get("XDG_CONFIG_HOME", "")
    base = Path(config) if config.startswith("/") else Path.home() / ".config"
    return base / "systemd" / "user"


def _unit_source(unit: str) -> str:
    """Read a unit from the wheel, or from the tree in an editable installation."""
    packaged = files("dgcache_cli") / "units" / unit
    if packaged.is_file():
        return packaged.read_text()
    return (Path(__file__).parents[3] / "systemd" / unit).read_text()


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.chmod(0o644)
    temporary.replace(path)


def _completion(arguments: argparse.Namespace) -> int:
    import shtab

    from dgcache_cli.main import make_parser

    print(shtab.complete(make_parser(), shell=arguments.shell))
    return exits.OK
