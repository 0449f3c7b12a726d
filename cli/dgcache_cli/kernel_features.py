"""What of the kernel the protection is made of, asked by trying, and the limits that go with it.

A version number proves nothing: distributions take features back and forth. What a kernel lacks
weakens one protection and ends none, so that is a warning.
"""

import ctypes
import errno
import os
import resource
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from dgcache_cli.diagnosis import Finding, Level, judged

_LANDLOCK_CREATE_RULESET, _MEMFD_SECRET = 444, 447
_SO_PEERPIDFD, _SO_PASSRIGHTS = 77, 83
_MFD_NOEXEC_SEAL = 8
_KEY_BYTES = 1 << 20
_GROUPS = Path("/sys/fs/cgroup")
_LIMITS = ("RLIMIT_MEMLOCK", "user namespaces")
_SYSCTLS = Path("/proc/sys")
_NO_NAMESPACES = {
    "user.max_user_namespaces": ("0", "15000"),
    "kernel.unprivileged_userns_clone": ("0", "1"),
    "kernel.apparmor_restrict_unprivileged_userns": ("1", "0"),
}
"""Sysctls that forbid ordinary users to make user namespaces: by which value, and one that does
not."""


def of_kernel() -> Iterator[Finding]:
    """Judge the kernel and the limits of this process."""
    yield _protection()
    for what, works, why, mend in (
        (
            "SO_PEERPIDFD",
            _tells_peer_by_pidfd,
            "a session is bound to its process by pid and uid alone, besides its secret",
            "Linux 6.5 or newer",
        ),
        (
            "pidfs",
            _has_pidfs,
            "a process that has the pid of one before cannot be told from it",
            "Linux 6.9 or newer",
        ),
        (
            "SO_PASSRIGHTS",
            _refuses_descriptors,
            "descriptors that a client sends are dropped by the daemon, not refused by the kernel",
            "Linux 6.17 or newer",
        ),
    ):
        works_here = _is_possible(works)
        yield judged(
            Level.OK if works_here else Level.WARN, what, "yes" if works_here else "no", why, mend
        )
    yield _executable_memory(_is_possible(_seals_against_execution), _sysctl("vm.memfd_noexec"))
    yield locked_memory(*resource.getrlimit(resource.RLIMIT_MEMLOCK), is_root=os.geteuid() == 0)
    yield user_namespaces({name: _sysctl(name) for name in _NO_NAMESPACES})


def features() -> str:
    """Return the kernel's release and what of it protects a daemon, in one line."""
    found = [one for one in of_kernel() if one.what not in _LIMITS]
    return ", ".join([found[0].found, *(f"{one.what} {one.found}" for one in found[1:])])


def locked_memory(soft: int, hard: int, *, is_root: bool) -> Finding:
    """Judge RLIMIT_MEMLOCK, in bytes: keys are locked where there is no secret memory, and secret
    memory counts, too (memfd_secret(2)). What root may lock has no limit."""
    well = is_root or soft == resource.RLIM_INFINITY or soft >= _KEY_BYTES
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    can_raise = hard == resource.RLIM_INFINITY or hard >= _KEY_BYTES
    return judged(
        Level.OK if well else Level.WARN,
        "RLIMIT_MEMLOCK",
        f"{limit}{', which does not bind root' if is_root else ''}",
        "the keys of a daemon started from here may be unlocked, and can be swapped out",
        f"ulimit -l {_KEY_BYTES >> 10}"
        + ("" if can_raise else " after raising memlock in limits.conf(5)")
        + "; units have LimitMEMLOCK= (docs/systemd.md, Limits)",
    )


def user_namespaces(sysctls: dict[str, str]) -> Finding:
    """Judge whether ordinary users may have them, by the sysctls that forbid it."""
    against = [name for name, (no, _) in _NO_NAMESPACES.items() if sysctls.get(name) == no]
    allowed = " ".join(f"{name}={_NO_NAMESPACES[name][1]}" for name in against)
    return judged(
        Level.WARN if against else Level.OK,
        "user namespaces",
        f"forbidden by {', '.join(against)}" if against else "allowed to users",
        "a user manager makes its sandbox of them; the unit ends with 217/USER or 226/NAMESPACE",
        f"sudo sysctl {allowed}; or no-user-namespaces.conf (docs/systemd.md, Drop-ins)",
    )


def swap_limit(group: str, swaps: str, groups: Path = _GROUPS) -> Finding:
    """Judge whether a limit on swap can hold at all: systemd sets none under version 1.

    Args:
        group: /proc/PID/cgroup of the daemon, or of this process where none runs.
        swaps: /proc/swaps.
        groups: where the hierarchies are mounted.
    """
    has_swap = len(swaps.splitlines()) > 1
    lines = [line.split(":", 2) for line in group.splitlines()]
    v1 = next((path for _, names, path in lines if "memory" in names.split(",")), None)
    if v1 is None:
        return Finding(Level.OK, "swap limit", "cgroup v2: MemorySwapMax=0 of the unit holds")
    limit = groups / "memory" / v1.lstrip("/") / "memory.memsw.limit_in_bytes"
    accounted = "with" if limit.exists() else "without"
    return judged(
        Level.WARN if has_swap else Level.OK,
        "swap limit",
        f"cgroup v1, {accounted} memory.memsw: MemorySwapMax= has no effect"
        + ("" if has_swap else ", and there is no swap"),
        "references that clients hold are plaintext in memory and can be swapped out",
        "systemd.unified_cgroup_hierarchy=1 on the kernel's command line, or an encrypted swap "
        "(docs/systemd.md, Limits)",
    )


def _protection() -> Finding:
    libc = ctypes.CDLL(None, use_errno=True)
    release = os.uname().release
    landlock = int(libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))
    secret = int(libc.syscall(_MEMFD_SECRET, os.O_CLOEXEC))
    if secret >= 0:
        os.close(secret)
    has = [f"Landlock ABI {max(0, landlock)}", f"{'' if secret >= 0 else 'no '}memfd_secret"]
    return judged(
        Level.OK if landlock >= 2 and secret >= 0 else Level.WARN,
        "kernel",
        f"{release}: {', '.join(has)}",
        "the daemon is protected by less: without memfd_secret root can read its keys",
        "a newer kernel, or one with both switched on",
    )


def _executable_memory(seals: bool, sysctl: str) -> Finding:
    return judged(
        Level.OK if seals else Level.WARN,
        "MFD_NOEXEC_SEAL",
        ("yes" if seals else "no") + (f"; vm.memfd_noexec is {sysctl}" if sysctl else ""),
        "a client may execute what it is handed",
        "Linux 6.3 or newer",
    )


def _tells_peer_by_pidfd() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        os.close(ours.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))


def _refuses_descriptors() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def _has_pidfs() -> None:
    """Before it a pidfd was one of the inodes without a name that all share (pidfd_open(2))."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        with select.epoll() as shared:
            if os.fstat(pidfd).st_dev == os.fstat(shared.fileno()).st_dev:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    finally:
        os.close(pidfd)


def _seals_against_execution() -> None:
    os.close(os.memfd_create("dg-cache-doctor", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL))


def _is_possible(attempt: Callable[[], None]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def _sysctl(name: str) -> str:
    with suppress(OSError):
        return (_SYSCTLS / name.replace(".", "/")).read_text().strip()
    return ""
