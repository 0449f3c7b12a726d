"""Cases 58 to 60: more than the budget holds, at once, or while somebody holds what must leave.

The kernel's own high-water mark of the daemon's memory says whether the budget was ever exceeded,
not only at the moments when somebody looked.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

import dgcache
from dgcache import Settings
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.bystander import bystander
from tests.support.memory_group import memory_group
from tests.support.wire import (
    MIB,
    SECONDS,
    SPACE,
    Client,
    Daemon,
    eventually,
    own_environment,
    refused,
    running,
    script_running,
)

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, to reset the daemon's high-water mark or limit a group"
)


class HighWater:
    """The most memory a daemon had resident since this was made (proc_pid_clear_refs(5))."""

    def __init__(self, daemon: Daemon) -> None:
        self._proc = Path(f"/proc/{daemon.pid}")
        (self._proc / "clear_refs").write_text("5")
        self._before = self._kib("VmRSS")

    def _kib(self, name: str) -> int:
        lines = (self._proc / "status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])

    def rose_bytes(self) -> int:
        """Return by how much it rose."""
        return (self._kib("VmHWM") - self._before) << 10


def test_58_an_entry_over_the_budget_is_refused_before_a_byte_of_it_is_kept() -> None:
    """48 MiB for a daemon of 4 MiB: it refuses, by pipe and by stream, counts that, and grows by
    next to nothing. The user has put, get and fetch from the cache in his own process; the daemon
    stays in use for what fits."""
    data = os.urandom(48 * MIB)
    digest = hashlib.sha256(data).hexdigest()
    with running(options=("--memory-size-mb", "4")) as daemon, bystander(daemon.directory) as other:
        settings = Settings(socket_dir=daemon.directory, connect_timeout_ms=20_000)
        with dgcache.open(settings) as cache, Client(daemon.directory) as client:
            cache.put("b", "p", b"connected")
            counted, high_water = client.status().store.refused_stores, HighWater(daemon)
            with other.undisturbed():
                assert cache.put("b", "p", data) == digest
                assert client.status().store.refused_stores == counted + 1
                with cache.get("b", "p", digest) as reference:
                    assert (reference.source, reference.read()) == ("memory", data)
                with cache.get_or_fetch("b", "q", digest, lambda: data) as reference:
                    assert reference.read() == data
                with cache.get("b", "p", cache.put("b", "p", b"small")) as reference:
                    assert reference.source == "dg-cached"
                assert cache.backend == "dg-cached"
                counted = client.status().store.refused_stores
                with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
                    client.begin(len(data))
                begin = pb.WriteBegin(deltaspace=SPACE, size=len(data))
                with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
                    client.stub.Write(iter([pb.WriteRequest(begin=begin)]), timeout=SECONDS)
                assert client.status().store.refused_stores == counted + 2
            print("rose by", high_water.rose_bytes() >> 10, "KiB")
            assert high_water.rose_bytes() < 8 * MIB
            assert client.status().store.reserved_bytes == 0


# Begins a store in each of sixteen sessions and ends none, until it is told to go on; then stores
# references of a mebibyte as fast as it can.
STORE = """
import collections, json, queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import grpc
from tests.support.wire import Client, MIB
directory, number = Path(sys.argv[1]), int(sys.argv[2])
os.nice(19)  # it is the daemon's fairness that is tried, not the scheduler's
clients = queue.SimpleQueue()
for _ in range(16):
    clients.put(Client(directory))
print("ready", flush=True)
sys.stdin.readline()
def begin(_):
    client = clients.get()
    try:
        return client, *client.begin(1)
    except grpc.RpcError as error:
        return error.code().name + " " + error.details()
    finally:
        clients.put(client)
