"""The calls of the contract, one by one: what they do, and each error they document."""

import os

import grpc
import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import MIB, SPACE, Client, refused, running, sha256, trailing

OTHER_SPACE = pb.Deltaspace(bucket="bucket", prefix="")


def lookup(digest: bytes, deltaspace: pb.Deltaspace = SPACE) -> pb.LookupRequest:
    return pb.LookupRequest(request_id=1, deltaspace=deltaspace, sha256=digest)


def contains(client: Client, digest: bytes, deltaspace: pb.Deltaspace = SPACE) -> tuple[bool, str]:
    request = pb.ContainsRequest(deltaspace=deltaspace, sha256=digest)
    answer = client.call("Contains", request)
    return answer.contained, answer.miss_reason


def miss(client: Client, digest: bytes, deltaspace: pb.Deltaspace = SPACE) -> str:
    """Return the reason of a miss, which Lookup, Read and Contains must agree on."""
    with refused(grpc.StatusCode.NOT_FOUND) as errors:
        client.call("Lookup", lookup(digest, deltaspace))
    with refused(grpc.StatusCode.NOT_FOUND) as more:
        list(client.stub.Read(pb.ReadRequest(deltaspace=deltaspace, sha256=digest), timeout=10))
    (reason,) = {trailing(error)["dg-miss-reason"] for error in errors + more}
    assert contains(client, digest, deltaspace) == (False, reason)
    return reason


def test_what_was_stored_is_handed_out(client: Client) -> None:
    """By BeginStore, the pipe and CommitStore; then by Lookup."""
    data = os.urandom(3 * MIB + 5)
    digest = client.store(data)
    assert digest == sha256(data)
    assert contains(client, digest) == (True, "")
    with os.fdopen(client.lookup(digest), "rb") as handout:
        assert handout.read() == data
    with refused(grpc.StatusCode.NOT_FOUND):
        client.call("Lookup", lookup(sha256(b"another")))


def test_a_digest_is_found_from_every_deltaspace(client: Client) -> None:
    """References are content-addressed; the deltaspace says where one belongs."""
    digest = client.store(b"shared")
    os.close(client.lookup(digest, OTHER_SPACE))
    (entry,) = client.call("List", pb.ListRequest()).entries
    assert sorted(d.prefix for d in entry.deltaspaces) == ["", "releases"]


def test_a_miss_says_why(client: Client) -> None:
    """The reason is in the trailing metadata, in the contract's own words."""
    unheard = pb.Deltaspace(bucket="unheard")
    assert miss(client, sha256(b"never"), unheard) == "unknown"
    digest = client.store(b"first")
    assert miss(client, sha256(b"never")) == "digest_changed"
    client.call("Evict", pb.EvictRequest(deltaspace=SPACE))
    assert miss(client, digest) == "evicted"
    misses = client.status().store.misses
    assert misses["evicted"] >= 2
    assert misses["digest_changed"] >= 2


def test_what_expired_is_missing_for_that_reason() -> None:
    """After its time to live, which is counted from the store."""
    options = ("--memory-size-mb", "8", "--ttl-seconds", "1")
    with running(options=options) as daemon, Client(daemon.directory) as client:
        digest = client.store(b"short-lived")
        (entry,) = client.call("List", pb.ListRequest()).entries
        assert 0 < entry.expires_in_seconds <= 1
        while contains(client, digest)[0]:
            pass
        assert miss(client, digest) == "expired"
        assert client.status().store.expirations == 1


def test_what_is_too_large_is_refused_and_remembered() -> None:
    """Before any byte is sent; a later miss of that digest names it."""
    with (
        running(options=("--memory-size-mb", "4")) as daemon,
        Client(daemon.directory) as client,
    ):
        most = client.hello.limits.max_entry_bytes
        digest = sha256(b"large")
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            client.begin(most + 1, digest)
        assert miss(client, digest) == "too_large"
        assert client.status().store.refused_stores == 1
        assert client.status().store.reserved_bytes == 0
        data = os.urandom(most)
        with os.fdopen(client.lookup(client.store(data)), "rb") as handout:
            assert handout.read() == data


def test_no_room_for_the_plaintext_is_said() -> None:
    """What clients hold is never taken from them to make room."""
    with (
        running(options=("--memory-size-mb", "8")) as daemon,
        Client(daemon.directory) as client,
    ):
        held = [client.lookup(client.store(os.urandom(2 * MIB))) for _ in range(2)]
        digest = client.store(os.urandom(2 * MIB))
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            client.call("Lookup", lookup(digest))
        status = client.status().store
        assert status.blob_bytes + status.handout_bytes + status.reserved_bytes <= status.max_bytes
        for descriptor in held:
            assert len(os.pread(descriptor, 2 * MIB, 0)) == 2 * MIB
            os.close(descriptor)


