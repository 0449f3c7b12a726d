"""How a blob is encrypted: AES-256-GCM in chunks of 1 MiB, each bound to its place and its header.

The construction is STREAM (Hoang, Reyhanitabar, Rogaway, Vizár 2015, "Online Authenticated-
Encryption and its Nonce-Reuse Misuse-Resistance"): the nonce of a chunk is an 11-byte big-endian
counter and a byte that marks the last one, so that a chunk moved, dropped, repeated or appended
fails its check. An empty blob is one empty last chunk. Every blob has a key of its own, so a chunk
or a header of another blob fails as well.

The layout is `header | seal | chunk | chunk | …`, each chunk followed by its 16-byte tag:

- the *frame* (magic, version, algorithm, chunk size, size, created, expires) is associated data of
  every chunk;
- the digest is known only when the last byte has been read, so the *seal*, an authentication tag
  over the frame and the digest under the blob's key and a nonce that no chunk can have, binds it.
  The seal is checked before any chunk is opened (docs/adr/0001).

The caller must throw away the output of a chunk whose check fails: OpenSSL writes plaintext before
it knows the tag.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dgcache_core.errors import CacheCorruptionError
from dgcache_core.references import Sha256

CHUNK_BYTES = 1 << 20
TAG_BYTES = 16
MAGIC = b"DGCB"
VERSION = 1
AES_256_GCM = 1

_FRAME = struct.Struct(">4sHHIQQQ")
_DIGEST_BYTES = 32
HEADER_BYTES = _FRAME.size + _DIGEST_BYTES
BODY_OFFSET = HEADER_BYTES + TAG_BYTES

_MORE_CHUNKS, _LAST_CHUNK, _SEAL = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Frame:
    """What is known about a blob before its first byte. Times are seconds since the epoch."""

    size: int
    created_seconds: int
    expires_seconds: int

    def pack(self) -> bytes:
        """Return the bytes that every chunk is bound to."""
        return _FRAME.pack(
            MAGIC,
            VERSION,
            AES_256_GCM,
            CHUNK_BYTES,
            self.size,
            self.created_seconds,
            self.expires_seconds,
        )

    @property
    def chunks(self) -> int:
        """How many chunks the blob has: at least one."""
        return max(1, -(-self.size // CHUNK_BYTES))

    @property
    def sealed_bytes(self) -> int:
        """How many bytes the encrypted blob takes, header and tags included."""
        return BODY_OFFSET + self.size + self.chunks * TAG_BYTES

    def plain_span(self, index: int) -> tuple[int, int]:
        """Return (offset, length) of a chunk in the plaintext."""
        offset = index * CHUNK_BYTES
        return offset, min(CHUNK_BYTES, self.size - offset)

    def sealed_span(self, index: int) -> slice:
        """Return where a chunk and its tag stand in the encrypted blob."""
        start = BODY_OFFSET + index * (CHUNK_BYTES + TAG_BYTES)
        return slice(start, start + self.plain_span(index)[1] + TAG_BYTES)


def seal_chunk(
    key: memoryview, frame: Frame, index: int, plain: memoryview, blob: memoryview
) -> None:
    """Encrypt one chunk into its place in `blob`."""
    _encrypt_into(
        key, _chunk_nonce(frame, index), plain, frame.pack(), blob[frame.sealed_span(index)]
    )


def open_chunk(
    key: memoryview, frame: Frame, index: int, blob: memoryview, plain: memoryview
) -> None:
    """Decrypt one chunk into `plain`, which has the chunk's exact length.

    Raises:
        CacheCorruptionError: the check failed; what `plain` holds now must not be used.
    """
    try:
        with blob[frame.sealed_span(index)] as sealed:  # no traceback may hold on to the blob
            _decrypt_into(key, _chunk_nonce(frame, index), sealed, frame.pack(), plain)
    except InvalidTag as error:
        raise CacheCorruptionError(f"chunk {index} of {frame.chunks} failed its check") from error


def seal_header(key: memoryview, frame: Frame, digest: Sha256, blob: memoryview) -> None:
    """Write header and seal; this completes a blob whose chunks are sealed."""
    header = frame.pack() + bytes.fromhex(digest)
    blob[:HEADER_BYTES] = header
    _encrypt_into(key, _SEAL_NONCE, memoryview(b""), header, blob[HEADER_BYTES:BODY_OFFSET])


def open_header(key: memoryview, blob: memoryview) -> tuple[Frame, Sha256]:
    """Check the seal and return what it vouches for.

    Raises:
        CacheCorruptionError: the seal does not fit, or the blob's length does not fit its header.
    """
    if len(blob) < BODY_OFFSET:
        raise CacheCorruptionError("the blob is shorter than its header")
    header = bytes(blob[:HEADER_BYTES])
    try:
        with blob[HEADER_BYTES:BODY_OFFSET] as seal:
            _decrypt_into(key, _SEAL_NONCE, seal, header, memoryview(bytearray()))
    except InvalidTag as error:
        raise CacheCorruptionError("the header failed its check") from error
    magic, version, algorithm, chunk_bytes, size, created, expires = _FRAME.unpack_from(header)
    if (magic, version, algorithm, chunk_bytes) != (MAGIC, VERSION, AES_256_GCM, CHUNK_BYTES):
        raise CacheCorruptionError("the blob is of another format")
    frame = Frame(size, created, expires)
    if frame.sealed_bytes != len(blob):
        raise CacheCorruptionError("the blob's length does not fit its header")
    return frame, Sha256(header[_FRAME.size :].hex())


def seal_bytes(
    key: memoryview, nonce: bytes, plain: memoryview, associated: bytes, out: memoryview
) -> None:
    """Encrypt something that is no blob; `out` is `TAG_BYTES` longer, the tag comes last.

    The caller sees to it that no nonce is used twice under a key.
    """
    _encrypt_into(key, nonce, plain, associated, out)


def open_bytes(
    key: memoryview, nonce: bytes, sealed: memoryview, associated: bytes, out: memoryview
) -> None:
    """Decrypt what `seal_bytes` made into `out`.

    Raises:
        CacheCorruptionError: the check failed; what `out` holds now must not be used.
    """
    try:
        _decrypt_into(key, nonce, sealed, associated, out)
    except InvalidTag as error:
        raise CacheCorruptionError("what was encrypted failed its check") from error


def _nonce(counter: int, kind: int) -> bytes:
    return counter.to_bytes(11, "big") + bytes((kind,))


def _chunk_nonce(frame: Frame, index: int) -> bytes:
    return _nonce(index, _LAST_CHUNK if index == frame.chunks - 1 else _MORE_CHUNKS)


_SEAL_NONCE = _nonce(0, _SEAL)


# cryptography 47 added the calls that write into a given buffer, and 50 releases the GIL in them.
# Older ones (44 is what DeltaGlider allows) have the same in the streaming interface.

_Transform = Callable[[memoryview, bytes, memoryview, bytes, memoryview], None]


def _encrypt_oneshot(
    key: memoryview, nonce: bytes, plain: memoryview, associated: bytes, out: memoryview
) -> None:
    AESGCM(key).encrypt_into(nonce, plain, associated, out)


def _decrypt_oneshot(
    key: memoryview, nonce: bytes, sealed: memoryview, associated: bytes, out: memoryview
) -> None:
    AESGCM(key).decrypt_into(nonce, sealed, associated, out)


def _encrypt_streaming(
    key: memoryview, nonce: bytes, plain: memoryview, associated: bytes, out: memoryview
) -> None:
    encryptor = Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(associated)
    if plain:
        encryptor.update_into(plain, out[:-TAG_BYTES])
    encryptor.finalize()
    out[-TAG_BYTES:] = encryptor.tag


def _decrypt_streaming(
    key: memoryview, nonce: bytes, sealed: memoryview, associated: bytes, out: memoryview
) -> None:
    tag = bytes(sealed[-TAG_BYTES:])
    decryptor = Cipher(algorithms.AES(key), modes.GCM(nonce, tag)).decryptor()
    decryptor.authenticate_additional_data(associated)
    if out:
        decryptor.update_into(sealed[:-TAG_BYTES], out)
    decryptor.finalize()


_HAS_ONESHOT = hasattr(AESGCM, "decrypt_into")
_encrypt_into: _Transform = _encrypt_oneshot if _HAS_ONESHOT else _encrypt_streaming
_decrypt_into: _Transform = _decrypt_oneshot if _HAS_ONESHOT else _decrypt_streaming
