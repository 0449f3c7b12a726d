"""One blob into a file of its own, which has its name only when it is whole.

Every chunk is checked before it is written, so that what rotted in memory is never made durable:
one decryption of the blob, which is small against the disk. The header is read again through a
descriptor of its own before the file gets its name.
"""

import os
from collections.abc import Callable
from contextlib import suppress

from dgcache_core.aead import BODY_OFFSET, CHUNK_BYTES, HEADER_BYTES, open_chunk
from dgcache_core.disk_files import require_own_file
from dgcache_core.disk_format import body_bytes, seal_disk_header
from dgcache_core.disk_index import DiskEntry
from dgcache_core.disk_keyring import KeyRing
from dgcache_core.disk_names import NEW
from dgcache_core.disk_reader import require_vouched
from dgcache_core.disk_records import DiskEventKind, StoredBlob
from dgcache_core.disk_table import Admission, DiskTable
from dgcache_core.errors import CacheCorruptionError, CacheFullError, CacheRefusedError, MissReason
from dgcache_core.ledger import FileState
from dgcache_core.memory import page_rounded
from dgcache_core.scratch import ScratchPool
from dgcache_core.sealed_files import read_at, write_at
from dgcache_core.tier_keys import MAC_BYTES, TierKeys

_WORTH_WRITING_SECONDS = 1.0


class DiskWriter:
    """Writes blobs. Thread-safe."""

    def __init__(self, table: DiskTable, ring: KeyRing, wall_clock: Callable[[], float]) -> None:
        self._table = table
        self._ring = ring
        self._wall_clock = wall_clock
        self._scratch = ScratchPool(CHUNK_BYTES, keep=2)

    def keep(self, keys: TierKeys, stored: StoredBlob) -> bool:
        """Write a blob of which there is no entry; tell whether there is one now."""
        name = keys.file_name(stored.sha256)
        remaining = self.remaining_seconds(stored)
        if remaining <= 0:
            return False
        header = seal_disk_header(
            keys,
            stored.frame,
            stored.sha256,
            stored.key,
            stored.deltaspaces,
            ephemeral=not self._ring.is_persistent,
        )
        size = len(header) + body_bytes(stored.frame)
        if page_rounded(size) > self._table.index.max_bytes:
            with self._table.lock:
                self._table.remember(stored.sha256, MissReason.TOO_LARGE)
            return False
        try:
            with self._table.admission(name, size) as admission:
                if admission is None:  # perhaps somebody was faster
                    return self._table.find(stored.sha256) is not None
                if self._table.disabled_reason:
                    return False
                return self._write(keys, header, stored, remaining, admission)
        except CacheCorruptionError as error:
            self._table.tell(DiskEventKind.CORRUPT, name, f"not written: {error}")
        except CacheRefusedError as error:
            for place in (name, NEW):
                self._table.directory.remove_links(place)
            self._table.tell(DiskEventKind.SECURITY, name, f"not written: {error}")
        except CacheFullError:
            pass  # no memory for a buffer: a passing lack
        except OSError as error:
            self._table.note_failure(error, size)
        return False

    def is_as_fresh(self, entry: DiskEntry, stored: StoredBlob) -> bool:
        """Tell whether an entry lives as long as a blob that is to be written."""
        left = entry.expires - self._table.clock()
        return left >= self.remaining_seconds(stored) - _WORTH_WRITING_SECONDS

    def remaining_seconds(self, stored: StoredBlob) -> float:
        """Return how long a blob has still to live."""
        if stored.expires_in_seconds is not None:
            return stored.expires_in_seconds
        now = self._wall_clock()
        return stored.frame.expires_seconds - now if stored.frame.created_seconds <= now else 0

    def _write(
        self,
        keys: TierKeys,
        header: bytes,
        stored: StoredBlob,
        remaining: float,
        admission: Admission,
    ) -> bool:
        name, frame = admission.name, stored.frame
        ledger = self._write_file(name, header, stored)
        now = self._table.clock()
        entry = DiskEntry(
            name=name,
            sha256=stored.sha256,
            frame=frame,
            mac=header[-MAC_BYTES:],
            ledger=ledger,
            created=now + remaining - (frame.expires_seconds - frame.created_seconds),
            expires=now + remaining,
        )
        self._table.add(entry, stored.deltaspaces, admission)
        if not self._ring.is_current(keys):  # cleared with a new generation while we were writing
            self._table.remove([entry], MissReason.EVICTED)
            return False
        with self._table.lock:
            self._table.counters.keeps += 1
            self._table.counters.kept_bytes += frame.size
        return True

    def _write_file(self, name: str, header: bytes, stored: StoredBlob) -> FileState:
        directory, durable = self._table.directory, self._ring.is_persistent
        size = len(header) + body_bytes(stored.frame)
        with directory.new_file(size) as (new, descriptor):
            self._write_checked(descriptor, header, stored)
            if durable:
                os.fsync(descriptor)
            with directory.opened(new) as again:
                _require_written(new, descriptor, again, header, size)
                try:
                    directory.publish(new, name, durable=durable)
                    return FileState.of(os.fstat(again))  # after the rename, which changes ctime
                except OSError:  # it may have its name by now, and would be a stranger's there
                    with suppress(OSError, CacheRefusedError):
                        directory.unlink(name)
                    raise

    def _write_checked(self, descriptor: int, header: bytes, stored: StoredBlob) -> None:
        frame, blob = stored.frame, stored.blob
        require_vouched(stored.key, blob, frame, stored.sha256)
        write_at(descriptor, memoryview(header), 0)
        with blob[HEADER_BYTES:BODY_OFFSET] as seal:
            write_at(descriptor, seal, len(header))
        with self._scratch.borrow() as plain:
            for index in range(frame.chunks):
                with plain[: frame.plain_span(index)[1]] as checked:
                    open_chunk(stored.key, frame, index, blob, checked)
                span = frame.sealed_span(index)
                with blob[span] as chunk:
                    write_at(descriptor, chunk, len(header) - HEADER_BYTES + span.start)


def _require_written(new: str, descriptor: int, again: int, header: bytes, size: int) -> None:
    """Check through a second descriptor that the name leads to what was written."""
    status = os.fstat(again)
    require_own_file(new, status)
    if not os.path.samestat(status, os.fstat(descriptor)) or status.st_size != size:
        raise CacheRefusedError(f"{new} was changed while it was written")
    found = bytearray(len(header))
    if read_at(again, memoryview(found), 0) != len(header) or found != header:
        raise CacheRefusedError(f"{new} does not hold what was written")
