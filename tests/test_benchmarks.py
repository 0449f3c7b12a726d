"""What `make bench` compares and how it counts: every peer is real, no step of a sum is lost."""

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from benchmarks.bench_budget import Step, _steps_of
from benchmarks.bench_charts import draw
from benchmarks.bench_figures import Chart, Figure, Group, Panel, break_even, load, save
from benchmarks.bench_idle import wakeup_figures
from benchmarks.bench_report import Chapter, Run, document
from benchmarks.peers import PEERS, Peer
from benchmarks.testbed import ROOT
from benchmarks.trace_marks import Mark, Marks, both

from dgcache_core.errors import CacheCorruptionError, CacheError

DELTAGLIDER = ROOT / ".venv-deltaglider" / "bin" / "python"
CHART = Chart("one", "One", "MB", "ms", [Panel("left", {"dg-cached": [(1, 2.0), (10, 3.0)]})])


@pytest.fixture(params=PEERS, ids=[peer.name for peer in PEERS])
def peer(request: pytest.FixtureRequest) -> Peer:
    """Each peer that is installed here."""
    one: Peer = request.param
    if (command := one.missing()) is not None:
        pytest.skip(f"{one.name} is not installed: {command}")
    return one


def test_a_peer_gives_back_what_was_written(peer: Peer, short_directory: Path) -> None:
    """More than one item of memcached, and no whole number of them; again after it was timed."""
    source = short_directory / "source.bin"
    source.write_bytes(os.urandom(2_500_001))
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    own = short_directory / "own"
    own.mkdir(mode=0o700)
    with peer.opened(own, DELTAGLIDER) as contender:
        contender.write(source)
        assert contender.digest(sha256) == sha256
        assert contender.get(sha256) > 0
        assert contender.digest(sha256) == sha256
        contender.clear()
        if peer.name != "DeltaGlider 6.2.0":  # its cache ends its program then
            with pytest.raises((CacheError, OSError)):
                contender.get(sha256)


@pytest.mark.parametrize("name", ["Redis", "Redis, unchecked"])
def test_the_check_that_is_counted_is_made(name: str, short_directory: Path) -> None:
    """Other bytes under a digest are refused by the one and handed out by the other."""
    peer = next(one for one in PEERS if one.name == name)
    if (command := peer.missing()) is not None:
        pytest.skip(f"{name} is not installed: {command}")
    sha256 = hashlib.sha256(b"right").hexdigest()
    with peer.opened(short_directory, DELTAGLIDER) as contender:
        served: Any = contender
        served.contender._client.set(sha256, b"wrong")
        if name == "Redis":
            with pytest.raises(CacheCorruptionError, match="SHA mismatch"):
                contender.get(sha256)
        else:
            assert contender.digest(sha256) == hashlib.sha256(b"wrong").hexdigest()


def test_what_was_measured_survives_the_way_between_processes(tmp_path: Path) -> None:
    """Figures, charts, and the versions of what else was measured."""
    group = Group("a", "b", [Figure("f", 1.5, "ms", at_most=1.0)], [CHART])
    save(tmp_path / "out", [group], versions={"redis-server": "7.0"})
    versions, groups = load(tmp_path / "out")
    assert groups == [group]
    assert versions.others == {"redis-server": "7.0"}


def test_the_document_has_verdicts_charts_peers_and_the_notes(tmp_path: Path) -> None:
    """A missed target is told in bold; what did not help is taken over from its own file."""
    figures = [Figure("slow", 1.5, "ms", at_most=1.0), Figure("fast", 0.5, "ms", at_most=1.0)]
    chapter = Chapter("everything", None, [Group("lookups", "by hand", figures, [CHART])])
    run = Run([chapter], 3, "make bench", "", {"xdelta3": "3.0.11"}, 0.5)
    text = document(run, tmp_path / "performance.md")
    assert "1 of 2 targets met." in text
    assert "| everything: lookups, slow | ≤ 1 ms | 1.5 ms | **missed by 50 %** |" in text
    assert "](performance-one.svg)" in text
    assert "| xdelta3 | 3.0.11 |" in text
    assert all(f"| {peer.name} |" in text for peer in PEERS)
    assert text.rstrip().endswith((ROOT / "benchmarks" / "notes.md").read_text().rstrip())


def test_the_same_figures_draw_the_same_chart(tmp_path: Path) -> None:
    """So that a rerun changes what changed and nothing else."""
    for name in ("a.svg", "b.svg"):
        draw(CHART, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "dg-cached" in (tmp_path / "a.svg").read_text()


def test_the_steps_of_a_lookup_add_up_to_all_of_it() -> None:
    """Marks of no step lie within one; a lookup that lacks a mark is left out."""
    trace = [
        Mark(at, name)
        for at, name in [(0, "get"), (1000, "in"), (1500, "ping"), (4000, "out"), (9000, "done")]
    ]
    steps = [Step(name, name) for name in ("in", "out", "done")]
    assert _steps_of(trace, steps) == [1.0, 3.0, 5.0]
    assert _steps_of(trace[:-1], steps) is None


def test_marks_of_two_processes_stand_in_one_order(tmp_path: Path) -> None:
    """Both map one ring; a wrapped function is marked before and after, also when it raises."""

    class Owner:
        def work(self) -> None:
            raise ValueError("on purpose")

    writer, reader = (Marks(tmp_path / "ring", both("work")) for _ in range(2))
    writer.around(Owner, "work", "work")
    with pytest.raises(ValueError, match="on purpose"):
        Owner().work()
    taken = reader.taken()
    assert [mark.name for mark in taken] == ["work", "work, done"]
    assert taken[0].at <= taken[1].at
    reader.forget()
    assert writer.taken() == []


@pytest.mark.parametrize(
    ("ours", "pays"),
    [((5, 5, 5), 1.0), ((20, 5, 5), 3.162), ((20, 20, 20), None), ((5, 20, 5), 31.62)],
)
def test_the_break_even_is_the_size_from_which_on_ours_is_no_slower(
    ours: tuple[float, ...], pays: float | None
) -> None:
    """It lies where the lines cross last, on logarithmic scales; there may be none."""
    sizes = (1, 10, 100)
    found = break_even(list(zip(sizes, ours, strict=True)), [(size, 10) for size in sizes])
    assert found == (None if pays is None else pytest.approx(pays, rel=1e-3))


def test_wakeups_of_all_threads_are_held_to_the_target() -> None:
    """The sum a second, and each kind of thread for itself."""
    total, *parts = wakeup_figures("empty", Counter({"timer": 10, "pool": 5}), 10, at_most=1.0)
    assert (total.value, total.met) == (1.5, False)
    assert [part.value for part in parts] == [1.0, 0.5]
