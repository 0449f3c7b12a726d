"""Descriptors: handed out, sent in, never read, never closed, by clients that mean harm."""

import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import subprocess
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from dgcache_core.sealed_files import require_sealed
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.bystander_in_process import as_root, bystander_served
from tests.support.wire import (
    MIB,
    OWNER_UID,
    SECONDS,
    SPACE,
    Client,
    Daemon,
    as_user,
    connected,
    eventually,
    poll,
    refused,
    running,
    script_running,
    sha256,
)

DATA = os.urandom(2 * MIB + 3)
SLOTS = 8
STRICT = {
    "deposit_idle_seconds": 0.5,
    "deposit_bytes_per_second": 1_000_000,
    "commit_seconds": 0.5,
    "stores_at_once": SLOTS,
}
"""Limits of a daemon that waits for nobody."""


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """A daemon with the limits it always has, and little patience with who stores."""
    with running(limits=STRICT) as made:
        yield made
        assert made.process.poll() is None, made.logged()
        assert "Traceback" not in made.logged()


@pytest.fixture
def daemon(shared: Daemon) -> Daemon:
    """The module's daemon, with nothing in it and nothing in progress."""
    with Client(shared.directory, session=False) as client:
        eventually(lambda: client.status().sessions == 0)
        eventually(lambda: client.status().store.reserved_bytes == 0)
        client.stub.Clear(pb.ClearRequest(), timeout=SECONDS)
    return shared


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """A client of that daemon."""
    with Client(daemon.directory) as connected_one:
        yield connected_one


def heard(process: "subprocess.Popen[str]") -> str:
    """Return the next line that a script prints."""
    assert process.stdout is not None
    assert poll([process.stdout.fileno()])
    return process.stdout.readline().strip()


# -- 31 and 35: handed out -------------------------------------------------------------------------

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2


