"""What a file of the disk tier holds: a signed header, then the very bytes of the sealed blob.

`prefix | encrypted header | MAC | seal | chunk | chunk | …`. Seal and chunks are what memory holds
(`aead`), so writing and reading encrypt nothing anew. The blob's own header, which has the digest
in clear, is not written: it follows from the encrypted one. The parts of the header:

- the *prefix*, in clear: magic, version, flags, length of the header, which key, which generation,
  nonce. It tells whose the file is and nothing of what is in it;
- the *encrypted header*, AES-256-GCM with the prefix as associated data: digest, size, times,
  owner, generation, deltaspaces, and the blob's key, which is wrapped once more so that reading the
  rest does not bring it into ordinary memory. Padded to a power of two, so that the length of names
  does not show. The size of the blob does show, in the size of the file;
- the *MAC*, HMAC-SHA256 over all before it, which is compared before a byte is decrypted.

Nonces are random: 2^32 files under one generation are far from a collision (NIST SP 800-38D, 8.3).
"""

import hmac
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from dgcache_core.aead import HEADER_BYTES, TAG_BYTES, Frame, open_bytes, seal_bytes
from dgcache_core.errors import CacheCorruptionError, InvalidReferenceError
from dgcache_core.keyslab import KEY_BYTES
from dgcache_core.references import Deltaspace, Sha256
from dgcache_core.tier_keys import ID_BYTES, MAC_BYTES, TierKeys

MAGIC = b"DGCD"
VERSION = 2
MIN_HEADER_BYTES = 1 << 10
MAX_HEADER_BYTES = 1 << 16
MAX_DELTASPACES = 32
"""As many as a header surely has room for: 32 of the longest names take 41 KiB."""

_EPHEMERAL = 1
_NONCE_BYTES = 12
_PREFIX = struct.Struct(f">4sHHI{ID_BYTES}s{ID_BYTES}s{_NONCE_BYTES}s")
PREFIX_BYTES = _PREFIX.size
_FIXED = struct.Struct(f">32sQQQQQ{_NONCE_BYTES}s{KEY_BYTES + TAG_BYTES}sH")
_LENGTHS = struct.Struct(">HH")


class Origin(Enum):
    """Whose a file is, as far as its prefix tells; only the MAC of `OURS` can prove it."""

    OURS = auto()
    PAST = auto()  # an earlier generation, or an ephemeral key that died with its process
    OTHER_KEY = auto()
    FOREIGN = auto()


@dataclass(frozen=True, slots=True)
class Prefix:
    """The part of a header that everybody can read."""

    origin: Origin
    header_bytes: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class DiskHeader:
    """What a header vouches for; the blob's key in it is wrapped."""

    frame: Frame
    sha256: Sha256
    uid: int
    generation: int
    deltaspaces: tuple[Deltaspace, ...]
    mac: bytes
    wrap_nonce: bytes
    wrapped_key: bytes

    def unwrap_into(self, keys: TierKeys, out: memoryview) -> None:
        """Write the blob's key into `out`, a key slot.

        Raises:
            CacheCorruptionError: the wrapping failed its check.
        """
        with memoryview(self.wrapped_key) as wrapped:
            digest = bytes.fromhex(self.sha256)
            open_bytes(keys.key_wrapping, self.wrap_nonce, wrapped, digest, out)


def body_bytes(frame: Frame) -> int:
    """Return how long seal and chunks of a blob are."""
    return frame.sealed_bytes - HEADER_BYTES


def blob_header(frame: Frame, sha256: Sha256) -> bytes:
    """Return the start of a sealed blob, which its file does not have."""
    return frame.pack() + bytes.fromhex(sha256)


def read_prefix(data: bytes, keys: TierKeys) -> Prefix:
    """Return what the first bytes of a file say about its origin.

    Raises:
        CacheCorruptionError: it is ours, and too short or of an impossible length.
    """
    if not data:
        raise CacheCorruptionError("the file is empty")
    if len(data) < PREFIX_BYTES:
        if data[: len(MAGIC)] == MAGIC:
            raise CacheCorruptionError("the file is shorter than its prefix")
        return Prefix(Origin.FOREIGN)
    magic, version, flags, header_bytes, key_id, generation_id, _ = _PREFIX.unpack_from(data)
    if (magic, version) != (MAGIC, VERSION):
        return Prefix(Origin.FOREIGN)
    if key_id != keys.key_id:
        return Prefix(Origin.PAST if flags & _EPHEMERAL else Origin.OTHER_KEY)
    if generation_id != keys.generation_id:
        return Prefix(Origin.PAST)
    if not MIN_HEADER_BYTES <= header_bytes <= MAX_HEADER_BYTES:
        raise CacheCorruptionError(f"a header of {header_bytes} bytes cannot be")
    return Prefix(Origin.OURS, header_bytes)


