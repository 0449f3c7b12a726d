"""Two of the roadmap's three attacks, made for real: a swap of what is read, and another user.

The third, wrong bytes, is in tests/security/test_poisoning.py.

Two real users with a daemon each; attackers are real processes. Everything is bounded in count and
in time. What each attack is worth is shown beside it: that the attackers were at work, that the
disk tier was really changed, that the right bytes are served before and after.
"""

import hashlib
import io
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import dgcache
from dgcache import Settings, copies
from dgcache import cache as cache_module
from dgcache_core.references import Deltaspace, Sha256
from tests.support.real_users import real_user
from tests.support.wire import (
    SECONDS,
    Daemon,
    as_user,
    eventually,
    running,
    script_running,
)

_SIZE = 1_500_000
_ROUNDS = 200
_NOBODYS = "ab" * 32

# Imported as ourselves, since a user may not be able to read the interpreter's files; dumpable
# again, so that the user's own programs may open /proc/PID/fd.
_AS = """\
import ctypes, errno, fcntl, hashlib, json, os, random, select, socket, subprocess, sys, time
import dgcache, dgcache.local, dgcache.grpc_transport, dgcache.remote
from pathlib import Path
become(int(sys.argv[1]))
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
def content(seed, size):
    return random.Random(seed).randbytes(size)
def opened(directory, **settings):
    return dgcache.open(dgcache.Settings(
        socket_dir=Path(directory), connect_timeout_ms=20_000, **settings))
"""


def content(seed: int, size: int = _SIZE) -> bytes:
    """Return one of the references."""
    return random.Random(seed).randbytes(size)


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class User:
    """A real user, and the daemon of its own."""

    uid: int
    daemon: Daemon
    cache_dir: Path

    def runs(self, script: str, *arguments: object) -> Any:
        """Run a script as this user and return the JSON that it prints."""
        return json.loads(as_user(None, _AS + script, self.uid, *arguments))

    def status(self) -> dict[str, Any]:
        """Ask its daemon."""
        status: dict[str, Any] = self.runs(
            "with opened(sys.argv[2]) as cache: print(json.dumps(cache.status()))",
            self.daemon.directory,
        )
        return status


@contextmanager
def user_with_daemon(memory_mb: float, **limits: Any) -> Iterator[User]:
    """Make a user and let it run a daemon with a disk tier; the account's name is random."""
    with real_user() as account, tempfile.TemporaryDirectory(prefix="dgt-") as directory:
        cache_dir = Path(directory)
        os.chown(cache_dir, account.pw_uid, account.pw_gid)
        options = (
            *("--memory-size-mb", str(memory_mb), "--disk-size-mb", "64"),
            *("--cache-dir", str(cache_dir)),
        )
        with running(uid=account.pw_uid, options=options, limits=limits) as daemon:
            yield User(account.pw_uid, daemon, cache_dir)
            assert daemon.process.poll() is None, daemon.logged()
            assert "Traceback" not in daemon.logged()


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make real users")


# -- a: the swap between check and use -------------------------------------------------------------

# Gets a reference, lets xdelta3 decode against its path, and tells how each round ended. The deltas
# have no checksum (-n), so that nothing but the cache stands between a swap and wrong bytes.
_READER = """\
directory, work, rounds, size = Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:])
references = [content(seed, size) for seed in range(4)]
targets = [data[:1000] + b"new" + data[500:-7] for data in references]
deltas = []
for data, target in zip(references, targets):
    (work / "reference").write_bytes(data)
    encode = ["xdelta3", "-e", "-n", "-c", "-s", work / "reference"]
    deltas.append(subprocess.run(encode, input=target, stdout=subprocess.PIPE, check=True).stdout)
(work / "reference").unlink()
ends = dict(right=0, wrong=0, missed=0, corrupt=0, refused=0, failed=0)
with opened(directory) as cache:
    digests = [cache.put("bucket", "releases", data) for data in references]
    print("ready", flush=True)
    for number in range(rounds):
        which = number % 4
        try:
            reference = cache.get("bucket", "releases", digests[which])
        except (dgcache.CacheMissError, dgcache.CacheCorruptionError) as error:
            ends["missed" if isinstance(error, dgcache.CacheMissError) else "corrupt"] += 1
            try:
                reference = cache.get_or_fetch(
                    "bucket", "releases", digests[which], lambda: references[which])
            except dgcache.InvalidReferenceError:  # overwritten before it was sealed, and seen
                ends["refused"] += 1
                continue
        with reference:
            decode = ["xdelta3", "-d", "-n", "-c", "-s", reference.path]
            done = subprocess.run(decode, input=deltas[which], capture_output=True)
            right = done.stdout == targets[which]
            ends["failed" if done.returncode else "right" if right else "wrong"] += 1
    status = cache.status()
    ends["backend"], ends["loads"] = cache.backend, status["disk"]["loads"]
    ends["seen"] = status["disk"]["alarms"] + status["disk"]["corruptions"]
print(json.dumps(ends))
"""

