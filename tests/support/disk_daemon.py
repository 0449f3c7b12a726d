"""Daemons with a disk tier: where one lives, how it is filled, and what is found of it."""

import base64
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import SECONDS, Client, Daemon, own_environment, running

REFERENCE_BYTES = 100_000
MEMORY_MB = 1
"""Room for eight such references."""

NEVER = 3600.0
"""Seconds to the next audit of everything, where only notices may tell."""

LOCK_READS_ONLY = """
import os, sys
from dgcache_core.disk_files import TierDirectory
lock = TierDirectory._lock
def reading(self):
    writing = lock(self)
    descriptor = os.open(f"/proc/self/fd/{writing}", os.O_RDONLY | os.O_CLOEXEC)
    os.close(writing)
    return descriptor
TierDirectory._lock = reading
program = sys.argv[3]  # behind the interpreter and its -c
sys.argv = ["-c", *sys.argv[4:]]
exec(program)
"""
"""What starts a daemon whose file system may become read-only: remounting is refused while a
descriptor is open for writing, and a disk that fails asks nobody."""

Event = tuple[str, str]


class Home:
    """What outlives a daemon: its directories and its key."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.sockets, self.cache, self.key = base / "s", base / "c", base / "key"
        self.new_key()

    def new_key(self) -> bytes:
        """Put another key in the file, and return it."""
        key = secrets.token_bytes(32)
        self.key.write_bytes(base64.b64encode(key) + b"\n")
        self.key.chmod(0o600)
        return key

    @contextmanager
    def daemon(
        self,
        *,
        persistent: bool = True,
        memory_mb: float = MEMORY_MB,
        disk_mb: float = 64,
        limits: Mapping[str, Any] | None = None,
        sockets: Path | None = None,
        prefix: tuple[str, ...] = (),
        more: tuple[str, ...] = (),
        environ: Mapping[str, str] | None = None,
    ) -> Iterator[Daemon]:
        """Run a daemon there until the block ends."""
        options = (
            *("--memory-size-mb", str(memory_mb), "--disk-size-mb", str(disk_mb)),
            *("--cache-dir", str(self.cache)),
            *(("--encryption-key-file", str(self.key)) if persistent else ()),
            *more,
        )
        with running(
            sockets or self.sockets,
            options=options,
            limits={"audit_seconds": NEVER, **(limits or {})},
            prefix=prefix,
            environ=environ,
        ) as daemon:
            yield daemon

    @property
    def tier(self) -> Path:
        """The tier's own directory."""
        (found,) = self.cache.glob("v2/disk/*")
        return found

    def files(self) -> list[Path]:
        """Return the files of entries."""
        return sorted(path for path in self.cache.glob("v2/disk/*/??/??/*"))

    def everything(self) -> dict[str, bytes]:
        """Return every file below the cache directory, under its name."""
        return {
            str(path.relative_to(self.cache)): path.read_bytes() if path.is_file() else b""
            for path in self.cache.rglob("*")
        }

    def cli(self, *words: str) -> str:
        """Return what `dg-cache` prints."""
        return subprocess.run(
            [sys.executable, "-m", "dgcache_cli", *words],
            env={**own_environment(), "DG_CACHE_SOCKET_DIR": str(self.sockets)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout


def reference(number: int, size: int = REFERENCE_BYTES) -> bytes:
    """Return one of many references; each can be told by its first bytes."""
    return (b"reference %d of a job. " % number * (size // 16 + 1))[:size]


def fill(client: Client, count: int, size: int = REFERENCE_BYTES, first: int = 0) -> list[bytes]:
    """Store references and return their digests, oldest first."""
    return [client.store(reference(number, size)) for number in range(first, first + count)]


def found(client: Client, digest: bytes) -> bytes | None:
    """Return what is served for a digest; None is a miss, or a corruption that was found."""
    try:
        descriptor = client.lookup(digest)
    except grpc.RpcError as error:
        if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS):
            raise
        return None
    try:
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    finally:
        os.close(descriptor)


def lines(daemon: Daemon, word: str) -> list[str]:
    """Return the lines of its log that begin with a word."""
    return [line for line in daemon.logged().splitlines() if re.search(rf"\b{word}\b", line)]


@contextmanager
def following(client: Client) -> Iterator[Iterator[Event]]:
    """Follow the security events: kind and name of each, those that are kept first."""
    call = client.stub.Watch(pb.WatchRequest(follow=True), timeout=SECONDS)
    try:
        yield ((one.kind, one.fields.get("name", "")) for one in call)
    finally:
        call.cancel()
