"""`Clear` with `rekey`: as the kernel shows it, and among clients that are in the middle of it."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.key_memory import copies_of, key_regions, keys_of
from tests.support.refused_syscalls import MEMFD_SECRET, refusing
from tests.support.wire import MIB, Client, Daemon, eventually, refused, running


def space(number: int) -> pb.Deltaspace:
    """Return a deltaspace for each entry."""
    return pb.Deltaspace(bucket="b", prefix=str(number))


def rekey(client: Client) -> pb.ClearResponse:
    """Make every key anew."""
    answer: pb.ClearResponse = client.call("Clear", pb.ClearRequest(rekey=True))
    return answer


def test_a_rekey_frees_everything_and_is_logged(client: Client, daemon: Daemon) -> None:
    """The daemon goes on with other keys, of the same kind; a clear alone logs nothing."""
    kind = client.status().hardening.keys
    client.store(b"one", space(1))
    client.store(b"other", space(2))
    client.call("Clear", pb.ClearRequest())
    assert "rekeyed" not in daemon.logged()
    client.store(b"one", space(1))
    client.store(b"other", space(2))
    assert rekey(client) == pb.ClearResponse(freed_entries=2, freed_bytes=8)
    assert client.status().store.entries == 0
    assert client.status().hardening.keys == kind
    os.close(client.lookup(client.store(b"one")))
    assert f"rekeyed keys={kind}" in daemon.logged()


@pytest.mark.root
def test_no_copy_of_an_old_key_is_left_in_the_process() -> None:
    """Root reads all of a daemon's memory: each key that serves is there once, in the region of
    keys; after a rekey none of them is there, and others serve."""
    with (
        running(prefix=refusing(MEMFD_SECRET)) as daemon,  # whose pages not even root can read
        Client(daemon.directory) as client,
    ):
        for number in range(3):
            digest = client.store(os.urandom(5 * MIB + number), space(number))
            for _ in range(3):
                os.close(client.lookup(digest, space(number)))
                eventually(lambda: client.status().store.handouts == 0)
        keys = keys_of(daemon.pid)
        assert copies_of(daemon.pid, keys) == dict.fromkeys(keys, 1)
        assert len(keys) == 3
        rekey(client)
        assert copies_of(daemon.pid, keys) == dict.fromkeys(keys, 0)
        os.close(client.lookup(client.store(os.urandom(MIB))))
        (key,) = keys_of(daemon.pid)
        assert key not in keys


@pytest.mark.root
def test_the_old_region_is_unmapped_once_the_last_store_lets_go() -> None:
    """A store in progress keeps it, is refused at its commit, and takes it away with it."""
    with running() as daemon, Client(daemon.directory) as client:
        request_id, write_end = client.begin(1000)
        rekey(client)
        assert len(key_regions(daemon.pid)) == 2
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(bytes(1000))
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED) as error:
            client.commit(request_id)
        assert "rotated" in str(error[0].details())
        assert len(key_regions(daemon.pid)) == 1
        status = client.status().store
        assert (status.entries, status.reserved_bytes, status.refused_stores) == (0, 0, 1)
        assert client.store(bytes(1000))


@pytest.mark.root
def test_clients_in_the_middle_of_it_hear_a_clear_answer(client: Client, daemon: Daemon) -> None:
    """Two store and two look up while a fifth rekeys: served, a miss, or no room; no other answer,
    no wrong byte, and the daemon lives on with one region of keys."""
    data = [os.urandom(size) for size in (1, 1000, 3 * MIB)]
    known: dict[bytes, bytes] = {}
    ended = threading.Event()
    heard: set[str] = set()

    def work(act: str) -> None:
        with Client(daemon.directory) as mine:
            while not ended.is_set():
                for one in data if act == "stored" else list(known):
                    try:
                        if act == "stored":
                            known[mine.store(one)] = one
                        else:
                            descriptor = mine.lookup(one)
                            assert os.pread(descriptor, 4 * MIB, 0) == known[one]
                            os.close(descriptor)
                        heard.add(act)
                    except grpc.RpcError as error:
                        heard.add(error.code().name)

    with ThreadPoolExecutor(4) as threads:
        workers = [threads.submit(work, act) for act in ("stored", "found") * 2]
        try:
            turns = 0
            while turns < 100 or not heard >= {"stored", "found", "NOT_FOUND"}:
                rekey(client)
                turns += 1
                assert turns < 5000
                assert not any(worker.done() for worker in workers)
        finally:
            ended.set()
        for worker in workers:
            worker.result()
    assert heard <= {"stored", "found", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
    eventually(lambda: client.status().store.reserved_bytes == 0)
    assert len(key_regions(daemon.pid)) == 1
    rekey(client)
    assert client.status().store.entries == 0
