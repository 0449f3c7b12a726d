"""The template's instance that serves an account: the system's manager has its sockets.

Only root starts and stops what that manager runs. An account may end its own daemon by a signal,
and wake it as every client does: the socket unit goes on listening. What an account cannot do is
said with the command for an administrator. Nothing here connects to a socket just to look: that
would start the daemon.
"""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dgcache import ending, launcher
from dgcache_cli.manager import Manager
from dgcache_cli.places import SYSTEM_SOCKETS
from dgcache_core.errors import CacheError, CacheUnavailableError
from dgcache_core.runtime_directory import SESSION_SOCKET, candidates, open_where_served

_SERVICE = re.compile(r"dg-cached@([0-9]+)\.service")
_UNIX_SOCKETS = Path("/proc/net/unix")
_LISTENS = "00010000"  # __SO_ACCEPTCON
_WAKE_SECONDS = 20.0
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance, by the uid that is its name, and the daemon in it, if one runs."""

    uid: int
    pid: int = 0

    @property
    def service(self) -> str:
        """Return the unit of the daemon."""
        return f"dg-cached@{self.uid}.service"

    @property
    def socket(self) -> str:
        """Return the unit of the sockets, without which no client starts the daemon."""
        return f"dg-cached@{self.uid}.socket"


def instance_of(environ: Mapping[str, str], socket_dir: Path | None) -> Instance | None:
    """Return the instance that clients from here find; None where they find another daemon or none.

    Root finds the instance whose directory is named.
    """
    if os.geteuid() == 0 and socket_dir is not None and socket_dir.parent == SYSTEM_SOCKETS:
        is_uid = socket_dir.name.isdecimal()
        return Instance(int(socket_dir.name)) if is_uid and _listens_in(socket_dir) else None
    serving = ending.find(socket_dir, environ)
    if serving is not None:
        found = _SERVICE.fullmatch(serving.unit)
        return Instance(int(found[1]), serving.pid) if found else None
    try:
        directory, descriptor = open_where_served(candidates(socket_dir, environ))
    except CacheError:
        return None
    os.close(descriptor)
    is_ours = directory == SYSTEM_SOCKETS / str(os.geteuid())
    return Instance(os.geteuid()) if is_ours and _listens_in(directory) else None


def start(instance: Instance, environ: Mapping[str, str], socket_dir: Path | None) -> None:
    """Return when its daemon serves.

    Raises:
        CacheUnavailableError: it does not come up.
    """
    if os.geteuid() == 0:
        Manager(environ, is_system=True).run("start", instance.service)
    else:
        _wake(instance, environ, socket_dir)


def stop(
    instance: Instance, environ: Mapping[str, str], socket_dir: Path | None, *, force: bool
) -> str:
    """End its daemon; root also ends the listening. Return what there is to say.

    Raises:
        CacheUnavailableError: it does not end.
    """
    if os.geteuid() == 0:
        Manager(environ, is_system=True).run("stop", instance.socket, instance.service)
        return f"{instance.socket} and {instance.service} stopped"
    ended = ending.stop(socket_dir, environ, force=force)
    what = "dg-cached is not running" if ended is None else f"dg-cached (pid {ended.pid}) stopped"
    return (
        f"{what}; {instance.socket} listens, so the next client starts it: "
        f"an administrator ends that with sudo systemctl stop {instance.socket}"
    )


def restart(
    instance: Instance, environ: Mapping[str, str], socket_dir: Path | None, *, force: bool
) -> None:
    """End its daemon and return when another serves.

    Raises:
        CacheUnavailableError: the one does not end, or the other does not come up.
    """
    if os.geteuid() == 0:
        Manager(environ, is_system=True).run("restart", instance.service)
        return
    ending.stop(socket_dir, environ, force=force)
    _wake(instance, environ, socket_dir)


def _wake(instance: Instance, environ: Mapping[str, str], socket_dir: Path | None) -> None:
    """Ask until a daemon answers. The first to ask may be sent away: by the socket, which is root's
    until a daemon took it over, or by systemd, which empties the queue when the last one ends."""
    deadline = time.monotonic() + _WAKE_SECONDS
    while not launcher.is_serving(socket_dir, environ):
        if time.monotonic() > deadline:
            raise CacheUnavailableError(
                f"{instance.socket} listens and no daemon comes: see sudo systemctl status "
                f"{instance.service}"
            )
        time.sleep(_LOOK_SECONDS)


def _listens_in(directory: Path) -> bool:
    """Tell whether somebody listens on the session socket there (proc_net(5), unix)."""
    wanted = str(directory / SESSION_SOCKET)
    try:
        lines = _UNIX_SOCKETS.read_text().splitlines()
    except OSError:
        return False
    return any(
        len(fields) == 8 and fields[3] == _LISTENS and fields[7] == wanted
        for fields in (line.split(maxsplit=7) for line in lines)
    )
