"""Cases 53 and 54: what a killed process leaves on a disk, and what a forked one has of its parent.

References are recognisable: every block of one begins with 64 bytes that are of this run alone.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

import dgcache
from dgcache import Settings
from tests.core.support import run_python
from tests.soak.measures import leftovers
from tests.soak.truth import Truth
from tests.support.disk_daemon import Home
from tests.support.wire import SECONDS, Client, Daemon, eventually, own_environment, running

# Gets to a phase, says so, and goes on when its standard input ends. It makes its reference itself:
# a file of ours must not be what is found.
_USER = """\
import hashlib, io, select, sys
import dgcache
from tests.soak.truth import Truth
phase, truth = sys.argv[1], Truth(int(sys.argv[2]))
data = next(d for d in map(truth.data, range(99)) if 300_000 < len(d) < 950_000)
digest = hashlib.sha256(data).hexdigest()
def here():
    print("here", cache.backend, flush=True)
class Halting(io.BytesIO):
    def read(self, size=-1, /):
        if self.tell() == len(data) // 2:
            here()
            sys.stdin.read()
        left = len(data) // 2 - self.tell()
        return super().read(min(size, left) if left > 0 and size >= 0 else size)
def fetch():
    here()
    sys.stdin.read()
    return data
with dgcache.open() as cache:
    if phase == "store":
        cache.put("bucket", "prefix", Halting(data), digest)
    elif phase == "fetch":
        cache.get_or_fetch("bucket", "prefix", digest, fetch).close()
    else:
        cache.put("bucket", "prefix", data)
        with cache.get("bucket", "prefix", digest) as held:
            assert held.read() == data
            here()
            while phase == "lookup" and not select.select([sys.stdin], [], [], 0)[0]:
                cache.get_or_fetch("bucket", "prefix", digest, lambda: data).close()
            sys.stdin.read()
            assert held.read() == data
"""
_ROOT = Path(__file__).parents[2]
_PHASES = ("store", "lookup", "handout held", "fetch")
_VICTIMS = ("client, dg-cached", "daemon, dg-cached", "client, memory", "client, filesystem")


class Surroundings:
    """All places that a process of ours may write to, and what is searched for in them."""

    def __init__(self, base: Path) -> None:
        self.base, self.since = base, time.time()
        self.truth = Truth(random.SystemRandom().getrandbits(60))
        self.home = Home(base)
        for name in ("home", "tmp", "run"):
            (base / name).mkdir(0o700)
        self.environ = {
            "HOME": str(base / "home"),
            "TMPDIR": str(base / "tmp"),
            "XDG_RUNTIME_DIR": str(base / "run"),
        }

    def plaintext(self) -> list[str]:
        """Search them, and what has changed in the public ones."""
        return leftovers(self.truth, [self.base], self.since)[0]


@pytest.fixture
def places(short_directory: Path) -> Surroundings:
    return Surroundings(short_directory)


@contextmanager
def user(places: Surroundings, phase: str, backend: str) -> "Iterator[subprocess.Popen[str]]":
    """Start a user and wait until it is in its phase."""
    process = subprocess.Popen(
        [sys.executable, "-c", _USER, phase, str(places.truth.seed)],
        cwd=_ROOT,
        env={
            **own_environment(),
            **places.environ,
            "DG_CACHE_SOCKET_DIR": str(places.home.sockets),
            "DG_CACHE_DIR": str(places.home.cache),
            "DG_CACHE_BACKEND": backend,
            "DG_CACHE_CONNECT_TIMEOUT_MS": "5000",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().split() == ["here", backend]
        yield process
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)


def test_53_the_search_finds_a_reference_that_is_there(places: Surroundings) -> None:
    """In a place of ours; a search that finds nothing anywhere would prove nothing."""
    assert places.plaintext() == []
    (places.base / "tmp" / "copy").write_bytes(b"before" + places.truth.data(9)[-70_000:])
    assert len(places.plaintext()) == 1


@pytest.mark.parametrize("victim", _VICTIMS)
@pytest.mark.parametrize("phase", _PHASES)
def test_53_no_plaintext_is_on_a_disk_after_sigkill(
    places: Surroundings, phase: str, victim: str
) -> None:
    """While the process is in the phase, and after it or its daemon was killed there."""
    who, backend = victim.split(", ")
    with places.home.daemon(memory_mb=16, environ=places.environ) as daemon:
        with user(places, phase, backend) as process:
            assert places.plaintext() == []
            if who == "daemon":
                daemon.stop(signal.SIGKILL)
                process.communicate("", timeout=SECONDS)  # what it fell back to, as well
                assert process.returncode == 0
            else:
                process.kill()
                process.wait(SECONDS)
        assert places.plaintext() == []
        daemon.process.kill()
        daemon.process.wait(SECONDS)
    assert places.plaintext() == []


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("files", [1, 3, 8])
def test_53_no_plaintext_is_on_a_disk_after_sigkill_in_a_write_of_the_disk_tier(
    places: Surroundings, files: int, persistent: bool
) -> None:
    """Killed while references spill; the tier has them by then, and the next life reads them."""
    references = [places.truth.data(number)[:100_000] for number in range(30)]
    references = [one + bytes((number,)) for number, one in enumerate(references)]

    def spill(client: Client) -> None:
        with suppress(grpc.RpcError, OSError):
            for data in references:
                client.store(data)

    for life in range(2):
        with (
            places.home.daemon(persistent=persistent, environ=places.environ) as daemon,
            Client(daemon.directory) as client,
        ):
            storing = threading.Thread(target=spill, args=(client,))
            storing.start()
            eventually(lambda: len(places.home.files()) >= files)
            daemon.stop(signal.SIGKILL)
            storing.join(SECONDS)
            assert not storing.is_alive()
        assert len(places.home.files()) >= files, life
        assert places.plaintext() == []


# -- 54 --------------------------------------------------------------------------------------------

_FORKING = """
import ctypes, json, os
from dgcache_core.keyslab import KeySlab
slab = KeySlab(4, may_fork=True)
slots = [slab.new_key() for _ in range(3)]
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.write(writer, ctypes.string_at(slab._address, slab._bytes))
    os._exit(0)
