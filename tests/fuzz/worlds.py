"""What a target needs only once: made at its first use, ended together."""

import gc
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

T = TypeVar("T")

_open = ExitStack()
_made: dict[Any, Any] = {}


def lasting(make: Callable[[], AbstractContextManager[T]]) -> T:
    """Return what `make` gives, the same at every call until `end`."""
    if make not in _made:
        _made[make] = _open.enter_context(make())
    made: T = _made[make]
    return made


def end() -> None:
    """Close everything."""
    _made.clear()
    _open.close()


def require_descriptors(before: int) -> None:
    """Assert that so many descriptors are open; what a traceback kept is let go of first."""
    if open_descriptors() != before:
        gc.collect()
        assert open_descriptors() == before, "a descriptor was left open"


def open_descriptors() -> int:
    """Count this process's descriptors."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - no paths are wanted
