"""Versions of an archive: real .zip files that differ as releases of a program differ.

Every version is a zip of members of 1 MB, stored, not compressed, as in an archive of images or
packages. From one version to the next one run of bytes in every member is replaced, 1 % of it; the
rest stays where it was, so that xdelta3 finds it. The bytes depend on the seed, the size and the
version alone.
"""

import hashlib
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

MEGABYTE = 1_000_000
CHANGED_SHARE = 100  # one byte in so many is replaced
_EPOCH = (2026, 1, 1, 0, 0, 0)
_UNIX = 3


def write_version(
    destination: Path,
    *,
    megabytes: int,
    version: int,
    seed: str = "dg-cached",
    after_member: Callable[[], None] = lambda: None,
) -> None:
    """Write one version of the archive.

    Args:
        destination: the file to make, `.zip`.
        megabytes: its size, beside some hundred bytes of headers a member.
        version: 1 for the first; each holds the changes of all before it.
        seed: another seed makes another archive.
        after_member: called after each member; an exception it raises ends the work.
    """
    with zipfile.ZipFile(destination, "w", zipfile.ZIP_STORED) as archive:
        for number in range(megabytes):
            entry = zipfile.ZipInfo(f"release/part-{number:05}.bin", _EPOCH)
            entry.create_system = _UNIX
            archive.writestr(entry, _member(seed, number, version))
            after_member()


def _member(seed: str, number: int, version: int) -> bytes:
    content = bytearray(hashlib.shake_128(f"{seed}/{number}".encode()).digest(MEGABYTE))
    run = MEGABYTE // CHANGED_SHARE
    for step in range(2, version + 1):
        dice = random.Random(f"{seed}/{number}/{step}")  # noqa: S311 - must be the same each time
        start = dice.randrange(MEGABYTE - run)
        content[start : start + run] = dice.randbytes(run)
    return bytes(content)
