"""The protection of the process that costs nothing, and a report of what is in effect."""

import ctypes
import os
import resource
import struct
from collections.abc import Collection, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dgcached.host_memory import own_groups

_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_M_PERTURB, _FREED = -6, 0x5A
_WANTED_DESCRIPTORS = 65_536
_CAPABILITY_VERSION_3 = 0x2008_0522
_NEEDED = ("DG_", "XDG_", "LC_", "PYTHON", "GRPC_", "LISTEN_", "LD_", "WATCHDOG_")
_NEEDED_WHOLE = (
    *("HOME", "LANG", "PATH", "TZ", "USER", "LOGNAME", "TMPDIR", "NOTIFY_SOCKET"),
    *("CREDENTIALS_DIRECTORY", "JOURNAL_STREAM", "INVOCATION_ID", "SYSTEMD_EXEC_PID"),
    "RUNTIME_DIRECTORY",
)
_SWAPS = Path("/proc/swaps")
_OWN = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class Hardening:
    """What is in effect, read back from the kernel."""

    dumpable: bool
    core_limit_bytes: int
    umask: int
    kernel: str
    no_new_privileges: bool
    filters_system_calls: bool
    capabilities: int
    """A bit for each that is permitted (capabilities(7))."""
    user_namespace: bool
    """Of our own, and not the machine's."""
    root_read_only: bool
    home: str
    """"hidden", "read-only", or "writable", before Landlock."""
    network: bool
    """There is an interface besides loopback."""
    swap: str
    """Where memory may be written to; empty where nowhere."""


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
    if _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    _drop_capabilities()
    with suppress(AttributeError):  # another C library than GNU's
        _libc().mallopt(_M_PERTURB, _FREED)


def _drop_capabilities() -> None:
    """Root without them is a user like any other; to give up takes no permission (capset(2)).

    Who has none does not ask: systemd's filters do not have the call. Status shows what is left.
    """
    if _own_capabilities():
        header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
        _libc().capset(header, bytes(24))


def _own_capabilities() -> int:
    """Return a bit for each that is permitted (capabilities(7))."""
    return int(_own_status().get("CapPrm", "0"), 16)


def detach(keep: Collection[int]) -> None:
    """Close what was inherited: somebody may wait for the end of a pipe that we do not know of.

    Standard input and output lead to nowhere from here on; standard error stays, for the log.

    Args:
        keep: descriptors that are ours.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(nowhere, standard, inheritable=False)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - no paths are wanted
        if int(name) > 2 and int(name) not in keep:
            with suppress(OSError):  # the listing's own is closed already
                os.close(int(name))


def forget_environment(environ: MutableMapping[str, str]) -> None:
    """Blank and remove every variable that no part of the daemon reads: the environment it was
    started in may hold credentials, and it lives long."""
    for name in list(environ):
        if not name.startswith(_NEEDED) and name not in _NEEDED_WHOLE:
            overwrite_variable(name)
            del environ[name]


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
    status = _own_status()
    return Hardening(
        dumpable=_libc().prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) != 0,
        core_limit_bytes=2**64 - 1 if core == resource.RLIM_INFINITY else core,
        umask=umask,
        kernel=os.uname().release,
        no_new_privileges=status.get("NoNewPrivs") == "1",
        filters_system_calls=status.get("Seccomp") == "2",
        capabilities=_own_capabilities(),
        user_namespace=_text(_OWN / "uid_map").split() != ["0", "0", "4294967295"],
        root_read_only=bool(os.statvfs("/").f_flag & os.ST_RDONLY),
        home=_home(os.path.expanduser("~")),  # noqa: PTH111 - stays "~" where nobody knows it
        network=_has_network(_text(_OWN / "net/dev")),
        swap=_swap(_text(_SWAPS), _swap_limits()),
    )


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _own_status() -> dict[str, str]:
    lines = (line.partition(":") for line in _text(_OWN / "status").splitlines())
    return {name: value.strip() for name, _, value in lines}


def _home(home: str) -> str:
    """What mounts and modes allow; access(2) does not ask Landlock."""
    try:
        if os.statvfs(home).f_flag & os.ST_RDONLY:
            return "read-only" if os.access(home, os.R_OK) and any(os.scandir(home)) else "hidden"
    except PermissionError:
        return "read-only"  # Landlock lets nobody look whether something is in it
    except OSError:
        return "hidden"
    return "writable" if os.access(home, os.W_OK) else "read-only"


def _has_network(devices: str) -> bool:
    names = {line.partition(":")[0].strip() for line in devices.splitlines() if ":" in line}
    return bool(names - {"lo"})


def _swap(swaps: str, limits: list[str]) -> str:
    """Return the first place of /proc/swaps, unless our control group may use none (v2)."""
    places = [line.split()[0] for line in swaps.splitlines()[1:] if line.split()]
    return "" if not places or "0" in limits else places[0]


def _swap_limits() -> list[str]:
    """Return memory.swap.max of our group and of all above it (cgroups(7))."""
    return [_text(group / "memory.swap.max").strip() for group in own_groups()]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
