"""Buffers take turns: each is hashed, in order, before it is filled again."""

import io
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest

from dgcache_core.aead import CHUNK_BYTES, open_header
from dgcache_core.ingest import BUFFERS, Sealing
from dgcache_core.scratch import ScratchPool

from .sealing import KEY, frame_of, opened
from .support import content, digest_of


class LateHelper(Executor):
    """Begins when it is told to, and not before."""

    def __init__(self) -> None:
        self.begin = threading.Event()
        self.threads: list[threading.Thread] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Let the work wait in a thread of its own."""

        def run() -> None:
            assert self.begin.wait(30)
            fn(*args, **kwargs)

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()
        return Future[None]()


class CountedHash:
    """A hash that knows how many chunks it had."""

    def __init__(self, real: Any) -> None:
        self.chunks = 0
        self._real = real

    def update(self, data: memoryview) -> None:
        """Hash one more."""
        self._real.update(data)
        self.chunks += 1

    def hexdigest(self) -> str:
        """Return the digest of all."""
        digest: str = self._real.hexdigest()
        return digest


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 9])
def test_however_late_the_helper_no_buffer_is_filled_before_it_was_hashed(chunks: int) -> None:
    """The digest is that of the bytes and the blob opens to them."""
    data = content(chunks * CHUNK_BYTES)
    frame, helper, pool = frame_of(data), LateHelper(), ScratchPool(CHUNK_BYTES, keep=BUFFERS)
    source, blob = io.BytesIO(data), bytearray(frame.sealed_bytes)
    with memoryview(blob) as view:
        sealing = Sealing(frame, memoryview(KEY), view, helper, pool)
        hashed = CountedHash(sealing._hashing.hash)
        sealing._hashing.hash = hashed  # type: ignore[assignment]

        def read(into: memoryview) -> int:
            read_before = source.tell() // CHUNK_BYTES
            assert hashed.chunks > read_before - min(BUFFERS, chunks)
            if read_before >= min(BUFFERS, chunks) - 1:
                helper.begin.set()  # every buffer is in use, this one included
            return source.readinto(into)

        sealing.fill(read)
        assert sealing.finish(None) == digest_of(data)
        assert open_header(memoryview(KEY), view) == (frame, digest_of(data))
        sealing.release()
    assert opened(blob) == (frame, digest_of(data), data)
    pool.close()


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_source_that_fails_finds_no_buffer_in_the_helpers_hands(after: int) -> None:
    """What was begun is ended before the buffers are wiped and given back."""
    data = content(4 * CHUNK_BYTES)
    source, helper, pool = io.BytesIO(data), LateHelper(), ScratchPool(CHUNK_BYTES, keep=BUFFERS)

    def read(into: memoryview) -> int:
        if source.tell() == after * CHUNK_BYTES:
            helper.begin.set()
            raise ConnectionError
        if source.tell() == (BUFFERS - 1) * CHUNK_BYTES:
            helper.begin.set()
        return source.readinto(into)

    frame = frame_of(data)
    sealing = Sealing(
        frame, memoryview(KEY), memoryview(bytearray(frame.sealed_bytes)), helper, pool
    )
    hashed = CountedHash(sealing._hashing.hash)
    sealing._hashing.hash = hashed  # type: ignore[assignment]
    with pytest.raises(ConnectionError):
        sealing.fill(read)
    assert hashed.chunks == after
    assert len(pool._idle) == BUFFERS
    assert not any(any(buffer[:]) for buffer in pool._idle)
    pool.close()


def test_a_helper_that_takes_no_work_fails_the_store_and_leaves_nothing_behind() -> None:
    """A store that was closed meanwhile; nobody waits for a hash that nobody makes."""

    closed = ThreadPoolExecutor(1)
    closed.shutdown()
    data, pool = content(2 * CHUNK_BYTES), ScratchPool(CHUNK_BYTES, keep=BUFFERS)
    frame = frame_of(data)
    blob = memoryview(bytearray(frame.sealed_bytes))
    with pytest.raises(RuntimeError, match="after shutdown"):
        Sealing(frame, memoryview(KEY), blob, closed, pool).fill(io.BytesIO(data).readinto)
    assert not any(any(buffer[:]) for buffer in pool._idle)
    pool.close()