def store(one):
    client = clients.get()
    try:
        client.store(number.to_bytes(4, "big") + one.to_bytes(4, "big") * (MIB // 4 - 1))
    except grpc.RpcError as error:
        return error.code().name
    finally:
        clients.put(client)
    return "stored"
with ThreadPoolExecutor(16) as threads:
    begun = list(threads.map(begin, range(16)))
    told = collections.Counter(one for one in begun if isinstance(one, str))
    print(json.dumps([len(begun) - told.total(), told]), flush=True)
    sys.stdin.readline()
    for client, request_id, write_end in (one for one in begun if not isinstance(one, str)):
        os.write(write_end, b"x")
        os.close(write_end)
        client.commit(request_id)
    outcomes = list(threads.map(store, range(125)))
print(*(f"{outcome}={outcomes.count(outcome)}" for outcome in sorted(set(outcomes))), flush=True)
"""
BUDGET_MIB = 48
IN_PROGRESS = "RESOURCE_EXHAUSTED 32 stores are in progress, more are not admitted"


def admitted_and_refused(writer: "subprocess.Popen[str]") -> "tuple[int, Counter[str]]":
    """Return how many of its first stores a process holds, and what it was told of the others."""
    assert writer.stdout is not None
    admitted, told = json.loads(writer.stdout.readline())
    return admitted, Counter(told)


def test_59_a_thousand_stores_at_once_never_exceed_the_budget() -> None:
    """Eight processes with 125 each, over 128 sessions, for a budget of 48: none fails other than
    by a refusal, and neither Status nor the kernel ever saw more than the budget. Of 128 that are
    begun and held, 32 are admitted and 96 refused, each with the limit's own words."""
    with (
        running(
            options=("--memory-size-mb", str(BUDGET_MIB)), limits={"deposit_idle_seconds": 60.0}
        ) as daemon,
        bystander(daemon.directory) as other,
        Client(daemon.directory) as client,
        ExitStack() as stack,
    ):
        writers = [
            stack.enter_context(script_running(None, STORE, daemon.directory, number))
            for number in range(8)
        ]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        most_stores = most_bytes = 0
        with other.undisturbed(may_miss=True, floor_seconds=1.0):
            high_water = HighWater(daemon)
            for writer in writers:
                print("begin", file=writer.stdin, flush=True)
            held = [admitted_and_refused(writer) for writer in writers]
            assert sum(admitted for admitted, _ in held) == client.status().stores_in_progress == 32
            assert sum((told for _, told in held), Counter()) == {IN_PROGRESS: 96}
            for writer in writers:
                print("go", file=writer.stdin, flush=True)
            while any(writer.poll() is None for writer in writers):
                status = client.status()
                store = status.store
                used = store.blob_bytes + store.handout_bytes + store.reserved_bytes
                most_stores = max(most_stores, status.stores_in_progress)
                most_bytes = max(most_bytes, used)
        said = [writer.communicate()[0].split() for writer in writers]
        print(said, "most at once", most_stores, "bytes", most_bytes)
        print("high water rose by", high_water.rose_bytes() >> 20, "MiB")
        outcomes = [outcome.split("=") for line in said for outcome in line]
        assert sum(int(count) for _, count in outcomes) == 1000
        assert {outcome for outcome, _ in outcomes} <= {"stored", "RESOURCE_EXHAUSTED"}
        assert 0 < most_stores <= 32
        assert most_bytes <= BUDGET_MIB * MIB
        # 128 connections take 40 to 50 MiB by themselves
        assert high_water.rose_bytes() <= (BUDGET_MIB + 64) * MIB
        eventually(lambda: client.status().store.reserved_bytes == 0)
        assert client.store(b"afterwards")


def test_59a_a_budget_above_the_groups_limit_is_clamped_and_nobody_is_killed() -> None:
    """4 GiB wanted in a group of 256 MiB: said in the log and in status; 400 MiB of stores later
    the kernel killed nobody."""
    with (
        memory_group(256 * MIB) as group,
        running(prefix=group.prefix, options=("--memory-size-mb", "4096")) as daemon,
        Client(daemon.directory) as client,
    ):
        (said,) = [line for line in daemon.logged().splitlines() if "budget-clamped" in line]
        assert f"effective_memory_bytes={256 * MIB}" in said
        budget = client.status().store.max_bytes
        assert budget < 256 * MIB
        shown = subprocess.run(
            [sys.executable, "-m", "dgcache_cli", "status", "--json"],
            env={**own_environment(), "DG_CACHE_SOCKET_DIR": str(daemon.directory)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        settings = {one["name"]: one for one in json.loads(shown)["settings"]}
        assert "host memory" in settings["DG_CACHE_MEMORY_SIZE_MB"]["origin"]
        for _ in range(100):
            client.store(os.urandom(4 * MIB))
            assert client.status().store.blob_bytes <= budget
        print("budget", budget >> 20, "MiB, used", group.used_bytes() >> 20, "MiB")
        assert daemon.process.poll() is None
        assert group.kills() == 0


# Holds four references and reads them, from the beginning to the end, until it is told to stop.
READ = """
import hashlib
from pathlib import Path
from tests.support.wire import Client, MIB
client, number = Client(Path(sys.argv[1])), int(sys.argv[2])
held = []
for one in range(4):
    data = bytes([number * 16 + one]) * MIB
    held.append((client.lookup(client.store(data)), data))
print("held", flush=True)
rounds, ended = 0, select.poll()
ended.register(0, select.POLLIN)
while not ended.poll(0) or rounds < 10:
    for descriptor, data in held:
        assert b"".join(os.pread(descriptor, 65536, at) for at in range(0, MIB, 65536)) == data
    rounds += 1
print(rounds, flush=True)
"""


def test_60_what_is_held_stays_readable_while_everything_leaves() -> None:
    """Three processes hold and read twelve references while sixteen times the budget is stored:
    not one byte of theirs changes, and the budget holds with what they hold."""
    with (
        running(options=("--memory-size-mb", "32")) as daemon,
        bystander(daemon.directory) as other,
        Client(daemon.directory) as client,
        ExitStack() as stack,
    ):
        readers = [
            stack.enter_context(script_running(None, READ, daemon.directory, number))
            for number in range(3)
        ]
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "held\n"
        assert client.status().store.handouts >= 12
        with other.undisturbed(may_miss=True):
            for _ in range(256):
                client.store(os.urandom(2 * MIB))
                store = client.status().store
                used = store.blob_bytes + store.handout_bytes + store.reserved_bytes
                assert used <= store.max_bytes
        assert client.status().store.evictions > 240
        assert client.status().store.handout_bytes >= 12 * MIB
        for reader in readers:
            said, complaint = reader.communicate("stop\n", timeout=20)
            assert int(said) >= 10, complaint
