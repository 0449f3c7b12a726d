"""What a soak shows, for people and for programs, and whether every invariant held."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dgcache_cli.output import human_seconds, human_size, print_fields, print_json, print_table
from tests.soak.measures import AtRest
from tests.soak.run import Outcome

GROWTH = 0.01


@dataclass(frozen=True)
class Invariant:
    """Something that must hold."""

    name: str
    seen: str
    wanted: str
    holds: bool


def growth(before: int, after: int) -> float:
    """Return how much larger it is, as a fraction."""
    return (after - before) / before


def invariants(outcome: Outcome) -> list[Invariant]:
    """Judge a run."""
    tally, before, after = outcome.tally, outcome.before, outcome.after
    memory = growth(before.memory_kib, after.memory_kib)
    descriptors = growth(before.descriptors, after.descriptors)
    return [
        _none("wrong bytes", tally.wrong_bytes),
        _none("operations failed because of the cache", tally.failed),
        _none("plaintext left on disk, files", len(outcome.plaintext)),
        _none("complaints of daemons (tracebacks, ends of their own)", len(outcome.complaints)),
        Invariant(
            "lives of the steady daemon",
            str(outcome.steady_lives),
            "1",
            outcome.steady_lives == 1,
        ),
        Invariant(
            "descriptors at rest",
            f"{before.descriptors} → {after.descriptors} ({descriptors:+.1%})",
            f"≤ {GROWTH:+.0%}",
            descriptors <= GROWTH,
        ),
        Invariant(
            "memory at rest",
            f"{before.memory_kib} → {after.memory_kib} KiB ({memory:+.1%})",
            f"≤ {GROWTH:+.0%}",
            memory <= GROWTH,
        ),
    ]


def _none(name: str, count: int) -> Invariant:
    return Invariant(name, str(count), "0", count == 0)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return everything, for programs."""
    tally = outcome.tally
    return {
        "seed": outcome.seed,
        "seconds": outcome.seconds,
        "holds": all(one.holds for one in invariants(outcome)),
        "invariants": [asdict(one) for one in invariants(outcome)],
        "operations": dict(tally.operations),
        "sources": dict(tally.sources),
        "notes": dict(tally.notes),
        "bytes_compared": tally.bytes_compared,
        "bytes_stored": tally.bytes_stored,
        "slowest_seconds": tally.slowest_seconds,
        "client_lives": tally.lives,
        "daemon_lives": outcome.steady_lives + outcome.mortal_lives,
        "faults": dict(outcome.faults),
        "not_done": dict(outcome.not_done),
        "warm": [asdict(one) for one in outcome.warm],
        "rests": [asdict(one) for one in outcome.rests],
        "files_searched": outcome.files_searched,
        "unsent": outcome.unsent,
        "failures": tally.failures,
        "complaints": outcome.complaints,
        "plaintext": outcome.plaintext,
    }


def show(outcome: Outcome, *, json: bool) -> None:
    """Print it."""
    if json:
        print_json(as_json(outcome))
        return
    tally = outcome.tally
    before, after = outcome.before, outcome.after
    print_fields(
        [
            ("seed", str(outcome.seed)),
            ("time", human_seconds(outcome.seconds)),
            ("operations", _counts(tally.operations)),
            ("references from", _counts(tally.sources)),
            ("bytes compared", human_size(tally.bytes_compared)),
            ("slowest operation", f"{tally.slowest_seconds:.1f} s"),
            ("clients", f"{tally.lives} processes"),
            ("daemons", f"1 that lives on, {outcome.mortal_lives} lives of the other"),
            ("faults", _counts(outcome.faults)),
            ("not done", _counts(outcome.not_done) or "none"),
            ("files searched", str(outcome.files_searched)),
            ("statuses gRPC could not send", str(outcome.unsent)),
            ("threads at rest", f"{before.threads} → {after.threads}"),
            ("memory while warming up", _memories(outcome.warm)),
            ("memory at rests", _memories(outcome.rests)),
            ("program pages", f"{before.file_kib} → {after.file_kib} KiB"),
        ]
    )
    rows = [
        (one.name, one.seen, one.wanted, "holds" if one.holds else "BROKEN")
        for one in invariants(outcome)
    ]
    print_table(("invariant", "seen", "wanted", ""), rows)
    for line in (*tally.failures, *outcome.complaints, *outcome.plaintext):
        print(line)


def _memories(rests: Sequence[AtRest]) -> str:
    return " → ".join(str(one.memory_kib) for one in rests) + " KiB"


def _counts(counts: Any) -> str:
    total = sum(counts.values())
    each = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return f"{total}: {each}" if total else ""
