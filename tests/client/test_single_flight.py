"""Many processes miss one reference at once: one fetches, the others wait, and nobody in vain."""

import hashlib
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import dgcache
import dgcache.grpc_transport
import dgcache.session
from dgcache import Settings
from dgcache_core.references import Deltaspace, parse_sha256
from tests.support.crowd import Crowd, crowd, fetches, first_fetcher
from tests.support.wire import Daemon, eventually, running

CROWD = 32
DATA = secrets.token_bytes(4096)
DIGEST = hashlib.sha256(DATA).hexdigest()
TIMES = 512
BIG_DIGEST = hashlib.sha256(DATA * TIMES).hexdigest()


@pytest.fixture(scope="module")
def people() -> Iterator[Crowd]:
    """32 client processes, started once."""
    with crowd(CROWD) as started:
        yield started


@pytest.fixture
def serving() -> Iterator[Daemon]:
    with running() as daemon:
        yield daemon


def status_of(daemon: Daemon) -> dict[str, int]:
    with dgcache.open(Settings(socket_dir=daemon.directory, connect_timeout_ms=20_000)) as cache:
        leases: dict[str, int] = cache.status()["leases"]
        return leases


def test_32_processes_that_miss_at_once_make_one_fetch(
    people: Crowd, serving: Daemon, tmp_path: Path
) -> None:
    """While they wait, status shows it; all get the right bytes from the daemon."""
    journal = tmp_path / "journal"
    people.order(serving.directory, journal, DATA, BIG_DIGEST, times=TIMES, fetch_seconds=3.0)
    first_fetcher(journal)
    eventually(lambda: status_of(serving)["waiting"] > 10)
    answers = people.answers()
    assert [answer.get("error") for answer in answers] == [None] * CROWD
    assert all(answer["right"] for answer in answers)
    assert {answer["still"] for answer in answers} == {"dg-cached"}
    assert len(fetches(journal).started) == 1
    status = status_of(serving)
    assert (status["held"], status["waiting"], status["granted"]) == (0, 0, 1)
    assert status["saved"] > 10


def test_a_fetch_that_fails_hands_over_and_fails_only_its_own_process(
    people: Crowd, serving: Daemon, tmp_path: Path
) -> None:
    """The error of the source is its caller's; the others go on in turn."""
    journal = tmp_path / "journal"
    with crowd(1) as unlucky:
        unlucky.order(serving.directory, journal, DATA, DIGEST, fetch_seconds=2.0, fetch_fails=True)
        first_fetcher(journal)
        people.order(serving.directory, journal, DATA, DIGEST, count=4)
        (failed,) = unlucky.answers()
        answers = people.answers(4)
    assert failed["error"] == "OSError: the source is away"
    assert all(answer["right"] for answer in answers)
    assert len(fetches(journal).started) == 2


def test_a_slow_fetch_makes_at_most_two_at_a_time(
    people: Crowd, serving: Daemon, tmp_path: Path
) -> None:
    """A fetch of three times the wait, 32 who wait: one more fetches, the others go on waiting."""
    journal = tmp_path / "journal"
    with crowd(1) as slow:
        slow.order(serving.directory, journal, DATA, DIGEST, fetch_seconds=9.0)
        first_fetcher(journal)
        people.order(serving.directory, journal, DATA, DIGEST, fetch_seconds=9.0, wait_seconds=3.0)
        answers = [*slow.answers(), *people.answers()]
    assert [answer.get("error") for answer in answers] == [None] * (CROWD + 1)
    assert all(answer["right"] for answer in answers)
    seen = fetches(journal)
    assert seen.most_at_once == 2
    assert len(seen.started) == 2


