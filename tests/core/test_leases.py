"""Who fetches and who waits: every rule of `Leases`, and a state machine against a plain model."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from dgcache_core.leases import (
    MOST_FETCHES,
    UNSTORABLE_SECONDS,
    Answer,
    GoAlone,
    Granted,
    Leases,
    LookAgain,
)
from dgcache_core.references import Sha256

SHA = Sha256("a" * 64)
OTHER = Sha256("b" * 64)
LEASE_SECONDS = 100.0


class Time:
    """A clock that goes only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Table:
    """Leases, a clock, and every answer by who asked."""

    def __init__(self) -> None:
        self.time = Time()
        self.leases = Leases(LEASE_SECONDS, self.time)
        self.answers: dict[str, Answer] = {}

    def ask(self, name: str, wait_seconds: float = 10, sha256: Sha256 = SHA) -> Answer | None:
        """Ask as an owner of that name; return the answer if it came at once."""

        def on_answer(answer: Answer) -> None:
            assert name not in self.answers, "answered twice"
            self.answers[name] = answer

        waiting = self.leases.ask(sha256, name, wait_seconds, on_answer)
        assert (waiting is None) == (name in self.answers)
        return self.answers.get(name)

    def lease(self, name: str) -> int:
        answer = self.answers[name]
        assert isinstance(answer, Granted)
        return answer.id

    def after(self, seconds: float) -> None:
        self.time.now += seconds
        self.leases.tick()


@pytest.fixture
def table() -> Table:
    return Table()


def test_the_first_gets_a_lease_and_the_others_wait(table: Table) -> None:
    """Whoever it is; another digest is another matter."""
    assert isinstance(table.ask("a"), Granted)
    assert table.ask("b") is None
    assert table.ask("c") is None
    assert isinstance(table.ask("d", sha256=OTHER), Granted)
    assert (table.leases.held, table.leases.waiting) == (2, 2)


def test_a_store_sends_everybody_to_look_again(table: Table) -> None:
    """Also one that came from somebody without a lease."""
    for name in "abc":
        table.ask(name)
    table.leases.stored(SHA)
    assert table.answers["b"] == table.answers["c"] == LookAgain()
    assert (table.leases.held, table.leases.waiting, table.leases.counters.saved) == (0, 0, 2)


def test_a_lease_that_is_given_back_goes_to_the_next_in_line(table: Table) -> None:
    """Only its owner can give it back, and once."""
    for name in "abc":
        table.ask(name)
    table.leases.give_back(table.lease("a"), "c")
    assert "b" not in table.answers
    table.leases.give_back(table.lease("a"), "a")
    assert isinstance(table.answers["b"], Granted)
    table.leases.give_back(table.lease("a"), "a")
    assert "c" not in table.answers
    assert table.leases.counters.passed_on == 1


def test_the_end_of_an_owner_passes_its_leases_on(table: Table) -> None:
    """And takes it out of every line."""
    for name in "abc":
        table.ask(name)
    table.leases.end_owner("b")
    table.leases.end_owner("a")
    assert "b" not in table.answers
    assert isinstance(table.answers["c"], Granted)


def test_a_holder_loses_the_lease_at_its_deadline(table: Table) -> None:
    """At the deadline, not before it."""
    table.ask("a")
    table.ask("b", wait_seconds=1000)
    table.after(LEASE_SECONDS - 1)
    assert "b" not in table.answers
    assert table.leases.seconds_to_next() == 1
    table.after(1)
    assert isinstance(table.answers["b"], Granted)
    assert table.leases.counters.expired == 1


def test_one_whose_budget_is_over_fetches_beside_the_holder(table: Table) -> None:
    """One; the others wait on, until one of the two is done."""
    table.ask("a")
    for name in "bcd":
        table.ask(name, wait_seconds=10)
    table.after(10)
    assert isinstance(table.answers["b"], Granted)
    assert "c" not in table.answers
    table.after(50)
    assert "c" not in table.answers
    table.leases.give_back(table.lease("b"), "b")
    assert isinstance(table.answers["c"], Granted)
    table.leases.stored(SHA)
    assert table.answers["d"] == LookAgain()


def test_a_budget_of_nothing_does_not_wait_for_a_single_holder(table: Table) -> None:
    """The second fetches at once, the third waits."""
    table.ask("a")
    assert isinstance(table.ask("b", wait_seconds=0), Granted)
    assert table.ask("c", wait_seconds=0) is None


def test_what_cannot_be_stored_releases_the_line_and_is_remembered(table: Table) -> None:
    """For a minute nobody waits; after it, or after a store, somebody may try again."""
    for name in "abc":
        table.ask(name)
    table.leases.give_back(table.lease("a"), "a", cannot_be_stored=True)
    assert table.answers["b"] == table.answers["c"] == GoAlone()
    assert table.ask("d") == GoAlone()
    assert isinstance(table.ask("e", sha256=OTHER), Granted)
    table.after(UNSTORABLE_SECONDS)
    assert isinstance(table.ask("f"), Granted)
    table.leases.cannot_be_stored(SHA)
    table.leases.stored(SHA)
    assert isinstance(table.ask("g"), Granted)


