"""Fixtures of the room `core`: stores that are closed, no descriptor is left, no umask changed."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dgcache_core.memory_store import MemoryStore

from .support import HandClock, open_descriptors
from .tier import Tier

MIB = 1 << 20
DAY = 86_400.0


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    """Whatever a test does, the process has the same descriptors open afterwards."""
    before = open_descriptors()
    yield
    if open_descriptors() != before:
        gc.collect()  # what an exception's traceback kept
        assert open_descriptors() == before


@pytest.fixture
def clock() -> HandClock:
    """The clock of `make_store`'s stores."""
    return HandClock()


@pytest.fixture
def make_store(clock: HandClock) -> Iterator[Callable[..., MemoryStore]]:
    """Make stores that are closed when the test ends."""
    stores: list[MemoryStore] = []

    def make(max_bytes: int = 32 * MIB, ttl_seconds: float = DAY, **options: Any) -> MemoryStore:
        options = {"may_fork": True, "max_entries": 64, "clock": clock} | options
        stores.append(MemoryStore(max_bytes, ttl_seconds, **options))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(make_store: Callable[..., MemoryStore]) -> MemoryStore:
    """An empty store of 32 MiB."""
    return make_store()


@pytest.fixture
def tier(short_directory: Path) -> Iterator[Tier]:
    """A directory for the disk tier, and what its stores are opened with."""
    made = Tier(short_directory.resolve() / "tier")
    yield made
    made.close()
    made.slab.close()


@pytest.fixture
def any_umask() -> Iterator[None]:
    """Give the process its umask back after a test that changes it."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.fixture
def as_somebody_else() -> Callable[[Callable[[], str]], str]:
    """Do something with another effective user, and come back."""

    def do(what: Callable[[], str]) -> str:
        os.setegid(12345)
        os.seteuid(12345)
        try:
            return what()
        finally:
            os.seteuid(0)
            os.setegid(0)

    return do
