"""Who fetches a missing reference while the others wait (single-flight).

The rules, by digest:

- the first who asks gets a lease; whoever asks meanwhile waits in line;
- a lease ends when its reference is stored (everybody in the line looks again), when it is given
  back or its owner goes (the next in line gets one), and at its deadline (a holder that hangs);
- who has waited as long as it would may fetch as well, one beside the holder; the others wait on.
  So nobody waits in vain for a slow fetch, and there are never more than `MOST_FETCHES` at a time;
- a reference that cannot be stored releases the whole line, and for `UNSTORABLE_SECONDS` nobody
  waits for it: each would get nothing but its turn.

No wait is endless: each has a last moment (`_LONGEST_WAITS` leases after its budget), after which
it ends like a line that is released. Tables are bounded; past a bound nobody waits.

The clock is given and nothing here sleeps: the caller calls `tick` after `seconds_to_next`. Not
thread-safe.
"""

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from dgcache_core.clock import Clock, boottime_seconds
from dgcache_core.references import Sha256

MOST_FETCHES = 2
UNSTORABLE_SECONDS = 60.0

_MOST_DIGESTS = 1024
_MOST_IN_LINE = 1024
_MOST_UNSTORABLE = 1024
_LONGEST_WAITS = 2


@dataclass(frozen=True, slots=True)
class Granted:
    """The answer "fetch it; others wait for you", until `deadline` on the clock."""

    id: int
    sha256: Sha256
    deadline: float


@dataclass(frozen=True, slots=True)
class LookAgain:
    """The answer "somebody stored it"."""


@dataclass(frozen=True, slots=True)
class GoAlone:
    """The answer "fetch it; nobody waits for you"."""


Answer = Granted | LookAgain | GoAlone


@dataclass(slots=True, eq=False)
class Waiting:
    """One who asked and has no answer yet."""

    sha256: Sha256
    owner: Hashable
    budget_ends: float
    patience_ends: float
    on_answer: Callable[[Answer], None]


@dataclass(slots=True)
class LeaseCounters:
    """What happened since the table was made."""

    granted: int = 0
    passed_on: int = 0
    expired: int = 0
    saved: int = 0
    not_stored: int = 0


@dataclass(slots=True)
class _Flight:
    """One missing digest: who fetches it, and who waits, first come first."""

    holders: dict[int, tuple[Granted, Hashable]] = field(default_factory=dict)
    line: deque[Waiting] = field(default_factory=deque)