def punch(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    if libc.fallocate(descriptor, mode, ctypes.c_long(0), ctypes.c_long(4096)):
        raise OSError(ctypes.get_errno(), "fallocate")


CHANGES: dict[str, Callable[[int], object]] = {
    "write": lambda descriptor: os.pwrite(descriptor, b"!", 0),
    "shorten": lambda descriptor: os.ftruncate(descriptor, 1),
    "lengthen": lambda descriptor: os.ftruncate(descriptor, len(DATA) + 1),
    "punch": punch,
    "allocate": lambda descriptor: os.posix_fallocate(descriptor, 0, 2 * len(DATA)),
    "map": lambda descriptor: mmap.mmap(descriptor, 0, prot=mmap.PROT_READ | mmap.PROT_WRITE),
    "seal": lambda descriptor: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", ["as handed out", "opened anew for writing"])
def test_31_nobody_can_change_a_handout(client: Client, change: str, mode: str) -> None:
    """EPERM by its seals, also through a descriptor opened anew for writing by root; where only
    the descriptor itself is for reading, EBADF, EINVAL or EACCES. Never success."""
    handout = client.lookup(client.store(DATA))
    require_sealed(handout, len(DATA))
    assert fcntl.fcntl(handout, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    with ExitStack() as stack:
        stack.callback(os.close, handout)
        used = handout
        if mode == "opened anew for writing":
            os.fchmod(handout, 0o600)
            used = os.open(f"/proc/self/fd/{handout}", os.O_RDWR)
            stack.callback(os.close, used)
            with pytest.raises(PermissionError):
                os.open(f"/proc/self/fd/{handout}", os.O_RDWR | os.O_TRUNC)
            with pytest.raises(PermissionError):
                CHANGES[change](used)
        else:
            with pytest.raises(OSError) as caught:  # noqa: PT011 - the kernel has a word for each
                CHANGES[change](used)
            assert caught.value.errno in (errno.EBADF, errno.EINVAL, errno.EACCES, errno.EPERM)
        assert os.pread(handout, len(DATA), 0) == DATA


# Two sessions of one ordinary user: one holds and reads on, the other holds and meddles, and then
# the first comes once more, and reads as xdelta3 does: by path.
_HOLDERS = """
import fcntl
from pathlib import Path
from tests.support.wire import Client
directory, digest, mode = Path(sys.argv[1]), sys.argv[2], int(sys.argv[4], 8)
become(int(sys.argv[3]))
def attempt(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        pass
client = Client(directory)
mine = client.lookup(bytes.fromhex(digest))
os.lseek(mine, 7, os.SEEK_SET)
flags, path = fcntl.fcntl(mine, fcntl.F_GETFL), f"/proc/self/fd/{mine}"
other = Client(directory)
theirs = other.lookup(bytes.fromhex(digest))
assert os.fstat(mine).st_ino == os.fstat(theirs).st_ino
os.lseek(theirs, 1000, os.SEEK_SET)
attempt(os.fchmod, theirs, mode)
attempt(os.fchown, theirs, 12345, 12345)
attempt(os.utime, theirs, (1, 1))
attempt(fcntl.fcntl, theirs, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
attempt(fcntl.fcntl, theirs, fcntl.F_SETOWN, os.getpid())
attempt(fcntl.fcntl, theirs, fcntl.F_SETLEASE, fcntl.F_RDLCK)
attempt(fcntl.flock, theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
attempt(fcntl.lockf, theirs, fcntl.LOCK_SH | fcntl.LOCK_NB)
assert os.lseek(mine, 0, os.SEEK_CUR) == 7
assert fcntl.fcntl(mine, fcntl.F_GETFL) == flags
again = client.lookup(bytes.fromhex(digest))
assert os.fstat(again).st_ino == os.fstat(mine).st_ino
for descriptor in (mine, again):
    by_path = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    for each in (descriptor, by_path):
        print(hashlib.sha256(os.pread(each, 1 << 24, 0)).hexdigest() == digest)
"""


@as_root
@pytest.mark.parametrize("mode", ["0000", "0400", "0777"])
def test_35_what_one_holder_does_no_other_notices(mode: str) -> None:
    """Seeks, flags, locks, leases, owner, mode, times: another holder reads on from where he was,
    and whoever comes next is served, by path as well. All of them are one ordinary user."""
    with running(uid=OWNER_UID) as daemon:
        digest = as_user(None, _STORE, daemon.directory, OWNER_UID)
        said = as_user(None, "import hashlib" + _HOLDERS, daemon.directory, digest, OWNER_UID, mode)
        assert said.split() == ["True"] * 4


_STORE = """
from pathlib import Path
from tests.support.wire import Client
become(int(sys.argv[2]))
with Client(Path(sys.argv[1])) as client:
    print(client.store(os.urandom(1 << 21)).hex())
"""


# -- 32 and 33: storing ----------------------------------------------------------------------------

_RACE = """
import mmap
size, kind = 1 << 21, sys.argv[1]
file = os.open(sys.argv[2], os.O_RDWR)
page = mmap.mmap(file, size)
pieces = [os.urandom(4096) for _ in range(61)]
print("racing", flush=True)
at = 0
while True:
    for piece in pieces:
        at = (at + 4096 * 37) % size
        page[at:at + 4096] = piece
"""


@pytest.mark.parametrize("way", ["spliced from a file", "spliced from memory"])
def test_32_what_is_stored_is_what_was_hashed(
    client: Client, short_directory: Path, way: str
) -> None:
    """Spliced pages are still the file's, or the process's own, while they lie in the pipe: another
    process changes them all the time, in 40 stores. Digest and bytes are of one and the same copy,
    whichever moment won."""
    size, seen = 2 * MIB, set()
    path = short_directory / "file"
    path.write_bytes(os.urandom(size))
    with (
        script_running(None, _RACE, way, path) as racer,
        path.open("r+b") as file,
        mmap.mmap(file.fileno(), size) as memory,
    ):
        assert heard(racer) == "racing"
        for _ in range(40):
            request_id, write_end = client.begin(size)
            if way == "spliced from a file":
                at = 0
                while at < size:
                    at += os.splice(file.fileno(), write_end, size - at, at)
            else:
                gift(memory, write_end, size)
            os.close(write_end)
            digest = client.commit(request_id)
            with os.fdopen(client.lookup(digest), "rb") as handout:
                assert sha256(handout.read()) == digest
            seen.add(digest)
        assert racer.poll() is None
    assert len(seen) > 20  # it was raced indeed


def gift(memory: mmap.mmap, write_end: int, size: int) -> None:
    """Put a mapping's own pages into a pipe (vmsplice(2))."""

    class Vector(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]

    libc = ctypes.CDLL(None, use_errno=True)
    anchor = ctypes.c_char.from_buffer(memory)
    try:
        at, address = 0, ctypes.addressof(anchor)
        while at < size:
            vector = Vector(address + at, size - at)
            moved = libc.vmsplice(write_end, ctypes.byref(vector), ctypes.c_ulong(1), 0)
            assert moved > 0, os.strerror(ctypes.get_errno())
            at += moved
    finally:
        del anchor


WRONG = {
    "nothing": (DATA, b"", b""),
    "less": (DATA, DATA[:-1], b""),
    "more": (DATA, DATA + b"!", b""),
    "much more": (DATA, DATA + bytes(8 * MIB), b""),
    "bytes for an empty reference": (b"", b"!", b""),
    "other bytes": (DATA, DATA[::-1], sha256(DATA)),
}


def nothing_is_kept(client: Client) -> bool:
    status = client.status()
    return (status.store.reserved_bytes, status.stores_in_progress) == (0, 0)


def pour(write_end: int, data: bytes) -> None:
    """Write all and close; a reader that gave up is no error here."""
    with suppress(BrokenPipeError), os.fdopen(write_end, "wb", buffering=0) as pipe:
        left = memoryview(data)
        while left:
            left = left[pipe.write(left) or 0 :]


def stores_are_admitted(client: Client, count: int = SLOTS) -> None:
    """Every slot is free: as many stores as there may be begin, and end well."""
    begun = [client.begin(1) for _ in range(count)]
    for request_id, write_end in begun:
        pour(write_end, b"x")
        client.commit(request_id)


@pytest.mark.parametrize("kind", WRONG)
def test_33_a_store_of_another_size_is_refused(client: Client, kind: str) -> None:
    """INVALID_ARGUMENT at the commit, nothing is kept, and room and slot are given back."""
    announced, sent, expected = WRONG[kind]
    request_id, write_end = client.begin(len(announced), expected)
    pour(write_end, sent)
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        client.commit(request_id)
    eventually(lambda: nothing_is_kept(client))
    assert client.status().store.entries == 0
    stores_are_admitted(client)


@pytest.mark.parametrize("kind", ["nothing", "a little", "a byte now and then"])
def test_33_who_writes_too_slowly_is_cut_off(daemon: Daemon, client: Client, kind: str) -> None:
    """In all slots but the bystander's, for longer than is waited for: room and slots come back
    without the writers' help, and the commit says why."""
    with bystander_served(daemon.directory):
        begun = [client.begin(MIB) for _ in range(SLOTS - 1)]
        for _, write_end in begun:
            if kind != "nothing":
                os.write(write_end, b"some")
        left, deadline = [write_end for _, write_end in begun], time.monotonic() + SECONDS
        while left:
            assert time.monotonic() < deadline
            poll([], 0.01)
            for write_end in list(left):
                if kind == "a byte now and then":
                    with suppress(BlockingIOError):
                        try:
                            os.write(write_end, b"x")
                        except BrokenPipeError:
                            left.remove(write_end)
                elif gave_up(write_end):
                    left.remove(write_end)
        for request_id, write_end in begun:
            os.close(write_end)
            with refused(grpc.StatusCode.UNAVAILABLE) as errors:
                client.commit(request_id)
            assert "too slow" in (errors[0].details() or "")
    eventually(lambda: nothing_is_kept(client))
    stores_are_admitted(client)


def gave_up(write_end: int) -> bool:
    """Tell whether a pipe has no reader any more."""
    poller = select.poll()
    poller.register(write_end, 0)
    return bool(poller.poll(0))


def test_33_a_pipe_that_was_passed_on_does_not_outlive_the_session() -> None:
    """Another process holds the write end; the session's end takes its room away all the same."""
    with running() as daemon, Client(daemon.directory) as client:
        _, write_end = client.begin(MIB)
        script = f"""
heir = os.open("/proc/{os.getpid()}/fd/{write_end}", os.O_WRONLY)
print(1, flush=True)
sys.stdin.read()
try:
    os.write(heir, b"x")
except BrokenPipeError:
    print("broken")
"""
        with script_running(None, script) as process:
            assert heard(process) == "1"
            os.close(write_end)
            assert client.status().stores_in_progress == 1
            assert client.session is not None
            client.session.shutdown(socket.SHUT_RDWR)
            eventually(lambda: nothing_is_kept(client), 5)
            assert process.communicate(timeout=SECONDS)[0] == "broken\n"


def test_33_a_pipe_that_was_passed_on_ends_at_the_deadline(client: Client) -> None:
    """Another process holds the write end and its session lives on: the slot comes back."""
    request_id, write_end = client.begin(MIB)
    script = f"os.open('/proc/{os.getpid()}/fd/{write_end}', os.O_WRONLY)\n"
    with script_running(None, script + "print(1, flush=True)\nsys.stdin.read()") as heir:
        assert heard(heir) == "1"
        os.close(write_end)
        eventually(lambda: nothing_is_kept(client))
        with refused(grpc.StatusCode.UNAVAILABLE):
            client.commit(request_id)
        stores_are_admitted(client)
        assert heir.poll() is None


# -- 34: sent in -----------------------------------------------------------------------------------

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What an HTTP/2 client says first."""

# A file system of one file, on which close(2) never returns: its server, a child, does not answer
# FUSE_FLUSH. It is mounted in a namespace of its own; the file goes to the daemon from there. The
# server's end, with its parent's at the latest, lets whoever hangs go on.
_FUSE = """
import array, ctypes, signal, struct, threading
libc = ctypes.CDLL(None, use_errno=True)
def checked(result):
    if result:
        print("no FUSE:", os.strerror(ctypes.get_errno()), flush=True)
        os._exit(0)
try:
    fuse = os.open("/dev/fuse", os.O_RDWR)
except OSError as error:
    print("no FUSE:", error.strerror, flush=True)
    os._exit(0)
checked(libc.unshare(0x20000))
checked(libc.mount(b"none", b"/", None, ctypes.c_ulong(0x44000), None))
place = sys.argv[1].encode()
options = b"fd=%d,rootmode=100600,user_id=0,group_id=0" % fuse
checked(libc.mount(b"hangs", place, b"fuse", ctypes.c_ulong(0), options))
INIT, GETATTR, OPEN, FLUSH = 26, 3, 14, 25
asked, ask = os.pipe()
server = os.fork()
if not server:
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)
    times, mode = [0] * 3, 0o100600
    attributes = struct.pack("=6Q10I", 1, 4096, 8, *times, *times, mode, 1, 0, 0, 0, 4096, 0)
    answers = {
        INIT: struct.pack("=4I2H3I32x", 7, 31, 1 << 16, 0, 1, 1, 4096, 1, 0),
        GETATTR: struct.pack("=QII", 1, 0, 0) + attributes,
        OPEN: struct.pack("=QII", 7, 0, 0),
    }
    while True:
        _, opcode, unique = struct.unpack_from("=IIQ", os.read(fuse, 1 << 17))
        if opcode == FLUSH:
            os.write(ask, b"f")
        answer = answers.get(opcode)
        if answer is not None:
            os.write(fuse, struct.pack("=IiQ", 16 + len(answer), 0, unique) + answer)
os.close(fuse)
hanging = os.open(place, os.O_RDWR)
kind = socket.SOCK_SEQPACKET if sys.argv[3] == "1" else socket.SOCK_STREAM
connection = socket.socket(socket.AF_UNIX, kind)
connection.connect(sys.argv[2])
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [hanging]))]
try:
    connection.sendmsg([bytes.fromhex(sys.argv[4])], rights)
    print("sent", flush=True)
