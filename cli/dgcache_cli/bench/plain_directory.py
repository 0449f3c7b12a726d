"""How DeltaGlider 5.0.0 cached: a plaintext copy per deltaspace, in a directory that all share.

`has_ref` hashed the file; `ref_path` then named it, unchecked. This version's port had no other
way to read, and no `clear`. Its directory was /tmp/.deltaglider/reference_cache by default, made
with the modes that the umask left.
"""

import hashlib
import shutil
from contextlib import suppress
from pathlib import Path


class PlainDirectory:
    """`base/bucket/prefix/reference.bin`."""

    def __init__(self, base: Path) -> None:
        """Use a directory, which the first write makes."""
        self._base = base

    def ref_path(self, bucket: str, prefix: str) -> Path:
        """See `CachePort`."""
        return self._base / bucket / prefix / "reference.bin"

    def has_ref(self, bucket: str, prefix: str, sha: str) -> bool:
        """See `CachePort`."""
        try:
            with self.ref_path(bucket, prefix).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == sha
        except FileNotFoundError:
            return False

    def write_ref(self, bucket: str, prefix: str, src: Path) -> Path:
        """See `CachePort`."""
        target = self.ref_path(bucket, prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(src, target)
        return target

    def evict(self, bucket: str, prefix: str) -> None:
        """See `CachePort`."""
        gone = self.ref_path(bucket, prefix)
        gone.unlink(missing_ok=True)
        with suppress(OSError):  # other deltaspaces are in there
            gone.parent.rmdir()
            gone.parent.parent.rmdir()
