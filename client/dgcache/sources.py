"""What can be stored: a path, a file object, a descriptor, or bytes.

Every source has a known size and can be read twice, because a store that fails half-way in the
daemon is repeated in the in-process cache. What cannot be read twice is copied into a memory file
first, never into a file on disk.
"""

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from dgcache_core.errors import CacheFullError, InvalidReferenceError
from dgcache_core.sealed_files import create_memory_file, write_at


class Readable(Protocol):
    """The least a stream must have; a `close` is called where there is one."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end."""


StoreSource = str | os.PathLike[str] | int | Readable | bytes | bytearray | memoryview
"""What `put` takes."""

PIECE_BYTES = 1 << 20

_LEND_FROM_BYTES = 8 << 20
"""From here on lending pages saves more than to load what can takes."""


class Source(Protocol):
    """Bytes of a known size that can be read again from the start."""

    size: int

    def rewind(self) -> None:
        """Begin again."""

    def read_into(self, view: memoryview) -> int:
        """Fill a part of `view`; return how many bytes, 0 at the end."""

    def send_into(self, pipe: int) -> int:
        """Move a piece into a non-blocking pipe; return how many bytes, 0 at the end.

        Raises:
            BlockingIOError: the pipe is full.
        """

    def require_unchanged(self) -> None:
        """Raise InvalidReferenceError where the file was changed since it was opened."""


class BytesSource:
    """Bytes in memory."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(data).cast("B")
        self.size = self._view.nbytes
        self._at = 0

    def rewind(self) -> None:
        """See `Source`."""
        self._at = 0

    def read_into(self, view: memoryview) -> int:
        """See `Source`."""
        piece = self._view[self._at : self._at + len(view)]
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def send_into(self, pipe: int) -> int:
        """See `Source`."""
        if self._at == self.size:
            return 0
        piece = self._view[self._at : self._at + PIECE_BYTES]
        if self.size >= _LEND_FROM_BYTES:
            from dgcache.lending import lend_pages  # ctypes takes some ms to load

            sent = lend_pages(pipe, piece)
        else:
            sent = os.write(pipe, piece)
        self._at += sent
        return sent

    def require_unchanged(self) -> None:
        """See `Source`; the daemon hashes and keeps the same copy."""


class FileSource:
    """A regular file or memory file, from `start` to the end it had when this was made."""

    def __init__(self, fd: int, start: int, name: str) -> None:
        status = os.fstat(fd)
        self._fd = fd
        self._start = start
        self._name = name
        self._seen = (status.st_size, status.st_mtime_ns)
        self._spliceable = True
        self.size = max(0, status.st_size - start)
        self._at = start

    def rewind(self) -> None:
        """See `Source`."""
        self._at = self._start

    def read_into(self, view: memoryview) -> int:
        """See `Source`."""
        left = self._start + self.size - self._at
        try:
            count = os.preadv(self._fd, [view[: max(0, left)]], self._at)
        except OSError as error:
            raise InvalidReferenceError(f"{self._name}: {error.strerror}") from error
        self._at += count
        return count

    def send_into(self, pipe: int) -> int:
        """See `Source`. splice(2) moves pages without copying them."""
        left = min(PIECE_BYTES, self._start + self.size - self._at)
        if left == 0:
            return 0
        if self._spliceable:
            try:
                sent = os.splice(self._fd, pipe, left, self._at, flags=os.SPLICE_F_NONBLOCK)
            except (BlockingIOError, BrokenPipeError):
                raise
            except OSError:
                self._spliceable = False  # not every file system can
                return self.send_into(pipe)
        else:
            sent = os.write(pipe, os.pread(self._fd, min(left, 64 << 10), self._at))
        self._at += sent
        return sent

    def require_unchanged(self) -> None:
        """See `Source`."""
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != self._seen:
            raise InvalidReferenceError(f"{self._name} changed while it was stored")


@contextmanager
def opened(source: StoreSource, max_spool_bytes: int) -> Iterator[Source]:
    """Open whatever `put` was given.

    Raises:
        InvalidReferenceError: missing, unreadable, not a regular file, or of a type that cannot be
            stored.
        CacheFullError: a stream is longer than `max_spool_bytes`.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        yield BytesSource(source)
    elif isinstance(source, (str, os.PathLike)):
        with _opened_path(Path(source)) as file:
            yield file
    elif isinstance(source, int) and not isinstance(source, bool):
        with _opened_descriptor(source, f"descriptor {source}", max_spool_bytes) as file:
            yield file
    elif hasattr(source, "read"):
        with _opened_stream(source, max_spool_bytes) as file:
            yield file
    else:
        raise InvalidReferenceError(
            f"cannot store a {type(source).__name__}: "
            "give a path, a binary file, a descriptor or bytes"
        )


