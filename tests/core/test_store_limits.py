"""At the process's limits and at its own end a store answers with CacheError and loses nothing."""

import pytest

from dgcache_core.errors import CacheError
from dgcache_core.memory_store import MemoryStore

from .conftest import DAY, MIB
from .support import RELEASES, content, digest_of, put, run_python

BEGIN = """
import io, os, resource, sys, threading
from concurrent.futures import ThreadPoolExecutor
from dgcache_core.errors import CacheError, CacheFullError
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Deltaspace
space = Deltaspace("b", "p")
store = MemoryStore(64 << 20, 1000, may_fork=True)
def put(size):
    with store.begin(size, space) as ingest:
        ingest.fill(io.BytesIO(bytes(size)).readinto)
        return ingest.commit()
def open_files():
    return len(os.listdir("/proc/self/fd")) - 1
"""

LOOKUP_WITHOUT_DESCRIPTORS = (
    BEGIN
    + """
digest = put(int(sys.argv[1]))
before = open_files()
for spare in (0, 1, 2, 3):
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + spare, 4096))
    try:
        os.close(store.lookup(space, digest).fd)
        answer = "found"
    except CacheFullError:
        answer = "full"
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    store.sweep()
    status = store.status()
    assert open_files() == before, (spare, open_files(), before)
    assert (status.reserved_bytes, status.handout_bytes, status.entries) == (0, 0, 1), status
    print(answer, end=" ")
"""
)


@pytest.mark.parametrize("size", [100, 9 * MIB])
def test_a_lookup_without_descriptors_is_cache_full(size: int) -> None:
    """At the limit, and one below, where the file can be made and not opened again: nothing
    leaks, nothing stays reserved, and the entry is there when there are descriptors."""
    assert run_python(LOOKUP_WITHOUT_DESCRIPTORS, str(size)) == "full full found found"


STORE_WITHOUT_DESCRIPTORS = (
    BEGIN
    + """
before = open_files()
resource.setrlimit(resource.RLIMIT_NOFILE, (before, 4096))
for _ in range(3):
    try:
        store.begin(1000, space)
    except CacheFullError:
        print("full", end=" ")
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
status = store.status()
assert (status.reserved_bytes, status.counters.refused_stores) == (0, 3), status
assert len(store._keys._free) == 4096
put(1000)
print(store.status().entries)
"""
)


def test_a_store_without_descriptors_is_cache_full() -> None:
    """No descriptor for the random generator: no key, no entry, no reservation is left."""
    assert run_python(STORE_WITHOUT_DESCRIPTORS) == "full full full 1"


# -- after close() -------------------------------------------------------------------------------


def test_a_closed_store_answers_with_its_own_errors() -> None:
    """Looking up and storing raise CacheError, closing again does nothing."""
    store = MemoryStore(MIB, DAY, may_fork=True)
    digest = put(store, b"data")
    store.close()
    store.close()
    for digest_asked in (digest, digest_of(b"unknown")):
        with pytest.raises(CacheError):
            store.lookup(RELEASES, digest_asked)
        with pytest.raises(CacheError):
            store.lookup_now(RELEASES, digest_asked)
    with pytest.raises(CacheError):
        store.begin(4, RELEASES)
    status = store.status()
    assert (status.entries, status.blob_bytes, status.reserved_bytes) == (0, 0, 0)


CLOSED_BETWEEN = (
    BEGIN
    + """
for size in (100, 3 << 20):
    for step in ("begin", "fill", "in fill"):
        store = MemoryStore(64 << 20, 1000, may_fork=True)
        ingest = store.begin(size, space)
        source = io.BytesIO(bytes(size))
        def read(into):
            if step == "in fill" and source.tell() >= size // 2:
                store.close()
            return source.readinto(into[:1 << 19])
        try:
            if step == "begin":
                store.close()
            ingest.fill(read)
            if step == "fill":
                store.close()
            ingest.commit()
            print("committed", size, step)
        except CacheError:
            pass
        ingest.abort()
        status = store.status()
        assert (status.entries, status.reserved_bytes, status.blob_bytes) == (0, 0, 0), status
        assert store.miss_reason(space, "0" * 64) is not None
print("alive")
"""
)


def test_a_store_in_progress_may_outlive_its_store() -> None:
    """Closed before, in, or after the fill: commit is refused, abort is harmless, no crash."""
    assert run_python(CLOSED_BETWEEN) == "alive"


CLOSED_AMONG_THREADS = (
    BEGIN
    + """
for turn in range(12):
    store = MemoryStore(64 << 20, 1000, may_fork=True)
    digest = put(9 << 20)
    at_work = threading.Barrier(5)
    def work(number):
        at_work.wait()
        try:
            while True:
                if number % 2:
                    put(3 << 20)
                else:
                    os.close(store.lookup(space, digest).fd)
                    store.sweep()
        except CacheError:
            return "ended"
    with ThreadPoolExecutor(4) as threads:
        ends = [threads.submit(work, number) for number in range(4)]
        at_work.wait()
        store.close()
        assert [end.result() for end in ends] == ["ended"] * 4
    status = store.status()
    assert (status.entries, status.reserved_bytes, status.blob_bytes) == (0, 0, 0), status
    assert open_files() < 20
print("alive")
"""
)


def test_closing_among_busy_threads_crashes_nobody() -> None:
    """Two threads store and two look up while a fifth closes: each ends with a CacheError."""
    assert run_python(CLOSED_AMONG_THREADS, timeout=100) == "alive"


def test_a_closed_store_hands_nothing_out_again() -> None:
    """What was in it is not found by who asks for the digest's reason either."""
    store = MemoryStore(MIB, DAY, may_fork=True)
    digest = put(store, content(100))
    store.close()
    assert store.miss_reason(RELEASES, digest) is not None
    assert store.entries() == []
