"""What the C library has of freed memory: few heaps, and back to the system once the daemon idles.

GNU's malloc has a heap for every thread, up to eight for each core, and keeps what is freed in all
of them: with worker threads that come and go that grows for hours, though nothing is in use. Other
C libraries are left as they are.
"""

import ctypes
from contextlib import suppress

_M_ARENA_MAX = -8
_HEAPS = 2


def limit_heaps() -> None:
    """Have two heaps for all threads; call it before there is a second one (mallopt(3))."""
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _HEAPS)


def give_back_freed_memory() -> None:
    """Give whole free pages of every heap back to the system (malloc_trim(3)). Takes a few ms."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