def seal_disk_header(
    keys: TierKeys,
    frame: Frame,
    sha256: Sha256,
    blob_key: memoryview,
    deltaspaces: Iterable[Deltaspace],
    *,
    ephemeral: bool,
) -> bytes:
    """Return the whole signed header of a blob; of its deltaspaces the first `MAX_DELTASPACES`."""
    plain = _pack(keys, frame, sha256, blob_key, list(deltaspaces)[:MAX_DELTASPACES])
    around = PREFIX_BYTES + TAG_BYTES + MAC_BYTES
    header_bytes = MIN_HEADER_BYTES
    while header_bytes < len(plain) + around:
        header_bytes *= 2
    plain += bytes(header_bytes - around - len(plain))
    nonce = os.urandom(_NONCE_BYTES)
    flags = _EPHEMERAL if ephemeral else 0
    prefix = _PREFIX.pack(
        MAGIC, VERSION, flags, header_bytes, keys.key_id, keys.generation_id, nonce
    )
    sealed = bytearray(len(plain) + TAG_BYTES)
    seal_bytes(keys.header_encryption, nonce, memoryview(plain), prefix, memoryview(sealed))
    signed = prefix + sealed
    return signed + keys.sign(signed)


def open_disk_header(keys: TierKeys, header: bytes) -> DiskHeader:
    """Judge a whole header and return what it vouches for.

    Raises:
        CacheCorruptionError: the MAC does not fit, or what it signs is not of this format.
    """
    signed, mac = header[:-MAC_BYTES], header[-MAC_BYTES:]
    if len(signed) < PREFIX_BYTES or not hmac.compare_digest(keys.sign(signed), mac):
        raise CacheCorruptionError("the signature of the header does not fit")
    prefix = signed[:PREFIX_BYTES]
    nonce = prefix[-_NONCE_BYTES:]
    plain = bytearray(len(signed) - PREFIX_BYTES - TAG_BYTES)
    with memoryview(signed)[PREFIX_BYTES:] as sealed:
        open_bytes(keys.header_encryption, nonce, sealed, prefix, memoryview(plain))
    try:
        return _unpack(bytes(plain), mac)
    except (struct.error, UnicodeDecodeError, InvalidReferenceError) as error:
        raise CacheCorruptionError("the header is signed and yet not of this format") from error


def _pack(
    keys: TierKeys,
    frame: Frame,
    sha256: Sha256,
    blob_key: memoryview,
    deltaspaces: list[Deltaspace],
) -> bytes:
    digest = bytes.fromhex(sha256)
    wrap_nonce = os.urandom(_NONCE_BYTES)
    wrapped = bytearray(KEY_BYTES + TAG_BYTES)
    seal_bytes(keys.key_wrapping, wrap_nonce, blob_key, digest, memoryview(wrapped))
    parts = [
        _FIXED.pack(
            digest,
            frame.size,
            frame.created_seconds,
            frame.expires_seconds,
            os.geteuid(),
            keys.generation.counter,
            wrap_nonce,
            bytes(wrapped),
            len(deltaspaces),
        )
    ]
    for deltaspace in deltaspaces:
        names = deltaspace.bucket.encode(), deltaspace.prefix.encode()
        parts += [_LENGTHS.pack(*map(len, names)), *names]
    return b"".join(parts)


def _unpack(plain: bytes, mac: bytes) -> DiskHeader:
    digest, size, created, expires, uid, generation, nonce, wrapped, count = _FIXED.unpack_from(
        plain
    )
    offset = _FIXED.size
    deltaspaces = []
    for _ in range(min(count, MAX_DELTASPACES)):
        lengths = _LENGTHS.unpack_from(plain, offset)
        offset += _LENGTHS.size
        names = []
        for length in lengths:
            names.append(plain[offset : offset + length].decode())
            offset += length
        deltaspaces.append(Deltaspace(*names))
    return DiskHeader(
        frame=Frame(size, created, expires),
        sha256=Sha256(digest.hex()),
        uid=uid,
        generation=generation,
        deltaspaces=tuple(deltaspaces),
        mac=mac,
        wrap_nonce=nonce,
        wrapped_key=wrapped,
    )
