"""Every encryption of a store's life, noted by a process of its own.

What it imports is what it costs to start: neither gRPC nor pytest.
"""

import hashlib
import io

from dgcache_core import aead
from dgcache_core.memory_store import MemoryStore
from dgcache_core.references import Deltaspace


def encryptions(stores: int) -> tuple[set[bytes], int]:
    """Return a hash of each pair of key and nonce that so many stores use, and their number."""
    seal, pairs, times = aead._encrypt_into, set(), 0

    def noted(
        key: memoryview, nonce: bytes, plain: memoryview, associated: bytes, out: memoryview
    ) -> None:
        nonlocal times
        times += 1
        pairs.add(hashlib.blake2b(bytes(key) + nonce, digest_size=16).digest())
        seal(key, nonce, plain, associated, out)

    aead._encrypt_into = noted  # in this process, which ends with this
    space, data = Deltaspace("b", "p"), bytearray(8)
    store = MemoryStore(1 << 20, 1000, may_fork=True, max_entries=32)
    for number in range(stores):
        data[:] = (number % 1000).to_bytes(8, "big")  # the same content again, too
        with store.begin(len(data), space) as ingest:
            ingest.fill(io.BytesIO(data).readinto)
            ingest.commit()
    store.close()
    return pairs, times
