"""What else could keep references warm: real servers and libraries, each asked for the same thing.

A `get` has one meaning for all: from the digest to a path that xdelta3 can read, whose bytes were
checked as dg-cached checks them. dg-cached authenticates every chunk (AES-256-GCM) while it
decrypts. A peer that checks nothing by itself gets the check that a careful user would add: SHA-256
over the bytes just before they are used. Where a peer hands out bytes and not a file, they are
written into a memfd; where it has a file, its path is the answer, and nothing is copied.

Each `Peer` says what its get is, and what it does and does not protect.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.bench_figures import milliseconds
from benchmarks.servers import (
    memcached_program,
    redis_program,
    running_memcached,
    running_redis,
)
from benchmarks.testbed import ROOT, end_process
from dgcache_cli.bench.implementations import by_name
from dgcache_cli.bench.port import PIECE_BYTES, Contender
from dgcache_core.errors import CacheCorruptionError, CacheMissError
from dgcache_core.sealed_files import create_memory_file, write_at

MEMCACHED_PIECE_BYTES = 1_000_000
"""Below memcached's default limit of 1 MiB an item, key and header included."""
_BUDGET_MB = 2560
_STOP_SECONDS = 10.0


class PeerContender:
    """A contender whose gets are timed around the call."""

    def __init__(self, contender: Contender) -> None:
        """Use a contender of `dg-cache bench`, or one from here."""
        self.contender = contender

    def write(self, source: Path) -> None:
        """Keep a file."""
        self.contender.write(source)

    def get(self, sha256: str) -> float:
        """Return the milliseconds from the digest to a path; giving it back is not counted."""
        with ExitStack() as stack:
            return milliseconds(lambda: stack.enter_context(self.contender.read(sha256)))

    def digest(self, sha256: str) -> str:
        """Get it and hash what is read through the path."""
        with self.contender.read(sha256) as path, path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def clear(self) -> None:
        """Forget everything."""
        self.contender.clear()


@dataclass(frozen=True, slots=True)
class Peer:
    """One of them: how it is opened, and what is said about it."""

    name: str
    how: str
    protects: str
    missing: Callable[[], str | None]
    """Returns the command that installs it, None where it is there."""
    opened: Callable[[Path, Path], AbstractContextManager[PeerContender]]
    """Given a private directory and a Python that has DeltaGlider."""


def _require_digest(data: Any, sha256: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CacheCorruptionError(f"SHA mismatch: these are not the bytes of {sha256}")


@contextmanager
def _in_memory_file(pieces: list[bytes]) -> Iterator[Path]:
    """Write bytes into a memory file, as the floor does, and lend its path."""
    descriptor = create_memory_file()
    try:
        offset = 0
        for whole in pieces:
            view = memoryview(whole)
            for start in range(0, len(view), PIECE_BYTES):
                piece = view[start : start + PIECE_BYTES]
                write_at(descriptor, piece, offset)
                offset += len(piece)
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)


class _Served:
    """What the contenders on a server have in common: content-addressed, nothing is held."""

    shares = False

    def settle(self) -> None:
        """Nothing is ever held."""

    def evict(self) -> None:
        """As `clear`: there is one reference at a time."""
        self.clear()

    def clear(self) -> None:
        """See `Contender`."""
        raise NotImplementedError


class RedisContender(_Served):
    """One string per reference; Redis takes up to 512 MB in one."""

    def __init__(self, client: Any, *, checks: bool) -> None:
        """Use a client of redis-py."""
        self._client = client
        self._checks = checks

    def write(self, source: Path) -> None:
        """See `Contender`."""
        data = source.read_bytes()
        self._client.set(hashlib.sha256(data).hexdigest(), data)

    @contextmanager
    def read(self, sha256: str) -> Iterator[Path]:
        """See `Contender`."""
        data = self._client.get(sha256)
        if data is None:
            raise CacheMissError(f"Redis has no {sha256}")
        if self._checks:
            _require_digest(data, sha256)
        with _in_memory_file([data]) as path:
            yield path

    def clear(self) -> None:
        """See `Contender`."""
        self._client.flushall()


