"""What the tests of `core` share: bytes that are told apart, a clock that is turned by hand, calls
that do one thing with a store, and real processes to do it from."""

import hashlib
import io
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import settings

from dgcache_core.handouts import Handout
from dgcache_core.references import Deltaspace, Sha256
from dgcache_core.store import Store

DETERMINISTIC = settings(derandomize=True, deadline=None, database=None)
"""The same examples at every run, and no test fails for being slow."""

RELEASES = Deltaspace("bucket", "releases")
NIGHTLY = Deltaspace("bucket", "nightly")


def content(size: int, seed: int = 0) -> bytes:
    """Return bytes that look random, the same for the same size and seed."""
    return random.Random(f"{size}-{seed}").randbytes(size)


def digest_of(data: bytes) -> Sha256:
    """Return the digest of some bytes."""
    return Sha256(hashlib.sha256(data).hexdigest())


class HandClock:
    """A clock that stands still until it is advanced."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def put(
    store: Store,
    data: bytes,
    deltaspace: Deltaspace = RELEASES,
    expected: Sha256 | None = None,
) -> Sha256:
    """Store some bytes and return their digest."""
    with store.begin(len(data), deltaspace, expected=expected) as ingest:
        ingest.fill(io.BytesIO(data).readinto)
        return ingest.commit()


def get(store: Store, sha256: Sha256, deltaspace: Deltaspace = RELEASES) -> bytes:
    """Look some bytes up, read them, and hold them no longer."""
    with held(store.lookup(deltaspace, sha256)) as handout:
        return read_all(handout)


@contextmanager
def held(handout: Handout) -> Iterator[Handout]:
    """Hold a handout for the length of a block."""
    try:
        yield handout
    finally:
        os.close(handout.fd)


def read_all(handout: Handout) -> bytes:
    """Return the whole plaintext, whatever the descriptor's offset is."""
    return os.pread(handout.fd, handout.size + 1, 0)


def flip(blob: "bytearray | memoryview", position: int, mask: int = 1) -> None:
    """Change one or more bits of one byte."""
    blob[position] ^= mask


def open_descriptors() -> set[tuple[int, str]]:
    """Return the open descriptors of this process and what each leads to."""
    seen = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - pathlib has no cheaper way
        try:
            seen.add((int(name), str(Path(f"/proc/self/fd/{name}").readlink())))
        except FileNotFoundError:
            continue  # the one that listed the directory
    return seen


def run_python(program: str, *arguments: str, timeout: float = 60.0) -> str:
    """Run a program in a process of its own, which must end well; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "error", "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout.strip()
