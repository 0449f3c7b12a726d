"""The calls DeltaGlider 6.2 makes of a cache, and what the bench asks of every implementation.

`CachePort` has the names and arguments of DeltaGlider's own port. `Contender` is the little that
all implementations have in common: write a file, read by digest, forget.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

BUCKET = "bench"
PREFIX = "app/releases"
PIECE_BYTES = 1 << 20


class FirstCachePort(Protocol):
    """What DeltaGlider 5.0.0 called."""

    def ref_path(self, bucket: str, prefix: str) -> Path:
        """Return where the reference of a deltaspace is."""

    def has_ref(self, bucket: str, prefix: str, sha: str) -> bool:
        """Tell whether it is there with this digest."""

    def write_ref(self, bucket: str, prefix: str, src: Path) -> Path:
        """Keep a file as the reference of a deltaspace."""

    def evict(self, bucket: str, prefix: str) -> None:
        """Forget a deltaspace."""


class CachePort(FirstCachePort, Protocol):
    """What DeltaGlider 6.2 calls."""

    def get_validated_ref(self, bucket: str, prefix: str, expected_sha: str) -> Path:
        """Return its path, validated now."""

    def clear(self) -> None:
        """Forget everything."""


class Contender(Protocol):
    """One implementation, opened: what is timed and attacked."""

    shares: bool
    """Whether a second reader gets what a first one holds."""

    def write(self, source: Path) -> None:
        """Keep a file."""

    def read(self, sha256: str) -> AbstractContextManager[Path]:
        """Lend a path that a program such as xdelta3 can read."""

    def evict(self) -> None:
        """Forget it, as the implementation's users do."""

    def clear(self) -> None:
        """Be as new, so that the next write is a first one."""

    def settle(self) -> None:
        """Return when the next read will find that nobody holds the reference."""


class PortContender:
    """A contender on a cache port."""

    shares = False

    def __init__(
        self, port: FirstCachePort, path_of: Callable[[str], Path], clear: Callable[[], None]
    ) -> None:
        """Use a port; `path_of` is what DeltaGlider called for a path, given the digest."""
        self._port = port
        self._path_of = path_of
        self._clear = clear

    def write(self, source: Path) -> None:
        """See `Contender`."""
        self._port.write_ref(BUCKET, PREFIX, source)

    @contextmanager
    def read(self, sha256: str) -> Iterator[Path]:
        """See `Contender`."""
        yield self._path_of(sha256)

    def evict(self) -> None:
        """See `Contender`."""
        self._port.evict(BUCKET, PREFIX)

    def clear(self) -> None:
        """See `Contender`."""
        self._clear()

    def settle(self) -> None:
        """Nothing is ever held."""
