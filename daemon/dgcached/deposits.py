"""Deposits: a pipe whose write end is lent to a client, and the store that reads the other end.

The pipe is the daemon's own. (A descriptor from a client could be a FUSE file, on which even
close() may block for ever.) It bounds memory, gives backpressure, and ends by itself when its last
writer dies. A writer that is slower than the limits loses its deposit.
"""

import asyncio
import fcntl
import os
import select
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import ExitStack, suppress

from dgcache_core.clock import boottime_seconds
from dgcache_core.errors import CacheError, CacheUnavailableError, InvalidReferenceError
from dgcache_core.references import Sha256
from dgcache_core.store import Ingest
from dgcached.limits import Limits

_PIPE_BYTES = 1 << 20


class Deposit:
    """One store in progress. Everything but `_fill` runs in the event loop."""

    def __init__(self, ingest: Ingest, limits: Limits, workers: Executor) -> None:
        """Make the pipe and start to read it.

        Raises:
            OSError: there is no pipe to be had; the ingest is aborted.
        """
        self._ingest = ingest
        self._limits = limits
        with ExitStack() as stack:
            stack.callback(ingest.abort)
            self._cancelled = os.eventfd(0, os.EFD_CLOEXEC)
            stack.callback(os.close, self._cancelled)
            self._read_end, self._write_end = os.pipe2(os.O_CLOEXEC)
            for end in (self._read_end, self._write_end):
                stack.callback(os.close, end)
            os.set_blocking(self._read_end, False)
            stack.pop_all()
        with suppress(OSError):  # above pipe-user-pages-soft it stays 64 KiB (pipe(7))
            fcntl.fcntl(self._read_end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._expiry: asyncio.TimerHandle | None = None
        self._forget: Callable[[], object] | None = None
        self._given_up = False
        self._filled = asyncio.get_running_loop().run_in_executor(workers, self._fill)
        self._filled.add_done_callback(self._await_commit)

    def when_over(self, callback: Callable[[], object]) -> None:
        """Call back some time after the bytes ended without a commit: the deposit is forgotten.

        Until then a late CommitStore still hears why it failed.
        """
        self._forget = callback

    @property
    def filled(self) -> "asyncio.Future[None]":
        """Done when the bytes have ended, well or not."""
        return self._filled

    def lend(self) -> int:
        """Return the write end, which is the caller's to send and close."""
        write_end, self._write_end = self._write_end, -1
        return write_end

    async def commit(self) -> Sha256:
        """Wait for the end of the bytes and keep them.

        Raises:
            InvalidReferenceError: size or digest differ.
            CacheUnavailableError: the writer was too slow, or the deposit was cancelled.
        """
        try:
            await asyncio.shield(self._filled)
            return self._ingest.commit()
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Keep nothing. Does nothing after a commit."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self._given_up = True
        if self._filled.done():
            self._ingest.abort()
        else:
            os.eventfd_write(self._cancelled, 1)

    async def end(self) -> None:
        """Keep nothing, and return when its room is free again."""
        self.cancel()
        await asyncio.wait({self._filled})

    def _await_commit(self, filled: "asyncio.Future[None]") -> None:
        """The bytes have ended, well or not: the pipe goes, and a commit must come soon."""
        os.close(self._read_end)
        os.close(self._cancelled)
        if self._write_end >= 0:
            os.close(self._write_end)
        failed = filled.cancelled() or filled.exception() is not None
        if failed or self._given_up:
            self._ingest.abort()  # its room is somebody else's at once
        if self._given_up:
            return
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(self._limits.commit_seconds, self._expire)

    def _expire(self) -> None:
        self._ingest.abort()
        if self._forget is not None:
            self._forget()

    def _fill(self) -> None:
        """Runs in a worker thread."""
        reader = _PipeReader(self._read_end, self._cancelled, self._limits)
        try:
            self._ingest.fill(reader.read_into)
        except CacheError:
            raise
        except OSError as error:
            raise InvalidReferenceError(f"the deposit broke: {error.strerror}") from error


class _PipeReader:
    """Reads a pipe, but waits neither for ever nor for a trickle."""

    def __init__(self, pipe: int, cancelled: int, limits: Limits) -> None:
        self._pipe = pipe
        self._limits = limits
        self._received = 0
        self._deadline_base = boottime_seconds() + limits.deposit_idle_seconds
        self._poll = select.poll()
        self._poll.register(pipe, select.POLLIN)
        self._poll.register(cancelled, select.POLLIN)
        self._cancelled = cancelled

    def read_into(self, view: memoryview) -> int:
        """Wait for bytes and return how many were read; 0 at the end."""
        while True:
            try:
                count = os.readv(self._pipe, [view])
            except BlockingIOError:
                self._wait()
                continue
            self._received += count
            return count

    def _wait(self) -> None:
        now = boottime_seconds()
        earned = self._received / self._limits.deposit_bytes_per_second
        left = min(self._limits.deposit_idle_seconds, self._deadline_base + earned - now)
        ready = self._poll.poll(max(0.0, left) * 1000)
        if not ready:
            raise CacheUnavailableError("the writer of this store is too slow")
        if any(descriptor == self._cancelled for descriptor, _ in ready):
            raise CacheUnavailableError("the store was aborted")
