"""Measures a daemon that has nothing to do: its memory, and how often its threads wake up.

A wake-up is a voluntary context switch of any thread (/proc/PID/task/TID/status): a thread that
sleeps, wakes and sleeps again adds one.
"""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bench_figures import Figure

SETTLE_SECONDS = 3.0


def wakeups(pid: int, seconds: float) -> Counter[str]:
    """Return how often each kind of thread, by name, woke up in that time."""
    time.sleep(SETTLE_SECONDS)  # what the last call began has ended
    before = dict(_switches(pid))
    time.sleep(seconds)  # the measurement is of this time
    woken: Counter[str] = Counter()
    for thread, count in _switches(pid):
        woken[thread[1]] += count - before.get(thread, 0)
    return Counter({name: count for name, count in woken.items() if count})


def wakeup_figures(what: str, woken: Counter[str], seconds: float, at_most: float) -> list[Figure]:
    """Return the sum, held to a target, and each kind of thread."""
    total = Figure(f"{what}, wake-ups a second", woken.total() / seconds, "/s", at_most=at_most)
    parts = [
        Figure(f"{what}, of them {name}", count / seconds, "/s")
        for name, count in woken.most_common()
    ]
    return [total, *parts]


def _switches(pid: int) -> Iterator[tuple[tuple[int, str], int]]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = dict(
            line.split(":", 1) for line in (task / "status").read_text().splitlines() if ":" in line
        )
        count = int(lines["voluntary_ctxt_switches"])
        yield (int(task.name), lines["Name"].strip()), count
