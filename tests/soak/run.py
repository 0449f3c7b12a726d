"""One run of the soak: warm up, measure, do harm while clients work, measure again, search disks.

Two households: `steady` has one daemon life throughout, which is stopped, squeezed and robbed of
its sockets and disk, and measured; `mortal` is killed, ended and has its clock stepped as well.
"""

import glob
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.soak.crews import Slot, Tally
from tests.soak.faults import KINDS, LIBFAKETIME, Fault, Injector, World, schedule, set_clock
from tests.soak.households import Household
from tests.soak.measures import AtRest, at_rest, leftovers
from tests.soak.truth import Truth
from tests.support.memory_group import MemoryGroup, memory_group

GROUP_BYTES = 360 << 20
STEADY_MB, MORTAL_MB = 24, 16
_WARM_UP_PARTS, PARTS = 5, 4
_HARMLESS_WHILE_WARMING = [kind for kind in KINDS if kind != "kill-daemon"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """Everything that was seen."""

    seed: int
    seconds: float
    tally: Tally
    faults: Mapping[str, int]
    not_done: Mapping[str, int]
    warm: Sequence[AtRest]
    """After each part of the warm-up."""
    rests: Sequence[AtRest]
    """After each part of the soak."""
    steady_lives: int
    mortal_lives: int
    complaints: list[str]
    unsent: int
    """How often gRPC had nobody left to send a call's status to, and printed a traceback."""
    plaintext: list[str]
    files_searched: int

    @property
    def before(self) -> AtRest:
        """The last measurement of the warm-up, with the most memory of any of them.

        Python takes memory for small objects by the MiB and gives a MiB back when nothing is in it:
        by chance one more or less is there, which is 3 % of a daemon that keeps nothing. What never
        was needed in the warm-up is growth.
        """
        return replace(self.warm[-1], memory_kib=max(one.memory_kib for one in self.warm))

    @property
    def after(self) -> AtRest:
        """The last measurement."""
        return self.rests[-1]


def soak(
    seed: int,
    seconds: float,
    *,
    clients: int,
    warm_up_seconds: float,
    warm_up_parts: int = _WARM_UP_PARTS,
    parts: int = PARTS,
    say: Progress = lambda _: None,
) -> Outcome:
    """Run it.

    Args:
        seed: of references, operations and faults.
        seconds: of the soak, without the warm-up.
        clients: of each household.
        warm_up_seconds: before it.
        warm_up_parts: after each of which everybody rests and the daemon is measured.
        parts: of the soak, likewise.
        say: is told where it is, about once a second.
    """
    since, truth, tally = time.time(), Truth(seed), Tally()
    with tempfile.TemporaryDirectory(prefix="dgt-soak-") as base, _group() as group:
        world = _world(Path(base), group, truth, tally, clients)
        with ExitStack() as stack:
            for household in world.households:
                stack.enter_context(household.running())
            injector, warming = Injector(world), Injector(world)
            warm = _parts(world, warming, "warming up", seed, warm_up_seconds, warm_up_parts, say)
            rests = _parts(world, injector, "soaking", seed + 1, seconds, parts, say)
            say("searching the disks")
            # while the tiers are full or were emptied just now, and once more when all has ended
            found, searched = leftovers(truth, [Path(base)], since)
        found_later, searched_later = leftovers(truth, [Path(base)], since)
        _remove_clocks(world.mortal)
    return Outcome(
        seed=seed,
        seconds=seconds,
        tally=tally,
        faults=injector.done,
        not_done=injector.not_done,
        warm=warm,
        rests=rests,
        steady_lives=world.steady.lives,
        mortal_lives=world.mortal.lives,
        complaints=[
            *(line for household in world.households for line in household.complaints),
            *(f"a fault's own trouble: {line}" for line in warming.troubles + injector.troubles),
        ],
        unsent=sum(household.unsent for household in world.households),
        plaintext=sorted({*found, *found_later}),
        files_searched=searched + searched_later,
    )


def _world(
    base: Path, group: MemoryGroup | None, truth: Truth, tally: Tally, clients: int
) -> World:
    places = {name: base / name for name in ("steady", "mortal", "tmp", "fallback")}
    for place in places.values():
        place.mkdir(mode=0o700)
    clock, clock_environ = _clock(base)
    world = World(
        steady=Household(
            "steady",
            places["steady"],
            memory_mb=STEADY_MB,
            persistent=False,
            prefix=group.prefix if group is not None else (),
        ),
        mortal=Household(
            "mortal", places["mortal"], memory_mb=MORTAL_MB, persistent=True, environ=clock_environ
        ),
        slots=[],
        tally=tally,
        group=group,
        group_bytes=GROUP_BYTES,
        clock=clock,
    )
    plan = {
        "seed": truth.seed,
        "digests": truth.digests(),
        "cache_dir": str(places["fallback"]),
        "clears": 0.05,
        "commands": 1,
    }
    world.slots = [
        Slot(
            f"{household.name} {number}",
            {**plan, "socket_dir": str(household.home.sockets)},
            tally,
            places["tmp"],
        )
        for household in world.households
        for number in range(clients)
    ]
    return world


@contextmanager
def _group() -> Iterator[MemoryGroup | None]:
    with ExitStack() as stack:
        try:
            group = stack.enter_context(memory_group(GROUP_BYTES))
        except pytest.skip.Exception as reason:
            print(f"no memory pressure: {reason}", file=sys.stderr)
            group = None
        yield group


def _clock(base: Path) -> tuple[Path | None, dict[str, str]]:
    """Return the file with the offset of a daemon's clock, and what makes it read that."""
    libraries = glob.glob(LIBFAKETIME)  # noqa: PTH207 - an absolute pattern
    if not libraries:
        return None, {}
    clock = base / "clock"
    set_clock(clock, 0)
    return clock, {
        "LD_PRELOAD": libraries[0],
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def _remove_clocks(household: Household) -> None:
    """libfaketime leaves what it shares when its process is killed."""
    for pid in household.pids:
        for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
            with suppress(OSError):
                Path("/dev/shm", name).unlink()


def harm(seed: int, seconds: float, parts: int) -> list[list[Fault]]:
    """Return what is done in each part of so many seconds."""
    return [schedule(f"{seed}/{part}", seconds / parts, list(KINDS)) for part in range(parts)]


def _parts(
    world: World,
    injector: Injector,
    what: str,
    seed: int,
    seconds: float,
    count: int,
    say: Progress,
) -> list[AtRest]:
    """Work so many times for a part of the time; rest and measure after each."""
    steady = world.steady.daemon
    assert steady is not None
    rests = []
    for number, faults in enumerate(harm(seed, seconds, count), 1):
        told = f"{what}, part {number} of {count}"
        _work(world, injector, faults, seconds / count, say, told)
        rests.append(at_rest(steady.directory, steady.pid))
    return rests


def _work(
    world: World,
    injector: Injector,
    faults: Sequence[Fault],
    seconds: float,
    say: Progress,
    what: str,
) -> None:
    """Let clients work and faults happen for so long, and let everybody finish."""
    over, tally = threading.Event(), world.tally
    harming = threading.Thread(target=injector.run, args=(faults, over), name="faults")
    for slot in world.slots:
        slot.start()
    harming.start()
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        say(
            f"{what}, {left:.0f} s left: {tally.operations.total()} operations, "
            f"{injector.done.total()} faults, {tally.wrong_bytes} wrong bytes, "
            f"{tally.failed} failed"
        )
        over.wait(min(1.0, left))
    over.set()
    harming.join()
    for slot in world.slots:
        slot.finish()
    for slot in world.slots:
        slot.join()
