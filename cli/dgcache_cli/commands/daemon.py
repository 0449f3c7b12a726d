"""start, stop, restart, status, logs: the daemon itself."""

import argparse
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgcache import Settings, ending, launcher
from dgcache.connecting import connect
from dgcache_cli import exits, instance
from dgcache_cli.output import print_fields, print_json
from dgcache_cli.patience import patient
from dgcache_core.errors import CacheError, CacheRefusedError, CacheUnavailableError
from dgcache_core.settings import DaemonSettings, declared

_UNITS = ("dg-cached.socket", "dg-cached.service")


def _from_here(text: str) -> Path:
    """Return a path that means the same in the daemon, whose working directory is /."""
    return Path(text).absolute()


_OPTIONS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "memory_size_mb": (float, "MB", "its byte budget in MiB"),
    "ttl_seconds": (float, "S", "life of an entry"),
    "disk_size_mb": (float, "MB", "budget of its disk tier in MiB; 0: none"),
    "cache_dir": (_from_here, "DIR", "base directory of its disk tier"),
    "encryption_key_file": (_from_here, "FILE", "private file that holds its key"),
}
"""What `start` passes on to the daemon; never the key itself."""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this group's commands."""
    start = commands.add_parser("start", help="start the daemon; returns when it serves")
    _add_options(start)
    start.set_defaults(run=_start)

    stop = commands.add_parser("stop", help="stop the daemon; returns when it has ended")
    _add_force(stop)
    stop.set_defaults(run=_stop)

    restart = commands.add_parser("restart", help="stop, then start with the same options")
    _add_options(restart)
    _add_force(restart)
    restart.set_defaults(run=_restart)

    status = commands.add_parser("status", help="how the daemon is, and what it saved")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_status)

    logs = commands.add_parser("logs", help="what the daemon logged")
    logs.add_argument("-n", "--lines", type=int, default=50, metavar="N", help="the last N lines")
    logs.add_argument("-f", "--follow", action="store_true", help="go on with new lines")
    logs.set_defaults(run=_logs)


def _add_options(parser: argparse.ArgumentParser) -> None:
    for name, (kind, metavar, text) in _OPTIONS.items():
        parser.add_argument(_flag(name), type=kind, metavar=metavar, help=text)


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force", action="store_true", help="kill it where it does not end within 20 s"
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _start(arguments: argparse.Namespace) -> int:
    settings = Settings.from_environment()
    waiting = instance.instance_of(os.environ, settings.socket_dir)
    if waiting is not None and not waiting.pid:
        instance.start(waiting, os.environ, settings.socket_dir)
        print(f"{waiting.service} serves")
        return exits.OK
    options: list[str] = []
    for name in _OPTIONS:
        if getattr(arguments, name) is not None:
            options += [_flag(name), str(getattr(arguments, name))]
    started = launcher.start(os.environ, settings.socket_dir, options=tuple(options))
    if started is not None:
        started.returncode = 0  # it lives on without us
    status = _ask(settings)
    serving = f"in {status['directory']} (pid {status['pid']})"
    print(
        f"dg-cached started {serving}"
        if started is not None
        else f"dg-cached already serves {serving}"
    )
    return exits.OK


def _stop(arguments: argparse.Namespace) -> int:
    settings = Settings.from_environment()
    theirs = instance.instance_of(os.environ, settings.socket_dir)
    if theirs is not None:
        print(instance.stop(theirs, os.environ, settings.socket_dir, force=arguments.force))
        return exits.OK
    serving = ending.find(settings.socket_dir, os.environ)
    if serving is None and not _units_listen():
        print("dg-cached is not running")
        return exits.OK
    if serving is None or serving.unit == _UNITS[1]:
        return _systemctl("stop", *_UNITS)
    ending.stop(settings.socket_dir, os.environ, force=arguments.force)
    print(f"dg-cached (pid {serving.pid}) stopped")
    return exits.OK


def _units_listen() -> bool:
    """Tell whether systemd's sockets wait for a first client, with no daemon as yet."""
    if shutil.which("systemctl") is None:
        return False
    active = ["systemctl", "--user", "--quiet", "is-active", _UNITS[0]]
    return subprocess.run(active, check=False, stderr=subprocess.DEVNULL).returncode == 0


