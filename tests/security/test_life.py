"""Cases 61 to 66: daemons and clients that end, die, stop, or are of another version.

Every one is a process; the operation of whoever is left succeeds, and in time.
"""

import hashlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

import dgcache
from dgcache import Settings
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.crowd import Crowd, crowd, fetches, first_fetcher
from tests.support.wire import (
    MIB,
    SECONDS,
    SPACE,
    Client,
    Daemon,
    ended_well,
    eventually,
    own_environment,
    poll,
    running,
)

DATA = secrets.token_bytes(4096)
DIGEST = hashlib.sha256(DATA).hexdigest()
IN_TIME = 8.0
"""Two seconds to drain, one to flush, and the host's own slowness."""


@pytest.fixture
def own() -> Iterator[Daemon]:
    """A daemon of this test alone, which it may end; a writer's own limit comes much later."""
    with running(limits={"drain_seconds": 2, "deposit_idle_seconds": 90}) as daemon:
        yield daemon


# -- 61: SIGTERM -----------------------------------------------------------------------------------


def test_61_a_get_in_progress_is_finished() -> None:
    """A large reference, asked for just before the signal, arrives whole; so does one that is
    being streamed."""
    data = os.urandom(24 * MIB)
    with running() as own, Client(own.directory) as client:
        digest = client.store(data)
        stream = client.stub.Read(pb.ReadRequest(deltaspace=SPACE, sha256=digest), timeout=SECONDS)
        assert next(stream).size == len(data)
        request = pb.LookupRequest(request_id=99, deltaspace=SPACE, sha256=digest)
        call = client.stub.Lookup.future(request, metadata=client.metadata, timeout=SECONDS)
        call.add_done_callback(lambda _: None)
        # this answer comes after the lookup's request on the same connection
        client.status()
        own.process.send_signal(signal.SIGTERM)
        assert b"".join(answer.data for answer in stream) == data
        assert call.result().size == len(data)
        _, descriptor = client.receive()
        with os.fdopen(descriptor, "rb") as handout:
            assert handout.read() == data
        ended_well(own, own.process.wait(IN_TIME))


@pytest.mark.parametrize("step", ["writing", "committing", "streaming"])
def test_61_a_store_in_progress_does_not_keep_the_daemon(own: Daemon, step: str) -> None:
    """A writer that does not come to an end loses its store, not the user his log-out."""
    with Client(own.directory) as client, ExitStack() as stack:
        call = None
        if step == "streaming":
            begin = pb.WriteRequest(begin=pb.WriteBegin(deltaspace=SPACE, size=5 * MIB))
            read_end, write_end = os.pipe()
            stack.callback(os.close, read_end)
            stack.callback(os.close, write_end)
            call = client.stub.Write.future(_until(begin, read_end), timeout=SECONDS)
        else:
            request_id, write_end = client.begin(5 * MIB)
            stack.callback(os.close, write_end)
            os.write(write_end, b"some")
            if step == "committing":
                request = pb.CommitStoreRequest(request_id=request_id)
                call = client.stub.CommitStore.future(
                    request, metadata=client.metadata, timeout=SECONDS
                )
        eventually(lambda: client.status().stores_in_progress == 1)
        ended_well(own, own.stop(seconds=IN_TIME))
        if call is not None:
            assert call.code() is not grpc.StatusCode.OK


def _until(first: pb.WriteRequest, read_end: int) -> Iterator[pb.WriteRequest]:
    yield first
    os.read(read_end, 1)


def test_61_a_store_that_finishes_while_draining_is_answered(own: Daemon) -> None:
    """The commit that was in progress at the signal succeeds if its bytes come in time."""
    with Client(own.directory) as client:
        request_id, write_end = client.begin(4)
        request = pb.CommitStoreRequest(request_id=request_id)
        call = client.stub.CommitStore.future(request, metadata=client.metadata, timeout=SECONDS)
        client.status()
        own.process.send_signal(signal.SIGTERM)
        eventually(lambda: not (own.directory / "session.sock").exists())
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(b"data")
        assert call.result().sha256
        ended_well(own, own.process.wait(IN_TIME))


# -- 62, 63: SIGKILL and SIGSTOP -------------------------------------------------------------------

