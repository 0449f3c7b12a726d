"""What an operation of DeltaGlider costs: GETs of references at S3, and lookups in the daemon.

A cache that is not used shows: DeltaGlider downloads the reference for every file that it encodes
or decodes, and it does so from S3, where the requests are counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from benchmarks.testbed import S3Server

import dgcache
from dgcache import Settings
from tests.deltaglider.conftest import REFERENCE


@dataclass(frozen=True)
class Meter:
    """Counts at any number of S3 servers and in one daemon, used or not."""

    servers: tuple[S3Server, ...]
    daemon: Settings
    on_daemon: bool

    @contextmanager
    def costs(self, *, hits: int, gets: int = 0, gets_in_process: int = 0) -> Iterator[None]:
        """Require what the block costs.

        Args:
            hits: how often, at least, the daemon handed out a reference.
            gets: how often exactly a reference was fetched from S3, all servers together, where
                the daemon is used.
            gets_in_process: the same where every process begins with an empty cache of its own.
        """
        for server in self.servers:
            server.reset_counts()
        before = self._store()
        yield
        fetched = [server.count("GET", REFERENCE) for server in self.servers]
        after = self._store()
        if self.on_daemon:
            assert sum(fetched) == gets, fetched
            assert after["hits"] - before["hits"] >= hits, after
        else:
            assert sum(fetched) == gets_in_process, fetched
            assert after == before

    def _store(self) -> dict[str, Any]:
        with dgcache.open(self.daemon) as cache:
            assert cache.backend == "dg-cached"
            store: dict[str, Any] = cache.status()["store"]
            return {name: store[name] for name in ("hits", "stores", "misses", "entries")}


both = pytest.mark.parametrize("on_daemon", [True, False], ids=["dg-cached", "in-process"])
"""On the daemon, and without it, in one process after another."""
on_the_daemon = pytest.mark.parametrize("on_daemon", [True], ids=["dg-cached"])