class MemcachedContender(_Served):
    """Pieces of 1 MB, since an item has at most 1 MiB, and one item that counts them."""

    def __init__(self, client: Any) -> None:
        """Use a client of pymemcache."""
        self._client = client

    def write(self, source: Path) -> None:
        """See `Contender`."""
        data = source.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        starts = range(0, len(data), MEMCACHED_PIECE_BYTES)
        for number, start in enumerate(starts):
            piece = data[start : start + MEMCACHED_PIECE_BYTES]
            self._client.set(f"{sha256}/{number}", piece, noreply=False)
        self._client.set(sha256, str(len(starts)).encode(), noreply=False)

    @contextmanager
    def read(self, sha256: str) -> Iterator[Path]:
        """See `Contender`."""
        count = self._client.get(sha256)
        keys = [f"{sha256}/{number}" for number in range(int(count or 0))]
        found = self._client.get_many(keys)
        if count is None or len(found) != len(keys):
            raise CacheMissError(f"memcached has not all of {sha256}")
        pieces = [found[key] for key in keys]
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        if digest.hexdigest() != sha256:
            raise CacheCorruptionError(f"SHA mismatch: these are not the bytes of {sha256}")
        with _in_memory_file(pieces) as path:
            yield path

    def clear(self) -> None:
        """See `Contender`."""
        self._client.flush_all(noreply=False)


class DiskcacheContender(_Served):
    """A file per reference, which diskcache finds by its key in SQLite."""

    def __init__(self, cache: Any) -> None:
        """Use a `diskcache.Cache`."""
        self._cache = cache

    def write(self, source: Path) -> None:
        """See `Contender`."""
        with source.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            self._cache.set(sha256, file, read=True)

    @contextmanager
    def read(self, sha256: str) -> Iterator[Path]:
        """See `Contender`."""
        file = self._cache.get(sha256, read=True)
        if file is None:
            raise CacheMissError(f"diskcache has no {sha256}")
        with file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise CacheCorruptionError(f"SHA mismatch: {sha256}")
            yield Path(file.name)

    def clear(self) -> None:
        """See `Contender`."""
        self._cache.clear()