# Does one operation on a reference of its own again and again, each on a cache of its own, and
# tells of every one how long it took, whether its bytes were right, and who served it.
USER = """
import hashlib, json, os, sys, time
from pathlib import Path
import dgcache
directory, what, size, budget_ms = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
data = (what.encode() * size)[:size]
digest = hashlib.sha256(data).hexdigest()
def operate(cache):
    if what == "get":
        cache.put("b", what, data)
        try:
            with cache.get("b", what, digest) as reference:
                return reference.read() == data
        except dgcache.CacheMissError:  # gone with the daemon: as with any miss, he downloads it
            return True
    if what == "put":
        return cache.put("b", what, data) == digest
    if what == "fetch":
        cache.evict("b", what)
        with cache.get_or_fetch("b", what, digest, lambda: data) as reference:
            return reference.read() == data
    return cache.has("b", what, digest) in (True, False)
settings = dgcache.Settings(socket_dir=directory, connect_timeout_ms=budget_ms)
print("ready", flush=True)
for _ in sys.stdin:
    with dgcache.open(settings) as cache:
        print(json.dumps(cache.backend), flush=True)
        sys.stdin.readline()
        started = time.monotonic()
        right, seconds = operate(cache), time.monotonic() - started
        print(json.dumps([right, seconds, cache.backend]), flush=True)
"""
OPERATIONS = ["get", "put", "fetch", "has"]


class User:
    """A process that uses the cache when it is told to."""

    def __init__(self, directory: Path, what: str, size: int, budget_ms: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(directory), what, str(size), str(budget_ms)],
            env=own_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        assert poll([self.process.stdout.fileno()], 60)
        line = self.process.stdout.readline()
        assert line, "the user's program failed"
        return line.strip()

    def tell(self) -> None:
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)

    def opened(self) -> str:
        """Let it open the cache, and return the backend."""
        self.tell()
        return str(json.loads(self._answer()))

    def done(self) -> tuple[bool, float, str]:
        """Return whether what it did was right, its seconds, and the backend."""
        right, seconds, backend = json.loads(self._answer())
        return right, seconds, backend

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_62_sigkill_at_any_moment_fails_nobody(short_directory: Path) -> None:
    """Sixteen daemons, each killed at another moment while four processes put, get, fetch and ask:
    every operation succeeds, with the right bytes, at once."""
    moments, directory, backends = random.Random(62), short_directory / "s", set()
    with ExitStack() as stack:
        users = [User(directory, what, 5 * MIB, 20_000) for what in OPERATIONS]
        for user in users:
            stack.callback(user.close)
        slowest = 0.0
        for _ in range(16):
            with running(directory) as daemon:
                assert {user.opened() for user in users} == {"dg-cached"}
                killing = threading.Timer(moments.uniform(0.0, 0.08), daemon.process.kill)
                killing.start()
                for user in users:
                    user.tell()
                for right, seconds, backend in [user.done() for user in users]:
                    assert right
                    slowest = max(slowest, seconds)
                    backends.add(backend)
                killing.join()
        print("slowest", slowest)
        assert slowest < 5.0  # a socket that is closed is noticed, no deadline is waited for
    assert backends == {"dg-cached", "memory"}  # some moments were before the end, some after


BUDGETS = {"get": 10.0, "put": 2.0, "fetch": 2.0, "has": 2.0}
"""The deadline of the first call of each (`dgcache.remote`); in get it is that of its put."""


def test_63_a_stopped_daemon_costs_the_budget_and_no_more(own: Daemon) -> None:
    """SIGSTOP before and after a client came: each gives up at its deadline, in earnest, and the
    operation succeeds without the daemon."""
    with ExitStack() as stack:
        there = [User(own.directory, what, 5 * MIB, 20_000) for what in OPERATIONS]
        late = User(own.directory, "put", MIB, 50)
        for user in (*there, late):
            stack.callback(user.close)
        assert {user.opened() for user in there} == {"dg-cached"}
        own.process.send_signal(signal.SIGSTOP)
        stack.callback(own.process.send_signal, signal.SIGCONT)
        started = time.monotonic()
        assert late.opened() == "memory"
        assert time.monotonic() - started < 1.5  # 50 ms, and a busy host
        for user in (*there, late):
            user.tell()
        for what, user in zip(OPERATIONS, there, strict=True):
            right, seconds, backend = user.done()
            print(what, seconds)
            assert (right, backend) == (True, "memory")
            assert seconds < BUDGETS[what] + 2.0
        assert late.done()[0]


# -- 64: versions ----------------------------------------------------------------------------------

PACKAGES = ("dgcache_proto", "dgcache_core", "dgcached", "dgcache")
CLIENT = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
import dgcache
settings = dgcache.Settings.from_environment(
    socket_dir=Path(sys.argv[1]), connect_timeout_ms=20_000)
with dgcache.open(settings) as cache:
    digest = cache.put("b", "p", b"data")
    with cache.get("b", "p", digest) as reference:
        print(reference.source, reference.read() == b"data")
