"""The keys of the disk tier: all derived from one 32-byte key, all in locked memory.

`RootKey` holds the tier's own key, given by the user or random. From it and a *generation* (a
random salt and a counter) come the keys that files are written with, by HKDF-SHA256 (RFC 5869): one
for each purpose. A new generation makes everything written before unreadable, also by those who
keep the old files, as long as they do not keep the old generation as well.

What a derivation leaves in ordinary memory is zeroed at once.
"""

import ctypes
import hmac
from dataclasses import dataclass

from dgcache_core.errors import SettingsError
from dgcache_core.keyslab import KEY_BYTES, KeySlab, KeySlot
from dgcache_core.references import Sha256

ID_BYTES = 8
MAC_BYTES = 32
SALT_BYTES = 32
NAME_DIGITS = 64

_CONTEXT = b"dg-cached disk tier v2"


@dataclass(frozen=True, slots=True)
class Generation:
    """Which life of the tier's content keys belong to."""

    counter: int
    salt: bytes


class RootKey:
    """The tier's own 32-byte key, in a slot of a slab. Thread-safe."""

    def __init__(self, slab: KeySlab, key: memoryview | bytes | None) -> None:
        """Copy the key into the slab; None makes a random one, which dies with this object.

        Raises:
            SettingsError: the key does not have 32 bytes.
            CacheFullError: the slab has no slot left.
        """
        if key is not None and len(key) != KEY_BYTES:
            raise SettingsError(f"the disk tier's key must have {KEY_BYTES} bytes, not {len(key)}")
        self.is_ephemeral = key is None
        self._slab = slab
        self._slot = slab.new_key()
        if key is not None:
            self._slot.view[:] = key
        self.key_id = _public_id(self._slot.view, b"key id", b"")

    def sign_generation(self, packed: bytes) -> bytes:
        """Return the HMAC-SHA256 that a generation is kept with."""
        signing = self._slab.new_key()
        try:
            derive_into(signing.view, self._slot.view, _CONTEXT, b"generation file")
            return hmac.digest(signing.view, packed, "sha256")
        finally:
            signing.erase()

    def derive(self, generation: Generation) -> "TierKeys":
        """Return the keys of a generation.

        Raises:
            CacheFullError: the slab has no slots left.
        """
        return TierKeys(self._slab, self._slot.view, self.key_id, generation)

    def erase(self) -> None:
        """Zero the key."""
        self._slot.erase()

    def __repr__(self) -> str:
        return f"<RootKey {self.key_id.hex()}{' ephemeral' if self.is_ephemeral else ''}>"


class TierKeys:
    """The keys of one generation. Thread-safe; nobody may use them after `erase`.

    `header_encryption`, `header_mac` and `key_wrapping` are views of the slab; `key_id` and
    `generation_id` are no secrets and name the keys in a file's clear prefix.
    """

    def __init__(
        self, slab: KeySlab, root: memoryview, key_id: bytes, generation: Generation
    ) -> None:
        self.generation = generation
        self.key_id = key_id
        self.generation_id = _public_id(root, b"generation id", _salt(generation))
        self._slots: list[KeySlot] = []
        self.header_encryption = self._derive(slab, root, b"header encryption")
        self.header_mac = self._derive(slab, root, b"header mac")
        self.key_wrapping = self._derive(slab, root, b"key wrapping")
        self._names = self._derive(slab, root, b"file names")

    def file_name(self, sha256: Sha256) -> str:
        """Return `ab/cd/<60 digits>`: a keyed hash of the digest, on two directory levels."""
        digits = hmac.digest(self._names, bytes.fromhex(sha256), "sha256").hex()
        return f"{digits[:2]}/{digits[2:4]}/{digits[4:]}"

    def sign(self, data: bytes) -> bytes:
        """Return the HMAC-SHA256 of a header."""
        return hmac.digest(self.header_mac, data, "sha256")

    def erase(self) -> None:
        """Zero every key of this generation."""
        for slot in self._slots:
            slot.erase()

    def _derive(self, slab: KeySlab, root: memoryview, purpose: bytes) -> memoryview:
        try:
            slot = slab.new_key()
        except BaseException:
            self.erase()
            raise
        self._slots.append(slot)
        derive_into(slot.view, root, _salt(self.generation), _CONTEXT + b" " + purpose)
        return slot.view

    def __repr__(self) -> str:
        return f"<TierKeys {self.key_id.hex()} generation {self.generation.counter}>"


def derive_into(out: memoryview, key: memoryview, salt: bytes, info: bytes) -> None:
    """HKDF-SHA256 (RFC 5869) for an output of one block: 32 bytes, written into `out`."""
    extracted = hmac.digest(salt, key, "sha256")
    expanded = hmac.digest(extracted, info + b"\x01", "sha256")
    out[:] = expanded
    _wipe(extracted)
    _wipe(expanded)


def _salt(generation: Generation) -> bytes:
    return generation.salt + generation.counter.to_bytes(8, "big")


def _public_id(root: memoryview, purpose: bytes, salt: bytes) -> bytes:
    out = bytearray(KEY_BYTES)
    derive_into(memoryview(out), root, salt or _CONTEXT, _CONTEXT + b" " + purpose)
    return bytes(out[:ID_BYTES])


def _wipe(secret: bytes) -> None:
    """Zero a `bytes` that only this module has: hmac returns nothing else.

    The content of a `bytes` ends one byte, a NUL, before the object does (CPython, bytesobject.h).
    """
    ctypes.memset(id(secret) + bytes.__basicsize__ - 1, 0, len(secret))
