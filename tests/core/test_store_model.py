"""Any order of storing, looking up, holding, evicting and waiting, against a plain model."""

import os
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from dgcache_core.aead import Frame
from dgcache_core.errors import CacheFullError, CacheMissError, MissReason
from dgcache_core.handouts import Handout
from dgcache_core.memory import page_rounded
from dgcache_core.memory_store import MemoryStore, _largest_entry
from dgcache_core.references import Deltaspace, Sha256

from .support import DETERMINISTIC, HandClock, content, digest_of, put, read_all

PAGES = 20
TTL = 100
SIZES = [0, 1, 5_000, 9_000, 17_000, 24_000, 36_864, 50_000]  # the last is too large
REFERENCES = {digest_of(content(size)): content(size) for size in SIZES}
SPACES = [Deltaspace("bucket", name) for name in ("", "releases", "nightly")]


def sealed_bytes(digest: Sha256) -> int:
    """Return what the ciphertext of a reference takes."""
    return page_rounded(Frame(len(REFERENCES[digest]), 0, 0).sealed_bytes)


def plain_bytes(digest: Sha256) -> int:
    """Return what its plaintext takes while it is held."""
    return page_rounded(len(REFERENCES[digest]))


@dataclass
class Model:
    """Lists and sums, nothing else. `lru` has the least recently used first."""

    lru: list[Sha256] = field(default_factory=list)
    expires: dict[Sha256, float] = field(default_factory=dict)
    bound: set[tuple[Deltaspace, Sha256]] = field(default_factory=set)
    holders: dict[Sha256, int] = field(default_factory=dict)
    past: dict[Sha256, MissReason] = field(default_factory=dict)
    limit: int = PAGES * 4096

    def blob_bytes(self) -> int:
        return sum(map(sealed_bytes, self.lru))

    def handout_bytes(self) -> int:
        return sum(plain_bytes(digest) for digest, count in self.holders.items() if count)

    def drop(self, digest: Sha256, reason: MissReason | None) -> None:
        self.lru.remove(digest)
        del self.expires[digest]
        self.bound = {pair for pair in self.bound if pair[1] != digest}
        if reason is not None:
            self.past[digest] = reason

    def make_room(self, room: int, reading: Sha256 | None = None) -> bool:
        """Evict as few as needed, oldest first; nobody, where that would not do."""
        missing = self.blob_bytes() + self.handout_bytes() + room - self.limit
        idle = [digest for digest in self.lru if digest != reading]
        if missing > sum(map(sealed_bytes, idle)):
            return False
        for digest in idle:
            if missing > 0:
                missing -= sealed_bytes(digest)
                self.drop(digest, MissReason.EVICTED)
        return True

    def why_absent(self, space: Deltaspace, digest: Sha256) -> MissReason:
        if digest in self.past:
            return self.past[digest]
        if any(pair[0] == space for pair in self.bound):
            return MissReason.DIGEST_CHANGED
        return MissReason.UNKNOWN


digests = st.sampled_from(sorted(REFERENCES, key=lambda digest: len(REFERENCES[digest])))
spaces = st.sampled_from(SPACES)


