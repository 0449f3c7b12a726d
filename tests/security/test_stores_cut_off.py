"""Case 47: a client that goes away at any step of a store leaves nothing, and the next one fetches.

The client is a process of its own. It is killed, or only its session ends while it lives on with
its pipe and its connection.
"""

import os
import signal
from collections.abc import Iterator

import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.bystander import bystander
from tests.support.wire import (
    SECONDS,
    SPACE,
    Client,
    Daemon,
    eventually,
    running,
    script_running,
    sha256,
)

DATA = bytes(range(256)) * 4096 * 5
DIGEST = sha256(DATA)

# Takes the lease, goes on to a step, says so, and then obeys: "session" ends its session.
WRITER = """
import threading
from pathlib import Path
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import SPACE, Client
from tests.security.test_stores_cut_off import DATA, DIGEST, wanted
client, step = Client(Path(sys.argv[1])), sys.argv[2]
assert client.call("Lookup", wanted(client)).lease.id
if step != "leased":
    request_id, write_end = client.begin(len(DATA), DIGEST)
if step in ("amid the bytes", "committing"):
    os.write(write_end, DATA[:100_000])
if step in ("before the commit", "not closed"):
    left = memoryview(DATA)
    while left:
        left = left[os.write(write_end, left):]
if step == "before the commit":
    os.close(write_end)
if step == "committing":
    call = client.stub.CommitStore.future(
        pb.CommitStoreRequest(request_id=request_id), metadata=client.metadata)
    client.status()
if step == "streaming":
    client.call("AbortStore", pb.AbortStoreRequest(request_id=request_id))
    os.close(write_end)
    begin = pb.WriteBegin(deltaspace=SPACE, size=len(DATA), expected_sha256=DIGEST)
    def messages():
        yield pb.WriteRequest(begin=begin)
        yield pb.WriteRequest(data=DATA[:100_000])
        threading.Event().wait()
    call = client.stub.Write.future(messages())  # dropped, it would be cancelled
    while client.status().stores_in_progress != 1:
        pass
print("there", flush=True)
sys.stdin.readline()
client.session.close()
sys.stdin.read()
"""

STEPS = ["leased", "begun", "amid the bytes", "not closed", "before the commit", "committing"]


def wanted(client: Client) -> pb.LookupRequest:
    """Return the request that takes the lease, or waits for it."""
    return pb.LookupRequest(
        request_id=client.next_id(),
        deltaspace=SPACE,
        sha256=DIGEST,
        on_miss=pb.LookupRequest.ON_MISS_LEASE,
        wait_seconds=600,
    )


@pytest.fixture(scope="module")
def serving() -> Iterator[Daemon]:
    """A daemon whose limits on writers come much later."""
    with running(limits={"deposit_idle_seconds": 90, "commit_seconds": 90}) as daemon:
        yield daemon
        assert daemon.process.poll() is None, daemon.logged()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to count the daemon's descriptors")
@pytest.mark.parametrize(
    ("step", "end"),
    [*((step, end) for step in STEPS for end in ("killed", "session")), ("streaming", "killed")],
)
def test_47_a_client_that_goes_away_leaves_nothing(serving: Daemon, step: str, end: str) -> None:
    """Room, pipe and descriptors are free again, there is no entry, and who waits has the lease."""
    with bystander(serving.directory) as other, Client(serving.directory) as client:
        with other.undisturbed():
            entries = client.status().store.entries
            eventually(lambda: client.status().stores_in_progress == 0)
            before = serving.descriptors()
            with script_running(None, WRITER, serving.directory, step) as writer:
                assert writer.stdout is not None
                assert writer.stdin is not None
                assert writer.stdout.readline() == "there\n"
                assert client.status().leases.held == 1
                assert (client.status().store.reserved_bytes >= len(DATA)) == (step != "leased")
                next_one = client.stub.Lookup.future(
                    wanted(client), timeout=SECONDS, metadata=client.metadata
                )
                eventually(lambda: client.status().leases.waiting == 1)
                if end == "killed":
                    writer.send_signal(signal.SIGKILL)
                else:
                    print("go", file=writer.stdin, flush=True)
                lease = next_one.result(5).lease
                assert lease.id  # handed over at once, not at its deadline of ten minutes
                eventually(lambda: client.status().store.reserved_bytes == 0, 5)
                eventually(lambda: client.status().stores_in_progress == 0, 5)
                assert client.status().store.entries == entries
            # a handout of the bystander may be open at any moment
            eventually(lambda: serving.descriptors() <= before)
            client.call("ReleaseLease", pb.ReleaseLeaseRequest(lease_id=lease.id))
        assert client.status().leases.held == 0
