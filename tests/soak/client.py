"""One user's process: it gets, stores, fetches and holds references, and compares every byte.

Run as `python -m tests.soak.client PLAN`, PLAN in JSON. Each operation is one line of JSON on
standard output; the end of standard input is the end. What counts as failed because of the cache:
any error that the documents do not give this operation, a wrong byte, or a wait beyond the budget.
"""

import hashlib
import io
import json
import os
import random
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dgcache
from dgcache.claims import Claim
from dgcache.reference import Reference
from dgcache_core.errors import (
    CacheCorruptionError,
    CacheFullError,
    CacheMissError,
    InvalidReferenceError,
)
from dgcache_core.references import Deltaspace, parse_sha256
from tests.soak.truth import Truth, space

WAIT_SECONDS, LEASE_SECONDS = 4.0, 10.0
BUDGET_SECONDS = 60.0
"""The longest an operation may take. What the client promises: a lookup (10 s) that waits for
somebody else's fetch (its own wait and two leases, 24 s) and then a store (2 s to begin, 1 s for
its descriptor, 5 s of a full pipe, 10 s to commit) are 52 s; twice it is stopped itself (4 s)."""

_MAX_HELD = 6
_MAX_KNOWN = 12
_NO_DAEMON, _NO_ROOM, _CORRUPT = 69, 75, 65  # exit statuses of dg-cache, as in its --help

Answer = dict[str, Any]