# Tries, until it is told to end, everything on every path that the reader was handed, and one
# change after the other on whatever is in the cache's directories; tells how often it got through.
_ATTACKER = """\
reader, places = int(sys.argv[2]), [Path(place) for place in sys.argv[3:]]
chosen, tries, successes = random.Random(os.getpid()), 0, {}
junk = os.urandom(4096)
def overwrite(path):
    with open(path, "r+b") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size // 2)); file.write(junk)
def truncate(path): os.truncate(path, 100)
def unlink(path): os.unlink(path)
def link(path):
    os.symlink("/etc/hostname", path + ".x"); os.rename(path + ".x", path)
def replace(path):
    with open(path + ".x", "wb") as file: file.write(junk)
    os.rename(path + ".x", path)
def another(path):
    others = [other for other in found if other != path]
    os.link(chosen.choice(others), path + ".x"); os.rename(path + ".x", path)
def loosen(path): os.chmod(path, 0o666)
def write_again(path):
    try:
        os.chmod(path, 0o600)
    except OSError:
        pass
    overwrite(path)
def kind_of(path):
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return "handout"
    sealed = fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    os.close(file)
    return "handout" if sealed else "unfinished"  # a fetch of the reader's own, before its check
def attempt(what, on, path):
    global tries
    tries += 1
    try:
        what(path)
    except (OSError, IndexError):
        return
    name = on + " " + what.__name__
    successes[name] = successes.get(name, 0) + 1
changes = [overwrite, truncate, unlink, link, replace, another, loosen]
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.02)[0]:
    held = Path(f"/proc/{reader}/fd")
    try:
        numbers = os.listdir(held)
    except OSError:
        numbers = [str(number) for number in range(3, 20)]
    for number in numbers:
        path = f"{held}/{number}"
        try:
            if not os.readlink(path).startswith("/memfd:"):
                continue
        except PermissionError:
            pass
        except OSError:
            continue
        for what in (overwrite, truncate, unlink, link, replace, write_again):
            attempt(what, kind_of(path), path)
    try:
        found = [str(path) for place in places for path in place.rglob("*")
                 if path.is_file() and path.name != "tier.lock"]
        aims = [chosen.choice(found)] if found else []
    except PermissionError:  # then by the names that they have
        found = [f"{place}/{name}" for place in places
                 for name in ("x", "v2", "v2/disk", "session.sock", "rpc.sock", "daemon.lock")]
        aims = found
    for path in aims:
        attempt(chosen.choice(changes), "disk", path)
print(json.dumps([tries, successes]))
"""


@pytest.mark.root
def test_no_swap_or_write_between_get_and_decode_gives_wrong_bytes() -> None:
    """200 gets and decodes, while another user and the user itself attack every path there is."""
    needs_root()
    with (
        real_user() as stranger,
        user_with_daemon(memory_mb=6) as user,
        tempfile.TemporaryDirectory(prefix="dgt-") as work,
        script_running(
            None, _AS + _READER, user.uid, user.daemon.directory, own(work, user), _ROUNDS, _SIZE
        ) as reader,
    ):
        hear(reader, "ready")
        places = (user.cache_dir, user.daemon.directory)
        with (
            script_running(None, _AS + _ATTACKER, stranger.pw_uid, reader.pid, *places) as foreign,
            script_running(None, _AS + _ATTACKER, user.uid, reader.pid, places[0]) as same,
        ):
            for attacker in (foreign, same):
                hear(attacker, "ready")
            ends = json.loads(said_by(reader, seconds=40))
            foreign_tries, foreign_successes = json.loads(said_by(foreign))
            same_tries, same_successes = json.loads(said_by(same))
        log = user.daemon.logged()
    assert ends["wrong"] == ends["failed"] == 0
    assert ends["right"] + ends["refused"] == _ROUNDS
    assert ends["right"] > _ROUNDS / 2
    assert ends["backend"] == "dg-cached"
    assert min(foreign_tries, same_tries) > 10  # how many is the scheduler's doing, not the cache's
    assert foreign_successes == {}
    assert not [name for name in same_successes if name.startswith("handout")]
    on_disk = [count for name, count in same_successes.items() if name.startswith("disk")]
    assert sum(on_disk) > 0  # the attacker's own files, after all
    assert ends["loads"] > 0  # the disk tier was in use
    assert ends["seen"] > 0
    assert "security kind=" in log


