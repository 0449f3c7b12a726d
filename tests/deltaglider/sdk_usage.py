"""Every method of DeltaGlider's SDK that needs a reference takes it from the cache.

Run in DeltaGlider's environment by test_usage_points_sdk.py and test_two_endpoints.py, which start
the S3 servers, count the GETs there, and say in the environment whether there is a daemon. A
`newcomer` is what another process would be: a client with a session and an in-process cache of its
own. On the daemon it fetches nothing; without it, each reference once.
"""

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import boto3
import deltaglider
import pytest
from deltaglider.core.models import DeltaSpace, ObjectKey

import dgcache
from dgcache import deltaglider as adapter
from dgcache.deltaglider import ReferenceCachePort

ENDPOINTS = os.environ["TEST_S3_ENDPOINTS"].split()
ON_DAEMON = "DG_CACHE_SOCKET_DIR" in os.environ
EACH_ONCE = 0 if ON_DAEMON else 1
"""How often a newcomer fetches one reference from S3."""

REFERENCE = "/reference.bin"
_BYTES = 300_000

Versions = Callable[..., bytes]
Newcomers = Callable[..., Any]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def boto(endpoint: str) -> Any:
    return boto3.client("s3", endpoint_url=endpoint)


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ExitStack]:
    """Whatever a test opens ends with it; temporary files of DeltaGlider are in its directory."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def newcomer(resources: ExitStack) -> Newcomers:
    """Make clients."""

    def make(endpoint: str = ENDPOINTS[0]) -> Any:
        cache = resources.enter_context(dgcache.open())
        assert (cache.backend == "dg-cached") is ON_DAEMON
        client = adapter.create_client(cache, endpoint_url=endpoint, log_level="ERROR")
        resources.callback(client.service.storage.client.close)
        return client

    return make


@pytest.fixture
def client(newcomer: Newcomers) -> Any:
    """The client that uploads."""
    return newcomer()


@pytest.fixture
def bucket(resources: ExitStack) -> str:
    """An empty bucket at every endpoint, named the same."""
    name = os.urandom(16).hex()
    for endpoint in ENDPOINTS:
        s3 = boto(endpoint)
        resources.callback(s3.close)
        s3.create_bucket(Bucket=name)
    return name


@pytest.fixture
def version(bucket: str) -> Versions:
    """Versions of archives; those of one seed share all but 1 % of their bytes.

    No other test has the same, since one blob serves every deltaspace that has its digest.
    """

    def make(number: int, seed: int = 0) -> bytes:
        data = bytearray(random.Random(f"{bucket} {seed}").randbytes(_BYTES))
        changed = _BYTES // 100
        start = 2 * changed * number
        data[start : start + changed] = random.Random(f"{seed} {number}").randbytes(changed)
        return bytes(data)

    return make


def reference_gets() -> int:
    """Return how often any reference was fetched, at all endpoints together."""
    total = 0
    for endpoint in ENDPOINTS:
        with urllib.request.urlopen(f"{endpoint}/__counts__", timeout=60) as answer:
            rows = json.load(answer)
        total += sum(n for method, path, n in rows if (method, path[-14:]) == ("GET", REFERENCE))
    return total


def hits() -> int:
    """Return how often the daemon handed out a reference; 0 without one."""
    if not ON_DAEMON:
        return 0
    with dgcache.open() as cache:
        return int(cache.status()["store"]["hits"])


@contextmanager
def costs(*, gets: int, at_least_hits: int) -> Iterator[None]:
    """Require how many references are fetched in the block, and how often the daemon hits."""
    before = reference_gets(), hits()
    yield
    after = reference_gets(), hits()
    assert after[0] - before[0] == gets
    assert after[1] - before[1] >= (at_least_hits if ON_DAEMON else 0)


@pytest.fixture
def archives(version: Versions, tmp_path: Path) -> list[Path]:
    """Three versions of an archive in files."""
    paths = []
    for number in range(3):
        path = tmp_path / f"app-{number}.zip"
        path.write_bytes(version(number))
        paths.append(path)
    return paths


@pytest.mark.parametrize("prefix", ["app/releases/", ""])
def test_put_object_and_get_object(
    client: Any, newcomer: Newcomers, bucket: str, version: Versions, prefix: str
) -> None:
    """As boto3 has them; a deltaspace may be the bucket's root."""
    keys = [f"{prefix}app-{number}.zip" for number in range(3)]
    with costs(gets=0, at_least_hits=2):
        for number, key in enumerate(keys):
            client.put_object(Bucket=bucket, Key=key, Body=version(number))
    other = newcomer()
    with costs(gets=EACH_ONCE, at_least_hits=3):
        for number, key in enumerate(keys):
            with other.get_object(Bucket=bucket, Key=key)["Body"] as body:
                assert body.read() == version(number)
    with costs(gets=0, at_least_hits=1):  # what a download made warm serves an upload
        other.put_object(Bucket=bucket, Key=f"{prefix}app-3.zip", Body=version(3))
    with client.get_object(Bucket=bucket, Key=f"{prefix}app-3.zip")["Body"] as body:
        assert body.read() == version(3)