except PermissionError:
    print("refused", flush=True)
sys.stdin.readline()
closing = threading.Thread(target=os.close, args=[hanging], daemon=True)
closing.start()
os.read(asked, 1)
print("its close hangs" if closing.is_alive() else "it closed", flush=True)
sys.stdin.readline()
os.kill(server, signal.SIGKILL)
os.waitpid(server, 0)
closing.join(20)
print("released", flush=True)
os._exit(0)
"""


def wrong_descriptors(kind: str, stack: ExitStack, directory: Path) -> list[int]:
    """Open what a daemon should never hold."""

    def opened(descriptor: int) -> int:
        stack.callback(os.close, descriptor)
        return descriptor

    if kind == "a FIFO":
        os.mkfifo(directory / "fifo")
        return [opened(os.open(directory / "fifo", os.O_RDWR))]
    if kind == "/dev/zero":
        return [opened(os.open("/dev/zero", os.O_RDWR))]
    if kind == "a path":
        return [opened(os.open("/", os.O_PATH))]
    if kind == "a socket":
        return [end.fileno() for end in map(stack.enter_context, socket.socketpair())]
    null = opened(os.open("/dev/null", os.O_RDONLY))
    return [opened(os.dup(null)) for _ in range(250)]


SOCKETS = ["session.sock", "rpc.sock", "inner/inner.sock"]


PASS_NOTHING = {"session.sock", "rpc.sock"}
"""Which the daemon itself made, where the kernel knows SO_PASSRIGHTS."""


def can_pass_nothing(sender: socket.socket) -> bool:
    """Tell whether the kernel knows SO_PASSRIGHTS (Linux 6.16)."""
    with suppress(OSError):
        return bool(sender.getsockopt(socket.SOL_SOCKET, 83))
    return False


def kind_of(name: str) -> socket.SocketKind:
    return socket.SOCK_SEQPACKET if name == "session.sock" else socket.SOCK_STREAM


@contextmanager
def descriptors_unchanged(daemon: Daemon, client: Client) -> Iterator[None]:
    """Check that there are no more afterwards than before."""

    def settled() -> bool:
        """What an earlier test let go of is closed in the loop's next turn, not in the same."""
        first = daemon.descriptors()
        client.status()
        return daemon.descriptors() == first

    eventually(settled)
    before = daemon.descriptors()
    yield
    eventually(lambda: daemon.descriptors() <= before)


