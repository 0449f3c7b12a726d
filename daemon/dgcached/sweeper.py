"""Gives back what has expired and what nobody holds, and sleeps while there is neither.

The kernel does not tell when a handout's last holder goes, so that is polled, but only while
something is held. When nothing was for a few seconds, what the C library keeps of freed memory goes
back to the system as well.
"""

import asyncio
import logging
from contextlib import suppress

from dgcache_core.errors import CacheUnavailableError
from dgcache_core.store import ResidentStore
from dgcached.heap import give_back_freed_memory
from dgcached.logs import event

_POLL_SECONDS = 0.25
_IDLE_SECONDS = 3.0
_LONGEST_NAP_SECONDS = 3600.0


class Sweeper:
    """One task over one store."""

    def __init__(self, store: ResidentStore) -> None:
        self._store = store
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to sweep."""
        self._task = asyncio.create_task(self._run(), name="sweeper")

    def wake(self) -> None:
        """Tell that the store handed something out or took something in."""
        self._changed.set()

    async def stop(self) -> None:
        """End the task."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        loop, complained = asyncio.get_running_loop(), ""
        while True:
            if self._store.handouts_outstanding:
                await asyncio.sleep(_POLL_SECONDS)
            else:
                await self._nap()
            self._changed.clear()
            try:
                await loop.run_in_executor(None, self._store.sweep)
                complained = ""
            except (CacheUnavailableError, OSError) as error:  # the daemon serves on
                if str(error) != complained:
                    event(logging.ERROR, "sweep-failed", reason=error)
                complained = str(error)
                await asyncio.sleep(_POLL_SECONDS)

    async def _nap(self) -> None:
        """Wait for the next change or the next expiry; give freed memory back on the way."""
        if await self._wait(_IDLE_SECONDS):
            return
        await asyncio.get_running_loop().run_in_executor(None, give_back_freed_memory)
        await self._wait(_LONGEST_NAP_SECONDS)

    async def _wait(self, most_seconds: float) -> bool:
        """Tell whether there is something to do before so many seconds are over."""
        next_expiry = self._store.seconds_to_next_expiry()
        seconds = most_seconds if next_expiry is None else min(max(0.0, next_expiry), most_seconds)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        return self._changed.is_set() or seconds < most_seconds