@pytest.mark.parametrize("chunk_bytes", [None, _BYTES // 4])
def test_upload_and_download(
    client: Any,
    newcomer: Newcomers,
    bucket: str,
    archives: list[Path],
    tmp_path: Path,
    chunk_bytes: int | None,
) -> None:
    """And upload_chunked, which is upload with a progress bar."""
    url = f"s3://{bucket}/app"
    with costs(gets=0, at_least_hits=2):
        for path in archives:
            if chunk_bytes is None:
                summary = client.upload(path, url)
            else:
                summary = client.upload_chunked(path, url, chunk_size=chunk_bytes)
            assert summary.is_delta is (path is not archives[0])
    other, out = newcomer(), tmp_path / "out"
    with costs(gets=EACH_ONCE, at_least_hits=3):
        for path in archives:
            other.download(f"{url}/{path.name}", out)
            assert out.read_bytes() == path.read_bytes()
    with costs(gets=0, at_least_hits=1):
        assert other.verify(f"{url}/{archives[1].name}.delta") is True


def test_upload_batch_and_download_batch(
    client: Any, newcomer: Newcomers, bucket: str, version: Versions, tmp_path: Path
) -> None:
    """A batch gives every file a deltaspace of its own, so that its next version finds it there."""
    url, names = f"s3://{bucket}/app", ("app.zip", "lib.zip")

    def written(number: int) -> list[Path]:
        directory = tmp_path / f"batch-{number}"
        directory.mkdir()
        for seed, name in enumerate(names):
            (directory / name).write_bytes(version(number, seed))
        return [directory / name for name in names]

    with costs(gets=0, at_least_hits=0):
        assert not any(summary.is_delta for summary in client.upload_batch(written(0), url))
    other, files = newcomer(), written(1)
    with costs(gets=2 * EACH_ONCE, at_least_hits=2):
        assert all(summary.is_delta for summary in other.upload_batch(files, url))
    urls = [f"{url}/{name}/{name}" for name in names]
    third = newcomer()
    with costs(gets=2 * EACH_ONCE, at_least_hits=2):
        done = third.download_batch(urls, tmp_path / "out")
    assert [path.read_bytes() for path in done] == [path.read_bytes() for path in files]


def test_the_service_says_that_it_hit(
    client: Any, newcomer: Newcomers, bucket: str, archives: list[Path]
) -> None:
    """What DeltaGlider itself counts as a hit, and a download into a stream."""
    space = DeltaSpace(bucket, "app")
    assert client.service.put(archives[0], space).cache_hit is False
    assert client.service.put(archives[1], space).cache_hit is True
    other = newcomer()
    with costs(gets=EACH_ONCE, at_least_hits=1):
        assert other.service.put(archives[2], space).cache_hit is ON_DAEMON
    out = io.BytesIO()
    with costs(gets=0, at_least_hits=1):
        other.service.get(ObjectKey(bucket, "app/app-2.zip.delta"), out)
    assert out.getvalue() == archives[2].read_bytes()


@pytest.mark.parametrize("how", ["rehydrate_for_download", "presigned"])
def test_rehydration(
    client: Any, newcomer: Newcomers, bucket: str, archives: list[Path], how: str
) -> None:
    """A temporary object with the archive's bytes, or the URL of one that any browser can use."""
    for path in archives[:2]:
        client.upload(path, f"s3://{bucket}/app")
    other, key = newcomer(), "app/app-1.zip"
    with costs(gets=EACH_ONCE, at_least_hits=1):
        if how == "presigned":
            url = other.generate_presigned_url_with_rehydration(Bucket=bucket, Key=key)
        else:
            temporary = other.rehydrate_for_download(Bucket=bucket, Key=key)
            assert temporary.startswith(".deltaglider/tmp/")
            url = other.generate_presigned_url("get_object", {"Bucket": bucket, "Key": temporary})
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert answer.read() == archives[1].read_bytes()
    with costs(gets=0, at_least_hits=1):
        other.generate_presigned_url_with_rehydration(Bucket=bucket, Key=key)


def _delete_last_object(client: Any, bucket: str) -> None:
    client.delete_object(Bucket=bucket, Key="app/app-0.zip")


def _delete_last_objects(client: Any, bucket: str) -> None:
    client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "app/app-0.zip"}]})


def _delete_reference(client: Any, bucket: str) -> None:
    client.delete_object(Bucket=bucket, Key="app/reference.bin")


def _delete_recursively(client: Any, bucket: str) -> None:
    client.delete_objects_recursive(Bucket=bucket, Prefix="app")


