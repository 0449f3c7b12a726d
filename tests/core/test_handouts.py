"""A handout is shared while anybody holds it and closed when nobody does: the kernel is asked."""

import ctypes
import fcntl
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dgcache_core.handouts import Handout, Handouts, _is_open_elsewhere
from dgcache_core.sealed_files import create_memory_file, require_sealed, seal, write_at
from tests.support.refused_syscalls import REFUSE

from .support import content, digest_of, read_all, run_python

DATA = content(5000)
DIGEST = digest_of(DATA)
PAGES = 8192


def sealed_file(data: bytes) -> int:
    """Return a sealed file as a store makes it."""
    descriptor = create_memory_file()
    write_at(descriptor, memoryview(data), 0)
    seal(descriptor)
    return descriptor


@pytest.fixture
def handouts() -> Iterator[Handouts]:
    """A table that is closed when the test ends."""
    table = Handouts()
    assert table.can_share
    yield table
    table.close()


@pytest.fixture
def first(handouts: Handouts) -> Handout:
    """The first handout of DATA. Each test closes it."""
    return handouts.add(DIGEST, sealed_file(DATA), len(DATA))


def assert_held(handouts: Handouts) -> None:
    """Assert that a sweep leaves the handout, and that it can be shared."""
    assert handouts.sweep() == 0
    assert handouts.is_held(DIGEST)
    assert handouts.held_bytes == PAGES
    shared = handouts.open_shared(DIGEST)
    assert shared is not None
    assert read_all(shared) == DATA
    os.close(shared.fd)


def assert_unheld(handouts: Handouts) -> None:
    """Assert that a sweep closes the handout and gives its bytes back."""
    assert handouts.sweep() == PAGES
    assert not handouts.is_held(DIGEST)
    assert len(handouts) == handouts.held_bytes == 0
    assert handouts.open_shared(DIGEST) is None


def test_a_handout_is_the_sealed_plaintext(handouts: Handouts, first: Handout) -> None:
    """It names its digest and size, and nobody can change it."""
    assert first == Handout(first.fd, len(DATA), DIGEST)
    require_sealed(first.fd, len(DATA))
    assert read_all(first) == DATA
    os.close(first.fd)


def test_what_nobody_was_given_is_not_shared(handouts: Handouts) -> None:
    """A digest that is not in the table has no handout."""
    assert handouts.open_shared(DIGEST) is None
    assert handouts.sweep() == 0


def test_a_held_descriptor_keeps_a_handout(handouts: Handouts, first: Handout) -> None:
    """While it is open it is shared; closed, the next sweep closes ours."""
    assert_held(handouts)
    os.close(first.fd)
    assert_unheld(handouts)


def test_any_of_many_holders_keeps_a_handout(handouts: Handouts, first: Handout) -> None:
    """Ten holders, who leave one by one: the last one's leaving ends it."""
    others = [handouts.open_shared(DIGEST) for _ in range(9)]
    for handout in (first, *others):
        assert_held(handouts)
        assert handout is not None
        os.close(handout.fd)
    assert_unheld(handouts)


def test_each_holder_has_an_offset_of_its_own(handouts: Handouts, first: Handout) -> None:
    """One client's reading does not move another's."""
    other = handouts.open_shared(DIGEST)
    assert other is not None
    assert os.read(first.fd, 100) == DATA[:100]
    assert os.read(other.fd, 100) == DATA[:100]
    os.close(first.fd)
    os.close(other.fd)


def test_a_mapping_alone_keeps_a_handout(handouts: Handouts, first: Handout) -> None:
    """The store's own process may be the holder, as the in-process cache is."""
    address = map_shared(first.fd)
    os.close(first.fd)
    assert_held(handouts)
    assert ctypes.string_at(address, len(DATA)) == DATA
    libc().munmap(ctypes.c_void_p(address), ctypes.c_size_t(len(DATA)))
    assert_unheld(handouts)


def libc() -> ctypes.CDLL:
    """The C library, with an mmap that returns addresses."""
    library = ctypes.CDLL(None)
    library.mmap.restype = ctypes.c_void_p
    return library


def map_shared(descriptor: int) -> int:
    """Map for reading, as C does: Python's mmap would keep a descriptor of its own."""
    length, offset = ctypes.c_size_t(len(DATA)), ctypes.c_long(0)
    return int(libc().mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset))


