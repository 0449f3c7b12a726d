"""What the daemon gives up before it serves, by Landlock, and what of that is seen to be refused.

It keeps reading what Python and the kernel's figures need, and changing what is below the sockets'
directory and the disk tier's. It gives up to execute, to change or read anything else (the home and
its credentials above all), TCP, signals to others, and abstract sockets of others. This is hygiene
and no access check, so a kernel that refuses is logged, shown, and no reason to stop.
"""

import errno
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from dgcached import landlock
from dgcached.logs import event

_READ = (
    *("/proc", "/sys/fs/cgroup", "/sys/devices/system/cpu", "/dev/urandom"),
    *("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"),
)


@dataclass(frozen=True, slots=True)
class Confinement:
    """`refuses` holds what an attempt of this process showed; `trouble` why it is not all."""

    landlock_abi: int
    refuses: tuple[str, ...] = ()
    trouble: str = ""


def confine(changed: Iterable[int]) -> Confinement:
    """Give everything up but reading what is needed and changing what is in these directories.

    To be called in the only thread there is.

    Args:
        changed: open directories.
    """
    version = landlock.abi()
    if version < landlock.OLDEST_ABI:
        event(logging.INFO, "landlock-absent", abi=version, needed=landlock.OLDEST_ABI)
        return Confinement(version, trouble="this kernel has none, or too old a one")
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208 - only their number
    # what is outside of our domain: whoever made it had no part in it yet
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as outside:
        outside.bind("")
        try:
            landlock.restrict(version, _rules(changed))
        except OSError as error:
            trouble = f"the kernel refuses: {error.strerror}"
        else:
            trouble = f"{threads - 1} threads ran before" if threads > 1 else ""
        found = tuple(_refused(version, outside.getsockname()))
    missing = [name for name, since in _SINCE.items() if version >= since and name not in found]
    if missing and not trouble:
        trouble = f"not refused: {', '.join(missing)}"
    level = logging.WARNING if trouble else logging.INFO
    event(level, "landlock", abi=version, refuses=",".join(found), trouble=trouble or "none")
    return Confinement(version, found, trouble)


_SINCE = {"files": 2, "tcp": 4, "abstract-sockets": 6}


def _rules(changed: Iterable[int]) -> Iterator[tuple[str, int]]:
    for path in (*_READ, *_libraries()):
        yield path, landlock.READ
    for directory_fd in changed:
        yield f"/proc/self/fd/{directory_fd}", landlock.CHANGE


def _libraries() -> set[str]:
    """Return where modules may still be imported from. Never an entry of `sys.path` as such: one is
    the directory that somebody happened to start us in."""
    found = {os.path.dirname(os.__file__)}  # noqa: PTH120 - a text
    found |= {path for path in sys.path if path.endswith(("/site-packages", "/dist-packages"))}
    for name, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None)
        if "." not in name and origin and hasattr(module, "__path__"):
            found.add(os.path.dirname(os.path.abspath(origin)))  # noqa: PTH100, PTH120 - a text
    return found


def _refused(version: int, outside: bytes) -> Iterator[str]:
    """Attempt what is harmless where it succeeds."""
    if _is_refused(lambda: os.close(os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC))):
        yield "files"
    if _is_refused(_bind_to_a_port):
        yield "tcp"
    if version >= _SINCE["abstract-sockets"] and _is_refused(lambda: _connect(outside)):
        yield "abstract-sockets"


def _is_refused(attempt: Callable[[], None]) -> bool:
    try:
        attempt()
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EPERM, errno.EAFNOSUPPORT)
    return False


def _bind_to_a_port() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as attempt:
        attempt.bind(("127.0.0.1", 0))


def _connect(address: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as attempt:
        attempt.connect(address)


def preload() -> None:
    """Import what runs a program when it is imported, which is not possible afterwards."""
    with suppress(ImportError, OSError):
        import asyncinotify  # noqa: F401 - the monitor's second mechanism