@pytest.mark.parametrize(
    "delete",
    [_delete_last_object, _delete_last_objects, _delete_reference, _delete_recursively],
)
def test_deletion_of_a_deltaspace_frees_its_reference(
    client: Any,
    bucket: str,
    version: Versions,
    archives: list[Path],
    tmp_path: Path,
    delete: Callable[[Any, str], None],
) -> None:
    """For everybody, and only this one; what is uploaded there next has its own bytes."""
    cache, reference = client.service.cache._cache, sha256(version(0))
    client.upload(archives[0], f"s3://{bucket}/app")
    (tmp_path / "lib.zip").write_bytes(version(0, seed=1))
    client.upload(tmp_path / "lib.zip", f"s3://{bucket}/lib")
    assert cache.has(bucket, "app", reference)
    delete(client, bucket)
    assert not cache.has(bucket, "app", reference)
    assert cache.has(bucket, "lib", sha256(version(0, seed=1)))
    for path in archives[1:]:
        client.upload(path, f"s3://{bucket}/app")
    with costs(gets=0, at_least_hits=1):
        client.download(f"s3://{bucket}/app/app-2.zip", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == archives[2].read_bytes()


def test_deletion_of_one_of_several_frees_nothing(
    client: Any, newcomer: Newcomers, bucket: str, archives: list[Path], tmp_path: Path
) -> None:
    """The reference is still needed, and still warm."""
    for path in archives:
        client.upload(path, f"s3://{bucket}/app")
    client.delete_object(Bucket=bucket, Key="app/app-1.zip")
    with costs(gets=EACH_ONCE, at_least_hits=1):
        newcomer().download(f"s3://{bucket}/app/app-2.zip", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == archives[2].read_bytes()


def test_clear_cache_forgets_in_this_client_alone(
    resources: ExitStack,
    newcomer: Newcomers,
    bucket: str,
    archives: list[Path],
    tmp_path: Path,
) -> None:
    """This one fetches anew, once; another client and another process go on hitting.

    The client comes from DeltaGlider's own create_client, after install().
    """
    adapter.install(resources.enter_context(dgcache.open()))
    resources.callback(adapter.uninstall)
    client = deltaglider.create_client(endpoint_url=ENDPOINTS[0], log_level="ERROR")
    resources.callback(client.service.storage.client.close)
    assert isinstance(client.service.cache, ReferenceCachePort)
    out, url = tmp_path / "out", f"s3://{bucket}/app/app-1.zip"
    for path in archives[:2]:
        client.upload(path, f"s3://{bucket}/app")
    client.clear_cache()
    with costs(gets=EACH_ONCE, at_least_hits=1):
        newcomer().download(url, out)
    with costs(gets=EACH_ONCE, at_least_hits=1):
        command = ["-m", "dgcache_cli", "deltaglider", "cp", url, str(tmp_path / "theirs")]
        subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=100)
    for path in (out, tmp_path / "theirs"):
        assert path.read_bytes() == archives[1].read_bytes()
    with costs(gets=1, at_least_hits=0):
        client.download(url, out)
    with costs(gets=0, at_least_hits=2):
        client.download(url, out)
        client.upload(archives[2], f"s3://{bucket}/app")
    assert out.read_bytes() == archives[1].read_bytes()


def test_two_endpoints_go_on_hitting(
    newcomer: Newcomers, bucket: str, version: Versions, tmp_path: Path
) -> None:
    """The same bucket and prefix, other bytes: staging and production in one process, in turn."""
    clients = [newcomer(endpoint) for endpoint in ENDPOINTS]
    assert len(clients) == 2
    url = f"s3://{bucket}/app"

    def upload(number: int) -> None:
        for seed, client in enumerate(clients):
            path = tmp_path / f"app-{number}.zip"
            path.write_bytes(version(number, seed))
            client.upload(path, url)

    def download(number: int) -> None:
        for seed, client in enumerate(clients):
            out = tmp_path / "out"
            client.download(f"{url}/app-{number}.zip", out)
            assert out.read_bytes() == version(number, seed)

    with costs(gets=0, at_least_hits=4):
        for number in range(3):
            upload(number)
    clients = [newcomer(endpoint) for endpoint in ENDPOINTS]
    with costs(gets=2 * EACH_ONCE, at_least_hits=6):
        for number in range(3):
            download(number)
    with costs(gets=0, at_least_hits=4):
        upload(3)
        download(3)


def test_two_endpoints_through_one_cache(
    resources: ExitStack, newcomer: Newcomers, bucket: str, version: Versions, tmp_path: Path
) -> None:
    """Also where one in-process cache serves both clients: each reference is fetched once."""
    cache = resources.enter_context(dgcache.open())
    for seed, endpoint in enumerate(ENDPOINTS):
        client = newcomer(endpoint)
        for number in range(2):
            key = f"app/app-{number}.zip"
            client.put_object(Bucket=bucket, Key=key, Body=version(number, seed))
    cache.clear()
    clients = [
        adapter.create_client(cache, endpoint_url=endpoint, log_level="ERROR")
        for endpoint in ENDPOINTS
    ]
    for client in clients:
        resources.callback(client.service.storage.client.close)
    out = tmp_path / "out"
    with costs(gets=2, at_least_hits=4):
        for _ in range(3):
            for seed, client in enumerate(clients):
                client.download(f"s3://{bucket}/app/app-1.zip", out)
                assert out.read_bytes() == version(1, seed)
