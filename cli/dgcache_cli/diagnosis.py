"""What is judged of a daemon by what its Status says: each finding ok, warn or bad.

What counts is what is in effect. Without PrivateUsers= a user manager leaves out most of a unit's
sandbox without a word (systemd.exec(5)), so a unit's text proves nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

_RESTART = "dg-cache restart"
_PRIVATE = 0o700
_LANDLOCK = {"files": 2, "tcp": 4, "abstract-sockets": 6}
"""What can be refused, and since which ABI."""


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `why` and `mend` are empty where it is well."""

    level: Level
    what: str
    found: str
    why: str = ""
    mend: str = ""


def judged(level: Level, what: str, found: str, why: str, mend: str) -> Finding:
    """Return a finding that has nothing to explain where it is well."""
    return Finding(level, what, found, *(("", "") if level is Level.OK else (why, mend)))


def of_daemon(status: Mapping[str, Any], *, forgoes_namespaces: bool = False) -> Iterator[Finding]:
    """Judge the process that runs.

    Args:
        status: what it says of itself.
        forgoes_namespaces: its unit says that it wants no user namespace.
    """
    hardening = status["hardening"]
    if not hardening.get("kernel"):
        yield Finding(
            Level.WARN,
            "daemon",
            "an older version runs",
            "it does not say how it is protected",
            _RESTART,
        )
        return
    yield from _process(hardening)
    yield _landlock(hardening)
    yield from _sandbox(hardening, _asked_for(status["supervisor"], forgoes=forgoes_namespaces))
    for directory, mode in sorted(hardening["directory_modes"].items()):
        yield judged(
            Level.OK if mode == _PRIVATE else Level.BAD,
            "directory",
            f"{directory} has mode {mode:04o}",
            "others can reach what is inside; clients refuse it",
            f"chmod 0700 '{directory}'",
        )


def _process(hardening: Mapping[str, Any]) -> Iterator[Finding]:
    yield judged(
        Level.BAD if hardening["dumpable"] else Level.OK,
        "dumpable",
        "yes" if hardening["dumpable"] else "no",
        "any process of this user can read its memory, keys included",
        _RESTART,
    )
    yield judged(
        Level.BAD if hardening["core_limit_bytes"] else Level.OK,
        "core file",
        f"at most {hardening['core_limit_bytes']} B",
        "a crash would write keys and references to the disk",
        _RESTART,
    )
    unlocked = hardening["keys"] == "unlocked"
    yield judged(
        Level.BAD if unlocked else Level.OK,
        "keys",
        f"in {hardening['keys']} memory" if unlocked else f"in {hardening['keys']}",
        "keys can be swapped out to the disk",
        "raise LimitMEMLOCK= of the unit, or ulimit -l, to 1 MiB (docs/systemd.md, Limits)",
    )
    yield judged(
        Level.OK if hardening["no_new_privileges"] else Level.BAD,
        "new privileges",
        "none" if hardening["no_new_privileges"] else "possible",
        "a program it starts could gain privileges",
        _RESTART,
    )
    yield judged(
        Level.BAD if hardening["capabilities"] else Level.OK,
        "capabilities",
        f"{hardening['capabilities']:#x}" if hardening["capabilities"] else "none",
        "it needs none of root's powers",
        _RESTART,
    )
    yield judged(
        Level.WARN if hardening["swap"] else Level.OK,
        "swap",
        f"possible, to {hardening['swap']}" if hardening["swap"] else "not possible",
        "references that clients hold are plaintext in memory and can be swapped out",
        "MemorySwapMax=0 in the unit, under cgroup v2, or an encrypted swap "
        "(docs/systemd.md, Limits)",
    )
    yield judged(
        Level.OK if hardening["shares_handouts"] else Level.WARN,
        "leases",
        "tell who holds a reference" if hardening["shares_handouts"] else "not to be relied on",
        "each lookup decrypts anew, which takes longer",
        "a newer kernel",
    )


def _landlock(hardening: Mapping[str, Any]) -> Finding:
    version, refuses = hardening["landlock_abi"], hardening["landlock_refuses"]
    if version < _LANDLOCK["files"]:
        return Finding(
            Level.WARN,
            "Landlock",
            f"none (ABI {version})",
            "a fault in the daemon could reach all files of this user",
            "Linux 5.19 or newer with landlock among lsm= (cat /sys/kernel/security/lsm)",
        )
    return judged(
        Level.BAD if hardening["landlock_trouble"] else Level.OK,
        "Landlock",
        f"ABI {version}, refuses {', '.join(refuses) or 'nothing'}"
        + (f"; {hardening['landlock_trouble']}" if hardening["landlock_trouble"] else ""),
        "a fault in the daemon could reach all files of this user",
        "dg-cache logs",
    )


@dataclass(frozen=True, slots=True)
class _Sandbox:
    """How bad it is that there is none, why there is none, and what mends it."""

    level: Level
    why: str
    mend: str


_IGNORED = _Sandbox(
    Level.BAD,
    "a user manager silently ignores ProtectSystem=, ProtectHome= and PrivateNetwork= "
    "without PrivateUsers=yes",
    "PrivateUsers=yes in the unit, and a kernel that lets users have namespaces; or say so in the "
    "unit: no-user-namespaces.conf (docs/systemd.md, Drop-ins)",
)
_FORGONE = _Sandbox(
    Level.WARN,
    "the unit says PrivateUsers=no, which leaves it without, as no-user-namespaces.conf does",
    "where this host allows user namespaces to users, remove that drop-in (docs/systemd.md, "
    "Drop-ins)",
)
_ALONE = _Sandbox(
    Level.WARN,
    "only systemd's units give it a sandbox beyond Landlock",
    "dg-cache stop, then let systemd run it: dg-cache install",
)


def _asked_for(supervisor: str, *, forgoes: bool) -> _Sandbox:
    if supervisor != "systemd":
        return _ALONE
    return _FORGONE if forgoes else _IGNORED


def _sandbox(hardening: Mapping[str, Any], without: _Sandbox) -> Iterator[Finding]:
    """Only a unit can give these. Where it runs under one and has them not, they were ignored."""
    for what, well, yes, no in (
        ("user namespace", hardening["user_namespace"], "of its own", "the machine's"),
        ("root directory", hardening["root_read_only"], "read-only", "can be written to"),
        ("home", hardening["home"] != "writable", hardening["home"], "can be written to"),
        ("network", not hardening["network"], "none", "there are interfaces besides loopback"),
    ):
        level = Level.OK if well else without.level
        yield judged(level, what, yes if well else no, without.why, without.mend)
    yield judged(
        Level.OK if hardening["filters_system_calls"] else Level.WARN,
        "system calls",
        "filtered" if hardening["filters_system_calls"] else "not filtered",
        "a fault in the daemon could reach every interface of the kernel",
        "let systemd run it, whose units have SystemCallFilter=: dg-cache install",
    )
