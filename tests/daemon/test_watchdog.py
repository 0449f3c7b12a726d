"""Signs of life are sent while the loop takes its turns and the store answers, and only then."""

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgcached.supervisor import Notifier, take_watchdog_interval
from dgcached.watchdog import Watchdog

INTERVAL_SECONDS = 0.02
SILENT_SECONDS = 0.3
"""Fifteen intervals in which nothing is to come."""


@pytest.fixture
def notifier(supervisor: socket.socket) -> Iterator[Notifier]:
    """What leads to it."""
    with Notifier() as sender:
        yield sender


@pytest.fixture
def supervisor(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket as NOTIFY_SOCKET names one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(short_directory / "notify"))
        receiver.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(short_directory / "notify"))
        yield receiver


@pytest.mark.parametrize(
    ("microseconds", "pid", "seconds"),
    [
        ("60000000", None, 30.0),
        ("60000000", "own", 30.0),
        ("1", "own", 0.0000005),
        ("60000000", "1", None),  # meant for another process
        ("60000000", "", 30.0),
        ("0", None, None),
        ("-1", None, None),
        ("soon", None, None),
        ("", None, None),
        (None, None, None),
    ],
)
def test_the_interval_is_half_of_what_systemd_waits(
    monkeypatch: pytest.MonkeyPatch,
    microseconds: str | None,
    pid: str | None,
    seconds: float | None,
) -> None:
    """By sd_watchdog_enabled(3); the variables are for us alone and are taken out."""
    for name, value in (("WATCHDOG_USEC", microseconds), ("WATCHDOG_PID", pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(os.getpid()) if value == "own" else value)
    assert take_watchdog_interval() == seconds
    assert not {"WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)


def test_signs_of_life_go_on(supervisor: socket.socket, notifier: Notifier) -> None:
    """One at once and one after each interval; none after the end."""

    async def three() -> list[bytes]:
        watchdog = Watchdog(notifier, INTERVAL_SECONDS, lambda: None)
        watchdog.start()
        got = [await asyncio.to_thread(supervisor.recv, 100) for _ in range(3)]
        await watchdog.stop()
        return got

    assert asyncio.run(three()) == [b"WATCHDOG=1"] * 3
    supervisor.settimeout(SILENT_SECONDS)
    with pytest.raises(TimeoutError):
        while True:  # one may have been on its way
            supervisor.recv(100)


def test_a_store_that_does_not_answer_is_no_sign_of_life(
    supervisor: socket.socket, notifier: Notifier
) -> None:
    """The loop, which still turns, sends none on its behalf, and stopping does not wait for it."""
    lock = threading.Lock()

    async def hang() -> None:
        watchdog = Watchdog(notifier, INTERVAL_SECONDS, lambda: lock.acquire() and lock.release())
        watchdog.start()
        assert await asyncio.to_thread(supervisor.recv, 100) == b"WATCHDOG=1"
        with lock:
            supervisor.settimeout(SILENT_SECONDS)
            with pytest.raises(TimeoutError):
                while True:
                    await asyncio.to_thread(supervisor.recv, 100)
            await asyncio.wait_for(watchdog.stop(), 10)

    asyncio.run(hang())


def test_a_loop_that_takes_no_turn_is_no_sign_of_life(
    supervisor: socket.socket, notifier: Notifier
) -> None:
    """The thread that asks the store does not send by itself."""

    async def hang() -> None:
        watchdog = Watchdog(notifier, INTERVAL_SECONDS, lambda: None)
        watchdog.start()
        assert await asyncio.to_thread(supervisor.recv, 100) == b"WATCHDOG=1"
        supervisor.settimeout(SILENT_SECONDS)
        with pytest.raises(TimeoutError):
            while True:
                supervisor.recv(100)  # in the loop's own thread, which hangs here
        await watchdog.stop()

    asyncio.run(hang())


def test_where_nobody_waits_nothing_is_sent(supervisor: socket.socket, notifier: Notifier) -> None:
    """Without WATCHDOG_USEC there is no task."""

    async def run() -> None:
        watchdog = Watchdog(notifier, None, lambda: None)
        watchdog.start()
        await asyncio.sleep(0)
        await watchdog.stop()

    asyncio.run(run())
    supervisor.setblocking(False)
    with pytest.raises(BlockingIOError):
        supervisor.recv(100)


def test_a_supervisor_that_was_too_busy_hears_the_next_sign(
    supervisor: socket.socket, notifier: Notifier
) -> None:
    """A full queue loses one message and not all that follow."""
    for _ in range(100):  # more than the queue of a datagram socket takes (unix(7))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            try:
                sender.sendto(b"other", supervisor.getsockname())
            except BlockingIOError:
                break
    else:
        raise AssertionError("the queue has no end")
    notifier.notify(WATCHDOG="1")
    supervisor.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            assert supervisor.recv(100) == b"other"
    supervisor.settimeout(10)
    notifier.notify(WATCHDOG="1")
    assert supervisor.recv(100) == b"WATCHDOG=1"
