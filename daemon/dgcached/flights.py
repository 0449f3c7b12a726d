"""Leases in the event loop: who asks waits in a task, deadlines are timers, owners are sessions."""

import asyncio

from dgcache_core.leases import Answer, GoAlone, Granted, Leases
from dgcache_core.references import Sha256
from dgcache_proto.v1 import dgcache_pb2 as pb
from dgcached.sessions import Session

_LONGEST_NAP_SECONDS = 1.0
"""Timers stand still while the machine is suspended, deadlines do not (clock_gettime(2)): so often
the two are compared while anybody has a lease or waits for one."""


class Flights:
    """The fetches that clients have in progress. Everything runs in the event loop."""

    def __init__(self, lease_seconds: float) -> None:
        """Make an empty table whose leases last `lease_seconds`."""
        self._leases = Leases(lease_seconds)
        self._timer: asyncio.TimerHandle | None = None
        self._asking: dict[Session, set[asyncio.Future[Answer]]] = {}
        self._closed = False
        self.lease_seconds = lease_seconds

    async def ask(self, sha256: Sha256, session: Session, wait_seconds: float) -> Answer:
        """Return a lease, or wait for the one who has it.

        While it waits, the call counts as none of its session's: the store that ends the wait may
        be the same session's.
        """
        if self._closed or session.is_over:  # nobody would give its lease back
            return GoAlone()
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def on_answer(given: Answer) -> None:
            if not answer.done():
                answer.set_result(given)
            elif isinstance(given, Granted):  # whose call ended in this very moment
                asyncio.get_running_loop().call_soon(self.give_back, given.id, session)

        waiting = self._leases.ask(sha256, session, wait_seconds, on_answer)
        self._set_timer()
        if waiting is None:
            return answer.result()
        asking = self._asking.setdefault(session, set())
        asking.add(answer)
        session.calls.release()
        try:
            try:
                await answer
            finally:
                asking.discard(answer)
                if not asking:
                    self._asking.pop(session, None)
                await _take_again(session.calls)
        except asyncio.CancelledError:
            self._leases.leave(waiting)
            given = answer.result() if answer.done() and not answer.cancelled() else None
            if isinstance(given, Granted):
                self.give_back(given.id, session)
            raise
        return answer.result()

    def stored(self, sha256: Sha256) -> None:
        """A reference came in: whoever waits for it looks again."""
        self._leases.stored(sha256)
        self._set_timer()

    def cannot_be_stored(self, sha256: Sha256) -> None:
        """A reference that somebody fetched is refused: nobody waits for it."""
        self._leases.cannot_be_stored(sha256)
        self._set_timer()

    def give_back(self, lease_id: int, session: Session, *, cannot_be_stored: bool = False) -> None:
        """End a lease of this session without a store."""
        self._leases.give_back(lease_id, session, cannot_be_stored=cannot_be_stored)
        self._set_timer()

    def end_session(self, session: Session) -> None:
        """The session is over: what it had goes to the next, and its own calls wait no more."""
        self._leases.end_owner(session)
        for answer in self._asking.pop(session, ()):
            if not answer.done():
                answer.set_result(GoAlone())
        self._set_timer()

    def close(self) -> None:
        """The daemon ends: nobody waits any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._leases.release_all()

    def describe(self) -> pb.LeaseStatus:
        """Return the figures for Status."""
        counters = self._leases.counters
        return pb.LeaseStatus(
            held=self._leases.held,
            waiting=self._leases.waiting,
            granted=counters.granted,
            passed_on=counters.passed_on,
            expired=counters.expired,
            saved=counters.saved,
            not_stored=counters.not_stored,
        )

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        seconds = self._leases.seconds_to_next()
        if seconds is not None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(
                min(seconds, _LONGEST_NAP_SECONDS), self._tick
            )

    def _tick(self) -> None:
        self._timer = None
        self._leases.tick()
        self._set_timer()


async def _take_again(calls: asyncio.Semaphore) -> None:
    """Count the call again, also one that is cancelled: its end gives the place back."""
    taking = asyncio.ensure_future(calls.acquire())
    cancelled: asyncio.CancelledError | None = None
    while not taking.done():
        try:
            await asyncio.shield(taking)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
