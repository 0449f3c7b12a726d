"""What root sees of another process's keys: the region they are in, and every copy of them.

Root may read the memory of any process, except memfd_secret; so a process whose keys are looked at
is one that got none (RLIMIT_MEMLOCK 0, as an ordinary user).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping of a process, as proc(5) has it in smaps."""

    start: int
    end: int
    name: str
    flags: frozenset[str]
    locked_kib: int


def mappings(pid: int) -> list[Mapping]:
    """Return every mapping of a process."""
    found = []
    text = Path(f"/proc/{pid}/smaps").read_text()
    for block in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE):
        if not block:
            continue
        head, *fields = block.splitlines()
        span, *rest = head.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        values = dict(field.split(":", 1) for field in fields)
        found.append(
            Mapping(
                start,
                end,
                rest[4].strip() if len(rest) > 4 else "",
                frozenset(values["VmFlags"].split()),
                int(values["Locked"].split()[0]),
            )
        )
    return found


def key_regions(pid: int) -> list[Mapping]:
    """Return where keys are: memfd_secret, or what is wiped in a child and left out of dumps."""
    return [
        mapping
        for mapping in mappings(pid)
        if "secretmem" in mapping.name or {"wf", "dd"} <= mapping.flags
    ]


def keys_of(pid: int) -> set[bytes]:
    """Return the keys in the region of a process that has an ordinary one."""
    (region,) = key_regions(pid)
    page = read_memory(pid, region)
    slots = (page[at : at + KEY_BYTES] for at in range(0, len(page), KEY_BYTES))
    return {slot for slot in slots if any(slot)}


def copies_of(pid: int, keys: set[bytes]) -> dict[bytes, int]:
    """Count where each key is in all of a process's memory that can be read."""
    counts = dict.fromkeys(keys, 0)
    for piece in _readable(pid):
        for key in keys:
            counts[key] += piece.count(key)
    return counts


def read_memory(pid: int, mapping: Mapping) -> bytes:
    """Return what is in a mapping; empty where the kernel shows it to nobody."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123 - unbuffered
        try:
            memory.seek(mapping.start)
            return memory.read(mapping.end - mapping.start)
        except (OSError, OverflowError):
            return b""


def _readable(pid: int) -> Iterator[bytes]:
    for mapping in mappings(pid):
        if "rd" in mapping.flags:
            yield read_memory(pid, mapping)
