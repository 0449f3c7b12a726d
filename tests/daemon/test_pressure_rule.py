"""The rule that sets the cache's limit: figures in, a limit out."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgcached.pressure import Place, Policy, Regime, next_regime, seconds_to_next_look
from tests.core.support import DETERMINISTIC

MIB = 1 << 20
GIB = 1 << 30
POLICY = Policy(budget_bytes=2 * GIB, calm_seconds=30.0, step_seconds=10.0)
ROOMY = Place("host", 32 * GIB, 16 * GIB)
GROUP = Place("control group /g", 2 * GIB, GIB)
START = Regime(POLICY.budget_bytes)


def after(
    regime: Regime, used: int, *places: Place, now: float = 100.0, policy: Policy = POLICY
) -> Regime:
    """Return the next regime; the host is roomy where nothing is said of it."""
    return next_regime(policy, regime, used, places or (ROOMY,), now)


def short_by(missing: int, place: Place = GROUP) -> Place:
    """Return a place in which so much is missing to its reserve."""
    return replace(place, available_bytes=place.reserve_bytes - missing)


def test_nothing_changes_while_there_is_room() -> None:
    """Whatever is used, with every place above its reserve."""
    for used in (0, GIB, 2 * GIB):
        assert after(START, used, ROOMY, GROUP) == START


def test_a_shortage_takes_what_is_missing_of_what_is_used() -> None:
    """Not of the limit: a cache that uses half of it would free nothing."""
    regime = after(START, GIB, ROOMY, short_by(300 * MIB))
    assert regime.limit_bytes == GIB - 300 * MIB
    assert regime.shrinks == 1
    assert regime.shrunk_at == 100.0
    assert regime.cause.startswith("control group /g: ")


def test_the_limit_falls_in_at_most_sixteen_steps() -> None:
    """A shortage that creeps in, a page at a time, is no page-wise fall: logs stay readable."""
    regime, used = START, 2 * GIB
    for _ in range(16):
        regime = after(regime, used, ROOMY, short_by(4096))
        used = regime.limit_bytes
    assert regime.limit_bytes == POLICY.floor_bytes
    assert regime.shrinks <= 16
    assert after(regime, used, ROOMY, short_by(4096)).shrinks == regime.shrinks


@pytest.mark.parametrize(
    "waiting", [{"some_percent": 10.0}, {"full_percent": 5.0}, {"alarmed": True}]
)
def test_stalls_halve_what_is_used_where_a_place_is_tight(waiting: dict[str, float]) -> None:
    """In a tight place any of the kernel's signs does; in a roomy one none does."""
    tight = replace(GROUP, available_bytes=GROUP.total_bytes // 5, **waiting)
    assert after(START, GIB, ROOMY, tight).limit_bytes == GIB // 2
    assert after(START, GIB, ROOMY, replace(GROUP, **waiting)) == START
    assert after(START, GIB, replace(ROOMY, **waiting)) == START


def test_one_stall_is_answered_once() -> None:
    """The kernel's averages outlive the stall: the next halving waits for fresh ones."""
    tight = replace(GROUP, available_bytes=GROUP.total_bytes // 5, some_percent=40.0)
    first = after(START, GIB, tight, now=100.0)
    assert after(first, GIB // 2, tight, now=101.0).limit_bytes == GIB // 2
    assert after(first, GIB // 2, tight, now=104.0).limit_bytes == GIB // 4


def test_it_grows_back_after_a_quiet_while_and_in_steps() -> None:
    """30 s, then an eighth of the budget every 10 s, up to the budget and no further."""
    low = after(START, GIB, short_by(3 * GIB, ROOMY), now=100.0)
    assert low.limit_bytes == POLICY.floor_bytes
    assert after(low, 0, now=129.9) == low
    regime, moments = low, []
    for tick in range(130, 300):
        before, regime = regime, after(regime, 0, now=float(tick))
        if regime != before:
            assert regime.limit_bytes - before.limit_bytes <= 256 * MIB
            moments.append(tick)
    assert regime.limit_bytes == POLICY.budget_bytes
    assert moments == list(range(130, 130 + 8 * 10, 10))
    assert (regime.shrinks, regime.cause) == (low.shrinks, low.cause)


def test_pressure_begins_the_quiet_while_anew() -> None:
    """Also where the limit is at its floor and cannot fall."""
    low = after(START, GIB, short_by(3 * GIB, ROOMY), now=100.0)
    again = after(low, 0, short_by(MIB, ROOMY), now=125.0)
    assert again.limit_bytes == low.limit_bytes
    assert after(again, 0, now=140.0).limit_bytes == low.limit_bytes
    assert after(again, 0, now=155.0).limit_bytes > low.limit_bytes


def test_it_does_not_grow_into_the_next_shortage() -> None:
    """A step is taken only where the cache could fill it and nobody were short."""
    low = replace(START, limit_bytes=GIB)
    step = POLICY.budget_bytes // 8
    enough = replace(GROUP, available_bytes=GROUP.reserve_bytes + step)
    assert after(low, GIB, enough).limit_bytes == GIB + step
    too_little = replace(enough, available_bytes=enough.available_bytes - 1)
    assert after(low, GIB, too_little) == low


@pytest.mark.parametrize(
    ("budget", "floor"),
    [(MIB, MIB), (32 * MIB, 32 * MIB), (64 * MIB, 32 * MIB), (2 * GIB, 128 * MIB)],
)
def test_the_floor_is_a_sixteenth_and_at_least_32_mib(budget: int, floor: int) -> None:
    """Or the whole of a smaller budget."""
    assert replace(POLICY, budget_bytes=budget).floor_bytes == floor


# -- any figures ---------------------------------------------------------------------------------

budgets = st.integers(1, 8 * GIB)
places = st.builds(
    lambda total, share, some, full, alarmed: Place(
        "place", total, int(total * share), some, full, alarmed
    ),
    total=st.integers(1, 64 * GIB),
    share=st.floats(0, 1),
    some=st.floats(0, 100),
    full=st.floats(0, 100),
    alarmed=st.booleans(),
)


@DETERMINISTIC
@given(
    budget=budgets,
    looks=st.lists(
        st.tuples(st.lists(places, min_size=1, max_size=3), st.floats(0, 1), st.floats(0, 60)),
        max_size=30,
    ),
)
def test_the_limit_is_never_below_the_floor_nor_above_the_budget(
    budget: int, looks: list[tuple[list[Place], float, float]]
) -> None:
    """Whatever is seen in whatever order; each fall is counted and has a cause."""
    policy = replace(POLICY, budget_bytes=budget)
    regime, now = Regime(budget), 0.0
    for seen, share, pause in looks:
        now += pause
        before = regime
        regime = after(regime, int(share * 2 * budget), *seen, now=now, policy=policy)
        assert policy.floor_bytes <= regime.limit_bytes <= budget
        assert regime.shrinks == before.shrinks + (regime.limit_bytes < before.limit_bytes)
        assert bool(regime.cause) == bool(regime.shrinks)


@DETERMINISTIC
@given(
    seen=st.lists(places, min_size=1, max_size=3),
    which=st.integers(0, 2),
    less=st.integers(0, 64 * GIB),
    share=st.floats(0, 1),
    limit_share=st.floats(0, 1),
    now=st.floats(0, 100),
)
def test_less_memory_never_means_a_higher_limit(
    seen: list[Place], which: int, less: int, share: float, limit_share: float, now: float
) -> None:
    """Nor does a stall: the limit is monotone in what is available, all else being equal."""
    floor, budget = POLICY.floor_bytes, POLICY.budget_bytes
    regime = replace(
        START, limit_bytes=floor + int(limit_share * (budget - floor)), rises_at=50.0, halved_at=47
    )
    one = seen[which % len(seen)]
    worse = replace(one, available_bytes=max(0, one.available_bytes - less), alarmed=True)
    then = [worse if place is one else place for place in seen]
    used = int(share * budget)
    better_limit = after(regime, used, *seen, now=now).limit_bytes
    assert after(regime, used, *then, now=now).limit_bytes <= better_limit


# -- when to look again --------------------------------------------------------------------------


def test_the_less_is_spare_the_sooner_it_looks() -> None:
    """In the time until the next look what is spare cannot be used up; never above the bound."""
    spare = replace(GROUP, available_bytes=GROUP.reserve_bytes + 512 * MIB)
    assert seconds_to_next_look(POLICY, GIB, [ROOMY], 5.0) == 5.0
    assert seconds_to_next_look(POLICY, GIB, [ROOMY, spare], 5.0) == pytest.approx(0.5)
    assert seconds_to_next_look(POLICY, GIB, [ROOMY, short_by(MIB)], 5.0) == 0.25


def test_a_cache_at_its_floor_does_not_look_often() -> None:
    """It has nothing to give, however short memory is."""
    assert seconds_to_next_look(POLICY, POLICY.floor_bytes, [short_by(MIB)], 5.0) == 5.0
