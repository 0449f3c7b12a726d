"""The kernel's own alarms: a process that really waits for memory sets them off."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from dgcache_core.memory_store import MemoryStore
from dgcached.limits import Limits
from dgcached.pressure import Place
from dgcached.pressure_watcher import PressureWatcher
from dgcached.stalls import StallAlarms
from tests.core.support import content, put
from tests.support.memory_group import MemoryGroup, memory_group
from tests.support.wire import MIB, SECONDS, script_running

HOST = Path("/proc/pressure/memory")
GIB = 1 << 30

# What it reads is page cache of its group, which has room for a tenth of it: each read refaults.
THRASH = """
path, size = sys.argv[1], int(sys.argv[2])
with open(path, "wb") as file:
    for _ in range(size >> 20):
        file.write(os.urandom(1 << 20))
descriptor = os.open(path, os.O_RDONLY)
while True:
    for offset in range(0, size, 1 << 20):
        os.pread(descriptor, 1 << 20, offset)
"""


def open_descriptors() -> int:
    """Count this process's descriptors."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - no paths are wanted


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    """A group that is too small for what is to be read in it."""
    with memory_group(24 * MIB) as made:
        yield made


@contextmanager
def thrashing(group: MemoryGroup, directory: Path) -> Iterator[None]:
    """Let a process wait for its memory as long as the block lasts."""
    here = [
        part for part in psutil.disk_partitions(all=True) if part.mountpoint in mounts(directory)
    ]
    if max(here, key=lambda part: len(part.mountpoint)).fstype == "tmpfs":
        pytest.skip("needs a temporary directory on a disk: tmpfs is not read again")
    join = f"open({str(group.path / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
    with script_running(None, join + THRASH, directory / "large", 200 * MIB):
        yield


def mounts(directory: Path) -> set[str]:
    """Return every path it may be mounted at."""
    return {str(path) for path in (directory, *directory.resolve().parents)}


@pytest.fixture
def alarms() -> Iterator[StallAlarms]:
    """The host's alarm, where the kernel gives us one."""
    made = StallAlarms([HOST])

    async def stop() -> None:
        made.stop()

    if not made.armed:
        pytest.skip("needs PSI, and Linux 6.5 or CAP_SYS_RESOURCE to set a trigger")
    yield made
    asyncio.run(stop())


@pytest.mark.root
def test_a_stall_raises_the_alarm(alarms: StallAlarms, group: MemoryGroup, tmp_path: Path) -> None:
    """Named by its file, and not once in a time without stalls, though the file can be read."""
    heard: list[Path] = []

    async def listen() -> int:
        first = asyncio.Event()
        alarms.start(lambda file: (heard.append(file), first.set()))
        for _ in range(100):
            await asyncio.sleep(0)
        before = len(heard)
        with thrashing(group, tmp_path):
            async with asyncio.timeout(SECONDS):
                await first.wait()
        alarms.stop()
        return before

    assert asyncio.run(listen()) == 0
    assert set(heard) == {HOST}
    assert len(heard) <= SECONDS / 2


@pytest.mark.root
@pytest.mark.usefixtures("alarms")
def test_an_alarm_makes_the_watcher_look_at_once(group: MemoryGroup, tmp_path: Path) -> None:
    """In a tight place it halves what is used, long before it would have looked by itself."""
    store = MemoryStore(128 * MIB, 1000, may_fork=False)
    put(store, content(MIB))
    for seed in range(9):
        put(store, content(10 * MIB, seed))
    looks: list[frozenset[Path]] = []

    def look(alarmed: frozenset[Path]) -> list[Place]:
        looks.append(alarmed)
        return [Place("here", 1000 * GIB, 200 * GIB, alarmed=HOST in alarmed)]

    async def watch() -> None:
        watcher = PressureWatcher(store, Limits(pressure_look_seconds=3600.0), look)
        watcher.start()
        watcher.wake()
        with thrashing(group, tmp_path):
            async with asyncio.timeout(SECONDS):
                while not watcher.message().shrinks:
                    await asyncio.sleep(0.01)
        message = watcher.message()
        await watcher.stop()
        assert message.psi
        assert 40 * MIB < message.limit_bytes < 50 * MIB
        assert message.cause.startswith("here: processes wait for memory")

    try:
        asyncio.run(watch())
        assert looks[0] == frozenset()
        assert HOST in looks[-1]
        assert store.status().blob_bytes <= store.status().limit_bytes
        assert store.status().counters.pressure_evictions >= 4
    finally:
        store.close()


def test_without_triggers_there_is_no_alarm_and_no_leak(tmp_path: Path) -> None:
    """No such file, none that takes a trigger, none at all: `armed` says so, nothing stays open."""
    plain = tmp_path / "plain"
    plain.touch()
    before = open_descriptors()

    async def come_and_go(files: list[Path]) -> None:
        alarms = StallAlarms(files)
        assert not alarms.armed
        alarms.start(lambda _: None)
        alarms.stop()
        alarms.stop()

    for files in ([tmp_path / "absent"], [plain], [tmp_path], []):
        asyncio.run(come_and_go(files))
    assert open_descriptors() == before


def test_triggers_that_were_set_are_taken_back(alarms: StallAlarms) -> None:
    """A descriptor for the trigger and one to watch it, until stop."""
    before = open_descriptors()
    more = StallAlarms([HOST])
    assert open_descriptors() == before + 2

    async def stop() -> None:
        more.stop()

    asyncio.run(stop())
    assert open_descriptors() == before
    assert alarms.armed == {HOST}


def test_an_empty_store_with_its_budget_is_not_watched() -> None:
    """One look after it was used, then none until it is used again."""
    looks = 0
    seen = asyncio.Event()

    def look(_: frozenset[Path]) -> list[Place]:
        nonlocal looks
        looks += 1
        loop.call_soon_threadsafe(seen.set)
        return [Place("host", GIB, GIB)]

    async def watch() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        watcher = PressureWatcher(store, Limits(pressure_look_seconds=0.001), look)
        watcher.start()
        for number in (1, 2, 3):
            watcher.wake()
            async with asyncio.timeout(SECONDS):
                await seen.wait()
            seen.clear()
            await asyncio.sleep(0.05)  # fifty looks' time
            assert looks == number
        await watcher.stop()

    loop: asyncio.AbstractEventLoop
    store = MemoryStore(MIB, 1000, may_fork=False)
    try:
        asyncio.run(watch())
    finally:
        store.close()
