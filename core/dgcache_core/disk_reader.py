"""One file into memory: judged by its ledger and header, then read once into a private mapping.

Reading copies the sealed bytes; what somebody does to the file afterwards no longer matters. The
chunks are not decrypted here: `open_chunk` judges each where it is used.
"""

import hmac
import mmap
import os
from contextlib import suppress

from dgcache_core.aead import HEADER_BYTES, Frame, open_header
from dgcache_core.disk_files import require_own_file
from dgcache_core.disk_format import (
    PREFIX_BYTES,
    DiskHeader,
    Origin,
    blob_header,
    body_bytes,
    open_disk_header,
    read_prefix,
)
from dgcache_core.disk_index import DiskEntry
from dgcache_core.disk_records import DiskEventKind, LoadedBlob
from dgcache_core.disk_table import DiskTable
from dgcache_core.errors import CacheCorruptionError, CacheRefusedError
from dgcache_core.keyslab import KeySlab, KeySlot
from dgcache_core.memory import Allocate
from dgcache_core.references import Deltaspace, Sha256
from dgcache_core.sealed_files import read_at
from dgcache_core.tier_keys import TierKeys


class DiskReader:
    """Reads blobs. Thread-safe."""

    def __init__(self, table: DiskTable) -> None:
        self._table = table

    def load(
        self, keys: TierKeys, entry: DiskEntry, allocate: Allocate, slab: KeySlab
    ) -> LoadedBlob | None:
        """Return a copy of an entry's blob, or None where the disk or we have removed it.

        Raises:
            CacheCorruptionError: a check failed; the entry and its file are gone.
            CacheFullError: no memory or no key slot.
        """
        with self._table.lock:  # room for it in memory may cost its own place on disk
            deltaspaces = self._table.index.bindings.deltaspaces(entry.sha256)
            if self._table.index.has(entry):
                self._table.index.touch(entry)
        try:
            blob, key = self._read(keys, entry, allocate, slab)
        except (CacheCorruptionError, CacheRefusedError) as error:
            refused = isinstance(error, CacheRefusedError)
            kind = DiskEventKind.SECURITY if refused else DiskEventKind.CORRUPT
            if not self._table.drop(entry, kind, str(error)):
                return None
            raise CacheCorruptionError(f"{entry.sha256} on disk failed a check: {error}") from error
        except FileNotFoundError:
            if not self._table.note_if_gone():
                self._table.drop(entry, DiskEventKind.REMOVED, "somebody else removed it")
            return None
        except OSError as error:
            self._table.note_failure(error)
            return None
        return self._loaded(entry, blob, key, deltaspaces)

    def _read(
        self, keys: TierKeys, entry: DiskEntry, allocate: Allocate, slab: KeySlab
    ) -> tuple[mmap.mmap, KeySlot]:
        with self._table.directory.opened(entry.name) as descriptor:
            now = require_own_file(entry.name, os.fstat(descriptor))
            if now != entry.ledger:
                raise CacheRefusedError(f"somebody else changed it: {entry.ledger.change_to(now)}")
            header = judge_file(descriptor, keys, entry.name)[1]
            if header is None or not hmac.compare_digest(header.mac, entry.mac):
                raise CacheCorruptionError("it is not the file that was written")
            return read_blob(descriptor, header, keys, allocate, slab)

    def _loaded(
        self, entry: DiskEntry, blob: mmap.mmap, key: KeySlot, deltaspaces: list[Deltaspace]
    ) -> LoadedBlob:
        with self._table.lock:
            entry.loads += 1
            self._table.counters.loads += 1
            self._table.counters.loaded_bytes += entry.frame.size
            return LoadedBlob(
                frame=entry.frame,
                sha256=entry.sha256,
                blob=blob,
                key=key,
                deltaspaces=deltaspaces,
                expires_in_seconds=entry.expires - self._table.clock(),
            )


def judge_file(descriptor: int, keys: TierKeys, name: str) -> tuple[Origin, DiskHeader | None]:
    """Return whose a file is and, where it is ours, its header, which fits the file and its name.

    Raises:
        CacheCorruptionError: it is ours by its prefix, and a check failed.
    """
    prefix = read_prefix(os.pread(descriptor, PREFIX_BYTES, 0), keys)
    if prefix.origin is not Origin.OURS:
        return prefix.origin, None
    packed = os.pread(descriptor, prefix.header_bytes, 0)
    if len(packed) < prefix.header_bytes:
        raise CacheCorruptionError("the file ends in its header")
    header = open_disk_header(keys, packed)
    if keys.file_name(header.sha256) != name:
        raise CacheCorruptionError("the file has the name of another")
    if (header.uid, header.generation) != (os.geteuid(), keys.generation.counter):
        raise CacheCorruptionError("the file was written by another user or in another generation")
    if os.fstat(descriptor).st_size != len(packed) + body_bytes(header.frame):
        raise CacheCorruptionError("the file's length does not fit its header")
    return prefix.origin, header


def read_blob(
    descriptor: int, header: DiskHeader, keys: TierKeys, allocate: Allocate, slab: KeySlab
) -> tuple[mmap.mmap, KeySlot]:
    """Put the sealed blob behind a judged header into memory, and its key into a slot.

    Raises:
        CacheCorruptionError: the file ends early, or the blob's seal does not fit.
        CacheFullError: no memory or no slot.
        OSError: the disk says no.
    """
    frame = header.frame
    offset = os.fstat(descriptor).st_size - body_bytes(frame)
    blob = allocate(frame.sealed_bytes)
    key: KeySlot | None = None
    try:
        key = slab.new_key()
        with memoryview(blob) as view, view[HEADER_BYTES:] as body:
            view[:HEADER_BYTES] = blob_header(frame, header.sha256)
            if read_at(descriptor, body, offset) < len(body):
                raise CacheCorruptionError("the file ends early")
            header.unwrap_into(keys, key.view)
            require_vouched(key.view, view, frame, header.sha256)
    except BaseException:
        if key is not None:
            key.erase()
        with suppress(BufferError):  # a traceback holds a view: the mapping goes with that one
            blob.close()
        raise
    return blob, key


def require_vouched(key: memoryview, blob: memoryview, frame: Frame, sha256: Sha256) -> None:
    """Check that the blob's own seal vouches for this frame and digest.

    Raises:
        CacheCorruptionError: it does not.
    """
    if open_header(key, blob) != (frame, sha256):
        raise CacheCorruptionError("the blob's header vouches for another reference")
