"""Staging and production: two S3 servers with the same bucket and prefix, and other references.

A deltaspace is a bucket and a prefix, so both share one in the daemon. A lookup names the digest,
and a reference does not leave because its deltaspace got another: both go on hitting.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from benchmarks.testbed import S3Server

import dgcache
from dgcache import Settings
from tests.deltaglider.conftest import User, run_suite
from tests.deltaglider.usage import Meter, both


@pytest.fixture(scope="module")
def production() -> Iterator[S3Server]:
    """Another S3 server beside `s3`."""
    with S3Server() as server:
        yield server


@dataclass(frozen=True)
class Sides:
    """One user with one daemon, who works on both servers in turn."""

    users: tuple[User, User]

    def upload(self, version: int) -> None:
        for user in self.users:
            user.cached("cp", user.archive(version), user.key(f"app-{version}.zip"))

    def download(self, version: int) -> None:
        for user in self.users:
            out = user.home / "out.zip"
            user.cached("cp", user.key(f"app-{version}.zip"), out)
            assert out.read_bytes() == user.archive(version).read_bytes()


@pytest.fixture
def sides(user: User, production: S3Server) -> Sides:
    """The same bucket at both; the archives have no byte in common but by chance."""
    home = user.home / "production"
    home.mkdir()
    production.create_bucket(user.bucket)
    user.archive_bytes = 300_000
    other = replace(user, s3=production, home=home)
    for version in range(3):
        path = home / f"app-{version}.zip"
        path.write_bytes(user.archive(version).read_bytes()[::-1])
    return Sides((user, other))


def test_two_endpoints_go_on_hitting_through_one_daemon(sides: Sides, daemon: Settings) -> None:
    """Uploads and downloads in turn, each a process: one GET of each reference, then none."""
    meter = Meter(tuple(user.s3 for user in sides.users), daemon, on_daemon=True)
    with meter.costs(hits=4):
        sides.upload(0)
        sides.upload(1)
    with dgcache.open(daemon) as cache:
        cache.clear()
    with meter.costs(hits=0, gets=2):
        sides.download(1)
    with meter.costs(hits=4):
        sides.upload(2)
        sides.download(2)


def test_rm_at_one_endpoint_costs_the_other_one_get(sides: Sides, daemon: Settings) -> None:
    """The daemon does not know whose a reference is: it frees both, and the other's comes back."""
    staging, other = sides.users
    meter = Meter((other.s3,), daemon, on_daemon=True)
    sides.upload(0)
    staging.cached("rm", "-r", f"s3://{staging.bucket}/app/")
    with dgcache.open(daemon) as cache:
        assert cache.entries() == []
    out = other.home / "out.zip"
    with meter.costs(hits=1, gets=1):
        for _ in range(2):
            other.cached("cp", other.key("app-0.zip"), out)
            assert out.read_bytes() == other.archive(0).read_bytes()


@both
def test_two_endpoints_go_on_hitting_through_the_sdk(
    s3: S3Server, production: S3Server, daemon: Settings, tmp_path: Path, on_daemon: bool
) -> None:
    """Two clients in one process; without a daemon, each in-process cache fetches once."""
    run_suite(
        "sdk_usage.py",
        *("-k", "two_endpoints"),
        daemon=daemon if on_daemon else None,
        cwd=tmp_path,
        environment=s3.environment({"TEST_S3_ENDPOINTS": f"{s3.url} {production.url}"}),
    )
