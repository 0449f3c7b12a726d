"""What is done to daemons, clients and disks, and when: the schedule follows from the seed alone.

Every round has each kind of fault once, in another order. A fault that lasts (a stopped process, a
full disk) is undone after a while; the next ones do not wait for that. `Injector` does them one at
a time, on one thread; what could not be done is counted with its reason, and never as done. What
fails in a fault itself is told in `troubles` and keeps no other one from being undone.
"""

import heapq
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.crews import Slot, Tally
from tests.soak.households import Household
from tests.support.memory_group import Hog, MemoryGroup

LIBFAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"
_LONGEST_STOP_SECONDS = 4.0
_PAUSE_SECONDS = 1.6
_BALLAST = "ballast"
_DAY = 86_400
_CLOCK_STEPS = (-3650 * _DAY, -_DAY, -3600, -1, 0, 1, 3600, _DAY, 3650 * _DAY)

Undo = tuple[float, Callable[[], None]]


class NotDoneError(Exception):
    """This fault could not be done now; the message says why."""


@dataclass(frozen=True, order=True)
class Fault:
    """One fault. `choice` decides whom it meets and how hard, by remainders."""

    at_seconds: float
    kind: str
    choice: int


@dataclass
class World:
    """Whom faults can meet."""

    steady: Household
    mortal: Household
    slots: Sequence[Slot]
    tally: Tally
    group: MemoryGroup | None = None
    group_bytes: int = 0
    clock: Path | None = None
    unavailable: dict[str, str] = field(default_factory=dict)
    """Kinds that this machine does not allow, and why."""

    @property
    def households(self) -> tuple[Household, Household]:
        """Both."""
        return self.steady, self.mortal


def schedule(seed: int | str, seconds: float, kinds: Sequence[str]) -> list[Fault]:
    """Return what is done within so many seconds, oldest first."""
    chance = random.Random(f"{seed}/faults")
    pause = min(_PAUSE_SECONDS, 0.9 * seconds / len(kinds))
    faults: list[Fault] = []
    at = 0.5 * pause
    while at < seconds:
        for kind in chance.sample(list(kinds), len(kinds)):
            faults.append(Fault(at, kind, chance.getrandbits(32)))
            at += pause * chance.uniform(0.5, 1.5)
    return [fault for fault in faults if fault.at_seconds < seconds]


class Injector:
    """Does what the schedule says."""

    def __init__(self, world: World) -> None:
        """Do nothing yet."""
        self.done: Counter[str] = Counter()
        self.not_done: Counter[str] = Counter()
        self.troubles: list[str] = []
        self._world = world
        self._numbers = itertools.count()

    def run(self, faults: Sequence[Fault], over: threading.Event) -> None:
        """Do each in its time, and at the end undo all that lasts.

        The first round is done wholly, also where the machine is so slow that the time is over.
        """
        begun, first_round = time.monotonic(), set(faults[: len(KINDS)])
        waiting: list[tuple[float, int, Fault | Callable[[], None]]] = [
            (fault.at_seconds, next(self._numbers), fault) for fault in faults
        ]
        heapq.heapify(waiting)
        while waiting:
            at, _, what = heapq.heappop(waiting)
            over.wait(max(0.0, begun + at - time.monotonic()))
            if not isinstance(what, Fault):
                self._undo(what)
            elif not over.is_set() or what in first_round:
                for lasts, undo in self._do(what):
                    due = time.monotonic() - begun + lasts
                    heapq.heappush(waiting, (due, next(self._numbers), undo))

    def _do(self, fault: Fault) -> list[Undo]:
        try:
            undos = list(KINDS[fault.kind](self._world, fault.choice) or ())
        except NotDoneError as error:
            self.not_done[f"{fault.kind}: {error}"] += 1
            return []
        except Exception as error:
            self.troubles.append(f"{fault.kind} failed: {error!r}")
            return []
        self.done[fault.kind] += 1
        return undos

    def _undo(self, undo: Callable[[], None]) -> None:
        try:
            undo()
        except Exception as error:  # others wait to be undone: somebody is stopped, a disk is full
            self.troubles.append(f"{undo!r} failed: {error!r}")


