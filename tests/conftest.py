"""What every test may ask for: real daemons, caches on every backend, sources of every kind."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgcache import Settings
from dgcache.cache import ReferenceCache
from dgcache.testing import daemon_cache, running_daemon
from tests.support.user_manager import UserManager, require_user_manager, shared_wheel, succeed


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the developer's settings or daemon."""
    for name in list(os.environ):
        if name.startswith(("DG_", "XDG_RUNTIME_DIR", "NOTIFY_SOCKET", "LISTEN_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/dev/null")  # nothing is there, or can be made there


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name (sun_path has 107 bytes)."""
    with tempfile.TemporaryDirectory(prefix="dgt-") as directory:
        yield Path(directory)


@pytest.fixture
def daemon() -> Iterator[Settings]:
    """Settings that lead to a daemon of this test alone, with a budget of 64 MiB."""
    with running_daemon() as settings:
        yield settings


@pytest.fixture(params=["dg-cached", "dg-cached-direct", "memory", "filesystem"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ReferenceCache]:
    """An empty cache of 64 MiB on each backend in turn, the daemon's by each transport."""
    backend: str = request.param
    if backend.startswith("dg-cached"):
        transport = "direct" if backend.endswith("direct") else "grpc"
        with daemon_cache(transport=transport) as on_daemon:
            assert on_daemon.backend == "dg-cached"
            yield on_daemon
        return
    settings = Settings(backend=backend, fallback_size_mb=64, cache_dir=tmp_path)
    with ReferenceCache(settings) as in_process:
        yield in_process
        assert in_process.backend == backend


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` directory of the installed wheel, for users who have a manager."""
    require_user_manager()
    return shared_wheel(tmp_path_factory)


@pytest.fixture
def manager(programs: Path) -> Iterator[UserManager]:
    """A user manager whose user has installed the units, and done nothing else."""
    with UserManager(readable=[programs.parent]) as running:
        installed = running.run([programs / "dg-cache", "install", "--units-only"])
        assert installed.returncode == 0, installed.stderr
        succeed(running, "daemon-reload")
        yield running