def test_no_wait_is_endless(table: Table) -> None:
    """Where every holder hangs, the last moment comes all the same."""
    for name in "abcdefgh":
        table.ask(name, wait_seconds=10)
    for _ in range(5):
        table.after(LEASE_SECONDS)
    assert set(table.answers) == set("abcdefgh")
    table.after(LEASE_SECONDS)
    assert (table.leases.held, table.leases.waiting) == (0, 0)
    assert table.leases.seconds_to_next() is None


def test_tables_are_bounded(table: Table) -> None:
    """Past the bounds nobody waits and nothing is remembered."""
    for number in range(1024):
        table.ask(f"d{number}", sha256=Sha256(f"{number:064x}"))
    assert table.ask("one more digest") == GoAlone()
    for number in range(1024):
        table.ask(f"w{number}", sha256=Sha256(f"{0:064x}"))
    assert table.ask("one more in line", sha256=Sha256(f"{1:064x}")) == GoAlone()


def test_the_end_releases_everybody(table: Table) -> None:
    """A daemon that stops lets nobody wait."""
    for name in "abc":
        table.ask(name)
    table.leases.release_all()
    assert table.answers["b"] == table.answers["c"] == GoAlone()
    assert (table.leases.held, table.leases.waiting) == (0, 0)


@dataclass
class ModelFlight:
    """The plain model: names in order."""

    holders: dict[str, float] = field(default_factory=dict)
    line: list[tuple[str, float, float]] = field(default_factory=list)


class LeaseMachine(RuleBasedStateMachine):
    """Every caller is an owner of its own; killing it is `end_owner`."""

    owners = Bundle("owners")

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.model: dict[Sha256, ModelFlight] = {SHA: ModelFlight(), OTHER: ModelFlight()}
        self.unstorable: dict[Sha256, float] = {}
        self.expected: dict[str, str] = {}
        self.count = 0

    @rule(target=owners, sha256=st.sampled_from([SHA, OTHER]), wait=st.sampled_from([0, 5, 40]))
    def ask(self, sha256: Sha256, wait: float) -> tuple[str, Sha256]:
        name = f"n{self.count}"
        self.count += 1
        self.table.ask(name, wait, sha256)
        flight, now = self.model[sha256], self.table.time.now
        if self.unstorable.get(sha256, 0) > now and not flight.holders:
            self.expected[name] = "GoAlone"
            return name, sha256
        flight.line.append((name, now + wait, now + wait + 2 * LEASE_SECONDS))
        self.settle()
        return name, sha256

    @rule(one=consumes(owners))
    def kill(self, one: tuple[str, Sha256]) -> None:
        name, sha256 = one
        self.table.leases.end_owner(name)
        flight = self.model[sha256]
        flight.holders.pop(name, None)
        flight.line = [waiting for waiting in flight.line if waiting[0] != name]
        self.settle()

    @rule(one=owners, cannot=st.booleans())
    def give_back(self, one: tuple[str, Sha256], cannot: bool) -> None:
        name, sha256 = one
        answer = self.table.answers.get(name)
        if not isinstance(answer, Granted):
            return
        self.table.leases.give_back(answer.id, name, cannot_be_stored=cannot)
        flight = self.model[sha256]
        if name not in flight.holders:
            return
        if cannot:
            self.end(sha256, "GoAlone")
            self.unstorable[sha256] = self.table.time.now + UNSTORABLE_SECONDS
        else:
            del flight.holders[name]
        self.settle()

    @rule(sha256=st.sampled_from([SHA, OTHER]))
    def store(self, sha256: Sha256) -> None:
        self.table.leases.stored(sha256)
        self.unstorable.pop(sha256, None)
        self.end(sha256, "LookAgain")

    @rule(seconds=st.sampled_from([1, 5, 37, 60, 100]))
    def time_goes_by(self, seconds: float) -> None:
        self.table.after(seconds)
        self.settle()

    def end(self, sha256: Sha256, answer: str) -> None:
        for name, _, _ in self.model[sha256].line:
            self.expected[name] = answer
        self.model[sha256] = ModelFlight()

    def settle(self) -> None:
        now = self.table.time.now
        for flight in self.model.values():
            flight.holders = {n: d for n, d in flight.holders.items() if d > now}
            for name, budget_ends, _ in list(flight.line):
                alone = not flight.holders
                if alone or (len(flight.holders) < MOST_FETCHES and budget_ends <= now):
                    flight.holders[name] = now + LEASE_SECONDS
                    flight.line = [waiting for waiting in flight.line if waiting[0] != name]
                    self.expected[name] = "Granted"
            for name, _, patience_ends in list(flight.line):
                if patience_ends <= now:
                    flight.line = [waiting for waiting in flight.line if waiting[0] != name]
                    self.expected[name] = "GoAlone"

    @invariant()
    def everybody_has_the_models_answer(self) -> None:
        given = {name: type(answer).__name__ for name, answer in self.table.answers.items()}
        assert given == self.expected

    @invariant()
    def never_more_than_two_fetch_and_nobody_waits_for_nobody(self) -> None:
        assert self.table.leases.held == sum(len(f.holders) for f in self.model.values())
        assert self.table.leases.waiting == sum(len(f.line) for f in self.model.values())
        for flight in self.model.values():
            assert len(flight.holders) <= MOST_FETCHES
            assert flight.holders or not flight.line

    @invariant()
    def there_is_a_next_moment_while_somebody_waits(self) -> None:
        if self.table.leases.waiting:
            assert self.table.leases.seconds_to_next() is not None


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
