"""A reference past the cache: mirrored into the daemon while it comes, copied, or only hashed."""

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from dgcache.reference import Reference, sha256_of_descriptor
from dgcache.report import logger
from dgcache.sources import PIECE_BYTES, Source, StoreSource, opened, pieces
from dgcache_core.errors import (
    CacheError,
    CacheRefusedError,
    CacheUnavailableError,
    InvalidReferenceError,
)
from dgcache_core.handouts import Handout
from dgcache_core.references import Sha256
from dgcache_core.sealed_files import create_memory_file, open_again, seal, write_at

if TYPE_CHECKING:
    from dgcache.remote import RemoteDeposit

T = TypeVar("T")

MAX_SPOOL_BYTES = 16 << 30
"""Where the copy of a stream that never ends stops."""

DAEMON_LOST = (CacheUnavailableError, CacheRefusedError)
"""What says that this daemon cannot be used any more."""


class Mirror:
    """The copy of a fetch that goes to the daemon meanwhile; any failure only ends the copying."""

    def __init__(
        self, deposit: "RemoteDeposit | None", on_lost: Callable[[CacheError], None]
    ) -> None:
        """Mirror into `deposit`, or nowhere; `on_lost` hears if the daemon is gone."""
        self._deposit = deposit
        self._on_lost = on_lost

    def write(self, piece: memoryview) -> None:
        """Send a piece, if there is still somebody to send it to."""
        self._guarded(lambda deposit: deposit.write(piece))

    def commit(self) -> str | None:
        """Return "dg-cached" if the daemon keeps the whole reference, else None."""
        committed = self._guarded(lambda deposit: deposit.commit())
        self._deposit = None
        return "dg-cached" if committed is not None else None

    def abandon(self) -> None:
        """Let the daemon keep nothing. Does nothing after a commit."""
        if self._deposit is not None:
            deposit, self._deposit = self._deposit, None
            deposit.abort()

    def _guarded(self, operation: "Callable[[RemoteDeposit], T]") -> T | None:
        deposit = self._deposit
        if deposit is None:
            return None
        try:
            return operation(deposit)
        except DAEMON_LOST as error:
            self._deposit = None
            deposit.abort()
            self._on_lost(error)
        except CacheError as error:  # size or digest differ: judged again over our own copy
            self._deposit = None
            logger.debug("the daemon did not keep the reference: %s", error)
        return None


def private_copy(source: Source) -> Reference:
    """Return the source as a sealed memory file of this process alone."""
    source.rewind()
    memory_file = create_memory_file()
    try:
        length = 0
        for piece in _read_pieces(source):
            write_at(memory_file, piece, length)
            length += len(piece)
        seal(memory_file)
        digest = sha256_of_descriptor(memory_file, length)
        return Reference(Handout(open_again(memory_file), length, digest), source="copied")
    finally:
        os.close(memory_file)


def pieces_of(fetched: StoreSource) -> Iterator[memoryview]:
    """Read what a fetch gave, piece by piece, whatever it is."""
    if hasattr(fetched, "read"):
        yield from pieces(fetched)
        return
    with opened(fetched, MAX_SPOOL_BYTES) as source:
        yield from _read_pieces(source)


def only_hash(source: Source, expected: Sha256 | None) -> Sha256:
    """Return the digest of the source, kept nowhere.

    Raises:
        InvalidReferenceError: it is not the expected one.
    """
    digest = hashlib.sha256()
    for piece in _read_pieces(source):
        digest.update(piece)
    found = Sha256(digest.hexdigest())
    if expected is not None and found != expected:
        raise InvalidReferenceError(
            f"SHA-256 mismatch: {expected} was declared, the bytes have {found}"
        )
    return found


def _read_pieces(source: Source) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(PIECE_BYTES))
    while count := source.read_into(buffer):
        yield buffer[:count]
