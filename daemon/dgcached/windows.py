"""What happens again and again is told of at once, and then counted, in windows of time.

A window opens with what was told. If more happens in it, its end tells how much and opens the next
one, of twice the length up to a bound; a window in which nothing happens is the last. Whoever uses
this bounds the keys. Used from the event loop alone.
"""

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True)
class _Window(Generic[V]):
    seconds: float
    timer: asyncio.TimerHandle
    last: V
    further: int = 0


class Windows(Generic[K, V]):
    """Has a window for each key that something happened to a short time ago."""

    def __init__(
        self,
        seconds: float,
        most_seconds: float,
        *,
        tell: Callable[[K, V], None],
        tell_further: Callable[[K, V, int], None],
    ) -> None:
        """Tell of the first with `tell`; of the last, and how many there were since, at an end."""
        self._seconds = seconds
        self._most_seconds = most_seconds
        self._tell = tell
        self._tell_further = tell_further
        self._windows: dict[K, _Window[V]] = {}
        self._loop = asyncio.get_running_loop()

    def __contains__(self, key: K) -> bool:
        return key in self._windows

    def __len__(self) -> int:
        return len(self._windows)

    def take(self, key: K, value: V) -> None:
        """Tell of it, now or at the end of its window."""
        window = self._windows.get(key)
        if window is None:
            self._open(key, value, self._seconds)
            self._tell(key, value)
            return
        window.further += 1
        window.last = value

    def close(self) -> None:
        """Tell what is not told yet."""
        windows, self._windows = self._windows, {}
        for key, window in windows.items():
            window.timer.cancel()
            if window.further:
                self._tell_further(key, window.last, window.further)

    def _open(self, key: K, value: V, seconds: float) -> None:
        timer = self._loop.call_later(seconds, self._end, key)
        self._windows[key] = _Window(seconds, timer, value)

    def _end(self, key: K) -> None:
        window = self._windows.pop(key)
        if window.further:
            self._tell_further(key, window.last, window.further)
            self._open(key, window.last, min(2 * window.seconds, self._most_seconds))
