"""What goes in and out of the disk tier, and what it says about itself."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from dgcache_core.aead import Frame
from dgcache_core.keyslab import KeySlot
from dgcache_core.references import Deltaspace, Sha256


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A sealed blob that is to be written. The views are only used during the call.

    `expires_in_seconds` is what is left by a clock that does not jump; None takes it from the
    frame and the wall clock.
    """

    frame: Frame
    sha256: Sha256
    blob: memoryview
    key: memoryview = field(repr=False)
    deltaspaces: list[Deltaspace]
    expires_in_seconds: float | None = None


@dataclass(slots=True)
class LoadedBlob:
    """A sealed blob in memory of its own. Whoever gets it erases the key and closes the mapping.

    Header and seal are checked, the chunks are not: `open_chunk` does that where they are used.
    """

    frame: Frame
    sha256: Sha256
    blob: mmap.mmap
    key: KeySlot
    deltaspaces: list[Deltaspace]
    expires_in_seconds: float


class DiskEventKind(StrEnum):
    """What happened, for people and for counting."""

    SECURITY = "security"  # somebody else changed a file of ours
    CORRUPT = "corrupt"  # a check failed: tampered or rotten
    REMOVED = "removed"  # somebody else removed a file of ours
    FOREIGN = "foreign"  # something that is not ours is in the way; it was left alone
    DISABLED = "disk-disabled"
    ENABLED = "disk-enabled"


@dataclass(frozen=True, slots=True)
class DiskEvent:
    """Something that people should know of. `name` is relative to the tier's directory."""

    kind: DiskEventKind
    name: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}: {self.message}" if self.name else self.message


OnDiskEvent = Callable[[DiskEvent], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """What an audit found; its entry, if there was one, is gone already."""

    kind: DiskEventKind
    name: str
    message: str


@dataclass(slots=True)
class DiskCounters:
    """What happened since the tier was opened."""

    loads: int = 0
    loaded_bytes: int = 0
    keeps: int = 0
    kept_bytes: int = 0
    evictions: int = 0
    expirations: int = 0
    corruptions: int = 0
    alarms: int = 0
    foreign_files: int = 0
    other_key_files: int = 0


@dataclass(frozen=True, slots=True)
class DiskEntryInfo:
    """One entry, for people. Times are seconds: ages and what is left, not dates."""

    sha256: Sha256
    size: int
    file_bytes: int
    deltaspaces: list[Deltaspace]
    age_seconds: float
    expires_in_seconds: float
    loads: int


@dataclass(frozen=True, slots=True)
class DiskStatus:
    """How full the tier is. Bytes are whole blocks of 4096, headers included.

    `is_scanned` is False while files of a former life are still being looked at.
    """

    directory: str
    enabled: bool
    disabled_reason: str
    persistent: bool
    is_scanned: bool
    entries: int
    bindings: int
    bytes: int
    max_bytes: int
    key_protection: str
    counters: DiskCounters
