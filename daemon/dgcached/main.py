"""`dg-cached`: the entry point that reads the environment, once, and runs the daemon."""

import argparse
import asyncio
import logging
import math
import os
import sys
from pathlib import Path

from dgcache_core.errors import CacheRefusedError, SettingsError
from dgcache_core.key_sources import choose_key
from dgcache_core.settings import MEBIBYTE, DaemonSettings, Resolved, clamped, declared
from dgcache_core.settings_files import read_settings
from dgcached import BUILD, logs
from dgcached.hardening import (
    detach,
    forget_environment,
    harden,
    overwrite_variable,
    raise_descriptor_limit,
)
from dgcached.heap import limit_heaps
from dgcached.host_memory import Budget, choose_budget
from dgcached.limits import Limits
from dgcached.sockets import AlreadyServing, Listeners
from dgcached.supervisor import Notifier, supervised_by_systemd, take_listeners

EX_USAGE = 2
EX_ALREADY = 75
EX_REFUSED = 77
EX_SETTINGS = 78

_KEY_VARIABLE = declared(DaemonSettings)["encryption_key"].variable
_FLAGS = set(declared(DaemonSettings)) - {"encryption_key"}  # never on a command line

_EPILOG = """\
examples:
  dg-cached                          serve in the foreground, log to standard error
  DG_CACHE_MEMORY_SIZE_MB=512 dg-cached
  systemctl --user start dg-cached   under systemd (dg-cache install)
  dg-cache start                     in the background
  dg-cache status                    what it does now

exit status:
  0 stopped by SIGTERM or SIGINT; 2 usage; 72 its directory, lock or inner socket was
  taken away; 75 another dg-cached already serves there; 77 a directory or socket failed
  its check; 78 a setting does not parse
"""


def main(argv: list[str] | None = None) -> int:
    """Run the daemon and return its exit status."""
    harden()
    limit_heaps()
    arguments = _parse(argv)
    notifier = Notifier()
    try:
        handed_over = take_listeners()
    except CacheRefusedError as error:
        return _fail(notifier, EX_REFUSED, str(error))
    detach({notifier.fileno(), *(listener.fileno() for listener in handed_over)})
    forget_environment(os.environ)
    try:
        resolved = _settings(arguments)
    except SettingsError as error:
        return _fail(notifier, EX_SETTINGS, str(error))
    try:
        log = logs.set_up(arguments.log_file, verbose=arguments.verbose)
    except OSError as error:
        return _fail(notifier, EX_REFUSED, f"{arguments.log_file}: {error.strerror}")
    for finding in resolved.findings:
        logs.event(logging.WARNING, "settings", finding=finding)
    resolved, budget = _budget(resolved)
    if budget.clamped:
        logs.event(
            logging.WARNING,
            "budget-clamped",
            wanted_bytes=budget.wanted_bytes,
            max_bytes=budget.max_bytes,
            effective_memory_bytes=budget.effective_bytes,
        )
    from dgcached.server import open_listeners  # grpc is loaded only once the settings are right

    limits = Limits()
    try:
        listeners = open_listeners(resolved.settings, os.environ, handed_over, limits)
    except AlreadyServing as answer:
        return _fail(notifier, EX_ALREADY, f"{answer}: see dg-cache status")
    except CacheRefusedError as error:
        return _fail(notifier, EX_REFUSED, str(error))
    raise_descriptor_limit()
    supervisor = "systemd" if supervised_by_systemd() else "none"
    return asyncio.run(_serve(resolved, budget, listeners, notifier, limits, supervisor, log))


def _settings(arguments: argparse.Namespace) -> Resolved[DaemonSettings]:
    """Read every setting, the key included, and take the key out of the environment."""
    flags = {name: value for name, value in vars(arguments).items() if name in _FLAGS}
    try:
        resolved = read_settings(DaemonSettings, os.environ, flags)
        return choose_key(resolved, os.environ.get("CREDENTIALS_DIRECTORY", ""))
    finally:
        overwrite_variable(_KEY_VARIABLE)
        os.environ.pop(_KEY_VARIABLE, None)


def _budget(
    resolved: Resolved[DaemonSettings],
) -> tuple[Resolved[DaemonSettings], Budget]:
    """Choose the byte budget below the administrator's ceiling and what memory there is."""
    wanted = resolved.settings.memory_size_mb
    budget = choose_budget(wanted)
    ceiling, setter = resolved.ceilings.get("memory_size_mb", (math.inf, ""))
    if budget.max_bytes > ceiling * MEBIBYTE:  # the default's: a wish was clamped before
        resolved = clamped(resolved, "memory_size_mb", ceiling, setter)
        budget = choose_budget(ceiling)
    elif budget.clamped:
        largest = budget.max_bytes / MEBIBYTE
        resolved = clamped(resolved, "memory_size_mb", largest, "host memory", wanted)
    return resolved, budget


async def _serve(
    resolved: Resolved[DaemonSettings],
    budget: Budget,
    listeners: Listeners,
    notifier: Notifier,
    limits: Limits,
    supervisor: str,
    log: str,
) -> int:
    from dgcached.server import Daemon

    daemon = Daemon(resolved, budget, listeners, notifier, limits, supervisor=supervisor, log=log)
    daemon.confine()
    return await daemon.run()


def _fail(notifier: Notifier, status: int, message: str) -> int:
    notifier.notify(STATUS=message, ERRNO="1")
    priority = "<3>" if logs.stderr_is_journal() else ""
    print(f"{priority}dg-cached: {message}", file=sys.stderr)
    return status


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dg-cached",
        description="Keep DeltaGlider's reference files warm for every process of this user.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--memory-size-mb", type=float, metavar="MB", help="byte budget (DG_CACHE_MEMORY_SIZE_MB)"
    )
    parser.add_argument(
        "--ttl-seconds", type=float, metavar="S", help="life of an entry (DG_CACHE_TTL_SECONDS)"
    )
    parser.add_argument(
        "--socket-dir", type=Path, metavar="DIR", help="place of the sockets (DG_CACHE_SOCKET_DIR)"
    )
    parser.add_argument(
        "--disk-size-mb", type=float, metavar="MB", help="disk tier (DG_CACHE_DISK_SIZE_MB)"
    )
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="base of the disk tier (DG_CACHE_DIR)"
    )
    parser.add_argument(
        "--encryption-key-file",
        type=Path,
        metavar="FILE",
        help="private file with the key (DG_CACHE_ENCRYPTION_KEY_FILE)",
    )
    parser.add_argument(
        "--log-file",
        type=Path,
        metavar="FILE",
        help="log there instead of standard error, at most 1 MiB and the file before it",
    )
    parser.add_argument("--verbose", action="store_true", help="log every detail")
    parser.add_argument("--version", action="version", version=f"dg-cached {BUILD}")
    arguments, rest = parser.parse_known_args(argv)
    words = [word for word in rest if not word.startswith("-")]
    if words:
        parser.error(
            f"this is the daemon and takes no commands; did you mean `dg-cache {words[0]}`?"
        )
    if rest:
        parser.error(f"unknown option {rest[0]}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
