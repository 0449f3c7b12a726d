"""Buffers that hold plaintext for the length of one chunk and are zero when nobody uses them."""

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dgcache_core.errors import CacheFullError


class ScratchPool:
    """Reuses page-aligned buffers of one size, of which it keeps at most `keep`. Thread-safe.

    A fresh mapping costs page faults at every use; a kept one costs one memset.
    """

    def __init__(self, buffer_bytes: int, keep: int) -> None:
        self._buffer_bytes = buffer_bytes
        self._keep = keep
        self._idle: list[mmap.mmap] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, most_bytes: int | None = None) -> Iterator[memoryview]:
        """Lend a writable buffer, which is wiped when the block ends.

        Args:
            most_bytes: what is lent and wiped of it; by default all of `buffer_bytes`.
        """
        with self._lock:
            buffer = self._idle.pop() if self._idle else self._fresh()
        with memoryview(buffer) as whole:
            view = whole[:most_bytes]
        lent_bytes = len(view)
        try:
            yield view
        finally:
            view.release()
            self._wipe(buffer, lent_bytes)
            self._take_back(buffer)

    def close(self) -> None:
        """Give the kept buffers back to the system."""
        with self._lock:
            self._idle.clear()

    def _take_back(self, buffer: mmap.mmap) -> None:
        with self._lock:
            if len(self._idle) < self._keep:
                self._idle.append(buffer)
        # else it goes with its last view, which an exception's traceback may still hold

    def _fresh(self) -> mmap.mmap:
        try:
            buffer = mmap.mmap(-1, self._buffer_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            buffer.madvise(mmap.MADV_DONTDUMP)
        except OSError as error:
            raise CacheFullError("the system has no memory for a buffer left") from error
        return buffer

    def _wipe(self, buffer: mmap.mmap, lent_bytes: int) -> None:
        anchor = ctypes.c_char.from_buffer(buffer)
        try:
            ctypes.memset(ctypes.addressof(anchor), 0, lent_bytes)
        finally:
            del anchor
