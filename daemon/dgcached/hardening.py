"""The protection of the process that costs nothing, and a report of what is in effect."""

import ctypes
import os
import resource
from contextlib import suppress
from dataclasses import dataclass

_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4
_M_PERTURB, _FREED = -6, 0x5A
_WANTED_DESCRIPTORS = 65_536


@dataclass(frozen=True, slots=True)
class Hardening:
    """What is in effect, read back from the kernel."""

    dumpable: bool
    core_limit_bytes: int
    umask: int


def harden() -> None:
    """Create nothing for others, leave no core, and let no process of the same user look in.

    Not dumpable means: no ptrace, no /proc/PID/mem, fd or maps, no core even where core_pattern is
    a pipe, which RLIMIT_CORE does not stop (prctl(2), core(5)). Memory is overwritten when it is
    freed where the C library can do that (mallopt(3), M_PERTURB): what came as a byte stream passed
    through gRPC's buffers.
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if _libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")
    with suppress(AttributeError):  # another C library than GNU's
        _libc().mallopt(_M_PERTURB, _FREED)


def raise_descriptor_limit() -> None:
    """Take what the hard limit allows: every relay, session and handout has descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
    wanted = min(allowed, _WANTED_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def overwrite_variable(name: str) -> None:
    """Blank the value of an environment variable where the kernel put it (proc(5), environ)."""
    libc = _libc()
    libc.getenv.restype = ctypes.c_void_p
    address = libc.getenv(name.encode())
    if address:
        ctypes.memset(address, 0, len(ctypes.string_at(address)))


def effective() -> Hardening:
    """Ask the kernel what is in effect."""
    umask = os.umask(0o077)
    os.umask(umask)
    core = resource.getrlimit(resource.RLIMIT_CORE)[0]
    return Hardening(
        dumpable=_libc().prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) != 0,
        core_limit_bytes=2**64 - 1 if core == resource.RLIM_INFINITY else core,
        umask=umask,
    )


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
