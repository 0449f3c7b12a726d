"""When the cache gives memory back, and when it takes it again. Figures in, a limit out; no I/O.

Memory runs out in places: the host, and every control group above us that has a limit.

- A place is short when less than its reserve is left there: the limit falls by what is missing, at
  once, and at least by a sixteenth of the budget.
- A place is stalled when its processes wait for memory (PSI) and less than a quarter of it is left:
  the limit falls to half of what is used, once in two averaging periods of the kernel. (Somebody
  else's small group shows in the host's stalls, too; nothing we could free would help it.)
- After a quiet while the limit rises by an eighth of the budget, and again after a shorter one, but
  only where the cache could fill that without making any place short.

The limit is never below the floor nor above the budget, and less memory never means a higher limit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

_MEBIBYTE = 1 << 20
_SMALLEST_FLOOR_BYTES = 32 * _MEBIBYTE
_FLOOR_SHARE = 16
_RESERVE_SHARE = 10
_LARGEST_RESERVE_BYTES = 512 * _MEBIBYTE
_TIGHT_SHARE = 4
_SOME_PERCENT = 10.0
_FULL_PERCENT = 5.0
_LEAST_FALL_SHARE = 16
_RISE_SHARE = 8
_STALL_PAUSE_SECONDS = 4.0
"""The kernel updates its averages every two seconds: one update must lie in between."""
_FASTEST_FILL_BYTES_PER_SECOND = 1 << 30
"""Measured: one thread that touches fresh pages takes 1 to 2 GiB/s."""
_SHORTEST_NAP_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Place:
    """A place where memory can run out, as it is now."""

    name: str
    total_bytes: int
    available_bytes: int
    """What can be had there without swapping; page cache that can be dropped is included."""
    some_percent: float = 0.0
    """Of the last ten seconds, in which at least one process waited for memory (PSI avg10)."""
    full_percent: float = 0.0
    """In which all of them did."""
    alarmed: bool = False
    """The kernel's trigger went off since the last look."""

    @property
    def reserve_bytes(self) -> int:
        """What must be left for everybody else."""
        return min(self.total_bytes // _RESERVE_SHARE, _LARGEST_RESERVE_BYTES)

    @property
    def spare_bytes(self) -> int:
        """What there is above the reserve; negative where the place is short."""
        return self.available_bytes - self.reserve_bytes

    @property
    def stalled(self) -> bool:
        """Tell whether processes wait for memory here and freeing ours can help."""
        waits = self.some_percent >= _SOME_PERCENT or self.full_percent >= _FULL_PERCENT
        return self.available_bytes < self.total_bytes // _TIGHT_SHARE and (waits or self.alarmed)


@dataclass(frozen=True, slots=True)
class Policy:
    """What does not change while the daemon runs."""

    budget_bytes: int
    calm_seconds: float
    """Without pressure, before the limit rises."""
    step_seconds: float
    """From one rise to the next."""

    @property
    def floor_bytes(self) -> int:
        """What the cache keeps whatever happens."""
        share = max(self.budget_bytes // _FLOOR_SHARE, _SMALLEST_FLOOR_BYTES)
        return min(self.budget_bytes, share)


@dataclass(frozen=True, slots=True)
class Regime:
    """The limit in force and what led to it. Times are seconds of one clock."""

    limit_bytes: int
    rises_at: float = 0.0
    halved_at: float = -math.inf
    cause: str = ""
    shrinks: int = 0
    shrunk_at: float = 0.0


def next_regime(
    policy: Policy, regime: Regime, used_bytes: int, places: Sequence[Place], now: float
) -> Regime:
    """Return the regime that fits these figures.

    Args:
        policy: the bounds.
        regime: the one in force.
        used_bytes: what the cache takes now.
        places: at least the host.
        now: seconds.
    """
    shortest = min(places, key=lambda place: place.spare_bytes)
    stalled = next((place for place in places if place.stalled), None)
    if shortest.spare_bytes >= 0 and stalled is None:
        return _risen(policy, regime, used_bytes, shortest.spare_bytes, now)
    held_back = replace(regime, rises_at=now + policy.calm_seconds)
    base = min(regime.limit_bytes, used_bytes)
    limit, cause = regime.limit_bytes, ""
    if shortest.spare_bytes < 0:
        fall = max(-shortest.spare_bytes, policy.budget_bytes // _LEAST_FALL_SHARE)
        limit, cause = base - fall, _shortage(shortest)
    if stalled is not None and now - regime.halved_at >= _STALL_PAUSE_SECONDS:
        held_back = replace(held_back, halved_at=now)
        limit, cause = min(limit, base // 2), cause or _stall(stalled)
    limit = max(policy.floor_bytes, limit)
    if limit >= regime.limit_bytes:
        return held_back
    return replace(
        held_back, limit_bytes=limit, cause=cause, shrinks=regime.shrinks + 1, shrunk_at=now
    )


def seconds_to_next_look(
    policy: Policy, used_bytes: int, places: Sequence[Place], longest_seconds: float
) -> float:
    """Return how long nothing can go wrong: what is spare, filled as fast as that can be.

    A cache at its floor has nothing to give: then looking often would help nobody.
    """
    if used_bytes <= policy.floor_bytes:
        return longest_seconds
    spare = min(place.spare_bytes for place in places)
    seconds = max(spare / _FASTEST_FILL_BYTES_PER_SECOND, _SHORTEST_NAP_SECONDS)
    return min(seconds, longest_seconds)


def _risen(policy: Policy, regime: Regime, used_bytes: int, spare_bytes: int, now: float) -> Regime:
    if regime.limit_bytes >= policy.budget_bytes or now < regime.rises_at:
        return regime
    limit = min(policy.budget_bytes, regime.limit_bytes + policy.budget_bytes // _RISE_SHARE)
    if limit - used_bytes > spare_bytes:
        return regime
    return replace(regime, limit_bytes=limit, rises_at=now + policy.step_seconds)


def _shortage(place: Place) -> str:
    left, total = place.available_bytes >> 20, place.total_bytes >> 20
    return f"{place.name}: {left} of {total} MiB left"


def _stall(place: Place) -> str:
    return f"{place.name}: processes wait for memory, {place.some_percent:.0f} % of the last 10 s"