def test_32_processes_with_a_reference_that_cannot_be_stored_do_not_queue(
    people: Crowd, tmp_path: Path
) -> None:
    """Each fetch takes 1 s; in line they would take half a minute."""
    journal = tmp_path / "journal"
    with running(options=("--memory-size-mb", "1")) as daemon:
        people.order(daemon.directory, journal, DATA, BIG_DIGEST, times=TIMES, fetch_seconds=1.0)
        answers = people.answers()
        assert [answer.get("error") for answer in answers] == [None] * CROWD
        assert all(answer["right"] for answer in answers)
        assert status_of(daemon)["not_stored"] >= 1
        # all of them at once, after the first: the times of two fetches, not of 32
        assert fetches(journal).most_at_once > 10


@pytest.mark.parametrize("transport", ["grpc", "direct"])
def test_a_wait_ends_when_the_daemon_is_stopped(
    serving: Daemon, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """SIGSTOP while it waits for somebody's fetch: no sign of life comes, and it goes on."""
    quicker = {"grpc.keepalive_time_ms": 1500, "grpc.http2.ping_timeout_ms": 500}
    options = dgcache.grpc_transport._CHANNEL_OPTIONS
    quick = [(name, quicker.get(name, value)) for name, value in options]
    monkeypatch.setattr(dgcache.grpc_transport, "_CHANNEL_OPTIONS", quick)
    monkeypatch.setattr(dgcache.session, "_SILENCE_SECONDS", 3.0)
    settings = Settings(
        socket_dir=serving.directory, connect_timeout_ms=20_000, transport=transport
    )
    deltaspace, sha256 = Deltaspace("b", "p"), parse_sha256(DIGEST)
    with dgcache.open(settings) as holder, dgcache.open(settings) as waiter:
        claim = holder.get_or_claim(deltaspace, sha256)
        assert not isinstance(claim, dgcache.Reference)
        got: list[bytes] = []

        def wait() -> None:
            with waiter.get_or_fetch("b", "p", DIGEST, lambda: DATA) as reference:
                got.append(reference.read())

        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: status_of(serving)["waiting"] == 1)
        os.kill(serving.pid, signal.SIGSTOP)
        try:
            thread.join(20)
            assert got == [DATA]
            assert waiter.backend == "memory"
        finally:
            os.kill(serving.pid, signal.SIGCONT)


def test_a_long_wait_on_the_session_outlives_every_silence_allowed(
    serving: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon says that it lives, though the call takes longer than it may be silent."""
    monkeypatch.setattr(dgcache.session, "_SILENCE_SECONDS", 4.0)
    settings = Settings(
        socket_dir=serving.directory,
        connect_timeout_ms=20_000,
        wait_seconds=6.0,
        transport="direct",
    )
    deltaspace, sha256 = Deltaspace("b", "p"), parse_sha256(DIGEST)
    with dgcache.open(settings) as holder, dgcache.open(settings) as waiter:
        claim = holder.get_or_claim(deltaspace, sha256)
        assert not isinstance(claim, dgcache.Reference)
        with waiter.get_or_fetch("b", "p", DIGEST, lambda: DATA) as reference:
            assert reference.read() == DATA
        assert waiter.backend == "dg-cached"
        claim.give_back()


@pytest.mark.parametrize("transport", ["grpc", "direct"])
def test_threads_of_one_process_share_one_fetch(serving: Daemon, transport: str) -> None:
    """Even more of them than a session may have calls: the store is not stuck behind the waits."""
    settings = Settings(
        socket_dir=serving.directory, connect_timeout_ms=20_000, transport=transport
    )
    fetched: list[int] = []
    everybody = threading.Barrier(40)
    release = threading.Event()

    def fetch() -> bytes:
        fetched.append(1)
        release.wait(20)
        return DATA

    right: list[bool] = []
    with dgcache.open(settings) as cache:

        def get() -> None:
            everybody.wait(20)
            with cache.get_or_fetch("b", "p", DIGEST, fetch) as reference:
                right.append(reference.read() == DATA)

        threads = [threading.Thread(target=get) for _ in range(40)]
        for thread in threads:
            thread.start()
        eventually(lambda: status_of(serving)["waiting"] >= 7)
        release.set()
        for thread in threads:
            thread.join(60)
        assert right == [True] * 40
        assert len(fetched) == 1
        assert cache.backend == "dg-cached"