class WatchedSource:
    """Another source, with a callback that hears how many bytes moved."""

    def __init__(self, source: Source, progress: Callable[[int], None]) -> None:
        self._source = source
        self._progress = progress
        self.size = source.size

    def rewind(self) -> None:
        """See `Source`."""
        self._source.rewind()

    def read_into(self, view: memoryview) -> int:
        """See `Source`."""
        return self._reported(self._source.read_into(view))

    def send_into(self, pipe: int) -> int:
        """See `Source`."""
        return self._reported(self._source.send_into(pipe))

    def require_unchanged(self) -> None:
        """See `Source`."""
        self._source.require_unchanged()

    def _reported(self, count: int) -> int:
        self._progress(count)
        return count


@contextmanager
def _opened_path(path: Path) -> Iterator[Source]:
    if "\0" in str(path):
        raise InvalidReferenceError(f"{str(path)!r} holds a NUL character")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block here
    except OSError as error:
        raise InvalidReferenceError(f"{path}: {error.strerror}") from error
    try:
        _require_regular(fd, str(path))
        yield FileSource(fd, 0, str(path))
    finally:
        os.close(fd)


@contextmanager
def _opened_descriptor(fd: int, name: str, max_spool_bytes: int) -> Iterator[Source]:
    try:
        mode = os.fstat(fd).st_mode
    except (OSError, OverflowError) as error:
        raise InvalidReferenceError(f"{name} is not open") from error
    if stat.S_ISREG(mode):
        yield FileSource(fd, os.lseek(fd, 0, os.SEEK_CUR), name)
    elif stat.S_ISDIR(mode):
        raise InvalidReferenceError(f"{name} is a directory")
    else:
        with io.FileIO(fd, closefd=False) as stream, spooled(stream, max_spool_bytes) as file:
            yield file


@contextmanager
def _opened_stream(stream: Any, max_spool_bytes: int) -> Iterator[Source]:
    try:
        fd, start = stream.fileno(), stream.tell()
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
    except (OSError, AttributeError, ValueError):
        regular = False
    if regular and not isinstance(stream, io.TextIOBase):
        yield FileSource(fd, start, str(getattr(stream, "name", f"descriptor {fd}")))
    else:
        with spooled(stream, max_spool_bytes) as file:
            yield file


@contextmanager
def spooled(stream: Any, max_bytes: int) -> Iterator[FileSource]:
    """Copy a stream into a memory file."""
    memory_file = create_memory_file()
    try:
        size = 0
        for piece in pieces(stream):
            if size + len(piece) > max_bytes:
                raise CacheFullError(f"the stream is longer than {max_bytes} bytes")
            write_at(memory_file, piece, size)
            size += len(piece)
        yield FileSource(memory_file, 0, "the stream")
    finally:
        os.close(memory_file)


def pieces(stream: Any) -> Iterator[memoryview]:
    """Read a binary stream to its end.

    Raises:
        InvalidReferenceError: it gives text.
    """
    while piece := stream.read(PIECE_BYTES):
        if isinstance(piece, str):
            raise InvalidReferenceError("the file was opened in text mode: open it with mode 'rb'")
        yield memoryview(piece)


def _require_regular(fd: int, name: str) -> None:
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise InvalidReferenceError(f"{name} is a directory")
    if not stat.S_ISREG(mode):
        raise InvalidReferenceError(f"{name} is not a regular file")
