"""How much memory there really is: the least of the host's and of every control group above us."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from dgcache_core.settings import MEBIBYTE

_LARGEST_DEFAULT = 2048 * MEBIBYTE
_OWN_NEEDS = 128 * MEBIBYTE
"""What the daemon takes besides its cache, with room for stores in progress."""
_LIMIT_FILES = ("memory.max", "memory.high", "memory.limit_in_bytes")


@dataclass(frozen=True, slots=True)
class Budget:
    """The cache's byte budget and why it is what it is."""

    max_bytes: int
    effective_bytes: int
    wanted_bytes: int | None

    @property
    def clamped(self) -> bool:
        """Tell whether more was wanted than there is."""
        return self.wanted_bytes is not None and self.wanted_bytes > self.max_bytes


def choose_budget(wanted_mb: float | None, effective_bytes: int | None = None) -> Budget:
    """Return the wanted budget, clamped to what there is, or a tenth of that by default."""
    effective = effective_bytes or effective_memory_bytes()
    if wanted_mb is None:
        return Budget(min(effective // 10, _LARGEST_DEFAULT), effective, None)
    wanted = int(wanted_mb * MEBIBYTE)
    largest = max(effective - _OWN_NEEDS, effective // 2)
    return Budget(min(wanted, largest), effective, wanted)


def effective_memory_bytes(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return the least of the host's memory and every limit above this process (cgroups(7))."""
    limits = [int(psutil.virtual_memory().total)]
    for group in _groups(membership, root):
        limits.extend(_limits_of(group))
    return min(limits)


def _groups(membership: Path, root: Path) -> list[Path]:
    """Return the directories of our memory group and of all above it, in v2 and v1 hierarchies."""
    groups: list[Path] = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return groups
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            bases = [root, root / "unified"]
        elif "memory" in controllers.split(","):
            bases = [root / "memory"]
        else:
            continue
        for base in bases:
            below = base / path.lstrip("/")
            groups += [p for p in (below, *below.parents) if p == base or base in p.parents]
    return groups


def _limits_of(group: Path) -> list[int]:
    limits = []
    for name in _LIMIT_FILES:
        try:
            text = (group / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # "max" is no limit
            limits.append(int(text))
    return limits
