"""What is left where others can look: memory, core dumps, logs, children, disks."""

import base64
import fcntl
import hashlib
import json
import os
import secrets
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from google.protobuf import text_format

from dgcache import Settings
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.bystander_in_process import as_root
from tests.support.disk_daemon import Home
from tests.support.key_memory import (
    KEY_BYTES,
    copies_of,
    key_regions,
    keys_of,
    mappings,
    read_memory,
)
from tests.support.refused_syscalls import MEMFD_SECRET, refusing
from tests.support.wire import (
    MIB,
    OWNER_UID,
    SECONDS,
    SPACE,
    Client,
    Daemon,
    as_user,
    eventually,
    poll,
    refused,
    running,
    script_running,
    sha256,
)

# -- 48: core dumps --------------------------------------------------------------------------------

_CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
_ORDINARY = """
import resource
most = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (most, most))
print(1, flush=True)
sys.stdin.read()
"""


@contextmanager
def core_pattern(pattern: str) -> Iterator[None]:
    """Set the machine's pattern for as long as the block lasts; one test run at a time does."""
    with Path("/tmp/dgt-core-pattern.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = _CORE_PATTERN.read_text()
        try:
            _CORE_PATTERN.write_text(pattern)
        except OSError as error:
            pytest.skip(f"needs the right to set core_pattern: {error.strerror}")
        try:
            yield
        finally:
            _CORE_PATTERN.write_text(before)


@as_root
@pytest.mark.parametrize("how", ["a file", "a pipe"])
def test_48_an_abort_leaves_no_core(short_directory: Path, how: str) -> None:
    """SIGABRT, where root has lifted the limit if it may: nothing comes of the daemon, into a file
    or into the program that a piped pattern names; of another process, aborted alike, it does."""
    cores = short_directory.resolve() / "cores"
    cores.mkdir()
    taker = short_directory.resolve() / "taker"
    taker.write_text(f"#!/bin/sh\ncat > {cores}/core.$1\n")
    taker.chmod(0o700)
    pattern = f"|{taker} %p" if how == "a pipe" else f"{cores}/core.%p"
    with (
        core_pattern(pattern),
        running() as daemon,
        Client(daemon.directory) as client,
        script_running(None, _ORDINARY) as other,
    ):
        os.close(client.lookup(client.store(os.urandom(MIB))))
        assert poll([other.stdout.fileno()] if other.stdout else [])
        # a limit of 0 does not stop a pipe (core(5)), and root may lift it for a file
        lift = ["prlimit", f"--pid={daemon.pid}", "--core=unlimited:unlimited"]
        subprocess.run(lift, check=False, capture_output=True)
        assert daemon.stop(signal.SIGABRT) == -signal.SIGABRT
        other.send_signal(signal.SIGABRT)
        assert other.wait(SECONDS) == -signal.SIGABRT
        eventually((cores / f"core.{other.pid}").exists)
        assert [path.name for path in cores.iterdir()] == [f"core.{other.pid}"]


# -- 49: another process of the same user ----------------------------------------------------------

_LOOK = """
pid, libc = int(sys.argv[1]), ctypes.CDLL(None, use_errno=True)
def attempt(name, action):
    try:
        action()
        print(name, "allowed")
    except OSError as error:
        print(name, error.strerror)
def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def take():
    pidfd = os.pidfd_open(pid)
    checked(libc.syscall(438, pidfd, 0, 0))
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
def read_memory():
    here, there = ctypes.create_string_buffer(16), Vector(int(sys.argv[2]), 16)
    mine = Vector(ctypes.addressof(here), 16)
    count = ctypes.c_ulong(1)
    checked(libc.process_vm_readv(pid, ctypes.byref(mine), count, ctypes.byref(there), count, 0))
for name in ("mem", "maps", "environ", "fd", "map_files", "auxv"):
    path = f"/proc/{pid}/{name}"
    attempt(name, lambda: os.listdir(path) if os.path.isdir(path) else open(path, "rb"))
attempt("pidfd_getfd", take)
attempt("process_vm_readv", read_memory)
attempt("ptrace", lambda: checked(libc.ptrace(16, pid, 0, 0)))
"""


def looked(pid: int) -> dict[str, str]:
    """Let a process of the owner look into another, and return how each way ended."""
    start = next(one.start for one in mappings(pid) if "rd" in one.flags)
    said = as_user(OWNER_UID, _LOOK, pid, start).splitlines()
    return dict(line.split(" ", 1) for line in said)


@as_root
def test_49_another_process_of_the_same_user_cannot_look_in() -> None:
    """Memory, maps, environment, descriptors, tracing, taking a descriptor: all denied, where the
    same attempts on an ordinary process of the user succeed."""
    ordinary = "ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\nprint(1, flush=True)\nsys.stdin.read()"
    with script_running(OWNER_UID, ordinary) as other:
        assert poll([other.stdout.fileno()] if other.stdout else [])
        assert set(looked(other.pid).values()) == {"allowed"}
    with running(uid=OWNER_UID) as daemon:
        said = looked(daemon.pid)
    assert len(said) == 9
    assert set(said.values()) <= {"Permission denied", "Operation not permitted"}, said


# -- 50 and 51: the daemon's memory ----------------------------------------------------------------


@pytest.fixture
def open_book() -> Iterator[Daemon]:
    """A daemon whose keys are in locked memory, which root can read."""
    with running(prefix=refusing(MEMFD_SECRET)) as daemon:
        yield daemon


def reads(client: Client, digest: bytes) -> bytes:
    request = pb.ReadRequest(deltaspace=SPACE, sha256=digest)
    return b"".join(part.data for part in client.stub.Read(request, timeout=SECONDS))


def writes(client: Client, data: bytes) -> bytes:
    begin = pb.WriteRequest(begin=pb.WriteBegin(deltaspace=SPACE, size=len(data)))
    pieces = [pb.WriteRequest(data=data[at : at + MIB]) for at in range(0, len(data), MIB)]
    digest: bytes = client.stub.Write(iter([begin, *pieces]), timeout=SECONDS).sha256
    return digest


def used(client: Client) -> None:
    """Do everything there is, ends that are none as well."""
    stored = [client.store(os.urandom(5 * MIB)), writes(client, os.urandom(3 * MIB))]
    for digest in stored:
        os.close(client.lookup(digest))
        assert sha256(reads(client, digest)) == digest
        eventually(lambda: client.status().store.handouts == 0)
        os.close(client.lookup(digest))
    request_id, write_end = client.begin(MIB, bytes(32))
    with os.fdopen(write_end, "wb") as pipe:
        pipe.write(os.urandom(MIB))
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        client.commit(request_id)
    eventually(lambda: client.status().store.reserved_bytes == 0)


@as_root
def test_50_a_key_is_in_its_page_and_nowhere_else(open_book: Daemon) -> None:
    """Root reads all of the daemon's memory after stores, lookups, streams and failures."""
    with Client(open_book.directory) as client:
        used(client)
        keys = keys_of(open_book.pid)
        assert len(keys) == 2
        assert copies_of(open_book.pid, keys) == dict.fromkeys(keys, 1)
        (region,) = key_regions(open_book.pid)
        assert region.locked_kib > 0


@as_root
def test_50_the_keys_of_a_disk_tier_are_in_locked_pages_only(short_directory: Path) -> None:
    """The file's key, which root knows here, is in no page that is not one of keys; so are the keys
    that were wrapped and unwrapped."""
    home = Home(short_directory.resolve())
    with (
        home.daemon(memory_mb=4, prefix=refusing(MEMFD_SECRET)) as daemon,
        Client(daemon.directory) as client,
    ):
        digests = [client.store(os.urandom(MIB)) for _ in range(6)]
        for digest in digests:
            os.close(client.lookup(digest))
        assert client.status().disk.loads > 0
        inside = b"".join(read_memory(daemon.pid, one) for one in key_regions(daemon.pid))
        slots = {inside[at : at + KEY_BYTES] for at in range(0, len(inside), KEY_BYTES)}
        keys = {slot for slot in slots if any(slot)}
        assert len(keys) >= 4
        counts = copies_of(daemon.pid, keys | {base64.b64decode(home.key.read_bytes())})
        assert {key: count for key, count in counts.items() if count > inside.count(key)} == {}


def pattern(seed: bytes, size: int) -> bytes:
    """Bytes that are nowhere by chance: in each 32 there are 16 that mark it, and 16 of its own."""
    mark = marked(seed)
    return b"".join(
        mark + hashlib.sha256(seed + number.to_bytes(4, "big")).digest()[:16]
        for number in range(size // 32)
    )


def marked(seed: bytes) -> bytes:
    return hashlib.sha256(seed).digest()[:16]


def traces_in(pid: int, mark: bytes) -> int:
    """Count a mark in all of a process's memory that can be read."""
    readable = (mapping for mapping in mappings(pid) if "rd" in mapping.flags)
    return sum(read_memory(pid, mapping).count(mark) for mapping in readable)


@as_root
def test_51_after_an_eviction_key_and_plaintext_are_gone(open_book: Daemon) -> None:
    """The slot is zero, and of what was stored and handed out through descriptors no piece is in
    the daemon's memory; while it is in use, its key is there."""
    seed = os.urandom(16)
    data, mark = pattern(seed, 2 * MIB), marked(seed)
    with Client(open_book.directory) as client:
        os.close(client.lookup(client.store(data)))
        eventually(lambda: client.status().store.handouts == 0)
        (key,) = keys_of(open_book.pid)
        assert traces_in(open_book.pid, mark) == 0  # encrypted already
        client.call("Evict", pb.EvictRequest(deltaspace=SPACE))
        assert keys_of(open_book.pid) == set()
        assert copies_of(open_book.pid, {key}) == {key: 0}
        assert traces_in(open_book.pid, mark) == 0


@as_root
@pytest.mark.parametrize("way", ["in", "out"])
def test_51_of_a_byte_stream_only_buffers_in_use_are_left(open_book: Daemon, way: str) -> None:
    """What a client sends or gets in messages passes through gRPC's memory, which is overwritten
    when it is freed: of 2 MiB, less than a tenth may still be in a buffer that gRPC keeps."""
    seed = os.urandom(16)
    data = pattern(seed, 2 * MIB)
    with Client(open_book.directory) as client:
        if way == "in":
            writes(client, data)
        else:
            assert reads(client, client.store(data)) == data
        eventually(lambda: client.status().store.handouts == 0)
        client.call("Evict", pb.EvictRequest(deltaspace=SPACE))
        assert traces_in(open_book.pid, marked(seed)) < len(data) // 32 // 10


@as_root
def test_51_the_search_finds_what_is_there(short_directory: Path) -> None:
    """A process that has the plaintext is found to have it."""
    script = "data = bytes.fromhex(sys.stdin.readline())\nprint(1, flush=True)\nsys.stdin.read()"
    seed = os.urandom(16)
    data = pattern(seed, 64_000)
    with script_running(None, script) as process:
        assert process.stdin is not None
        print(data.hex(), file=process.stdin, flush=True)
        assert poll([process.stdout.fileno()] if process.stdout else [])
        assert traces_in(process.pid, marked(seed)) >= 2000


# -- 52: words -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talkative() -> Iterator[Daemon]:
    """A daemon that logs every detail, and whose keys root can read."""
    prefix = refusing(MEMFD_SECRET) if os.geteuid() == 0 else ()
    options = ("--memory-size-mb", "64", "--verbose")
    with running(options=options, prefix=prefix) as daemon:
        yield daemon


def test_52_a_busy_run_tells_no_secret(talkative: Daemon) -> None:
    """Neither its log nor Status nor List nor an error has a session id, a payload or a key."""
    payload = secrets.token_bytes(48).hex().encode()
    said: list[str] = []
    with Client(talkative.directory) as client, Client(talkative.directory) as other:
        digest = client.store(payload)
        os.close(client.lookup(digest))
        request_id, write_end = client.begin(len(payload), bytes(32))
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(payload)
        with refused(grpc.StatusCode.INVALID_ARGUMENT) as mismatch:
            client.commit(request_id)
        with refused(grpc.StatusCode.UNAUTHENTICATED) as stranger:
            almost = client.hello.session_id[:-1] + bytes([client.hello.session_id[-1] ^ 1])
            metadata = (("dg-session", almost.hex()),)
            client.stub.Lookup(pb.LookupRequest(), metadata=metadata, timeout=SECONDS)
        with refused(grpc.StatusCode.INVALID_ARGUMENT) as invalid:
            client.call("Lookup", pb.LookupRequest(deltaspace=SPACE, sha256=payload))
        assert other.session is not None
        other.session.send(payload)
        eventually(lambda: client.status().sessions == 1)
        said += [text_format.MessageToString(client.status(), as_utf8=True)]
        said += [text_format.MessageToString(client.call("List", pb.ListRequest()), as_utf8=True)]
        said += [str(error.details()) for error in mismatch + stranger + invalid]
        secret = [client.hello.session_id.hex(), other.hello.session_id.hex(), payload.decode()]
        if os.geteuid() == 0:
            (key,) = keys_of(talkative.pid)
            secret += [key.hex(), base64.b64encode(key).decode(), repr(key)[2:-1]]
    said += [talkative.logged()]
    assert "session-ended" in said[-1]
    for text in said:
        assert not [word for word in secret if word in text], text


@as_root
def test_52_neither_environment_nor_children_have_a_secret(short_directory: Path) -> None:
    """The key that a daemon was given by a variable is in no environment, argument, log or status
    of it afterwards, and it has no children; a client's children get no session id."""
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    options = ("--memory-size-mb", "8", "--disk-size-mb", "16", "--verbose")
    options += ("--cache-dir", str(short_directory.resolve() / "c"))
    with (
        running(options=options, environ={"DG_CACHE_ENCRYPTION_KEY": key}) as daemon,
        Client(daemon.directory) as client,
    ):
        client.store(b"something")
        process = Path(f"/proc/{daemon.pid}")
        for name in ("environ", "cmdline"):
            assert key.encode() not in (process / name).read_bytes()
        assert b"DG_CACHE" in (process / "environ").read_bytes()
        assert not "".join(one.read_text() for one in process.glob("task/*/children"))
        status = text_format.MessageToString(client.status(), as_utf8=True)
        assert client.status().disk.persistent
        assert key not in daemon.logged() + status
        child = subprocess.run(
            ["cat", "/proc/self/environ", "/proc/self/cmdline"], capture_output=True, check=True
        )
        assert client.hello.session_id not in child.stdout
        assert client.hello.session_id.hex().encode() not in child.stdout


# -- 53: disks -------------------------------------------------------------------------------------

# A client of its own: it makes the reference from a seed, so that it is nowhere but in its memory,
# and comes to the phase in which it or its daemon is killed.
_PHASES = """
import hashlib, subprocess
from pathlib import Path
import dgcache
from dgcache_core.references import Deltaspace, Sha256
seed, size, phase, directory = bytes.fromhex(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5]
mark = hashlib.sha256(seed).digest()[:16]
data = b"".join(
    mark + hashlib.sha256(seed + n.to_bytes(4, "big")).digest()[:16] for n in range(size // 32))
digest = hashlib.sha256(data).hexdigest()
def ready():
    print("ready", flush=True)
    sys.stdin.read()
class Slow:
    at = 0
    def read(self, count=-1):
        if self.at >= len(data) // 2:
            ready()
        piece = data[self.at:self.at + min(count, 1 << 16) if count > 0 else None]
        self.at += len(piece)
        return piece
backend = {"backend": "filesystem", "cache_dir": Path(sys.argv[5])} if phase == "filesystem" else {}
with dgcache.open(dgcache.Settings(
        socket_dir=Path(directory), connect_timeout_ms=20_000, **backend)) as cache:
    if phase == "storing":
        cache.adopt(Deltaspace("b", "p"), Sha256(digest), Slow(), size=size)
    cache.put("b", "p", data)
    for number in range(30):  # out of memory, onto the disk tier
        cache.put("b", "p", hashlib.sha256(data + bytes([number])).digest() * (size // 32))
    with cache.get_or_fetch("b", "p", digest, lambda: data) as reference:
        if phase == "decoding":
            with subprocess.Popen(["sleep", "60"], stdin=open(reference.path, "rb")) as held:
                ready()
        ready()
"""


@contextmanager
def own_disk(directory: Path) -> Iterator[tuple[Path, Callable[[], bytes]]]:
    """A file system in a file: where it is mounted, and what gives all of its blocks, also those
    of files that are gone."""
    image, place = directory / "image", directory / "disk"
    with image.open("wb") as file:
        file.truncate(96 * MIB)
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    mount = ["mount", "-o", "loop", image, place]
    mounted = subprocess.run(mount, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs a loop device and the right to mount: {mounted.stderr.strip()}")
    gone = False

    def blocks() -> bytes:
        nonlocal gone
        subprocess.run(["umount", place], check=True)
        gone = True
        return image.read_bytes()

    try:
        yield place, blocks
    finally:
        if not gone:
            subprocess.run(["umount", "-l", place], check=True)


PHASES = [
    *(
        (phase, victim)
        for phase in ("storing", "holding", "decoding")
        for victim in ("daemon", "client")
    ),
    ("filesystem", "client"),  # that backend has no daemon
]


def searched() -> list[Path]:
    """Where files of anybody may come to be."""
    places = [Path(place) for place in ("/tmp", "/var/tmp", "/dev/shm", "/run", Path.home())]
    return [place for place in places if place.is_dir()]


def changed_since(moment: float) -> Iterator[Path]:
    """Every file of a reasonable size that was written since then."""
    for place in searched():
        for directory, names, files in os.walk(place):
            names[:] = [name for name in names if name not in (".cache", ".pyenv", "node_modules")]
            for name in files:
                path = Path(directory, name)
                with suppress(OSError):
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode) and status.st_mtime >= moment:
                        yield path


def has(path: Path, mark: bytes) -> bool:
    """Tell whether a file has a mark in it; one that is gone has none, nor has a sparse giant."""
    try:
        return path.stat().st_size <= 256 * MIB and mark in path.read_bytes()
    except OSError:
        return False


@as_root
@pytest.mark.parametrize(("phase", "victim"), PHASES)
def test_53_after_a_kill_no_plaintext_is_on_any_disk(
    short_directory: Path, phase: str, victim: str
) -> None:
    """Everything that daemon and client are told to use is on a disk of their own, whose blocks are
    all searched, free ones too; beside it, every file written meanwhile in the usual places."""
    seed, size, begun = os.urandom(16), 2 * MIB, time.time() - 1
    mark = marked(seed)
    with ExitStack() as stack:
        disk, blocks = stack.enter_context(own_disk(short_directory.resolve()))
        home = Home(disk)
        names = {"HOME": "h", "TMPDIR": "t", "XDG_CACHE_HOME": "x", "XDG_STATE_HOME": "y"}
        for name in names.values():
            (disk / name).mkdir(0o700)
        places = [f"{variable}={disk / name}" for variable, name in names.items()]
        with home.daemon(memory_mb=8, sockets=disk / "s", prefix=("env", *places)) as daemon:
            arguments = [seed.hex(), size, phase, daemon.directory, disk / "x"]
            script = f"os.environ.update(dict(one.split('=') for one in {places!r}))\n" + _PHASES
            with script_running(None, script, *map(str, arguments)) as client:
                assert client.stdout is not None
                assert poll([client.stdout.fileno()])
                line = client.stdout.readline()
                assert line == "ready\n", client.communicate()[1]
                (daemon.process if victim == "daemon" else client).kill()
                if victim == "daemon":
                    daemon.process.wait(SECONDS)
                else:
                    client.wait(SECONDS)
                assert not [path for path in changed_since(begun) if has(path, mark)]
        subprocess.run(["sync", "-f", disk], check=True)
        for _ in range(100):  # what a child of the client still has open
            with suppress(subprocess.CalledProcessError):
                everything = blocks()
                break
            poll([], 0.1)
        assert len(everything) == 96 * MIB
        assert everything.count(mark) == 0


@as_root
def test_53_the_search_finds_a_file_that_is_gone(short_directory: Path) -> None:
    """What was written in clear and deleted again is seen, in the blocks that it had."""
    seed = os.urandom(16)
    data, mark = pattern(seed, MIB), marked(seed)
    with own_disk(short_directory.resolve()) as (disk, blocks):
        with (disk / "careless").open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        assert has(disk / "careless", mark)
        (disk / "careless").unlink()
        assert blocks().count(mark) > 10_000


# -- 54: fork --------------------------------------------------------------------------------------

_FORK = """
import json
from pathlib import Path
import dgcache
settings = dgcache.Settings(socket_dir=Path(sys.argv[1]), connect_timeout_ms=20_000)
data = os.urandom(100_000)
with dgcache.open(settings) as cache:
    digest = cache.put("b", "p", data)
    parents = [cache.backend, cache.status()["sessions"]]
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        seen = [cache.backend, cache.has("b", "p", digest)]
        again = cache.put("b", "p", data)
        with cache.get("b", "p", again) as reference:
            seen.append(reference.read() == data)
        cache.close()
        os.write(writer, json.dumps(seen).encode())
        os._exit(0)
    os.waitpid(child, 0)
    with cache.get("b", "p", digest) as reference:
        after = [reference.source, reference.read() == data, cache.status()["sessions"]]
    print(json.dumps([parents, json.loads(os.read(reader, 4096)), after]))
"""


def test_54_a_forked_child_does_not_share_the_session(daemon: Settings) -> None:
    """It falls back to a cache of its own; what it does and its end leave the parent's session and
    what it may do as they were."""
    parents, child, after = json.loads(as_user(None, _FORK, daemon.socket_dir))
    assert parents == ["dg-cached", 1]
    assert child == ["memory", False, True]
    assert after == ["dg-cached", True, 1]


_FORK_KEYS = """
import ctypes, json
import dgcache
from tests.support.key_memory import key_regions, read_memory
with dgcache.open(dgcache.Settings(backend="memory")) as cache:
    digest = cache.put("b", "p", os.urandom(100_000))
    (region,) = key_regions(os.getpid())
    mine = read_memory(os.getpid(), region)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        page = ctypes.string_at(region.start, region.end - region.start)
        try:
            cache.get("b", "p", digest).close()
            served = True
        except dgcache.CacheError:
            served = False
        os.write(writer, json.dumps([any(page), any(mine), served]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    with cache.get("b", "p", digest) as reference:
        print(json.dumps([json.loads(os.read(reader, 4096)), len(reference.read())]))
"""


def test_54_the_key_page_is_zero_in_a_forked_child() -> None:
    """In-process, where a child is possible: the kernel has wiped its page (MADV_WIPEONFORK), and
    it cannot decrypt what it inherited; the parent can."""
    child, length = json.loads(as_user(None, _FORK_KEYS))
    assert child == [False, True, False]
    assert length == 100_000