class Leases:
    """The table of fetches in progress."""

    def __init__(self, lease_seconds: float, clock: Clock = boottime_seconds) -> None:
        """Make an empty table.

        Args:
            lease_seconds: how long a holder may take.
            clock: seconds, for deadlines.
        """
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._ids = itertools.count(1)
        self._flights: dict[Sha256, _Flight] = {}
        self._digests: dict[int, Sha256] = {}  # of every lease that is held
        self._unstorable: OrderedDict[Sha256, float] = OrderedDict()
        self.counters = LeaseCounters()

    @property
    def held(self) -> int:
        """How many leases are held."""
        return len(self._digests)

    @property
    def waiting(self) -> int:
        """How many wait in line."""
        return sum(len(flight.line) for flight in self._flights.values())

    def ask(
        self,
        sha256: Sha256,
        owner: Hashable,
        wait_seconds: float,
        on_answer: Callable[[Answer], None],
    ) -> Waiting | None:
        """Ask for a missing reference.

        Args:
            sha256: which one.
            owner: whose end gives the lease back.
            wait_seconds: the budget of a wait for others.
            on_answer: called once, now or later.

        Returns:
            The place in the line, for `leave`; None where the answer was given at once.
        """
        self.tick()
        now = self._clock()
        flight = self._flights.get(sha256)
        if flight is None:
            if self._cannot_be_stored(sha256, now) or len(self._flights) >= _MOST_DIGESTS:
                on_answer(GoAlone())
                return None
            flight = self._flights[sha256] = _Flight()
            on_answer(self._grant(flight, sha256, owner))
            return None
        if self.waiting >= _MOST_IN_LINE:
            on_answer(GoAlone())
            return None
        budget_ends = now + wait_seconds
        waiting = Waiting(
            sha256,
            owner,
            budget_ends,
            budget_ends + _LONGEST_WAITS * self._lease_seconds,
            on_answer,
        )
        flight.line.append(waiting)
        self._promote(sha256)  # a budget of nothing is over at once
        return waiting if waiting in flight.line else None

    def leave(self, waiting: Waiting) -> None:
        """Forget one who does not wait any more. Does nothing after its answer."""
        flight = self._flights.get(waiting.sha256)
        if flight is not None and waiting in flight.line:
            flight.line.remove(waiting)

    def stored(self, sha256: Sha256) -> None:
        """The reference is there, whoever brought it: the line looks again."""
        self._unstorable.pop(sha256, None)
        flight = self._end(sha256)
        for waiting in flight.line:
            self.counters.saved += 1
            waiting.on_answer(LookAgain())

    def cannot_be_stored(self, sha256: Sha256) -> None:
        """No cache takes the reference: nobody waits for it, now and for a while."""
        self.counters.not_stored += 1
        self._unstorable[sha256] = self._clock() + UNSTORABLE_SECONDS
        self._unstorable.move_to_end(sha256)
        if len(self._unstorable) > _MOST_UNSTORABLE:
            self._unstorable.popitem(last=False)
        for waiting in self._end(sha256).line:
            waiting.on_answer(GoAlone())

    def give_back(self, lease_id: int, owner: Hashable, *, cannot_be_stored: bool = False) -> None:
        """End a lease without a store and pass it on; nothing where the owner has none such."""
        sha256 = self._digests.get(lease_id)
        if sha256 is None or self._flights[sha256].holders[lease_id][1] != owner:
            return
        if cannot_be_stored:
            self.cannot_be_stored(sha256)
            return
        self._drop_lease(lease_id)
        self._promote(sha256)

    def end_owner(self, owner: Hashable) -> None:
        """The owner is gone: its leases are passed on, its places in the line are free."""
        for flight in self._flights.values():
            flight.line = deque(waiting for waiting in flight.line if waiting.owner != owner)
        for lease_id, sha256 in list(self._digests.items()):
            if self._flights[sha256].holders[lease_id][1] == owner:
                self.give_back(lease_id, owner)

    def tick(self) -> None:
        """Do what is due: leases expire, budgets end, the unstorable are forgotten."""
        now = self._clock()
        for lease_id, sha256 in list(self._digests.items()):
            if self._flights[sha256].holders[lease_id][0].deadline <= now:
                self.counters.expired += 1
                self._drop_lease(lease_id)
        for sha256 in list(self._flights):
            self._promote(sha256)
        while self._unstorable and next(iter(self._unstorable.values())) <= now:
            self._unstorable.popitem(last=False)

    def release_all(self) -> None:
        """Nobody waits any more: the table is empty."""
        for sha256 in list(self._flights):
            for waiting in self._end(sha256).line:
                waiting.on_answer(GoAlone())

    def seconds_to_next(self) -> float | None:
        """Return how long until `tick` has something to do, or None where it never has."""
        now = self._clock()
        moments = [
            lease.deadline
            for flight in self._flights.values()
            for lease, _ in flight.holders.values()
        ]
        for flight in self._flights.values():
            for waiting in flight.line:
                moments.append(waiting.patience_ends)
                if waiting.budget_ends > now:  # later, only the end of a fetch helps it
                    moments.append(waiting.budget_ends)
        return max(0.0, min(moments) - now) if moments else None

    def _cannot_be_stored(self, sha256: Sha256, now: float) -> bool:
        return self._unstorable.get(sha256, now) > now

    def _grant(self, flight: _Flight, sha256: Sha256, owner: Hashable) -> Granted:
        lease = Granted(next(self._ids), sha256, self._clock() + self._lease_seconds)
        flight.holders[lease.id] = (lease, owner)
        self._digests[lease.id] = sha256
        self.counters.granted += 1
        return lease

    def _drop_lease(self, lease_id: int) -> None:
        del self._flights[self._digests.pop(lease_id)].holders[lease_id]

    def _promote(self, sha256: Sha256) -> None:
        """Grant what the line is due: the first when nobody fetches, beside a holder the first
        whose budget is over."""
        flight = self._flights[sha256]
        now = self._clock()
        while flight.line and len(flight.holders) < MOST_FETCHES:
            alone = not flight.holders
            due = next((w for w in flight.line if alone or w.budget_ends <= now), None)
            if due is None:
                break
            flight.line.remove(due)
            if alone:
                self.counters.passed_on += 1
            due.on_answer(self._grant(flight, sha256, due.owner))
        for waiting in [w for w in flight.line if w.patience_ends <= now]:
            flight.line.remove(waiting)
            waiting.on_answer(GoAlone())
        if not flight.holders and not flight.line:
            del self._flights[sha256]

    def _end(self, sha256: Sha256) -> _Flight:
        flight = self._flights.pop(sha256, None) or _Flight()
        for lease_id in flight.holders:
            del self._digests[lease_id]
        return flight
