"""Around the listener, or with a session of somebody else: every call is refused.

inner.sock is where gRPC itself listens: only the daemon's own relays are served there.
"""

import os
import secrets
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dgcache_proto.v1 import dgcache_pb2 as pb
from dgcached.limits import Limits
from dgcached.registry import Registry, identify
from dgcached.sessions import Session
from tests.support.refused_syscalls import refusing_meanwhile
from tests.support.wire import (
    FOREIGN_UID,
    OWNER_UID,
    SECONDS,
    SPACE,
    Client,
    Daemon,
    as_user,
    eventually,
    poll,
    refused,
    running,
    script_running,
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a second real user is made by root")

DIGEST = bytes(32)
REQUESTS = {
    "Lookup": pb.LookupRequest(deltaspace=SPACE, sha256=DIGEST),
    "ReleaseLease": pb.ReleaseLeaseRequest(),
    "BeginStore": pb.BeginStoreRequest(deltaspace=SPACE, size=1),
    "CommitStore": pb.CommitStoreRequest(),
    "AbortStore": pb.AbortStoreRequest(),
    "Contains": pb.ContainsRequest(deltaspace=SPACE, sha256=DIGEST),
    "Evict": pb.EvictRequest(deltaspace=SPACE),
    "Clear": pb.ClearRequest(),
    "List": pb.ListRequest(),
    "Status": pb.StatusRequest(),
}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """The module's daemon, with the default limits."""
    with running() as shared:
        with Client(shared.directory) as first:  # so that the inner server runs
            assert first.status().pid == shared.pid
        yield shared
        assert shared.process.poll() is None, shared.logged()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """A client of that daemon, and the only one."""
    with Client(daemon.directory) as connected:
        eventually(lambda: connected.status().sessions == 1)
        yield connected


@pytest.mark.parametrize("method", REQUESTS)
def test_09_a_direct_call_is_refused(client: Client, daemon: Daemon, method: str) -> None:
    """Whoever goes around the listener has no identity, even with a session id that is right."""
    with Client(daemon.directory, session=False, rpc="inner/inner.sock") as direct:
        for metadata in ((), client.metadata):
            direct.metadata = metadata
            with refused(grpc.StatusCode.PERMISSION_DENIED):
                direct.call(method, REQUESTS[method])


def test_09_direct_streams_are_refused(client: Client, daemon: Daemon) -> None:
    """In either direction; with the others above these are all the methods that there are."""
    begin = pb.WriteRequest(begin=pb.WriteBegin(deltaspace=SPACE, size=1))
    streams = {
        "Read": pb.ReadRequest(deltaspace=SPACE, sha256=DIGEST),
        "Watch": pb.WatchRequest(follow=True),
        "Write": iter([begin, pb.WriteRequest(data=b"x")]),
    }
    methods = pb.DESCRIPTOR.services_by_name["ReferenceCache"].methods_by_name
    assert streams.keys() | REQUESTS.keys() == set(methods)
    with Client(daemon.directory, session=False, rpc="inner/inner.sock") as direct:
        for metadata in ((), client.metadata):
            direct.metadata = metadata
            for method, request in streams.items():
                with refused(grpc.StatusCode.PERMISSION_DENIED):
                    answer = direct.call(method, request)
                    if method != "Write":
                        list(answer)


def test_09_the_standard_services_are_refused_as_well(daemon: Daemon) -> None:
    """Health and reflection are no way around the check."""
    with Client(daemon.directory, session=False, rpc="inner/inner.sock") as direct:
        with refused(grpc.StatusCode.PERMISSION_DENIED):
            direct.health.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        with refused(grpc.StatusCode.PERMISSION_DENIED):
            list(direct.health.Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS))
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        with refused(grpc.StatusCode.PERMISSION_DENIED):
            list(
                reflection_pb2_grpc.ServerReflectionStub(direct.channel).ServerReflectionInfo(
                    iter([question]), timeout=SECONDS
                )
            )


