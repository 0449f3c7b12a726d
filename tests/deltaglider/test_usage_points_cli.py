"""Every command of DeltaGlider that needs a reference takes it from the cache.

Each test runs DeltaGlider's own command line in processes of their own against a real S3 server,
counts the GETs of references there and the hits of a real daemon, and compares all bytes. What was
uploaded is decoded from S3 by xdelta3 alone, without DeltaGlider and its cache.
"""

import hashlib
import json
import shlex
import subprocess
from pathlib import Path

import pytest
from benchmarks.testbed import S3Server

import dgcache
from dgcache import Settings
from tests.deltaglider.conftest import ENVIRONMENT, REFERENCE, User
from tests.deltaglider.usage import Meter, both, on_the_daemon


@pytest.fixture
def meter(user: User, daemon: Settings, on_daemon: bool) -> Meter:
    """What the user's processes cost; without the daemon they use the in-process cache."""
    user.archive_bytes = 300_000
    if not on_daemon:
        user.environment["DG_CACHE_BACKEND"] = "memory"
    return Meter((user.s3,), daemon, on_daemon)


def tree(user: User, name: str, *versions: int) -> Path:
    """Return a directory with these versions of two archives, in two deltaspaces, and a text.

    What it has already stays untouched, with its time of change: sync goes by that.
    """
    directory = user.home / name
    if not directory.exists():
        (directory / "sub").mkdir(parents=True)
        (directory / "notes.txt").write_text("no archive")
    for version in versions:
        content = user.archive(version).read_bytes()
        (directory / f"app-{version}.zip").write_bytes(content)
        (directory / "sub" / f"lib-{version}.zip").write_bytes(content[::-1])
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def decoded(user: User, key: str) -> bytes:
    """Return an archive from what lies at S3, by xdelta3 alone."""
    work = user.home / "decoded"
    work.mkdir(exist_ok=True)
    reference, delta, out = work / "reference", work / "delta", work / "out"
    user.s3.save(user.bucket, f"{key.rpartition('/')[0]}/reference.bin", reference)
    user.s3.save(user.bucket, f"{key}.delta", delta)
    subprocess.run(["xdelta3", "-d", "-f", "-s", reference, delta, out], check=True, timeout=60)
    return out.read_bytes()


def stored(user: User, prefix: str, *versions: int) -> None:
    """Require that what `tree` makes lies below a prefix at S3, byte for byte."""
    for version in versions:
        content = user.archive(version).read_bytes()
        assert decoded(user, f"{prefix}/app-{version}.zip") == content
        assert decoded(user, f"{prefix}/sub/lib-{version}.zip") == content[::-1]


@on_the_daemon
def test_cp_encodes_and_decodes_with_the_cached_reference(user: User, meter: Meter) -> None:
    """An upload makes it warm; the next uploads and downloads are processes of their own."""
    with meter.costs(hits=1):
        user.cached("cp", user.archive(0), user.key("app-0.zip"))
        user.cached("cp", user.archive(1), user.key("app-1.zip"))
    assert decoded(user, "app/app-1.zip") == user.archive(1).read_bytes()
    with meter.costs(hits=1):
        user.cached("cp", user.key("app-1.zip"), user.home / "out.zip")
    assert (user.home / "out.zip").read_bytes() == user.archive(1).read_bytes()


@both
def test_recursive_cp_uses_the_cache_in_both_directions(user: User, meter: Meter) -> None:
    """Six archives in two deltaspaces: in-process, one process fetches each reference once."""
    source = tree(user, "source", 0, 1, 2)
    with meter.costs(hits=4):
        user.cached("cp", "-r", source, f"s3://{user.bucket}/app")
    stored(user, "app", 0, 1, 2)
    with meter.costs(hits=6, gets_in_process=2):
        user.cached("cp", "-r", f"s3://{user.bucket}/app/", user.home / "out")
    assert contents(user.home / "out") == contents(source)


@both
def test_sync_uses_the_cache_in_both_directions(user: User, meter: Meter) -> None:
    """Also when only what is new is uploaded, which a process of its own does."""
    source, url = tree(user, "source", 0, 1), f"s3://{user.bucket}/app"
    with meter.costs(hits=2):
        user.cached("sync", source, url)
    tree(user, "source", 2)
    with meter.costs(hits=2, gets_in_process=2):
        said = user.cached("sync", source, url)
    assert "Sync completed: 2 uploaded" in said
    stored(user, "app", 0, 1, 2)
    with meter.costs(hits=6, gets_in_process=2):
        user.cached("sync", url, user.home / "out")
    assert contents(user.home / "out") == contents(source)


@both
def test_a_migration_from_s3_to_s3_encodes_with_the_cached_reference(
    user: User, meter: Meter
) -> None:
    """Objects of other programs become deltas; a second migration does what is new."""
    source, target = f"s3://{user.bucket}/plain/", f"s3://{user.bucket}/moved/"

    def found(*versions: int) -> None:
        for key, content in contents(tree(user, "found", *versions)).items():
            user.s3.put(user.bucket, f"plain/{key}", content)

    found(0, 1)
    with meter.costs(hits=2):
        user.cached("cp", "-r", source, target)
    found(2)
    with meter.costs(hits=2, gets_in_process=2):
        user.cached("migrate", "--yes", source, target)
    stored(user, "moved/plain", 0, 1, 2)


