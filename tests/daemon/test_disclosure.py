"""What the process lets others see: nothing of it, and nothing of its clients in its words."""

import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import text_format

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import (
    OWNER_UID,
    SECONDS,
    SPACE,
    Client,
    Daemon,
    as_user,
    connected,
    eventually,
    refused,
    running,
)


def test_the_kernel_says_what_status_says(client: Client, daemon: Daemon) -> None:
    """umask 0077, no core, not dumpable: as the kernel has it, not as the daemon believes."""
    process = Path("/proc") / str(daemon.pid)
    status = dict(
        line.split(":\t", 1)
        for line in (process / "status").read_text().splitlines()
        if "\t" in line
    )
    assert status["Umask"] == "0077"
    (core,) = re.findall(
        r"^Max core file size +(\S+) +(\S+)", (process / "limits").read_text(), re.M
    )
    assert core == ("0", "0")
    hardening = client.status().hardening
    assert (hardening.umask, hardening.core_limit_bytes, hardening.dumpable) == (0o077, 0, False)
    assert hardening.shares_handouts is True
    assert hardening.keys in {"memfd_secret", "locked"}
    # the files of a process that is not dumpable belong to root (proc(5)), whoever runs it
    assert (process / "fd").stat().st_uid == 0


LOOK = """
pid, libc = int(sys.argv[1]), ctypes.CDLL(None, use_errno=True)
def attempt(name, action):
    try:
        action()
        print(name, "allowed")
    except OSError as error:
        print(name, error.strerror)
def attach():
    if libc.ptrace(16, pid, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def take():
    pidfd = os.pidfd_open(pid)
    if libc.syscall(438, pidfd, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
for name in ("mem", "maps", "environ", "fd", "map_files", "auxv"):
    path = f"/proc/{pid}/{name}"
    attempt(name, lambda: os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(1))
attempt("ptrace", attach)
attempt("pidfd_getfd", take)
"""


@pytest.mark.root
def test_another_process_of_the_same_user_cannot_look_in() -> None:
    """Memory, maps, environment, descriptors, tracing, taking a descriptor: all denied, where the
    same attempts on an ordinary process of the user succeed."""
    with running(uid=OWNER_UID) as daemon:
        said = as_user(OWNER_UID, LOOK, daemon.pid).splitlines()
    assert len(said) == 8
    assert not [line for line in said if not line.endswith(("not permitted", "denied"))], said


@pytest.fixture(scope="module")
def talkative() -> Iterator[Daemon]:
    """A daemon that logs every detail."""
    with running(options=("--memory-size-mb", "64", "--verbose")) as daemon:
        yield daemon


def test_a_busy_run_tells_no_secret(talkative: Daemon) -> None:
    """Neither its log nor Status nor List nor an error has a session id, a payload or a key."""
    payload = secrets.token_bytes(48).hex().encode()
    said: list[str] = []
    with Client(talkative.directory) as client, Client(talkative.directory) as other:
        digest = client.store(payload)
        os.close(client.lookup(digest))
        request_id, write_end = client.begin(len(payload), bytes(32))
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(payload)
        with refused(grpc.StatusCode.INVALID_ARGUMENT) as mismatch:
            client.commit(request_id)
        with refused(grpc.StatusCode.UNAUTHENTICATED) as stranger:
            almost = client.hello.session_id[:-1] + bytes([client.hello.session_id[-1] ^ 1])
            metadata = (("dg-session", almost.hex()),)
            client.stub.Lookup(pb.LookupRequest(), metadata=metadata, timeout=SECONDS)
        with refused(grpc.StatusCode.INVALID_ARGUMENT) as invalid:
            client.call("Lookup", pb.LookupRequest(deltaspace=SPACE, sha256=payload))
        assert other.session is not None
        other.session.send(payload)
        eventually(lambda: client.status().sessions == 1)
        said += [text_format.MessageToString(client.status(), as_utf8=True)]
        said += [text_format.MessageToString(client.call("List", pb.ListRequest()), as_utf8=True)]
        said += [str(error.details()) for error in mismatch + stranger + invalid]
        secret = [client.hello.session_id.hex(), other.hello.session_id.hex(), payload.decode()]
    said += [talkative.logged()]
    assert "session-ended" in said[-1]
    for text in said:
        assert not [word for word in secret if word in text], text


def test_names_of_a_client_cannot_forge_a_line_of_the_log(talkative: Daemon) -> None:
    """Deltaspaces with line ends, in calls that fail and calls that do not."""
    forged = pb.Deltaspace(bucket="b\n2026 INFO forged", prefix="\r\nforged uid=0")
    with Client(talkative.directory) as client:
        os.close(client.lookup(client.store(b"data", forged), forged))
        with refused(grpc.StatusCode.NOT_FOUND):
            client.call("Lookup", pb.LookupRequest(deltaspace=forged, sha256=bytes(32)))
    assert "forged" not in talkative.logged()


def test_the_log_is_bounded_however_much_happens(short_directory: Path) -> None:
    """The file and the one before it hold a mebibyte each; here 16 KiB, so that it fills soon."""
    log = short_directory / "log"
    options = ("--memory-size-mb", "8", "--log-file", str(log))
    with running(options=options, log_bytes=16 << 10, limits={"sessions": 1}) as daemon:
        path = str(daemon.directory / "session.sock")
        with Client(daemon.directory) as client:
            for _ in range(1000):
                with connected(path, 5) as refused_one:
                    assert refused_one.recv(1) == b""
            assert client.status().sessions == 1
        files = {file.name: file.stat() for file in short_directory.iterdir()}
        assert set(files) == {"log", "log.1"}
        assert sum(status.st_size for status in files.values()) <= 32 << 10
        assert {status.st_mode & 0o777 for status in files.values()} == {0o600}
        assert daemon.logged() == ""


def test_the_default_bound_of_the_log_is_a_mebibyte_for_each_file() -> None:
    """What the test above makes small."""
    from dgcached.logs import MAX_LOG_BYTES

    assert MAX_LOG_BYTES == 1 << 20