@as_root
@pytest.mark.parametrize("name", SOCKETS)
@pytest.mark.parametrize("kind", ["a FIFO", "/dev/zero", "a path", "a socket", "250 at once"])
def test_34_descriptors_sent_to_the_daemon_do_not_arrive(
    client: Client, daemon: Daemon, short_directory: Path, name: str, kind: str
) -> None:
    """Closing somebody's descriptor can block for ever: the sender is refused, where the kernel can
    do so for our sockets, or it drops them. The daemon has not one descriptor more than the
    connection itself needs."""
    with descriptors_unchanged(daemon, client), ExitStack() as stack:
        before = daemon.descriptors()
        descriptors = array("i", wrong_descriptors(kind, stack, short_directory))
        sender = stack.enter_context(connected(str(daemon.directory / name), kind_of(name)))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
        try:
            sender.sendmsg([PREFACE], rights)
        except PermissionError:
            assert name in PASS_NOTHING
        else:
            assert name not in PASS_NOTHING or not can_pass_nothing(sender)
        assert client.store(b"meanwhile")
        own = 1 if name == "session.sock" else 3  # a relay has two ends, and gRPC's own
        assert daemon.descriptors() <= before + own


@as_root
@pytest.mark.parametrize("name", SOCKETS)
def test_34_a_file_whose_close_hangs_does_not_stop_the_daemon(
    client: Client, daemon: Daemon, short_directory: Path, name: str
) -> None:
    """A FUSE file whose server never answers: whoever closes it waits, as the sender does."""
    place = short_directory / "hangs"
    place.touch()
    arguments = (place, daemon.directory / name, int(name == "session.sock"), PREFACE.hex())
    with (
        descriptors_unchanged(daemon, client),
        bystander_served(daemon.directory),
        script_running(None, _FUSE, *arguments) as sender,
    ):
        said = heard(sender)
        if said.startswith("no FUSE"):
            pytest.skip(f"needs /dev/fuse and the right to mount: {said}")
        assert said in ("sent", "refused")
        assert client.store(b"meanwhile")
        assert sender.stdin is not None
        print(file=sender.stdin, flush=True)
        assert heard(sender) == "its close hangs"
        assert client.store(b"and now")
        print(file=sender.stdin, flush=True)
        assert heard(sender) == "released"


