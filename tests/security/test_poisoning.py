"""Wrong bytes: offered under another digest, changed in the daemon's memory, signed by another.

Root changes the memory of a running daemon through /proc/PID/mem, as a broken RAM would.
"""

import io
import json
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import grpc
import pytest
from benchmarks.testbed import ROOT

from dgcache_core.aead import BODY_OFFSET, CHUNK_BYTES, HEADER_BYTES, TAG_BYTES, Frame
from dgcache_core.errors import CacheCorruptionError
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Deltaspace
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.bystander_in_process import as_root
from tests.support.disk_daemon import following
from tests.support.key_memory import mappings, read_memory
from tests.support.wire import (
    MIB,
    SECONDS,
    SPACE,
    Client,
    Daemon,
    own_environment,
    refused,
    running,
    sha256,
    trailing,
)

GOOD, WRONG = os.urandom(1_500_000), os.urandom(1_500_000)
THREE = os.urandom(2 * CHUNK_BYTES + 100)
"""Two whole chunks and a short one."""

# -- 24 --------------------------------------------------------------------------------------------

_SDK = """
import sys, json, dgcache
from pathlib import Path
digest, good, wrong = sys.argv[2], *map(bytes.fromhex, sys.stdin.read().split())
settings = dgcache.Settings(socket_dir=Path(sys.argv[1]), connect_timeout_ms=20_000)
"""
_FETCH_WRONG = """
with dgcache.open(settings) as cache:
    try:
        cache.get_or_fetch("bucket", "releases", digest, lambda: wrong)
    except dgcache.InvalidReferenceError as error:
        assert "SHA-256 mismatch" in str(error) and digest in str(error)
        print(json.dumps([cache.backend, cache.has("bucket", "releases", digest)]))
"""
_STREAM_WRONG = """
import io
from dgcache.deltaglider import ReferenceCachePort
class Body(io.BytesIO):
    _content_length = len(wrong)
with dgcache.open(settings) as cache:
    port = ReferenceCachePort(cache)
    assert not port.has_ref("bucket", "releases", digest)
    try:
        port.stream_ref("bucket", "releases", digest, Body(wrong))
    except dgcache.InvalidReferenceError:
        exists = port.ref_path("bucket", "releases").exists()
        assert not exists
        print(json.dumps([cache.backend, port.has_ref("bucket", "releases", digest)]))
"""


def clear_about_the_mismatch(errors: list[grpc.RpcError]) -> None:
    """The caller is told both digests."""
    said = str(errors[0].details())
    assert "SHA-256 mismatch" in said
    assert sha256(GOOD).hex() in said
    assert sha256(WRONG).hex() in said


def by_pipe(client: Client) -> None:
    request_id, write_end = client.begin(len(WRONG), sha256(GOOD))
    with os.fdopen(write_end, "wb") as pipe:
        pipe.write(WRONG)
    with refused(grpc.StatusCode.INVALID_ARGUMENT) as errors:
        client.commit(request_id)
    clear_about_the_mismatch(errors)


def by_stream(client: Client) -> None:
    begin = pb.WriteBegin(deltaspace=SPACE, size=len(WRONG), expected_sha256=sha256(GOOD))
    pieces = [WRONG[at : at + MIB] for at in range(0, len(WRONG), MIB)]
    messages = [pb.WriteRequest(begin=begin), *(pb.WriteRequest(data=piece) for piece in pieces)]
    with refused(grpc.StatusCode.INVALID_ARGUMENT) as errors:
        client.stub.Write(iter(messages), timeout=SECONDS)
    clear_about_the_mismatch(errors)


