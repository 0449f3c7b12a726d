"""What is judged of this account, whether a daemon runs or not."""

import os
import pwd
import resource
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from dgcache_cli.diagnosis import Finding, Level, judged
from dgcache_cli.lingering import enabling, lingers
from dgcache_core.directories import open_private_directory
from dgcache_core.errors import CacheRefusedError
from dgcache_core.runtime_directory import candidates

_LEAST_DESCRIPTORS = 1024


def of_surroundings(
    environ: Mapping[str, str], socket_dir: Path | None, units: Path, instance: str = ""
) -> Iterator[Finding]:
    """Judge places, units, account and limits.

    Args:
        environ: this process's.
        socket_dir: the place of the sockets that the settings name, if they do.
        units: the directory of the user's systemd units.
        instance: the unit of the system's manager that serves this account, if one does; it needs
            neither units of the user's nor lingering.
    """
    yield from _places(environ, socket_dir)
    if instance:
        yield Finding(Level.OK, "units", f"{instance}, of the system's manager")
    else:
        yield from _unit(units)
        yield from _lingering()
    yield _descriptors()
    yield _xdelta3(environ)


def _places(environ: Mapping[str, str], socket_dir: Path | None) -> Iterator[Finding]:
    """Each place where sockets may be, and why one is refused. Nothing is made."""
    usable = False
    for place in candidates(socket_dir, environ):
        try:
            os.close(open_private_directory(place.path))
            found = "is private"
        except FileNotFoundError:
            if not place.needs.is_dir():
                continue
            found = "would be made"
        except CacheRefusedError as error:
            message, _, mend = str(error).partition(": ")
            yield Finding(
                Level.BAD, "place", message, "clients and daemon refuse such a directory", mend
            )
            continue
        except OSError as error:
            yield Finding(Level.WARN, "place", f"{place.path}: {error.strerror}")
            continue
        if not usable:
            yield Finding(Level.OK, "place", f"{place.path} {found}")
        usable = True
    if not usable:
        yield Finding(
            Level.BAD,
            "place",
            "none for the sockets",
            "no daemon can start",
            "set DG_CACHE_SOCKET_DIR",
        )


def _unit(units: Path) -> Iterator[Finding]:
    try:
        text = (units / "dg-cached.service").read_text()
    except OSError:
        yield Finding(Level.OK, "units", "none installed (dg-cache install)")
        return
    line = next((one for one in text.splitlines() if one.startswith("ExecStart=")), "")
    with suppress(ValueError):
        words = shlex.split(line.removeprefix("ExecStart="))
        program = words[0].replace("%%", "%") if words else ""
        yield judged(
            Level.OK if os.access(program, os.X_OK) else Level.BAD,
            "units",
            f"start {program or 'nothing'}"
            + ("" if os.access(program, os.X_OK) else ", which is no program"),
            "systemd cannot start the daemon",
            "dg-cache install",
        )
    enabled = (units / "sockets.target.wants" / "dg-cached.socket").is_symlink()
    yield judged(
        Level.OK if enabled else Level.WARN,
        "socket unit",
        "enabled" if enabled else "not enabled",
        "after the next login nobody listens",
        "systemctl --user enable --now dg-cached.socket",
    )


def _lingering() -> Iterator[Finding]:
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return
    answer = lingers(user)
    if answer is not None:
        yield judged(
            Level.OK if answer else Level.WARN,
            "lingering",
            "on" if answer else "off",
            "under systemd the daemon ends with the last login; cron and CI log in nowhere",
            enabling(user),
        )


def _descriptors() -> Finding:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    well = hard == resource.RLIM_INFINITY or hard >= _LEAST_DESCRIPTORS
    return judged(
        Level.OK if well else Level.WARN,
        "descriptors",
        f"at most {'any number' if hard == resource.RLIM_INFINITY else hard}",
        "each session and each reference that is held takes some",
        f"ulimit -Hn {_LEAST_DESCRIPTORS} or more (limits.conf(5))",
    )


def _xdelta3(environ: Mapping[str, str]) -> Finding:
    found = shutil.which("xdelta3", path=environ.get("PATH"))
    return judged(
        Level.OK if found else Level.WARN,
        "xdelta3",
        found or "not found",
        "DeltaGlider cannot encode or decode without it",
        "sudo apt-get install xdelta3",
    )