@pytest.mark.parametrize("moment", ["before it is sealed", "after it was hashed"])
@pytest.mark.parametrize("size", [None, _SIZE], ids=["hashed here", "hashed by the daemon"])
def test_a_fetched_reference_that_is_overwritten_in_the_client_is_refused_or_unchanged(
    daemon: Settings, monkeypatch: pytest.MonkeyPatch, size: int | None, moment: str
) -> None:
    """By a writer that gets in through /proc at the worst moment; Yama does not forbid that."""
    data, outcome = content(5), []
    commit, hashed = copies.Mirror.commit, cache_module.sha256_of_descriptor

    def overwrite() -> None:
        for link in Path("/proc/self/fd").iterdir():
            with suppress(OSError):
                if str(link.readlink()).startswith("/memfd:") and link.stat().st_size == _SIZE:
                    link.chmod(0o600)
                    with link.open("r+b", buffering=0) as file:
                        outcome.append("opened")
                        file.write(b"wrong")
                        outcome.append("written")

    def commit_then(mirror: copies.Mirror) -> str | None:
        stored = commit(mirror)
        overwrite()
        return stored

    def hash_then(descriptor: int, length: int) -> Sha256:
        digest = hashed(descriptor, length)
        overwrite()
        return digest

    if moment == "before it is sealed":
        monkeypatch.setattr(copies.Mirror, "commit", commit_then)
    else:
        monkeypatch.setattr(cache_module, "sha256_of_descriptor", hash_then)
    wanted, sha256 = Deltaspace("bucket", "releases"), Sha256(digest_of(data))
    with dgcache.open(daemon) as cache:
        if moment == "before it is sealed":
            with pytest.raises(dgcache.InvalidReferenceError):
                cache.adopt(wanted, sha256, io.BytesIO(data), size=size)
            assert outcome == ["opened", "written"]
        else:
            with cache.adopt(wanted, sha256, io.BytesIO(data), size=size) as reference:
                assert reference.read() == data
            assert "opened" in outcome
            assert "written" not in outcome


def own(directory: str, user: User) -> str:
    os.chown(directory, user.uid, user.uid)
    return directory


