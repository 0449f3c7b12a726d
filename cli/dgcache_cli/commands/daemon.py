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
from dgcache_cli import exits
from dgcache_cli.output import human_seconds, human_size, print_fields, print_json
from dgcache_cli.patience import patient
from dgcache_core.errors import CacheError, CacheUnavailableError
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
    from dgcache_cli.findings import findings

    client = Settings.resolved()
    status = _ask(client.settings)
    found = findings(os.environ, client, status)
    if arguments.json:
        print_json({**status, "findings": found})
    else:
        print_fields([*_described(status), *(("finding", text) for text in found)])
    return exits.OK


def _described(status: dict[str, Any]) -> list[tuple[str, str]]:
    store, hardening = status["store"], status["hardening"]
    used = store["blob_bytes"] + store["handout_bytes"] + store["reserved_bytes"]
    supervised = "under systemd" if status["supervisor"] == "systemd" else "on its own"
    asked = store["hits"] + sum(store["misses"].values())
    misses = ", ".join(f"{count} {reason}" for reason, count in sorted(store["misses"].items()))
    return [
        ("dg-cached", f"{status['build']}, pid {status['pid']}, {supervised}"),
        ("up for", human_seconds(status["uptime_seconds"])),
        ("directory", status["directory"]),
        ("logs to", status["log"]),
        (
            "memory",
            f"{human_size(used)} of {human_size(store['max_bytes'])}: "
            f"{human_size(store['blob_bytes'])} encrypted, "
            f"{human_size(store['handout_bytes'])} held by clients, "
            f"{human_size(store['reserved_bytes'])} in progress",
        ),
        ("pressure", _pressure(status["pressure"], store)),
        ("disk", _disk(status["disk"])),
        (
            "references",
            f"{store['entries']} for {store['bindings']} deltaspaces; "
            f"largest possible {human_size(store['max_entry_bytes'])}",
        ),
        ("saved", f"{store['hits']} GETs, {human_size(store['hit_bytes'])}"),
        (
            "hits",
            f"{store['hits']} of {asked} lookups, {store['shared_hits']} without a decryption",
        ),
        ("misses", misses or "none"),
        (
            "stores",
            f"{store['stores']} ({human_size(store['stored_bytes'])}), "
            f"{store['refused_stores']} refused, {store['evictions']} evicted, "
            f"{store['expirations']} expired, {store['corruptions']} corrupt",
        ),
        (
            "clients",
            f"{status['sessions']} sessions, {status['connections']} connections, "
            f"{status['stores_in_progress']} stores in progress",
        ),
        ("fetches", _fetches(status["leases"])),
        (
            "protection",
            f"keys in {hardening['keys']}, "
            f"{'dumpable' if hardening['dumpable'] else 'not dumpable'}, "
            f"core limit {hardening['core_limit_bytes']} B, umask {hardening['umask']:04o}",
        ),
        ("confined", _confined(hardening)),
        ("watched by", _monitor(status["monitor"])),
        ("security", _security(status["security_events"])),
    ]


def _confined(hardening: dict[str, Any]) -> str:
    """One line about what is in effect; `doctor` judges it."""
    if not hardening.get("kernel"):
        return "unknown: an older dg-cached runs, see dg-cache restart"
    refuses = ", ".join(hardening["landlock_refuses"])
    parts = [
        f"Landlock ABI {hardening['landlock_abi']} ({refuses})" if refuses else "no Landlock",
        "no new privileges" if hardening["no_new_privileges"] else "new privileges possible",
        "no capabilities" if not hardening["capabilities"] else "capabilities",
        "filtered system calls" if hardening["filters_system_calls"] else "any system call",
        "own user namespace" if hardening["user_namespace"] else "no user namespace of its own",
        f"/ {'read-only' if hardening['root_read_only'] else 'writable'}",
        f"home {hardening['home']}",
        "network" if hardening["network"] else "no network",
        f"swap to {hardening['swap']}" if hardening["swap"] else "no swap",
    ]
    return f"{'; '.join(parts)}: see dg-cache doctor"


def _fetches(leases: dict[str, Any]) -> str:
    if not leases:
        return "unknown: an older dg-cached runs, see dg-cache restart"
    return (
        f"{leases['held']} in progress, {leases['waiting']} waiting for them; "
        f"{leases['saved']} GETs saved by waiting"
    )


def _monitor(monitor: dict[str, Any]) -> str:
    if not monitor:
        return "nothing: an older dg-cached runs, see dg-cache restart"
    watched = f"{monitor['mechanism']}, {monitor['watched_directories']} directories"
    rescans = f", {monitor['rescans']} rescans" if monitor["rescans"] else ""
    reason = f"; {monitor['disabled_reason']}" if monitor["disabled_reason"] else ""
    return watched + rescans + reason


def _security(counts: dict[str, int]) -> str:
    if not counts:
        return "no events"
    by_kind = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return f"{by_kind}: see dg-cache events"


def _disk(disk: dict[str, Any]) -> str:
    """One line about the disk tier."""
    if not disk:
        return "no disk tier (DG_CACHE_DISK_SIZE_MB)"
    if not disk["enabled"]:
        return f"switched off: {disk['disabled_reason']}"
    life = "outlives the daemon" if disk["persistent"] else "ends with the daemon"
    return (
        f"{human_size(disk['bytes'])} of {human_size(disk['max_bytes'])}, "
        f"{disk['entries']} references; {disk['loads']} came back, {disk['evictions']} evicted, "
        f"{disk['corruptions']} corrupt; {life}"
    )


def _pressure(pressure: dict[str, Any], store: dict[str, Any]) -> str:
    """One line about memory pressure; a daemon of an older version says nothing of it."""
    if not pressure:
        return "unknown"
    by = "alarms and samples" if pressure["psi"] else "samples"
    if not pressure["shrinks"]:
        return f"none so far; watched by {by}"
    limit, budget = pressure["limit_bytes"], store["max_bytes"]
    now = f"limited to {human_size(limit)} of" if limit < budget else "over, again"
    return (
        f"{now} {human_size(budget)}; lowered {pressure['shrinks']} times, "
        f"{store['pressure_evictions']} evicted, the last "
        f"{human_seconds(pressure['seconds_since'])} ago: {pressure['cause']}"
    )


def _logs(arguments: argparse.Namespace) -> int:
    try:
        where = _ask(Settings.from_environment())["log"]
    except CacheError:
        where = str(launcher.default_log_file(os.environ))
        if not Path(where).exists():
            where = "journal" if shutil.which("journalctl") else where
    if where == "journal":
        journal = ["journalctl", "--user", "--unit", "dg-cached", "--lines", str(arguments.lines)]
        return _run([*journal, *(["--follow"] if arguments.follow else [])])
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


def _run(argv: list[str]) -> int:
    try:
        return subprocess.run(argv, check=False).returncode
    except FileNotFoundError as error:
        raise CacheUnavailableError(f"{argv[0]} is not installed") from error
