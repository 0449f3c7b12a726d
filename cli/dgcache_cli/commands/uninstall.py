"""uninstall: undo install, and say what went and what is left; with --purge nothing is."""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from dgcache import Settings, ending
from dgcache_cli import exits, template, units
from dgcache_cli.commands.cleanup import shown
from dgcache_cli.commands.install import ask
from dgcache_cli.manager import Manager
from dgcache_cli.output import human_size
from dgcache_cli.places import SYSTEM_SOCKETS, Place, find_places, others, remove_place
from dgcache_cli.placing import remove_empty, take
from dgcache_cli.removals import Removal
from dgcache_cli.steps import Steps
from dgcache_core.errors import CacheError, CacheUnavailableError, SettingsError
from dgcache_core.settings import base_directory

_DESCRIPTION = """\
Undo dg-cache install: stop the daemon and its sockets, remove the units and the
link that enabled them, and say what went and what is left. Clients go on
without a cache.

Left are drop-ins, and what was not of the install: settings and key, disk tier,
logs, sockets' directories. --purge removes these, too, and stops a dg-cached
that runs on its own. It follows no link and removes nothing of other accounts,
other machines or other programs. A shim and a line with completions in a
shell's file are where you put them.
"""

_EPILOG = """\
examples:
  dg-cache uninstall                   what is left is listed
  dg-cache uninstall --purge --dry-run what would go
  dg-cache uninstall --purge           leave nothing of dg-cached in this account
  sudo dg-cache uninstall --system     the template, and every instance

exit status:
  0 done, or nothing to do; 69 the manager that runs the daemon is out of reach;
  77 something of yours could not be removed
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this group's command."""
    uninstall = commands.add_parser(
        "uninstall",
        help="undo install; --purge leaves nothing",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    uninstall.add_argument(
        "--purge", action="store_true", help="remove settings, key, disk tier and logs, too"
    )
    uninstall.add_argument(
        "--system", action="store_true", help="as root: the template and its instances"
    )
    uninstall.add_argument("--dry-run", action="store_true", help="say what it would do")
    uninstall.add_argument("--json", action="store_true", help="print JSON")
    uninstall.set_defaults(run=_uninstall)


def _uninstall(arguments: argparse.Namespace) -> int:
    with Steps(as_json=arguments.json, dry_run=arguments.dry_run) as steps:
        if arguments.system:
            manager = Manager(os.environ, is_system=True)
            template.uninstall(steps, manager, purge=arguments.purge)
            return exits.OK
        return _uninstall_for_account(steps, purge=arguments.purge)


def _uninstall_for_account(steps: Steps, *, purge: bool) -> int:
    directory = units.user_directory(os.environ)
    settings, bases = _settings(steps)
    manager = Manager(os.environ)
    trouble = manager.why_out_of_reach()
    status = None if _would_wake(manager, trouble) else _status(settings)
    if status is not None:
        if trouble and _is_of_user_manager(status):
            raise CacheUnavailableError(
                f"a user manager that cannot be reached ({trouble}) runs dg-cached "
                f"(pid {status['pid']}): run this in a login session"
            )
        bases += _bases_of(status)
    if not trouble:
        _stop_units(steps, manager, directory)
    take(steps, directory, units.USER_UNITS)
    remove_empty(steps, directory, Path.home())
    if not trouble:
        steps.do("reload", "the user manager", partial(_reload, manager))
    _end_other(steps, settings, status, purge=purge)
    places = find_places(os.environ, settings.socket_dir, bases)
    removals = [_purge_or_list(steps, place, purge=purge) for place in places]
    for path in others(bases):
        steps.find("left", path, "another machine's disk tier")
    if purge:
        _remove_empty_bases(steps, bases)
    incomplete = any(one.failed or one.stopped is not None for one in removals)
    return exits.REFUSED if incomplete else exits.OK


def _would_wake(manager: Manager, trouble: str | None) -> bool:
    """Tell whether the manager starts the daemon for whoever asks it something."""
    if trouble:
        return False
    states = [manager.show(name, "ActiveState").get("ActiveState") for name in units.USER_UNITS]
    return states[0] == "active" != states[1]


def _is_of_user_manager(status: dict[str, Any]) -> bool:
    of_system = Path(status["directory"]).parent == SYSTEM_SOCKETS
    return status["supervisor"] == "systemd" and not of_system


def _bases_of(status: dict[str, Any]) -> list[Path]:
    """Return where the daemon that runs has its disk tier, wherever it has that from."""
    directory = status["disk"].get("directory", "")
    return [Path(directory).parents[2]] if directory.startswith("/") else []


def _remove_empty_bases(steps: Steps, bases: list[Path]) -> None:
    for base in bases:
        top = Path.home() if Path.home() in base.parents else base
        for name in ("disk", "ephemeral"):
            remove_empty(steps, base / "v2" / name, top)


def _settings(steps: Steps) -> tuple[Settings, list[Path]]:
    """Return the settings, and the bases of what is kept in files, the default's among them."""
    from dgcache_cli.findings import daemon_from_here

    bases = [base_directory(None)]
    try:
        settings = Settings.from_environment()
        bases += [base_directory(settings.cache_dir)]
        bases += [base_directory(daemon_from_here(os.environ).settings.cache_dir)]
    except SettingsError as error:
        steps.warn(f"settings were not looked at, what they lead to is left: {error}")
        return Settings(), bases
    return settings, list(dict.fromkeys(bases))


def _stop_units(steps: Steps, manager: Manager, directory: Path) -> None:
    """The sockets first, or a client that comes now starts the daemon again."""
    for name in units.USER_UNITS:
        seen = manager.show(name, "ActiveState", "FragmentPath")
        path = seen.get("FragmentPath", "")
        if seen.get("ActiveState") in ("inactive", "failed", None):
            continue
        if path and Path(path).resolve() != (directory / name).resolve():
            steps.find("left", name, f"it is of {path}")
            continue
        steps.do("stop", name, partial(manager.run, "stop", name))


def _reload(manager: Manager) -> None:
    for name in units.USER_UNITS:
        if manager.show(name, "ActiveState").get("ActiveState") == "failed":
            manager.run("reset-failed", name)
    manager.run("daemon-reload")


def _status(settings: Settings) -> dict[str, Any] | None:
    try:
        return ask(settings)
    except CacheError:
        return None


def _end_other(
    steps: Steps, settings: Settings, status: dict[str, Any] | None, *, purge: bool
) -> None:
    """Deal with a daemon that is not of the units of this account."""
    if status is None or _is_of_user_manager(status):
        return
    name = f"dg-cached (pid {status['pid']})"
    if status["supervisor"] == "systemd":
        steps.find("left", name, "the system's manager runs it: dg-cache uninstall --system")
    elif purge:
        stop = partial(ending.stop, settings.socket_dir, os.environ)
        steps.do("stop", name, stop, "it ran on its own")
    else:
        steps.find("left", name, "it runs on its own: dg-cache stop")


def _purge_or_list(steps: Steps, place: Place, *, purge: bool) -> Removal:
    if not purge:
        steps.find("left", place.path, place.what)
        return Removal()
    if steps.dry_run:
        steps.do("remove", place.path, lambda: None, place.what)
        return Removal()
    removal = remove_place(place)
    if not os.path.lexists(place.path):
        size = f", {human_size(removal.size)}" if removal.size else ""
        steps.do("remove", place.path, lambda: None, f"{place.what}{size}")
    for left in removal.left:
        steps.find("left", shown(str(place.path.parent / left.path)), shown(left.reason))
    remove_empty(steps, place.path.parent, Path.home())
    return removal