# Connects to inner.sock by itself, under a name of its choice, and lends the connection to gRPC.
DIRECT = """
import threading
import grpc
from dgcache_proto.v1 import dgcache_pb2 as pb, dgcache_pb2_grpc
path, uid, namespaces, name = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if uid != os.getuid():
    become(uid)
if namespaces:
    libc = ctypes.CDLL(None)
    libc.prctl(4, 1, 0, 0, 0)
    if libc.unshare(namespaces) != 0:
        print("no user namespace")
        sys.exit(0)
relay = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
relay.bind("\\0" + name)
relay.connect(path)
own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
own.bind("")
own.listen(1)

def pump(source, target):
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass

def serve():
    ours, _ = own.accept()
    threading.Thread(target=pump, args=(ours, relay), daemon=True).start()
    pump(relay, ours)

threading.Thread(target=serve, daemon=True).start()
channel = grpc.insecure_channel("unix-abstract:" + own.getsockname()[1:].decode())
try:
    answer = dgcache_pb2_grpc.ReferenceCacheStub(channel).Status(pb.StatusRequest(), timeout=10)
    print("served by", answer.pid)
except grpc.RpcError as error:
    print(error.code().name)
channel.close()
"""
# CLONE_NEWUSER | CLONE_NEWNET: abstract names are unique in one network namespace only
NEW_NAMESPACES = 0x50000000

HOLD = """
connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
connection.connect(sys.argv[1])
connection.send(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
print(len(connection.recv(4096)), flush=True)
sys.stdin.read()
"""


def abstract_names() -> set[str]:
    """Return the random names in use, which every user can list."""
    table = Path("/proc/net/unix").read_text().splitlines()
    names = [line.rpartition("@")[2] for line in table if "@" in line]
    return {name for name in names if len(name) == 32 and set(name) <= set("0123456789abcdef")}


def test_10_a_name_that_was_a_relays_admits_nobody(daemon: Daemon) -> None:
    """A closed abstract name can be bound by anybody; it left the registry before it closed."""
    before = abstract_names()
    with script_running(None, HOLD, daemon.directory / "rpc.sock") as holder:
        assert holder.stdout is not None
        assert poll([holder.stdout.fileno()])
        used = abstract_names() - before
    eventually(lambda: not (used & abstract_names()))
    assert used
    for name in used:
        said = as_user(None, DIRECT, daemon.directory / "inner/inner.sock", os.geteuid(), 0, name)
        assert said == "PERMISSION_DENIED"


@pytest.mark.root
@needs_root
def test_10_another_user_with_the_name_of_a_living_relay_is_refused(short_directory: Path) -> None:
    """In a network namespace of his own he can bind a name that is in use, and with loosened modes
    he reaches inner.sock; he must not pass for its owner."""
    short_directory.chmod(0o755)
    place = short_directory / "s"
    os.chown(short_directory, OWNER_UID, OWNER_UID)
    before = abstract_names()
    with running(place, uid=OWNER_UID), script_running(OWNER_UID, HOLD, place / "rpc.sock") as one:
        assert one.stdout is not None
        assert poll([one.stdout.fileno()])
        place.chmod(0o755)
        inner = place / "inner/inner.sock"
        if inner.exists():
            inner.chmod(0o666)
        names = abstract_names() - before
        assert names
        for name in names:
            with script_running(None, DIRECT, inner, FOREIGN_UID, NEW_NAMESPACES, name) as other:
                said, complaint = other.communicate(timeout=SECONDS)
                if said.startswith("no user namespace"):
                    pytest.skip("an ordinary user gets no namespaces here")
                # its directory is private still: he does not get as far as the registry
                assert said == "", said
                assert "PermissionError" in complaint


@pytest.mark.root
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, which refuses the call")
def test_a_daemon_whose_grpc_accepts_nobody_any_more_ends(short_directory: Path) -> None:
    """gRPC stops accepting for good at ENOMEM; what would serve nobody exits with status 72."""
    with running(limits={"handshake_seconds": 0.5}) as daemon:
        trace = short_directory / "trace"
        with Client(daemon.directory) as first:
            assert first.status().pid == daemon.pid
        with refusing_meanwhile(daemon.pid, "accept4", "ENOMEM", trace, number=1):
            with pytest.raises(grpc.RpcError), Client(daemon.directory, session=False) as client:
                client.stub.Status(pb.StatusRequest(), timeout=2)
            assert daemon.process.wait(SECONDS) == 72
        assert "giving-up" in daemon.logged()


