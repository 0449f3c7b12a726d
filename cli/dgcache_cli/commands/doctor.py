"""doctor: whether everything is as it should be, why it matters, and what mends it."""

import argparse
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dgcache import Settings
from dgcache.connecting import connect
from dgcache_cli import exits
from dgcache_cli.diagnosis import Finding, Level, of_daemon
from dgcache_cli.output import print_fields, print_json
from dgcache_core.errors import CacheError, DaemonAbsentError

UNHEALTHY = 1
"""Exit status where something is bad."""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this group's commands."""
    doctor = commands.add_parser("doctor", help="what is not as it should be, and what mends it")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--problems", action="store_true", help="leave out what is well")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    found = _all()
    shown = [one for one in found if not (arguments.problems and one.level is Level.OK)]
    if arguments.json:
        print_json([asdict(one) for one in shown])
    else:
        print_fields([(one.level.value, _text(one)) for one in shown])
    return UNHEALTHY if any(one.level is Level.BAD for one in found) else exits.OK


def _text(one: Finding) -> str:
    lines = [f"{one.what}: {one.found}"]
    lines += [f"because {one.why}"] if one.why else []
    lines += [f"mend: {one.mend}"] if one.mend else []
    return "\n".join(lines)


def _all() -> list[Finding]:
    from dgcache_cli.findings import findings
    from dgcache_cli.kernel_features import of_kernel, swap_limit
    from dgcache_cli.patience import patient
    from dgcache_cli.supervision import Supervision
    from dgcache_cli.surroundings import of_surroundings
    from dgcache_cli.units import user_directory

    client = Settings.resolved()
    found: list[Finding] = []
    status: dict[str, Any] | None = None
    instance = ""
    try:
        backend = connect(patient(client.settings))
        try:
            status = backend.status()
        finally:
            backend.close()
    except DaemonAbsentError:
        found.append(Finding(Level.OK, "daemon", "not running (dg-cache start)"))
    except CacheError as error:
        found.append(
            Finding(Level.BAD, "daemon", str(error), "clients fall back and share nothing")
        )
    if status is not None:
        found.append(_version(status))
        supervision = Supervision(status, os.environ)
        instance = supervision.instance
        found += of_daemon(status, forgoes_namespaces=supervision.forgoes_namespaces())
    found += [
        Finding(Level.WARN, "settings", text) for text in findings(os.environ, client, status)
    ]
    directory = user_directory(os.environ)
    found += of_surroundings(os.environ, client.settings.socket_dir, directory, instance)
    found += of_kernel()
    found.append(swap_limit(_groups_of(status), _swaps()))
    return found


def _swaps() -> str:
    with suppress(OSError):
        return Path("/proc/swaps").read_text()
    return ""


def _groups_of(status: Mapping[str, Any] | None) -> str:
    """Return the control groups of the daemon; ours where none runs, or none that is seen here."""
    for pid in (status["pid"] if status else "self", "self"):
        with suppress(OSError):
            return Path(f"/proc/{pid}/cgroup").read_text()
    return ""


def _version(status: dict[str, Any]) -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("dg-cached")
    except PackageNotFoundError:
        own = status["build"]
    running = f"{status['build']}, pid {status['pid']}"
    if own == status["build"]:
        return Finding(Level.OK, "daemon", running)
    return Finding(
        Level.WARN,
        "daemon",
        f"{running}; this is {own}",
        "what is installed is not what runs",
        "dg-cache restart",
    )