# -- 36 and 37: too many ---------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@as_root
@pytest.mark.parametrize("name", ["session.sock", "rpc.sock"])
def test_36_without_descriptors_accept_pauses_and_recovers(name: str) -> None:
    """Clients wait at the door for three seconds while no descriptor is left: the daemon uses next
    to no processor time, calls of those inside are answered, and the first new one is served when
    there is room again."""
    with (
        running(prefix=("prlimit", "--nofile=100")) as daemon,
        Client(daemon.directory) as client,
    ):
        digest = client.store(DATA)
        with ExitStack() as stack:
            path = str(daemon.directory / "session.sock")
            while daemon.descriptors() < 100:
                stack.enter_context(connected(path, socket.SOCK_SEQPACKET)).recv(4096)
            for _ in range(20):
                waiting = socket.socket(socket.AF_UNIX, kind_of(name))
                stack.enter_context(waiting).connect(str(daemon.directory / name))
            eventually(lambda: "accept-failed" in daemon.logged())
            before = cpu_seconds(daemon.pid)
            begun = time.monotonic()
            while time.monotonic() < begun + 3:
                assert client.status().store.entries == 1
                poll([], 0.1)
            assert cpu_seconds(daemon.pid) - before < 0.6
        eventually(lambda: client.status().sessions == 1)
        with Client(daemon.directory) as newcomer:
            os.close(newcomer.lookup(digest))
            assert newcomer.store(b"afterwards")
        assert daemon.logged().count("\n") < 60


