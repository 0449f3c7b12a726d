"""The real DeltaGlider in its own environment, a real S3 server, and archives."""

import hashlib
import os
import random
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from benchmarks.testbed import ROOT, S3Server

from dgcache import Settings

ENVIRONMENT = ROOT / ".venv-deltaglider" / "bin"
REFERENCE = "/reference.bin"
_PATIENT_MS = "20000"
"""How long a client waits for the daemon: other processes may keep the machine busy."""


@pytest.fixture(scope="session", autouse=True)
def _deltaglider_is_installed() -> None:
    if not (ENVIRONMENT / "deltaglider").exists():
        pytest.fail("DeltaGlider's environment is missing: run make environments")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """One S3 server for a module's tests."""
    with S3Server() as server:
        yield server


@dataclass
class User:
    """Somebody who runs DeltaGlider, with everything of theirs below one directory."""

    s3: S3Server
    home: Path
    bucket: str
    environment: dict[str, str] = field(default_factory=dict)
    archive_bytes: int = 2_100_000

    def run(
        self, *argv: str | Path, status: int = 0, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program of DeltaGlider's environment; its exit status must be `status`."""
        program, *arguments = map(str, argv)
        done = subprocess.run(
            [str(ENVIRONMENT / program), *arguments],
            env=self.s3.environment({**self.environment, **environment}),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == status, done.stderr + done.stdout
        return done

    def key(self, name: str) -> str:
        return f"s3://{self.bucket}/app/{name}"

    def cached(self, *arguments: str | Path, **environment: str) -> str:
        """Run `dg-cache deltaglider` and return what it printed."""
        done = self.run("dg-cache", "deltaglider", *arguments, **environment)
        return done.stdout + done.stderr

    def stock(self, *arguments: str | Path) -> str:
        """Run `deltaglider` as it is and return what it printed."""
        done = self.run("deltaglider", *arguments)
        return done.stdout + done.stderr

    def archive(self, version: int) -> Path:
        """Return a version of an archive; versions share all but 1 % of their bytes."""
        path = self.home / f"app-{version}.zip"
        if not path.exists():
            data = bytearray(random.Random(0).randbytes(self.archive_bytes))
            changed = self.archive_bytes // 100
            start = 5 * changed * version
            data[start : start + changed] = random.Random(version).randbytes(changed)
            path.write_bytes(data)
        return path


@pytest.fixture
def user(s3: S3Server, tmp_path: Path, request: pytest.FixtureRequest, daemon: Settings) -> User:
    """A user with a bucket of their own and a running daemon."""
    bucket = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:40]
    s3.create_bucket(bucket)
    s3.reset_counts()
    (tmp_path / "tmp").mkdir()
    environment = {
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path / "tmp"),
        "DG_CACHE_SOCKET_DIR": str(daemon.socket_dir),
        "DG_CACHE_CONNECT_TIMEOUT_MS": _PATIENT_MS,
    }
    return User(s3, tmp_path, bucket, environment)


def run_suite(
    suite: str,
    *selection: str,
    daemon: Settings | None,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run tests of this folder in DeltaGlider's own environment; one that fails is shown.

    Args:
        suite: a module beside this one; `selection` goes to its pytest.
        daemon: whose cache they use; None is the in-process one.
        cwd: an empty directory.
        environment: the whole environment; where None, ours.
    """
    variables = {"DG_CACHE_BACKEND": "memory"}
    if daemon is not None:
        variables = {
            "DG_CACHE_SOCKET_DIR": str(daemon.socket_dir),
            "DG_CACHE_CONNECT_TIMEOUT_MS": _PATIENT_MS,
        }
    ours = os.environ if environment is None else environment
    path = Path(__file__).with_name(suite)
    done = subprocess.run(
        [
            *(ENVIRONMENT / "python", "-m", "pytest", "-q", "--noconftest", "-W", "error"),
            *("-p", "no:cacheprovider", "--rootdir", path.parent, "-c", os.devnull),
            *(path, *selection),
        ],
        env={k: v for k, v in ours.items() if not k.startswith("PYTEST_")} | variables,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
