"""Every field of the contract at its extremes: a clear error, nothing stored, nothing lost."""

import os

import grpc
import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import MIB, SECONDS, SPACE, Client, Daemon, refused, sha256, trailing

DIGEST = bytes(32)
NAMES = {
    "no bucket": pb.Deltaspace(bucket="", prefix="p"),
    "a bucket of a mebibyte": pb.Deltaspace(bucket="b" * MIB),
    "a bucket of 256 bytes": pb.Deltaspace(bucket="b" * 256),
    "a bucket of 256 bytes in 128 characters": pb.Deltaspace(bucket="é" * 128),
    "a bucket with NUL": pb.Deltaspace(bucket="a\0b"),
    "a prefix of a mebibyte": pb.Deltaspace(bucket="b", prefix="p" * MIB),
    "a prefix of 1025 bytes": pb.Deltaspace(bucket="b", prefix="p" * 1025),
    "a prefix with NUL": pb.Deltaspace(bucket="b", prefix="\0"),
    "nothing": None,
}
DIGESTS = {"none": b"", "short": bytes(31), "long": bytes(33), "a mebibyte": bytes(MIB)}
LONGEST = pb.Deltaspace(bucket="é" * 127 + "b", prefix="\n😀" * 204 + "1234")


@pytest.mark.parametrize("kind", NAMES)
def test_a_wrong_deltaspace_is_an_invalid_argument(client: Client, kind: str) -> None:
    """On every call that names one."""
    space = NAMES[kind]
    requests = {
        "Lookup": pb.LookupRequest(deltaspace=space, sha256=DIGEST),
        "Contains": pb.ContainsRequest(deltaspace=space, sha256=DIGEST),
        "Evict": pb.EvictRequest(deltaspace=space),
        "BeginStore": pb.BeginStoreRequest(deltaspace=space, size=1),
    }
    for method, request in requests.items():
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            client.call(method, request)
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        list(client.stub.Read(pb.ReadRequest(deltaspace=space, sha256=DIGEST), timeout=SECONDS))
    begin = pb.WriteRequest(begin=pb.WriteBegin(deltaspace=space, size=0))
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        client.stub.Write(iter([begin]), timeout=SECONDS)
    assert client.status().store.reserved_bytes == 0


@pytest.mark.parametrize("kind", DIGESTS)
def test_a_wrong_digest_is_an_invalid_argument(client: Client, kind: str) -> None:
    """Where a store has none, it is not known yet; anywhere else that is wrong, too."""
    digest = DIGESTS[kind]
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        client.call("Lookup", pb.LookupRequest(deltaspace=SPACE, sha256=digest))
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        client.call("Contains", pb.ContainsRequest(deltaspace=SPACE, sha256=digest))
    if digest:
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            client.begin(1, digest)
    assert client.status().store.reserved_bytes == 0


def test_the_longest_names_are_served(client: Client, daemon: Daemon) -> None:
    """255 and 1024 bytes of UTF-8, line ends among them: stored, listed, missed with the reason,
    and none of it becomes a line of the log."""
    assert (len(LONGEST.bucket.encode()), len(LONGEST.prefix.encode())) == (255, 1024)
    digest = client.store(b"far down", LONGEST)
    os.close(client.lookup(digest, LONGEST))
    (entry,) = client.call("List", pb.ListRequest()).entries
    assert list(entry.deltaspaces) == [LONGEST]
    with refused(grpc.StatusCode.NOT_FOUND) as errors:
        client.call("Lookup", pb.LookupRequest(deltaspace=LONGEST, sha256=sha256(b"other")))
    assert trailing(errors[0])["dg-miss-reason"] == "digest_changed"
    assert client.call("Evict", pb.EvictRequest(deltaspace=LONGEST)).freed_entries == 1
    assert "😀" not in daemon.logged()


@pytest.mark.parametrize("size", [2**63 - 1, 2**63, 2**64 - 1, 65 * MIB])
def test_a_size_that_cannot_be_is_refused_before_it_is_allocated(client: Client, size: int) -> None:
    """RESOURCE_EXHAUSTED, by pipe and by stream, and no room is taken."""
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
        client.begin(size)
    begin = pb.WriteRequest(begin=pb.WriteBegin(deltaspace=SPACE, size=size))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
        client.stub.Write(iter([begin]), timeout=SECONDS)
    assert client.status().store.reserved_bytes == 0


@pytest.mark.parametrize("request_id", [0, 2**63, 2**64 - 1])
def test_any_request_id_is_the_clients_choice(client: Client, request_id: int) -> None:
    """It comes back with the descriptor, whatever it is."""
    digest = client.store(b"data")
    client.call("Lookup", pb.LookupRequest(request_id=request_id, deltaspace=SPACE, sha256=digest))
    announced, descriptor = client.receive()
    os.close(descriptor)
    assert announced.request_id == request_id
    for method in ("CommitStore", "AbortStore"):
        request = getattr(pb, f"{method}Request")(request_id=request_id)
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            client.call(method, request)


def test_fields_of_a_newer_protocol_are_ignored(client: Client) -> None:
    """A newer client may say more than this daemon knows."""
    call = client.channel.unary_unary("/dgcache.v1.ReferenceCache/Contains")
    known = pb.ContainsRequest(deltaspace=SPACE, sha256=DIGEST).SerializeToString()
    unknown = b"\xf2\x7f\x03new"
    answer = call(known + unknown, timeout=SECONDS, metadata=client.metadata)
    assert pb.ContainsResponse.FromString(answer).miss_reason == "unknown"
