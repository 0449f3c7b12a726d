"""Looks at the memory that is left and sets the store's limit by the rule in `pressure`.

While the store holds something it looks when the kernel raises an alarm (PSI), and else after a
time in which nothing can have gone wrong. Over an empty store with its whole budget it sleeps. The
kernel may take its time over its figures, and giving memory back takes some, too, so this happens
in a thread of its own, which wakes up once for a look.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dgcache_core.store import ResidentStore
from dgcache_proto.v1 import dgcache_pb2 as pb
from dgcached.host_memory import read_places, stall_files
from dgcached.limits import Limits
from dgcached.logs import event
from dgcached.pressure import Place, Policy, Regime, next_regime, seconds_to_next_look
from dgcached.stalls import StallAlarms

Look = Callable[[frozenset[Path]], list[Place]]


class PressureWatcher:
    """One thread over one store."""

    def __init__(self, store: ResidentStore, limits: Limits, look: Look = read_places) -> None:
        """Set the kernel's alarms.

        Args:
            store: whose limit it sets.
            limits: the times.
            look: returns the places where memory can run out; gets the PSI files that raised an
                alarm.
        """
        budget = store.status().max_bytes
        self._store = store
        self._look = look
        self._longest_seconds = limits.pressure_look_seconds
        self._policy = Policy(budget, limits.pressure_calm_seconds, limits.pressure_step_seconds)
        self._regime = Regime(budget)
        self._alarms = StallAlarms(stall_files())
        self._psi = bool(self._alarms.armed)
        self._alarmed: set[Path] = set()
        self._alarm = threading.Event()
        self._used = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pressure", daemon=True)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to watch."""
        self._alarms.start(self._on_alarm)
        self._thread.start()

    def wake(self) -> None:
        """Tell that the store handed something out or took something in."""
        self._used.set()

    async def stop(self) -> None:
        """End the thread; a look in progress ends first."""
        self._alarms.stop()
        self._stopping = True
        self._used.set()
        self._alarm.set()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def message(self) -> pb.Pressure:
        """Return what Status says about it."""
        regime = self._regime
        return pb.Pressure(
            limit_bytes=regime.limit_bytes,
            cause=regime.cause,
            shrinks=regime.shrinks,
            seconds_since=time.monotonic() - regime.shrunk_at if regime.shrinks else 0.0,
            psi=self._psi,
        )

    def _on_alarm(self, file: Path) -> None:
        with self._lock:
            self._alarmed.add(file)
        self._alarm.set()

    def _run(self) -> None:
        while not self._stopping:
            self._used.wait()
            self._used.clear()
            self._take_alarmed()  # of a time when there was nothing to give
            while not self._stopping:
                seconds = self._look_once(self._take_alarmed())
                if seconds is None:
                    break
                self._alarm.wait(seconds)
                self._alarm.clear()  # before the next look at who raised it, and at `_stopping`

    def _take_alarmed(self) -> frozenset[Path]:
        with self._lock:
            alarmed, self._alarmed = frozenset(self._alarmed), set()
        return alarmed

    def _look_once(self, alarmed: frozenset[Path]) -> float | None:
        """Look, act, and return the seconds to the next look; None: there is nothing to watch."""
        try:
            places = self._look(alarmed)
        except OSError as error:  # the next look tries again; the daemon serves on
            event(logging.ERROR, "memory-look-failed", reason=error)
            return self._longest_seconds
        status = self._store.status()
        used = status.blob_bytes + status.handout_bytes + status.reserved_bytes
        before = self._regime
        self._regime = next_regime(self._policy, before, used, places, time.monotonic())
        self._enforce(before, used)
        if not used and self._regime.limit_bytes == self._policy.budget_bytes:
            return None
        return seconds_to_next_look(self._policy, used, places, self._longest_seconds)

    def _enforce(self, before: Regime, used: int) -> None:
        regime = self._regime
        limit = regime.limit_bytes
        if limit == before.limit_bytes and used <= limit:
            return
        freed = self._store.set_limit(limit)  # again, where somebody was still reading last time
        if limit < before.limit_bytes:
            event(
                logging.WARNING,
                "memory-pressure",
                limit_bytes=limit,
                freed_entries=freed.entries,
                freed_bytes=freed.bytes,
                cause=regime.cause,
            )
        elif limit > before.limit_bytes:
            event(logging.INFO, "memory-pressure-eased", limit_bytes=limit)
