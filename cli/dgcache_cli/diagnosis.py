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


def of_daemon(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Judge the process that runs."""
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
    yield from _sandbox(hardening, under_systemd=status["supervisor"] == "systemd")
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
        "raise LimitMEMLOCK= of the unit, or ulimit -l, to 1 MiB",
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
        "MemorySwapMax=0 in the unit, or an encrypted swap",
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


def _sandbox(hardening: Mapping[str, Any], *, under_systemd: bool) -> Iterator[Finding]:
    """Only a unit can give these. Where it runs under one and has them not, they were ignored."""
    worst = Level.BAD if under_systemd else Level.WARN
    mend = (
        "PrivateUsers=yes in the unit, and a kernel that lets users have namespaces"
        if under_systemd
        else "dg-cache stop, then let systemd run it: dg-cache install"
    )
    ignored = (
        "a user manager silently ignores ProtectSystem=, ProtectHome= and PrivateNetwork= "
        "without PrivateUsers=yes"
        if under_systemd
        else "only systemd's units give it a sandbox beyond Landlock"
    )
    for what, well, yes, no in (
        ("user namespace", hardening["user_namespace"], "of its own", "the machine's"),
        ("root directory", hardening["root_read_only"], "read-only", "can be written to"),
        ("home", hardening["home"] != "writable", hardening["home"], "can be written to"),
        ("network", not hardening["network"], "none", "there are interfaces besides loopback"),
        ("system calls", hardening["filters_system_calls"], "filtered", "not filtered"),
    ):
        level = Level.OK if well else worst
        if what == "system calls" and not well:
            level = Level.WARN
        yield judged(level, what, yes if well else no, ignored, mend)