def _by_program(client: Client, python: Path, script: str) -> None:
    directory = Path(client.path("")).resolve()
    done = subprocess.run(
        [str(python), "-c", _SDK + script, str(directory), sha256(GOOD).hex()],
        input=f"{GOOD.hex()} {WRONG.hex()}",
        env=own_environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["dg-cached", False]


def by_fetch(client: Client) -> None:
    _by_program(client, ROOT / ".venv" / "bin" / "python", _FETCH_WRONG)


def by_deltaglider(client: Client) -> None:
    _by_program(client, ROOT / ".venv-deltaglider" / "bin" / "python", _STREAM_WRONG)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """The daemon that is poisoned."""
    with running() as running_daemon:
        yield running_daemon
        assert running_daemon.process.poll() is None, running_daemon.logged()
        assert "Traceback" not in running_daemon.logged()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """Its client; nothing is cached."""
    with Client(daemon.directory) as connected:
        connected.stub.Clear(pb.ClearRequest(), timeout=SECONDS)
        yield connected


@pytest.mark.parametrize(
    ("way", "before", "refusals"),
    [
        (by_pipe, "absent", 1),
        (by_pipe, "cached", 1),
        (by_stream, "absent", 1),
        (by_stream, "cached", 1),
        (by_deltaglider, "absent", 1),
        (by_fetch, "absent", 0),  # the SDK itself refuses them, and the caller is told
    ],
)
def test_24_bytes_under_another_digest_are_never_kept(
    client: Client, way: Callable[[Client], None], before: str, refusals: int
) -> None:
    """Whichever way they come: refused, counted, and nothing that was cached is replaced."""
    if before == "cached":
        client.store(GOOD)
    counted = client.status().store.refused_stores
    way(client)
    assert client.status().store.refused_stores == counted + refusals
    assert served(client, sha256(WRONG)) is None
    if before == "absent":
        assert served(client, sha256(GOOD)) is None
        assert client.status().store.entries == 0
        client.store(GOOD)
    assert served(client, sha256(GOOD)) == GOOD
    assert client.status().store.entries == 1


def served(client: Client, digest: bytes) -> bytes | None:
    """Return what a lookup gives; None where it is a miss or a clear refusal."""
    try:
        descriptor = client.lookup(digest)
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS)  # noqa: PT017
        return None
    with os.fdopen(descriptor, "rb") as handout:
        return handout.read()


# -- 25 and 26, in memory --------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    """A sealed blob in another process's memory, for root to change."""

    pid: int
    address: int
    frame: Frame

    def read(self, span: slice) -> bytes:
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123
            return os.pread(memory.fileno(), span.stop - span.start, self.address + span.start)

    def write(self, offset: int, data: bytes) -> None:
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:  # noqa: PTH123
            assert os.pwrite(memory.fileno(), data, self.address + offset) == len(data)

    def flip(self, offset: int, bit: int = 3) -> None:
        self.write(offset, bytes([self.read(slice(offset, offset + 1))[0] ^ 1 << bit]))

    def chunk(self, index: int) -> bytes:
        return self.read(self.frame.sealed_span(index))


def blob_of(daemon: Daemon, data: bytes) -> Blob:
    """Find where the daemon has the sealed blob of some bytes: by the digest in its header."""
    frame = Frame(len(data), 0, 0)
    start = frame.pack()[:20]  # magic, version, algorithm, chunk size, size
    found = []
    for mapping in mappings(daemon.pid):
        if not {"rd", "wr"} <= mapping.flags:
            continue
        memory, at = read_memory(daemon.pid, mapping), -1
        while (at := memory.find(sha256(data), at + 1)) >= 0:
            header = at - (HEADER_BYTES - 32)
            # a blob begins with a page and is whole; the heap has headers that were looked at, of
            # which one in a few hundred begins with a page as well
            whole = 0 <= header <= len(memory) - frame.sealed_bytes
            if whole and header % PAGESIZE == 0 and memory.startswith(start, header):
                found.append(Blob(daemon.pid, mapping.start + header, frame))
    (blob,) = found
    return blob


def dropped(client: Client, data: bytes) -> None:
    """Assert that a lookup is refused, hands nothing out, and drops, counts and tells it once."""
    before = client.status()
    with refused(grpc.StatusCode.DATA_LOSS):
        client.lookup(sha256(data))
    after = client.status()
    assert after.store.entries == before.store.entries - 1
    assert after.store.corruptions == before.store.corruptions + 1
    assert (after.store.handouts, after.store.reserved_bytes) == (before.store.handouts, 0)
    counted = before.security_events.get("entry-dropped", 0)
    assert after.security_events["entry-dropped"] == counted + 1
    with refused(grpc.StatusCode.NOT_FOUND) as errors:
        client.lookup(sha256(data))
    assert trailing(errors[0])["dg-miss-reason"] == "dropped_corrupt"


FIRST, SECOND, LAST = (Frame(len(THREE), 0, 0).sealed_span(index) for index in range(3))
REGIONS = {
    "magic": 0,
    "version": 5,
    "algorithm": 7,
    "chunk size": 9,
    "size": 19,
    "created": 27,
    "expires": 35,
    "digest": HEADER_BYTES - 32,
    "digest, end": HEADER_BYTES - 1,
    "seal": HEADER_BYTES,
    "seal, end": BODY_OFFSET - 1,
    "first chunk": FIRST.start,
    "first chunk, middle": FIRST.start + CHUNK_BYTES // 2,
    "first chunk, tag": FIRST.stop - TAG_BYTES,
    "second chunk": SECOND.start + 1,
    "second chunk, tag": SECOND.stop - 1,
    "last chunk": LAST.start,
    "last chunk, end": LAST.stop - TAG_BYTES - 1,
    "last tag": LAST.stop - TAG_BYTES,
    "last tag, end": LAST.stop - 1,
}


