"""How much memory there really is, and is left: of the host and of every control group above us.

Control groups are read in the v2 and v1 hierarchies (cgroups(7)); what cannot be read sets no
limit. The roots are arguments only so that a test can give files of its own.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from dgcache_core.settings import MEBIBYTE
from dgcached.pressure import Place

_LARGEST_DEFAULT = 2048 * MEBIBYTE
_OWN_NEEDS = 128 * MEBIBYTE
"""What the daemon takes besides its cache, with room for stores in progress."""
_LIMIT_FILES = ("memory.max", "memory.high", "memory.limit_in_bytes")
_USAGE_FILES = ("memory.current", "memory.usage_in_bytes")
_MEMBERSHIP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_HOST_STALLS = Path("/proc/pressure/memory")
_GROUP_STALLS = "memory.pressure"
_AVERAGE = re.compile(r"^(some|full) avg10=(\d+\.\d+)", re.MULTILINE)


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


def effective_memory_bytes(membership: Path = _MEMBERSHIP, root: Path = _GROUPS) -> int:
    """Return the least of the host's memory and every limit above this process (cgroups(7))."""
    limits = [int(psutil.virtual_memory().total)]
    for group in own_groups(membership, root):
        limits.extend(_limits_of(group))
    return min(limits)


def read_places(
    alarmed: frozenset[Path] = frozenset(),
    membership: Path = _MEMBERSHIP,
    root: Path = _GROUPS,
    host_stalls: Path = _HOST_STALLS,
) -> list[Place]:
    """Return the host and every group above us that has a limit, as they are now.

    Args:
        alarmed: the files of `stall_files` whose trigger went off.
        membership: which groups we are in.
        root: where the hierarchies are mounted.
        host_stalls: the host's PSI file.
    """
    host = psutil.virtual_memory()
    some, full = _stalls(host_stalls)
    places = [
        Place("host", int(host.total), int(host.available), some, full, host_stalls in alarmed)
    ]
    for group in own_groups(membership, root):
        limit = min(_limits_of(group), default=host.total)
        used = _used_bytes(group)
        if limit < host.total and used is not None:
            file = group / _GROUP_STALLS
            name = f"control group {group}"
            places.append(Place(name, limit, max(0, limit - used), *_stalls(file), file in alarmed))
    return places


def stall_files(
    membership: Path = _MEMBERSHIP, root: Path = _GROUPS, host_stalls: Path = _HOST_STALLS
) -> list[Path]:
    """Return the PSI files that tell of us: the host's, our own group's, and those with a limit."""
    wanted = [
        group
        for chain in _chains(membership, root)
        for group in chain
        if group == chain[0] or _limits_of(group)
    ]
    files = [host_stalls, *(group / _GROUP_STALLS for group in wanted)]
    return [file for file in dict.fromkeys(files) if file.exists()]


def _used_bytes(group: Path) -> int | None:
    """What cannot be dropped. At least half of the active page cache can be (MemAvailable assumes
    the same, proc(5)), and all of the inactive."""
    for name in _USAGE_FILES:
        try:
            usage = int((group / name).read_text())
            lines = (group / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        stat = dict(line.split(" ", 1) for line in lines if " " in line)
        total = "total_" if "total_inactive_file" in stat else ""  # v1: with the groups below
        droppable = int(stat.get(total + "inactive_file", 0))
        droppable += int(stat.get(total + "active_file", 0)) // 2
        return max(0, usage - droppable)
    return None


def _stalls(file: Path) -> tuple[float, float]:
    """Return the percentages `some` and `full` of the last ten seconds; 0 where there is no PSI."""
    try:
        text = file.read_text()
    except OSError:
        return 0.0, 0.0
    found = {kind: float(percent) for kind, percent in _AVERAGE.findall(text)}
    return found.get("some", 0.0), found.get("full", 0.0)


def own_groups(membership: Path = _MEMBERSHIP, root: Path = _GROUPS) -> list[Path]:
    """Return the directories of our memory group and of all above it, in v2 and v1 hierarchies."""
    return [group for chain in _chains(membership, root) for group in chain]


def _chains(membership: Path, root: Path) -> list[list[Path]]:
    """Return, for each hierarchy, our own group and all above it."""
    chains: list[list[Path]] = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return chains
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
            chains.append([p for p in (below, *below.parents) if p == base or base in p.parents])
    return chains


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