class StoreAgainstAModel(RuleBasedStateMachine):
    """Each step does the same to both; after each step both tell the same."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.clock = HandClock()
        self.store = MemoryStore(PAGES * 4096, TTL, may_fork=True, max_entries=16, clock=self.clock)
        self.model = Model()
        self.open: set[int] = set()

    def teardown(self) -> None:
        for fd in self.open:
            os.close(fd)
        self.store.close()

    @rule(digest=digests, space=spaces)
    def store_it(self, digest: Sha256, space: Deltaspace) -> None:
        model, data = self.model, REFERENCES[digest]
        if len(data) > self.store.max_entry_bytes:
            model.past[digest] = MissReason.TOO_LARGE
            fits = False
        elif len(data) > _largest_entry(model.limit):
            model.past[digest] = MissReason.PRESSURE
            fits = False
        else:
            fits = model.make_room(sealed_bytes(digest))
        try:
            assert put(self.store, data, space, digest) == digest
            assert fits
        except CacheFullError:
            assert not fits
            return
        bound = {pair for pair in model.bound if pair[1] == digest}
        if digest in model.lru:
            model.drop(digest, None)
        model.lru.append(digest)
        model.expires[digest] = self.clock.now + TTL
        model.bound |= bound | {(space, digest)}
        model.past.pop(digest, None)

    def look_up(self, digest: Sha256, space: Deltaspace) -> Handout | None:
        model = self.model
        try:
            handout = self.store.lookup(space, digest)
        except CacheMissError as miss:
            reason = miss.reason
        except CacheFullError:
            assert not model.holders.get(digest)
            assert not model.make_room(plain_bytes(digest), reading=digest)
            return None
        else:
            return self.check(handout, space)
        assert digest not in model.lru
        assert reason == model.why_absent(space, digest)
        return None

    def check(self, handout: Handout, space: Deltaspace) -> Handout:
        model, digest = self.model, handout.sha256
        self.open.add(handout.fd)
        assert digest in model.lru
        assert model.holders.get(digest) or model.make_room(plain_bytes(digest), reading=digest)
        assert read_all(handout) == REFERENCES[digest]
        model.lru.remove(digest)
        model.lru.append(digest)
        model.bound.add((space, digest))
        return handout

    @rule(digest=digests, space=spaces)
    def read_it(self, digest: Sha256, space: Deltaspace) -> None:
        handout = self.look_up(digest, space)
        if handout is not None:
            self.let_go(handout)

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
        self.model.holders[handout.sha256] -= 1
        self.let_go(handout)

    def let_go(self, handout: Handout) -> None:
        self.open.remove(handout.fd)
        os.close(handout.fd)

    @rule(space=spaces)
    def evict(self, space: Deltaspace) -> None:
        model = self.model
        own = {digest for s, digest in model.bound if s == space}
        model.bound = {pair for pair in model.bound if pair[0] != space}
        gone = own - {digest for _, digest in model.bound}
        freed = self.store.evict(space)
        assert freed.entries == len(gone)
        assert freed.bytes == sum(len(REFERENCES[digest]) for digest in gone)
        for digest in gone:
            model.drop(digest, MissReason.EVICTED)

    @rule()
    def clear(self) -> None:
        assert self.store.clear().entries == len(self.model.lru)
        for digest in list(self.model.lru):
            self.model.drop(digest, MissReason.EVICTED)

    @rule(pages=st.integers(0, PAGES + 1))
    def set_limit(self, pages: int) -> None:
        model = self.model
        model.limit = min(pages, PAGES) * 4096
        gone = []
        while model.lru and model.blob_bytes() + model.handout_bytes() > model.limit:
            gone.append(model.lru[0])
            model.drop(gone[-1], MissReason.PRESSURE)
        freed = self.store.set_limit(pages * 4096)
        assert (freed.entries, freed.bytes) == (len(gone), sum(map(sealed_bytes, gone)))

    @rule(seconds=st.integers(1, TTL))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)
        for digest in [d for d, at in self.model.expires.items() if at <= self.clock.now]:
            self.model.drop(digest, MissReason.EXPIRED)

    @invariant()
    def tells_the_same(self) -> None:
        store, model = self.store, self.model
        assert store._used_bytes <= max(model.limit, model.handout_bytes())
        status = store.status()
        assert status.limit_bytes == model.limit
        assert status.reserved_bytes == 0
        assert (status.blob_bytes, status.handout_bytes) == (
            model.blob_bytes(),
            model.handout_bytes(),
        )
        assert (status.entries, status.bindings) == (len(model.lru), len(model.bound))
        entries = store.entries()
        assert [entry.sha256 for entry in entries] == model.lru[::-1]
        for entry in entries:
            assert entry.deltaspaces == sorted(s for s, d in model.bound if d == entry.sha256)
            assert entry.held == bool(model.holders.get(entry.sha256))
        for digest in REFERENCES:
            expected = None if digest in model.lru else model.why_absent(SPACES[1], digest)
            assert store.miss_reason(SPACES[1], digest) == expected


TestStoreAgainstAModel = StoreAgainstAModel.TestCase
TestStoreAgainstAModel.settings = settings(DETERMINISTIC, max_examples=60, stateful_step_count=40)
