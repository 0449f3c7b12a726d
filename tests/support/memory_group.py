"""A real control group with a memory limit, in whichever hierarchy this machine has.

Leaving moves nobody and kills nobody: whoever starts processes in it ends them before. In v2 a
group with processes has no controllers for groups below it (cgroups(7), "no internal processes"),
so the new one stands beside our own where that is not the root.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.wire import script_running

_TOP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A group of its own."""

    path: Path
    limit_file: Path
    usage_file: Path
    kills_file: Path

    @property
    def prefix(self) -> tuple[str, ...]:
        """What starts a program in it."""
        return ("/bin/sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh")

    def used_bytes(self) -> int:
        """Return what the kernel has charged to it."""
        return int(self.usage_file.read_text())

    def kills(self) -> int:
        """Return how many processes the kernel killed in it for want of memory."""
        counts = dict(line.split() for line in self.kills_file.read_text().splitlines())
        return int(counts["oom_kill"])


_HOG = """
held = []
for line in sys.stdin:
    held.append(bytearray(b"x") * int(line))
    print(len(held), flush=True)
"""


class Hog:
    """A process in the group that takes what it is told to."""

    def __init__(self, group: MemoryGroup) -> None:
        self._group = group
        self.taken_bytes = 0

    @contextlib.contextmanager
    def running(self) -> "Iterator[Hog]":
        die_first = "open('/proc/self/oom_score_adj', 'w').write('1000')\n"
        join = f"open({str(self._group.path / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        with script_running(None, die_first + join + _HOG) as self._process:
            yield self

    def take(self, size: int) -> None:
        """Take so many bytes more, and return when they are there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # killed since it answered last
            print(size, file=self._process.stdin, flush=True)
        assert self._process.stdout.readline(), "the hog was killed"
        self.taken_bytes += size

    def fill_up(self, group_bytes: int) -> None:
        """Leave less than is held in reserve, and enough for what the daemon does meanwhile."""
        while self._group.used_bytes() < group_bytes * 15 // 16:
            self.take(4 << 20)


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make a group with a limit and no swap; skip the test where no group can have one."""
    _remove_abandoned()
    path = _parent() / f"dgt-{os.getpid()}-{secrets.token_hex(3)}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"needs control groups that can be made: {error.strerror}")
    try:
        group = _limited(path, limit_bytes)
        if group is None:
            pytest.skip("needs a memory controller that groups of ours may use")
        yield group
    finally:
        path.rmdir()


def _remove_abandoned() -> None:
    """Remove what a killed test run left: the name has the pid of the process that made it."""
    for group in _parent().glob("dgt-*-*"):
        if not Path("/proc", group.name.split("-")[1]).exists():
            with contextlib.suppress(OSError):  # a process in it, or another worker just did
                group.rmdir()


def _parent() -> Path:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = {line.split(":", 2)[1]: line.split(":", 2)[2].lstrip("/") for line in lines}
    if (_TOP / "memory").is_dir():
        return _TOP / "memory" / own.get("memory", "")
    group = _TOP / own.get("", "")
    return group if group == _TOP else group.parent


def _limited(path: Path, limit_bytes: int) -> MemoryGroup | None:
    v1, v2 = path / "memory.limit_in_bytes", path / "memory.max"
    if v1.exists():
        group = MemoryGroup(path, v1, path / "memory.usage_in_bytes", path / "memory.oom_control")
    elif v2.exists():
        group = MemoryGroup(path, v2, path / "memory.current", path / "memory.events")
    else:
        return None
    group.limit_file.write_text(str(limit_bytes))
    with contextlib.suppress(OSError):
        (path / "memory.swap.max").write_text("0")
    with contextlib.suppress(OSError):
        (path / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
    return group
