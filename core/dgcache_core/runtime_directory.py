"""Where the two sockets are: the same choice for daemon and client, never below /tmp.

In order: what was asked for; `$XDG_RUNTIME_DIR/dg-cached` (XDG Base Directory Specification);
`/run/user/UID/dg-cached`, for su, cron and sudo, which carry a wrong or no XDG_RUNTIME_DIR;
`/run/dg-cached/UID`, where the administrator made one; below the home, keyed by the machine, since
homes are shared over NFS.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dgcache_core.directories import open_private_directory
from dgcache_core.errors import CacheRefusedError, DaemonAbsentError

SESSION_SOCKET = "session.sock"
RPC_SOCKET = "rpc.sock"
DAEMON_LOCK = "daemon.lock"
"""Held by whoever serves in the directory, from its first socket to its very end."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One place for the sockets, and the directory that must exist for the place to be usable."""

    path: Path
    needs: Path


def candidates(explicit: Path | None, environ: Mapping[str, str]) -> list[Candidate]:
    """Return the places to try, best first; only the explicit one where there is one."""
    if explicit is not None:
        return [Candidate(explicit, Path("/"))]
    uid = os.geteuid()
    bases = [Path("/run/user") / str(uid)]
    if environ.get("XDG_RUNTIME_DIR", "").startswith("/"):
        bases.insert(0, Path(environ["XDG_RUNTIME_DIR"]))
    places = [Candidate(base / "dg-cached", base) for base in bases]
    administrators = Path("/run/dg-cached") / str(uid)
    places.append(Candidate(administrators, administrators))
    if environ.get("HOME", "").startswith("/"):
        home = Path(environ["HOME"])
        places.append(Candidate(home / ".cache/deltaglider/run" / machine_key(), home))
    return list({place.path: place for place in places}.values())


def machine_key() -> str:
    """Return 16 hexadecimal digits that name this machine and do not tell its machine-id
    (machine-id(5) asks for a keyed hash)."""
    try:
        name = Path("/etc/machine-id").read_text().strip()
    except OSError:
        name = os.uname().nodename
    import hashlib

    return hashlib.sha256(f"dg-cached {name}".encode()).hexdigest()[:16]


def open_where_served(places: list[Candidate]) -> tuple[Path, int]:
    """Return the first vetted place that has a session socket, and its descriptor.

    Raises:
        CacheRefusedError: there is none, and a place that exists failed its check.
        DaemonAbsentError: there is none.
    """
    refusal: CacheRefusedError | None = None
    for place in places:
        try:
            descriptor = open_private_directory(place.path)
        except FileNotFoundError:
            continue
        except CacheRefusedError as error:
            refusal = refusal or error
            continue
        try:
            os.stat(SESSION_SOCKET, dir_fd=descriptor, follow_symlinks=False)
        except FileNotFoundError:
            os.close(descriptor)
            continue
        return place.path, descriptor
    if refusal is not None:
        raise refusal
    raise DaemonAbsentError("no dg-cached is running: start it with dg-cache start")


def make_first_usable(places: list[Candidate]) -> tuple[Path, int, list[CacheRefusedError]]:
    """Return the first place that passes, made where missing, with what was wrong with the others.

    Raises:
        CacheRefusedError: no place passes.
    """
    refusals: list[CacheRefusedError] = []
    for place in places:
        try:
            if not place.needs.is_dir():
                continue
        except OSError:  # it cannot even be looked at
            continue
        try:
            return place.path, open_private_directory(place.path, create=True), refusals
        except CacheRefusedError as error:
            refusals.append(error)
    raise (
        refusals[0]
        if refusals
        else CacheRefusedError("there is no place for the sockets: set DG_CACHE_SOCKET_DIR")
    )
