"""Cases 55 to 57: no key is used twice, and a lease's deadline is by the clock that counts suspend.

Keys are never written down: of every (key, nonce) there is a hash under a secret of the moment.
"""

import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dgcache_core import aead
from dgcache_core.memory_store import MemoryStore
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.core.support import RELEASES, get, put
from tests.support.turned_clocks import TurnedClocks, turned_clocks
from tests.support.wire import MIB, SECONDS, SPACE, Client, Daemon, eventually, running, sha256

STORES = 100_000
YEAR = 366 * 86_400
LEASE_SECONDS = 100


@dataclass
class Used:
    """What was encrypted: keys, and (key, nonce) pairs, as hashes; and what came of it."""

    keys: list[bytes] = field(default_factory=list)
    pairs: list[bytes] = field(default_factory=list)
    sealed: list[bytes] = field(default_factory=list)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    def hash(self, *parts: Any) -> bytes:
        made = hashlib.blake2b(digest_size=16, key=self.secret)
        for part in parts:
            made.update(part)
        return made.digest()


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Used:
    """Listens at the one function that encrypts, which goes on encrypting."""
    seen, encrypt = Used(), aead._encrypt_into

    def listening(
        key: memoryview, nonce: bytes, plain: memoryview, associated: bytes, out: memoryview
    ) -> None:
        encrypt(key, nonce, plain, associated, out)
        seen.keys.append(seen.hash(key))
        seen.pairs.append(seen.hash(key, nonce))
        seen.sealed.append(seen.hash(out))

    monkeypatch.setattr(aead, "_encrypt_into", listening)
    return seen


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    """Room for 64, so that slots are used again all the time."""
    made = MemoryStore(4 * MIB, 86_400.0, may_fork=True, max_entries=64)
    yield made
    made.close()


def test_55_no_key_and_nonce_is_used_twice_in_100_000_stores(
    store: MemoryStore, used: Used
) -> None:
    """Each has one chunk and one seal under a key that no other has; slots are used again."""
    for number in range(STORES):
        put(store, b"%d" % (number % 1000))
    assert len(used.pairs) == 2 * STORES
    assert len(set(used.pairs)) == 2 * STORES
    assert len(set(used.keys)) == STORES


def test_55_the_chunks_of_one_blob_have_a_nonce_each(store: MemoryStore, used: Used) -> None:
    """One key, and as many nonces as chunks, and one of the seal."""
    put(store, bytes(MIB + 1))
    assert len(used.pairs) == len(set(used.pairs)) == 3
    assert len(set(used.keys)) == 1


@pytest.mark.parametrize("between", ["nothing", "evict", "clear", "rekey"])
def test_56_the_same_digest_stored_again_has_a_new_key(
    store: MemoryStore, used: Used, between: str
) -> None:
    """Whether the first is still there or not; nothing of the ciphertext is the same."""
    for _ in range(3):
        digest = put(store, b"the same bytes")
        assert get(store, digest) == b"the same bytes"
        if between == "evict":
            store.evict(RELEASES)
        elif between != "nothing":
            store.clear(rekey=between == "rekey")
    assert len(set(used.keys)) == 3
    assert len(set(used.sealed)) == len(used.sealed) == 6


# -- 57 --------------------------------------------------------------------------------------------


@pytest.fixture
def clocks(short_directory: Path) -> Iterator[TurnedClocks]:
    with turned_clocks(short_directory) as made:
        yield made


@pytest.fixture
def own(clocks: TurnedClocks) -> Iterator[Daemon]:
    """A daemon under these clocks."""
    limits = {"lease_seconds": float(LEASE_SECONDS)}
    with running(limits=limits, prefix=clocks.prefix) as daemon:
        yield daemon


def request(client: Client, digest: bytes) -> pb.LookupRequest:
    return pb.LookupRequest(
        request_id=client.next_id(),
        deltaspace=SPACE,
        sha256=digest,
        on_miss=pb.LookupRequest.ON_MISS_LEASE,
        wait_seconds=600,
    )


def let_it_look(client: Client, name: bytes) -> None:
    """Ask for something else, and give it back: whoever asks makes the table look at its clock."""
    lease = client.call("Lookup", request(client, sha256(name))).lease
    client.call("ReleaseLease", pb.ReleaseLeaseRequest(lease_id=lease.id))


def test_57_a_lease_ends_by_the_clock_that_counts_suspend(
    clocks: TurnedClocks, own: Daemon
) -> None:
    """The wall clock ten years off in either direction ends nothing and prolongs nothing; 90
    seconds of suspend end nothing, 101 pass it on to who waits, who need not ask again."""
    wanted = sha256(b"wanted")
    with (
        Client(own.directory) as holder,
        Client(own.directory) as waiter,
        Client(own.directory) as third,
    ):
        assert holder.call("Lookup", request(holder, wanted)).lease.id
        answer = waiter.stub.Lookup.future(
            request(waiter, wanted), timeout=3 * SECONDS, metadata=waiter.metadata
        )
        eventually(lambda: third.status().leases.waiting == 1)
        for number, (wall, boot) in enumerate([(10, 0), (-10, 0), (0, 0), (10, 90), (-10, 90)]):
            clocks.turn(wall=wall * YEAR, boot=boot)
            let_it_look(third, b"other %d" % number)
            leases = third.status().leases
            assert (leases.held, leases.waiting, leases.expired) == (1, 1, 0), (wall, boot)
            assert not answer.done()
        clocks.turn(wall=-10 * YEAR, boot=LEASE_SECONDS + 1)
        assert answer.result(SECONDS).lease.id
        leases = third.status().leases
        assert (leases.held, leases.waiting, leases.expired) == (1, 0, 1)