@as_root
def test_25_a_bit_flipped_in_the_memory_of_a_daemon_is_found(
    client: Client, daemon: Daemon
) -> None:
    """In every region of a blob: no byte of it is handed out, others are served, and what is
    fetched and stored again is served as well."""
    client.store(GOOD)
    for number, region in enumerate(REGIONS.values()):
        client.store(THREE)
        blob_of(daemon, THREE).flip(region, number % 8)
        dropped(client, THREE)
        assert served(client, sha256(GOOD)) == GOOD
    client.store(THREE)
    assert served(client, sha256(THREE)) == THREE
    with following(client) as events:
        assert next(events)[0] == "entry-dropped"
    said = [line for line in daemon.logged().splitlines() if "entry-dropped" in line]
    assert len(said) >= len(REGIONS)
    assert not [line for line in said if sha256(THREE).hex() in line]


def test_25_every_bit_of_a_blob_is_checked() -> None:
    """Each of the bits of a small one, one after the other, through the store that serves it."""
    space, data = Deltaspace("b", "p"), b"a small reference"
    store = MemoryStore(32 * MIB, 1000, may_fork=True)
    try:
        bits = 8 * Frame(len(data), 0, 0).sealed_bytes
        for bit in range(bits):
            with store.begin(len(data), space) as ingest:
                ingest.fill(io.BytesIO(data).readinto)
                digest = ingest.commit()
            store._entries[digest].blob[bit // 8] ^= 1 << bit % 8
            with pytest.raises(CacheCorruptionError):
                store.lookup(space, digest)
            assert store.status().entries == 0
        assert store.status().counters.corruptions == bits
        assert store.status().counters.hits == 0
    finally:
        store.close()


OTHER = os.urandom(len(THREE))


def swap(blob: Blob, other: Blob) -> None:
    """Chunks in each other's place."""
    first, second = blob.chunk(0), blob.chunk(1)
    blob.write(FIRST.start, second)
    blob.write(SECOND.start, first)


def repeat(blob: Blob, other: Blob) -> None:
    """The first chunk twice."""
    blob.write(SECOND.start, blob.chunk(0))


def foreign_chunk(blob: Blob, other: Blob) -> None:
    """A chunk of another entry, in the place it has there."""
    blob.write(SECOND.start, other.chunk(1))


def foreign_last_chunk(blob: Blob, other: Blob) -> None:
    """The last chunk of another entry."""
    blob.write(LAST.start, other.chunk(2))


def foreign_header(blob: Blob, other: Blob) -> None:
    """Header and seal of another entry."""
    blob.write(0, other.read(slice(0, BODY_OFFSET)))


def foreign_blob(blob: Blob, other: Blob) -> None:
    """All of another entry, authentic in itself."""
    blob.write(0, other.read(slice(0, blob.frame.sealed_bytes)))


def truncated(blob: Blob, other: Blob) -> None:
    """The size of two chunks in the header: cut at a boundary."""
    blob.write(12, struct.pack(">Q", 2 * CHUNK_BYTES))


def extended(blob: Blob, other: Blob) -> None:
    """A byte more in the header."""
    blob.write(12, struct.pack(">Q", len(THREE) + 1))


def older_version(blob: Blob, other: Blob) -> None:
    """Version 0, before the first."""
    blob.write(4, struct.pack(">H", 0))


def later_expiry(blob: Blob, other: Blob) -> None:
    """A year longer to live."""
    (expires,) = struct.unpack(">Q", blob.read(slice(28, 36)))
    blob.write(28, struct.pack(">Q", expires + 365 * 86_400))


@as_root
@pytest.mark.parametrize(
    "change",
    [
        *(swap, repeat, foreign_chunk, foreign_last_chunk, foreign_header, foreign_blob),
        *(truncated, extended, older_version, later_expiry),
    ],
    ids=lambda change: change.__name__,
)
def test_26_a_blob_put_together_in_memory_is_refused(
    client: Client, daemon: Daemon, change: Callable[[Blob, Blob], None]
) -> None:
    """From its own chunks, or from another entry's; the other one is served on."""
    client.store(THREE)
    client.store(OTHER)
    change(blob_of(daemon, THREE), blob_of(daemon, OTHER))
    dropped(client, THREE)
    assert served(client, sha256(OTHER)) == OTHER


def test_26_the_bits_that_are_changed_are_those_of_a_blob() -> None:
    """What the tests above take for the fields of a header are its fields."""
    packed = Frame(0x0102030405060708, 3, 4).pack()
    fields: tuple[Any, ...] = struct.unpack(">4sHHIQQQ", packed)
    assert fields[4] == struct.unpack(">Q", packed[12:20])[0] == 0x0102030405060708
    assert struct.unpack(">Q", packed[28:36])[0] == 4