HOLDER = """
import ctypes, os, sys
path, how = sys.argv[1:]
descriptor = os.open(path, os.O_RDONLY)
if how == "mapped":
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(5000), 1, 1, descriptor, ctypes.c_long(0))
    assert ctypes.string_at(address, 5000)
    os.close(descriptor)
print("holding", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding_child(handout: Handout, how: str) -> Iterator[subprocess.Popen[str]]:
    """A real child that opened the handout through this process, and holds it until it ends."""
    path = f"/proc/{os.getpid()}/fd/{handout.fd}"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "holding\n"
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("how", ["opened", "mapped"])
def test_a_child_of_a_client_keeps_a_handout_until_it_ends(
    handouts: Handouts, first: Handout, how: str
) -> None:
    """As xdelta3 does: opened through /proc, or mapped with the descriptor closed again."""
    with holding_child(first, how) as child:
        os.close(first.fd)
        assert_held(handouts)
        child.communicate()
        assert child.returncode == 0
        assert_unheld(handouts)


@pytest.mark.parametrize("how", ["opened", "mapped"])
def test_a_killed_child_holds_nothing(handouts: Handouts, first: Handout, how: str) -> None:
    """After SIGKILL nobody has cleaned up but the kernel, and that is enough."""
    with holding_child(first, how) as child:
        os.close(first.fd)
        assert_held(handouts)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert_unheld(handouts)


def test_a_descriptor_in_flight_keeps_a_handout(handouts: Handouts, first: Handout) -> None:
    """Sent and not yet received, it is in a socket's queue and nowhere else."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(ours, [b"reference"], [first.fd])
        os.close(first.fd)
        assert_held(handouts)
        _, received, _, _ = socket.recv_fds(theirs, 16, 1)
        assert os.pread(received[0], 10, 0) == DATA[:10]
        assert_held(handouts)
        os.close(received[0])
    assert_unheld(handouts)


def test_a_descriptor_that_is_never_received_ends_with_its_socket(
    handouts: Handouts, first: Handout
) -> None:
    """A client that dies before it reads leaves nothing behind."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    socket.send_fds(ours, [b"reference"], [first.fd])
    os.close(first.fd)
    theirs.close()
    ours.close()
    assert_unheld(handouts)


def test_a_sweep_closes_only_what_is_not_held(handouts: Handouts, first: Handout) -> None:
    """Of five handouts those of the two that were closed go."""
    more = {
        digest_of(bytes([n])): handouts.add(digest_of(bytes([n])), sealed_file(bytes([n])), 1)
        for n in range(4)
    }
    gone = list(more)[::2]
    for digest in gone:
        os.close(more.pop(digest).fd)
    assert handouts.sweep() == 2 * 4096
    assert [handouts.is_held(digest) for digest in gone] == [False, False]
    assert len(handouts) == 3
    for handout in (first, *more.values()):
        os.close(handout.fd)


def test_the_writable_descriptor_is_closed(handouts: Handouts) -> None:
    """A store gives its descriptor away: afterwards only read-only ones are left."""
    descriptor = sealed_file(DATA)
    handout = handouts.add(DIGEST, descriptor, len(DATA))
    assert os.close(handout.fd) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_the_probe_leaves_no_lease(handouts: Handouts, first: Handout) -> None:
    """Whoever opens the file afterwards would wait for as long as a lease stands."""
    [kept] = [shared.fd for shared in handouts._shared.values()]
    assert _is_open_elsewhere(kept)
    assert fcntl.fcntl(kept, fcntl.F_GETLEASE) == fcntl.F_UNLCK
    os.close(first.fd)
    assert not _is_open_elsewhere(kept)
    assert fcntl.fcntl(kept, fcntl.F_GETLEASE) == fcntl.F_UNLCK


def test_closing_the_table_leaves_holders_what_they_hold(
    handouts: Handouts, first: Handout
) -> None:
    """Only our own descriptors go."""
    handouts.close()
    assert len(handouts) == handouts.held_bytes == 0
    assert read_all(first) == DATA
    os.close(first.fd)


def test_an_empty_reference_is_shared_and_closed_as_any_other(handouts: Handouts) -> None:
    """It takes no page, and is in the table while it is held."""
    empty = digest_of(b"")
    handout = handouts.add(empty, sealed_file(b""), 0)
    handouts.sweep()
    assert handouts.is_held(empty)
    os.close(handout.fd)
    handouts.sweep()
    assert not handouts.is_held(empty)


def test_where_the_probe_fails_nothing_is_shared_and_nothing_kept(handouts: Handouts) -> None:
    """On such a kernel every client has a file of its own, which ends with it."""
    handouts.can_share = False
    handout = handouts.add(DIGEST, sealed_file(DATA), len(DATA))
    assert (len(handouts), handouts.held_bytes) == (0, 0)
    assert handouts.open_shared(DIGEST) is None
    assert read_all(handout) == DATA
    os.close(handout.fd)


WITHOUT_DESCRIPTORS = """
import os, resource, sys
from dgcache_core.errors import CacheFullError
from dgcache_core.handouts import Handouts
from dgcache_core.sealed_files import create_memory_file, seal
table = Handouts()
descriptor = create_memory_file()
seal(descriptor)
used = len(os.listdir("/proc/self/fd")) - 1
resource.setrlimit(resource.RLIMIT_NOFILE, (used + int(sys.argv[1]), 4096))
try:
    table.add("0" * 64, descriptor, 0)
    print("handed out,", end=" ")
