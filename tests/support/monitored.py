"""A process that keeps files and lets the monitor watch them: what a disk tier does, and no more.

Run as `python -m tests.support.monitored UID DIRECTORY LIMITS`. It takes every file in the
directory for its own, says `ready`, prints each security event as a line of JSON, and does what it
reads: `rewrite N`, `directory NAME`, `again NAME`, `status`, `stop`.
"""

import asyncio
import concurrent.futures.thread  # noqa: F401 - that user may not be able to read it later
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import asyncinotify

from dgcache_core.ledger import Ledger
from dgcached import logs
from dgcached.fanotify import Fanotify
from dgcached.limits import Limits
from dgcached.monitor import Audited, Finding, Monitor
from dgcached.security_events import SecurityEvents
from dgcached.watchers import Directory


class Files:
    """Implements `Audited` for one directory and those made in it."""

    place = "files"
    on_new_directory: Callable[[Directory], None]

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._ledger = Ledger()
        for name in self._found():
            self._ledger.record(self._fd, name)

    def _found(self) -> list[str]:
        root = Path(f"/proc/self/fd/{self._fd}")
        return [str(path.relative_to(root)) for path in root.rglob("*")]

    def watched_directories(self) -> list[Directory]:
        return [Directory(self._fd)]

    def audit(self, directory: Directory, name: str) -> Finding | None:
        path = os.path.normpath(f"{directory.name}/{name}")
        if path == ".":
            return None
        change = self._ledger.compare(self._fd, path)
        if change is None:
            return None
        self._ledger.record(self._fd, path)
        return Finding(change.kind, path, change.detail)

    def audit_all(self) -> list[Finding]:
        names = {*self._ledger.names(), *self._found()}
        findings = [self.audit(Directory(self._fd), name) for name in sorted(names)]
        return [finding for finding in findings if finding is not None]

    def rewrite(self, number: int) -> None:
        """Change a file of ours in both ways, as only its owner may."""
        with self._ledger.own_change(self._fd, "ours", "temporary"):
            for name in ("temporary", "ours"):
                fd = os.open(name, os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=self._fd)
                os.write(fd, b"%d" % number)
                os.close(fd)
            os.rename("temporary", "ours", src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def make(self, name: str) -> None:
        """Add a directory."""
        with self._ledger.own_change(self._fd, name):
            os.mkdir(name, 0o700, dir_fd=self._fd)
        self.on_new_directory(Directory(self._fd, name))

    def make_again(self, name: str) -> None:
        """Put a new directory in place of an empty one."""
        with self._ledger.own_change(self._fd, name):
            os.rmdir(name, dir_fd=self._fd)
            self.make(name)

    def close(self) -> None:
        os.close(self._fd)


def use_up(make: Callable[[], object]) -> list[object]:
    """Take what the kernel gives one user of something."""
    taken: list[object] = []
    try:
        while True:
            taken.append(make())
    except OSError:
        return taken


async def main(argv: Sequence[str]) -> None:
    uid, path, wish = int(argv[0]), Path(argv[1]), json.loads(argv[2])
    makers = {"fanotify": Fanotify, "inotify": asyncinotify.Inotify}
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    logs.set_up(None, verbose=False)
    kept = [use_up(makers[name]) for name in wish.pop("used_up", ())]
    limits = Limits(**wish)
    security, files = SecurityEvents(kept=256, followers=1), Files(path)
    monitor = Monitor([files], security, limits, on_finding=_nothing)
    monitor.start()
    printing = asyncio.create_task(_print(security))
    print("ready", flush=True)
    while (words := (await asyncio.to_thread(sys.stdin.readline)).split()) and words != ["stop"]:
        if words[0] == "rewrite":
            await asyncio.to_thread(lambda: [files.rewrite(n) for n in range(int(words[1]))])
        elif words[0] == "directory":
            await asyncio.to_thread(files.make, words[1])
        elif words[0] == "again":
            await asyncio.to_thread(files.make_again, words[1])
        print(json.dumps(asdict(monitor.status)), flush=True)
    await monitor.stop()
    security.close()
    await printing
    files.close()
    del kept


async def _print(security: SecurityEvents) -> None:
    async for one, _ in security.stream(follow=True):
        print(json.dumps({"kind": one.kind, **one.fields}), flush=True)


async def _nothing(_: Audited, __: Finding) -> None:
    pass


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
