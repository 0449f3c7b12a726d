"""The tier's keys are HKDF-SHA256, one for each purpose and generation, and stay in the slab."""

import hmac
import os
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from dgcache_core.disk_names import is_entry_name
from dgcache_core.errors import CacheFullError, SettingsError
from dgcache_core.keyslab import KeySlab
from dgcache_core.tier_keys import SALT_BYTES, Generation, RootKey, TierKeys, derive_into

from .support import DETERMINISTIC, digest_of, run_python
from .tier import OTHER_TIER_KEY, TIER_KEY

FIRST = Generation(1, bytes(SALT_BYTES))
DIGESTS = [digest_of(str(number).encode()) for number in range(50)]


@pytest.fixture
def slab() -> Iterator[KeySlab]:
    """A slab with room for some generations."""
    made = KeySlab(32, may_fork=True)
    yield made
    made.close()


def keys_of(slab: KeySlab, key: bytes = TIER_KEY, generation: Generation = FIRST) -> TierKeys:
    """Derive the keys of a generation; the root goes again."""
    root = RootKey(slab, key)
    try:
        return root.derive(generation)
    finally:
        root.erase()


def secrets_of(keys: TierKeys) -> list[bytes]:
    """Return every secret key of a generation."""
    return [bytes(slot.view) for slot in keys._slots]


