"""The contract of a reference cache, the same on every backend."""

import hashlib
import io
import json
import os
import random
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import dgcache
from dgcache.cache import ReferenceCache
from dgcache.sources import opened
from dgcache_core.aead import CHUNK_BYTES
from dgcache_core.references import Deltaspace

LENGTHS = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 9 * CHUNK_BYTES + 7]


def some_bytes(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("length", LENGTHS)
def test_what_was_put_comes_back_at_every_boundary_length(
    cache: ReferenceCache, length: int
) -> None:
    """Lengths around the chunk size and beyond the two-thread threshold."""
    data = some_bytes(length)
    digest = cache.put("bucket", "prefix", data)
    assert digest == sha256(data)
    with cache.get("bucket", "prefix", digest, verify=True) as reference:
        assert (reference.size, reference.sha256) == (length, digest)
        assert reference.read() == data
        assert reference.buffer() == data
        assert reference.path.read_bytes() == data
        assert os.pread(reference.fd, length + 1, 0) == data


def open_path(path: Path) -> Path:
    return path


def open_file(path: Path) -> io.BufferedReader:
    return path.open("rb")


def open_descriptor(path: Path) -> int:
    return os.open(path, os.O_RDONLY)


def open_stream(path: Path) -> io.BytesIO:
    return io.BytesIO(path.read_bytes())


def open_pipe(path: Path) -> int:
    read_end, write_end = os.pipe()

    def pour() -> None:
        with os.fdopen(write_end, "wb") as out:
            out.write(path.read_bytes())

    threading.Thread(target=pour).start()
    return read_end


SOURCES: list[Callable[[Path], object]] = [
    open_path,
    str,
    open_file,
    open_descriptor,
    open_stream,
    open_pipe,
    Path.read_bytes,
    lambda path: bytearray(path.read_bytes()),
    lambda path: memoryview(path.read_bytes()),
]


@pytest.mark.parametrize("length", [0, 3 * CHUNK_BYTES + 1])
@pytest.mark.parametrize("make", SOURCES)
def test_every_kind_of_source_can_be_put(
    cache: ReferenceCache, tmp_path: Path, make: Callable[[Path], object], length: int
) -> None:
    """Paths, files, descriptors, streams and buffers; none is closed by the cache."""
    path = tmp_path / "reference"
    path.write_bytes(some_bytes(length))
    source = make(path)
    try:
        digest = cache.put("bucket", "", source)  # type: ignore[arg-type]
        assert digest == sha256(path.read_bytes())
        with cache.get("bucket", "", digest) as reference:
            assert reference.read() == path.read_bytes()
    finally:
        if isinstance(source, int):
            os.close(source)
        elif hasattr(source, "close"):
            source.close()


def test_a_file_object_is_read_from_its_position(cache: ReferenceCache, tmp_path: Path) -> None:
    """As every library does that takes a file object."""
    path = tmp_path / "reference"
    path.write_bytes(b"headerpayload")
    with path.open("rb") as file:
        file.read(6)
        assert cache.put("bucket", "prefix", file) == sha256(b"payload")


def test_a_declared_digest_that_does_not_match_stores_nothing(cache: ReferenceCache) -> None:
    """The message names both digests; neither can be had afterwards."""
    declared = sha256(b"other")
    with pytest.raises(dgcache.InvalidReferenceError, match="SHA-256 mismatch"):
        cache.put("bucket", "prefix", b"some", declared)
    assert not cache.has("bucket", "prefix", declared)
    assert not cache.has("bucket", "prefix", sha256(b"some"))
    assert cache.entries() == []


def test_an_upper_case_digest_is_folded(cache: ReferenceCache) -> None:
    """Tools print digests in either case."""
    digest = cache.put("bucket", "prefix", b"bytes", sha256(b"bytes").upper())
    assert cache.has("bucket", "prefix", digest.upper())
    with cache.get("bucket", "prefix", digest.upper()) as reference:
        assert reference.sha256 == digest


BAD_DIGESTS = ["", "fakehash", "a" * 63, "a" * 65, "g" * 64, "a" * 63 + "\n", "a" * (1 << 20)]


@pytest.mark.parametrize("digest", BAD_DIGESTS, ids=lambda digest: f"{len(digest)}")
def test_a_digest_that_is_none_is_an_invalid_argument(cache: ReferenceCache, digest: str) -> None:
    """Everywhere a digest is taken."""
    for call in (
        lambda: cache.get("bucket", "prefix", digest),
        lambda: cache.has("bucket", "prefix", digest),
        lambda: cache.put("bucket", "prefix", b"", digest),
        lambda: cache.get_or_fetch("bucket", "prefix", digest, lambda: b""),
    ):
        with pytest.raises(dgcache.InvalidReferenceError):
            call()
    assert cache.entries() == []


BAD_NAMES = [
    ("", "prefix"),
    ("b" * 256, "prefix"),
    ("b" * (1 << 20), "prefix"),
    ("buc\0ket", "prefix"),
    ("bucket", "p" * 1025),
    ("bucket", "p" * (1 << 20)),
    ("bucket", "pre\0fix"),
    ("bucket", "\ud800"),
]


@pytest.mark.parametrize(("bucket", "prefix"), BAD_NAMES, ids=range(len(BAD_NAMES)))
def test_a_name_that_is_none_is_an_invalid_argument(
    cache: ReferenceCache, bucket: str, prefix: str
) -> None:
    """Empty, too long, holding NUL, or not Unicode."""
    for call in (
        lambda: cache.get(bucket, prefix, "0" * 64),
        lambda: cache.put(bucket, prefix, b"bytes"),
        lambda: cache.has(bucket, prefix, "0" * 64),
        lambda: cache.evict(bucket, prefix),
    ):
        with pytest.raises(dgcache.InvalidReferenceError):
            call()
    assert cache.entries() == []


def test_a_source_that_cannot_be_read_is_named(cache: ReferenceCache, tmp_path: Path) -> None:
    """Missing, a directory, a FIFO (which must not block), text, a closed descriptor, an object."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    text = tmp_path / "text"
    text.write_text("words")
    with text.open() as text_file:
        sources: list[tuple[object, str]] = [
            (tmp_path / "missing", "No such file"),
            (tmp_path, "is a directory"),
            (fifo, "not a regular file"),
            (text_file, "text mode"),
            (1_000_000, "not open"),
            (3.5, "cannot store a float"),
            ("nul\0path", "NUL character"),
        ]
        for source, says in sources:
            with pytest.raises(dgcache.InvalidReferenceError, match=says):
                cache.put("bucket", "prefix", source)  # type: ignore[arg-type]
    assert cache.entries() == []


@pytest.mark.parametrize("change", ["shrinks", "grows", "is rewritten"])
def test_a_file_that_changes_while_it_is_put_stores_nothing(
    cache: ReferenceCache, tmp_path: Path, change: str
) -> None:
    """Shorter, longer, or with other bytes: an error that says so."""
    path = tmp_path / "reference"
    path.write_bytes(some_bytes(3 * CHUNK_BYTES))

    backend = cache._daemon() or cache._local_backend()
    with opened(path, 1 << 30) as source:
        with path.open("r+b") as file:
            if change == "shrinks":
                file.truncate(CHUNK_BYTES)
            elif change == "grows":
                file.seek(0, os.SEEK_END)
                file.write(b"more")
            else:
                file.write(b"other")
        os.utime(path, ns=(1, 1))  # whatever the granularity of the file system's clock
        with pytest.raises(dgcache.InvalidReferenceError, match=r"changed|ended after"):
            backend.put(Deltaspace("bucket", "prefix"), source, None)
    assert cache.entries() == []
    assert cache.status()["store"]["reserved_bytes"] == 0


def test_a_miss_says_why(cache: ReferenceCache) -> None:
    """Never seen, another digest than the deltaspace has, and evicted."""
    with pytest.raises(dgcache.CacheMissError) as unknown:
        cache.get("bucket", "prefix", "0" * 64)
    assert unknown.value.reason is dgcache.MissReason.UNKNOWN
    digest = cache.put("bucket", "prefix", b"bytes")
    with pytest.raises(dgcache.CacheMissError) as changed:
        cache.get("bucket", "prefix", "0" * 64)
    assert changed.value.reason is dgcache.MissReason.DIGEST_CHANGED
    cache.evict("bucket", "prefix")
    with pytest.raises(dgcache.CacheMissError) as evicted:
        cache.get("bucket", "prefix", digest)
    assert evicted.value.reason is dgcache.MissReason.EVICTED


def test_the_same_bytes_serve_many_deltaspaces(cache: ReferenceCache) -> None:
    """Stored once; evicting one deltaspace keeps the other."""
    digest = cache.put("bucket", "one", b"bytes")
    assert cache.put("bucket", "two", b"bytes") == digest
    assert len(cache.entries()) == 1
    assert cache.evict("bucket", "one").entries == 0
    assert cache.has("bucket", "two", digest)
    assert cache.evict("bucket", "two").entries == 1
    assert not cache.has("bucket", "two", digest)


def test_a_deltaspace_bound_anew_keeps_its_old_reference(cache: ReferenceCache) -> None:
    """Staging and production may have the same bucket and prefix: both go on hitting."""
    staging = cache.put("bucket", "prefix", b"staging")
    production = cache.put("bucket", "prefix", b"production")
    for digest, data in ((staging, b"staging"), (production, b"production")):
        with cache.get("bucket", "prefix", digest) as reference:
            assert reference.read() == data


def test_a_handout_outlives_eviction_and_clear(cache: ReferenceCache) -> None:
    """What is held stays whole to the end."""
    data = some_bytes(2 * CHUNK_BYTES)
    digest = cache.put("bucket", "prefix", data)
    with cache.get("bucket", "prefix", digest) as first:
        assert cache.evict("bucket", "prefix").bytes == len(data)
        assert first.read() == data
        cache.put("bucket", "prefix", data)
        with cache.get("bucket", "prefix", digest) as second:
            freed = cache.clear()
            assert (freed.entries, freed.bytes) == (1, len(data))
            assert second.read() == first.read() == data


def test_rotated_keys_free_everything_and_the_cache_goes_on(cache: ReferenceCache) -> None:
    """What is held stays whole; what was stored is a miss; what is stored next is found."""
    data = some_bytes(2 * CHUNK_BYTES)
    digest = cache.put("bucket", "prefix", data)
    with cache.get("bucket", "prefix", digest) as held:
        freed = cache.clear(rekey=True)
        assert (freed.entries, freed.bytes) == (1, len(data))
        assert held.read() == data
    assert not cache.has("bucket", "prefix", digest)
    cache.put("bucket", "prefix", data)
    with cache.get("bucket", "prefix", digest) as again:
        assert again.read() == data


def test_a_handout_cannot_be_changed(cache: ReferenceCache) -> None:
    """Not through its descriptor, not through its path."""
    digest = cache.put("bucket", "prefix", b"bytes")
    with cache.get("bucket", "prefix", digest) as reference:
        with pytest.raises(OSError, match="Bad file descriptor"):  # opened for reading only
            os.write(reference.fd, b"x")
        with pytest.raises(PermissionError), reference.path.open("r+b", buffering=0) as file:
            file.write(b"x")  # root may open it, and may not write either
        with pytest.raises(PermissionError):
            os.truncate(reference.path, 0)
        with pytest.raises(TypeError):
            reference.buffer()[0] = 1
        assert reference.read() == b"bytes"


def test_a_reference_that_is_dropped_open_warns_and_closes(cache: ReferenceCache) -> None:
    """ResourceWarning, as for files."""
    digest = cache.put("bucket", "prefix", b"bytes")
    reference = cache.get("bucket", "prefix", digest)
    fd = reference.fd
    with pytest.warns(ResourceWarning, match="unclosed reference"):
        del reference
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_closed_reference_says_so_and_a_view_outlives_it(cache: ReferenceCache) -> None:
    """A view keeps the pages; the descriptor is gone."""
    digest = cache.put("bucket", "prefix", b"bytes")
    reference = cache.get("bucket", "prefix", digest)
    view = reference.buffer()
    reference.close()
    reference.close()
    assert view == b"bytes"
    with pytest.raises(ValueError, match="closed"):
        _ = reference.path


def test_get_or_fetch_fetches_once(cache: ReferenceCache) -> None:
    """Whatever kind of source it gives; a stream is closed."""
    kinds: list[Callable[[bytes], object]] = [bytes, bytearray, io.BytesIO]
    for number, kind in enumerate(kinds):
        data = some_bytes(CHUNK_BYTES + number)
        streams: list[object] = []

        def fetch(
            kind: Callable[[bytes], object] = kind,
            data: bytes = data,
            streams: list[object] = streams,
        ) -> object:
            streams.append(kind(data))
            return streams[-1]

        for _ in range(3):
            with cache.get_or_fetch("bucket", "prefix", sha256(data), fetch) as reference:  # type: ignore[arg-type]
                assert reference.read() == data
        assert len(streams) == 1
        assert not isinstance(streams[0], io.BytesIO) or streams[0].closed


def test_what_was_fetched_wrong_is_not_kept(cache: ReferenceCache) -> None:
    """The digest that was asked for decides; errors of the fetch pass through."""
    with pytest.raises(dgcache.InvalidReferenceError, match="SHA-256 mismatch"):
        cache.get_or_fetch("bucket", "prefix", sha256(b"right"), lambda: io.BytesIO(b"wrong"))
    with pytest.raises(ZeroDivisionError):
        cache.get_or_fetch("bucket", "prefix", sha256(b"right"), lambda: b"%d" % (1 // 0))
    assert cache.entries() == []


def test_a_reference_over_the_budget_is_refused_and_nothing_is_lost(
    cache: ReferenceCache, tmp_path: Path
) -> None:
    """64 MiB cannot hold 40 MiB encrypted and in the open; what was there stays."""
    kept = cache.put("bucket", "kept", b"bytes")
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(40 << 20)
    digest = hashlib.sha256(large.read_bytes()).hexdigest()
    with (
        dgcache.open(dgcache.Settings(backend="memory", fallback_size_mb=64)) as small,
        pytest.raises(dgcache.CacheFullError, match="40"),
    ):
        small.put("bucket", "large", large)
    with cache.get_or_fetch("bucket", "large", digest, lambda: large) as reference:
        assert reference.size == 40 << 20
        reference.verify()
    assert cache.has("bucket", "kept", kept)


def test_status_and_entries_tell_what_is_there(cache: ReferenceCache) -> None:
    """Status is ready for JSON; entries come most recently used first."""
    first = cache.put("bucket", "one", b"one")
    second = cache.put("bucket", "two", b"three")
    cache.get("bucket", "one", first).close()
    assert [entry.sha256 for entry in cache.entries()] == [first, second]
    entry = cache.entries()[0]
    assert (entry.size, entry.hits, str(entry.deltaspaces[0])) == (3, 1, "bucket/one")
    status = json.loads(json.dumps(cache.status()))
    assert status["backend"] == cache.backend
    assert status["store"]["entries"] == 2
    assert (status["store"]["hits"], status["store"]["hit_bytes"]) == (1, 3)


def test_threads_share_a_cache(cache: ReferenceCache) -> None:
    """Eight threads, each sure of its own bytes."""
    blobs = {sha256(data): data for data in (some_bytes(CHUNK_BYTES + n, n) for n in range(4))}
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        try:
            for _ in range(12):
                digest, data = choose.choice(list(blobs.items()))
                with cache.get_or_fetch("bucket", str(seed), digest, lambda d=data: d) as got:  # type: ignore[misc]
                    assert got.read() == data
                if choose.random() < 0.2:
                    cache.evict("bucket", str(seed))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


def test_xdelta3_encodes_and_decodes_from_the_sealed_path(
    cache: ReferenceCache, tmp_path: Path
) -> None:
    """The whole point: another program reads the reference by its path."""
    data = some_bytes(3 * CHUNK_BYTES)
    target, delta, out = tmp_path / "target", tmp_path / "delta", tmp_path / "out"
    target.write_bytes(data[:CHUNK_BYTES] + b"changed" + data[CHUNK_BYTES:])
    digest = cache.put("bucket", "prefix", data)
    with cache.get("bucket", "prefix", digest) as reference:
        source = str(reference.path)
        for argv in (["-e", "-s", source, target, delta], ["-d", "-s", source, delta, out]):
            subprocess.run(["xdelta3", "-f", *map(str, argv)], check=True)
    assert delta.stat().st_size < 1000
    assert out.read_bytes() == target.read_bytes()


def test_a_closed_cache_says_so(cache: ReferenceCache) -> None:
    """Closing twice is fine; a reference that is open stays valid."""
    digest = cache.put("bucket", "prefix", b"bytes")
    with cache.get("bucket", "prefix", digest) as reference:
        cache.close()
        cache.close()
        assert reference.read() == b"bytes"
        with pytest.raises(ValueError, match="closed"):
            cache.get("bucket", "prefix", digest)
    assert "closed" in repr(cache)
