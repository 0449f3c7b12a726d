"""Memory over disk in any order of events, against a plain model.

Of storing, looking up, holding, removing, waiting, starting anew, changed files and a lost disk.
"""

import errno
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from dgcache_core.aead import Frame
from dgcache_core.disk_format import MIN_HEADER_BYTES, body_bytes
from dgcache_core.disk_records import DiskEventKind
from dgcache_core.errors import CacheCorruptionError, CacheFullError, CacheMissError
from dgcache_core.handouts import Handout
from dgcache_core.ledger import FileState
from dgcache_core.memory import page_rounded
from dgcache_core.memory_store import _largest_entry
from dgcache_core.references import Deltaspace, Sha256

from .support import DETERMINISTIC, content, digest_of, put, read_all
from .tier import Tier
from .tiers import Tiers

PAGES, FILE_PAGES = 20, 24
TTL = 1000
SIZES = [0, 1, 5_000, 9_000, 17_000, 24_000, 36_864, 50_000]  # the last is too large
REFERENCES = {digest_of(content(size)): content(size) for size in SIZES}
SPACES = [Deltaspace("bucket", name) for name in ("", "releases", "nightly")]


def sealed_bytes(digest: Sha256) -> int:
    """Return what the ciphertext of a reference takes in memory."""
    return page_rounded(Frame(len(REFERENCES[digest]), 0, 0).sealed_bytes)


def plain_bytes(digest: Sha256) -> int:
    """Return what its plaintext takes while it is held."""
    return page_rounded(len(REFERENCES[digest]))


def file_bytes(digest: Sha256) -> int:
    """Return what its file takes."""
    return page_rounded(MIN_HEADER_BYTES + body_bytes(Frame(len(REFERENCES[digest]), 0, 0)))


@dataclass
class Model:
    """Lists and sums, nothing else. Both orders have the least recently used first."""

    memory: list[Sha256] = field(default_factory=list)
    disk: list[Sha256] = field(default_factory=list)
    expires: dict[Sha256, float] = field(default_factory=dict)
    file_expires: dict[Sha256, float] = field(default_factory=dict)
    bound: set[tuple[Deltaspace, Sha256]] = field(default_factory=set)
    file_bound: set[tuple[Deltaspace, Sha256]] = field(default_factory=set)
    written: set[tuple[Deltaspace, Sha256]] = field(default_factory=set)
    holders: dict[Sha256, int] = field(default_factory=dict)
    limit: int = PAGES * 4096
    disk_is_on: bool = True

    def used(self) -> int:
        held = (plain_bytes(digest) for digest, count in self.holders.items() if count)
        return sum(map(sealed_bytes, self.memory)) + sum(held)

    def leave_memory(self, digest: Sha256) -> None:
        self.memory.remove(digest)
        del self.expires[digest]
        self.bound = {pair for pair in self.bound if pair[1] != digest}

    def leave_disk(self, digest: Sha256) -> None:
        self.disk.remove(digest)
        del self.file_expires[digest]
        self.file_bound = {pair for pair in self.file_bound if pair[1] != digest}
        self.written = {pair for pair in self.written if pair[1] != digest}

    def spill(self, digest: Sha256) -> None:
        """Write what leaves memory, unless its file lives as long."""
        if not self.disk_is_on:
            return
        bound = {pair for pair in self.bound if pair[1] == digest}
        if digest in self.disk and self.file_expires[digest] >= self.expires[digest] - 1:
            self.disk.remove(digest)
            self.disk.append(digest)
            self.file_bound |= bound
            return
        if digest in self.disk:
            self.leave_disk(digest)
        while self.disk_used() + file_bytes(digest) > FILE_PAGES * 4096:
            self.leave_disk(self.disk[0])
        self.disk.append(digest)
        self.file_expires[digest] = self.expires[digest]
        self.file_bound |= bound
        self.written |= bound

    def disk_used(self) -> int:
        return sum(map(file_bytes, self.disk))

    def make_room(self, room: int, reading: Sha256 | None = None) -> bool:
        """Let as few as needed leave, oldest first; nobody, where that would not do."""
        missing = self.used() + room - self.limit
        idle = [digest for digest in self.memory if digest != reading]
        if missing > sum(map(sealed_bytes, idle)):
            return False
        for digest in idle:
            if missing > 0:
                missing -= sealed_bytes(digest)
                self.spill(digest)
                self.leave_memory(digest)
        return True

    def restore(self, digest: Sha256) -> bool:
        """Bring it back from disk; False: there is no room in memory."""
        bound = {pair for pair in self.file_bound if pair[1] == digest}
        expires = self.file_expires[digest]
        self.disk.remove(digest)
        self.disk.append(digest)  # a use, whatever comes of it
        if not self.make_room(sealed_bytes(digest)):
            return False
        self.memory.append(digest)
        self.expires[digest] = expires
        self.bound |= bound
        return True


digests = st.sampled_from(sorted(REFERENCES, key=lambda digest: len(REFERENCES[digest])))
spaces = st.sampled_from(SPACES)


