"""The lock of those who start or stop a daemon, one at a time, in the directory of its sockets."""

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dgcache_core.errors import CacheUnavailableError
from dgcache_core.runtime_directory import candidates, make_first_usable

START_LOCK = "start.lock"


@contextmanager
def start_lock(
    socket_dir: Path | None, environ: Mapping[str, str], deadline: float
) -> Iterator[None]:
    """Hold the lock of starters, in the directory where the daemon will listen."""
    _, directory_fd, _ = make_first_usable(candidates(socket_dir, environ))
    try:
        lock = os.open(
            START_LOCK,
            os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC,
            0o600,
            dir_fd=directory_fd,
        )
    finally:
        os.close(directory_fd)
    try:
        os.fchmod(lock, 0o600)  # whatever the umask left of it
        lock_within(lock, deadline)
        yield
    finally:
        os.close(lock)


def lock_within(lock: int, deadline: float) -> None:
    """flock(2) has no timeout of its own: a short-lived helper waits in our place and is killed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        pass
    # flock(1) takes the lock on the same open file description, so it stays with us
    waiter = ["flock", "--exclusive", "--timeout", f"{max(0.1, deadline - time.monotonic()):.1f}"]
    try:
        done = subprocess.run([*waiter, str(lock)], pass_fds=(lock,), check=False)
    except FileNotFoundError as error:
        raise CacheUnavailableError(
            "another start or stop is under way, and flock(1) is missing"
        ) from error
    if done.returncode != 0:
        raise CacheUnavailableError("another start or stop does not end: try again")
