"""Security events: how they are logged, counted, kept, and followed."""

import asyncio
import io
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, aclosing

import grpc
import pytest

from dgcache_core.errors import CacheFullError
from dgcache_proto.v1 import dgcache_pb2 as pb
from dgcached import logs
from dgcached.logs import _JournalFormatter
from dgcached.security_events import SecurityEvents
from tests.support.wire import SECONDS, Client, Daemon, eventually, refused, running


@pytest.fixture
def journal() -> Iterator[io.StringIO]:
    """What the journal's pipe would get."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(_JournalFormatter())
    logs.logger.addHandler(handler)
    yield written
    logs.logger.removeHandler(handler)


def events(*, kept: int = 4, followers: int = 2) -> SecurityEvents:
    """Make an empty one with small bounds."""
    return SecurityEvents(kept=kept, followers=followers)


async def kept_ones(security: SecurityEvents) -> list[tuple[int, int]]:
    """Return the sequence of each event that is kept, and what was lost before it."""
    return [(one.sequence, dropped) async for one, dropped in security.stream(follow=False)]


def test_an_event_is_one_line_of_priority_2(journal: io.StringIO) -> None:
    """As sd-daemon(3) has it, so that `journalctl -p crit` finds it; a name cannot forge a line."""
    events().report("replaced", place="runtime", name="a\n<6>b \udcff")
    assert journal.getvalue() == ('<2>security kind=replaced place=runtime name="a\\n<6>b ?"\n')


def test_an_event_is_counted_and_kept_with_its_time_and_its_fields() -> None:
    """Fields are text and cut, whatever they were."""

    async def story() -> None:
        security = events()
        before = time.time()
        security.report("linked", links=2, name="n" * 1000)
        ((event, dropped),) = [pair async for pair in security.stream(follow=False)]
        assert (event.sequence, event.kind, event.severity, dropped) == (1, "linked", "critical", 0)
        assert event.fields == {"links": "2", "name": "n" * 200}
        assert before <= event.time_seconds <= time.time()
        assert security.counts == {"linked": 1}

    asyncio.run(story())


def test_only_the_last_ones_are_kept_and_all_are_counted() -> None:
    """Who asks later is told how many there were before."""

    async def story() -> None:
        security = events()
        for _ in range(7):
            security.report("deleted")
        assert await kept_ones(security) == [(4, 3), (5, 0), (6, 0), (7, 0)]
        assert security.counts == {"deleted": 7}

    asyncio.run(story())


def test_a_slow_follower_loses_events_and_is_told_how_many() -> None:
    """The ring turned while it was busy; the next event says what is missing, and then it goes on
    without gaps."""

    async def story() -> None:
        security = events(kept=2)
        async with aclosing(security.stream(follow=True)) as stream:
            security.report("first")
            assert (await anext(stream))[1] == 0
            for kind in "abcde":
                security.report(kind)
            seen = [await anext(stream) for _ in range(2)]
            assert [(one.kind, dropped) for one, dropped in seen] == [("d", 3), ("e", 0)]
            asyncio.get_running_loop().call_soon(security.report, "last")
            one, dropped = await asyncio.wait_for(anext(stream), 10)
            assert (one.kind, dropped) == ("last", 0)

    asyncio.run(story())


def test_followers_have_a_bound_and_give_their_place_back() -> None:
    """The next one is refused until one of them goes; who only asks once is always served."""

    async def story() -> None:
        security = events(followers=1)
        security.report("one")
        stream = security.stream(follow=True)
        await anext(stream)
        with pytest.raises(CacheFullError, match="1 follow"):
            await anext(security.stream(follow=True))
        assert await kept_ones(security) == [(1, 0)]
        await stream.aclose()
        async with aclosing(security.stream(follow=True)) as successor:
            assert (await anext(successor))[0].kind == "one"

    asyncio.run(story())


def test_a_stream_ends_behind_the_last_event_when_the_daemon_stops() -> None:
    """A follower gets what was reported before, and no error."""

    async def story() -> None:
        security = events()
        following = asyncio.create_task(_all_of(security))
        security.report("one")
        await asyncio.sleep(0)
        security.report("two")
        security.close()
        assert await asyncio.wait_for(following, 10) == ["one", "two"]

    async def _all_of(security: SecurityEvents) -> list[str]:
        return [one.kind async for one, _ in security.stream(follow=True)]

    asyncio.run(story())


def test_a_flood_does_not_rotate_the_log_away(journal: io.StringIO) -> None:
    """120 lines a minute, then one that tells how many were not written; all are counted."""
    now = [0.0]
    security = SecurityEvents(kept=4, followers=1, clock=lambda: now[0])
    for _ in range(1000):
        security.report("overwritten")
    assert journal.getvalue().count("\n") == 120
    now[0] = 60.0
    security.report("overwritten")
    assert "<2>security kind=suppressed count=880\n" in journal.getvalue()
    assert journal.getvalue().count("\n") == 122
    assert security.counts == {"overwritten": 1001}


# -- in a daemon -------------------------------------------------------------------------------


def follow(client: Client) -> "Iterator[pb.Event]":
    """Begin to follow; the bound on the wait is the call's deadline."""
    stream: Iterator[pb.Event] = client.stub.Watch(pb.WatchRequest(follow=True), timeout=SECONDS)
    return stream


