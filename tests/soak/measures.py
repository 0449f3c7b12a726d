"""What a daemon at rest has open and in memory, and what of any reference is left on a disk."""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.soak.truth import MARK_BYTES, SAMPLE_BYTES, Truth
from tests.support.wire import SECONDS, Client, eventually

_PIECE_BYTES = 4 << 20
_SETTLED_SECONDS, _LOOK_SECONDS = 5.0, 0.25
"""A daemon gives freed memory back after three idle seconds."""
PUBLIC_PLACES = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))


@dataclass(frozen=True)
class AtRest:
    """A daemon's figures while nobody uses it and it keeps nothing.

    `memory_kib` is RssAnon and RssShmem: what it has for itself. Pages of program files (RssFile)
    come and go with the kernel's page cache and are told apart.
    """

    descriptors: int
    threads: int
    memory_kib: int
    file_kib: int


def at_rest(directory: Path, pid: int) -> AtRest:
    """Free everything, wait until nothing is in progress and nothing changes, and measure."""
    with Client(directory) as client:
        client.stub.Clear(pb.ClearRequest(), timeout=SECONDS)

        def resting() -> bool:
            status = client.status()
            ours = (status.sessions, status.connections) == (1, 1)
            idle = status.stores_in_progress == status.leases.held == status.leases.waiting == 0
            store = status.store
            empty = store.entries == store.handouts == store.reserved_bytes == 0
            return ours and idle and empty and store.limit_bytes == store.max_bytes

        eventually(resting, 60)
        return _settled(pid)


def _settled(pid: int) -> AtRest:
    """Measure until it was the same for a while: what has just ended is still being closed."""
    seen, since, pause = _measured(pid), time.monotonic(), threading.Event()
    deadline = since + SECONDS
    while time.monotonic() < min(since + _SETTLED_SECONDS, deadline):
        pause.wait(_LOOK_SECONDS)
        now = _measured(pid)
        if now != seen:
            seen, since = now, time.monotonic()
    return seen


def _measured(pid: int) -> AtRest:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    kib = {name: int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem", "RssFile")}
    return AtRest(
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208 - no paths are wanted
        threads=int(fields["Threads"]),
        memory_kib=kib["RssAnon"] + kib["RssShmem"],
        file_kib=kib["RssFile"],
    )


def leftovers(
    truth: Truth,
    places: Iterable[Path],
    since: float,
    public: Iterable[Path] = PUBLIC_PLACES,
) -> tuple[list[str], int]:
    """Search files for samples of every reference.

    Args:
        truth: whose references.
        places: ours, which are searched wholly.
        since: time.time() of the start.
        public: places of everybody, of which only what changed since then is searched.

    Returns:
        What was found, a line each, and how many files were searched.
    """
    names = {truth.sample(number): number for number in range(len(truth.sizes))}
    found, searched = [], 0
    for place, everything in [
        *((one, True) for one in places),
        *((p, False) for p in public),
    ]:
        for path in _files(place):
            with suppress(OSError):
                status = path.lstat()
                if not everything and max(status.st_mtime, status.st_ctime) < since - 1:
                    continue
                searched += 1
                sample = _sample_in(path, truth.mark)
                if sample is not None:
                    found.append(f"{path}: reference {names.get(sample, 'unknown')}")
    return found, searched


def _files(place: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(place):
        for name in names:
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                yield path


def _sample_in(path: Path, mark: bytes) -> bytes | None:
    before = b""
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            window = before + piece
            at = window.find(mark)
            if at >= 0:
                window += file.read(SAMPLE_BYTES)
                return window[at : at + SAMPLE_BYTES]
            before = window[-(MARK_BYTES - 1) :]
    return None
