"""Which keys the disk tier uses now, and until when the ones before must stay.

Keys are lent for the length of one operation and are zeroed when they are no longer the current
ones and nobody uses them. For a key that outlives the process the generation is kept in a signed
file, `generation-<key id>`; whoever has neither that file nor the key can read nothing. A file that
fails its check is replaced by a new generation, which makes the entries before unreadable.
"""

import hmac
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dgcache_core.disk_files import TierDirectory, require_own_file
from dgcache_core.disk_names import GENERATION
from dgcache_core.errors import CacheRefusedError, CacheUnavailableError
from dgcache_core.keyslab import KeySlab
from dgcache_core.sealed_files import read_at, write_at
from dgcache_core.tier_keys import MAC_BYTES, SALT_BYTES, Generation, RootKey, TierKeys

_MAGIC = b"DGCG"
_VERSION = 2
_RECORD = struct.Struct(f">4sHQ{SALT_BYTES}s")
_FILE_BYTES = _RECORD.size + MAC_BYTES
_SLOTS = 64  # 4 for each generation in use, one for the key itself, one to sign with


class KeyRing:
    """The root key, the current generation's keys, and the past ones somebody still uses."""

    def __init__(
        self, directory: TierDirectory, key: memoryview | bytes | None, *, may_fork: bool
    ) -> None:
        """Take the key, and the generation from its file; make one where there is none.

        Raises:
            SettingsError: the key does not have 32 bytes.
            OSError: the generation cannot be read or written.
        """
        self._directory = directory
        self._lock = threading.Lock()
        self._renewing = threading.Lock()
        self._users: dict[TierKeys, int] = {}
        self._slab = KeySlab(_SLOTS, may_fork=may_fork)
        self._when_unused: Callable[[], None] | None = None
        self.tampering = ""
        """What was wrong with the generation's file, else empty."""
        try:
            self._root = RootKey(self._slab, key)
            generation = self._read() or self._write(counter=1)
            self._current = self._root.derive(generation)
            self._users[self._current] = 0
        except BaseException:
            self._slab.close()
            raise

    @property
    def protection(self) -> str:
        """What keeps the keys from swap and core dumps."""
        return str(self._slab.protection)

    @property
    def is_persistent(self) -> bool:
        """Tell whether the key outlives this process."""
        return not self._root.is_ephemeral

    @property
    def generation_name(self) -> str:
        """The name of the generation's file, also where there is none."""
        return f"{GENERATION}{self._root.key_id.hex()}"

    @contextmanager
    def lend(self) -> Iterator[TierKeys]:
        """Lend the current keys; they stay as they are for the length of the block.

        Raises:
            CacheUnavailableError: the ring is closed.
        """
        with self._lock:
            if self._when_unused is not None:
                raise CacheUnavailableError("this store is closed")
            keys = self._current
            self._users[keys] += 1
        try:
            yield keys
        finally:
            with self._lock:
                self._users[keys] -= 1
                last = self._erase_unused()
            if last is not None:
                last()

    def is_current(self, keys: TierKeys) -> bool:
        """Tell whether keys that were lent are still the ones in use."""
        return keys is self._current

    def renew(self) -> None:
        """Begin a new generation: what was written before can never be read again.

        Raises:
            OSError: its file cannot be written; the generation is the one before.
            CacheFullError: too many generations are still in use.
        """
        with self._renewing:
            keys = self._root.derive(self._write(self._current.generation.counter + 1))
            with self._lock:
                self._users[keys] = 0
                self._current = keys
                self._erase_unused()

    def close(self, then: Callable[[], None]) -> None:
        """Lend no more; zero every key and call `then` when nobody uses one. Once only."""
        with self._lock:
            if self._when_unused is not None:
                return
            self._when_unused = then
            last = self._erase_unused()
        if last is not None:
            last()

    def _erase_unused(self) -> Callable[[], None] | None:
        for keys in [keys for keys, users in self._users.items() if not users]:
            if keys is not self._current or self._when_unused is not None:
                del self._users[keys]
                keys.erase()
        if self._when_unused is None or self._users:
            return None
        self._slab.close()
        return self._when_unused

    # -- the generation's file -------------------------------------------------------------------

    def _read(self) -> Generation | None:
        if self._root.is_ephemeral:
            return None
        data = bytearray(_FILE_BYTES + 1)
        try:
            with self._directory.opened(self.generation_name) as descriptor:
                require_own_file(self.generation_name, os.fstat(descriptor))
                length = read_at(descriptor, memoryview(data), 0)
        except FileNotFoundError:
            return None
        except CacheRefusedError as error:
            self.tampering = str(error)
            self._directory.remove_links(self.generation_name)
            return None
        record, mac = bytes(data[: _RECORD.size]), bytes(data[_RECORD.size : length])
        if not hmac.compare_digest(self._root.sign_generation(record), mac):
            self.tampering = f"the signature of {self.generation_name} does not fit"
            return None
        magic, version, counter, salt = _RECORD.unpack(record)
        if (magic, version) != (_MAGIC, _VERSION):
            self.tampering = f"{self.generation_name} is of another version"
            return None
        return Generation(counter, salt)

    def _write(self, counter: int) -> Generation:
        generation = Generation(counter, os.urandom(SALT_BYTES))
        if not self._root.is_ephemeral:
            record = _RECORD.pack(_MAGIC, _VERSION, counter, generation.salt)
            data = record + self._root.sign_generation(record)
            with self._directory.new_file(len(data)) as (new, descriptor):
                write_at(descriptor, memoryview(data), 0)
                os.fsync(descriptor)
                self._directory.publish(new, self.generation_name, durable=True)
        return generation
