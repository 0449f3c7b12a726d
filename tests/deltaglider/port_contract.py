"""What DeltaGlider relies on in its cache port. Run by test_command_line.py, in its environment."""

import hashlib
import io
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import deltaglider
import pytest
from deltaglider.adapters import EncryptedCache, MemoryCache
from deltaglider.core.errors import (
    CacheCorruptionError,
    CacheMissError,
    IntegrityMismatchError,
)
from deltaglider.core.models import DeltaSpace
from deltaglider.core.service import DeltaService

import dgcache
from dgcache import deltaglider as adapter
from dgcache.deltaglider import ReferenceCachePort

DATA = os.urandom(3 << 20)
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def cache() -> Iterator[dgcache.ReferenceCache]:
    with dgcache.open() as opened:
        assert (opened.backend == "dg-cached") == ("DG_CACHE_SOCKET_DIR" in os.environ)
        opened.clear()
        yield opened


@pytest.fixture
def port(cache: dgcache.ReferenceCache) -> ReferenceCachePort:
    return ReferenceCachePort(cache)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "reference.bin"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("prefix", ["app/releases", ""])
def test_what_was_written_is_there(port: ReferenceCachePort, source: Path, prefix: str) -> None:
    """Also after the source is gone, which DeltaGlider deletes at once."""
    assert port.write_ref("bucket", prefix, source).read_bytes() == DATA
    source.unlink()
    assert port.has_ref("bucket", prefix, DIGEST) is True
    path = port.get_validated_ref("bucket", prefix, DIGEST)
    assert path.read_bytes() == DATA
    assert port.ref_path("bucket", prefix) == path


def test_true_is_a_promise(
    port: ReferenceCachePort, cache: dgcache.ReferenceCache, source: Path
) -> None:
    """Whatever happens to the cache between has_ref and get_validated_ref."""
    port.write_ref("bucket", "prefix", source)
    assert port.has_ref("bucket", "prefix", DIGEST)
    cache.clear()
    cache.close()
    assert port.get_validated_ref("bucket", "prefix", DIGEST).read_bytes() == DATA


def test_digests_that_are_none_are_misses_or_mismatches(
    port: ReferenceCachePort, source: Path
) -> None:
    """DeltaGlider's own tests use such."""
    assert port.has_ref("bucket", "prefix", "fakehash") is False
    with pytest.raises(CacheMissError):
        port.get_validated_ref("bucket", "prefix", "fakehash")
    port.write_ref("bucket", "prefix", source)
    assert port.has_ref("bucket", "prefix", "fakehash") is False
    for digest in ("fakehash", "0" * 64):
        with pytest.raises(CacheCorruptionError, match="SHA mismatch"):
            port.get_validated_ref("bucket", "prefix", digest)


def test_after_evict_the_path_does_not_exist(port: ReferenceCachePort, source: Path) -> None:
    """Nor does it come to name another reference soon."""
    port.write_ref("bucket", "prefix", source)
    path = port.get_validated_ref("bucket", "prefix", DIGEST)
    port.evict("bucket", "prefix")
    assert not path.exists()
    assert port.has_ref("bucket", "prefix", DIGEST) is False
    assert not port.ref_path("bucket", "prefix").exists()
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(50)]
    for _ in range(50):
        port.write_ref("bucket", "other", source)
        assert not path.exists()
    for fd in opened:
        os.close(fd)


def test_a_number_is_dealt_again_only_after_all_others(
    port: ReferenceCachePort, source: Path
) -> None:
    """Descriptor numbers come from the upper half of the limit, in turn, and none leaks."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    source.write_bytes(b"small")
    paths = [port.write_ref("bucket", "prefix", source) for _ in range(300)]
    numbers = [int(path.name) for path in paths]
    assert len(set(numbers[:128])) == 128
    assert all(number >= 128 for number in numbers)
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 12


def test_one_thread_does_not_take_from_the_hand_of_another(
    port: ReferenceCachePort, tmp_path: Path
) -> None:
    """Each reads its own reference to the end while the others go on."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(6)

    def work(number: int) -> None:
        try:
            mine = tmp_path / f"reference-{number}"
            mine.write_bytes(os.urandom(1 << 20))
            digest = hashlib.sha256(mine.read_bytes()).hexdigest()
            barrier.wait(30)
            port.write_ref("bucket", str(number), mine)
            for _ in range(20):
                assert port.has_ref("bucket", str(number), digest)
                path = port.get_validated_ref("bucket", str(number), digest)
                assert path.read_bytes() == mine.read_bytes()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


