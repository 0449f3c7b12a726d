"""A header is judged before it is read, and says nothing to whoever lacks the key."""

import contextlib
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgcache_core.aead import TAG_BYTES, Frame, seal_bytes
from dgcache_core.disk_format import (
    MAX_DELTASPACES,
    MAX_HEADER_BYTES,
    MIN_HEADER_BYTES,
    PREFIX_BYTES,
    DiskHeader,
    Origin,
    open_disk_header,
    read_prefix,
    seal_disk_header,
)
from dgcache_core.errors import CacheCorruptionError
from dgcache_core.keyslab import KeySlab
from dgcache_core.references import MAX_BUCKET_BYTES, MAX_PREFIX_BYTES, Deltaspace
from dgcache_core.tier_keys import MAC_BYTES, SALT_BYTES, Generation, RootKey, TierKeys

from .support import DETERMINISTIC, NIGHTLY, RELEASES, digest_of, flip
from .tier import OTHER_TIER_KEY, TIER_KEY

SLAB = KeySlab(64, may_fork=True)
BLOB_KEY = bytes(range(77, 109))
FRAME = Frame(123_456, 1_800_000_000, 1_800_086_400)
DIGEST = digest_of(b"a reference")


def keys_of(key: bytes = TIER_KEY, counter: int = 1, salt: bytes = bytes(SALT_BYTES)) -> TierKeys:
    """Derive the keys of a generation."""
    return RootKey(SLAB, key).derive(Generation(counter, salt))


KEYS, OTHER_KEYS, LATER_KEYS = keys_of(), keys_of(OTHER_TIER_KEY), keys_of(counter=2)


def header_of(
    deltaspaces: tuple[Deltaspace, ...] = (RELEASES, NIGHTLY),
    keys: TierKeys = KEYS,
    *,
    ephemeral: bool = False,
) -> bytes:
    """Seal a header."""
    key = memoryview(BLOB_KEY)
    return seal_disk_header(keys, FRAME, DIGEST, key, deltaspaces, ephemeral=ephemeral)


def unwrapped(header: DiskHeader, keys: TierKeys = KEYS) -> bytes:
    """Return the blob's key."""
    out = bytearray(32)
    header.unwrap_into(keys, memoryview(out))
    return bytes(out)


def test_a_header_comes_back_whole() -> None:
    """Frame, digest, owner, generation, deltaspaces, and the blob's key."""
    header = open_disk_header(KEYS, header_of())
    assert (header.frame, header.sha256) == (FRAME, DIGEST)
    assert (header.uid, header.generation) == (os.geteuid(), 1)
    assert header.deltaspaces == (RELEASES, NIGHTLY)
    assert unwrapped(header) == BLOB_KEY
    assert read_prefix(header_of(), KEYS).origin is Origin.OURS


@pytest.mark.parametrize("position", range(MIN_HEADER_BYTES))
def test_a_change_in_any_byte_of_a_header_is_detected(position: int) -> None:
    """Prefix, encrypted part and MAC: there is no byte whose change passes."""
    header = bytearray(header_of())
    assert len(header) == MIN_HEADER_BYTES
    flip(header, position, 0x81)
    with pytest.raises(CacheCorruptionError):
        open_disk_header(KEYS, bytes(header))


