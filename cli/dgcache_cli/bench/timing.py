"""How long writes and reads take: every implementation in turn, round after round.

A read is timed from the need to a path that a program can open, and again to the last byte read
through that path, since a path alone is no bytes: v5's costs nothing to get and all to read. Cold
means that nobody holds the reference; shared, that somebody does. Files are in the page cache.
"""

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dgcache_cli.bench.port import PIECE_BYTES, Contender
from dgcache_core.errors import CacheCorruptionError


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one implementation, in seconds."""

    write: float
    path: float
    last_byte: float
    shared: float | None


Samples = dict[str, list[Sample]]


def measure(
    contenders: Mapping[str, Contender],
    source: Path,
    sha256: str,
    rounds: int,
    before_each: Callable[[str], None],
) -> Samples:
    """Time every contender once a round, A B C A B C, after one round that does not count.

    Args:
        contenders: by name.
        source: the file they keep.
        sha256: its digest.
        rounds: how many.
        before_each: told the name before each; may raise to end it.

    Raises:
        CacheCorruptionError: one of them handed out other bytes.
    """
    samples: Samples = defaultdict(list)
    for name, contender in contenders.items():
        before_each(name)
        _require_right(name, contender, source, sha256)
    for _ in range(rounds):
        for name, contender in contenders.items():
            before_each(name)
            samples[name].append(_sample(contender, source, sha256))
    return samples


def digest_of(path: Path) -> str:
    """Return the digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Divide what was measured in the same round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def _require_right(name: str, contender: Contender, source: Path, sha256: str) -> None:
    contender.write(source)
    with contender.read(sha256) as path:
        if digest_of(path) != sha256:
            raise CacheCorruptionError(f"{name} handed out other bytes than were written")
    contender.clear()


def _sample(contender: Contender, source: Path, sha256: str) -> Sample:
    buffer = bytearray(PIECE_BYTES)
    start = time.perf_counter()
    contender.write(source)
    write = time.perf_counter() - start
    contender.settle()
    start = time.perf_counter()
    with contender.read(sha256) as path:
        to_path = time.perf_counter() - start
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        to_last_byte = time.perf_counter() - start
        shared = _shared(contender, sha256) if contender.shares else None
    contender.clear()  # so that none holds memory while another is timed
    return Sample(write, to_path, to_last_byte, shared)


def _shared(contender: Contender, sha256: str) -> float:
    start = time.perf_counter()
    with contender.read(sha256):
        return time.perf_counter() - start