@on_the_daemon
def test_a_copy_from_s3_to_s3_encodes_with_the_cached_reference(user: User, meter: Meter) -> None:
    """One object of another program becomes a delta beside what DeltaGlider uploaded."""
    user.cached("cp", user.archive(0), user.key("app-0.zip"))
    user.s3.put(user.bucket, "plain/app-1.zip", user.archive(1).read_bytes())
    with meter.costs(hits=1):
        said = user.cached("cp", f"s3://{user.bucket}/plain/app-1.zip", user.key("app-1.zip"))
    assert "Copy completed with delta compression" in said
    assert decoded(user, "app/app-1.zip") == user.archive(1).read_bytes()


@on_the_daemon
def test_verify_decodes_with_the_cached_reference(user: User, meter: Meter) -> None:
    """Its answer names the digest of what was uploaded."""
    user.cached("cp", "-r", tree(user, "source", 0, 1), f"s3://{user.bucket}/app")
    with meter.costs(hits=1):
        said = user.run("dg-cache", "deltaglider", "verify", user.key("app-1.zip.delta")).stdout
    answer = json.loads(said)
    assert answer["valid"] is True
    assert answer["actual_sha256"] == hashlib.sha256(user.archive(1).read_bytes()).hexdigest()


@on_the_daemon
def test_rm_of_a_deltaspace_frees_its_reference(user: User, meter: Meter, daemon: Settings) -> None:
    """And only its own; what is uploaded there afterwards has another one, and its bytes."""
    kept = hashlib.sha256(user.archive(0).read_bytes()).hexdigest()
    gone = hashlib.sha256(user.archive(0).read_bytes()[::-1]).hexdigest()
    user.cached("cp", "-r", tree(user, "source", 0), f"s3://{user.bucket}/app")
    with dgcache.open(daemon) as cache:
        assert cache.has(user.bucket, "app/sub", gone)
        user.cached("rm", "-r", f"s3://{user.bucket}/app/sub/")
        assert not cache.has(user.bucket, "app/sub", gone)
        assert cache.has(user.bucket, "app", kept)
    with meter.costs(hits=3):
        user.cached("cp", "-r", tree(user, "next", 1, 2), f"s3://{user.bucket}/app")
        user.cached("cp", user.key("sub/lib-2.zip"), user.home / "out.zip")
    assert (user.home / "out.zip").read_bytes() == user.archive(2).read_bytes()[::-1]


def test_commands_that_need_no_reference_look_for_no_daemon(user: User, tmp_path: Path) -> None:
    """They list, count and clean up without asking the cache, so they do not wait for it."""
    user.environment["DG_CACHE_SOCKET_DIR"] = str(tmp_path / "missing")
    said = user.cached("cp", user.archive(0), user.key("app-0.zip"))
    assert "using the in-process cache" in said
    bucket = f"s3://{user.bucket}"
    for command in (("ls", f"{bucket}/app/"), ("stats", bucket), ("purge", bucket)):
        assert "using the in-process cache" not in user.cached(*command)


def test_any_program_decodes_a_delta_with_a_reference_that_is_fetched_once(
    s3: S3Server, user: User, daemon: Settings
) -> None:
    """xdelta3 alone, a delta of stock DeltaGlider's, and a command that fetches the reference."""
    source = tree(user, "source", 0, 1)
    user.stock("cp", "-r", "--include", "app-*", source, f"s3://{user.bucket}/app")
    metadata = json.loads(python(user, _METADATA, user.bucket, "app/app-1.zip.delta"))
    s3.save(user.bucket, "app/app-1.zip.delta", user.home / "delta")
    fetch = shlex.join([str(ENVIRONMENT / "python"), "-c", _FETCH, user.bucket])
    s3.reset_counts()
    for name in ("first.zip", "second.zip"):
        user.run(
            *("dg-cache", "get", f"s3://{user.bucket}/app", metadata["dg-ref-sha256"]),
            *("--fetch", f"echo ran >> fetches; {fetch}"),
            *("--exec", "xdelta3", "-d", "-s", "{}", "delta", name),
        )
        assert (user.home / name).read_bytes() == (source / "app-1.zip").read_bytes()
    assert (user.home / "fetches").read_text() == "ran\n"
    assert s3.count("GET", REFERENCE) == 1
    with dgcache.open(daemon) as cache:
        assert cache.status()["store"]["hits"] == 1


def python(user: User, script: str, *arguments: str) -> str:
    return user.run("python", "-c", script, *arguments).stdout


_METADATA = """\
import boto3, json, sys
print(json.dumps(boto3.client("s3").head_object(Bucket=sys.argv[1], Key=sys.argv[2])["Metadata"]))
"""

_FETCH = """\
import boto3, shutil, sys
answer = boto3.client("s3").get_object(Bucket=sys.argv[1], Key="app/reference.bin")
shutil.copyfileobj(answer["Body"], sys.stdout.buffer)
"""
