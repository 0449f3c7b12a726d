"""How DeltaGlider cached from 5.0.3 on: files named by their SHA-256, hashed again at each use.

The directory belongs to one process. A file stays after an eviction, since others may be served by
it; only `clear` removes files.
"""

import fcntl
import hashlib
import shutil
from pathlib import Path

from dgcache_core.errors import CacheCorruptionError, CacheMissError

_HASHED_PIECE_BYTES = 64 << 10


class ContentAddressed:
    """`base/ab/cd/abcd…`, and in memory which deltaspace has which digest."""

    def __init__(self, base: Path) -> None:
        """Use a directory that is there."""
        self._base = base
        self._digests: dict[tuple[str, str], str] = {}

    def ref_path(self, bucket: str, prefix: str) -> Path:
        """See `CachePort`."""
        sha = self._digests.get((bucket, prefix))
        return self._file(sha) if sha else self._base / "none" / bucket / prefix

    def has_ref(self, bucket: str, prefix: str, sha: str) -> bool:  # noqa: ARG002 - the port's
        """See `CachePort`: that a file of this name is there is enough."""
        return self._file(sha).exists()

    def get_validated_ref(self, bucket: str, prefix: str, expected_sha: str) -> Path:
        """See `CachePort`: the whole file is read under a shared lock and hashed."""
        path = self._file(expected_sha)
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                actual = hashlib.sha256(file.read()).hexdigest()
        except OSError as error:
            raise CacheMissError(f"{bucket}/{prefix} is not cached: {error.strerror}") from error
        if actual != expected_sha:
            path.unlink(missing_ok=True)
            raise CacheCorruptionError(f"SHA mismatch: the file of {expected_sha} has {actual}")
        self._digests[bucket, prefix] = expected_sha
        return path

    def write_ref(self, bucket: str, prefix: str, src: Path) -> Path:
        """See `CachePort`: hash, copy beside, rename; nothing is copied twice."""
        sha = _digest(src)
        path = self._file(sha)
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            beside = path.with_name(f".{sha}")
            shutil.copy2(src, beside)
            beside.rename(path)
        self._digests[bucket, prefix] = sha
        return path

    def evict(self, bucket: str, prefix: str) -> None:
        """See `CachePort`."""
        self._digests.pop((bucket, prefix), None)

    def clear(self) -> None:
        """See `CachePort`."""
        self._digests.clear()
        shutil.rmtree(self._base, ignore_errors=True)
        self._base.mkdir(mode=0o700)

    def _file(self, sha: str) -> Path:
        return self._base / sha[:2] / sha[2:4] / sha


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASHED_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
