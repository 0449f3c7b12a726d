"""Whatever the tier's files hold, a load gives exactly what was kept, or nothing.

Opening the tier never fails for it, files of others stay as they are, and the tier goes on working:
no descriptor, no key slot is lost. Files are edited before the tier is opened and while it is open:
entries of ours, of an earlier generation and of another key, the generation's file, and entries
with a true signature over any header.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dgcache_core import disk_format
from dgcache_core.aead import TAG_BYTES, open_bytes, seal_bytes
from dgcache_core.disk_format import PREFIX_BYTES
from dgcache_core.disk_names import NEW, is_entry_name
from dgcache_core.disk_store import DiskStore
from dgcache_core.errors import CacheCorruptionError
from dgcache_core.references import Sha256
from dgcache_core.tier_keys import MAC_BYTES, Generation, RootKey, TierKeys
from tests.core.support import content, digest_of
from tests.core.tier import OTHER_TIER_KEY, TIER_KEY, Tier

from .structure import Choices, edited
from .worlds import lasting, open_descriptors, require_descriptors

KEPT = {digest_of(data): data for data in (b"", content(100), content(5000))}
FRESH = content(300, 1)
_FORMAT = disk_format.MAGIC + disk_format.VERSION.to_bytes(2)


@dataclass
class World:
    """A directory, and what honest files hold: (name, bytes)."""

    tier: Tier
    keys: TierKeys
    generation: tuple[str, bytes]
    ours: list[tuple[str, bytes]]
    strange: list[tuple[str, bytes]]  # of an earlier generation, of another key
    free_slots: int


def run(data: bytes) -> None:
    """Hold the invariant for one input."""
    world = lasting(_world)
    choices = Choices(data)
    goes_on = choices.below(8) == 1
    _empty(world.tier.path)
    placed = _place_files(world, choices)
    descriptors = open_descriptors()
    store = world.tier.open()
    try:
        _require_exact(world, store)
        _require_left_alone(placed)
        _edit_while_open(world, choices)
        _require_exact(world, store)
        if goes_on:
            assert world.tier.load(store, world.tier.keep(store, FRESH)) == FRESH
    finally:
        world.tier.close()
        world.tier.stores.clear()
        world.tier.events.clear()
    require_descriptors(descriptors)
    assert world.tier.slab.free_slots == world.free_slots, "a key slot is lost"


def _place_files(world: World, choices: Choices) -> dict[Path, bytes]:
    name, honest = world.generation
    placed = {}
    generation = edited(honest, Choices(choices.piece())) if choices.below(4) == 1 else honest
    _write(world.tier.path / name, generation)
    for _ in range(1 + choices.below(3)):
        name, held = _file(world, choices)
        path = world.tier.path / name
        with suppress(OSError):  # a directory, or something of another name, is in the way
            _write(path, held)
            placed[path] = held
    return placed


def _file(world: World, choices: Choices) -> tuple[str, bytes]:
    honest = [*world.ours, *world.strange]
    which, name = choices.below(8), choices.below(8)
    edits = Choices(choices.piece())
    here, held = choices.of(world.ours if which < 6 else world.strange)
    pieces = [data for _, data in honest]
    if which == 0:
        here, held = _signed(world.keys, held, edits)
    elif which == 1:
        held = edits.rest()
    else:
        held = edited(held, edits, pieces)
    if name == 0:
        here = choices.of(honest)[0]
    elif name == 1:
        here = _any_name(choices.take(16).hex())
    return here, held


def _any_name(digits: str) -> str:
    """Return a name like ours, which may have a digit too few or be a temporary one."""
    digits = digits.ljust(32, "0")
    if digits[0] == "0":
        return f"{NEW}/{digits}"
    return f"{digits[:2]}/{digits[2:4]}/{digits[4:].rjust(60, '0')[: 59 + int(digits[1] != '0')]}"


def _signed(keys: TierKeys, honest: bytes, edits: Choices) -> tuple[str, bytes]:
    """Return a file whose header was edited and then encrypted and signed with the true keys."""
    end = int.from_bytes(honest[8:12]) - MAC_BYTES
    prefix = edited(honest[:PREFIX_BYTES], Choices(edits.piece()))[:PREFIX_BYTES]
    prefix = prefix.ljust(PREFIX_BYTES, b"\0")
    plain = bytearray(end - PREFIX_BYTES - TAG_BYTES)
    with memoryview(honest)[PREFIX_BYTES:end] as sealed, memoryview(plain) as into:
        open_bytes(
            keys.header_encryption,
            honest[PREFIX_BYTES - 12 : PREFIX_BYTES],
            sealed,
            honest[:PREFIX_BYTES],
            into,
        )
    changed = edited(bytes(plain), edits)
    resealed = bytearray(len(changed) + TAG_BYTES)
    seal_bytes(
        keys.header_encryption, prefix[-12:], memoryview(changed), prefix, memoryview(resealed)
    )
    header = prefix + resealed
    name = keys.file_name(Sha256(changed[:32].ljust(32, b"\0").hex()))
    return name, header + keys.sign(header) + honest[end + MAC_BYTES :]


def _require_exact(world: World, store: DiskStore) -> None:
    for sha256, plain in KEPT.items():
        with suppress(CacheCorruptionError):
            assert world.tier.load(store, sha256) in (plain, None), "wrong bytes were loaded"


def _require_left_alone(placed: dict[Path, bytes]) -> None:
    for path, held in placed.items():
        short = len(held) < PREFIX_BYTES
        is_ours = not held or held.startswith(_FORMAT[:4] if short else _FORMAT)
        if not is_ours and is_entry_name("/".join(path.parts[-3:])):
            assert path.read_bytes() == held, "a file of somebody else was touched"


def _edit_while_open(world: World, choices: Choices) -> None:
    """Change what is there now, in place."""
    files = world.tier.files()
    if files and choices.below(2):
        path = choices.of(files)
        changed = edited(path.read_bytes(), Choices(choices.rest()))
        _write(path, changed)


def _write(path: Path, data: bytes) -> None:
    for directory in (path.parents[1], path.parent):  # the mode is not that of parents=True
        directory.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)


@contextmanager
def _world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="dgf-") as base:
        tier = Tier(Path(base).resolve() / "tier")
        strange = _kept(tier, OTHER_TIER_KEY)
        strange += _kept(tier, TIER_KEY)
        tier.open().clear(rekey=True)
        tier.close()
        ours = _kept(tier, TIER_KEY, anew=False)
        (generation,) = tier.path.glob("generation-*")
        record = generation.read_bytes()
        root = RootKey(tier.slab, TIER_KEY)
        keys = root.derive(Generation(int.from_bytes(record[6:14]), record[14:46]))
        yield World(tier, keys, (generation.name, record), ours, strange, tier.slab.free_slots)
        tier.close()
        tier.slab.close()


def _kept(tier: Tier, key: bytes, *, anew: bool = True) -> list[tuple[str, bytes]]:
    """Return the files of a tier that kept everything there is, the largest last."""
    if anew and tier.path.exists():
        _empty(tier.path)
    store = tier.open(key)
    for data in KEPT.values():
        tier.keep(store, data)
    tier.close()
    files = [(str(path.relative_to(tier.path)), path.read_bytes()) for path in tier.files()]
    return sorted(files, key=lambda file: len(file[1]))  # their names are other ones at every run
