"""From a stream of bytes to a sealed blob: read once into a private buffer, hash and encrypt it.

What is encrypted is exactly what was hashed, whatever the sender changes meanwhile, because both
work on the same private copy. Two buffers take turns: while a helper hashes one chunk, this thread
encrypts it and reads the next.
"""

import hashlib
from concurrent.futures import Executor, Future

from dgcache_core.aead import CHUNK_BYTES, Frame, seal_chunk, seal_header
from dgcache_core.errors import InvalidReferenceError
from dgcache_core.references import Sha256
from dgcache_core.scratch import ScratchPool
from dgcache_core.store import ReadInto

_HELPER_FROM_BYTES = 256 << 10
"""Measured on two cores: with the helper a store of 256 KiB is 1.2 times as fast, one of 64 KiB
0.93 times."""


class Sealing:
    """Fills one blob, front to back, and seals it."""

    def __init__(
        self,
        frame: Frame,
        key: memoryview,
        blob: memoryview,
        helpers: Executor,
        scratch: ScratchPool,
    ) -> None:
        self.frame = frame
        self._key = key
        self._blob = blob
        self._helpers = helpers
        self._scratch = scratch
        self._hash = hashlib.sha256()
        self._started = False
        self._filled = False

    def fill(self, read: ReadInto) -> None:
        """Take exactly `frame.size` bytes from `read`, and see that no more come.

        Raises:
            InvalidReferenceError: there are fewer or more.
        """
        if self._started:
            raise InvalidReferenceError("a store is filled once")
        self._started = True
        hashing: Future[None] | None = None
        most = max(1, min(self.frame.size, CHUNK_BYTES))  # one, to see that nothing more comes
        with self._scratch.borrow(most) as one, self._scratch.borrow(most) as other:
            try:
                for index in range(self.frame.chunks):
                    _, length = self.frame.plain_span(index)
                    plain = (one, other)[index % 2][:length]
                    self._read_exactly(read, plain, index)
                    if hashing is not None:
                        hashing.result()
                    hashing = self._start_hashing(plain)
                    seal_chunk(self._key, self.frame, index, plain, self._blob)
            finally:
                if hashing is not None:
                    hashing.result()  # before its buffer is wiped and given back
            if read(one[:1]):
                raise InvalidReferenceError(
                    f"the source has more than the {self.frame.size} bytes that were announced"
                )
        self._filled = True

    def finish(self, expected: Sha256 | None) -> Sha256:
        """Seal the header and return the digest.

        Raises:
            InvalidReferenceError: not filled, or the digest is not the expected one.
        """
        if not self._filled:
            raise InvalidReferenceError("the reference was not stored completely")
        digest = Sha256(self._hash.hexdigest())
        if expected is not None and digest != expected:
            raise InvalidReferenceError(
                f"SHA-256 mismatch: {expected} was declared, the bytes have {digest}"
            )
        seal_header(self._key, self.frame, digest, self._blob)
        return digest

    def release(self) -> None:
        """Let go of the blob's mapping, which could not be closed otherwise."""
        self._blob.release()

    def _start_hashing(self, plain: memoryview) -> "Future[None] | None":
        if len(plain) < _HELPER_FROM_BYTES:
            self._hash.update(plain)
            return None
        return self._helpers.submit(self._hash.update, plain)

    def _read_exactly(self, read: ReadInto, into: memoryview, index: int) -> None:
        filled = 0
        while filled < len(into):
            count = read(into[filled:])
            if not count:
                got = index * CHUNK_BYTES + filled
                raise InvalidReferenceError(
                    f"the source ended after {got} of {self.frame.size} bytes"
                )
            filled += count
