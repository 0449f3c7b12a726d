"""Whatever happens to the daemon, the user's operation succeeds, and one record says why."""

import dataclasses
import hashlib
import io
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import dgcache
import dgcache.remote
from dgcache import Settings, launcher
from dgcache.cache import ReferenceCache
from dgcache_core.references import Deltaspace, parse_sha256
from dgcache_core.runtime_directory import SESSION_SOCKET
from dgcache_proto.v1 import dgcache_pb2 as pb

DATA = secrets.token_bytes(5 << 20)
DIGEST = hashlib.sha256(DATA).hexdigest()


def works(cache: ReferenceCache) -> None:
    """Put, get, has, fetch, evict: all of it."""
    assert cache.put("bucket", "prefix", DATA) == DIGEST
    assert cache.has("bucket", "prefix", DIGEST)
    with cache.get("bucket", "prefix", DIGEST, verify=True) as reference:
        assert reference.read() == DATA
    with cache.get_or_fetch("bucket", "other", DIGEST, lambda: b"") as reference:
        assert reference.read() == DATA
    cache.evict("bucket", "prefix")
    cache.evict("bucket", "other")
    with pytest.raises(dgcache.CacheMissError):
        cache.get("bucket", "prefix", DIGEST)


def only_record(caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    """The fallback is one record on `dgcache`, however many operations follow."""
    records = [r for r in caplog.records if r.name == "dgcache" and r.levelno >= logging.INFO]
    assert len(records) == 1
    return records[0]


def pid_of(cache: ReferenceCache) -> int:
    return int(cache.status()["pid"])


@pytest.fixture(params=["grpc", "direct"])
def daemon(daemon: Settings, request: pytest.FixtureRequest) -> Settings:
    """A daemon of the test's own, reached by each transport in turn."""
    return dataclasses.replace(daemon, transport=request.param)


@pytest.fixture(autouse=True)
def _hear_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "dgcache")


@pytest.fixture(autouse=True)
def _short_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same deadlines, only shorter: a stopped daemon ends every call at its deadline."""
    monkeypatch.setattr(dgcache.remote, "_LOOKUP_SECONDS", 1.0)
    monkeypatch.setattr(dgcache.remote, "_SHORT_SECONDS", 1.0)
    monkeypatch.setattr(dgcache.remote, "_COMMIT_SECONDS", 1.0)
    monkeypatch.setattr(dgcache.remote, "_PIPE_STALL_SECONDS", 1.0)


def test_absent_is_normal(short_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No socket and no unit: INFO."""
    with dgcache.open(Settings(socket_dir=short_directory / "none")) as cache:
        works(cache)
        assert cache.backend == "memory"
    record = only_record(caplog)
    assert record.levelno == logging.INFO
    assert "dg-cache start" in record.getMessage()


def test_absent_where_a_unit_is_installed_is_a_warning(
    short_directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody expected a daemon."""
    units = short_directory / "systemd/user"
    units.mkdir(parents=True)
    (units / "dg-cached.socket").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(short_directory))
    with dgcache.open(Settings(socket_dir=short_directory / "none")) as cache:
        works(cache)
    assert only_record(caplog).levelno == logging.WARNING


@pytest.mark.parametrize(
    "chosen", [{"backend": "memory"}, {"backend": "filesystem"}, {"ephemeral": True}]
)
def test_a_chosen_backend_is_no_event(
    daemon: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture, chosen: dict[str, object]
) -> None:
    """Who asked for the in-process cache is not told that it is used."""
    settings = Settings(socket_dir=daemon.socket_dir, cache_dir=tmp_path, **chosen)  # type: ignore[arg-type]
    with dgcache.open(settings) as cache:
        works(cache)
        assert cache.backend == chosen.get("backend", "memory")
    assert not [r for r in caplog.records if r.levelno >= logging.INFO]


def test_no_cache_keeps_nothing(daemon: Settings) -> None:
    """The operation in hand has its bytes; the next fetches again."""
    fetched = []

    def fetch() -> bytes:
        fetched.append(1)
        return DATA

    with dgcache.open(Settings(socket_dir=daemon.socket_dir, no_cache=True)) as cache:
        assert cache.put("bucket", "prefix", DATA) == DIGEST
        assert not cache.has("bucket", "prefix", DIGEST)
        for _ in range(2):
            with cache.get_or_fetch("bucket", "prefix", DIGEST, fetch) as reference:
                assert reference.read() == DATA
    assert len(fetched) == 2


def test_a_directory_open_to_others_is_refused(
    daemon: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning has the command that mends it; nothing is sent to the daemon."""
    assert daemon.socket_dir is not None
    daemon.socket_dir.chmod(0o750)
    with dgcache.open(daemon) as cache:
        works(cache)
        assert cache.backend == "memory"
    daemon.socket_dir.chmod(0o700)
    record = only_record(caplog)
    assert record.levelno == logging.WARNING
    assert f"chmod 0700 {daemon.socket_dir}" in record.getMessage()


@contextmanager
def impostor(directory: Path, packet: bytes | None) -> Iterator[list[bytes]]:
    """Listen on session.sock, send `packet` (or nothing), and collect what the client sends."""
    directory.mkdir(mode=0o700)
    received: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(directory / SESSION_SOCKET))
        listener.listen(8)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    if packet is not None:
                        connection.send(packet)
                    connection.settimeout(30)
                    received.append(connection.recv(4096))

        server = threading.Thread(target=serve)
        server.start()
        try:
            yield received
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join(30)


