"""Plaintext stands in a scratch buffer only while it is borrowed."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from dgcache_core.scratch import ScratchPool

SIZE = 1 << 16


def idle_bytes(pool: ScratchPool) -> list[bytes]:
    """Return what stands in the buffers that are kept."""
    return [bytes(buffer) for buffer in pool._idle]


def test_a_buffer_is_zero_when_it_is_given_back() -> None:
    """From the first byte to the last, also where only a part was used."""
    pool = ScratchPool(SIZE, keep=2)
    with pool.borrow() as buffer:
        buffer[:] = b"\xff" * SIZE
    assert idle_bytes(pool) == [bytes(SIZE)]
    with pool.borrow() as again:
        assert again == bytes(SIZE)
    pool.close()


@pytest.mark.parametrize("lent", [0, 1, SIZE - 1, SIZE])
def test_of_a_part_that_is_lent_all_is_zero_again(lent: int) -> None:
    """Nobody can write behind it, so nothing else needs to be wiped."""
    pool = ScratchPool(SIZE, keep=2)
    with pool.borrow(lent) as buffer:
        assert len(buffer) == lent
        buffer[:] = b"\xff" * lent
    assert idle_bytes(pool) == [bytes(SIZE)]
    pool.close()


def test_a_buffer_is_zero_also_after_an_error() -> None:
    """An exception in the block does not leave plaintext behind."""
    pool = ScratchPool(SIZE, keep=2)
    with pytest.raises(RuntimeError), pool.borrow() as buffer:
        buffer[:] = b"\xff" * SIZE
        raise RuntimeError
    assert idle_bytes(pool) == [bytes(SIZE)]
    pool.close()


def test_a_buffer_that_is_not_kept_is_wiped_as_well() -> None:
    """Its memory is zero before it goes back to the system: seen through a pointer kept to it."""
    pool = ScratchPool(SIZE, keep=0)
    with pool.borrow() as buffer:
        buffer[:] = b"\xff" * SIZE
        outlives = buffer[:]  # holds the mapping
    assert outlives == bytes(SIZE)


def test_the_pool_keeps_a_bounded_number() -> None:
    """Ten at once are lent, two are kept."""
    pool = ScratchPool(SIZE, keep=2)
    with ExitStack() as stack:
        addresses = {
            ctypes.addressof(ctypes.c_char.from_buffer(stack.enter_context(pool.borrow())))
            for _ in range(10)
        }
        assert len(addresses) == 10
    assert len(pool._idle) == 2
    pool.close()
    assert not pool._idle


def test_a_kept_buffer_is_used_again() -> None:
    """Borrowing one after the other needs one buffer."""
    pool = ScratchPool(SIZE, keep=2)
    for _ in range(5):
        with pool.borrow():
            assert not pool._idle
    assert len(pool._idle) == 1
    pool.close()


def test_the_view_ends_with_the_block() -> None:
    """Nobody reads somebody else's plaintext through a view of his own last time."""
    pool = ScratchPool(SIZE, keep=2)
    with pool.borrow() as buffer:
        pass
    with pytest.raises(ValueError, match="released"):
        buffer[0]
    pool.close()


@pytest.mark.parametrize("keep", [0, 2])
def test_a_part_of_a_buffer_that_is_still_referred_to_does_no_harm(keep: int) -> None:
    """An exception's traceback may hold on to a slice: neither giving back nor close() fails."""
    pool = ScratchPool(SIZE, keep=keep)
    with pool.borrow() as buffer:
        part = buffer[:10]
        part[:] = b"plaintext!"
    assert part == bytes(10)
    pool.close()
    assert not pool._idle


def test_threads_never_share_a_buffer() -> None:
    """What a thread writes is there until it gives the buffer back, with eight at it."""
    pool = ScratchPool(SIZE, keep=3)

    def work(number: int) -> bool:
        with pool.borrow() as buffer:
            clean = buffer == bytes(SIZE)
            buffer[:] = bytes([number]) * SIZE
            return clean and buffer == bytes([number]) * SIZE

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(1, 200)))
    assert len(pool._idle) <= 3
    assert all(one == bytes(SIZE) for one in idle_bytes(pool))
    pool.close()
