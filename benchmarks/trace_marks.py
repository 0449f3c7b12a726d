"""Marks of time in memory that two processes share: who passed which point, and when.

The clock is CLOCK_MONOTONIC, one for all processes of a machine (clock_gettime(2)), so that marks
of a client and of its daemon stand in one order. A mark costs about a microsecond. Writing is safe
in threads; when the ring is full, the oldest marks are written over.
"""

import itertools
import mmap
import os
import struct
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

_ROW = struct.Struct("=QI4x")
_ROWS = 1 << 16
BYTES = _ROWS * _ROW.size


class Mark(NamedTuple):
    """One point that was passed, in nanoseconds of CLOCK_MONOTONIC."""

    at: int
    name: str


class Marks:
    """A ring of marks; `names` fixes, for both processes, what the numbers in it mean."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        """Map the ring, which is made where it is missing."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, BYTES)
            self._ring = mmap.mmap(descriptor, BYTES)
        finally:
            os.close(descriptor)
        self._names = names
        self._rows = itertools.count()

    def mark(self, number: int) -> None:
        """Note that this point was passed now."""
        row = next(self._rows) % _ROWS
        _ROW.pack_into(self._ring, row * _ROW.size, time.monotonic_ns(), number + 1)

    def taken(self) -> list[Mark]:
        """Return all marks, the oldest first."""
        rows = [row for row in _ROW.iter_unpack(self._ring) if row[1]]
        return [Mark(at, self._names[number - 1]) for at, number in sorted(rows)]

    def forget(self) -> None:
        """Empty the ring. Nobody may write meanwhile."""
        self._ring[:] = bytes(BYTES)

    def around(self, owner: Any, attribute: str, name: str) -> None:
        """Mark each call of a function or method before and after: `name` and `name, done`."""
        before, after = self._names.index(name), self._names.index(f"{name}, done")
        original: Callable[..., Any] = getattr(owner, attribute)

        @wraps(original)
        def marked(*arguments: Any, **named: Any) -> Any:
            self.mark(before)
            try:
                return original(*arguments, **named)
            finally:
                self.mark(after)

        setattr(owner, attribute, marked)

    def around_coroutine(self, owner: Any, attribute: str, name: str) -> None:
        """As `around`, for a coroutine function."""
        before, after = self._names.index(name), self._names.index(f"{name}, done")
        original: Callable[..., Any] = getattr(owner, attribute)

        @wraps(original)
        async def marked(*arguments: Any, **named: Any) -> Any:
            self.mark(before)
            try:
                return await original(*arguments, **named)
            finally:
                self.mark(after)

        setattr(owner, attribute, marked)


def both(*names: str) -> tuple[str, ...]:
    """Return each name and the one for its end."""
    return tuple(one for name in names for one in (name, f"{name}, done"))
