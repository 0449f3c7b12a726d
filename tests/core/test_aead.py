"""A sealed blob opens to the bytes that were sealed, at every boundary, in every cryptography."""

import struct

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from dgcache_core import aead
from dgcache_core.aead import BODY_OFFSET, CHUNK_BYTES, HEADER_BYTES, TAG_BYTES, Frame

from .sealing import BOTH, KEY, frame_of, opened, sealed, use
from .support import DETERMINISTIC, content, digest_of

BOUNDARIES = [
    0,
    1,
    15,
    16,
    17,
    CHUNK_BYTES - 1,
    CHUNK_BYTES,
    CHUNK_BYTES + 1,
    2 * CHUNK_BYTES - 1,
    2 * CHUNK_BYTES,
    2 * CHUNK_BYTES + 1,
    7 * CHUNK_BYTES + 12345,
]


@pytest.mark.parametrize("size", BOUNDARIES)
@pytest.mark.parametrize("sealer", BOTH)
@pytest.mark.parametrize("opener", BOTH)
def test_a_blob_opens_to_what_was_sealed_whichever_cryptography_did_either(
    monkeypatch: pytest.MonkeyPatch, sealer: str, opener: str, size: int
) -> None:
    """DeltaGlider's environment has cryptography 44 and the daemon's 50: both read both."""
    use(monkeypatch, sealer, opener)
    data = content(size)
    assert opened(sealed(data)) == (frame_of(data), digest_of(data), data)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES + 1])
@pytest.mark.parametrize("sealer", BOTH)
def test_the_implementations_seal_to_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, sealer: str, size: int
) -> None:
    """A blob is what the documented layout says: AES-256-GCM with these nonces and this data."""
    use(monkeypatch, sealer, sealer)
    data, frame = content(size), Frame(size, 3, 4)
    packed = struct.pack(">4sHHIQQQ", b"DGCB", 1, 1, CHUNK_BYTES, size, 3, 4)
    header = packed + bytes.fromhex(digest_of(data))
    gcm, expected = AESGCM(KEY), bytearray(header)
    expected += gcm.encrypt(bytes(11) + b"\x02", b"", header)
    pieces = [data[at : at + CHUNK_BYTES] for at in range(0, size, CHUNK_BYTES)] or [b""]
    for index, piece in enumerate(pieces):
        last = index == len(pieces) - 1
        expected += gcm.encrypt(index.to_bytes(11, "big") + bytes([last]), piece, packed)
    assert sealed(data, frame=frame) == expected


def test_what_is_installed_is_used() -> None:
    """The calls that write into a given buffer are used where they exist, else their elders."""
    kind = "oneshot" if hasattr(AESGCM, "decrypt_into") else "streaming"
    assert aead._encrypt_into is getattr(aead, f"_encrypt_{kind}")
    assert aead._decrypt_into is getattr(aead, f"_decrypt_{kind}")


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, 3 * CHUNK_BYTES + 5])
def test_no_plaintext_stands_in_a_blob(size: int) -> None:
    """Not one run of 16 bytes of a reference is found in its blob; one byte differs in it."""
    data = content(size)
    blob = sealed(data)
    if size == 1:
        assert blob[BODY_OFFSET : BODY_OFFSET + 1] != data
    assert all(data[at : at + 16] not in blob for at in range(0, size - 16, 65_521))


@DETERMINISTIC
@given(st.integers(0, 1 << 40))
def test_the_spans_of_the_chunks_tile_both_sides(size: int) -> None:
    """Chunks follow each other without gap or overlap, from the first byte to the last."""
    frame = Frame(size, 0, 0)
    first, last = frame.sealed_span(0), frame.sealed_span(frame.chunks - 1)
    assert first.start == BODY_OFFSET == HEADER_BYTES + TAG_BYTES
    assert last.stop == frame.sealed_bytes
    assert frame.plain_span(0)[0] == 0
    assert sum(frame.plain_span(frame.chunks - 1)) == size
    for index in {0, frame.chunks // 2, frame.chunks - 2} - {frame.chunks - 1, -1}:
        offset, length = frame.plain_span(index)
        assert length == CHUNK_BYTES
        assert frame.plain_span(index + 1)[0] == offset + length
        assert frame.sealed_span(index).stop == frame.sealed_span(index + 1).start


def test_stored_bytes_cost_at_most_three_percent_more() -> None:
    """From 4 KiB on, header and tags take less than 3 % of the size."""
    assert all(Frame(size, 0, 0).sealed_bytes <= 1.03 * size for size in (4096, 1 << 20, 500 << 20))


def test_no_nonce_is_used_twice_under_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """All chunks and the seal of a blob have nonces of their own, of 12 bytes."""
    nonces: list[bytes] = []
    encrypt = aead._encrypt_into

    def counted(
        key: memoryview, nonce: bytes, plain: memoryview, associated: bytes, out: memoryview
    ) -> None:
        nonces.append(nonce)
        encrypt(key, nonce, plain, associated, out)

    monkeypatch.setattr(aead, "_encrypt_into", counted)
    sealed(content(5 * CHUNK_BYTES + 1))
    sealed_once = len(nonces)
    assert sealed_once == 6 + 1
    assert len(set(nonces)) == sealed_once
    assert {len(nonce) for nonce in nonces} == {12}


@DETERMINISTIC
@given(st.integers(0, 1 << 42), st.data())
def test_nonces_differ_in_blobs_of_any_size(size: int, data: st.DataObject) -> None:
    """Two chunks of one blob, and a chunk and the seal, never have the same nonce."""
    frame = Frame(size, 0, 0)
    one = data.draw(st.integers(0, frame.chunks - 1))
    other = data.draw(st.integers(0, frame.chunks - 1))
    assert (aead._chunk_nonce(frame, one) == aead._chunk_nonce(frame, other)) == (one == other)
    assert aead._chunk_nonce(frame, one) != aead._SEAL_NONCE