def test_evict_frees_what_serves_no_other_deltaspace(client: Client) -> None:
    """A blob that another deltaspace is bound to stays."""
    kept, freed = client.store(b"kept"), client.store(b"freed")
    os.close(client.lookup(kept, OTHER_SPACE))
    answer = client.call("Evict", pb.EvictRequest(deltaspace=SPACE))
    assert (answer.freed_entries, answer.freed_bytes) == (1, len(b"freed"))
    assert contains(client, kept, OTHER_SPACE) == (True, "")
    assert contains(client, freed)[0] is False
    again = client.call("Evict", pb.EvictRequest(deltaspace=SPACE))
    assert (again.freed_entries, again.freed_bytes) == (0, 0)


def test_clear_frees_every_entry(client: Client) -> None:
    """And says how much of it there was."""
    for data in (b"1", b"22", b""):
        client.store(data)
    answer = client.call("Clear", pb.ClearRequest())
    assert (answer.freed_entries, answer.freed_bytes) == (3, 3)
    status = client.status().store
    assert (status.entries, status.bindings, status.blob_bytes) == (0, 0, 0)


def pages(client: Client, size: int) -> list[list[bytes]]:
    """Read a list page by page."""
    read: list[list[bytes]] = []
    more, after = True, b""
    while more:
        answer = client.call("List", pb.ListRequest(page_size=size, after_sha256=after))
        read.append([entry.sha256 for entry in answer.entries])
        more, after = answer.more, read[-1][-1]
    return read


def test_a_list_comes_in_pages_and_in_order(client: Client) -> None:
    """No entry twice and none left out, whatever the page's size."""
    digests = sorted(client.store(bytes([number])) for number in range(7))
    assert pages(client, 3) == [digests[:3], digests[3:6], digests[6:]]
    assert pages(client, 7) == [digests]
    assert pages(client, 0) == [digests]
    assert pages(client, 2**32 - 1) == [digests]
    last = client.call("List", pb.ListRequest(after_sha256=digests[-1]))
    assert (list(last.entries), last.more) == ([], False)
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        client.call("List", pb.ListRequest(after_sha256=b"short"))


def test_a_page_fits_into_a_message_however_long_the_names_are() -> None:
    """A hundred deltaspaces of the longest names are 128 KiB of one entry."""
    with (
        running(limits={"message_bytes": 200_000}) as daemon,
        Client(daemon.directory) as client,
    ):
        digests = sorted(client.store(bytes([number])) for number in range(3))
        for number in range(100):
            space = pb.Deltaspace(bucket="b" * 255, prefix=f"{number:0>1024}")
            for digest in digests:
                list(client.stub.Read(pb.ReadRequest(deltaspace=space, sha256=digest)))
        assert [digest for page in pages(client, 0) for digest in page] == digests


def test_an_entry_tells_its_story(client: Client) -> None:
    """Size, ages in seconds, hits, who stored it, and whether somebody holds it now."""
    digest = client.store(b"12345")
    handout = client.lookup(digest)
    (entry,) = client.call("List", pb.ListRequest()).entries
    assert (entry.sha256, entry.size, entry.hits, entry.held) == (digest, 5, 1, True)
    assert entry.stored_by == f"uid {os.geteuid()} pid {os.getpid()}"
    assert 0 <= entry.idle_seconds <= entry.age_seconds < 60
    assert 86_000 < entry.expires_in_seconds <= 86_400
    os.close(handout)
    (entry,) = client.call("List", pb.ListRequest()).entries
    assert entry.held is False


def test_status_counts_what_happened(client: Client) -> None:
    """Every counter moves by what was done, and gauges go back."""
    before = client.status().store
    digest = client.store(b"x" * 10_000)
    first, second = client.lookup(digest), client.lookup(digest)
    now = client.status()
    assert now.store.stores - before.stores == 1
    assert now.store.stored_bytes - before.stored_bytes == 10_000
    assert now.store.hits - before.hits == 2
    assert now.store.shared_hits - before.shared_hits == 1
    assert now.store.hit_bytes - before.hit_bytes == 20_000
    assert (now.store.entries, now.store.handouts, now.store.handout_bytes) == (1, 1, 12_288)
    assert (now.sessions, now.stores_in_progress, now.protocol) == (1, 0, 2)
    assert now.connections >= 1
    os.close(first)
    os.close(second)
    assert client.status().store.handout_bytes == 0


@pytest.mark.parametrize("method", ["Nothing", "lookup"])
def test_a_call_that_does_not_exist_is_unimplemented(client: Client, method: str) -> None:
    """As gRPC has it: a newer client can tell an older daemon."""
    call = client.channel.unary_unary(f"/dgcache.v1.ReferenceCache/{method}")
    with refused(grpc.StatusCode.UNIMPLEMENTED):
        call(b"", timeout=10, metadata=client.metadata)
