"""Cases 39 to 43 and 46: more of everything than anybody needs, and who suffers from it.

In each a bystander, another process of the same user, is served all the while (see
`tests.support.bystander`). The daemon has its default limits unless a test says otherwise.
"""

import os
import re
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest
from hyperframe.frame import ContinuationFrame, HeadersFrame, RstStreamFrame

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.bystander import FLOOR_SECONDS, Bystander, bystander
from tests.support.http2 import (
    PREFACE,
    SETTINGS,
    Http2Peer,
    data,
    greedy_settings,
    half_a_message,
    ping,
    reset,
)
from tests.support.wire import (
    MIB,
    SECONDS,
    SPACE,
    Client,
    Daemon,
    eventually,
    refused,
    running,
    script_running,
)

FLOOD = 20_000
SLACK_KIB = 48 << 10
"""What the daemon may grow by in a flood: gRPC's own buffers for what it answers."""


@pytest.fixture(scope="module")
def serving() -> Iterator[Daemon]:
    """A daemon that lives through all of these."""
    with running() as daemon:
        yield daemon
        assert daemon.process.poll() is None, daemon.logged()
        assert "Traceback" not in daemon.logged()


@pytest.fixture
def other(serving: Daemon) -> Iterator[Bystander]:
    """Its bystander."""
    with bystander(serving.directory) as started:
        yield started


def resident_kib(daemon: Daemon) -> int:
    """Return VmRSS."""
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])


def alone_again(daemon: Daemon, connections: int = 2) -> None:
    """Wait until only the bystander and whoever asks are connected."""
    with Client(daemon.directory, session=False) as client:
        eventually(lambda: client.status().connections <= connections)
        eventually(lambda: client.status().store.reserved_bytes == 0)


def test_39_rapid_resets_disturb_nobody(serving: Daemon, other: Bystander) -> None:
    """20,000 calls opened and cancelled at once on one connection (CVE-2023-44487)."""
    request = pb.ContainsRequest(deltaspace=SPACE, sha256=bytes(32)).SerializeToString()
    before = resident_kib(serving)
    with other.undisturbed(), Http2Peer(serving.directory) as hasty:
        flood = b"".join(
            hasty.headers(stream, "Contains") + data(stream, request, ends=True) + reset(stream)
            for stream in range(1, 2 * FLOOD, 2)
        )
        assert hasty.pump(flood, 60) or hasty.hung_up_on()
    alone_again(serving)
    print("grew by", resident_kib(serving) - before, "KiB")
    assert resident_kib(serving) <= before + SLACK_KIB


HALF_OPEN_CALLS, WAVES, WAVE = 32, 4, 24
_MEASURED = 640