@pytest.mark.parametrize(
    ("key", "salt", "info", "begins"),
    [
        (  # RFC 5869, A.1
            b"\x0b" * 22,
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf",
        ),
        (  # A.2
            bytes(range(0x50)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c",
        ),
        (  # A.3: no salt is as many zeros as the hash has bytes
            b"\x0b" * 22,
            bytes(32),
            b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d",
        ),
    ],
)
def test_derivation_is_hkdf(key: bytes, salt: bytes, info: bytes, begins: str) -> None:
    """The first block of each SHA-256 vector of RFC 5869 comes out."""
    out = bytearray(32)
    derive_into(memoryview(out), memoryview(key), salt, info)
    assert out.hex() == begins


@DETERMINISTIC
@given(st.binary(min_size=32, max_size=32), st.binary(min_size=1, max_size=80), st.binary())
def test_derivation_is_what_another_implementation_says(
    key: bytes, salt: bytes, info: bytes
) -> None:
    """cryptography's HKDF gives the same 32 bytes."""
    out = bytearray(32)
    derive_into(memoryview(out), memoryview(key), salt, info)
    assert bytes(out) == HKDF(SHA256(), 32, salt, info).derive(key)


def test_every_purpose_generation_and_key_has_keys_of_its_own(slab: KeySlab) -> None:
    """Four keys, two generations by counter, two by salt, two root keys: all different."""
    generations = [FIRST, Generation(2, FIRST.salt), Generation(1, b"\x01" * SALT_BYTES)]
    seen = []
    for key in (TIER_KEY, OTHER_TIER_KEY):
        for generation in generations:
            keys = keys_of(slab, key, generation)
            seen += secrets_of(keys)
            keys.erase()
    assert len(set(seen)) == len(seen) == 24
    assert TIER_KEY not in seen


def test_the_same_key_and_generation_give_the_same_keys(slab: KeySlab) -> None:
    """Otherwise nothing would be found again after a restart."""
    one, other = keys_of(slab), keys_of(slab)
    assert secrets_of(one) == secrets_of(other)
    assert (one.key_id, one.generation_id) == (other.key_id, other.generation_id)
    assert [one.file_name(d) for d in DIGESTS] == [other.file_name(d) for d in DIGESTS]


def test_a_file_name_tells_nothing_of_the_digest(slab: KeySlab) -> None:
    """Names are keyed hashes: another key or generation has other names, none is a digest."""
    every = [
        keys_of(slab),
        keys_of(slab, OTHER_TIER_KEY),
        keys_of(slab, TIER_KEY, Generation(2, FIRST.salt)),
    ]
    names = {keys.file_name(digest) for keys in every for digest in DIGESTS}
    assert len(names) == 3 * len(DIGESTS)
    assert all(map(is_entry_name, names))
    assert not {name.replace("/", "") for name in names} & set(DIGESTS)


def test_an_ephemeral_key_is_another_each_time(slab: KeySlab) -> None:
    """No key is given: a random one is made, and said to be ephemeral."""
    roots = [RootKey(slab, None) for _ in range(5)]
    assert len({root.key_id for root in roots}) == 5
    assert all(root.is_ephemeral for root in roots)
    assert not RootKey(slab, TIER_KEY).is_ephemeral


@pytest.mark.parametrize("length", [0, 1, 31, 33, 64])
def test_a_key_of_another_length_is_refused(slab: KeySlab, length: int) -> None:
    """32 bytes, no more and no less."""
    with pytest.raises(SettingsError, match="32 bytes"):
        RootKey(slab, bytes(length))


def test_a_slab_without_room_gives_its_slots_back() -> None:
    """Half a generation is none: what was derived is erased again."""
    with_room_for_three = KeySlab(3, may_fork=True)
    root = RootKey(with_room_for_three, TIER_KEY)
    with pytest.raises(CacheFullError):
        root.derive(FIRST)
    slots = [with_room_for_three.new_key() for _ in range(2)]
    assert len(slots) == 2
    with_room_for_three.close()


def test_no_repr_shows_a_secret(slab: KeySlab) -> None:
    """Key ids only."""
    keys = keys_of(slab)
    shown = repr(keys) + repr(RootKey(slab, TIER_KEY))
    for secret in [TIER_KEY, *secrets_of(keys)]:
        assert secret.hex() not in shown


def test_what_a_derivation_leaves_in_ordinary_memory_is_zeroed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The very objects that held a secret hold zeros afterwards."""
    made: list[bytes] = []
    real_digest = hmac.digest

    def digest(*arguments: bytes) -> bytes:
        made.append(real_digest(*arguments))
        return made[-1]

    monkeypatch.setattr(hmac, "digest", digest)
    out = bytearray(32)
    derive_into(memoryview(out), memoryview(TIER_KEY), b"salt", b"info")
    assert made == [bytes(32), bytes(32)]
    assert any(out)


@pytest.mark.skipif(os.geteuid() != 0, reason="reads the process's memory from outside")
def test_derived_keys_are_in_the_slab_only() -> None:
    """The process's whole memory is searched from outside: each key is there once."""
    program = """
import gc, os, subprocess, sys
from dgcache_core.keyslab import KeySlab
from dgcache_core.tier_keys import Generation, RootKey
slab = KeySlab(32, may_fork=True)
root = RootKey(slab, None)
keys = [root.derive(Generation(n, os.urandom(32))) for n in range(1, 4)]
for key in keys:
    key.file_name("ab" * 32), key.sign(b"data")
gc.collect()
slots = [slot for key in keys for slot in key._slots]
# masked, so that what is printed is not found by the search
print(os.getpid(), *(bytes(byte ^ 0x5A for byte in slot.view).hex() for slot in slots))
sys.stdout.flush()
os.kill(os.getpid(), 19)  # SIGSTOP: the searcher continues or kills us
"""
    searcher = """
import os, re, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
pid, *masked = child.stdout.readline().split()
os.waitpid(child.pid, os.WUNTRACED)
secrets = [bytes(b ^ 0x5A for b in bytes.fromhex(text)) for text in masked]
found = dict.fromkeys(secrets, 0)
with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
    for line in maps:
        low, high, mode = re.match(r"(\\w+)-(\\w+) (\\S+)", line).groups()
        if mode[:2] != "rw":
            continue
        memory.seek(int(low, 16))
        try:
            data = memory.read(int(high, 16) - int(low, 16))
        except OSError:
            continue
        for secret in secrets:
            found[secret] += data.count(secret)
child.kill()
child.wait()
child.stdout.close()
print(len(found), *found.values())
"""
    count, *times = map(int, run_python(searcher, program).split())
    assert count == 12
    assert times == [1] * 12
