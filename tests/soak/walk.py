"""Every system call of a store fails once, and then the next: `python -m tests.soak.walk`.

strace(1) makes the kernel refuse the n-th call of one kind in each of the daemon's threads while
one client stores a reference, the disk tier takes what memory has no room for, and both are read
back. Afterwards, without strace: the daemon answers, each reference is whole or absent, nothing
half-written is on the disk, and nothing is reserved, held or open that was not before. Where the
kernel refuses the interpreter or gRPC their memory or threads the daemon may die (`MAY_DIE`); then
its next life is held to the same. A tier that turned itself off would write nothing for a minute:
then the next step has a new daemon, or it would refuse nothing of the disk.

The first call of each kind with each error comes first, then every second one, and so on: where
time is short the walk is less deep, and no kind is missing.

`close` is not among the calls: a close that is refused on Linux has closed nonetheless (close(2)),
one that strace refuses has not. Nor are read, write and epoll_ctl: the first in each thread are
gRPC's wake-ups by eventfd, which no kernel refuses and after which gRPC's loop has ended.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from tests.support.disk_daemon import Home, found, reference
from tests.support.refused_syscalls import refusing_meanwhile
from tests.support.wire import Client, Daemon, eventually, sha256

ERRORS = ("ENOSPC", "EMFILE", "ENOMEM", "EIO", "EINTR")
CALLS = (
    *("openat", "pwrite64", "fsync", "fallocate", "rename", "renameat", "renameat2"),
    *("unlink", "unlinkat", "mkdir", "mkdirat", "utimensat", "newfstatat", "fstat", "getdents64"),
    *("pread64", "preadv", "preadv2", "fgetxattr", "getxattr", "fchmod", "fchown"),
    *("memfd_create", "ftruncate", "fcntl", "pipe2", "readv", "writev", "splice"),
    *("accept4", "accept", "socket", "connect", "getsockopt", "setsockopt", "getsockname"),
    *("sendmsg", "sendto", "recvmsg", "recvfrom", "ioctl", "poll", "eventfd2"),
    *("pidfd_open", "mmap", "munmap", "mprotect", "madvise", "mlock", "clone3", "clone"),
)
MAY_DIE = frozenset({"mmap", "mprotect", "clone3", "clone"})
LIMITS: dict[str, Any] = {
    "handshake_seconds": 1.0,
    "deposit_idle_seconds": 1.0,
    "commit_seconds": 2.0,
    "drain_seconds": 2.0,
}
_CALL_SECONDS = 4.0
_TAKEN_AWAY, _GIVING_UP_SECONDS = 72, 20.0
_MOST_TIMES, _MINUTES = 40, 13.0


@dataclass(frozen=True)
class Step:
    """One injection: the `number`-th call of each thread gets this error."""

    call: str
    error: str
    number: int


@dataclass(frozen=True)
class Seen:
    """What became of a step."""

    step: Step
    injected: int
    died: bool
    stored: bool
    trouble: str


class ImpatientClient(Client):
    """Waits a few seconds for anything, since a refused call may have lost the answer."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        assert self.session is not None
        self.session.settimeout(_CALL_SECONDS)

    def call(self, method: str, request: Any, seconds: float = _CALL_SECONDS) -> Any:
        return super().call(method, request, seconds)