def unread(client: Client, digest: bytes, most: int) -> int:
    """Look up without reading, and return how many were sent until the daemon refused."""
    for number in range(most):
        request = pb.LookupRequest(request_id=1000 + number, deltaspace=SPACE, sha256=digest)
        try:
            client.call("Lookup", request)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017 - it counts
            return number
    return most


def test_37_descriptors_nobody_reads_are_bounded(client: Client, daemon: Daemon) -> None:
    """A client that never reads its session stops itself and no bystander, and recovers."""
    digest = client.store(b"unread")
    with Client(daemon.directory) as lazy:
        sent = unread(lazy, digest, 100)
        assert 4 <= sent <= 32
        assert unread(lazy, digest, 1) == 0
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            lazy.call("BeginStore", pb.BeginStoreRequest(request_id=1, deltaspace=SPACE, size=MIB))
        assert client.status().store.reserved_bytes == 0
        for _ in range(50):
            os.close(client.lookup(digest))
        for _ in range(sent):
            os.close(lazy.receive()[1])
        os.close(lazy.lookup(digest))


# A hundred clients of one ordinary user, none of which ever reads; then a bystander.
_CROWD = """
from pathlib import Path
import contextlib
from tests.support.bystander_in_process import bystander_served
from tests.support.wire import Client, eventually
from tests.security.test_descriptors import unread
directory = Path(sys.argv[1])
become(int(sys.argv[2]))
with contextlib.ExitStack() as stack:
    first = stack.enter_context(Client(directory))
    digest = first.store(b"unread by all")
    with bystander_served(directory):
        crowd = [stack.enter_context(Client(directory)) for _ in range(100)]
        sent = sum(unread(lazy, digest, 40) for lazy in crowd)
        for _ in range(20):
            os.close(first.lookup(digest))
    print(sent)
with Client(directory) as client:
    eventually(lambda: client.status().store.handout_bytes == 0)
    eventually(lambda: client.status().sessions == 1)
"""


