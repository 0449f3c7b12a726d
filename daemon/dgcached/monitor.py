"""The integrity monitor: notices what others do to the cache's files, at once where it can.

A watcher's notice leads to an audit of that name, which compares it with the ledger of whoever owns
the file; only a difference is a security event. So our own writes raise none, and it does not
matter that a mechanism tells of too much. It matters that it tells of too little: events that were
lost, or more names than can wait, lead to an audit of everything, and so does the end of every
`audit_seconds`, which finds what no mechanism tells (hard links elsewhere, mappings).

Where nothing can be watched there is one warning, and the periodic audit alone. Audits run in a
worker thread, one at a time, so that a slow disk stops no call; findings are reported in the loop.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from dgcache_core.ledger import ChangeKind
from dgcached.limits import Limits
from dgcached.logs import event
from dgcached.security_events import SecurityEvents
from dgcached.watchers import MECHANISMS, Directory, Notice, Watcher


@dataclass(frozen=True, slots=True)
class Finding:
    """What somebody else did to a file, and which; `detail` holds no secret."""

    kind: ChangeKind
    name: str
    detail: str = ""


class Audited(Protocol):
    """Who owns files that nobody else may change. Its methods run in a worker thread."""

    place: str
    """Names it in events."""
    on_new_directory: Callable[[Directory], None]
    """Set by the monitor; to be called, from any thread, when there is one more to watch."""

    def watched_directories(self) -> list[Directory]:
        """Return every directory its files are in."""

    def audit(self, directory: Directory, name: str) -> Finding | None:
        """Compare one file with the ledger; on a difference, trust it no more and return which.

        The same difference is returned once. A name that is none of its business is None.
        """

    def audit_all(self) -> list[Finding]:
        """Do so for every file."""


@dataclass(frozen=True, slots=True)
class MonitorStatus:
    """How it watches."""

    mechanism: str
    watched_directories: int
    rescans: int
    disabled_reason: str


class Monitor:
    """Watches the directories of everybody who is audited. Lives in one event loop."""

    def __init__(
        self,
        audited: Sequence[Audited],
        security: SecurityEvents,
        limits: Limits,
        *,
        on_finding: Callable[[Audited, Finding], Awaitable[None]],
    ) -> None:
        """Do nothing yet.

        Args:
            audited: whose files it watches.
            security: where findings are reported.
            limits: the bounds.
            on_finding: called after a finding was reported, in the loop.
        """
        self._audited = audited
        self._security = security
        self._limits = limits
        self._on_finding = on_finding
        self._loop = asyncio.get_running_loop()
        self._owners: dict[Directory, Audited] = {}
        self._watched: set[Directory] = set()
        self._watcher: Watcher | None = None
        self._disabled_reason = ""
        self._waiting: set[tuple[Directory, str]] = set()
        self._rescan_wanted = False
        self._rescans = 0
        self._wake = asyncio.Event()
        self._stopping = False
        self._reading: asyncio.Task[None] | None = None
        self._auditing: asyncio.Task[None] | None = None

    @property
    def status(self) -> MonitorStatus:
        """Return how it watches now."""
        mechanism = self._watcher.mechanism if self._watcher is not None else "none"
        return MonitorStatus(mechanism, len(self._watched), self._rescans, self._disabled_reason)

    def start(self) -> None:
        """Begin to watch."""
        for owner in self._audited:
            owner.on_new_directory = partial(self._add_from_a_thread, owner)
            self._owners.update(dict.fromkeys(owner.watched_directories(), owner))
        self._watch()
        self._auditing = asyncio.create_task(self._audit(), name="monitor")

    async def stop(self) -> None:
        """Report nothing any more, and return when no audit is in progress."""
        self._stopping = True
        self._unwatch()
        self._wake.set()
        if self._auditing is not None:
            await self._auditing

    # -- watching ------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Take the first mechanism that can watch everything, or the last that can watch any."""
        reasons: list[str] = []
        for name in self._limits.watch_mechanisms:
            self._unwatch()
            try:
                self._watcher = MECHANISMS[name]()
            except (OSError, ImportError) as error:
                reasons.append(f"{name}: {_reason(error)}")
                continue
            failure = self._add(self._owners)
            if failure is None:
                break
            reasons.append(f"{name}: {_reason(failure)}")
        else:
            self._disable("; ".join(reasons) or "switched off")
        if self._watcher is not None:
            self._reading = asyncio.create_task(self._read(self._watcher), name="watcher")

    def _unwatch(self) -> None:
        reading, watcher = self._reading, self._watcher
        self._reading = self._watcher = None
        self._watched.clear()
        if reading is not None and watcher is not None:
            reading.add_done_callback(lambda _: watcher.close())  # it still waits on the descriptor
            reading.cancel()
        elif watcher is not None:
            watcher.close()

    def _add(self, directories: Iterable[Directory]) -> OSError | None:
        """Watch them; return the first failure. One that is gone already is none."""
        failure: OSError | None = None
        for directory in directories:
            if self._watcher is None or directory in self._watched:
                continue
            try:
                if len(self._watched) >= self._limits.watched_directories:
                    raise OSError(f"more than {self._limits.watched_directories} directories")
                self._watcher.add(directory)
                self._watched.add(directory)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                failure = failure or error
        return failure

    def _disable(self, reason: str) -> None:
        """Say once that not everything is watched."""
        if not self._watched:
            self._unwatch()
        if not self._disabled_reason:
            event(
                logging.WARNING,
                "monitor-limited",
                watched=len(self._watched),
                audit_seconds=self._limits.audit_seconds,
                reason=reason,
            )
        self._disabled_reason = reason

    def _add_from_a_thread(self, owner: Audited, directory: Directory) -> None:
        with suppress(RuntimeError):  # the loop is over
            self._loop.call_soon_threadsafe(self._add_later, owner, directory)

    def _add_later(self, owner: Audited, directory: Directory) -> None:
        if self._stopping:
            return
        self._owners[directory] = owner
        self._watched.discard(directory)  # it may be a new one of that name
        failure = self._add([directory])
        if failure is None or self._watcher is None:
            return
        if self._watcher.mechanism != self._limits.watch_mechanisms[-1]:
            self._watch()  # perhaps the next one can watch this directory, too
            self._rescan()
        else:
            self._disable(f"{self._watcher.mechanism}: {_reason(failure)}")

    # -- noticing ------------------------------------------------------------------------------

    async def _read(self, watcher: Watcher) -> None:
        try:
            while True:
                for notice in await watcher.read():
                    self._take(notice)
        except OSError as error:  # nothing is watched from here on
            self._watched.clear()
            self._disable(f"{watcher.mechanism}: {_reason(error)}")
            self._rescan()

    def _take(self, notice: Notice) -> None:
        if notice.directory is None or len(self._waiting) >= self._limits.waiting_audits:
            self._rescan()
            return
        if notice.is_over:
            self._watched.discard(notice.directory)
            self._add([notice.directory])  # unless it was made again, this finds nothing
        self._waiting.add((notice.directory, notice.name))
        self._wake.set()

    def _rescan(self) -> None:
        if not self._rescan_wanted:
            self._rescans += 1
        self._rescan_wanted = True
        self._waiting.clear()
        self._wake.set()

    # -- auditing ------------------------------------------------------------------------------

    async def _audit(self) -> None:
        due = self._loop.time() + self._limits.audit_seconds
        while not self._stopping:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._wake.wait()
            self._wake.clear()
            waiting, self._waiting = self._waiting, set()
            everything = self._rescan_wanted or self._loop.time() >= due
            self._rescan_wanted = False
            if everything:
                due = self._loop.time() + self._limits.audit_seconds
            for owner, finding in await asyncio.to_thread(self._look, waiting, everything):
                await self._report(owner, finding)

    def _look(
        self, waiting: set[tuple[Directory, str]], everything: bool
    ) -> list[tuple[Audited, Finding]]:
        """Audit, in a worker thread."""
        found: list[tuple[Audited, Finding]] = []
        if everything:
            for owner in self._audited:
                with _failures_logged(owner):
                    found.extend((owner, finding) for finding in owner.audit_all())
            return found
        for directory, name in sorted(waiting, key=lambda one: (one[0].name, one[1])):
            owner = self._owners[directory]
            with _failures_logged(owner):
                finding = owner.audit(directory, name)
                if finding is not None:
                    found.append((owner, finding))
        return found

    async def _report(self, owner: Audited, finding: Finding) -> None:
        if self._stopping:
            return
        detail = {"detail": finding.detail} if finding.detail else {}
        self._security.report(str(finding.kind), place=owner.place, name=finding.name, **detail)
        await self._on_finding(owner, finding)


@contextmanager
def _failures_logged(owner: Audited) -> Iterator[None]:
    """An audit that fails is no all-clear: it is logged, and tried again with the next one."""
    try:
        yield
    except OSError as error:
        event(logging.WARNING, "audit-failed", place=owner.place, reason=_reason(error))


def _reason(error: OSError | ImportError) -> str:
    strerror: str | None = getattr(error, "strerror", None)
    return strerror or str(error)
