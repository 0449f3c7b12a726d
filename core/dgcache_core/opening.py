"""From a sealed blob to a sealed memory file: every chunk is checked before anybody gets a byte.

The counterpart of `ingest`. Two threads share the chunks where that pays.
"""

import mmap
import os
from concurrent.futures import Executor

from dgcache_core.aead import Frame, open_chunk, open_header
from dgcache_core.errors import CacheCorruptionError
from dgcache_core.references import Sha256
from dgcache_core.scratch import ScratchPool
from dgcache_core.sealed_files import create_memory_file, seal, write_at

_TWO_THREADS_FROM_BYTES = 4 << 20
"""Measured on two cores: a second thread makes a lookup 1.4 times as fast at 4 MiB, and 0.94 times
at 2 MiB."""


def open_blob(
    frame: Frame,
    sha256: Sha256,
    blob: mmap.mmap,
    key: memoryview,
    helpers: Executor,
    scratch: ScratchPool,
) -> int:
    """Return the descriptor of a sealed memory file with the plaintext.

    Args:
        frame: what the blob's header must vouch for.
        sha256: likewise.
        blob: header, seal and chunks.
        key: the blob's.
        helpers: lends a second thread.
        scratch: lends buffers of a chunk.

    Raises:
        CacheCorruptionError: a check failed; nothing is left of what was decrypted.
        OSError: there is no memory file.
    """
    memory_file = create_memory_file()
    try:
        with memoryview(blob) as view:
            if open_header(key, view) != (frame, sha256):
                raise CacheCorruptionError("the header vouches for another reference")
            _open_chunks(frame, view, key, memory_file, helpers, scratch)
        seal(memory_file)
    except BaseException:
        os.close(memory_file)
        raise
    return memory_file


def _open_chunks(
    frame: Frame,
    blob: memoryview,
    key: memoryview,
    memory_file: int,
    helpers: Executor,
    scratch: ScratchPool,
) -> None:
    indices = iter(range(frame.chunks))  # next() is atomic: two threads share it

    def work() -> None:
        with scratch.borrow() as buffer:
            for index in indices:
                offset, length = frame.plain_span(index)
                open_chunk(key, frame, index, blob, buffer[:length])
                write_at(memory_file, buffer[:length], offset)

    if frame.size < _TWO_THREADS_FROM_BYTES:
        work()
        return
    helper = helpers.submit(work)
    try:
        work()
    finally:
        helper.result()
