"""Handouts: sealed, read-only, shared while held, gone when nobody holds them."""

import mmap
import os
import shutil
import signal
from pathlib import Path

import grpc
import pytest

from dgcache_core.sealed_files import require_sealed
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.refused_syscalls import refusing_meanwhile
from tests.support.wire import (
    MIB,
    SPACE,
    Client,
    Daemon,
    eventually,
    refused,
    running,
    script_running,
    sha256,
)

DATA = os.urandom(2 * MIB + 3)


@pytest.fixture
def handout(client: Client) -> int:
    """A held handout of DATA."""
    return client.lookup(client.store(DATA))


def test_a_held_blob_is_decrypted_once(client: Client) -> None:
    """Later hits share the plaintext; once nobody holds it the next hit decrypts anew."""
    digest = client.store(DATA)
    before = client.status().store.shared_hits
    held = [client.lookup(digest) for _ in range(4)]
    status = client.status().store
    assert status.shared_hits - before == 3
    assert status.handouts == 1
    assert len({os.fstat(descriptor).st_ino for descriptor in held}) == 1
    for descriptor in held:
        os.close(descriptor)
    eventually(lambda: client.status().store.handouts == 0)
    os.close(client.lookup(digest))
    assert client.status().store.shared_hits - before == 3


@pytest.mark.root
def test_a_handout_nobody_holds_is_closed_without_being_asked(
    client: Client, daemon: Daemon
) -> None:
    """Plaintext is in memory only while somebody wants it: the daemon's descriptor goes by itself,
    with no call that would make it look."""
    digest = client.store(DATA)
    before = daemon.descriptors()
    descriptor = client.lookup(digest)
    assert daemon.descriptors() == before + 1
    os.close(descriptor)
    eventually(lambda: daemon.descriptors() == before, 5)


@pytest.mark.parametrize("way", ["mapped", "in another process", "unread"])
def test_every_way_of_holding_counts(client: Client, way: str) -> None:
    """A mapping without a descriptor, a process that got it from us, a packet not yet read."""
    digest = client.store(DATA)
    if way == "unread":
        client.call("Lookup", pb.LookupRequest(request_id=77, deltaspace=SPACE, sha256=digest))
        assert client.status().store.handouts == 1
        os.close(client.receive()[1])
    else:
        descriptor = client.lookup(digest)
        if way == "mapped":
            mapping = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
            os.close(descriptor)
            assert client.status().store.handouts == 1
            assert mapping[:] == DATA
            mapping.close()
        else:
            script = f"kept = os.open('/proc/{os.getpid()}/fd/{descriptor}', os.O_RDONLY)\n"
            with script_running(None, script + "print(1, flush=True)\nsys.stdin.read()") as holder:
                assert holder.stdout is not None
                assert holder.stdout.readline()
                os.close(descriptor)
                assert client.status().store.handouts == 1
                holder.send_signal(signal.SIGKILL)
    eventually(lambda: client.status().store.handout_bytes == 0)


@pytest.mark.parametrize("method", ["Clear", "Evict"])
def test_what_is_held_survives_what_frees_its_entry(client: Client, method: str) -> None:
    """It counts against the budget until its holder lets go."""
    descriptor = client.lookup(client.store(DATA))
    client.call(
        method, pb.ClearRequest() if method == "Clear" else pb.EvictRequest(deltaspace=SPACE)
    )
    status = client.status().store
    assert (status.entries, status.handouts) == (0, 1)
    assert status.handout_bytes >= len(DATA)
    assert os.pread(descriptor, len(DATA), 0) == DATA
    os.close(descriptor)
    eventually(lambda: client.status().store.handout_bytes == 0)


def test_what_is_held_survives_the_daemon() -> None:
    """kill -9 takes the daemon's memory, not its clients'."""
    with running() as daemon, Client(daemon.directory) as client:
        descriptor = client.lookup(client.store(DATA))
        assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
        require_sealed(descriptor, len(DATA))
        assert os.pread(descriptor, len(DATA), 0) == DATA
        os.close(descriptor)


@pytest.mark.root
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, which refuses the calls")
def test_a_kernel_that_does_not_tell_who_holds_what_costs_only_the_sharing(
    client: Client, daemon: Daemon, short_directory: Path
) -> None:
    """While fcntl(2) has no memory handouts stay, calls are answered, and the log says so once."""
    digest = client.store(DATA)
    held = client.lookup(digest)
    trace = short_directory / "trace"
    with refusing_meanwhile(daemon.pid, "fcntl", "ENOMEM", trace) as called:
        os.close(client.lookup(digest))  # the plaintext is there: it is shared
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):  # no seal without fcntl(2): no handout
            client.lookup(client.store(b"another"))
        eventually(lambda: called().count("F_SETSIG") > 2)
        os.close(held)
        assert client.status().store.handouts == 1
    eventually(lambda: client.status().store.handouts == 0)
    os.close(client.lookup(digest))
    os.close(client.lookup(sha256(b"another")))
    assert daemon.logged().count("sweep-failed") == 1
