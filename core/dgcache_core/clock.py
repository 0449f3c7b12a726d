"""The clock of every deadline: it never jumps and goes on during suspend (clock_gettime(2))."""

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Returns seconds; only differences mean anything."""


def boottime_seconds() -> float:
    """Return CLOCK_BOOTTIME in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
