"""Finds the process that serves, and ends it: also one that does not answer, or speaks another
version of the protocol.

No socket is asked. Who serves holds the lock on `daemon.lock` from its first socket to its very
end, and the kernel tells who that is (proc_locks(5)). The pid is turned into a descriptor, and the
lock is looked at again: a pid that was reused in between does not hold it. A `start` that waits for
a daemon to end touches the same lock for an instant; it holds the lock of starters then, and so
does whoever stops.
"""

import os
import select
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dgcache.start_lock import start_lock
from dgcache_core.directories import open_private_directory
from dgcache_core.errors import CacheRefusedError, CacheUnavailableError
from dgcache_core.runtime_directory import DAEMON_LOCK, candidates

_LOCKS = Path("/proc/locks")


@dataclass(frozen=True, slots=True)
class Serving:
    """A daemon that runs."""

    directory: Path
    pid: int

    @property
    def unit(self) -> str:
        """The systemd service whose control group it is in, else empty (cgroups(7))."""
        with suppress(OSError):
            for line in Path(f"/proc/{self.pid}/cgroup").read_text().splitlines():
                name = line.rpartition("/")[2]
                if name.endswith(".service"):
                    return name
        return ""


def find(socket_dir: Path | None, environ: Mapping[str, str]) -> Serving | None:
    """Return the daemon that serves in the first place where one does, None where none is."""
    for place in candidates(socket_dir, environ):
        try:
            directory_fd = open_private_directory(place.path)
        except (FileNotFoundError, CacheRefusedError):
            continue
        try:
            status = os.stat(DAEMON_LOCK, dir_fd=directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        finally:
            os.close(directory_fd)
        pid = _holder(status)
        if pid > 0:
            return Serving(place.path, pid)
    return None


def stop(
    socket_dir: Path | None,
    environ: Mapping[str, str],
    *,
    force: bool = False,
    budget_seconds: float = 20.0,
) -> Serving | None:
    """End the daemon and return when it has ended; None if none was running.

    Args:
        socket_dir: its place, if it was named.
        environ: for finding its place.
        force: end it by SIGKILL if SIGTERM does not within the budget.
        budget_seconds: what it gets to finish the calls in progress.

    Raises:
        CacheUnavailableError: it does not end.
    """
    if find(socket_dir, environ) is None:
        return None
    deadline = time.monotonic() + budget_seconds
    with start_lock(socket_dir, environ, deadline):
        serving = find(socket_dir, environ)
        if serving is None:
            return None
        try:
            pidfd = os.pidfd_open(serving.pid)
        except ProcessLookupError:
            return serving
        try:
            if find(socket_dir, environ) != serving:
                return serving
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            if not _ends(pidfd, deadline - time.monotonic()):
                _kill(pidfd, serving, force=force)
        except ProcessLookupError:
            return serving
        finally:
            os.close(pidfd)
    return serving


def _kill(pidfd: int, serving: Serving, *, force: bool) -> None:
    if force:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    if not force or not _ends(pidfd, seconds=5):
        raise CacheUnavailableError(
            f"dg-cached (pid {serving.pid}) does not end: run dg-cache stop --force"
        )


def _ends(pidfd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def _holder(lock: os.stat_result) -> int:
    """Return the pid of who has flock(2)ed the file, 0 where nobody has or it is not visible."""
    wanted = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
    with suppress(OSError):
        for line in _LOCKS.read_text().splitlines():
            fields = line.split()  # 1: FLOCK ADVISORY WRITE 708 08:01:2359475 0 EOF
            if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5] == wanted:
                return int(fields[4])
    return 0
