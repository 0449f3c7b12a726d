"""What is called how in the tier's directory, and where that directory is."""

import re
from pathlib import Path

from dgcache_core.runtime_directory import machine_key

LOCK = "tier.lock"
NEW = "new"
GENERATION = "generation-"

_LEVELS = re.compile(r"[0-9a-f]{2}(/[0-9a-f]{2})?")
_ENTRY = re.compile(r"[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{60}")
_TEMPORARY = re.compile(rf"{NEW}/[0-9a-f]{{32}}")


def tier_directory(base: Path) -> Path:
    """Return the tier's directory below `DG_CACHE_DIR`: one for each machine that shares a home."""
    return base / "v2" / "disk" / machine_key()


def is_level_name(name: str) -> bool:
    """Tell whether a name is one that the directories of entries have: `ab` or `ab/cd`."""
    return _LEVELS.fullmatch(name) is not None


def is_entry_name(name: str) -> bool:
    """Tell whether a name is one that entries have."""
    return _ENTRY.fullmatch(name) is not None


def is_temporary_name(name: str) -> bool:
    """Tell whether a name is one that files have while they are written."""
    return _TEMPORARY.fullmatch(name) is not None


def is_ours(name: str) -> bool:
    """Tell whether something in the top directory has a name of ours."""
    return name in (LOCK, NEW) or name.startswith(GENERATION) or is_level_name(name)