class TiersAgainstAModel(RuleBasedStateMachine):
    """Each step does the same to both; after each step both tell the same."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.base = tempfile.TemporaryDirectory(prefix="dgt-")
        self.tiers = Tiers(Tier(Path(self.base.name).resolve() / "tier"))
        self.model = Model()
        self.open: set[int] = set()
        self.retry_at = 0.0
        self.ours: set[int] = set()  # of those, handed out in this life
        self.start()

    def start(self) -> None:
        self.store = self.tiers.open(
            PAGES * 4096, FILE_PAGES * 4096, ttl_seconds=TTL, max_entries=16
        )

    def teardown(self) -> None:
        for fd in self.open:
            os.close(fd)
        self.tiers.close()
        self.tiers.tier.slab.close()
        self.base.cleanup()

    @initialize(chosen=st.lists(digests, max_size=6), space=spaces)
    def have_some(self, chosen: list[Sha256], space: Deltaspace) -> None:
        for digest in chosen:
            self.store_it(digest, space)

    # -- storing and looking up ------------------------------------------------------------------

    @rule(digest=digests, space=spaces)
    def store_it(self, digest: Sha256, space: Deltaspace) -> None:
        self.wait(1)  # no two are of the same second, which is all that a file tells
        model, data = self.model, REFERENCES[digest]
        small_enough = len(data) <= _largest_entry(model.limit)
        fits = small_enough and model.make_room(sealed_bytes(digest))
        try:
            assert put(self.store, data, space, digest) == digest
            assert fits
        except CacheFullError:
            assert not fits
            return
        bound = {pair for pair in model.bound if pair[1] == digest}
        if digest in model.memory:
            model.leave_memory(digest)
        model.memory.append(digest)
        model.expires[digest] = self.now + TTL
        model.bound |= bound | {(space, digest)}

    def look_up(self, digest: Sha256, space: Deltaspace) -> Handout | None:
        model = self.model
        expected = digest in model.memory or (model.disk_is_on and digest in model.disk)
        assert (self.store.miss_reason(space, digest) is None) == expected
        restored = True
        if expected and digest not in model.memory:
            restored = model.restore(digest)
        try:
            handout = self.store.lookup(space, digest)
        except CacheMissError:
            assert not expected
            return None
        except CacheFullError:
            if restored:
                assert not model.holders.get(digest)
                assert not model.make_room(plain_bytes(digest), reading=digest)
            return None
        assert expected
        assert restored
        self.open.add(handout.fd)
        self.ours.add(handout.fd)
        assert model.holders.get(digest) or model.make_room(plain_bytes(digest), reading=digest)
        assert read_all(handout) == REFERENCES[digest]
        model.memory.remove(digest)
        model.memory.append(digest)
        model.bound.add((space, digest))
        return handout

    @rule(digest=digests, space=spaces)
    def read_it(self, digest: Sha256, space: Deltaspace) -> None:
        handout = self.look_up(digest, space)
        if handout is not None:
            self.let_go(handout)

    @precondition(lambda self: self.only_on_disk())
    @rule(data=st.data(), space=spaces)
    def bring_it_back(self, data: st.DataObject, space: Deltaspace) -> None:
        self.read_it(data.draw(st.sampled_from(self.only_on_disk())), space)

    def only_on_disk(self) -> list[Sha256]:
        return [digest for digest in self.model.disk if digest not in self.model.memory]

    @rule(target=held, digest=digests, space=spaces)
    def hold_it(self, digest: Sha256, space: Deltaspace) -> object:
        handout = self.look_up(digest, space)
        if handout is None:
            return multiple()
        self.model.holders[digest] = self.model.holders.get(digest, 0) + 1
        return handout

    @rule(handout=consumes(held))
    def release_it(self, handout: Handout) -> None:
        assert read_all(handout) == REFERENCES[handout.sha256]
        if handout.fd in self.ours:
            self.model.holders[handout.sha256] -= 1
        self.let_go(handout)

    def let_go(self, handout: Handout) -> None:
        self.open.remove(handout.fd)
        self.ours.discard(handout.fd)
        os.close(handout.fd)

    # -- removing --------------------------------------------------------------------------------

    @rule(space=spaces)
    def evict(self, space: Deltaspace) -> None:
        model = self.model
        above = {digest for s, digest in model.bound if s == space}
        below = {digest for s, digest in model.file_bound if s == space}
        model.bound = {pair for pair in model.bound if pair[0] != space}
        model.file_bound = {pair for pair in model.file_bound if pair[0] != space}
        before = {*model.memory, *model.disk}
        for digest in above - {digest for _, digest in model.bound}:
            model.leave_memory(digest)
        for digest in below - {digest for _, digest in model.file_bound}:
            model.leave_disk(digest)
        gone = before - {*model.memory, *model.disk}
        freed = self.store.evict(space)
        assert freed.entries == len(gone)
        assert freed.bytes == sum(len(REFERENCES[digest]) for digest in gone)

    @rule(rekey=st.booleans())
    def clear(self, rekey: bool) -> None:
        model = self.model
        assert self.store.clear(rekey=rekey).entries == len({*model.memory, *model.disk})
        self.forget_everything()
        assert self.tiers.tier.files() == []

    def forget_everything(self) -> None:
        for digest in list(self.model.memory):
            self.model.leave_memory(digest)
        for digest in list(self.model.disk):
            self.model.leave_disk(digest)

    @rule(pages=st.integers(0, PAGES + 1))
    def set_limit(self, pages: int) -> None:
        model = self.model
        model.limit = min(pages, PAGES) * 4096
        gone = []
        while model.memory and model.used() > model.limit:
            gone.append(model.memory[0])
            model.spill(gone[-1])
            model.leave_memory(gone[-1])
        freed = self.store.set_limit(pages * 4096)
        assert (freed.entries, freed.bytes) == (len(gone), sum(map(sealed_bytes, gone)))

    @rule()
    def push_everything_out(self) -> None:
        self.set_limit(0)
        self.set_limit(PAGES)

    @rule(seconds=st.integers(1, TTL))
    def wait(self, seconds: int) -> None:
        self.tiers.tier.advance(seconds)
        self.store.sweep()
        model = self.model
        for digest in [d for d, at in model.expires.items() if at <= self.now]:
            model.leave_memory(digest)
        model.disk_is_on = model.disk_is_on or self.now >= self.retry_at
        for digest in [d for d, at in model.file_expires.items() if at <= self.now]:
            model.leave_disk(digest)

    # -- the world -------------------------------------------------------------------------------

    @rule()
    def restart(self) -> None:
        """In order, with a key that lasts: as much as the disk takes comes along."""
        model, room = self.model, FILE_PAGES * 4096
        for digest in reversed(list(model.memory)):
            room -= sealed_bytes(digest) + 4096
            if room < 0:
                break
            model.spill(digest)
        for digest in list(model.memory):
            model.leave_memory(digest)
        self.ours.clear()  # what is held stays readable, and is nobody's business any more
        model.holders.clear()
        model.disk_is_on = True
        model.limit = PAGES * 4096
        model.file_bound = set(model.written)
        self.start()
        model.disk.sort(key=lambda digest: model.file_expires[digest])  # oldest first

    @precondition(lambda self: self.model.disk_is_on and self.model.disk)
    @rule(data=st.data(), by_audit=st.booleans())
    def tamper(self, data: st.DataObject, by_audit: bool) -> None:
        """Somebody changes a file: whoever meets it first says so, and nobody is served from it."""
        model = self.model
        digest = data.draw(st.sampled_from(model.disk))
        entry = self.tiers.disk._table.index.get(digest)
        assert entry is not None
        path = self.tiers.tier.path / entry.name
        size = path.stat().st_size
        with path.open("r+b") as file:
            position = data.draw(st.integers(0, size - 1))
            file.seek(position)
            before = file.read(1)
            file.seek(position)
            file.write(bytes([before[0] ^ 0x40]))
        while FileState.of(path.stat()) == entry.ledger:  # within one tick of the kernel's clock
            os.utime(path)
        if by_audit or digest in model.memory:
            self.tiers.disk.audit_all()
        else:
            with pytest.raises(CacheCorruptionError):
                self.store.lookup(SPACES[0], digest)
        assert DiskEventKind.SECURITY in self.tiers.tier.take_events()
        model.leave_disk(digest)
        assert not path.exists()

    @precondition(lambda self: self.model.disk_is_on)
    @rule()
    def lose_the_disk(self) -> None:
        """It says no until it is tried again, a minute later."""
        self.tiers.disk._table.note_failure(OSError(errno.EIO, "Input/output error"))
        self.model.disk_is_on, self.retry_at = False, self.now + 60

    # -- what both tell --------------------------------------------------------------------------

    @property
    def now(self) -> float:
        return self.tiers.tier.clock.now

    @invariant()
    def tells_the_same(self) -> None:
        store, model, disk = self.store, self.model, self.tiers.disk
        memory = self.tiers.memory
        memory.sweep()  # what was let go counts until somebody looks
        held = sum(plain_bytes(d) for d, count in model.holders.items() if count)
        assert memory._used_bytes <= max(model.limit, held)
        assert store.status().reserved_bytes == 0
        assert [entry.sha256 for entry in reversed(memory.entries())] == model.memory
        assert disk.status().bytes == model.disk_used() <= FILE_PAGES * 4096
        assert [entry.sha256 for entry in reversed(disk.entries())] == model.disk
        told = {entry.sha256: entry for entry in store.entries()}
        assert set(told) == {*model.memory, *model.disk}
        for digest, entry in told.items():
            on_memory = digest in model.memory
            bound = model.bound if on_memory else model.file_bound
            assert entry.tier == ("memory" if on_memory else "disk")
            assert entry.deltaspaces == sorted(s for s, d in bound if d == digest)
            assert entry.held == (on_memory and bool(model.holders.get(digest)))


TestTiersAgainstAModel = TiersAgainstAModel.TestCase
TestTiersAgainstAModel.settings = settings(DETERMINISTIC, max_examples=100, stateful_step_count=60)