def _restart(arguments: argparse.Namespace) -> int:
    settings = Settings.from_environment()
    theirs = instance.instance_of(os.environ, settings.socket_dir)
    if theirs is not None:
        instance.restart(theirs, os.environ, settings.socket_dir, force=arguments.force)
        print(f"{theirs.service} serves")
        return exits.OK
    serving = ending.find(settings.socket_dir, os.environ)
    if serving is not None and serving.unit == _UNITS[1]:
        return _systemctl("restart", _UNITS[1])
    if serving is not None:
        _take_over_flags(arguments, _settings_of_daemon(settings))
    return _stop(arguments) or _start(arguments)


def _settings_of_daemon(settings: Settings) -> list[dict[str, str]]:
    try:
        effective: list[dict[str, str]] = _ask(settings)["settings"]
    except CacheError as error:  # whatever is wrong, it ends all the same
        print(f"dg-cache: {error}; it starts with default options", file=sys.stderr)
        return []
    return effective


def _take_over_flags(arguments: argparse.Namespace, settings: list[dict[str, str]]) -> None:
    """Let options that are not given now be those the daemon was started with."""
    given = {one["name"]: one["value"] for one in settings if one["origin"] == "flag"}
    for name, one in declared(DaemonSettings).items():
        if name in _OPTIONS and getattr(arguments, name) is None and one.variable in given:
            setattr(arguments, name, given[one.variable])


def _systemctl(verb: str, *units: str) -> int:
    done = subprocess.run(["systemctl", "--user", verb, *units], check=False)  # noqa: S607
    if done.returncode != 0:
        raise CacheUnavailableError(
            f"systemctl --user {verb} failed: see systemctl --user status {units[-1]}"
        )
    return exits.OK


def _ask(settings: Settings) -> dict[str, Any]:
    backend = connect(patient(settings))
    try:
        status: dict[str, Any] = backend.status()
        return status
    finally:
        backend.close()


def _status(arguments: argparse.Namespace) -> int:
    from dgcache_cli.description import described
    from dgcache_cli.findings import findings
    from dgcache_cli.kernel_features import features
    from dgcache_cli.lingering import lingering_here

    client = Settings.resolved()
    status = _ask(client.settings)
    found = findings(os.environ, client, status)
    here = {"kernel": features(), "lingering": lingering_here()}
    if arguments.json:
        print_json({**status, "here": here, "findings": found})
    else:
        print_fields([*described(status), *here.items(), *(("finding", text) for text in found)])
    return exits.OK


def _logs(arguments: argparse.Namespace) -> int:
    settings = Settings.from_environment()
    theirs = instance.instance_of(os.environ, settings.socket_dir)
    if theirs is not None:
        return _logs_of(theirs, arguments)
    try:
        where = _ask(settings)["log"]
    except CacheError:
        where = str(launcher.default_log_file(os.environ))
        if not Path(where).exists():
            where = "journal" if shutil.which("journalctl") else where
    if where == "journal":
        return _journal(arguments, "--user", "--unit", "dg-cached")
    if where == "stderr":
        raise CacheUnavailableError(
            "this dg-cached runs in the foreground and logs to its terminal"
        )
    if arguments.follow:
        return _run(["tail", "-n", str(arguments.lines), "-F", where])
    try:
        with Path(where).open(errors="replace") as log:
            sys.stdout.writelines(deque(log, maxlen=max(0, arguments.lines)))
    except FileNotFoundError as error:
        raise CacheUnavailableError(
            f"there is no log at {where}: start with dg-cache start"
        ) from error
    return exits.OK


def _logs_of(theirs: instance.Instance, arguments: argparse.Namespace) -> int:
    """An account's own journal has what its instance logged, unless it is a system account's."""
    if _journal(arguments, "--unit", theirs.service) != 0:
        raise CacheRefusedError(
            "this account may not read that journal: an administrator can, with "
            f"sudo journalctl --unit {theirs.service}"
        )
    return exits.OK


def _journal(arguments: argparse.Namespace, *which: str) -> int:
    wanted = ["--lines", str(arguments.lines), *(["--follow"] if arguments.follow else [])]
    return _run(["journalctl", *which, *wanted])


def _run(argv: list[str]) -> int:
    try:
        return subprocess.run(argv, check=False).returncode
    except FileNotFoundError as error:
        raise CacheUnavailableError(f"{argv[0]} is not installed") from error
