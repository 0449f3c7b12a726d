"""A pipe reads the very bytes that were lent, whatever kind of buffer they are in."""

import ctypes
import errno
import os
from collections.abc import Iterator

import pytest

from dgcache import lending
from dgcache.lending import lend_pages

SIZE = 40_000


def refuse(*_: object) -> int:
    """Fail as a sandbox without this system call does."""
    ctypes.set_errno(errno.ENOSYS)
    return -1


@pytest.fixture(params=["vmsplice", "refused", "copied"])
def pipe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A pipe of 64 KiB whose writer does not block; with and without vmsplice(2)."""
    if request.param == "refused":
        monkeypatch.setattr(lending, "_vmsplice", lambda: refuse)
    elif request.param == "copied":
        monkeypatch.setattr(lending, "_vmsplice", lambda: None)
    ends = list(os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_was_lent_is_read(pipe: list[int], kind: type) -> None:
    """From the middle of a buffer, too, writable or not."""
    data = kind(os.urandom(SIZE))
    view = memoryview(data)[1234:]
    assert lend_pages(pipe[1], view) == len(view)
    assert os.read(pipe[0], SIZE) == view


def test_a_full_pipe_takes_a_part_then_nothing(pipe: list[int]) -> None:
    """As a write does."""
    data = memoryview(bytes(4 << 20))
    sent = lend_pages(pipe[1], data)
    assert 0 < sent < len(data)
    with pytest.raises(BlockingIOError):
        for _ in range(100):
            lend_pages(pipe[1], data)


def test_nobody_reads(pipe: list[int]) -> None:
    """As a write fails."""
    reader, pipe[0] = pipe[0], os.dup(pipe[1])
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        lend_pages(pipe[1], memoryview(b"data"))


def test_the_buffer_is_free_again(pipe: list[int]) -> None:
    """A bytearray that is exported cannot be resized."""
    data = bytearray(SIZE)
    with memoryview(data) as view:
        lend_pages(pipe[1], view)
    data.append(1)
