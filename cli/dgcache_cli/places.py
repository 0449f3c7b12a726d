"""Everything dg-cached keeps outside its units: where it is, whose it is, and how it goes.

A place is opened once, without following a link, and what is removed is that very directory (see
`removals`). It stays where it is a link, belongs to somebody else, is used by a process (each has a
lock on what it uses), or belongs to another machine that shares the home.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from dgcache import launcher, start_lock
from dgcache_cli.removals import Removal, remove
from dgcache_cli.trees import Rules, identity
from dgcache_core.disk_names import LOCK as TIER_LOCK
from dgcache_core.disk_names import tier_directory
from dgcache_core.errors import CacheRefusedError
from dgcache_core.runtime_directory import (
    DAEMON_LOCK,
    RPC_SOCKET,
    SESSION_SOCKET,
    candidates,
    machine_key,
)
from dgcache_core.settings_files import user_file

SYSTEM_SOCKETS = Path("/run/dg-cached")
"""Where instances of the template listen; the system's manager makes and removes what is there."""
_SOCKET_FILES = (RPC_SOCKET, SESSION_SOCKET, DAEMON_LOCK, start_lock.START_LOCK, "inner.sock")


@dataclass(frozen=True, slots=True)
class Place:
    """A directory of ours.

    Args:
        path: where it is.
        what: what it holds, for people.
        lock: the file in it that whoever uses it has locked; "." where it is itself locked.
        files: the only names files in it may have; any where it is empty.
    """

    path: Path
    what: str
    lock: str | None = None
    files: tuple[str, ...] = ()


def find_places(
    environ: Mapping[str, str], socket_dir: Path | None, bases: list[Path]
) -> list[Place]:
    """Return what is there.

    Args:
        environ: of the account.
        socket_dir: the place of the sockets, if one was named.
        bases: base directories of what is kept in files (`DG_CACHE_DIR`).
    """
    places = [place for base in dict.fromkeys(bases) for place in _below(base)]
    named = [*candidates(socket_dir, environ), *candidates(None, environ)]
    for path in dict.fromkeys(candidate.path for candidate in named):
        if path.parent != SYSTEM_SOCKETS:
            places.append(Place(path, "sockets and locks", DAEMON_LOCK, _SOCKET_FILES))
    file = user_file(environ)
    if file is not None:
        places.append(Place(file.parent, "settings and key"))
    with suppress(RuntimeError):  # there is no home
        places.append(Place(launcher.default_log_file(environ).parent, "logs"))
    return [place for place in places if os.path.lexists(place.path)]


def others(bases: list[Path]) -> list[Path]:
    """Return disk tiers of other machines below the same bases."""
    tiers = [tier_directory(base) for base in dict.fromkeys(bases)]
    return [
        path
        for tier in tiers
        if tier.parent.is_dir()
        for path in sorted(tier.parent.iterdir())
        if path.name != tier.name
    ]


def remove_place(place: Place) -> Removal:
    """Remove a place with what is in it, as far as it is ours."""
    result = Removal()
    try:
        _remove(place, result)
    except CacheRefusedError as error:
        result.leave(str(place.path), str(error), by_rule=True)
    except OSError as error:
        result.leave(str(place.path), error.strerror or str(error), by_rule=False)
    return result


def _below(base: Path) -> Iterator[Place]:
    yield Place(tier_directory(base), "disk tier", TIER_LOCK)
    ephemeral = base / "v2" / "ephemeral"
    with suppress(OSError):
        for path in sorted(ephemeral.glob(f"{machine_key()}-*")):
            yield Place(path, "of an in-process cache", ".")


def _remove(place: Place, result: Removal) -> None:
    with ExitStack() as stack:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        if place.path.is_symlink():
            raise CacheRefusedError(f"a link to {place.path.readlink()}")
        itself = os.open(place.path, flags)
        stack.callback(os.close, itself)
        status = os.fstat(itself)
        if status.st_uid != os.geteuid():
            raise CacheRefusedError(f"it belongs to uid {status.st_uid}")
        if place.lock is not None and not _locked(stack, itself, place.lock):
            raise CacheRefusedError("a process uses it")
        parent = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=itself)
        stack.callback(os.close, parent)
        rules = Rules(
            is_expected=lambda name, _: not place.files or _is_named(name, place.files),
            otherwise="it is not a file of dg-cached's",
        )
        remove(parent, place.path.name, identity(status), rules, result)


def _locked(stack: ExitStack, directory: int, name: str) -> bool:
    """Take the lock of whoever uses it; True where there is none to take."""
    try:
        lock = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return True
    stack.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_named(name: str, files: tuple[str, ...]) -> bool:
    """Tell a file of ours by its name, a socket that was not yet renamed included."""
    temporary = name.startswith(".") and len(name) == 17 and name[1:].isalnum()
    return name in files or temporary
