"""What the process lets others see: nothing of it, and nothing of its clients in its words."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import (
    Client,
    Daemon,
    connected,
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


@pytest.fixture(scope="module")
def talkative() -> Iterator[Daemon]:
    """A daemon that logs every detail."""
    with running(options=("--memory-size-mb", "64", "--verbose")) as daemon:
        yield daemon


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
