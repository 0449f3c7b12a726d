"""Measures where the time of one lookup goes, step by step, in microseconds that add up.

`python -m benchmarks.bench_budget OUT --place DIR` runs a daemon of its own with marks of time
around its functions (`traced_daemon`), puts marks around the client's in this process, and looks
up again and again. A step is the time between two marks that follow each other, so the steps of one
lookup add up to all of it; the table has the mean of each step over the lookups in the middle half,
whose sum is therefore the mean of those lookups.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.bench_daemon import connected, put, require_unheld
from benchmarks.bench_figures import MEGABYTE, Figure, Group, save
from benchmarks.bench_store import parse
from benchmarks.daemon import running_daemon
from benchmarks.trace_marks import Mark, Marks, both
from benchmarks.traced_daemon import DAEMON_POINTS
from dgcache import ReferenceCache

CLIENT_POINTS = both("get", "call", "take", "seals", "reference", "close")
_LOOKUPS = 300
_UNHELD_LOOKUPS = {1: 40, 10: 20}


@dataclass(frozen=True, slots=True)
class Step:
    """From the mark before to this one."""

    mark: str
    text: str


_START = "get"
_SENT_OVER_GRPC = (
    Step("relay in", "client: gRPC sends it; the daemon's event loop wakes up"),
    Step("relay in, done", "daemon: who is it is known; the relay passes it on to gRPC"),
    Step("intercept", "daemon: gRPC reads it; the event loop wakes up again"),
    Step("admit", "daemon: gRPC's interceptor and the handler's task begin"),
    Step("admit, done", "daemon: connection and session are admitted"),
    Step("Lookup", "daemon: one of the session's calls is taken"),
)
_SENT_ON_THE_SESSION = (
    Step("packet", "client: sends it; daemon: the event loop wakes up, who sent it is checked"),
    Step("packet, done", "daemon: it is parsed; a task is made"),
    Step("Lookup", "daemon: the task begins; one of the session's calls is taken"),
)
_SHARED = (
    Step("now", "daemon: deltaspace and digest are parsed"),
    Step("now, done", "daemon: the table; a descriptor of its own is opened"),
    Step("announce", "daemon: back in the call"),
)
_ONE_CHUNK = (
    Step("now", "daemon: deltaspace and digest are parsed"),
    Step("decrypt", "daemon: the table: nobody holds it; room is reserved"),
    Step("decrypt, done", "daemon: memory file, decryption, seals; a descriptor of its own"),
    Step("announce", "daemon: back in the call"),
)
_MANY_CHUNKS = (
    Step("now", "daemon: deltaspace and digest are parsed"),
    Step("now, done", "daemon: the table: nobody holds it"),
    Step("decrypt", "daemon: a worker thread is woken up; room is reserved"),
    Step("decrypt, done", "daemon: memory file, decryption, seals; a descriptor of its own"),
    Step("announce", "daemon: the event loop wakes up for what the thread did"),
)
_SENDING = (
    Step("announce, done", "daemon: the descriptor is sent (SCM_RIGHTS)"),
    Step("Lookup, done", "daemon: its own descriptor is closed"),
)
# the daemon's send wakes the client up, which may be done before the daemon's call returns
_ANSWERED_OVER_GRPC = (
    Step("relay out", "daemon: gRPC makes the answer; the event loop wakes up for it"),
    Step(
        "call, done", "daemon: the relay passes it on; client: gRPC receives it, the caller wakes"
    ),
)
_ANSWERED_ON_THE_SESSION = (
    Step("call, done", "daemon: sends the answer; client: receives it and the descriptor"),
)
_AT_THE_CLIENT = (
    Step("take, done", "client: the descriptor is taken"),
    Step("seals, done", "client: seals, type and size are checked (fcntl, fstat)"),
    Step("get, done", "client: the Reference is made"),
    Step("close, done", "client: it is closed"),
)


def _steps(direct: bool, finding: Sequence[Step]) -> tuple[Step, ...]:
    return (
        Step("call", "client: arguments, the backend, the request message"),
        *(_SENT_ON_THE_SESSION if direct else _SENT_OVER_GRPC),
        *finding,
        *_SENDING,
        *(_ANSWERED_ON_THE_SESSION if direct else _ANSWERED_OVER_GRPC),
        *_AT_THE_CLIENT,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the figures."""
    arguments = parse(argv, "Measure where the time of a lookup goes.")
    with _traced(arguments.place) as (cache, client, daemon):
        data = memoryview(os.urandom(10 * MEGABYTE))
        direct = os.environ.get("DG_CACHE_TRANSPORT") == "direct"
        groups = [_held(cache, data, client, daemon, _steps(direct, _SHARED))]
        for size, finding in ((1, _ONE_CHUNK), (10, _MANY_CHUNKS)):
            groups.append(_unheld(cache, data, size, client, daemon, _steps(direct, finding)))
    save(arguments.out, groups)
    return 0


