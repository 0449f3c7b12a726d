"""Another client of the same user, in a process of its own, that goes on while something is tried.

It gets one reference again and again through the SDK and notes how long each hit took and what was
wrong with it. Whoever falls back to the in-process cache was not served.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.wire import own_environment

TIMES_USUAL = 10
"""How much slower than usual a bystander may be served."""

FLOOR_SECONDS = 0.4
"""What a get may always take: two milliseconds times ten is less than a busy host's scheduler."""

_GETS_BEFORE = 150
_GETS_DURING = 20

_WORKER = """\
import hashlib, json, os, select, sys, time
from pathlib import Path
import dgcache
data = b"the bystander's own reference." * 5000
digest = hashlib.sha256(data).hexdigest()
settings = dgcache.Settings(socket_dir=Path(sys.argv[1]), connect_timeout_ms=20_000)
orders = select.poll()
orders.register(0, select.POLLIN)
seconds, wrong, fetched = [], [], 0
def fetch():
    global fetched
    fetched += 1
    return data
with dgcache.open(settings) as cache:
    while True:
        started, fetched_before = time.monotonic(), fetched
        try:
            with cache.get_or_fetch("bystander", "p", digest, fetch) as reference:
                if reference.read() != data:
                    wrong.append("other bytes")
                if reference.source not in ("dg-cached", "fetched"):
                    wrong.append("served by " + str(reference.source))
            if cache.backend != "dg-cached":
                wrong.append("fell back to " + cache.backend)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
        if fetched == fetched_before:
            seconds.append(time.monotonic() - started)
        else:
            cache.forget()  # where the daemon had no room for it, it is asked again all the same
        wanted = int(sys.argv[2]) if not orders.poll(2) else int(sys.stdin.readline() or -1)
        if wanted < 0:
            break
        if wanted and len(seconds) >= wanted:
            print(json.dumps([sorted(seconds), wrong, fetched]), flush=True)
            seconds, wrong, fetched = [], [], 0
            sys.argv[2] = 0
        else:
            sys.argv[2] = wanted
"""


@dataclass(frozen=True, slots=True)
class Service:
    """How a bystander was served between two moments."""

    seconds: list[float]
    wrong: list[str]
    fetched: int

    @property
    def usual(self) -> float:
        """What 19 of 20 gets took at the most."""
        return self.seconds[len(self.seconds) * 19 // 20]

    @property
    def slowest(self) -> float:
        """What the slowest get took."""
        return self.seconds[-1]

    def __str__(self) -> str:
        return (
            f"{len(self.seconds)} gets, {len(self.wrong)} wrong, {self.fetched} misses, median "
            f"{self.seconds[len(self.seconds) // 2] * 1000:.1f} ms, 95 % within "
            f"{self.usual * 1000:.1f} ms, slowest {self.slowest * 1000:.1f} ms"
        )


class Bystander:
    """A process that gets and gets."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._heard: list[Service] = []

    def served(self, least: int) -> Service:
        """Return how it was served since it was last asked, once it was so often."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(least, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, "the bystander is gone"
        service = Service(*json.loads(line))
        self._heard.append(service)
        return service

    @contextmanager
    def undisturbed(
        self, *, may_miss: bool = False, floor_seconds: float = FLOOR_SECONDS
    ) -> Iterator[None]:
        """Assert that all it asked for while the block ran was served, in time.

        Args:
            may_miss: the block clears or evicts, so that it may have to store its reference again.
            floor_seconds: what a get may always take.
        """
        self.served(1)  # its first, which connects and stores
        before = self.served(_GETS_BEFORE)
        self._heard.clear()
        yield
        self.served(_GETS_DURING)
        during = Service(
            sorted(second for one in self._heard for second in one.seconds),
            [wrong for one in self._heard for wrong in one.wrong],
            sum(one.fetched for one in self._heard),
        )
        print(f"before: {before}\nduring: {during}")  # pytest -rP shows it
        assert not during.wrong, during.wrong[:3]
        assert may_miss or not during.fetched
        assert during.slowest <= max(floor_seconds, TIMES_USUAL * before.usual), (
            f"{before}; then {during}"
        )


@contextmanager
def bystander(directory: Path) -> Iterator[Bystander]:
    """Lend a client of the daemon there."""
    with subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(directory), "0"],
        env=own_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Bystander(process)
        finally:
            process.kill()