def test_clear_forgets_here_and_nowhere_else(
    port: ReferenceCachePort, cache: dgcache.ReferenceCache, source: Path
) -> None:
    """The daemon's entries are other processes' as well; here it counts as gone until written."""
    port.write_ref("bucket", "prefix", source)
    path = port.get_validated_ref("bucket", "prefix", DIGEST)
    port.clear()
    assert not path.exists()
    assert port.has_ref("bucket", "prefix", DIGEST) is False
    with pytest.raises(CacheMissError):
        port.get_validated_ref("bucket", "prefix", DIGEST)
    if cache.backend == "dg-cached":
        assert cache.has("bucket", "prefix", DIGEST)
        assert ReferenceCachePort(cache).has_ref("bucket", "prefix", DIGEST)
    else:
        assert cache.entries() == []
    port.write_ref("bucket", "prefix", source)
    assert port.has_ref("bucket", "prefix", DIGEST) is True


def test_a_cache_that_is_too_small_fails_nothing(source: Path) -> None:
    """The reference is in the thread's hand all the same."""
    settings = dgcache.Settings(backend="memory", fallback_size_mb=1)
    with dgcache.ReferenceCache(settings) as small:
        port = ReferenceCachePort(small)
        port.write_ref("bucket", "prefix", source)
        source.unlink()
        assert port.get_validated_ref("bucket", "prefix", DIGEST).read_bytes() == DATA
        assert port.has_ref("bucket", "prefix", DIGEST) is False


def test_a_source_that_cannot_be_read_fails_nothing(
    port: ReferenceCachePort, tmp_path: Path
) -> None:
    """It was uploaded already: that it cannot be cached is not the user's trouble."""
    assert not port.write_ref("bucket", "prefix", tmp_path / "missing").exists()
    assert port.has_ref("bucket", "prefix", DIGEST) is False


class Storage:
    """S3 as DeltaService sees it, from memory; counts the fetches."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.fetches = 0

    def get(self, key: str) -> io.BytesIO:
        assert key == "bucket/prefix/reference.bin"
        self.fetches += 1
        return io.BytesIO(self.body)


def service_on(port: Any, storage: Storage) -> DeltaService:
    return DeltaService(storage, None, None, port, None, Mock(), Mock())  # type: ignore[arg-type]


@pytest.fixture
def installed(cache: dgcache.ReferenceCache) -> Iterator[None]:
    adapter.install(cache)
    yield
    adapter.uninstall()


@pytest.mark.usefixtures("installed")
def test_a_fetch_streams_without_a_file(
    port: ReferenceCachePort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No temporary directory is needed, so there is none that could keep the plaintext."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    service = service_on(port, Storage(DATA))
    service._cache_reference(DeltaSpace("bucket", "prefix"), DIGEST)
    assert port.get_validated_ref("bucket", "prefix", DIGEST).read_bytes() == DATA
    assert port.has_ref("bucket", "prefix", DIGEST)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("digest", [DIGEST, "fakehash"])
def test_a_fetch_of_other_bytes_is_an_integrity_mismatch(
    port: ReferenceCachePort, digest: str
) -> None:
    """As stock says it; nothing is kept."""
    service = service_on(port, Storage(b"other"))
    with pytest.raises(IntegrityMismatchError, match="Reference SHA mismatch"):
        service._cache_reference(DeltaSpace("bucket", "prefix"), digest)
    assert not port.has_ref("bucket", "prefix", DIGEST)


@pytest.mark.usefixtures("installed")
def test_install_leaves_other_caches_alone(tmp_path: Path) -> None:
    """A service on DeltaGlider's own cache fetches as it always did."""
    from deltaglider.adapters import Sha256Adapter

    stock = MemoryCache(Sha256Adapter(), max_size_mb=8, temp_dir=tmp_path)
    service = service_on(stock, Storage(DATA))
    service.hasher = Sha256Adapter()
    service._cache_reference(DeltaSpace("bucket", "prefix"), DIGEST)
    assert stock.has_ref("bucket", "prefix", DIGEST)


def test_install_serves_create_client_and_uninstall_gives_it_back(
    cache: dgcache.ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways in: for the process, and for one client."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    stock_fetch = DeltaService._cache_reference
    adapter.install(cache)
    adapter.install(cache)
    try:
        client = deltaglider.create_client(endpoint_url="http://127.0.0.1:9")
        assert isinstance(client.service.cache, ReferenceCachePort)
    finally:
        adapter.uninstall()
    assert DeltaService._cache_reference is stock_fetch
    client = deltaglider.create_client(endpoint_url="http://127.0.0.1:9")
    assert isinstance(client.service.cache, EncryptedCache)
    client = adapter.create_client(cache, endpoint_url="http://127.0.0.1:9")
    assert isinstance(client.service.cache, ReferenceCachePort)
    client.clear_cache()
    adapter.uninstall()