class Walk:
    """Walks over one home, with a daemon for as long as it lives."""

    def __init__(self, place: Path) -> None:
        """Start nothing yet."""
        self._home = Home(place)
        self._place = place
        self._number = 0
        self._stack = ExitStack()
        self._daemon: Daemon | None = None
        self._descriptors = 0
        self.lives = 0

    def take(self, step: Step) -> Seen:
        """Do one step and look at what it left."""
        daemon = self._living()
        first, self._number = self._number, self._number + 3
        with refusing_meanwhile(
            daemon.pid, step.call, step.error, self._place / "trace", number=step.number
        ) as injected:
            stored = self._round(daemon, first)
        trace = [line for line in injected().splitlines() if "(INJECTED)" in line]
        died = daemon.process.poll() is not None or self._gave_up(daemon, step)
        trouble = ""
        try:
            allowed = step.call in MAY_DIE or daemon.process.returncode == _TAKEN_AWAY
            if died and not allowed:
                raise AssertionError(f"the daemon died with status {daemon.process.returncode}")
            self._require_whole(range(first, first + 3))
            self._require_at_rest()
            self._require_the_disk()
        except (AssertionError, grpc.RpcError, OSError) as error:
            trouble = f"{type(error).__name__}: {error}; log: {daemon.logged()[-1500:]}; {trace}"
            self.close()
        return Seen(step, len(trace), died, stored, trouble)

    def _gave_up(self, daemon: Daemon, step: Step) -> bool:
        """gRPC accepts nobody after some errors of accept4; the daemon sees that and ends."""
        if step.call not in ("accept4", "accept"):
            return False
        with suppress(grpc.RpcError, OSError), ImpatientClient(daemon.directory) as client:
            client.status()
            return False
        with suppress(subprocess.TimeoutExpired):
            daemon.process.wait(_GIVING_UP_SECONDS)
        return daemon.process.poll() is not None

    def _round(self, daemon: Daemon, first: int) -> bool:
        """Store three, of which memory has no room for all, and read them back."""
        with (
            suppress(grpc.RpcError, OSError, AssertionError),
            ImpatientClient(daemon.directory) as client,
        ):
            digests = []
            for number in range(first, first + 3):
                with suppress(grpc.RpcError, OSError):
                    digests.append(client.store(reference(number)))
            for digest in digests:
                with suppress(grpc.RpcError, OSError):
                    found(client, digest)
            return len(digests) == 3
        return False

    def _living(self) -> Daemon:
        if self._daemon is None or self._daemon.process.poll() is not None:
            self.close()
            self.lives += 1
            self._daemon = self._stack.enter_context(self._home.daemon(limits=LIMITS))
            for first in range(0, 12, 3):  # until threads and tables are there
                self._round(self._daemon, 1_000_000 + first)
            with Client(self._daemon.directory) as client:
                self._await_rest(client)
                self._descriptors = self._daemon.descriptors()
        return self._daemon

    def _require_the_disk(self) -> None:
        """End a daemon whose tier turned itself off: it would write nothing for a minute."""
        with Client(self._living().directory) as client:
            is_off = client.status().disk.disabled_reason
        if is_off:
            self.close()

    def _require_whole(self, numbers: Sequence[int]) -> None:
        """Each is served as it was stored, or is a miss; in a next life, too."""
        with Client(self._living().directory) as client:
            for number in numbers:
                got = found(client, sha256(reference(number)))
                assert got in (None, reference(number)), f"reference {number} is not whole"
            digest = client.store(reference(numbers[0]))
            assert found(client, digest) == reference(numbers[0]), "stores no more"

    def _require_at_rest(self) -> None:
        daemon = self._living()
        with Client(daemon.directory) as client:
            self._await_rest(client)
            try:
                eventually(lambda: daemon.descriptors() <= self._descriptors)
            except AssertionError:
                links = [str(link.readlink()) for link in Path(f"/proc/{daemon.pid}/fd").iterdir()]
                raise AssertionError(f"more than {self._descriptors} open: {links}") from None
            assert list((self._home.tier / "new").iterdir()) == [], "half a file is left"
            assert not client.status().security_events, client.status().security_events

    def _await_rest(self, client: Client) -> None:
        def resting() -> bool:
            status = client.status()
            store = status.store
            busy = (status.stores_in_progress, store.handouts, store.reserved_bytes)
            return (status.sessions, status.connections) == (1, 1) and not any(busy)

        eventually(resting)

    def close(self) -> None:
        """End the daemon that lives."""
        self._stack.close()
        self._daemon = None


def walk(
    place: Path,
    calls: Sequence[str],
    errors: Sequence[str],
    most_times: int = _MOST_TIMES,
    until: float = math.inf,
) -> Iterator[Seen]:
    """Yield what became of each step: the first calls of each kind with each error, then the next.

    Args:
        place: an empty directory.
        calls: their names.
        errors: their names.
        most_times: how often at most one call is refused with one error.
        until: the time.monotonic() at which no further step begins.
    """
    walking = Walk(place)
    left = [(call, error) for call in calls for error in errors]
    try:
        for number in range(1, most_times + 1):
            still = []
            for call, error in left:
                if time.monotonic() >= until:
                    return
                seen = walking.take(Step(call, error, number))
                if seen.injected:
                    still.append((call, error))
                    yield seen
            left = still
    finally:
        walking.close()


def main() -> int:
    """Walk over everything, or what the command line says, and tell what fell."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.walk", description=__doc__)
    parser.add_argument("--calls", default=",".join(CALLS))
    parser.add_argument("--errors", default=",".join(ERRORS))
    parser.add_argument("--most-times", type=int, default=_MOST_TIMES)
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="no step begins later")
    arguments = parser.parse_args()
    seen: list[Seen] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dgt-") as place:
        for one in walk(
            Path(place).resolve(),
            arguments.calls.split(","),
            arguments.errors.split(","),
            arguments.most_times,
            begun + arguments.minutes * 60,
        ):
            seen.append(one)
            if one.trouble or one.died:
                print(one, flush=True)
    injected = sum(one.injected for one in seen)
    fallen = [one for one in seen if one.trouble]
    print(
        f"{len(seen)} steps, {injected} refused calls of {len({one.step.call for one in seen})} "
        f"kinds in {time.monotonic() - begun:.0f} s; the daemon died in "
        f"{sum(one.died for one in seen)}; stored all the same in "
        f"{sum(one.stored for one in seen)}; troubles: {len(fallen)}; walked to the "
        f"{max((one.step.number for one in seen), default=0)}. call of a kind"
    )
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
