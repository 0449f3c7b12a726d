"""A sealed blob on its way between tiers: the same encrypted bytes, and the key they need."""

import mmap
from dataclasses import dataclass

from dgcache_core.aead import Frame
from dgcache_core.keyslab import KeySlot
from dgcache_core.references import Deltaspace, Sha256


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """What a tier keeps of another's: borrowed for the call, nothing of it may be kept."""

    frame: Frame
    sha256: Sha256
    blob: memoryview
    key: memoryview
    deltaspaces: list[Deltaspace]

    def __repr__(self) -> str:
        return f"<StoredBlob {self.sha256}, {self.frame.size} bytes>"


@dataclass(frozen=True, slots=True)
class LoadedBlob:
    """What a tier gives back: a private copy and a key of its own, the receiver's to free."""

    frame: Frame
    sha256: Sha256
    blob: mmap.mmap
    key: KeySlot
    deltaspaces: list[Deltaspace]
    expires_in_seconds: float