# -- processes -------------------------------------------------------------------------------------


def kill_client(world: World, choice: int) -> None:
    """SIGKILL, whatever it was doing."""
    if world.slots[choice % len(world.slots)].signal(signal.SIGKILL) is None:
        raise NotDoneError("no client was there")


def stop_client(world: World, choice: int) -> list[Undo]:
    """SIGSTOP for a while: it holds leases, deposits and descriptors and does not move."""
    slot = world.slots[choice % len(world.slots)]
    pid = slot.signal(signal.SIGSTOP)
    if pid is None:
        raise NotDoneError("no client was there")
    return [(_lasts(choice), lambda: _continue(pid))]


def kill_daemon(world: World, _: int) -> None:
    """SIGKILL, whatever it was doing; its household starts another."""
    _living(world.mortal).process.send_signal(signal.SIGKILL)


def terminate_daemon(world: World, _: int) -> None:
    """SIGTERM in the middle of everything."""
    _living(world.mortal).process.send_signal(signal.SIGTERM)


def stop_daemon(world: World, choice: int) -> list[Undo]:
    """SIGSTOP for a while, so that only deadlines end a call."""
    pid = _living(world.households[choice % 2]).pid
    _signal(pid, signal.SIGSTOP)
    return [(_lasts(choice), lambda: _continue(pid))]


def _lasts(choice: int) -> float:
    return 0.2 + choice / 2**32 * _LONGEST_STOP_SECONDS


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _continue(pid: int) -> None:
    _signal(pid, signal.SIGCONT)


def _living(household: Household):  # type: ignore[no-untyped-def]
    daemon = household.daemon
    if daemon is None or daemon.process.poll() is not None:
        raise NotDoneError("no daemon was there")
    return daemon


# -- sockets ---------------------------------------------------------------------------------------


def remove_socket(world: World, choice: int) -> None:
    """Somebody tidies up; the daemon binds again."""
    directory = _living(world.households[choice % 2]).directory
    name = ("rpc.sock", "session.sock")[choice // 2 % 2]
    try:
        (directory / name).unlink()
    except FileNotFoundError:
        raise NotDoneError("the socket was not there") from None


def garbage(world: World, choice: int) -> None:
    """Bytes that are no protocol, on both sockets, and a connection that is cut off."""
    directory = _living(world.households[choice % 2]).directory
    noise = random.Random(choice).randbytes(2000)
    kinds = {"rpc.sock": socket.SOCK_STREAM, "session.sock": socket.SOCK_SEQPACKET}
    for name, kind in kinds.items():
        with socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(1)
            with suppress(OSError):
                connection.connect(str(directory / name))
                connection.send(noise)


def crowd(world: World, choice: int) -> list[Undo]:
    """Forty connections that say nothing."""
    directory = _living(world.households[choice % 2]).directory
    stack = ExitStack()
    for number in range(40):
        kind = (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)[number % 2]
        connection = stack.enter_context(socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC))
        connection.settimeout(1)
        with suppress(OSError):
            connection.connect(str(directory / ("rpc.sock", "session.sock")[number % 2]))
    return [(_lasts(choice), stack.close)]


# -- memory and time -------------------------------------------------------------------------------


def memory_pressure(world: World, choice: int) -> list[Undo]:
    """A neighbour in the control group takes all there is, until it ends or is killed for it."""
    if world.group is None:
        raise NotDoneError("no control group")
    hog = Hog(world.group)
    stack = ExitStack()
    stack.enter_context(hog.running())
    with suppress(AssertionError):  # the kernel may kill it, for it asks for that
        hog.fill_up(world.group_bytes)
    return [(_lasts(choice), stack.close)]


