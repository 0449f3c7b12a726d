"""One blob to its file and back: checked before it is written, read once into private memory.

Writing checks every chunk that it writes, so that what rotted in memory is never made durable. It
costs one decryption of the blob, about a quarter of what writing it costs without a disk's help.
Reading copies the sealed bytes; what somebody does to the file afterwards no longer matters.
"""

import mmap
import os

from dgcache_core.aead import BODY_OFFSET, Frame, open_chunk, open_header
from dgcache_core.disk_files import read_at
from dgcache_core.disk_format import PREFIX_BYTES, DiskHeader, Origin, open_disk_header, read_prefix
from dgcache_core.disk_records import StoredBlob
from dgcache_core.errors import CacheCorruptionError
from dgcache_core.keyslab import KeySlab, KeySlot
from dgcache_core.memory import Allocate
from dgcache_core.references import Sha256
from dgcache_core.scratch import ScratchPool
from dgcache_core.sealed_files import write_at
from dgcache_core.tier_keys import TierKeys


def write_blob(descriptor: int, header: bytes, stored: StoredBlob, scratch: ScratchPool) -> None:
    """Write header and blob, each part of which is checked first.

    Raises:
        CacheCorruptionError: the blob in memory fails a check.
        OSError: the disk says no.
    """
    require_vouched(stored.key, stored.blob, stored.frame, stored.sha256)
    write_at(descriptor, memoryview(header), 0)
    with stored.blob[:BODY_OFFSET] as start:
        write_at(descriptor, start, len(header))
    with scratch.borrow() as plain:
        for index in range(stored.frame.chunks):
            length = stored.frame.plain_span(index)[1]
            with plain[:length] as checked:
                open_chunk(stored.key, stored.frame, index, stored.blob, checked)
            span = stored.frame.sealed_span(index)
            with stored.blob[span] as chunk:
                write_at(descriptor, chunk, len(header) + span.start)


def read_header(descriptor: int, keys: TierKeys) -> tuple[Origin, bytes]:
    """Return whose a file is and, where it is ours, its whole header, which is not judged yet.

    Raises:
        CacheCorruptionError: it is ours and cut off.
    """
    prefix = read_prefix(os.pread(descriptor, PREFIX_BYTES, 0), keys)
    if prefix.origin is not Origin.OURS:
        return prefix.origin, b""
    header = os.pread(descriptor, prefix.header_bytes, 0)
    if len(header) < prefix.header_bytes:
        raise CacheCorruptionError("the file ends in its header")
    return prefix.origin, header


def judge_file(descriptor: int, keys: TierKeys, name: str) -> tuple[Origin, DiskHeader | None]:
    """Return whose a file is and, where it is ours, its header, which fits the file and its name.

    Raises:
        CacheCorruptionError: it is ours by its prefix, and a check failed.
    """
    origin, packed = read_header(descriptor, keys)
    if origin is not Origin.OURS:
        return origin, None
    header = open_disk_header(keys, packed)
    if keys.file_name(header.sha256) != name:
        raise CacheCorruptionError("the file has the name of another")
    if (header.uid, header.generation) != (os.geteuid(), keys.generation.counter):
        raise CacheCorruptionError("the file was written by another user or in another generation")
    if os.fstat(descriptor).st_size != len(packed) + header.frame.sealed_bytes:
        raise CacheCorruptionError("the file's length does not fit its header")
    return origin, header


def read_blob(
    descriptor: int, header: DiskHeader, keys: TierKeys, allocate: Allocate, slab: KeySlab
) -> tuple[mmap.mmap, KeySlot]:
    """Copy the sealed blob behind a judged header into memory, and its key into a slot.

    Raises:
        CacheCorruptionError: the file ends early, or the blob's seal does not fit.
        CacheFullError: no memory or no slot.
        OSError: the disk says no.
    """
    frame = header.frame
    offset = os.fstat(descriptor).st_size - frame.sealed_bytes
    blob = allocate(frame.sealed_bytes)
    key: KeySlot | None = None
    try:
        key = slab.new_key()
        with memoryview(blob) as view:
            if read_at(descriptor, view, offset) < len(view):
                raise CacheCorruptionError("the file ends early")
            header.unwrap_into(keys, key.view)
            require_vouched(key.view, view, frame, header.sha256)
    except BaseException:
        if key is not None:
            key.erase()
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
