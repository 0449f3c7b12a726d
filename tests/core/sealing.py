"""Sealed blobs without a store: sealed and opened chunk by chunk, by a chosen implementation."""

import pytest

from dgcache_core import aead
from dgcache_core.aead import Frame
from dgcache_core.references import Sha256

from .support import digest_of

KEY = bytes(range(1, 33))
OTHER_KEY = bytes(range(101, 133))
NO_KEY = bytes(32)

BOTH = [
    pytest.param(
        "oneshot",
        marks=pytest.mark.skipif(not aead._HAS_ONESHOT, reason="needs cryptography 47 or newer"),
    ),
    "streaming",
]


def use(monkeypatch: pytest.MonkeyPatch, sealer: str, opener: str) -> None:
    """Let one implementation seal and one open, whichever is installed."""
    monkeypatch.setattr(aead, "_encrypt_into", getattr(aead, f"_encrypt_{sealer}"))
    monkeypatch.setattr(aead, "_decrypt_into", getattr(aead, f"_decrypt_{opener}"))


def frame_of(data: bytes, created: int = 1, expires: int = 2) -> Frame:
    """Return the frame of some bytes."""
    return Frame(len(data), created, expires)


def sealed(data: bytes, key: bytes = KEY, frame: Frame | None = None) -> bytearray:
    """Return the whole blob of some bytes."""
    frame = frame or frame_of(data)
    blob = bytearray(frame.sealed_bytes)
    for index in range(frame.chunks):
        offset, length = frame.plain_span(index)
        plain = memoryview(data)[offset : offset + length]
        aead.seal_chunk(memoryview(key), frame, index, plain, memoryview(blob))
    aead.seal_header(memoryview(key), frame, digest_of(data), memoryview(blob))
    return blob


def opened(blob: bytes | bytearray, key: bytes = KEY) -> tuple[Frame, Sha256, bytes]:
    """Return what a blob vouches for and its plaintext, as a store opens it."""
    frame, digest = aead.open_header(memoryview(key), memoryview(blob))
    plain = bytearray(frame.size)
    for index in range(frame.chunks):
        offset, length = frame.plain_span(index)
        into = memoryview(plain)[offset : offset + length]
        aead.open_chunk(memoryview(key), frame, index, memoryview(blob), into)
    return frame, digest, bytes(plain)
