"""Whatever bytes an entry is, reading it yields exactly what was sealed or CacheCorruptionError.

And then nothing is handed out. Chunks have 64 bytes here, so that a short input reaches every rule
about chunks. Three ways in: an honest blob edited, any header whatever under a true seal, and an
entry edited in the memory of a store and looked up there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

from dgcache_core import aead, ingest, memory_store
from dgcache_core.aead import HEADER_BYTES, Frame, open_header, seal_bytes
from dgcache_core.errors import CacheCorruptionError, MissReason
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Sha256
from tests.core.sealing import KEY, NO_KEY, OTHER_KEY, opened, sealed
from tests.core.support import RELEASES, content, digest_of, put, read_all

from .structure import Choices, edited
from .worlds import lasting, open_descriptors, require_descriptors

CHUNK = 64
SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 5 * CHUNK + 7)
SEAL_NONCE = bytes(11) + b"\2"
_MODULES: tuple[ModuleType, ...] = (aead, ingest, memory_store)


def run(data: bytes) -> None:
    """Hold the invariant for one input."""
    choices = Choices(data)
    way = choices.of((_honest_blob_edited, _any_header_under_a_true_seal, _entry_of_a_store))
    with _short_chunks():
        way(choices)


@contextmanager
def _short_chunks() -> Iterator[None]:
    """Let a chunk be short; the size of a chunk is a constant of each module that counts in it."""
    before = [vars(module)["CHUNK_BYTES"] for module in _MODULES]
    try:
        for module in _MODULES:
            vars(module)["CHUNK_BYTES"] = CHUNK
        yield
    finally:
        for module, size in zip(_MODULES, before, strict=True):
            vars(module)["CHUNK_BYTES"] = size


@cache
def _blob(size: int, key: bytes, expires: int = 2) -> bytes:
    return bytes(sealed(content(size), key, Frame(size, 1, expires)))


@cache
def _others() -> tuple[tuple[bytes, bytes], ...]:
    """Honest blobs to take pieces from: of the same key as well, which no two blobs really have."""
    frames = [(size, key) for size in SIZES[3:] for key in (KEY, OTHER_KEY)]
    return tuple((_blob(size, key, 3), key) for size, key in frames)


@cache
def _pieces() -> tuple[bytes, ...]:
    return tuple(blob for blob, _ in _others())


def _honest_blob_edited(choices: Choices) -> None:
    size, key = choices.of(SIZES), choices.of((KEY, KEY, KEY, OTHER_KEY, NO_KEY))
    honest = _blob(size, KEY)
    blob = edited(honest, choices, _pieces())
    try:
        frame, digest, plain = opened(blob, key)
    except CacheCorruptionError:
        assert (blob, key) != (honest, KEY), "an honest blob is refused"
        return
    assert (blob, key) in [(honest, KEY), *_others()], "what nobody sealed was opened"
    assert (plain, digest) == (content(frame.size), digest_of(plain))


def _any_header_under_a_true_seal(choices: Choices) -> None:
    """Nobody without the key gets here; the parser must hold all the same."""
    blob = bytearray(edited(_blob(choices.of(SIZES), KEY), choices))
    blob += bytes(max(0, HEADER_BYTES + 16 - len(blob)))
    header = bytes(blob[:HEADER_BYTES])
    with memoryview(blob) as view:
        seal = view[HEADER_BYTES : HEADER_BYTES + 16]
        seal_bytes(memoryview(KEY), SEAL_NONCE, memoryview(b""), header, seal)
        try:
            frame, digest = open_header(memoryview(KEY), view)
        except CacheCorruptionError:
            return
    assert frame.sealed_bytes == len(blob)
    assert frame.pack() + bytes.fromhex(digest) == header


@contextmanager
def _store() -> Iterator[MemoryStore]:
    store = MemoryStore(1 << 20, 86_400.0, may_fork=True, max_entries=8)
    try:
        yield store
    finally:
        store.close()


def _entry_of_a_store(choices: Choices) -> None:
    store = lasting(_store)
    store.clear()
    plain = content(choices.of(SIZES))
    digest = put(store, plain)
    blob = store._entries[digest].blob
    honest = bytes(blob)
    changed = edited(honest, choices, _pieces())[: len(honest)].ljust(len(honest), b"\0")
    blob[:] = changed
    descriptors = open_descriptors()
    try:
        handout = store.lookup(RELEASES, digest)
    except CacheCorruptionError:
        assert changed != honest, "an honest entry is refused"
        _require_dropped(store, digest)
    else:
        assert (changed, read_all(handout)) == (honest, plain)
        os.close(handout.fd)
        store.clear()
        store.sweep()
    require_descriptors(descriptors)


def _require_dropped(store: MemoryStore, digest: Sha256) -> None:
    status = store.status()
    assert (status.entries, status.handouts, status.reserved_bytes) == (0, 0, 0)
    assert store.miss_reason(RELEASES, digest) is MissReason.DROPPED_CORRUPT
