"""The roadmap's MemoryCache: plaintext `bytes` in a dict, digest beside them.

A program such as xdelta3 reads files, so each read writes the bytes to a file and hands out its
path, as DeltaGlider's does.
"""

import hashlib
from pathlib import Path

from dgcache_core.errors import CacheCorruptionError, CacheMissError


class PlainMemory:
    """Bytes by deltaspace; files in one directory, mode 0700, while they are read and after."""

    def __init__(self, directory: Path) -> None:
        """Make the directory of the files."""
        self._directory = directory
        directory.mkdir(mode=0o700, exist_ok=True)
        self._kept: dict[tuple[str, str], tuple[bytes, str]] = {}

    def ref_path(self, bucket: str, prefix: str) -> Path:
        """See `CachePort`."""
        return self._directory / bucket / prefix.replace("/", "_") / "reference.bin"

    def has_ref(self, bucket: str, prefix: str, sha: str) -> bool:
        """See `CachePort`."""
        kept = self._kept.get((bucket, prefix))
        return kept is not None and kept[1] == sha

    def get_validated_ref(self, bucket: str, prefix: str, expected_sha: str) -> Path:
        """See `CachePort`: digests are compared, bytes are written out."""
        try:
            content, sha = self._kept[bucket, prefix]
        except KeyError as error:
            raise CacheMissError(f"{bucket}/{prefix} is not cached") from error
        if sha != expected_sha:
            raise CacheCorruptionError(f"SHA mismatch: {bucket}/{prefix} has {sha}")
        path = self.ref_path(bucket, prefix)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def write_ref(self, bucket: str, prefix: str, src: Path) -> Path:
        """See `CachePort`."""
        content = src.read_bytes()
        self._kept[bucket, prefix] = (content, hashlib.sha256(content).hexdigest())
        return self.ref_path(bucket, prefix)

    def evict(self, bucket: str, prefix: str) -> None:
        """See `CachePort`."""
        self._kept.pop((bucket, prefix), None)
        self.ref_path(bucket, prefix).unlink(missing_ok=True)

    def clear(self) -> None:
        """See `CachePort`."""
        self._kept.clear()
