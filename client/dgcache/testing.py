"""Caches for your own tests: isolated from the environment, gone when the block ends.

from dgcache.testing import memory_cache

def test_my_tool():
    with memory_cache() as cache:
        ...
"""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dgcache import Settings, launcher
from dgcache.cache import ReferenceCache


@contextmanager
def memory_cache(size_mb: float = 64) -> Iterator[ReferenceCache]:
    """Lend an empty in-process cache of `size_mb` MiB."""
    with ReferenceCache(Settings(backend="memory", fallback_size_mb=size_mb)) as cache:
        yield cache


@contextmanager
def running_daemon(size_mb: float = 64, python: str = sys.executable) -> Iterator[Settings]:
    """Run a real daemon in a directory of its own and lend settings that lead to it.

    Args:
        size_mb: its byte budget in MiB.
        python: the interpreter of the installation whose daemon it is.
    """
    with tempfile.TemporaryDirectory(prefix="dgc-") as base:
        socket_dir = Path(base, "s")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DG_")}
        environment["DG_CACHE_SOCKET_DIR"] = str(socket_dir)
        environment["XDG_CONFIG_HOME"] = str(Path(base, "config"))  # no file of the user's
        options = ("--memory-size-mb", str(size_mb))
        process = launcher.start(
            environment,
            socket_dir,
            options=options,
            log_file=Path(base, "log", "dg-cached.log"),
            python=python,
        )
        settings = Settings(socket_dir=socket_dir, connect_timeout_ms=5000)
        try:
            yield settings
        finally:
            if process is not None:
                process.terminate()
                process.wait(timeout=30)


@contextmanager
def daemon_cache(size_mb: float = 64, transport: str | None = None) -> Iterator[ReferenceCache]:
    """Lend a cache on a real daemon of its own, reached by `transport`."""
    with (
        running_daemon(size_mb) as settings,
        ReferenceCache(dataclasses.replace(settings, transport=transport)) as cache,
    ):
        yield cache