def hello(**fields: int) -> bytes:
    return pb.SessionMessage(
        hello=pb.Hello(session_id=bytes(16), build="9.9", **fields)  # type: ignore[arg-type]
    ).SerializeToString()


@pytest.mark.parametrize(
    ("packet", "says"),
    [
        (hello(protocol=99, oldest_protocol=99), "update the client, then dg-cache restart"),
        (hello(protocol=0, oldest_protocol=0), "update the daemon, then dg-cache restart"),
        (b"\xff\xff garbage \xff", "does not speak our protocol"),
        (None, "does not answer"),
    ],
    ids=["too-new", "too-old", "garbage", "silent"],
)
def test_a_daemon_that_cannot_be_understood_is_left_alone(
    short_directory: Path, caplog: pytest.LogCaptureFixture, packet: bytes | None, says: str
) -> None:
    """Too new, too old, something else, nothing at all: one warning; the client sends no byte."""
    settings = Settings(socket_dir=short_directory / "s")
    with impostor(short_directory / "s", packet) as received, dgcache.open(settings) as cache:
        works(cache)
        assert cache.backend == "memory"
        cache.close()
    record = only_record(caplog)
    assert record.levelno == logging.WARNING
    assert says in record.getMessage()
    assert set(received) <= {b""}


def test_a_daemon_that_pauses_before_the_first_call_is_waited_for(
    daemon: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy host answers the session at once and the HTTP/2 handshake half a second later."""
    monkeypatch.setattr(dgcache.remote, "_SHORT_SECONDS", 10.0)
    with dgcache.open(daemon) as cache:
        pid = pid_of(cache)
    with dgcache.open(daemon) as cache:
        os.kill(pid, signal.SIGSTOP)
        waker = threading.Timer(0.5, os.kill, (pid, signal.SIGCONT))
        waker.start()
        try:
            assert not cache.has("bucket", "prefix", DIGEST)
            assert cache.backend == "dg-cached"
        finally:
            waker.join()


class KillingStream(io.BytesIO):
    """A stream in the middle of which the daemon is killed."""

    def __init__(self, data: bytes, pid: int) -> None:
        super().__init__(data)
        self._pid = pid

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() == 2 << 20:
            os.kill(self._pid, signal.SIGKILL)
        return super().read(size)


def test_the_daemon_killed_in_the_middle_of_a_fetch_loses_no_byte(daemon: Settings) -> None:
    """The bytes were going to the daemon while they came; the user has them all the same."""
    with dgcache.open(daemon) as cache:
        stream = KillingStream(DATA, pid_of(cache))
        with cache.adopt(
            Deltaspace("bucket", "prefix"), parse_sha256(DIGEST), stream, size=len(DATA)
        ) as reference:
            assert reference.read() == DATA
        assert cache.backend == "memory"
        with cache.get("bucket", "prefix", DIGEST) as reference:
            assert reference.read() == DATA


@contextmanager
def killed_while(pid: int) -> Iterator[None]:
    """Stop the daemon, so that the call in the block is in flight for certain; then kill it."""
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    killer.start()
    try:
        yield
    finally:
        killer.join()


@pytest.mark.parametrize("what", ["get", "put"])
def test_kill_9_during_a_call_leaves_the_operation_succeeding(daemon: Settings, what: str) -> None:
    """The call ends at once, not at its deadline, and is repeated in process."""
    with dgcache.open(daemon) as cache:
        cache.put("bucket", "prefix", DATA)
        with killed_while(pid_of(cache)):
            if what == "get":
                with cache.get_or_fetch("bucket", "prefix", DIGEST, lambda: DATA) as reference:
                    assert reference.read() == DATA
            else:
                assert cache.put("bucket", "prefix", DATA) == DIGEST
        assert cache.backend == "memory"
        with cache.get("bucket", "prefix", DIGEST) as reference:
            assert reference.read() == DATA


def test_a_reference_held_when_the_daemon_is_killed_stays_whole(daemon: Settings) -> None:
    """The pages belong to whoever holds them."""
    with dgcache.open(daemon) as cache:
        cache.put("bucket", "prefix", DATA)
        with cache.get("bucket", "prefix", DIGEST) as reference:
            os.kill(pid_of(cache), signal.SIGKILL)
            assert reference.read() == DATA
            assert reference.path.read_bytes() == DATA


def test_a_daemon_that_comes_back_is_used_again(daemon: Settings) -> None:
    """Long-lived processes survive a restart of the daemon and find it again."""
    with dgcache.open(daemon) as cache:
        os.kill(pid_of(cache), signal.SIGKILL)
        works(cache)
        assert cache.backend == "memory"
        assert daemon.socket_dir is not None
        log = daemon.socket_dir.parent / "log" / "dg-cached.log"
        again = launcher.start(
            os.environ | {"DG_CACHE_SOCKET_DIR": str(daemon.socket_dir)},
            daemon.socket_dir,
            log_file=log,
        )
        assert again is not None
        try:
            cache._look_again_at = 0.0  # the pause is over
            works(cache)
            assert cache.backend == "dg-cached"
        finally:
            again.terminate()
            again.wait(30)


def test_the_decision_for_the_fallback_loads_neither_grpc_nor_protobuf(
    short_directory: Path,
) -> None:
    """A process without a daemon pays for neither import."""
    program = """
import sys, dgcache
assert "cryptography" not in sys.modules, "import dgcache loads cryptography"
with dgcache.open() as cache:
    assert cache.backend == "memory"
    digest = cache.put("bucket", "prefix", b"bytes")
    cache.get("bucket", "prefix", digest).close()
loaded = {"grpc", "google.protobuf"} & set(sys.modules)
assert not loaded, loaded
"""
    environment = {**os.environ, "DG_CACHE_SOCKET_DIR": str(short_directory / "none")}
    subprocess.run([sys.executable, "-W", "error", "-c", program], env=environment, check=True)


def test_twenty_processes_at_once_all_get_the_right_bytes(daemon: Settings, tmp_path: Path) -> None:
    """Half of them cold, at the same moment, on one reference."""
    (tmp_path / "reference").write_bytes(DATA)
    program = """
import hashlib, sys, dgcache
path, digest = sys.argv[1:]
with dgcache.open() as cache, cache.get_or_fetch("b", "p", digest, lambda: path) as reference:
    assert hashlib.sha256(reference.buffer()).hexdigest() == digest
    print(cache.backend)
"""
    environment = {
        **os.environ,
        "DG_CACHE_SOCKET_DIR": str(daemon.socket_dir),
        "DG_CACHE_CONNECT_TIMEOUT_MS": "20000",
        "DG_CACHE_TRANSPORT": str(daemon.transport),
    }
    argv = [sys.executable, "-c", program, str(tmp_path / "reference"), DIGEST]
    children = [
        subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(20)
    ]
    backends = [child.communicate(timeout=100)[0].strip() for child in children]
    assert [child.returncode for child in children] == [0] * 20
    assert set(backends) == {"dg-cached"}
    with dgcache.open(daemon) as cache:
        assert cache.status()["store"]["entries"] == 1


def test_elsewhere_than_on_linux_open_says_what_is_missing() -> None:
    """Importing works there, so that a program can be written for both."""
    program = """
import sys
sys.platform = "darwin"
import dgcache
try:
    dgcache.open()
except dgcache.CacheUnavailableError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert "needs Linux" in done.stdout


def test_waiting_for_a_silent_daemon_ends_within_the_budget(short_directory: Path) -> None:
    """The budget is spent once per look, and a look is followed by a pause."""
    with impostor(short_directory / "s", None):
        settings = Settings(socket_dir=short_directory / "s", connect_timeout_ms=300)
        started = time.monotonic()
        with dgcache.open(settings) as cache:
            first = time.monotonic() - started
            cache.put("bucket", "prefix", b"bytes")
            second = time.monotonic() - started - first
    assert first >= 0.3
    assert second < 0.3
