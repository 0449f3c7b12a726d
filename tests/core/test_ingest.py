"""Two buffers take turns: each is hashed, in order, before it is filled again."""

import io
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from dgcache_core.aead import CHUNK_BYTES, open_header
from dgcache_core.ingest import Sealing
from dgcache_core.scratch import ScratchPool

from .sealing import KEY, frame_of, opened
from .support import content, digest_of


class LateFuture(Future[None]):
    """Does its work when its result is asked for, and not before."""

    work: Callable[[], None]

    def result(self, *_: object) -> None:
        """Do it now, once."""
        if not self.done():
            self.work()
            self.set_result(None)


class LatestPossible(Executor):
    """The slowest helper there can be: whoever does not wait for it finds nothing done."""

    def __init__(self) -> None:
        self.started: list[LateFuture] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Remember the work."""
        future = LateFuture()
        future.work = lambda: fn(*args, **kwargs)
        self.started.append(future)
        return future


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
def test_however_slow_the_helper_each_chunk_is_hashed_in_its_turn(chunks: int) -> None:
    """The digest is that of the bytes and the blob opens to them."""
    data = content(chunks * CHUNK_BYTES)
    frame, helper, pool = frame_of(data), LatestPossible(), ScratchPool(CHUNK_BYTES, keep=2)
    blob = bytearray(frame.sealed_bytes)
    with memoryview(blob) as view:
        sealing = Sealing(frame, memoryview(KEY), view, helper, pool)
        sealing.fill(io.BytesIO(data).readinto)
        assert sealing.finish(None) == digest_of(data)
        assert open_header(memoryview(KEY), view) == (frame, digest_of(data))
        sealing.release()
    assert opened(blob) == (frame, digest_of(data), data)
    assert len(helper.started) == chunks
    pool.close()


@pytest.mark.parametrize("after", [1, 2])
def test_a_source_that_fails_finds_no_buffer_in_the_helpers_hands(after: int) -> None:
    """What was begun is ended before the buffers are wiped and given back."""
    data = content(3 * CHUNK_BYTES)
    source, helper, pool = io.BytesIO(data), LatestPossible(), ScratchPool(CHUNK_BYTES, keep=2)

    def read(into: memoryview) -> int:
        if source.tell() == after * CHUNK_BYTES:
            raise ConnectionError
        return source.readinto(into)

    frame = frame_of(data)
    blob = memoryview(bytearray(frame.sealed_bytes))
    with pytest.raises(ConnectionError):
        Sealing(frame, memoryview(KEY), blob, helper, pool).fill(read)
    assert [future.done() for future in helper.started] == [True] * after
    assert not any(any(buffer[:]) for buffer in pool._idle)
    pool.close()
