"""What a legacy cache is like, what is wrong with it, and whether it may go.

What a live process may own stays: what one has open, and a directory of one process that changed in
the last 24 h. A directory that only its name makes DeltaGlider's stays where there is a file in it
that DeltaGlider does not write. Where something cannot be told, it stays.
"""

import os
import pwd
import re
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from dgcache_cli.open_files import Holder
from dgcache_cli.trees import Identity, Rules, Survey, identity, survey

LIVE_SECONDS = 86_400.0
"""A process may still own what it changed less than this ago."""

_REFERENCE = re.compile(
    r"reference\.(bin|decrypted|encrypted\.tmp)|(\.tmp\.)?[0-9a-f]{64}|[0-9a-f]{64}\.decrypted"
)


class Kind(StrEnum):
    """Which of DeltaGlider's caches it is."""

    SHARED = "shared"
    PROCESS = "process"
    ACCOUNT = "account"


@dataclass(frozen=True, slots=True)
class Cache:
    """One legacy cache: some names in one directory, which stays open while the search does."""

    kind: Kind
    path: Path
    parent: int
    names: tuple[str, ...]
    only_references: bool
    empties: tuple[int, str] | None = None
    """A directory that goes as well where this leaves it empty, by its parent and name."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a cache is like. Ages are in seconds, sizes in bytes.

    `kept` says why it stays; None where it may go.
    """

    owner_uid: int
    mode: int
    found: Survey
    age_seconds: float
    wrong: tuple[str, ...]
    kept: str | None
    identities: dict[str, Identity]


def judge(cache: Cache, rules: Rules, now: float, holders: Mapping[str, Holder]) -> Judgement:
    """Return what a cache is like; change nothing.

    Args:
        now: seconds since the epoch.
        holders: who has which of `roots` open.
    """
    found, identities = Survey(), {}
    reachable = _is_reachable(path_of(cache.parent))
    for name in cache.names:
        try:
            status = os.stat(name, dir_fd=cache.parent, follow_symlinks=False)
            survey(cache.parent, name, rules, found, reachable=reachable)
            identities[name] = identity(status)
        except FileNotFoundError:  # it went meanwhile
            continue
        except OSError:
            found.unreadable = name
    status = _status_of(cache)
    age = now - found.newest
    holder = next((holders[root] for root in roots(cache) if root in holders), None)
    kept = _reason_to_keep(cache, status, found, age, holder)
    return Judgement(
        owner_uid=status.st_uid,
        mode=stat.S_IMODE(status.st_mode),
        found=found,
        age_seconds=age,
        wrong=tuple(_wrongs(cache, status, found, is_kept=kept is not None)),
        kept=kept,
        identities=identities,
    )


def roots(cache: Cache) -> list[str]:
    """Return the paths a cache consists of, without links."""
    base = path_of(cache.parent)
    return [str(base / name) for name in cache.names]


def path_of(descriptor: int) -> Path:
    """Return a directory's path without links, as the kernel tells it."""
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def is_reference(name: str, status: os.stat_result) -> bool:
    """Tell whether DeltaGlider writes such a file into a cache of its own."""
    return stat.S_ISREG(status.st_mode) and _REFERENCE.fullmatch(name) is not None


def is_plaintext(name: str) -> bool:
    """Tell whether DeltaGlider writes a reference as it is into a file of this name."""
    return name == "reference.bin" or name.endswith(".decrypted")


def name_of(uid: int) -> str:
    """Return an account's name, or its number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _wrongs(cache: Cache, status: os.stat_result, found: Survey, *, is_kept: bool) -> Iterator[str]:
    """Say what is wrong with it, the worst first."""
    is_own = status.st_uid == os.geteuid()
    origin = {
        Kind.SHARED: "shared under a name that anybody on this host can take first",
        Kind.PROCESS: "" if is_kept else "left by a process that ended without removing it",
        Kind.ACCOUNT: "older than format v2: neither DeltaGlider 6 nor dg-cached reads it",
    }
    said = [
        (
            found.exposed,
            f"{_counted('reference', found.exposed)} in plaintext that others can read",
        ),
        (
            found.plaintext - found.exposed,
            f"{_counted('reference', found.plaintext - found.exposed)} in plaintext",
        ),
        (
            found.readable - found.exposed,
            f"{_counted('other file', found.readable - found.exposed)} that others can read",
        ),
        (found.writable, f"{_counted('entry', found.writable)} that others can write to"),
        (not is_own, f"it belongs to {name_of(status.st_uid)}"),
        (
            found.foreign and is_own,
            f"{_counted('entry', found.foreign)} of others in it: they stay",
        ),
        (origin[cache.kind], origin[cache.kind]),
        (
            found.linked,
            f"{_counted('file', found.linked)} with a second name, under which the bytes stay",
        ),
        (
            found.unexpected and not is_kept,
            f"also goes, though DeltaGlider writes no such file: {found.unexpected}",
        ),
        (found.stopped, f"there is more in it: {found.stopped}"),
    ]
    if stat.S_ISDIR(status.st_mode):
        yield from (text for holds, text in said if holds)


def _reason_to_keep(
    cache: Cache, status: os.stat_result, found: Survey, age: float, holder: Holder | None
) -> str | None:
    """Say why it stays, with the command to go on with; the first reason that holds."""
    path, owner = shlex.quote(str(cache.path)), name_of(status.st_uid)
    is_one = cache.kind is not Kind.ACCOUNT
    is_process = cache.kind is Kind.PROCESS
    reasons = [
        (
            stat.S_ISLNK(status.st_mode),
            f"it is a symbolic link, which is not followed: rm -- {path}",
        ),
        (
            is_one and found.mount == cache.names[0],
            f"another file system is mounted there: see findmnt {path}",
        ),
        (
            found.entries == found.foreign,
            f"nothing in it is yours: {owner} removes it with dg-cache cleanup",
        ),
        (
            is_process and status.st_uid != os.geteuid(),
            f"{owner} removes it with dg-cache cleanup",
        ),
        (
            holder is not None,
            f"{holder.command} (pid {holder.pid}) has it open: end it first" if holder else "",
        ),
        (
            is_process and age < LIVE_SECONDS,
            "it changed in the last 24 h: a live process may own it",
        ),
        (
            is_process and found.unreadable,
            f"it cannot be looked into: run chmod -R u+rwX {path}",
        ),
        (
            is_process and (found.stopped or found.unexpected),
            f"{found.unexpected or found.stopped}: not as DeltaGlider makes it; "
            f"look, then rm -r -- {path}",
        ),
    ]
    return next((reason for holds, reason in reasons if holds), None)


def _status_of(cache: Cache) -> os.stat_result:
    if cache.kind is not Kind.ACCOUNT:
        with suppress(FileNotFoundError):
            return os.stat(cache.names[0], dir_fd=cache.parent, follow_symlinks=False)
    return os.fstat(cache.parent)


def _counted(noun: str, count: int) -> str:
    plural = noun.removesuffix("y") + "ies" if noun.endswith("y") else noun + "s"
    return f"{count} {noun if count == 1 else plural}"


def _is_reachable(path: Path) -> bool:
    """Tell whether everybody may come as far as into `path`."""
    with suppress(OSError):
        return all(one.stat().st_mode & 1 for one in (path, *path.parents))
    return False
