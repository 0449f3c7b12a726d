"""install: put the systemd units in place, start them, and see that the daemon answers."""

import argparse
import os
import pwd
from pathlib import Path
from typing import Any

from dgcache import Settings, ending
from dgcache.connecting import connect
from dgcache_cli import exits, template, units
from dgcache_cli.lingering import enabling, lingers
from dgcache_cli.manager import Manager
from dgcache_cli.patience import patient
from dgcache_cli.placing import put
from dgcache_cli.steps import Steps
from dgcache_core.errors import CacheError, CacheRefusedError, CacheUnavailableError

_DESCRIPTION = """\
Put the units of dg-cached in place for this account, enable the sockets and
start the daemon. Each step is said, with the path of what it changed; at last
the daemon is asked whether it answers. Saying it twice changes nothing.

A unit that differs is replaced, and the lines that go are shown; changes of
your own belong into a drop-in (systemctl --user edit dg-cached), which stays.

Where no user manager answers (cron, CI, containers), the units are put in place
and enabled for the next login, and the exit status is 69. For accounts that
never log in there is --system.
"""

_EPILOG = """\
examples:
  dg-cache install               this account, from now on
  dg-cache install --dry-run     what that would do
  dg-cache install --replace     also where a dg-cached runs that dg-cache start made
  sudo dg-cache install --system the template dg-cached@UID, for any account

exit status:
  0 the daemon answers; 69 no manager, or the daemon does not answer;
  77 refused: nothing was changed
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this group's command."""
    install = commands.add_parser(
        "install",
        help="put the systemd units in place, enable and start them",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = install.add_mutually_exclusive_group()
    which.add_argument(
        "--units-only",
        action="store_true",
        help="write the units and nothing else: nothing is enabled or started",
    )
    which.add_argument(
        "--system",
        action="store_true",
        help="as root: put the template in place from which any account can be served",
    )
    install.add_argument(
        "--replace", action="store_true", help="stop a dg-cached that runs on its own"
    )
    install.add_argument("--dry-run", action="store_true", help="say what it would do")
    install.add_argument("--json", action="store_true", help="print JSON")
    install.set_defaults(run=_install)


def _install(arguments: argparse.Namespace) -> int:
    with Steps(as_json=arguments.json, dry_run=arguments.dry_run) as steps:
        if arguments.system:
            template.install(steps, Manager(os.environ, is_system=True))
            return exits.OK
        if arguments.units_only:
            return _put_units(steps)
        return _install_for_account(steps, stop_other=arguments.replace)


def _put_units(steps: Steps) -> int:
    put(steps, units.user_directory(os.environ), units.USER_UNITS)
    if status_of_other(Settings.from_environment()) is not None:
        steps.find(
            "first:",
            "dg-cache stop",
            "the units cannot serve beside the dg-cached that runs now",
        )
    steps.find(
        "next:", f"systemctl --user daemon-reload && systemctl --user enable --now {units.SOCKET}"
    )
    return exits.OK


def _install_for_account(steps: Steps, *, stop_other: bool) -> int:
    settings = Settings.from_environment()
    directory = units.user_directory(os.environ)
    manager = Manager(os.environ)
    trouble = manager.why_out_of_reach()
    other = None if trouble else status_of_other(settings)
    if other is not None and not stop_other:
        raise CacheRefusedError(
            f"a dg-cached runs on its own (pid {other['pid']}) in {other['directory']}: "
            "dg-cache stop, then again; dg-cache install --replace does both"
        )
    changed = put(steps, directory, units.USER_UNITS)
    _enable(steps, manager, directory)
    if trouble:
        raise CacheUnavailableError(
            f"no user manager answers ({trouble}): the units count from the next login on; where "
            "nobody logs in (cron, CI), dg-cache start, or sudo dg-cache install --system"
        )
    if other is not None:
        pid = f"pid {other['pid']}"
        steps.do(
            "stop",
            f"dg-cached ({pid})",
            lambda: ending.stop(settings.socket_dir, os.environ),
            "it ran on its own",
        )
    steps.do("reload", "the user manager", lambda: manager.run("daemon-reload"))
    _start(steps, manager, directory, is_changed=changed)
    if not steps.dry_run:
        _verify(steps, settings)
    _warn_of_lingering(steps)
    return exits.OK


def _enable(steps: Steps, manager: Manager, directory: Path) -> None:
    link = directory / "sockets.target.wants" / units.SOCKET
    if link.is_symlink():
        steps.find("unchanged", link, "enabled")
        return
    steps.do("enable", units.SOCKET, lambda: manager.enable(units.SOCKET), str(link))


def _start(steps: Steps, manager: Manager, directory: Path, *, is_changed: bool) -> None:
    if not steps.dry_run:
        _require_ours(manager, directory)
        manager.run("reset-failed", *units.USER_UNITS)
    active = manager.show(units.SERVICE, "ActiveState")["ActiveState"] == "active"
    both = " and ".join(units.USER_UNITS)
    if active and not is_changed:
        steps.find("unchanged", units.SERVICE, "it runs")
        return
    if active:
        # a socket cannot be made anew below a service that uses it
        steps.do("stop", both, lambda: manager.run("stop", *units.USER_UNITS))
    try:
        steps.do("start", both, lambda: manager.run("start", *units.USER_UNITS))
    except CacheUnavailableError as error:
        said = manager.show(units.SERVICE, "StatusText").get("StatusText", "")
        raise CacheUnavailableError(
            f"{said or error}: see systemctl --user status {units.SERVICE}"
        ) from error


def _require_ours(manager: Manager, directory: Path) -> None:
    """The manager may look elsewhere: it has an environment of its own."""
    for name in units.USER_UNITS:
        path = manager.show(name, "FragmentPath").get("FragmentPath", "")
        if not path or Path(path).resolve() != (directory / name).resolve():
            raise CacheUnavailableError(
                f"the user manager takes {name} from {path or 'nowhere'}, not from {directory}: "
                "is XDG_CONFIG_HOME another one there? see systemctl --user show-environment"
            )


def _verify(steps: Steps, settings: Settings) -> None:
    """Ask as any client does, on the sockets that any client finds."""
    try:
        status = ask(settings)
    except CacheError as error:
        where = f" (socket_dir is {settings.socket_dir})" if settings.socket_dir else ""
        raise CacheUnavailableError(
            f"the units run, and clients do not reach the daemon{where}: {error}"
        ) from error
    if status["supervisor"] != "systemd":
        raise CacheUnavailableError(
            f"clients reach another dg-cached (pid {status['pid']}) in {status['directory']}: "
            "dg-cache stop ends it"
        )
    steps.find("serves", status["directory"], f"dg-cached {status['build']}, pid {status['pid']}")


def _warn_of_lingering(steps: Steps) -> None:
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return
    if lingers(user) is False:
        steps.warn(
            "lingering is off: the daemon ends with your last session, and cron and CI find none "
            f"before you log in: {enabling(user)}"
        )


def status_of_other(settings: Settings) -> dict[str, Any] | None:
    """Return the status of a daemon that no manager of units started, where one serves."""
    try:
        status = ask(settings)
    except CacheError:
        return None
    return status if status["supervisor"] != "systemd" else None


def ask(settings: Settings) -> dict[str, Any]:
    """Return the status of the daemon that clients reach.

    Raises:
        CacheError: they reach none.
    """
    daemon = connect(patient(settings))
    try:
        return dict(daemon.status())
    finally:
        daemon.close()