@contextmanager
def _traced(place: Path) -> Iterator[tuple[ReferenceCache, Marks, Marks]]:
    sockets = place / "s"
    sockets.mkdir(mode=0o700)
    os.environ["DG_CACHE_SOCKET_DIR"] = str(sockets)
    ring = place / "daemon.marks"
    daemon = Marks(ring, DAEMON_POINTS)
    command = (Path(sys.executable), "-m", "benchmarks.traced_daemon", str(ring))
    with (
        running_daemon(*command, environment=dict(os.environ), log=place / "log"),
        connected() as cache,
    ):
        yield cache, _marked_client(place / "client.marks"), daemon


def _marked_client(path: Path) -> Marks:
    from dgcache import cache, reference, remote, session

    marks = Marks(path, CLIENT_POINTS)
    marks.around(cache.ReferenceCache, "get", "get")
    marks.around(remote.DaemonBackend, "_call", "call")
    marks.around(session.Session, "take_descriptor", "take")
    marks.around(remote, "require_sealed", "seals")
    marks.around(reference.Reference, "__init__", "reference")
    marks.around(reference.Reference, "close", "close")
    return marks


def _held(
    cache: ReferenceCache, data: memoryview, client: Marks, daemon: Marks, steps: Sequence[Step]
) -> Group:
    sha256 = put(cache, data, 1)
    with cache.get("bench", "budget", sha256):
        lookups = _traces(_LOOKUPS, lambda: _look_up(cache, sha256), client, daemon)
    return _group("where the time of a lookup goes, held", "held", lookups, steps)


def _unheld(
    cache: ReferenceCache,
    data: memoryview,
    size: int,
    client: Marks,
    daemon: Marks,
    steps: Sequence[Step],
) -> Group:
    sha256 = put(cache, data, size)

    def once() -> None:
        require_unheld(cache)
        _look_up(cache, sha256)

    lookups = _traces(_UNHELD_LOOKUPS[size], once, client, daemon)
    title = f"where the time of a lookup goes, {size} MB that nobody holds"
    return _group(title, f"{size} MB", lookups, steps)


def _look_up(cache: ReferenceCache, sha256: str) -> None:
    cache.get("bench", "budget", sha256).close()


def _traces(count: int, once: Callable[[], None], client: Marks, daemon: Marks) -> list[list[Mark]]:
    """Do it so often; return, for each lookup, its marks from `get` to `close, done`."""
    for _ in range(20):
        once()
    client.forget()
    daemon.forget()
    for _ in range(count):
        once()
    marks = sorted([*client.taken(), *daemon.taken()])
    traces: list[list[Mark]] = []
    for mark in marks:
        if mark.name == _START:
            traces.append([])
        if traces:
            traces[-1].append(mark)
    return traces


def _steps_of(trace: Sequence[Mark], steps: Sequence[Step]) -> list[float] | None:
    """Return the microseconds of each step, None where one is missing or out of order.

    gRPC may send more than the answer, a ping for one, so marks between two steps are passed over;
    of the relay's answers the last before the call ends counts, which is the one that ends it.
    """
    at = trace[0].at
    found = []
    rest = list(trace[1:])
    for step in steps:
        number = next((n for n, mark in enumerate(rest) if mark.name == step.mark), None)
        if number is None:
            return None
        found.append((rest[number].at - at) / 1000)
        at = rest[number].at
        rest = rest[number + 1 :]
    return found


def _group(title: str, name: str, traces: Sequence[Sequence[Mark]], steps: Sequence[Step]) -> Group:
    complete = [one for trace in traces if (one := _steps_of(trace, steps)) is not None]
    if len(complete) < len(traces) // 2:
        raise RuntimeError(
            f"{name}: only {len(complete)} of {len(traces)} lookups passed all marks"
        )
    complete.sort(key=sum)
    middle = complete[len(complete) // 4 : max(1, 3 * len(complete) // 4)]
    means = [fmean(taken) for taken in zip(*middle, strict=True)]
    measured = fmean([sum(one) for one in middle])
    figures = [Figure(step.text, mean, "µs") for step, mean in zip(steps, means, strict=True)]
    figures.append(Figure("all steps", sum(means), "µs"))
    figures.append(Figure("the lookup, first mark to last", measured, "µs"))
    return Group(
        title,
        f"{len(complete)} lookups one after the other without a pause, the middle half of them; "
        "each step from one mark to the next, on one clock for client and daemon; marks add about "
        f"{len(steps)} µs in all. Where processes wake each other up after a pause, each of the "
        "wake-ups takes longer, and so does the lookup",
        figures,
    )


if __name__ == "__main__":
    sys.exit(main())