@pytest.mark.root
def test_connections_that_end_at_once_end_nothing(daemon: Daemon) -> None:
    """Many that leave before gRPC could greet them, and a while in which nothing runs."""
    for number in range(90):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as passing:
            passing.settimeout(SECONDS)
            passing.connect(str(daemon.directory / "rpc.sock"))
        if number % 30 == 15:
            daemon.process.send_signal(signal.SIGSTOP)
        if number % 30 == 29:
            daemon.process.send_signal(signal.SIGCONT)
    with Client(daemon.directory) as client:
        eventually(lambda: client.status().connections == 1)
    assert daemon.process.poll() is None
    assert "giving-up" not in daemon.logged()


# -- session ids --------------------------------------------------------------------------------

WRONG_IDS = {
    "empty": "",
    "guessed": secrets.token_hex(16),
    "short": secrets.token_hex(15),
    "not hexadecimal": "z" * 32,
    "longer than any": "0" * 4000,
}


@pytest.mark.parametrize("kind", WRONG_IDS)
@pytest.mark.parametrize("method", ["Lookup", "Status"])
def test_11_a_wrong_session_id_is_refused(client: Client, kind: str, method: str) -> None:
    """Also on calls that need none: an id that is given is always checked."""
    client.metadata = (("dg-session", WRONG_IDS[kind]),)
    with refused(grpc.StatusCode.UNAUTHENTICATED):
        client.call(method, REQUESTS[method])


def test_11_a_wrong_session_id_is_refused_on_streams(client: Client) -> None:
    """In either direction, and on the standard services."""
    metadata = (("dg-session", secrets.token_hex(16)),)
    with refused(grpc.StatusCode.UNAUTHENTICATED):
        list(client.stub.Read(pb.ReadRequest(), metadata=metadata, timeout=SECONDS))
    with refused(grpc.StatusCode.UNAUTHENTICATED):
        client.stub.Write(iter([pb.WriteRequest()]), metadata=metadata, timeout=SECONDS)
    with refused(grpc.StatusCode.UNAUTHENTICATED):
        client.health.Check(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=SECONDS)


def test_11_the_session_of_another_process_is_refused(client: Client, daemon: Daemon) -> None:
    """Who learns an id cannot use it: it belongs to the process that opened the session."""
    script = """
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(sys.argv[1])
print(connection.recv(4096).hex(), flush=True)
sys.stdin.read()
"""
    with script_running(None, script, daemon.directory / "session.sock") as other:
        assert other.stdout is not None
        assert poll([other.stdout.fileno()])
        packet = bytes.fromhex(other.stdout.readline().strip())
        stolen = pb.SessionMessage.FromString(packet).hello.session_id
        assert len(stolen) == 16
        assert client.status().sessions == 2
        client.metadata = (("dg-session", stolen.hex()),)
        with refused(grpc.StatusCode.UNAUTHENTICATED):
            client.call("Lookup", REQUESTS["Lookup"])


def test_11_no_guess_is_told_from_a_worse_one(client: Client) -> None:
    """From no right byte to fifteen, and cut or longer: the same refusal, in the same words."""
    right = client.hello.session_id
    guesses = [right[:length] + bytes(16 - length) for length in range(16) if right[length:]]
    guesses = [guess for guess in guesses if guess != right] + [right[:15], right + b"\0"]
    said = set()
    for guess in guesses:
        client.metadata = (("dg-session", guess.hex()),)
        with refused(grpc.StatusCode.UNAUTHENTICATED) as errors:
            client.call("Lookup", REQUESTS["Lookup"])
        said.add(errors[0].details())
    assert said == {"there is no such session of this process"}
    client.metadata = (("dg-session", right.hex()),)
    assert client.call("Status", REQUESTS["Status"]).sessions == 1


class Untouchable(bytes):
    """An id that nothing may compare or look up byte by byte, since that ends at the first
    difference; only what takes the same time for every guess reads it as a buffer."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("the id was compared with ==")

    def __hash__(self) -> int:
        raise AssertionError("the id was looked up as it is")


def test_11_an_id_is_only_hashed_and_compared_in_constant_time() -> None:
    """What a timing test would have to find in nanoseconds of noise, shown on the very code."""
    registry = Registry()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        session = Session(ours, identify(ours), Limits())
        session.id = Untouchable(session.id)
        registry.add_session(session)
        right = bytes(bytearray(session.id)).hex()
        assert registry.session_of(session.peer, right) is session
        for guess in (right[:30] + "00", secrets.token_hex(16), right[:30], ""):
            assert guess == right or registry.session_of(session.peer, guess) is None
        registry.remove_session(session)
        assert registry.session_of(session.peer, right) is None