"""


def built(place: Path, protocol: int, oldest: int) -> dict[str, str]:
    """Copy the packages with other versions of the protocol, and return what makes them found."""
    for name in PACKAGES:
        original = Path(__import__(name).__file__ or "").parent
        shutil.copytree(original, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("dgcached/server.py", "dgcache/session.py"):
        text = (place / file).read_text()
        changed = re.sub(r"(?m)^PROTOCOL = \d$", f"PROTOCOL = {protocol}", text)
        changed = re.sub(r"(?m)^OLDEST_PROTOCOL = \d$", f"OLDEST_PROTOCOL = {oldest}", changed)
        assert changed.count(f"\nPROTOCOL = {protocol}\n") == 1
        assert changed != text
        (place / file).write_text(changed)
    return {"PYTHONPATH": str(place)}


def used(directory: Path, environ: dict[str, str]) -> list[str]:
    """Return what a client process says on its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(directory)],
        env=own_environment() | environ,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("newer", "oldest", "says"),
    [
        ("daemon", 3, "speaks protocol 3, this client 2: update the client, then dg-cache restart"),
        ("client", 3, "speaks protocol 2, this client 3: update the daemon, then dg-cache restart"),
        ("daemon", 2, ""),
        ("client", 2, ""),
    ],
)
@pytest.mark.parametrize("transport", ["grpc", "auto"])
def test_64_another_version_is_refused_with_a_clear_message(
    short_directory: Path, tmp_path: Path, newer: str, oldest: int, says: str, transport: str
) -> None:
    """One side is built with protocol 3: where it no longer speaks 2, one warning says who must be
    updated and the operation succeeds in process; where it does, they understand each other."""
    other, this = built(tmp_path, 3, oldest), {"PYTHONPATH": ""}
    other["DG_CACHE_TRANSPORT"] = this["DG_CACHE_TRANSPORT"] = transport
    directory = short_directory / "s"
    with running(directory, environ=other if newer == "daemon" else this) as daemon:
        said = used(directory, this if newer == "daemon" else other)
        with Client(directory) as client:
            assert client.hello.protocol == (3 if newer == "daemon" else 2)
        assert daemon.stop() == 0
    if says:
        warning, result = said
        assert warning.startswith("WARNING ")
        assert says in warning
        assert result == "memory True"
    else:
        assert said == ["dg-cached True"]


# -- 65, 66: leases --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def people() -> Iterator[Crowd]:
    """Four who wait."""
    with crowd(4) as started:
        yield started


def status_of(daemon: Daemon) -> dict[str, int]:
    with dgcache.open(Settings(socket_dir=daemon.directory, connect_timeout_ms=20_000)) as cache:
        leases: dict[str, int] = cache.status()["leases"]
        return leases


def started_at(journal: Path) -> list[float]:
    """Return when the fetches started."""
    lines = [line.split() for line in journal.read_text().splitlines()]
    return sorted(float(when) for what, _, when in lines if what == "start")


def test_65_a_fetcher_that_is_killed_hands_over_at_once(
    people: Crowd, own: Daemon, tmp_path: Path
) -> None:
    """SIGKILL in the middle of a fetch that would take a minute: the next begins within moments."""
    journal = tmp_path / "journal"
    order = {"count": 4, "wait_seconds": 600.0}
    with crowd(1) as doomed:
        doomed.order(own.directory, journal, DATA, DIGEST, fetch_seconds=60.0)
        victim = first_fetcher(journal)
        people.order(own.directory, journal, DATA, DIGEST, **order)
        eventually(lambda: status_of(own)["waiting"] == 4)
        killed = time.monotonic()
        doomed.kill(victim)
        answers = people.answers(4)
    assert all(answer["right"] for answer in answers)
    assert len(fetches(journal).started) == 2  # the victim's, and one other
    assert status_of(own)["passed_on"] == 1
    assert started_at(journal)[1] - killed < 2.0


def test_66_a_holder_that_hangs_loses_it_at_its_deadline(people: Crowd, tmp_path: Path) -> None:
    """It goes on hanging, and nobody waits for it any more."""
    journal = tmp_path / "journal"
    with running(limits={"lease_seconds": 2.0}) as daemon, crowd(1) as hanging:
        hanging.order(daemon.directory, journal, DATA, DIGEST, fetch_seconds=300.0)
        first_fetcher(journal)
        people.order(daemon.directory, journal, DATA, DIGEST, count=4, wait_seconds=600.0)
        answers = people.answers(4)
        assert all(answer["right"] for answer in answers)
        assert len(fetches(journal).started) == 2
        assert status_of(daemon)["expired"] == 1
        first, second = started_at(journal)
        assert 1.5 < second - first < 6.0
