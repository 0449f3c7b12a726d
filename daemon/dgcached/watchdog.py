"""Tells systemd that the daemon serves, so that one that hangs is killed and started again.

WATCHDOG=1 is sent only when two things just worked: the event loop, which takes each turn, and the
store, whose figures need its lock. The store is asked in a thread of its own, since the loop's
threads may all be at work on large references, which is no failure.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from dgcached.supervisor import Notifier


class Watchdog:
    """One task that sends WATCHDOG=1 while the daemon serves."""

    def __init__(
        self, notifier: Notifier, interval_seconds: float | None, check: Callable[[], object]
    ) -> None:
        """Do nothing yet.

        Args:
            notifier: leads to whoever waits.
            interval_seconds: the time between two signs of life; None sends none.
            check: returns when the store works; it may block as long as that does not.
        """
        self._notifier = notifier
        self._interval_seconds = interval_seconds
        self._check = check
        self._thread = ThreadPoolExecutor(1, "watchdog")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send."""
        if self._interval_seconds is not None:
            run = self._run(self._interval_seconds)
            self._task = asyncio.create_task(run, name="watchdog")

    async def stop(self) -> None:
        """End the task; a check that hangs is not waited for."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._thread.shutdown(wait=False)

    async def _run(self, interval_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await loop.run_in_executor(self._thread, self._show_life)
            await asyncio.sleep(interval_seconds)

    def _show_life(self) -> None:
        self._check()
        self._notifier.notify(WATCHDOG="1")