class StockContender(PeerContender):
    """DeltaGlider's cache in a process of its environment, which times its calls itself."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        """Use a running `benchmarks.stock_cache`."""
        self._process = process

    def write(self, source: Path) -> None:
        """See `PeerContender`."""
        self._ask(f"write {source}")

    def get(self, sha256: str) -> float:
        """See `PeerContender`."""
        took: float = self._ask(f"read {sha256}")["ms"]
        return took

    def digest(self, sha256: str) -> str:
        """See `PeerContender`."""
        with Path(self._ask(f"read {sha256}")["path"]).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def clear(self) -> None:
        """See `PeerContender`."""
        self._ask("clear ")

    def _ask(self, request: str) -> dict[str, Any]:
        requests, answers = self._process.stdin, self._process.stdout
        if requests is None or answers is None:
            raise RuntimeError("this process was started without pipes")
        requests.write(f"{request}\n".encode())
        requests.flush()
        line = answers.readline()
        if not line:
            raise RuntimeError(f"DeltaGlider's cache ended at {request[:80]!r}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _library_missing(program: Callable[[], str | None], package: str, *modules: str) -> str | None:
    absent = [name for name in modules if find_spec(name) is None]
    commands = [] if program() else [f"apt-get install -y {package}"]
    if absent:
        commands.append(f"pip install {' '.join(absent)}")
    return " && ".join(commands) or None


@contextmanager
def _redis(place: Path, *, checks: bool) -> Iterator[PeerContender]:
    import redis

    program = redis_program()
    if program is None:
        raise FileNotFoundError("redis-server")
    with (
        running_redis(program, place) as address,
        redis.Redis(unix_socket_path=str(address)) as client,
    ):
        yield PeerContender(RedisContender(client, checks=checks))


@contextmanager
def _memcached(place: Path) -> Iterator[PeerContender]:
    from pymemcache.client.base import Client

    program = memcached_program()
    if program is None:
        raise FileNotFoundError("memcached")
    with running_memcached(program, place, _BUDGET_MB) as address:
        client = Client(f"unix:{address}")
        try:
            yield PeerContender(MemcachedContender(client))
        finally:
            client.close()


@contextmanager
def _diskcache(place: Path) -> Iterator[PeerContender]:
    import diskcache

    with diskcache.Cache(str(place / "diskcache"), size_limit=_BUDGET_MB << 20) as cache:
        yield PeerContender(DiskcacheContender(cache))


@contextmanager
def _implementation(name: str, place: Path) -> Iterator[PeerContender]:
    with by_name(name).opened(place, _BUDGET_MB) as contender:
        yield PeerContender(contender)


@contextmanager
def _stock(place: Path, python: Path) -> Iterator[PeerContender]:
    process = subprocess.Popen(
        [str(python), "-m", "benchmarks.stock_cache", str(place)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    )
    with process:
        try:
            yield StockContender(process)
        finally:
            end_process(process, _STOP_SECONDS)


PEERS: tuple[Peer, ...] = (
    Peer(
        "Redis",
        "redis-server (or Valkey) over a Unix socket, redis-py with hiredis, one string; GET, "
        "SHA-256 here, the bytes into a memfd",
        "who may open the socket may read and replace everything; plaintext in the server's "
        "memory, which can be swapped and dumped; no check of its own, so the SHA-256 is the "
        "user's; the memfd is not sealed",
        lambda: _library_missing(redis_program, "redis-server", "redis", "hiredis"),
        lambda place, _: _redis(place, checks=True),
    ),
    Peer(
        "Redis, unchecked",
        "the same without the SHA-256: what it costs to move the bytes alone",
        "as Redis, and wrong bytes are used as they are. No contender for the target",
        lambda: _library_missing(redis_program, "redis-server", "redis", "hiredis"),
        lambda place, _: _redis(place, checks=False),
    ),
    Peer(
        "memcached",
        "memcached over a Unix socket, pymemcache as it comes, in pieces of 1 MB for the default "
        "limit of 1 MiB an item; get_many, SHA-256 here, the bytes into a memfd",
        "as Redis; and one piece may be evicted without the others",
        lambda: _library_missing(memcached_program, "memcached", "pymemcache"),
        lambda place, _: _memcached(place),
    ),
    Peer(
        "diskcache",
        "diskcache.Cache, a file per value, found in SQLite; get(read=True), SHA-256 over the "
        "file, its path",
        "plaintext on disk; no check of its own; the file can change between the SHA-256 and its "
        "use",
        lambda: _library_missing(lambda: "here", "", "diskcache"),
        lambda place, _: _diskcache(place),
    ),
    Peer(
        "directory, SHA-256 at use",
        "files named by their digest, as DeltaGlider shipped from 5.0.3 on "
        "(`dgcache_cli.bench.content_addressed`); SHA-256 over the file, its path",
        "plaintext on disk; the file can change between the SHA-256 and its use",
        lambda: None,
        lambda place, _: _implementation("sha-at-use", place),
    ),
    Peer(
        "Fernet",
        "the roadmap's encryption (`dgcache_cli.bench.fernet_files`): AES-128-CBC and HMAC over "
        "the whole, SHA-256, the plaintext written to a file",
        "ciphertext on disk, and the plaintext beside it after the first use; the plaintext file "
        "can change before its use",
        lambda: None,
        lambda place, _: _implementation("fernet", place),
    ),
    Peer(
        "DeltaGlider 6.2.0",
        "its own EncryptedCache in its own environment, `get_validated_ref` called directly "
        "(DeltaGlider itself downloads before each: its `has_ref` never says yes)",
        "as Fernet; both files are readable by everybody on the host",
        lambda: None,
        _stock,
    ),
)
UNCHECKED = ("Redis, unchecked",)