class Worker:
    """Does operations in an order that its seed gives."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._truth = Truth(plan["seed"])
        self._digests: list[str] = plan["digests"]
        self._chance = random.Random(plan["chance"])
        self._socket_dir = plan["socket_dir"]
        self._known: dict[int, bytes] = {}
        self._held: list[tuple[int, Reference]] = []
        self._settings = dgcache.Settings(
            socket_dir=Path(self._socket_dir),
            cache_dir=Path(plan["cache_dir"]),
            fallback_size_mb=24,
            connect_timeout_ms=500,
            wait_seconds=WAIT_SECONDS,
        )
        self._operations: list[tuple[float, Callable[[Any], Answer]]] = [
            (40, self.get_or_fetch),
            (12, self.get),
            (12, self.put),
            (8, self.adopt),
            (8, self.hold),
            (8, self.look_at_held),
            (3, self.has),
            (3, self.fetch_fails),
            (3, self.fetch_is_wrong),
            (3, self.put_is_wrong),
            (2, self.status),
            (2, self.evict),
            (plan["clears"], self.clear),
            (plan["commands"], self.command_get),
            (plan["commands"], self.command_put),
        ]

    def run(self) -> None:
        """Open a cache for a few operations, again and again, until standard input ends."""
        while not _told_to_end():
            with dgcache.open(self._settings) as cache:
                for _ in range(self._chance.randint(1, 25)):
                    if _told_to_end():
                        break
                    self._do(cache)
        for _, reference in self._held:
            reference.close()

    def _do(self, cache: Any) -> None:
        weights = [weight for weight, _ in self._operations]
        (chosen,) = self._chance.choices(self._operations, weights)
        answer: Answer = {"op": chosen[1].__name__}
        started = time.monotonic()
        try:
            answer |= chosen[1](cache)
        except BaseException as error:
            answer["failed"] = f"{type(error).__name__}: {error}"
        answer["seconds"] = round(time.monotonic() - started, 4)
        if answer["seconds"] > BUDGET_SECONDS:
            answer["failed"] = answer.get("failed") or "took longer than its budget"
        print(json.dumps(answer), flush=True)

    # -- the operations ------------------------------------------------------------------------

    def get_or_fetch(self, cache: Any) -> Answer:
        number, where = self._one()
        fetched = self._chance.choice([bytes, io.BytesIO])
        pause = self._chance.choice([0.0, 0.0, 0.02, 0.2])

        def fetch() -> Any:
            threading.Event().wait(pause)  # a source is slower than a cache
            return fetched(self._right(number))

        with cache.get_or_fetch(*where, self._digests[number], fetch) as reference:
            return self._compared(number, reference)

    def get(self, cache: Any) -> Answer:
        number, where = self._one()
        verify = self._chance.random() < 0.3
        try:
            with cache.get(*where, self._digests[number], verify=verify) as reference:
                return self._compared(number, reference)
        except (CacheMissError, CacheCorruptionError, CacheFullError) as error:
            return {"note": type(error).__name__}

    def put(self, cache: Any) -> Answer:
        number, where = self._one()
        data = self._right(number)
        source = self._chance.choice([data, io.BytesIO(data)])
        expected = self._chance.choice([None, self._digests[number]])
        _require(cache.put(*where, source, expected) == self._digests[number], "another digest")
        return {"put_bytes": len(data)}

    def adopt(self, cache: Any) -> Answer:
        """What an adapter does: bytes whose length is known are stored while they are fetched."""
        number, where = self._one()
        deltaspace, digest = Deltaspace(*where), parse_sha256(self._digests[number])
        found = cache.get_or_claim(deltaspace, digest)
        if isinstance(found, Claim):
            data = self._right(number)
            with found as claim:
                found = cache.adopt(
                    deltaspace, digest, io.BytesIO(data), size=len(data), claim=claim
                )
        with found as reference:
            return self._compared(number, reference)

    def hold(self, cache: Any) -> Answer:
        """Keep one open beyond the cache's end, and whatever becomes of the daemon."""
        number, where = self._one()
        reference = cache.get_or_fetch(*where, self._digests[number], lambda: self._right(number))
        self._held.append((number, reference))
        answer = self._compared(number, reference)
        if len(self._held) > _MAX_HELD:
            self._held.pop(0)[1].close()
        return answer

    def look_at_held(self, _: Any) -> Answer:
        if not self._held:
            return {"note": "nothing held"}
        number, reference = self._chance.choice(self._held)
        return self._compared(number, reference)

    def has(self, cache: Any) -> Answer:
        number, where = self._one()
        return {"note": str(cache.has(*where, self._digests[number]))}

    def fetch_fails(self, cache: Any) -> Answer:
        """The source's own error, and nobody else's, comes through."""
        number, where = self._one()

        def fetch() -> Any:
            raise ConnectionAbortedError("the source is away")

        try:
            with cache.get_or_fetch(*where, self._digests[number], fetch) as reference:
                return self._compared(number, reference)
        except ConnectionAbortedError:
            return {"note": "the source's error"}

    def fetch_is_wrong(self, cache: Any) -> Answer:
        number, where = self._one()
        wrong = self._right(number) + b"x"
        try:
            with cache.get_or_fetch(*where, self._digests[number], lambda: wrong) as reference:
                return self._compared(number, reference)
        except InvalidReferenceError:
            return {"note": "refused"}

    def put_is_wrong(self, cache: Any) -> Answer:
        number, where = self._one()
        wrong = bytearray(self._right(number) or b"x")
        wrong[self._chance.randrange(len(wrong))] ^= 1
        try:
            cache.put(*where, bytes(wrong), self._digests[number])
        except InvalidReferenceError:
            return {"note": "refused"}
        raise AssertionError("bytes with another digest were stored")

    def status(self, cache: Any) -> Answer:
        return {"note": cache.status()["backend"]}

    def evict(self, cache: Any) -> Answer:
        cache.evict(*self._one()[1])
        return {}

    def clear(self, cache: Any) -> Answer:
        cache.clear(rekey=self._chance.random() < 0.5)
        return {}

    def command_get(self, _: Any) -> Answer:
        number, where = self._one()
        source = f"{sys.executable} -m tests.soak.truth {self._truth.seed} {number}"
        digest = self._digests[number]
        done = self._command("get", "/".join(where), digest, "--fetch", source)
        _require(done.returncode == 0, f"status {done.returncode}: {done.stderr[-500:]!r}")
        return self._checked(number, done.stdout, "command")

    def command_put(self, _: Any) -> Answer:
        number, where = self._one()
        data = self._right(number)
        done = self._command("put", "/".join(where), "-", "--json", given=data)
        if done.returncode in (_NO_DAEMON, _NO_ROOM):
            return {"note": f"status {done.returncode}"}
        _require(done.returncode == 0, f"status {done.returncode}: {done.stderr[-500:]!r}")
        _require(self._digests[number].encode() in done.stdout, "another digest")
        return {"put_bytes": len(data)}

    # -- what they share -----------------------------------------------------------------------

    def _one(self) -> tuple[int, tuple[str, str]]:
        """Choose a reference; the first are asked for more often than the last."""
        count = len(self._digests)
        number = min(int(self._chance.random() ** 1.5 * count), count - 1)
        number = (number * 7) % count  # so that each size is among the often asked
        return number, space(number)

    def _right(self, number: int) -> bytes:
        if number not in self._known:
            if len(self._known) >= _MAX_KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[number] = self._truth.data(number)
        return self._known[number]

    def _compared(self, number: int, reference: Reference) -> Answer:
        return self._checked(number, reference.read(), reference.source)

    def _checked(self, number: int, got: bytes, source: str) -> Answer:
        right = self._right(number)
        wrong = abs(len(got) - len(right))
        if got != right:
            wrong += sum(one != other for one, other in zip(got, right, strict=False))
        answer: Answer = {"bytes": len(got), "source": source, "wrong": wrong}
        if wrong:
            answer["failed"] = (
                f"{wrong} wrong bytes of {number}, from {source}: it has the digest "
                f"{hashlib.sha256(got).hexdigest()}, not {self._digests[number]}"
            )
        return answer

    def _command(self, *words: str, given: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [sys.executable, "-m", "dgcache_cli", *words],
            env={**os.environ, "DG_CACHE_SOCKET_DIR": self._socket_dir},
            input=given,
            capture_output=True,
            timeout=BUDGET_SECONDS,
            check=False,
        )


def _told_to_end() -> bool:
    return bool(select.select([0], [], [], 0)[0])


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


if __name__ == "__main__":
    Worker(json.loads(sys.argv[1])).run()