def loosen(daemon: Daemon, mode: int = 0o755) -> None:
    """Do what raises one event and is not undone."""
    daemon.directory.chmod(mode)


def test_a_follower_gets_what_is_kept_and_what_comes() -> None:
    """As Status counts it; who does not follow gets what is kept and the end."""
    with running() as daemon, Client(daemon.directory) as client:
        loosen(daemon)
        eventually(lambda: client.status().security_events == {"chmod": 1})
        stream = follow(client)
        assert next(stream).fields["detail"] == "mode=0700->0755"
        loosen(daemon, 0o700)
        one = next(stream)
        assert (one.sequence, one.kind, one.severity, one.dropped) == (2, "chmod", "critical", 0)
        assert one.fields == {"place": "runtime", "name": ".", "detail": "mode=0755->0700"}
        kept = client.stub.Watch(pb.WatchRequest(), timeout=SECONDS)
        assert [event.sequence for event in kept] == [1, 2]


def test_a_follower_that_a_burst_outruns_is_told_how_much_it_lost() -> None:
    """The stopped daemon finds five changes at once and keeps two events."""
    with (
        running(limits={"security_events_kept": 2}) as daemon,
        Client(daemon.directory, session=False) as client,
    ):
        stream = follow(client)
        loosen(daemon)
        assert next(stream).sequence == 1
        daemon.process.send_signal(signal.SIGSTOP)
        for name in ("session.sock", "rpc.sock", "daemon.lock", "inner", "inner/inner.sock"):
            (daemon.directory / name).chmod(0o777)
        daemon.process.send_signal(signal.SIGCONT)
        eventually(lambda: client.status().security_events == {"chmod": 6})
        seen = [next(stream)]
        while seen[-1].sequence < 6:
            seen.append(next(stream))
        assert sum(1 + event.dropped for event in seen) == 5
        assert seen[-2].dropped + seen[-1].dropped > 0


def test_followers_are_bounded_and_leave_their_place_when_they_go() -> None:
    """The third is refused; once a first one has gone, by its own will or with its connection,
    another one may follow."""
    with running(limits={"followers": 2}) as daemon, ExitStack() as stack:
        loosen(daemon)
        clients = [stack.enter_context(Client(daemon.directory)) for _ in range(3)]
        streams = [follow(client) for client in clients[:2]]
        assert [next(stream).sequence for stream in streams] == [1, 1]
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            next(follow(clients[2]))
        assert [one.sequence for one in clients[2].call("Watch", pb.WatchRequest())] == [1]

        def admitted() -> bool:
            try:
                return next(follow(clients[2])).sequence == 1
            except grpc.RpcError:
                return False

        streams[0].cancel()  # type: ignore[attr-defined] # a call of grpc
        eventually(admitted)
        clients[1].close()
        eventually(admitted)


def test_a_follower_does_not_keep_the_daemon() -> None:
    """SIGTERM ends the stream behind the last event, with OK, long before calls must."""
    with (
        running(limits={"drain_seconds": 60}) as daemon,
        Client(daemon.directory, session=False) as client,
    ):
        loosen(daemon)
        stream = follow(client)
        assert next(stream).sequence == 1
        assert daemon.stop() == 0
        assert list(stream) == []