os.close(writer)
page = b""
while piece := os.read(reader, 65536):
    page += piece
status = os.waitpid(child, 0)[1]
print(json.dumps({
    "status": status,
    "length": len(page),
    "child": any(page),
    "parent": [any(slot.view) for slot in slots],
}))
"""


def test_54_a_forked_child_finds_zeros_where_the_keys_were() -> None:
    """After a real fork the child's page is zero from end to end; the parent's keys live on."""
    seen = json.loads(run_python(_FORKING))
    assert seen == {"status": 0, "length": 4096, "child": False, "parent": [True] * 3}


def in_the_child(cache: "dgcache.ReferenceCache", data: bytes) -> bool:
    """Tell whether a whole operation succeeds there, in the child's own process."""
    digest = hashlib.sha256(data).hexdigest()
    with cache.get_or_fetch("bucket", "prefix", digest, lambda: data) as reference:
        return reference.read() == data and cache.backend == "memory"


def test_54_a_forked_child_has_a_life_of_its_own(daemon: Settings) -> None:
    """grpc cannot be used after fork: the child falls back, the parent goes on as it was."""
    data = os.urandom(1 << 20)
    with dgcache.open(daemon) as cache:
        digest = cache.put("bucket", "prefix", data)
        held = cache.get("bucket", "prefix", digest)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                assert held.read() == data
                assert in_the_child(cache, data)
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        held.close()
        with cache.get("bucket", "prefix", digest) as reference:
            assert (reference.source, reference.read()) == ("dg-cached", data)


_PARENT = """
import os, signal, sys
import dgcache
cache = dgcache.open()
cache.put("bucket", "prefix", b"bytes")
assert cache.backend == "dg-cached"
child = os.fork()
if child == 0:
    signal.alarm(60)
    print(os.getpid(), flush=True)
    signal.pause()
sys.stdin.read()
"""


def sessions(daemon: Daemon) -> int:
    with Client(daemon.directory, session=False) as client:
        return client.status().sessions


def test_54_a_session_ends_with_its_process_though_a_child_lives() -> None:
    """The child has closed its copy of the socket: nothing of the session is in its hands."""
    with (
        running() as daemon,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _PARENT],
            env={
                **own_environment(),
                "DG_CACHE_SOCKET_DIR": str(daemon.directory),
                "DG_CACHE_CONNECT_TIMEOUT_MS": "5000",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as parent,
    ):
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        try:
            assert sessions(daemon) == 1
            parent.kill()
            eventually(lambda: sessions(daemon) == 0)
            signal.pidfd_send_signal(child, 0)  # it lives
        finally:
            signal.pidfd_send_signal(child, signal.SIGKILL)
            os.close(child)
