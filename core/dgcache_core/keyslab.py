"""The page of keys: one locked region of memory, one 32-byte slot per entry.

A key is born in its slot (read(2) straight from the kernel's generator), is used through a
memoryview of the slot, and dies when the slot is zeroed; it is never a `bytes`. What the region is
made of is chosen once, best first:

- `memfd_secret(2)`: unmapped from the kernel's own view of memory; used where the process does not
  fork, since such pages are shared with a child;
- anonymous memory that is locked (mlock(2)), left out of core dumps, and zero in a forked child
  (madvise(2), MADV_WIPEONFORK);
- the same without the lock, where RLIMIT_MEMLOCK forbids it. `protection` tells which one it is.
"""

import ctypes
import mmap
import os
import threading
from enum import StrEnum
from pathlib import Path

from dgcache_core.errors import CacheFullError

KEY_BYTES = 32

_SYS_MEMFD_SECRET = 447  # the same number on every architecture that has it
_MADV_WIPEONFORK = 18
_MAP_FAILED = ctypes.c_void_p(-1).value
_URANDOM = Path("/dev/urandom")


class KeyProtection(StrEnum):
    """What keeps the keys from swap, core dumps and other processes."""

    SECRET_MEMORY = "memfd_secret"  # noqa: S105 - the name of a system call
    LOCKED = "locked"
    UNLOCKED = "unlocked"


class KeySlot:
    """One key's place. `view` is valid until `erase`."""

    __slots__ = ("_index", "_slab", "view")

    def __init__(self, slab: "KeySlab", index: int, view: memoryview) -> None:
        self._slab = slab
        self._index = index
        self.view = view

    def erase(self) -> None:
        """Zero the key and give the slot back. A second call does nothing."""
        if self._index >= 0:
            index, self._index = self._index, -1
            self._slab._take_back(index, self.view)

    def __repr__(self) -> str:
        return f"<KeySlot {'erased' if self._index < 0 else 'in use'}>"


class KeySlab:
    """A fixed number of key slots in one protected region. Thread-safe."""

    def __init__(self, slots: int, *, may_fork: bool) -> None:
        """Map the region.

        Args:
            slots: how many keys can exist at once.
            may_fork: True in a process that may fork: its child must find zeros, never keys.
        """
        self._bytes = -(-slots * KEY_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        self._slots = slots
        self._free = list(range(slots - 1, -1, -1))
        self._lock = threading.Lock()
        self._retired = False
        self._address, self.protection = _map_region(self._bytes, may_fork=may_fork)
        array = (ctypes.c_ubyte * self._bytes).from_address(self._address)
        self._view = memoryview(array).cast("B")

    def new_key(self) -> KeySlot:
        """Return a slot with a fresh random key.

        Raises:
            CacheFullError: every slot is in use, no descriptor is left, or the slab is closed or
                retired.
        """
        with self._lock:
            if self._retired:
                raise CacheFullError("these keys were rotated away")
            if not self._free or not self._address:
                raise CacheFullError("every key slot is in use")
            index = self._free.pop()
        slot = KeySlot(self, index, self._view[index * KEY_BYTES : (index + 1) * KEY_BYTES])
        try:
            _fill_from_urandom(slot.view)
        except OSError as error:
            slot.erase()
            raise CacheFullError(f"no descriptor to make a key with: {error.strerror}") from error
        return slot

    @property
    def has_free_slot(self) -> bool:
        """Tell whether there is a slot for one more key."""
        return bool(self._free)

    @property
    def free_slots(self) -> int:
        """How many more keys there is room for."""
        return len(self._free)

    def owns(self, slot: KeySlot) -> bool:
        """Tell whether a slot is one of this slab's."""
        return slot._slab is self

    def retire(self) -> None:
        """Make no key any more; the region goes when the last slot that is in use was erased."""
        with self._lock:
            self._retired = True
            self._unmap_if_unused()

    def close(self) -> None:
        """Zero every key and unmap the region; no slot may be used afterwards."""
        with self._lock:
            self._unmap()

    def _take_back(self, index: int, view: memoryview) -> None:
        with self._lock:
            if self._address:  # a closed slab has zeroed every key, and unmapped them
                view[:] = bytes(KEY_BYTES)
                self._free.append(index)
            view.release()
            self._unmap_if_unused()

    # -- the lock is held in both below -----------------------------------------------------------

    def _unmap(self) -> None:
        if self._address:
            address, self._address = self._address, 0
            ctypes.memset(address, 0, self._bytes)
            self._view.release()
            _libc().munmap(ctypes.c_void_p(address), ctypes.c_size_t(self._bytes))

    def _unmap_if_unused(self) -> None:
        if self._retired and len(self._free) == self._slots:
            self._unmap()

    def __repr__(self) -> str:
        return f"<KeySlab {self.protection}, {len(self._free)} slots free>"


def _fill_from_urandom(view: memoryview) -> None:
    descriptor = os.open(_URANDOM, os.O_RDONLY | os.O_CLOEXEC)
    try:
        filled = 0
        while filled < len(view):
            filled += os.readv(descriptor, [view[filled:]])
    finally:
        os.close(descriptor)


def _map_region(size: int, *, may_fork: bool) -> tuple[int, KeyProtection]:
    if not may_fork:
        address = _map_secret_memory(size)
        if address:
            return address, KeyProtection.SECRET_MEMORY
    address = _map(size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    if not address:
        raise MemoryError(f"no memory for {size} bytes of keys")
    libc = _libc()
    region, length = ctypes.c_void_p(address), ctypes.c_size_t(size)
    libc.madvise(region, length, mmap.MADV_DONTDUMP)
    if libc.madvise(region, length, _MADV_WIPEONFORK) != 0:
        raise OSError(ctypes.get_errno(), "madvise(MADV_WIPEONFORK): Linux 4.14 or newer is needed")
    locked = libc.mlock(region, length) == 0
    return address, KeyProtection.LOCKED if locked else KeyProtection.UNLOCKED


def _map_secret_memory(size: int) -> int:
    """Return the address of secret memory, or 0 where the kernel has none or RLIMIT_MEMLOCK is
    too small."""
    descriptor = _libc().syscall(_SYS_MEMFD_SECRET, os.O_CLOEXEC)
    if descriptor < 0:
        return 0
    try:
        os.ftruncate(descriptor, size)
        return _map(size, mmap.MAP_SHARED, descriptor)
    finally:
        os.close(descriptor)  # from here on only the mapping leads to the pages


def _map(size: int, flags: int, descriptor: int) -> int:
    """mmap(2) without Python's mmap object, which would keep a duplicate of the descriptor."""
    libc = _libc()
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(
        None,
        ctypes.c_size_t(size),
        mmap.PROT_READ | mmap.PROT_WRITE,
        flags,
        descriptor,
        ctypes.c_long(0),
    )
    return 0 if address in (None, _MAP_FAILED) else int(address)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
