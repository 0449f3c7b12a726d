"""Whatever is done to a blob, it is refused before a byte of it is handed out."""

import struct
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dgcache_core import aead
from dgcache_core.aead import (
    BODY_OFFSET,
    CHUNK_BYTES,
    HEADER_BYTES,
    TAG_BYTES,
    Frame,
    open_chunk,
    open_header,
    seal_header,
)
from dgcache_core.errors import CacheCorruptionError

from .sealing import BOTH, KEY, NO_KEY, OTHER_KEY, frame_of, opened, sealed, use
from .support import DETERMINISTIC, content, digest_of, flip

SEALED_CHUNK = CHUNK_BYTES + TAG_BYTES
THREE = content(2 * CHUNK_BYTES + 100)  # two whole chunks and a short one
BLOB = bytes(sealed(THREE))


@pytest.fixture(params=BOTH, autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every claim here holds for both implementations."""
    use(monkeypatch, request.param, request.param)


def refuse(blob: bytes | bytearray, key: bytes = KEY) -> None:
    """Assert that opening the blob fails its check."""
    with pytest.raises(CacheCorruptionError):
        opened(blob, key)


def chunk(index: int) -> slice:
    """Return where a chunk of BLOB and its tag stand."""
    return frame_of(THREE).sealed_span(index)


@pytest.mark.parametrize("position", range(BODY_OFFSET))
def test_a_change_in_any_byte_of_header_or_seal_is_detected(position: int) -> None:
    """Each byte of magic, version, algorithm, sizes, times, digest and seal is vouched for."""
    blob = bytearray(sealed(b"content"))
    flip(blob, position, 0xFF)
    with pytest.raises(CacheCorruptionError):
        open_header(memoryview(KEY), memoryview(blob))


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("where", ["first byte", "middle", "last byte", "first of tag", "tag end"])
def test_a_change_in_any_region_of_a_chunk_is_detected(index: int, where: str) -> None:
    """Each chunk is checked at both ends of its body and of its tag; the others still open."""
    span = chunk(index)
    body_end = span.stop - TAG_BYTES
    position = {
        "first byte": span.start,
        "middle": (span.start + body_end) // 2,
        "last byte": body_end - 1,
        "first of tag": body_end,
        "tag end": span.stop - 1,
    }[where]
    blob = bytearray(BLOB)
    flip(blob, position)
    frame, _ = open_header(memoryview(KEY), memoryview(blob))
    for other in range(3):
        plain = memoryview(bytearray(frame.plain_span(other)[1]))
        if other == index:
            with pytest.raises(CacheCorruptionError, match=f"chunk {index} of 3"):
                open_chunk(memoryview(KEY), frame, other, memoryview(blob), plain)
        else:
            open_chunk(memoryview(KEY), frame, other, memoryview(blob), plain)


SMALL = bytes(sealed(b"a small reference"))


@DETERMINISTIC
@given(st.integers(0, 8 * len(SMALL) - 1))
@example(0)
@example(8 * len(SMALL) - 1)
def test_a_flipped_bit_anywhere_is_detected(bit: int) -> None:
    """There is no bit of a blob whose flip goes unnoticed."""
    blob = bytearray(SMALL)
    flip(blob, bit // 8, 1 << bit % 8)
    refuse(blob)


@DETERMINISTIC
@given(st.binary(max_size=2 * len(SMALL)))
def test_bytes_that_are_no_blob_are_refused(junk: bytes) -> None:
    """Whatever bytes stand where a blob should be: CacheCorruptionError, never another error."""
    refuse(junk)


CHANGES: dict[str, Callable[[], bytes]] = {
    "the first two chunks swapped": lambda: (
        BLOB[:BODY_OFFSET] + BLOB[chunk(1)] + BLOB[chunk(0)] + BLOB[chunk(2)]
    ),
    "a chunk repeated": lambda: (
        BLOB[:BODY_OFFSET] + BLOB[chunk(0)] + BLOB[chunk(0)] + BLOB[chunk(2)]
    ),
    "cut at a chunk's boundary": lambda: BLOB[: chunk(1).stop],
    "cut behind the header": lambda: BLOB[:BODY_OFFSET],
    "cut inside a chunk": lambda: BLOB[:-1],
    "cut inside the seal": lambda: BLOB[: BODY_OFFSET - 1],
    "empty": lambda: b"",
    "a byte longer": lambda: BLOB + b"\0",
    "a chunk longer": lambda: BLOB + BLOB[chunk(2)],
    "all zeros": lambda: bytes(len(BLOB)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_chunks_cannot_be_moved_dropped_repeated_or_added(change: str) -> None:
    """The place of each chunk and the number of chunks are part of what is checked."""
    refuse(CHANGES[change]())


def test_a_blob_cut_at_a_boundary_does_not_pass_for_a_shorter_one() -> None:
    """Even with a header of the shorter size the chunk before the cut is not a last chunk."""
    shorter = bytearray(BLOB[: chunk(1).stop])
    frame = Frame(2 * CHUNK_BYTES, 1, 2)
    seal_header(memoryview(KEY), frame, digest_of(THREE[: frame.size]), memoryview(shorter))
    refuse(shorter)


def test_a_chunk_marked_last_is_nowhere_else() -> None:
    """The last chunk of a blob does not open as an inner chunk of a longer one."""
    data = content(CHUNK_BYTES)
    one, two = frame_of(data), Frame(2 * CHUNK_BYTES, 1, 2)
    blob = bytearray(two.sealed_bytes)
    blob[BODY_OFFSET : BODY_OFFSET + SEALED_CHUNK] = sealed(data, frame=one)[one.sealed_span(0)]
    plain = memoryview(bytearray(CHUNK_BYTES))
    with pytest.raises(CacheCorruptionError):
        open_chunk(memoryview(KEY), two, 0, memoryview(blob), plain)


@pytest.mark.parametrize("index", range(3))
def test_a_chunk_of_another_entry_is_refused(index: int) -> None:
    """Another entry has another key: its chunk fails in the same place of the same size."""
    other = sealed(content(len(THREE), seed=1), OTHER_KEY)
    blob = bytearray(BLOB)
    blob[chunk(index)] = other[chunk(index)]
    refuse(blob)


@pytest.mark.parametrize("index", range(3))
def test_a_chunk_under_another_frame_is_refused(index: int) -> None:
    """Were a key used twice, a chunk sealed at another time would still not fit this header."""
    other = sealed(THREE, frame=frame_of(THREE, created=7))
    blob = bytearray(BLOB)
    blob[chunk(index)] = other[chunk(index)]
    refuse(blob)


@pytest.mark.parametrize("key", [KEY, OTHER_KEY], ids=["same key", "another key"])
def test_a_header_of_another_entry_is_refused(key: bytes) -> None:
    """A whole header with its seal does not vouch for chunks that were not sealed with it."""
    other = sealed(content(len(THREE), seed=1), key, frame_of(THREE, expires=9))
    refuse(bytes(other[:BODY_OFFSET]) + BLOB[BODY_OFFSET:])


def test_a_digest_of_another_entry_is_refused() -> None:
    """The digest is sealed with the rest of the header, though chunks do not know it."""
    other = bytes.fromhex(digest_of(b"another"))
    refuse(BLOB[: HEADER_BYTES - 32] + other + BLOB[HEADER_BYTES:])


@pytest.mark.parametrize(
    ("field", "value"),
    [("magic", b"DGCA"), ("version", 0), ("version", 2), ("algorithm", 0), ("chunk", 1 << 16)],
)
@pytest.mark.parametrize("resealed", [False, True])
def test_another_format_is_refused_even_under_the_right_key(
    field: str, value: object, resealed: bool
) -> None:
    """A version downgrade fails the seal; sealed anew with the key it is still not our format."""
    data = b"content"
    values = {"magic": b"DGCB", "version": 1, "algorithm": 1, "chunk": CHUNK_BYTES} | {field: value}
    header = struct.pack(">4sHHIQQQ", *values.values(), len(data), 1, 2)
    header += bytes.fromhex(digest_of(data))
    blob = sealed(data)
    blob[:HEADER_BYTES] = header
    if resealed:
        seal = memoryview(blob)[HEADER_BYTES:BODY_OFFSET]
        aead._encrypt_into(memoryview(KEY), aead._SEAL_NONCE, memoryview(b""), header, seal)
    with pytest.raises(CacheCorruptionError, match="another format" if resealed else "header"):
        opened(blob)


@pytest.mark.parametrize("key", [NO_KEY, OTHER_KEY], ids=["erased key", "another key"])
@pytest.mark.parametrize("data", [b"", b"content", THREE], ids=len)
def test_an_erased_or_foreign_key_opens_nothing(data: bytes, key: bytes) -> None:
    """A key that was zeroed leaves a blob that nobody can open, neither header nor chunks."""
    blob, frame = sealed(data), frame_of(data)
    refuse(blob, key)
    for index in range(frame.chunks):
        plain = memoryview(bytearray(frame.plain_span(index)[1]))
        with pytest.raises(CacheCorruptionError):
            open_chunk(memoryview(key), frame, index, memoryview(blob), plain)


def test_a_failed_check_does_not_hold_on_to_the_blob() -> None:
    """Who keeps the error does not keep the blob's memory in use: its mapping can be closed."""
    blob = bytearray(BLOB)
    flip(blob, len(blob) - 1)
    frame, plain = frame_of(THREE), memoryview(bytearray(100))
    with memoryview(blob) as view:
        with pytest.raises(CacheCorruptionError) as bad_chunk:
            open_chunk(memoryview(KEY), frame, 2, view, plain)
        with pytest.raises(CacheCorruptionError) as bad_header:
            open_header(memoryview(OTHER_KEY), view)
    blob.clear()  # BufferError while any part of it lives on in a traceback
    assert bad_chunk.value is not bad_header.value
