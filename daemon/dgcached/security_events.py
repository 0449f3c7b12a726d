"""What somebody must see: one line of priority 2 each, counted by kind, kept, and streamed.

A security event says that somebody did to the cache what only the cache does. It goes to the log
at the journal's priority `crit` (`journalctl -p crit` finds it), into a counter that Status shows,
and into a ring of the last ones that Watch streams. A field never holds a key, a session id,
content, or a full digest; each is cut at 200 characters, so that the ring has a size.

Followers read from the ring, each at its own pace: it is the one queue of all of them. Who is
slower than the ring turns loses events, and each event tells how many were lost before it.

Used from the event loop alone.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dgcache_core.errors import CacheFullError
from dgcached.logs import as_unicode, event

SEVERITY = "critical"
_LONGEST_FIELD = 200
_LINES_A_MINUTE = 120
_MINUTE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class SecurityEvent:
    """One event, as it is kept."""

    sequence: int
    """From 1, without gaps, since the daemon started."""
    time_seconds: float
    """Of the wall clock, since the epoch."""
    kind: str
    severity: str
    fields: Mapping[str, str]


class SecurityEvents:
    """The one place where security events are reported."""

    def __init__(
        self, *, kept: int, followers: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin without any.

        Args:
            kept: how many are kept for those who ask later, and for slow followers.
            followers: how many may follow at once.
            clock: bounds the lines of one minute.
        """
        self.counts: Counter[str] = Counter()
        self._ring: deque[SecurityEvent] = deque(maxlen=kept)
        self._followers_allowed = followers
        self._waiting: set[asyncio.Future[None]] = set()
        self._followers = 0
        self._closed = False
        self._log = _BoundedLog(clock)

    def report(self, kind: str, /, **fields: Any) -> None:
        """Log, count, keep and stream one event."""
        texts = {name: as_unicode(value)[:_LONGEST_FIELD] for name, value in fields.items()}
        self.counts[kind] += 1
        self._ring.append(SecurityEvent(self.counts.total(), time.time(), kind, SEVERITY, texts))
        self._log.write(kind, texts)
        self._wake()

    async def stream(self, *, follow: bool) -> AsyncGenerator[tuple[SecurityEvent, int], None]:
        """Yield what is kept, then with `follow` what comes, until `close`.

        With each event comes how many between it and the one before this stream did not get; with
        the first one, how many are not kept any more.

        Raises:
            CacheFullError: too many follow already.
        """
        if follow and self._followers >= self._followers_allowed:
            raise CacheFullError(f"{self._followers} follow the events, more are not admitted")
        self._followers += follow
        try:
            sequence = 0
            while True:
                while (next_one := self._after(sequence)) is not None:
                    dropped, sequence = next_one.sequence - sequence - 1, next_one.sequence
                    yield next_one, dropped
                if not follow or self._closed:
                    return
                await self._changed()
        finally:
            self._followers -= follow

    def close(self) -> None:
        """Let every stream end behind the last event."""
        self._closed = True
        self._wake()

    def _after(self, sequence: int) -> SecurityEvent | None:
        """Return the oldest kept event behind `sequence`; the ring has no gaps."""
        if not self._ring or self._ring[-1].sequence <= sequence:
            return None
        return self._ring[max(0, sequence + 1 - self._ring[0].sequence)]

    async def _changed(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)


class _BoundedLog:
    """Writes so many lines a minute; who repeats himself must not rotate the others away."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._minute_ends = 0.0
        self._lines = 0

    def write(self, kind: str, fields: Mapping[str, str]) -> None:
        now = self._clock()
        if now >= self._minute_ends:
            self._minute_ends = now + _MINUTE_SECONDS
            suppressed, self._lines = self._lines - _LINES_A_MINUTE, 0
            if suppressed > 0:
                event(logging.CRITICAL, "security", kind="suppressed", count=suppressed)
        self._lines += 1
        if self._lines <= _LINES_A_MINUTE:
            event(logging.CRITICAL, "security", kind=kind, **fields)
