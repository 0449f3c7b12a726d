"""Whether plaintext can be found on disk: in files with a name, and in those that have none.

Searched for are pieces of a random reference, so that nothing is found by chance. A nameless file
(open(2), O_TMPFILE) shows only in the descriptors and mappings of whoever has it.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_NEEDLE_BYTES = 64
_NEEDLES = 8
_PIECE_BYTES = 1 << 20


def needles(plaintext: bytes) -> list[bytes]:
    """Return pieces from all over the plaintext."""
    step = max(1, (len(plaintext) - _NEEDLE_BYTES) // (_NEEDLES - 1))
    return [plaintext[n * step : n * step + _NEEDLE_BYTES] for n in range(_NEEDLES)]


def files_below(place: Path) -> list[Path]:
    """Return every regular file below a directory; links are not followed."""
    return [path for path in sorted(place.rglob("*")) if stat.S_ISREG(path.lstat().st_mode)]


def files_with_plaintext(place: Path, plaintext: bytes) -> list[Path]:
    """Return the files with a name that hold a piece of the plaintext."""
    return [path for path in files_below(place) if _is_in(path.read_bytes(), plaintext)]


def holds_plaintext(place: Path, plaintext: bytes) -> bool:
    """Tell whether a file of this process, on the file system of `place`, holds plaintext."""
    device = place.stat().st_dev
    return any(_is_in(content, plaintext) for content in (*_open_files(device), *_mapped(device)))


def _is_in(content: bytes, plaintext: bytes) -> bool:
    return any(needle in content for needle in needles(plaintext))


def _open_files(device: int) -> Iterator[bytes]:
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own descriptor, or one that was closed
            status = link.stat()
            if status.st_dev == device and stat.S_ISREG(status.st_mode) and not status.st_nlink:
                yield link.read_bytes()


def _mapped(device: int) -> Iterator[bytes]:
    """Yield what is mapped from nameless files on a device (proc_pid_maps(5))."""
    with Path("/proc/self/mem").open("rb", buffering=0) as memory:
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, modes, _, on, *_ = line.split(maxsplit=5)
            major, minor = (int(number, 16) for number in on.split(":"))
            nameless = line.endswith(" (deleted)")
            if os.makedev(major, minor) != device or not nameless or modes[0] != "r":
                continue
            first, last = (int(address, 16) for address in addresses.split("-"))
            memory.seek(first)
            yield memory.read(last - first)
