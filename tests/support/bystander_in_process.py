"""A bystander: another client of the same user, who must be served whatever happens beside it."""

import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from tests.support.wire import Client

as_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root: it makes a second user, or looks into the daemon"
)

_USUAL_ROUNDS = 20
_TIMES = 10
_FLOOR_SECONDS = 0.1
"""What the machine's own jitter may take a usual call of a millisecond to."""


@contextmanager
def bystander_served(directory: Path) -> Iterator[None]:
    """Let a bystander store and look up all the while; each call must succeed, at its usual pace.

    Judged by the median, within ten times the usual: single calls wait for the machine, too.
    """
    with Client(directory) as client:
        usual = [_round(client, number) for number in range(_USUAL_ROUNDS)]
        seconds: list[float] = []
        failed: list[grpc.RpcError] = []
        ended = threading.Event()

        def work() -> None:
            while not ended.wait(0.01):
                try:
                    seconds.append(_round(client, len(seconds)))
                except grpc.RpcError as error:
                    failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
    assert not failed, f"{len(failed)} calls of the bystander failed, the first: {failed[0]}"
    assert seconds
    allowed = max(_FLOOR_SECONDS, _TIMES * statistics.median(usual))
    assert statistics.median(seconds) <= allowed, (statistics.median(seconds), allowed)


def _round(client: Client, number: int) -> float:
    """Store a little, get it back, and return how long that took."""
    data = b"the bystander's reference %d" % (number % 7)
    begun = time.monotonic()
    with os.fdopen(client.lookup(client.store(data)), "rb") as handout:
        assert handout.read() == data
    return time.monotonic() - begun
