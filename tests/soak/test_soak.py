"""Half a minute of the soak, with the same invariants; and that its instruments would show a fault.

The whole soak is `make soak`, the whole walk over the system calls of a store `make faults`.
"""

import io
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.soak.client import Worker
from tests.soak.crews import ROOT, Tally
from tests.soak.faults import KINDS, Fault, Injector, World, schedule
from tests.soak.households import Household, small_file_system
from tests.soak.measures import leftovers
from tests.soak.report import invariants
from tests.soak.run import soak
from tests.soak.truth import BLOCK_BYTES, MIB, SAMPLE_BYTES, Truth
from tests.soak.walk import walk

_SLACK_KIB = 4096
"""Of memory in half a minute, in which allocators still grow; the whole soak allows 1 %."""


def held(name: str, outcome_invariants: dict[str, bool]) -> bool:
    """Tell whether an invariant held."""
    return outcome_invariants[name]


@pytest.mark.root
@pytest.mark.timeout(300)
def test_half_a_minute_of_clients_and_faults_breaks_nothing() -> None:
    """No wrong byte, no failed operation, no plaintext on a disk, nothing left in the daemon."""
    outcome = soak(20, 16, clients=2, warm_up_seconds=6, warm_up_parts=1, parts=2)
    broken = [one for one in invariants(outcome) if not one.holds and one.name != "memory at rest"]
    assert broken == [], (outcome.tally.failures, outcome.complaints, outcome.plaintext)
    assert outcome.after.memory_kib <= outcome.before.memory_kib + _SLACK_KIB
    assert outcome.tally.sources["dg-cached"] > 5
    assert outcome.tally.bytes_compared > 5 * MIB
    not_done = {reason.split(":")[0] for reason in outcome.not_done}
    assert outcome.faults.keys() | not_done == set(KINDS)
    assert outcome.mortal_lives > 1


@pytest.mark.root
def test_a_disk_that_is_full_and_then_read_only_gets_room_again(short_directory: Path) -> None:
    """The one ends before the other; whatever fails in a fault, the rest is undone."""
    places = short_directory / "steady", short_directory / "mortal"
    for place in places:
        place.mkdir()
    steady, mortal = (Household("", place, memory_mb=1, persistent=False) for place in places)
    world = World(steady, mortal, slots=[], tally=Tally())
    cache = steady.home.cache
    with small_file_system(cache):
        faults = [Fault(0.0, "disk-full", 0), Fault(0.1, "disk-read-only", 1 << 30)]
        injector = Injector(world)
        injector.run(faults, threading.Event())
        assert (injector.troubles, injector.not_done.total()) == ([], 0)
        (cache / "file").write_bytes(bytes(MIB))
        assert os.listdir(cache) == ["file"]  # noqa: PTH208 - no paths are wanted


def test_the_same_seed_does_the_same_harm_and_another_does_not() -> None:
    """Each kind comes as often as the others, up to one."""
    faults = schedule(7, 600, list(KINDS))
    assert faults == schedule(7, 600, list(KINDS)) != schedule(8, 600, list(KINDS))
    counts = Counter(fault.kind for fault in faults)
    assert set(counts) == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert {fault.kind for fault in schedule(7, 20, list(KINDS))} >= {"kill-daemon", "disk-flip"}


def test_what_is_left_of_a_reference_in_a_file_is_found(tmp_path: Path) -> None:
    """Whatever its offset, also across the pieces that the search reads."""
    truth, since = Truth(time.time_ns()), time.time()
    part = truth.data(9)[100_000 : 100_000 + BLOCK_BYTES + SAMPLE_BYTES]
    for number, before in enumerate((0, 1, 4 * MIB - BLOCK_BYTES + 10, 4 * MIB - 5)):
        file = tmp_path / str(number)
        file.write_bytes(bytes(before) + part)
        found, _ = leftovers(truth, [tmp_path], since, public=())
        assert set(found) == {f"{file}: reference 9"}
        file.unlink()
    assert leftovers(truth, [tmp_path], since, public=())[0] == []


def test_a_wrong_byte_is_counted_as_wrong_and_failed() -> None:
    """Not by its digest: each byte is compared."""
    truth, tally = Truth(5), Tally()
    plan = {"seed": 5, "digests": ["0" * 64] * len(truth.sizes), "chance": 1}
    plan |= {"socket_dir": "/nowhere", "cache_dir": "/nowhere", "clears": 0, "commands": 0}
    worker, wrong = Worker(plan), bytearray(truth.data(5))
    wrong[77] ^= 1
    wrong[-1] ^= 128
    for got in (bytes(truth.data(5)), bytes(wrong), bytes(wrong[:-1])):
        tally.add({"op": "get", "seconds": 0.0, **worker._checked(5, got, "dg-cached")}, "test")
    assert (tally.wrong_bytes, tally.failed) == (2 + 2, 2)


def test_the_source_of_a_command_prints_the_reference() -> None:
    """`python -m tests.soak.truth` is what `dg-cache get --fetch` runs."""
    printed = subprocess.run(
        [sys.executable, "-m", "tests.soak.truth", "5", "4"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout
    assert io.BytesIO(printed).read() == Truth(5).data(4)


WALKED = ("openat", "pwrite64", "fsync", "fallocate", "rename", "memfd_create", "ftruncate")
WALKED += ("pipe2", "readv", "recvmsg", "sendmsg", "accept4", "fcntl", "ioctl", "madvise", "mmap")


@pytest.mark.root
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, which refuses the calls")
@pytest.mark.parametrize("error", ["ENOSPC", "EMFILE", "ENOMEM", "EIO", "EINTR"])
def test_a_refused_call_of_a_store_leaves_it_whole_or_absent(
    short_directory: Path, error: str
) -> None:
    """The first of its kind in each thread: the daemon lives, and at rest nothing is left."""
    seen = list(walk(short_directory.resolve(), WALKED, [error], most_times=1))
    assert [one for one in seen if one.trouble] == []
    assert {"openat", "pwrite64", "fsync", "memfd_create"} <= {one.step.call for one in seen}