def test_the_signature_is_judged_before_anything_is_decrypted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a wrong MAC no cipher is ever called."""
    calls: list[object] = []
    monkeypatch.setattr("dgcache_core.disk_format.open_bytes", lambda *args: calls.append(args))
    header = bytearray(header_of())
    flip(header, len(header) - 1)
    with pytest.raises(CacheCorruptionError, match="signature"):
        open_disk_header(KEYS, bytes(header))
    assert not calls


@pytest.mark.parametrize("keys", [OTHER_KEYS, LATER_KEYS], ids=["other key", "later generation"])
def test_other_keys_open_nothing(keys: TierKeys) -> None:
    """Neither another key nor another generation of the same key."""
    with pytest.raises(CacheCorruptionError):
        open_disk_header(keys, header_of())


def test_a_wrapped_key_fits_its_own_header_only() -> None:
    """Moved to the header of another digest, or under other keys, it does not open."""
    header = open_disk_header(KEYS, header_of())
    moved = DiskHeader(
        **{name: getattr(header, name) for name in DiskHeader.__slots__}
        | {"sha256": digest_of(b"another")}
    )
    for bad, keys in ((moved, KEYS), (header, OTHER_KEYS), (header, LATER_KEYS)):
        with pytest.raises(CacheCorruptionError):
            unwrapped(bad, keys)


def test_no_two_headers_share_a_byte_of_ciphertext_by_more_than_chance() -> None:
    """A fresh nonce each time: the same entry written twice looks unrelated."""
    one, other = header_of()[PREFIX_BYTES:], header_of()[PREFIX_BYTES:]
    same = sum(a == b for a, b in zip(one, other, strict=True))
    assert same < 40  # 4 are expected of 1000


@pytest.mark.parametrize(
    ("deltaspaces", "header_bytes"),
    [
        ((), 1 << 10),
        ((RELEASES,), 1 << 10),
        ((Deltaspace("b", ""), NIGHTLY, RELEASES), 1 << 10),
        ((Deltaspace("b" * MAX_BUCKET_BYTES, "p" * MAX_PREFIX_BYTES),), 1 << 11),
        (tuple(Deltaspace("b", str(number)) for number in range(40)), 1 << 10),
        (
            tuple(
                Deltaspace("b" * MAX_BUCKET_BYTES, f"{number:0>{MAX_PREFIX_BYTES}}")
                for number in range(40)
            ),
            1 << 16,
        ),
    ],
    ids=["none", "one", "three", "longest", "too many", "too many of the longest"],
)
def test_a_header_has_one_of_a_few_lengths(
    deltaspaces: tuple[Deltaspace, ...], header_bytes: int
) -> None:
    """Names are padded to a power of two; the first 32 deltaspaces come back."""
    header = header_of(deltaspaces)
    assert len(header) == header_bytes <= MAX_HEADER_BYTES
    assert open_disk_header(KEYS, header).deltaspaces == deltaspaces[:MAX_DELTASPACES]


@pytest.mark.parametrize(
    ("keys", "ephemeral", "origin"),
    [
        (OTHER_KEYS, False, Origin.OTHER_KEY),
        (OTHER_KEYS, True, Origin.PAST),
        (LATER_KEYS, False, Origin.PAST),
        (LATER_KEYS, True, Origin.PAST),
        (KEYS, True, Origin.OURS),
    ],
)
def test_the_prefix_tells_whose_a_file_is(keys: TierKeys, ephemeral: bool, origin: Origin) -> None:
    """An ephemeral key of another process and an earlier generation can never come back."""
    assert read_prefix(header_of(keys=keys, ephemeral=ephemeral), KEYS).origin is origin


@pytest.mark.parametrize(
    ("offset", "value"), [(0, b"DGCB"), (4, b"\0\x01"), (4, b"\0\x03"), (4, b"\xff\xff")]
)
def test_another_format_is_foreign(offset: int, value: bytes) -> None:
    """Another magic, an earlier and a future version are not ours to judge."""
    header = bytearray(header_of())
    header[offset : offset + len(value)] = value
    assert read_prefix(bytes(header), KEYS).origin is Origin.FOREIGN


@pytest.mark.parametrize("length", [0, 1, MIN_HEADER_BYTES - 1, MAX_HEADER_BYTES + 1, 2**32 - 1])
def test_an_impossible_header_length_is_refused_before_it_is_read(length: int) -> None:
    """Nobody allocates what an unsigned number says."""
    header = bytearray(header_of())
    struct.pack_into(">I", header, 8, length)
    with pytest.raises(CacheCorruptionError, match="cannot be"):
        read_prefix(bytes(header), KEYS)


@pytest.mark.parametrize("length", [0, 4, PREFIX_BYTES - 1])
def test_a_cut_off_prefix_is_refused(length: int) -> None:
    """Empty, and ours by its magic but too short."""
    with pytest.raises(CacheCorruptionError):
        read_prefix(header_of()[:length], KEYS)


@DETERMINISTIC
@given(st.binary(max_size=2 * MIN_HEADER_BYTES))
def test_bytes_that_are_no_header_are_refused(junk: bytes) -> None:
    """Whatever bytes there are: a verdict or CacheCorruptionError, never another error."""
    with contextlib.suppress(CacheCorruptionError):
        assert read_prefix(junk, KEYS).origin is Origin.FOREIGN
    with pytest.raises(CacheCorruptionError):
        open_disk_header(KEYS, junk)


@DETERMINISTIC
@given(st.binary(min_size=200, max_size=2000))
def test_what_is_signed_and_not_of_this_format_is_refused(plain: bytes) -> None:
    """Only a bug of ours could sign it; it is still no other error."""
    prefix = header_of()[:PREFIX_BYTES]
    sealed = bytearray(len(plain) + TAG_BYTES)
    nonce = prefix[-12:]
    seal_bytes(KEYS.header_encryption, nonce, memoryview(plain), prefix, memoryview(sealed))
    signed = prefix + sealed
    try:
        header = open_disk_header(KEYS, signed + KEYS.sign(signed))
    except CacheCorruptionError:
        return
    with pytest.raises(CacheCorruptionError):
        unwrapped(header)


def test_nothing_of_the_entry_is_in_clear() -> None:
    """Digest, names, the blob's key, and even the size are not to be found."""
    header = header_of()
    for secret in (
        bytes.fromhex(DIGEST),
        BLOB_KEY,
        b"bucket",
        b"releases",
        struct.pack(">Q", FRAME.size),
        struct.pack(">Q", FRAME.created_seconds),
    ):
        assert secret not in header
    assert header[-MAC_BYTES:] == KEYS.sign(header[:-MAC_BYTES])
    assert BLOB_KEY.hex() not in repr(open_disk_header(KEYS, header))


@pytest.fixture(autouse=True, scope="module")
def _close_the_slab() -> Iterator[None]:
    yield
    SLAB.close()
