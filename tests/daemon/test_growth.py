"""Hundreds of rounds later the daemon has no descriptor and no memory more."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import MIB, SPACE, Client, Daemon, eventually, running, script_running

pytestmark = pytest.mark.root

_SLACK_KIB = 4096


def resident_kib(daemon: Daemon) -> int:
    """Return VmRSS."""
    with Path(f"/proc/{daemon.pid}/status").open() as status:
        (line,) = [line for line in status if line.startswith("VmRSS:")]
    return int(line.split()[1])


def test_get_put_evict_rounds_leave_nothing(client: Client, daemon: Daemon) -> None:
    """Stored, read, held for a moment, evicted: three hundred times after a warm-up."""

    def round_of(number: int) -> None:
        data = number.to_bytes(8, "big") * (MIB // 16)
        descriptor = client.lookup(client.store(data))
        assert os.pread(descriptor, len(data), 0) == data
        os.close(descriptor)
        client.call("Evict", pb.EvictRequest(deltaspace=SPACE))

    for number in range(150):
        round_of(number)
    descriptors, resident = settled(client, daemon)
    for number in range(150, 450):
        round_of(number)
    assert settled(client, daemon)[0] == descriptors
    assert settled(client, daemon)[1] <= resident + _SLACK_KIB
    status = client.status().store
    assert (status.entries, status.bindings, status.blob_bytes, status.reserved_bytes) == (0,) * 4


def test_clients_that_come_and_go_leave_nothing(client: Client, daemon: Daemon) -> None:
    """Three hundred sessions with a channel and a store begun that they do not end."""

    def round_of() -> None:
        with Client(daemon.directory) as passing:
            os.close(passing.begin(1000)[1])

    for _ in range(100):
        round_of()
    descriptors, resident = settled(client, daemon)
    for _ in range(300):
        round_of()
    assert settled(client, daemon)[0] == descriptors
    assert settled(client, daemon)[1] <= resident + _SLACK_KIB
    assert client.status().store.reserved_bytes == 0


def test_refused_calls_leave_nothing(client: Client, daemon: Daemon) -> None:
    """Aborted and failed stores, misses, and handouts that a full session could not take."""

    def round_of(number: int) -> None:
        request_id, write_end = client.begin(1000)
        os.close(write_end)
        if number % 2:
            client.call("AbortStore", pb.AbortStoreRequest(request_id=request_id))
        else:
            with pytest.raises(Exception, match="ended after 0"):
                client.commit(request_id)
        with pytest.raises(Exception, match="unknown"):
            client.lookup(number.to_bytes(32, "big"), pb.Deltaspace(bucket="nobody's"))

    for number in range(100):
        round_of(number)
    descriptors, resident = settled(client, daemon)
    for number in range(300):
        round_of(number)
    assert settled(client, daemon)[0] == descriptors
    assert settled(client, daemon)[1] <= resident + _SLACK_KIB


def test_writes_that_are_cancelled_leave_nothing(client: Client, daemon: Daemon) -> None:
    """At any moment, also before the daemon came to the first byte."""
    begin = pb.WriteRequest(begin=pb.WriteBegin(deltaspace=SPACE, size=1000))

    def round_of(number: int) -> None:
        ended = threading.Event()

        def messages() -> Iterator[pb.WriteRequest]:
            yield begin
            ended.wait(20)

        call = client.stub.Write.future(messages(), timeout=20)
        for _ in range(number % 3):
            client.status()
        call.cancel()
        ended.set()

    for number in range(50):
        round_of(number)
    descriptors, _ = settled(client, daemon)
    for number in range(300):
        round_of(number)
    eventually(lambda: settled(client, daemon)[0] <= descriptors)


def settled(client: Client, daemon: Daemon) -> tuple[int, int]:
    """Return descriptors and memory once only this client is there."""
    eventually(lambda: (client.status().sessions, client.status().connections) == (1, 1))
    eventually(lambda: client.status().stores_in_progress == 0)
    eventually(lambda: client.status().store.handouts == 0)
    return daemon.descriptors(), resident_kib(daemon)


def test_clients_that_are_killed_leave_nothing() -> None:
    """kill -9 with a handout held, a descriptor unread and a store begun."""
    script = """
from pathlib import Path
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import SPACE, Client
client = Client(Path(sys.argv[1]))
digest = client.store(b"data")
held = client.lookup(digest)
client.call("Lookup", pb.LookupRequest(request_id=9, deltaspace=SPACE, sha256=digest))
client.call("BeginStore", pb.BeginStoreRequest(request_id=8, deltaspace=SPACE, size=5000))
print(1, flush=True)
sys.stdin.read()
"""
    with running() as daemon, Client(daemon.directory) as client:
        client.store(b"data")
        before, _ = settled(client, daemon)
        for _ in range(5):
            with script_running(None, script, daemon.directory) as killed:
                assert killed.stdout is not None
                assert killed.stdout.readline()
                assert client.status().store.reserved_bytes > 0
                killed.send_signal(signal.SIGKILL)
                killed.wait(20)
            eventually(lambda: client.status().store.reserved_bytes == 0)
        eventually(lambda: settled(client, daemon)[0] <= before)