except CacheFullError:
    print("full,", end=" ")
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
print(len(table), "shared,", len(os.listdir("/proc/self/fd")) - 1 - used, "more open")
"""


@pytest.mark.parametrize(
    ("spare", "says"),
    [
        ("0", "full, 0 shared, -1 more open"),
        ("1", "handed out, 0 shared, 0 more open"),
        ("2", "handed out, 1 shared, 1 more open"),
    ],
)
def test_without_descriptors_a_handout_is_refused_or_not_shared_and_none_leaks(
    spare: str, says: str
) -> None:
    """At the limit of open files: refused, and the file closed; with one to spare: not shared."""
    assert run_python(WITHOUT_DESCRIPTORS, spare) == says


REFUSED = (
    REFUSE
    + """
import errno, fcntl, signal
from dgcache_core.handouts import Handouts
from dgcache_core.sealed_files import create_memory_file, seal
table = Handouts()
for number in range(3):
    descriptor = create_memory_file()
    seal(descriptor)
    handout = table.add(str(number) * 64, descriptor, 1)
    if number != 1:
        os.close(handout.fd)  # so only the second is held
refuse_fcntl(getattr(fcntl, sys.argv[1]), int(sys.argv[2]), errno.ENOMEM)
before = table.held_bytes
table.sweep()
print(len(table), "shared,", table.refusal or "nothing", "refused,", end=" ")
shared = table.open_shared("1" * 64)  # would wait for a lease that nobody gave back
print("the held one is served" if shared is not None else "lost")
"""
)


@pytest.mark.parametrize(
    ("command", "argument", "says"),
    [
        ("F_SETSIG", signal.SIGURG, "3 shared, Cannot allocate memory refused,"),
        ("F_SETLEASE", fcntl.F_WRLCK, "3 shared, Cannot allocate memory refused,"),
        ("F_SETLEASE", fcntl.F_UNLCK, "1 shared, nothing refused,"),
    ],
)
def test_what_the_kernel_does_not_tell_counts_as_held_and_the_sweep_goes_on(
    command: str, argument: int, says: str
) -> None:
    """A lease that could not be given back goes with its descriptor: nobody waits for it."""
    assert run_python(REFUSED, command, str(int(argument))) == f"{says} the held one is served"


HAMMER = """
import os, signal, subprocess, sys
from dgcache_core.handouts import Handouts, _is_open_elsewhere
from dgcache_core.sealed_files import create_memory_file, seal
opener = "import os, sys\\nwhile True: os.close(os.open(sys.argv[1], os.O_RDONLY))"
table = Handouts()
descriptor = create_memory_file()
seal(descriptor)
os.close(table.add("0" * 64, descriptor, 0).fd)
[kept] = [shared.fd for shared in table._shared.values()]
met = []
if sys.argv[1] == "until they met 20 times":
    signal.signal(signal.SIGURG, lambda *_: met.append(1))
child = subprocess.Popen([sys.executable, "-c", opener, f"/proc/{os.getpid()}/fd/{kept}"])
for probes in range(10_000_000):
    _is_open_elsewhere(kept)
    if len(met) == 20 or (probes == 100_000 and sys.argv[1] == "100,000 times"):
        break
child.kill()
child.wait()
print(child.returncode, _is_open_elsewhere(kept))
"""


@pytest.mark.parametrize("how_long", ["until they met 20 times", "100,000 times"])
def test_an_open_that_meets_the_probe_does_not_kill_the_process(how_long: str) -> None:
    """Open and probe do meet; the signal is SIGURG each time, and ignored by default."""
    assert run_python(HAMMER, how_long) == f"{-signal.SIGKILL} False"