def clock_step(world: World, choice: int) -> None:
    """CLOCK_REALTIME of the daemon that is killed jumps; the other clocks do not (libfaketime)."""
    if world.clock is None:
        raise NotDoneError("no libfaketime")
    set_clock(world.clock, _CLOCK_STEPS[choice % len(_CLOCK_STEPS)])


def set_clock(clock: Path, seconds: int) -> None:
    """Write the file that libfaketime reads, in one step."""
    temporary = clock.with_suffix(".new")
    temporary.write_text(f"{seconds:+d}")
    temporary.rename(clock)


# -- the disk tier ---------------------------------------------------------------------------------


def disk_full(world: World, choice: int) -> list[Undo]:
    """Not a block is left for a while."""
    place = world.households[choice % 2].home.cache
    with suppress(OSError), (place / _BALLAST).open("wb", buffering=0) as file:
        while file.write(bytes(64 << 10)):
            pass
    return [(_lasts(choice), lambda: _make_room(place))]


def _make_room(place: Path) -> None:
    try:
        (place / _BALLAST).unlink(missing_ok=True)
    except OSError:  # `disk_read_only` came after `disk_full` and lasts longer
        _remount_writable(place)
        (place / _BALLAST).unlink(missing_ok=True)


def disk_read_only(world: World, choice: int) -> list[Undo]:
    """As a failing disk is remounted."""
    place = world.households[choice % 2].home.cache
    for _ in range(50):  # refused while something is being written
        if _remounted(place, "ro"):
            return [(_lasts(choice), lambda: _remount_writable(place))]
    raise NotDoneError("the kernel refuses while files are open for writing")


def _remounted(place: Path, option: str) -> bool:
    command = ["mount", "-o", f"remount,{option}", place]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def _remount_writable(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", place], check=True)


def disk_flip(world: World, choice: int) -> None:
    """One bit of several files, anywhere in them."""
    chance = random.Random(choice)
    for path in _some_files(world.households[choice % 2], chance, 4):
        with suppress(OSError), path.open("r+b", buffering=0) as file:
            at = chance.randrange(max(1, path.stat().st_size))
            file.seek(at)
            byte = file.read(1) or b"\0"
            file.seek(at)
            file.write(bytes([byte[0] ^ 1 << chance.randrange(8)]))


def disk_swap(world: World, choice: int) -> None:
    """Two files change their names, or one is put in the other's place."""
    files = _some_files(world.households[choice % 2], random.Random(choice), 2)
    if len(files) < 2:
        raise NotDoneError("fewer than two files")
    one, other = files
    aside = one.with_name("aside")
    with suppress(OSError):
        one.rename(aside)
        if choice // 2 % 2:
            other.rename(one)
        aside.rename(other)


def disk_truncate(world: World, choice: int) -> None:
    """Files end early, or go on with something else."""
    chance = random.Random(choice)
    for path in _some_files(world.households[choice % 2], chance, 3):
        with suppress(OSError):
            os.truncate(path, max(0, path.stat().st_size + chance.choice([-4096, -1, 1, 4096])))


def disk_remove(world: World, choice: int) -> None:
    """Somebody clears `~/.cache` under the daemon that is killed: its tier is off until then."""
    shutil.rmtree(world.mortal.home.cache / "v2", ignore_errors=True)


def _some_files(household: Household, chance: random.Random, count: int) -> list[Path]:
    files = []
    with suppress(OSError):
        files = household.home.files()
    if not files:
        raise NotDoneError("no file on the disk")
    return chance.sample(files, min(count, len(files)))


KINDS: dict[str, Callable[[World, int], list[Undo] | None]] = {
    one.__name__.replace("_", "-"): one
    for one in (
        kill_client,
        stop_client,
        kill_daemon,
        terminate_daemon,
        stop_daemon,
        remove_socket,
        garbage,
        crowd,
        memory_pressure,
        clock_step,
        disk_full,
        disk_read_only,
        disk_flip,
        disk_swap,
        disk_truncate,
        disk_remove,
    )
}