def seconds_to_begin(client: Client, calls: int) -> float:
    """Return what so many calls take the daemon and this process, as busy as the machine is."""
    request = pb.ContainsRequest(deltaspace=SPACE, sha256=bytes(32))
    begun = time.monotonic()
    for _ in range(_MEASURED // 16):
        for call in [client.stub.Contains.future(request, timeout=SECONDS) for _ in range(16)]:
            call.result()
    return (time.monotonic() - begun) * calls / _MEASURED


def open_half(peer: Http2Peer) -> None:
    """Begin as many calls as a connection may have, and finish none."""
    calls = [peer.headers(stream, "Write") for stream in range(1, 33, 2)]
    calls += [peer.headers(stream, "Lookup") for stream in range(33, 65, 2)]
    peer.pump(b"".join(calls) + half_a_message(33))


def test_40_three_thousand_half_open_calls_disturb_nobody(
    serving: Daemon, other: Bystander
) -> None:
    """96 connections with as many calls as each may have, none of which is ever finished: Write,
    which waits for its first message, and Lookup, which has a part of one.

    They come in waves of 768 calls. Who comes meanwhile waits in one line with a wave, and so never
    longer than it takes to begin as many calls; who comes when all stand waits no longer than ever.
    """
    before = resident_kib(serving)
    with Client(serving.directory, session=False) as client, ExitStack() as stack:
        in_line = FLOOR_SECONDS + seconds_to_begin(client, WAVE * HALF_OPEN_CALLS)
        print(f"a wave may take {in_line:.1f} s")
        peers: list[Http2Peer] = []
        with other.undisturbed(floor_seconds=in_line):
            for _ in range(WAVES):
                for _ in range(WAVE):
                    peers.append(stack.enter_context(Http2Peer(serving.directory)))
                    open_half(peers[-1])
                eventually(lambda: client.status().connections == 2 + len(peers))
                other.served(1)
        with other.undisturbed():
            # one call more than a connection may have is refused, and it alone
            peers[0].pump(peers[0].headers(65, "Write"))
            ended = [one for one in peers[0].frames() if isinstance(one, RstStreamFrame)]
            assert [one.stream_id for one in ended] == [65]
            other.served(100)
        print("grew by", resident_kib(serving) - before, "KiB")
        assert resident_kib(serving) <= before + 2 * SLACK_KIB
        with other.undisturbed(floor_seconds=in_line):
            while peers:
                for peer in peers[-WAVE:]:
                    peer.close()
                del peers[-WAVE:]
                eventually(lambda: client.status().connections == 2 + len(peers))
                other.served(1)
    alone_again(serving)


SLOW = {
    "silent": b"",
    "silent after a byte": PREFACE[:1],
    "silent after the preface": PREFACE,
}


@pytest.mark.parametrize("kind", [*SLOW, "a byte now and then"])
def test_41_a_slow_peer_is_closed_at_the_limit(kind: str) -> None:
    """Fifty of each kind, all gone some time after the two seconds of a handshake, or of two, and
    none of them within the first."""
    with (
        running(limits={"handshake_seconds": 2.0}) as daemon,
        bystander(daemon.directory) as other,
        Client(daemon.directory, session=False) as client,
        ExitStack() as stack,
        other.undisturbed(),
    ):
        there, begun = client.status().connections, time.monotonic()
        slow = [stack.enter_context(Http2Peer(daemon.directory, says=False)) for _ in range(50)]
        for peer in slow:
            peer.connection.sendall(SLOW.get(kind, b""))
        eventually(lambda: client.status().connections == there + 50)
        trickle = iter(PREFACE[:-1])

        def all_gone() -> bool:
            if kind not in SLOW and (byte := next(trickle, None)) is not None:
                for peer in slow:
                    with suppress(OSError):
                        peer.connection.send(bytes([byte]))
            other.served(50)  # some tenths of a second
            return client.status().connections == there

        eventually(all_gone, 10)
        assert time.monotonic() > begun + 1
        assert all(peer.hung_up_on(1) for peer in slow)


FLOODS = {
    "PING": ping() * FLOOD,
    "SETTINGS": SETTINGS * FLOOD,
    # headers that never end (CVE-2024-27316)
    "CONTINUATION": HeadersFrame(1, b"").serialize()
    + ContinuationFrame(1, bytes(1000)).serialize() * FLOOD,
}


@pytest.mark.parametrize("reads", [True, False], ids=["reading", "deaf"])
@pytest.mark.parametrize("kind", FLOODS)
def test_42_a_flood_of_frames_disturbs_nobody(
    serving: Daemon, other: Bystander, kind: str, reads: bool
) -> None:
    """20,000 frames that make the daemon work or answer, from peers that read the answers and from
    ten that do not: it hangs up on each."""
    before = resident_kib(serving)
    deaf: list[Http2Peer] = []
    with other.undisturbed(), ExitStack() as stack:
        for _ in range(1 if reads else 10):
            peer = stack.enter_context(Http2Peer(serving.directory))
            if reads:
                assert peer.pump(FLOODS[kind], 60) or peer.hung_up_on()
                continue
            peer.connection.settimeout(0.5)
            with suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
                peer.connection.sendall(FLOODS[kind])
            deaf.append(peer)
        assert all(peer.hung_up_on() for peer in deaf)
        print("grew by", resident_kib(serving) - before, "KiB")
        assert resident_kib(serving) <= before + SLACK_KIB
    alone_again(serving)


CROWD = 10_000
# Connects so often, keeps every connection, says how many the daemon still holds, and waits.
CONNECT = """
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
os.nice(19)  # it is the daemon that is tried, not the scheduler
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
kind = socket.SOCK_STREAM if sys.argv[1].endswith("rpc.sock") else socket.SOCK_SEQPACKET
kept = []
for _ in range(int(sys.argv[2])):
    one = socket.socket(socket.AF_UNIX, kind)
    one.connect(sys.argv[1])  # blocks while the backlog is full
    kept.append(one)
closed = 0
for one in kept:
    one.setblocking(False)
    try:
        while one.recv(4096):
            pass
        closed += 1
    except BlockingIOError:
        pass
    except ConnectionResetError:
        closed += 1
print(len(kept), closed, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[1] < CROWD // 4 + 100,
    reason="needs a hard limit of 2,600 open files: four processes hold 2,500 connections each",
)
@pytest.mark.parametrize("name", ["rpc.sock", "session.sock"])
def test_43_ten_thousand_connections_are_capped(name: str) -> None:
    """Four processes open 2,500 each and keep them: the daemon holds 256, whoever was there before
    is served, and afterwards there is room again. The log has a line a second, and the count."""
    with (
        running(limits={"handshake_seconds": 60.0}) as daemon,  # the silent ones stay
        bystander(daemon.directory) as other,
        Client(daemon.directory) as client,
        ExitStack() as stack,
    ):
        assert client.store(b"before")
        with other.undisturbed():
            before, begun = resident_kib(daemon), time.monotonic()
            refusals = CROWD + taken(client, name) - 256
            crowds = [
                stack.enter_context(
                    script_running(None, CONNECT, daemon.directory / name, CROWD // 4)
                )
                for _ in range(4)
            ]
            said = [crowd.stdout.readline().split() for crowd in crowds if crowd.stdout]
            assert [int(kept) for kept, _ in said] == [CROWD // 4] * 4
            eventually(lambda: told_of(daemon) == refusals)
            lines = daemon.logged().count("limit-reached")
            assert 2 <= lines <= 2 + time.monotonic() - begun
            assert taken(client, name) == 256
            assert client.store(b"established")
            print("refused", refusals, "in", lines, "lines")
            print("grew by", resident_kib(daemon) - before, "KiB")
            assert resident_kib(daemon) <= before + SLACK_KIB
        stack.close()
        eventually(lambda: client.status().connections <= 2 and client.status().sessions <= 2)
        with Client(daemon.directory) as late:
            assert late.store(b"room again")


def taken(client: Client, name: str) -> int:
    """Return how many connections to a socket there are."""
    status = client.status()
    return status.connections if name == "rpc.sock" else status.sessions


def told_of(daemon: Daemon) -> int:
    """Count the connections over the limit that the log tells of."""
    lines = [line for line in daemon.logged().splitlines() if "limit-reached" in line]
    times = [re.search(r" last_pid=[0-9]+ times=([0-9]+)$", line) for line in lines]
    return sum(int(found[1]) if found else 1 for found in times)


READER_KIB = 6 << 10
"""For each: two chunks of a mebibyte, gRPC's frames of them, and the relay's buffers."""


def test_46_a_reader_that_never_reads_fills_bounded_buffers(
    serving: Daemon, other: Bystander
) -> None:
    """Forty ask for 24 MiB each, let the daemon send all of it at once, and never read a byte. As
    many as may be in progress stand, the others are refused: a client falls back, or takes a
    descriptor instead."""
    with Client(serving.directory) as client:
        digest = client.store(os.urandom(24 * MIB))
        request = pb.ReadRequest(deltaspace=SPACE, sha256=digest).SerializeToString()
        before = resident_kib(serving)
        most = client.hello.limits.reads_at_once
        with other.undisturbed(), ExitStack() as stack:
            for _ in range(40):
                peer = stack.enter_context(Http2Peer(serving.directory, settings=greedy_settings()))
                peer.connection.sendall(peer.headers(1, "Read") + data(1, request, ends=True))
            eventually(lambda: client.status().reads_in_progress == most)
            with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
                list(client.stub.Read(pb.ReadRequest(deltaspace=SPACE, sha256=digest), timeout=10))
            os.close(client.lookup(digest))
            other.served(300)
            grew = resident_kib(serving) - before
            print("grew by", grew, "KiB")
            assert client.status().reads_in_progress == most
            assert grew <= most * READER_KIB
        eventually(lambda: client.status().reads_in_progress == 0)
        eventually(lambda: client.status().store.handout_bytes < MIB)
        client.stub.Evict(pb.EvictRequest(deltaspace=SPACE), timeout=10)
