"""What the C library keeps of freed memory: in few heaps, and back to the system when asked."""

import ctypes
import os
import re
from pathlib import Path

import pytest

from tests.core.support import run_python
from tests.support.disk_daemon import reference
from tests.support.wire import MIB, Client, running

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs GNU's C library"
)

_THREADS = """
import ctypes, sys, threading
from dgcached.heap import limit_heaps
if sys.argv[1] == "limited":
    limit_heaps()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
everybody = threading.Barrier(8)
def work():
    everybody.wait()
    held = [libc.malloc(1000) for _ in range(1000)]
    everybody.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""

_FREED = """
import ctypes
from dgcached.heap import give_back_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def resident_kib():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
pieces = [libc.malloc(10_000) for _ in range(6400)]
for piece in pieces:
    ctypes.memset(piece, 1, 10_000)
for piece in pieces[:-1]:  # the last one is at the end of the heap, which cannot shrink
    libc.free(piece)
before = resident_kib()
give_back_freed_memory()
print(before - resident_kib())
"""


@pytest.mark.parametrize(("how", "most"), [("limited", 2), ("not limited", 64)])
def test_all_threads_share_two_heaps(how: str, most: int) -> None:
    """Without that limit there are more, or this would show nothing."""
    heaps = len(re.findall("<heap nr=", run_python(_THREADS, how)))
    assert heaps <= most
    assert (heaps > 2) == (how == "not limited")


def test_freed_memory_goes_back_to_the_system() -> None:
    """Of 64 MB that a piece behind them keeps in the heap."""
    assert int(run_python(_FREED)) > 50_000


@pytest.mark.root
def test_a_daemon_that_has_worked_has_two_heaps() -> None:
    """The one of the program's own break, and one of the 64 MiB that others are reserved in."""
    with running() as daemon, Client(daemon.directory) as client:
        for number in range(20):
            os.close(client.lookup(client.store(reference(number))))
        maps = Path(f"/proc/{daemon.pid}/maps").read_text()
        reserved = re.findall(r"^(\w+)-(\w+) ---p 00000000 00:00 0 *$", maps, re.MULTILINE)
        sizes = [int(end, 16) - int(start, 16) for start, end in reserved]
        assert sum(32 * MIB < size < 64 * MIB for size in sizes) <= 1
