"""The in-process `filesystem` cache leaves nothing behind, however its process ends.

Real processes, on a file system with O_TMPFILE and on one without; what they keep is made in them
from a seed, so that its plaintext can be in a file only if the cache put it there.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dgcache_core import ephemeral
from dgcache_core.ephemeral import EphemeralDirectory
from dgcache_core.errors import CacheFullError
from dgcache_core.runtime_directory import machine_key
from tests.support.real_users import pidfd_of
from tests.support.refused_syscalls import FLOCK, refusing, without_nameless_files
from tests.support.wire import FOREIGN_UID, SECONDS, as_user, eventually, own_environment, poll

PIECE = random.Random(7).randbytes(3 << 20)[1_000_000:1_000_064]

# Obeys its standard input, line by line; `cache` has one reference of 3 MiB.
_PROCESS = """\
import logging, os, random, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the test run was started with
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
import dgcache
data = random.Random(7).randbytes(3 << 20)
cache = dgcache.open()
digest = cache.put("bucket", "prefix", data)
def check():
    with cache.get("bucket", "prefix", digest) as reference:
        assert reference.read() == data
    return cache.backend
print("ready", check(), flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""
_WITHOUT = without_nameless_files()


class Process:
    """A process with a `filesystem` cache below `base`."""

    def __init__(self, base: Path, *prefix: str) -> None:
        self.base = base
        self.said: list[str] = []
        self._popen = subprocess.Popen(
            [*prefix, sys.executable, "-W", "error", "-c", _PROCESS],
            env={
                **own_environment(),
                "DG_CACHE_BACKEND": "filesystem",
                "DG_CACHE_DIR": str(base),
                "TMPDIR": str(base.parent / "tmp"),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.pid = self._popen.pid

    def ready(self) -> str:
        """Wait until it has its reference, and return its backend."""
        return self._hear("ready").split()[-1]

    def obeys(self, order: str) -> str:
        """Have it run one line, wait for that, and return what that printed."""
        self.said.clear()
        self.hears(order)
        self._hear("done")
        return "".join(self.said)

    def hears(self, order: str) -> None:
        """Have it run one line."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(order + "\n")
        self._popen.stdin.flush()

    def ends(self) -> int:
        """Wait for its end and return its exit status."""
        return self._popen.wait(SECONDS)

    def dies(self, number: int = signal.SIGKILL) -> int:
        """Send a signal and wait for the end."""
        self._popen.send_signal(number)
        return self.ends()

    def close(self) -> None:
        """End it if it lives."""
        self._popen.kill()
        self._popen.communicate(timeout=SECONDS)

    def _hear(self, word: str) -> str:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            if line.startswith(word):
                return line.strip()
            self.said.append(line)
        raise AssertionError(f"it ended: {self.said}")


Start = Callable[..., Process]


@pytest.fixture
def base() -> Iterator[Path]:
    """A DG_CACHE_DIR that every user may look for, beside a TMPDIR."""
    with tempfile.TemporaryDirectory(prefix="dgt-") as top:
        Path(top).chmod(0o755)
        Path(top, "tmp").mkdir()
        Path(top, "base").mkdir()
        yield Path(top, "base")


@pytest.fixture
def start(base: Path) -> Iterator[Start]:
    """Starts processes and ends them."""
    started: list[Process] = []

    def start(*prefix: str, ready: bool = True) -> Process:
        started.append(Process(base, *prefix))
        if ready:
            assert started[-1].ready() == "filesystem", started[-1].said
        return started[-1]

    yield start
    for process in started:
        process.close()


def place_of(base: Path) -> Path:
    return base / "v2" / "ephemeral"


def directories(base: Path) -> list[Path]:
    """Return the directories of processes."""
    return sorted(place_of(base).iterdir())


def files(*roots: Path) -> list[Path]:
    """Return every file that has a name."""
    return [path for root in roots for path in root.rglob("*") if not path.is_dir()]


def nameless_files(pid: int) -> list[bytes]:
    """Return what is in the nameless files that a process has open, memory files left out."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = str(link.readlink())
        if target.endswith("(deleted)") and not target.startswith("/memfd:"):
            found.append(link.read_bytes())
    return found


def has_plaintext(since: float) -> list[Path]:
    """Search what was changed in the temporary directory since then, the test's own included."""
    found = []
    for directory, _, names in os.walk(tempfile.gettempdir()):
        for path in (Path(directory, name) for name in names):
            try:
                if path.is_file() and not path.is_symlink() and path.stat().st_mtime >= since:
                    found += [path] if PIECE in path.read_bytes() else []
            except OSError:
                continue  # another test's, gone meanwhile
    return found


ENDS: dict[str, tuple[Callable[[Process], int], int, bool]] = {
    "close": (lambda p: (p.obeys("cache.close()"), p.dies())[1], -signal.SIGKILL, True),
    "exit": (lambda p: (p.hears("sys.exit(3)"), p.ends())[1], 3, True),
    "exception": (lambda p: (p.hears("raise RuntimeError"), p.ends())[1], 1, True),
    "SIGINT": (lambda p: p.dies(signal.SIGINT), -signal.SIGINT, True),
    "SIGTERM": (lambda p: p.dies(signal.SIGTERM), -signal.SIGTERM, False),
    "SIGKILL": (lambda p: p.dies(signal.SIGKILL), -signal.SIGKILL, False),
    "dropped": (lambda p: (p.obeys("del cache"), p.dies())[1], -signal.SIGKILL, True),
}


@pytest.mark.parametrize("prefix", [(), _WITHOUT], ids=["O_TMPFILE", "without O_TMPFILE"])
@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_when_a_process_ends(
    base: Path, start: Start, end: str, prefix: tuple[str, ...]
) -> None:
    """No file at any moment, no plaintext in any, and no directory after the next start."""
    since = time.time() - 1
    process = start(*prefix)
    (own,) = directories(base)
    assert own.stat().st_mode & 0o7777 == 0o700
    assert not files(base)
    kept = nameless_files(process.pid)
    assert sum(map(len, kept)) > 3 << 20
    assert not [content for content in kept if PIECE in content]
    ending, status, removed = ENDS[end]
    assert ending(process) == status
    assert files(base, base.parent / "tmp") == has_plaintext(since) == []
    assert own.exists() is not removed
    start(*prefix)
    (next_one,) = directories(base)
    assert next_one != own


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, to kill at a moment")
@pytest.mark.parametrize("call", ["unlinkat", "fallocate"])
def test_sigkill_within_the_moment_of_a_name_leaves_an_empty_file_to_the_next_start(
    base: Path, start: Start, call: str
) -> None:
    """Before its name is removed, the file has no byte; after that, it is gone with its process."""
    inject = ("strace", "-f", "-o", "/dev/null", "-e", f"inject={call}:signal=KILL:when=1")
    process = start(*inject, *_WITHOUT, ready=False)
    assert process.ends() == -signal.SIGKILL
    (own,) = directories(base)
    assert [path.stat().st_size for path in own.iterdir()] == ([0] if call == "unlinkat" else [])
    start()
    assert not own.exists()
    assert len(directories(base)) == 1


def test_the_directory_of_a_living_process_is_never_touched(base: Path, start: Start) -> None:
    """Twenty others start at once and are killed; theirs go with the next start, its own stays."""
    living = start()
    (own,) = directories(base)
    before = own.stat()
    others = [start(*((), _WITHOUT)[number % 2], ready=False) for number in range(20)]
    for number, other in enumerate(others):
        assert other.ready() == "filesystem"
        other.dies(signal.SIGKILL if number % 3 else signal.SIGTERM)
    start()
    assert len(directories(base)) == 2
    assert os.path.samestat(own.stat(), before)
    living.obeys("check(); cache.clear(); cache.put('bucket', 'prefix', data); check()")
    assert not files(base)


def test_many_that_start_and_end_at_once_all_get_a_directory(base: Path) -> None:
    """Each takes the new, not yet locked directories of the others for those of the dead."""
    program = """
import sys; from pathlib import Path
from dgcache_core.ephemeral import EphemeralDirectory
for _ in range(100):
    directory = EphemeralDirectory(Path(sys.argv[1]))
    directory.allocate(4096).close()
    directory.close()
"""
    argv = [sys.executable, "-W", "error", "-c", program, str(place_of(base))]
    processes = [subprocess.Popen(argv) for _ in range(4)]
    assert [process.wait(SECONDS * 3) for process in processes] == [0] * 4
    assert directories(base) == []


@pytest.mark.parametrize("moment", ["removed", "being removed"])
def test_a_directory_that_another_start_took_for_dead_is_made_anew(
    base: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Between mkdir and flock it has no lock; the other process is real, the moment is chosen."""
    locked = ephemeral.fcntl.flock
    place = place_of(base)
    tried: list[Path] = []
    taken: list[int] = []

    def flock(descriptor: int, operation: int) -> None:
        if not tried:
            tried.extend(directories(base))
            taken.append(os.open(tried[0], os.O_RDONLY | os.O_DIRECTORY))
            locked(taken[0], operation)
            if moment == "removed":
                tried[0].rmdir()
                os.close(taken.pop())
        locked(descriptor, operation)

    monkeypatch.setattr(ephemeral.fcntl, "flock", flock)
    directory = EphemeralDirectory(place)
    own = place / directory._held.name
    assert set(directories(base)) == {own, *(tried if taken else ())}
    assert own not in tried
    for descriptor in taken:
        os.close(descriptor)
    directory.allocate(4096).close()
    directory.close()


def test_only_what_is_surely_a_dead_process_s_is_removed(base: Path, tmp_path: Path) -> None:
    """Other names, links, files, other modes, and what somebody else put into one, stay."""
    place = place_of(base)
    EphemeralDirectory(place).close()
    name = iter(range(100))

    def own_name() -> Path:
        return place / f"{machine_key()}-{next(name):032x}"

    (tmp_path / ("0" * 32)).write_text("the target of a link")
    own_name().symlink_to(tmp_path)
    own_name().write_text("a file")
    own_name().mkdir(mode=0o755)
    os.mkfifo(own_name())
    (place / "notes").mkdir(mode=0o700)
    (place / f"{'0' * 16}-{'0' * 32}").mkdir(mode=0o700)  # of another machine on this home
    foreign = own_name()
    foreign.mkdir(mode=0o700)
    (foreign / "notes").write_text("somebody's")
    (foreign / ("1" * 32)).mkdir()
    stays = directories(base)
    dead = own_name()
    dead.mkdir(mode=0o700)
    for leftover in ("0" * 32, ".nfs0000000000abcdef00000001"):
        (dead / leftover).touch()
    (dead / ("2" * 32)).symlink_to(tmp_path / ("0" * 32))
    EphemeralDirectory(place).close()
    assert directories(base) == stays
    assert files(tmp_path) == [tmp_path / ("0" * 32)]
    assert sorted(path.name for path in foreign.iterdir()) == ["1" * 32, "notes"]


def test_a_start_looks_at_a_bounded_number_of_names(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is beyond the bound goes with the start after."""
    monkeypatch.setattr(ephemeral, "_MAX_LOOKED_AT", 10)
    place = place_of(base)
    EphemeralDirectory(place).close()
    for number in range(25):
        (place / f"{machine_key()}-{number:032x}").mkdir(mode=0o700)
    left = []
    for _ in range(4):
        EphemeralDirectory(place).close()
        left.append(len(directories(base)))
    assert left[0] in (15, 16)  # its own may be among the ten
    assert left[-1] == 0


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a second real user")
def test_a_second_user_cannot_enter(base: Path, start: Start) -> None:
    """Neither the base's directories nor the files behind the process's descriptors."""
    process = start()
    (own,) = directories(base)
    said = as_user(
        FOREIGN_UID,
        """
for path in sys.argv[1:]:
    for call in (os.listdir, lambda path: os.open(path, os.O_TMPFILE | os.O_RDWR),
                 lambda path: os.mkdir(path + "/x"), lambda path: os.rmdir(path)):
        try:
            call(path)
            print("got in:", path)
        except PermissionError:
            print("no")
""",
        *(own.parent, own, f"/proc/{process.pid}/fd"),
    )
    assert said.split() == ["no"] * 12


def squat_by_another(place: Path) -> None:
    place.mkdir(parents=True, mode=0o700)
    os.chown(place, FOREIGN_UID, FOREIGN_UID)


def squat_by_link(place: Path) -> None:
    place.parent.mkdir()
    (place.parent.parent / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(place.parent.parent / "elsewhere")


def squat_by_a_link_of_another(place: Path) -> None:
    (place.parent.parent / "elsewhere").mkdir(mode=0o700)
    place.parent.symlink_to(place.parent.parent / "elsewhere")
    os.lchown(place.parent, FOREIGN_UID, FOREIGN_UID)


def open_to_others(place: Path) -> None:
    place.mkdir(parents=True)
    place.chmod(0o755)


def a_file_in_its_place(place: Path) -> None:
    place.parent.mkdir()
    place.touch()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a directory away")
@pytest.mark.parametrize(
    ("squat", "says"),
    [
        (squat_by_another, f"belongs to uid {FOREIGN_UID}"),
        (squat_by_link, "is a symbolic link"),
        (squat_by_a_link_of_another, f"is a link of uid {FOREIGN_UID}"),
        (open_to_others, "chmod 0700"),
        (a_file_in_its_place, "is not a directory"),
    ],
)
def test_a_place_that_cannot_be_trusted_is_left_for_memory(
    base: Path, start: Start, squat: Callable[[Path], None], says: str
) -> None:
    """One warning says why; the cache works, and nothing is written there."""
    squat(place_of(base))
    before = sorted(base.rglob("*"))
    process = start(ready=False)
    assert process.ready() == "memory"
    (warning,) = process.said
    assert warning.startswith("WARNING using memory instead of files: ")
    assert says in warning
    assert sorted(base.rglob("*")) == before


def test_a_place_that_cannot_be_locked_is_left_for_memory(base: Path, start: Start) -> None:
    """Without a lock nobody could tell the living from the dead; no directory is left there."""
    process = start(*refusing(FLOCK, error=37), ready=False)  # ENOLCK
    assert process.ready() == "memory"
    assert "WARNING using memory instead of files: " in process.said[0]
    assert directories(base) == []


_FORK = (
    "child = os.fork(); "
    "child or (cache.backend == 'filesystem' or os._exit(1), {}, sys.stdout.flush(), sys.exit(0))"
)


def test_a_forked_child_leaves_its_parent_s_directory_alone(base: Path, start: Start) -> None:
    """It ends with every exit handler, with a cache of its own or without; the parent goes on."""
    parent = start()
    (own,) = directories(base)
    for order in ("None", "cache.put('bucket', 'prefix', data)", "cache.close()"):
        parent.obeys(_FORK.format(order))
        parent.obeys("assert os.waitpid(child, 0)[1] == 0; check()")
        assert directories(base) == [own]
    parent.obeys("cache.close()")
    assert directories(base) == []


def test_a_forked_child_does_not_hold_its_parent_s_lock(base: Path, start: Start) -> None:
    """The parent is killed, the child lives on: the next start removes the parent's directory."""
    parent = start()
    (own,) = directories(base)
    parent.obeys("child = os.fork(); child or signal.alarm(60) or signal.pause()")
    pid = int(parent.obeys("print(child)"))
    with pidfd_of(pid) as child:
        parent.dies()
        eventually(lambda: nameless_files(pid) == [])  # once it has begun
        start()
        assert not own.exists()
        assert not poll([child], 0)  # it lives
        signal.pidfd_send_signal(child, signal.SIGKILL)


def test_a_closed_directory_makes_no_more_files(base: Path, tmp_path: Path) -> None:
    """A store that goes on gets an error, never a file where its number leads to now."""
    directory = EphemeralDirectory(place_of(base))
    directory.allocate(4096).close()
    directory.close()
    directory.close()
    assert directories(base) == []
    reused = [os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY) for _ in range(8)]
    with pytest.raises(CacheFullError, match="closed"):
        directory.allocate(4096)
    for descriptor in reused:
        os.close(descriptor)
