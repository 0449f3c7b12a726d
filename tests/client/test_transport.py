"""Calls go over gRPC or straight on the session; which, the setting and the daemon decide."""

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import dgcache
import dgcache.session
from dgcache import Settings
from dgcache.claims import Claim
from dgcache.connecting import connect
from dgcache.grpc_transport import GrpcTransport
from dgcache.session import Session
from dgcache.transports import DirectTransport, transport_on
from dgcache_core.errors import CacheUnavailableError
from dgcache_core.references import Deltaspace, parse_sha256
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import eventually, running

DEEP = 60
"""Names of 255 bytes in a deltaspace: enough of them do not fit into a packet."""


def asked_by(settings: Settings, wanted: str | None) -> type:
    """Return what carries the calls."""
    daemon = connect(dataclasses.replace(settings, transport=wanted))
    try:
        daemon.status()
        return type(daemon._transport)
    finally:
        daemon.close()


def test_the_setting_chooses_and_the_sdk_goes_over_grpc(daemon: Settings) -> None:
    """A process of a few calls asks for auto: the session, where the daemon takes calls there."""
    assert asked_by(daemon, None) is GrpcTransport
    assert asked_by(daemon, "grpc") is GrpcTransport
    assert asked_by(daemon, "direct") is DirectTransport
    assert asked_by(daemon, "auto") is DirectTransport
    assert Settings().for_one_shot().transport == "auto"
    assert Settings(transport="grpc").for_one_shot().transport == "grpc"


def test_an_older_daemon_is_asked_over_grpc_unless_that_is_forbidden(daemon: Settings) -> None:
    """Its Hello tells; nothing is sent on its session, which would end it."""
    session = Session.connect(daemon.socket_dir, os.environ, 5.0)
    try:
        session.hello.protocol = 1
        assert isinstance(transport_on(session, "auto"), GrpcTransport)
        assert isinstance(transport_on(session, "grpc"), GrpcTransport)
        with pytest.raises(CacheUnavailableError, match="DG_CACHE_TRANSPORT=auto"):
            transport_on(session, "direct")
    finally:
        session.close()


def test_what_does_not_fit_into_a_packet_is_asked_over_grpc(daemon: Settings) -> None:
    """A list of long names, on a cache that otherwise needs no channel."""
    with dgcache.open(dataclasses.replace(daemon, transport="direct")) as cache:
        digest = cache.put("b", "", b"bytes")
        for number in range(DEEP):
            cache.get("b", f"{number:0>255}", digest).close()
        (entry,) = cache.entries()
        assert entry.sha256 == digest
        assert {d.bucket for d in entry.deltaspaces} == {"b"}
        assert len(entry.deltaspaces) == DEEP + 1


def test_events_are_streamed_whatever_the_transport(daemon: Settings) -> None:
    """By gRPC, which has streams."""
    backend = connect(dataclasses.replace(daemon, transport="direct"))
    try:
        assert list(backend.events(follow=False)) == []
    finally:
        backend.close()


def test_a_thread_that_waits_on_the_session_ends_with_its_cache(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing it wakes who waits for somebody's fetch, long before the wait is over."""
    monkeypatch.setattr(dgcache.session, "_SILENCE_SECONDS", 600.0)
    with running(short_directory / "s"):
        settings = Settings(
            socket_dir=short_directory / "s", connect_timeout_ms=20_000, transport="direct"
        )
        holder, waiter = connect(settings), connect(settings)
        try:
            space, digest = Deltaspace("b", "p"), parse_sha256("ab" * 32)
            claim = holder.get_or_lease(space, digest, 0.0)
            ended: list[BaseException] = []

            def wait() -> None:
                try:
                    waiter.get_or_lease(space, digest, 600.0)
                except CacheUnavailableError as error:
                    ended.append(error)

            thread = threading.Thread(target=wait)
            thread.start()
            eventually(lambda: holder.status()["leases"]["waiting"] == 1)
            waiter.close()
            thread.join(20)
            assert len(ended) == 1
            eventually(lambda: holder.status()["leases"]["waiting"] == 0)
            assert isinstance(claim, Claim)
        finally:
            holder.close()


@pytest.mark.parametrize("transport", ["direct", "auto"])
def test_a_process_that_asks_on_the_session_loads_no_grpc(daemon: Settings, transport: str) -> None:
    """Nor asyncio, nor cryptography, whatever it stores, gets, waits for and asks."""
    program = """
import sys, dgcache
with dgcache.open() as cache:
    digest = cache.put("bucket", "prefix", b"bytes")
    cache.get("bucket", "prefix", digest).close()
    assert cache.has("bucket", "prefix", digest)
    assert [entry.sha256 for entry in cache.entries()] == [digest]
    assert cache.status()["store"]["entries"] == 1
    cache.evict("bucket", "prefix")
    assert cache.backend == "dg-cached"
loaded = {"grpc", "asyncio", "cryptography"} & set(sys.modules)
assert not loaded, loaded
"""
    environment = {
        **os.environ,
        "DG_CACHE_SOCKET_DIR": str(daemon.socket_dir),
        "DG_CACHE_CONNECT_TIMEOUT_MS": "20000",
        "DG_CACHE_TRANSPORT": transport,
    }
    subprocess.run([sys.executable, "-W", "error", "-c", program], env=environment, check=True)


_CLASSES = """
import sys
if sys.argv[1] == "full first":
    from dgcache_proto.v1 import dgcache_pb2
from dgcache_proto import messages
light = {name: getattr(messages, name) for name in sys.argv[3:]}
assert ("google.protobuf.text_format" not in sys.modules) == (sys.argv[2] == "light")
from dgcache_proto.v1 import dgcache_pb2
for name, kind in light.items():
    assert kind is getattr(dgcache_pb2, name), name
assert messages.LookupRequest.ON_MISS_LEASE == dgcache_pb2.LookupRequest.ON_MISS_LEASE
assert not hasattr(messages, "NoSuchMessage")
"""


@pytest.mark.parametrize(
    ("order", "expected", "runtime"),
    [
        ("light first", "light", "upb"),
        ("full first", "full", "upb"),
        ("light first", "full", "python"),
    ],
)
def test_the_light_messages_are_the_full_ones(order: str, expected: str, runtime: str) -> None:
    """The same classes, whichever module comes first, and whatever runtime protobuf has."""
    names = sorted(pb.DESCRIPTOR.message_types_by_name)
    environment = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": runtime}
    argv = [sys.executable, "-c", _CLASSES, order, expected, *names]
    subprocess.run(argv, env=environment, check=True)