def hear(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line == word, process.communicate(timeout=SECONDS)[1]


def said_by(process: "subprocess.Popen[str]", seconds: float = SECONDS) -> str:
    """Tell a process to end, and return what it said last."""
    said, complaint = process.communicate("end\n", timeout=seconds)
    assert process.returncode == 0, complaint
    return said


# -- b: another user -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_users() -> Iterator[tuple[User, User]]:
    """Two users with daemons; no monitor, which would put loosened modes back."""
    needs_root()
    calm: dict[str, Any] = {"watch_mechanisms": (), "audit_seconds": 3600}
    with user_with_daemon(64, **calm) as one, user_with_daemon(64, **calm) as other:
        yield one, other


_PUT = """
with opened(sys.argv[2]) as cache:
    digest = cache.put("bucket", "releases", content(os.getuid(), 100_000))
    print(json.dumps([cache.backend, digest]))
"""

# What came of asking one's own daemon for digests, with the digests left out.
_ASK = """
answers = []
with opened(sys.argv[2]) as cache:
    for digest in sys.argv[3:]:
        try:
            cache.get("bucket", "releases", digest).close()
            answers.append("here")
        except dgcache.CacheMissError as error:
            answers.append(str(error).replace(digest, "DIGEST"))
    answers.append([len(cache.entries()), cache.has("bucket", "releases", sys.argv[3])])
print(json.dumps(answers))
"""

_TRY = """
def attempt(action, *arguments):
    try:
        action(*arguments)
        return "in"
    except OSError as error:
        return errno.errorcode[error.errno]
def connect(path):
    kind = socket.SOCK_SEQPACKET if "session" in path else socket.SOCK_STREAM
    with socket.socket(socket.AF_UNIX, kind) as connection:
        connection.settimeout(20)
        connection.connect(path)
directory, cache_dir, pid = sys.argv[2:5]
tried = {path: attempt(connect, f"{directory}/{path}")
         for path in ("session.sock", "rpc.sock", "inner/inner.sock", "there-is-no-such.sock")}
for place in (directory, cache_dir, cache_dir + "/v2/disk"):
    tried["list " + place] = attempt(os.listdir, place)
    tried["write " + place] = attempt(os.mkdir, place + "/x")
for name in ("fd", "map_files", "ns"):
    tried[name] = attempt(os.listdir, f"/proc/{pid}/{name}")
for name in ("mem", "maps", "smaps", "environ", "auxv", "pagemap", "stack", "fd/0", "io"):
    tried[name] = attempt(lambda: open(f"/proc/{pid}/{name}", "rb").read(1))
for name in ("exe", "cwd", "root"):
    tried[name] = attempt(os.readlink, f"/proc/{pid}/{name}")
seen = b""
for path in [*Path(f"/proc/{pid}").iterdir(), *Path(f"/proc/{pid}/net").iterdir(),
             Path("/proc/locks"), Path("/proc/mounts")]:
    try:
        if path.is_file():
            with path.open("rb") as file:
                seen += file.read(1 << 20)
    except OSError:
        pass
print(json.dumps([tried, seen.hex()]))
"""


@pytest.mark.root
def test_neither_user_finds_the_other_s_daemon_or_anything_of_it(
    two_users: tuple[User, User],
) -> None:
    """Not by its sockets, its directories, its process, or the texts of errors."""
    for victim, other in (two_users, two_users[::-1]):
        backend, digest = victim.runs(_PUT, victim.daemon.directory)
        assert backend == "dg-cached"
        told = victim.daemon.logged()
        arguments = (victim.daemon.directory, victim.cache_dir, victim.daemon.pid)
        tried, seen = other.runs(_TRY, *arguments)
        assert {*tried.values()} == {"EACCES"} or {*tried.values()} == {"EACCES", "EPERM"}, tried
        assert len(bytes.fromhex(seen)) > 1000  # status, cmdline and the like
        for secret in (
            digest.encode(),
            bytes.fromhex(digest),
            b"releases",
            content(victim.uid, 100_000)[:64],
        ):
            assert secret not in bytes.fromhex(seen)
        assert victim.daemon.logged() == told  # nothing of it reached the daemon
        victim.runs(_FORGET, victim.daemon.directory)


_FORGET = """
with opened(sys.argv[2]) as cache:
    cache.clear()
print("null")
"""


@pytest.mark.root
def test_what_one_user_has_cached_is_a_miss_like_any_other_to_the_second(
    two_users: tuple[User, User],
) -> None:
    """The same bucket, prefix and digest; the answer is, word for word, that to a made-up one."""
    victim, other = two_users
    _, digest = victim.runs(_PUT, victim.daemon.directory)
    theirs, nobodys, listed = other.runs(_ASK, other.daemon.directory, digest, _NOBODYS)
    assert theirs == nobodys
    assert theirs.endswith("unknown")
    assert listed == [0, False]
    here, _, listed = victim.runs(_ASK, victim.daemon.directory, digest, _NOBODYS)
    assert (here, listed) == ("here", [1, True])
    victim.runs(_FORGET, victim.daemon.directory)


# Works on the cache at a place, and tells which backend did it.
_WORK = """
import logging
logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
data = content(2, 100_000)
with opened(sys.argv[2]) as cache:
    digest = cache.put("bucket", "releases", data)
    with cache.get("bucket", "releases", digest) as reference:
        print(json.dumps([cache.backend, reference.source, reference.read() == data]))
"""


_CONNECT = """
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
    connection.connect(sys.argv[2] + "/session.sock")
print("null")
"""


@pytest.mark.root
@pytest.mark.parametrize("modes", ["as made", "open to all"])
def test_a_client_led_to_the_other_s_sockets_falls_back_and_sends_nothing(
    two_users: tuple[User, User], modes: str
) -> None:
    """Neither where the kernel keeps it out, nor where the other lures it with open doors."""
    victim, lurer = two_users
    directory = lurer.daemon.directory
    told = lurer.daemon.logged()
    if modes == "open to all":
        _set_modes(directory, 0o755, 0o666)
    try:
        assert victim.runs(_WORK, directory) == ["memory", "memory", True]
        assert lurer.daemon.logged() == told
        if modes == "open to all":  # it would have told: each peer that it refuses is logged
            victim.runs(_CONNECT, directory)
            eventually(lambda: f"uid={victim.uid}" in lurer.daemon.logged().removeprefix(told))
    finally:
        _set_modes(directory, 0o700, 0o600)
    assert lurer.runs(_WORK, directory) == ["dg-cached", "dg-cached", True]
    lurer.runs(_FORGET, directory)


def _set_modes(directory: Path, mode: int, sockets: int) -> None:
    directory.parent.chmod(mode)
    directory.chmod(mode)
    for name in ("session.sock", "rpc.sock"):
        (directory / name).chmod(sockets)
