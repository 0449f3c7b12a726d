"""The template of the system's manager: for accounts that have no manager of their own.

An instance is named by the account's uid, since clients look into /run/dg-cached/UID. Putting the
template in place serves nobody as yet; an administrator enables it for each account.
"""

import os
from functools import partial
from pathlib import Path

from dgcache_cli import units
from dgcache_cli.manager import Manager
from dgcache_cli.placing import put, take
from dgcache_cli.steps import Steps
from dgcache_core.directories import read_trusted_file
from dgcache_core.errors import CacheRefusedError

_INSTANCES = ("dg-cached@*.socket", "dg-cached@*.service")
_CACHES = Path("/var/cache/dg-cached")
_MOST_PROGRAM_BYTES = 1 << 20
_KEPT = (
    (Path("/etc/dg-cached"), "settings and ceilings of the administrator's"),
    (_CACHES, "disk tiers"),
)


def install(steps: Steps, manager: Manager) -> None:
    """Put the template in place.

    Raises:
        CacheRefusedError: this is not root, or nobody else could start the daemon's program.
        CacheUnavailableError: the manager refused something.
    """
    _require_root()
    _require_program_for_all(units.daemon_program())
    put(steps, units.SYSTEM_DIRECTORY, units.SYSTEM_UNITS)
    trouble = manager.why_out_of_reach()
    if trouble:
        steps.find("left", "the system's manager", f"it does not answer ({trouble})")
    else:
        steps.do("reload", "the system's manager", lambda: manager.run("daemon-reload"))
    steps.find("next:", "systemctl enable --now dg-cached@$(id -u ACCOUNT).service")


def uninstall(steps: Steps, manager: Manager, *, purge: bool) -> None:
    """Stop every instance, and take the template and what enabled it away.

    Raises:
        CacheRefusedError: this is not root, or something cannot be removed.
        CacheUnavailableError: the manager refused something.
    """
    _require_root()
    reachable = manager.why_out_of_reach() is None
    if reachable:
        _stop_instances(steps, manager)
        if purge:
            _clean(steps, manager)
    take(steps, units.SYSTEM_DIRECTORY, units.SYSTEM_UNITS)
    if reachable:
        steps.do("reload", "the system's manager", lambda: manager.run("daemon-reload"))
    for path, what in _KEPT:
        if os.path.lexists(path):
            steps.find("left", path, what)


def _stop_instances(steps: Steps, manager: Manager) -> None:
    for name in manager.loaded(*_INSTANCES):
        steps.do("stop", name, partial(_stop, manager, name))


def _stop(manager: Manager, name: str) -> None:
    manager.run("stop", name)
    if manager.show(name, "ActiveState").get("ActiveState") == "failed":
        manager.run("reset-failed", name)


def _clean(steps: Steps, manager: Manager) -> None:
    """Let systemd remove the caches: it knows whose each is, and follows no link."""
    names = sorted(path.name for path in _CACHES.iterdir()) if _CACHES.is_dir() else []
    for uid in filter(str.isdecimal, names):
        service = f"dg-cached@{uid}.service"
        steps.do("remove", _CACHES / uid, partial(manager.run, "clean", "--what=cache", service))
    if not steps.dry_run and _CACHES.is_dir() and not any(_CACHES.iterdir()):
        _CACHES.rmdir()


def _require_program_for_all(program: Path) -> None:
    """Whoever can write it is every account it is started for; and each must come as far."""
    read_trusted_file(program, _MOST_PROGRAM_BYTES)
    for place in (program.resolve(), *program.resolve().parents):
        if not place.stat().st_mode & 0o001:
            raise CacheRefusedError(
                f"other accounts cannot start {program}, since {place} is closed to them: "
                "install dg-cached where they can, for example with python3 -m venv /opt/dg-cached"
            )


def _require_root() -> None:
    if os.geteuid() != 0:
        raise CacheRefusedError("the template is for root to place: run it with sudo")