@as_root
@pytest.mark.parametrize("prefix", [("prlimit", "--nofile=1024"), ()], ids=["1024", "as it is"])
def test_37_a_hundred_clients_that_never_read_stop_nobody(prefix: tuple[str, ...]) -> None:
    """The kernel bounds descriptors in flight over all sockets of an ordinary user by its limit of
    open files (unix(7), ETOOMANYREFS): those unread stay below it, a bystander is served all the
    same, and with the clients all of it goes."""
    with running(uid=OWNER_UID, prefix=prefix) as daemon:
        sent = int(as_user(None, _CROWD, daemon.directory, OWNER_UID))
        assert 100 <= sent < (900 if prefix else 2000)
        assert daemon.process.poll() is None
        assert "Traceback" not in daemon.logged()


# -- 37a and 37b: held -----------------------------------------------------------------------------


def test_37a_an_open_that_meets_a_lease_probe_does_no_harm(client: Client, daemon: Daemon) -> None:
    """An open() that meets the daemon's lease makes the kernel signal it: it lives on.

    Only O_PATH leads to a file without counting as a holder, so that the lease can be met.
    """
    digest = client.store(b"probed")
    place = os.open("/", os.O_PATH)
    script = f"""
path = '/proc/{os.getpid()}/fd/{place}'
print(1, flush=True)
while True:
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError:
        pass
"""
    with script_running(None, script) as hammer:
        assert heard(hammer) == "1"
        for _ in range(300):
            descriptor = client.lookup(digest)
            seen = os.open(f"/proc/self/fd/{descriptor}", os.O_PATH)
            os.dup2(seen, place, inheritable=False)
            os.close(seen)
            os.close(descriptor)
            eventually(lambda: client.status().store.handouts == 0 or daemon.process.poll())
            assert daemon.process.poll() is None
    os.close(place)
    assert daemon.process.poll() is None


def test_37b_what_only_a_path_holds_is_accounted(client: Client, daemon: Daemon) -> None:
    """O_PATH keeps the pages of a handout without holding it. They are counted in status and
    against the budget: who collects them is refused, not served without a bound; when they are let
    go they are gone."""
    paths: list[int] = []
    digest = client.store(DATA)
    try:
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            for _ in range(64):
                descriptor = client.lookup(digest)
                paths.append(os.open(f"/proc/self/fd/{descriptor}", os.O_PATH))
                os.close(descriptor)
                eventually(lambda: client.status().store.handouts == 0)
                assert client.status().store.handout_bytes >= len(paths) * len(DATA)
        status = client.status().store
        assert status.handout_bytes + status.blob_bytes <= status.max_bytes
        assert len(paths) >= 20
    finally:
        for path in paths:
            os.close(path)
    eventually(lambda: client.status().store.handout_bytes == 0)
    os.close(client.lookup(digest))
