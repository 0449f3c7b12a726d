"""The roadmap's encrypted cache: Fernet over the content-addressed files, decrypted into a file.

As DeltaGlider 6 does it: the ciphertext goes through a file beside the source into files named by
the digest *of the ciphertext*, while `has_ref` asks for the digest of the plaintext, so that it
never says yes. The key is the process's own.
"""

import hashlib
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from dgcache_cli.bench.content_addressed import ContentAddressed
from dgcache_core.errors import CacheCorruptionError, CacheMissError


class FernetFiles:
    """Ciphertext in files, and in memory which deltaspace has which plaintext digest."""

    def __init__(self, base: Path) -> None:
        """Use a directory that is there."""
        self._files = ContentAddressed(base)
        self._cipher = Fernet(Fernet.generate_key())
        self._digests: dict[tuple[str, str], str] = {}

    def ref_path(self, bucket: str, prefix: str) -> Path:
        """See `CachePort`."""
        return self._files.ref_path(bucket, prefix)

    def has_ref(self, bucket: str, prefix: str, sha: str) -> bool:
        """See `CachePort`."""
        return self._files.has_ref(bucket, prefix, sha)

    def get_validated_ref(self, bucket: str, prefix: str, expected_sha: str) -> Path:
        """See `CachePort`: decrypt the whole, hash the whole, write the whole."""
        sha = self._digests.get((bucket, prefix))
        if sha is None:
            raise CacheMissError(f"{bucket}/{prefix} is not cached")
        if sha != expected_sha:
            raise CacheCorruptionError(f"SHA mismatch: {bucket}/{prefix} has {sha}")
        ciphertext = self._files.ref_path(bucket, prefix)
        try:
            content = self._cipher.decrypt(ciphertext.read_bytes())
        except OSError as error:
            raise CacheMissError(f"{bucket}/{prefix}: {error.strerror}") from error
        except InvalidToken as error:
            ciphertext.unlink(missing_ok=True)
            del self._digests[bucket, prefix]
            raise CacheCorruptionError(f"{bucket}/{prefix} does not decrypt") from error
        if hashlib.sha256(content).hexdigest() != expected_sha:
            raise CacheCorruptionError(f"SHA mismatch in {bucket}/{prefix}")
        decrypted = ciphertext.with_suffix(".decrypted")
        decrypted.write_bytes(content)
        return decrypted

    def write_ref(self, bucket: str, prefix: str, src: Path) -> Path:
        """See `CachePort`."""
        content = src.read_bytes()
        beside = src.with_suffix(".encrypted.tmp")
        try:
            beside.write_bytes(self._cipher.encrypt(content))
            path = self._files.write_ref(bucket, prefix, beside)
        finally:
            beside.unlink(missing_ok=True)
        self._digests[bucket, prefix] = hashlib.sha256(content).hexdigest()
        return path

    def evict(self, bucket: str, prefix: str) -> None:
        """See `CachePort`."""
        self._digests.pop((bucket, prefix), None)
        self.ref_path(bucket, prefix).with_suffix(".decrypted").unlink(missing_ok=True)
        self._files.evict(bucket, prefix)

    def clear(self) -> None:
        """See `CachePort`."""
        self._digests.clear()
        self._files.clear()
