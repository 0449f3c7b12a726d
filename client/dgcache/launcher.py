"""Starts a daemon in the background and returns when it serves, or says why it does not.

Readiness is the daemon's own sd_notify(3) message, sent to an abstract socket of ours with a random
name; only messages that the kernel says come from our child count. A lock makes a herd of starters
start one daemon.
"""

import os
import secrets
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from dgcache.session import Session
from dgcache.start_lock import lock_within, start_lock
from dgcache_core.directories import open_private_directory
from dgcache_core.errors import (
    CacheError,
    CacheRefusedError,
    CacheUnavailableError,
    SettingsError,
)
from dgcache_core.runtime_directory import DAEMON_LOCK, candidates, make_first_usable
from dgcache_core.settings import ClientSettings, declared

_UCRED = struct.Struct("3i")
_ALREADY_SERVING = 75
_PLACE = declared(ClientSettings)["socket_dir"].variable
_KINDS: dict[int, type[CacheError]] = {77: CacheRefusedError, 78: SettingsError}
_PROBE_SECONDS = 1.0


def default_log_file(environ: Mapping[str, str]) -> Path:
    """Return where a daemon without systemd logs (XDG Base Directory Specification)."""
    state = environ.get("XDG_STATE_HOME", "")
    base = Path(state) if state.startswith("/") else Path.home() / ".local/state"
    return base / "dg-cached" / "dg-cached.log"


def start(
    environ: Mapping[str, str],
    socket_dir: Path | None,
    *,
    options: tuple[str, ...] = (),
    log_file: Path | None = None,
    python: str = sys.executable,
    budget_seconds: float = 20.0,
) -> "subprocess.Popen[bytes] | None":
    """Make sure that a daemon serves; return its process if this call started it, else None.

    The caller either waits for the process one day or says `process.returncode = 0`.

    Args:
        environ: for the daemon, and for finding its place.
        socket_dir: its place, if it was named; the daemon is told, whatever `environ` says.
        options: for its command line.
        log_file: where it logs; `default_log_file` where None.
        python: the interpreter of the installation to run; this one's own by default, never one
            that $PATH happens to name.
        budget_seconds: how long to wait for the lock and for the daemon, together.

    Raises:
        CacheUnavailableError: it did not come up; the message has its own last word.
        CacheRefusedError: a directory failed its check.
        SettingsError: one of its settings is wrong.
    """
    deadline = time.monotonic() + budget_seconds
    log_file = log_file or default_log_file(environ)
    with start_lock(socket_dir, environ, deadline):
        if is_serving(socket_dir, environ):
            return None
        os.close(open_private_directory(log_file.parent, create=True))
        program = [python, "-m", "dgcached", *options, "--log-file", str(log_file)]
        told = environ if socket_dir is None else {**environ, _PLACE: str(socket_dir)}
        for _ in range(2):
            started = _spawn(program, told, log_file, deadline)
            if started is not None or is_serving(socket_dir, environ):
                return started
            _wait_for_the_one_that_ends(socket_dir, environ, deadline)
    raise CacheUnavailableError(
        "somebody listens on the sockets and does not serve: see systemctl --user status dg-cached"
    )


def is_serving(socket_dir: Path | None, environ: Mapping[str, str]) -> bool:
    """Tell whether a daemon of this user says Hello."""
    try:
        Session.connect(socket_dir, environ, _PROBE_SECONDS).close()
    except CacheError:
        return False
    return True


def _wait_for_the_one_that_ends(
    socket_dir: Path | None, environ: Mapping[str, str], deadline: float
) -> None:
    """A daemon that drains holds its lock, and serves nobody any more."""
    _, directory_fd, _ = make_first_usable(candidates(socket_dir, environ))
    try:
        lock = os.open(DAEMON_LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    except FileNotFoundError:
        return
    finally:
        os.close(directory_fd)
    try:
        lock_within(lock, deadline)
    finally:
        os.close(lock)


def _spawn(
    program: list[str], environ: Mapping[str, str], log_file: Path, deadline: float
) -> "subprocess.Popen[bytes] | None":
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notices:
        address = f"dg-cached-start-{secrets.token_hex(16)}"
        notices.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        notices.bind(f"\0{address}")
        child_environment = {
            name: value for name, value in environ.items() if not name.startswith("LISTEN_")
        }
        child_environment["NOTIFY_SOCKET"] = f"@{address}"
        with os.fdopen(
            os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "ab"
        ) as log:
            os.fchmod(log.fileno(), 0o600)
            child = subprocess.Popen(
                program,
                env=child_environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        return _wait_until_ready(child, notices, deadline, log_file)


def _wait_until_ready(
    child: "subprocess.Popen[bytes]", notices: socket.socket, deadline: float, log_file: Path
) -> "subprocess.Popen[bytes] | None":
    pidfd = os.pidfd_open(child.pid)
    status = ""
    try:
        poll = select.poll()
        poll.register(notices, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        while ready := poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if any(descriptor == notices.fileno() for descriptor, _ in ready):
                states = _receive_from(notices, child.pid)
                status = states.get("STATUS", status)
                if states.get("READY") == "1":
                    return child
                continue
            code = child.wait()
            if code == _ALREADY_SERVING:
                return None
            kind = _KINDS.get(code, CacheUnavailableError)
            raise kind(status or f"dg-cached ended with status {code}: see {log_file}")
    finally:
        os.close(pidfd)
    child.kill()
    child.wait()
    raise CacheUnavailableError(f"dg-cached did not become ready in time: see {log_file}")


def _receive_from(notices: socket.socket, pid: int) -> dict[str, str]:
    """Return the assignments of one message if our child sent it."""
    data, ancillary, _, _ = notices.recvmsg(4096, socket.CMSG_SPACE(_UCRED.size))
    for level, kind, raw in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            sender_pid, sender_uid, _ = _UCRED.unpack(raw[: _UCRED.size])
            if (sender_pid, sender_uid) == (pid, os.geteuid()):
                lines = data.decode(errors="replace").splitlines()
                return dict(line.split("=", 1) for line in lines if "=" in line)
    return {}
