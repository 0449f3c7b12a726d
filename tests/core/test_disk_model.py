"""Any order of keeping, loading, evicting, tampering, waiting and restarting, against a model."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dgcache_core.aead import Frame
from dgcache_core.disk_format import MIN_HEADER_BYTES, body_bytes
from dgcache_core.disk_records import DiskEventKind
from dgcache_core.errors import CacheCorruptionError
from dgcache_core.memory import anonymous_memory, page_rounded
from dgcache_core.references import Deltaspace, Sha256

from .support import DETERMINISTIC, content, digest_of
from .tier import TIER_KEY, Tier

PAGES = 20
TTL = 100
SIZES = [0, 1, 5_000, 9_000, 17_000, 24_000, 70_000, 90_000]  # the last is too large
REFERENCES = {digest_of(content(size)): content(size) for size in SIZES}
SPACES = [Deltaspace("bucket", name) for name in ("", "releases", "nightly")]


def file_bytes(digest: Sha256) -> int:
    """Return what the file of a reference takes."""
    body = body_bytes(Frame(len(REFERENCES[digest]), 0, 0))
    return page_rounded(MIN_HEADER_BYTES + body)


@dataclass
class Model:
    """Lists and sums, nothing else. `lru` has the least recently used first."""

    lru: list[Sha256] = field(default_factory=list)
    created: dict[Sha256, float] = field(default_factory=dict)
    bound: set[tuple[Deltaspace, Sha256]] = field(default_factory=set)
    written: set[tuple[Deltaspace, Sha256]] = field(default_factory=set)

    def bytes(self) -> int:
        return sum(map(file_bytes, self.lru))

    def drop(self, digest: Sha256) -> None:
        self.lru.remove(digest)
        del self.created[digest]
        self.bound = {pair for pair in self.bound if pair[1] != digest}
        self.written = {pair for pair in self.written if pair[1] != digest}

    def use(self, digest: Sha256) -> None:
        self.lru.remove(digest)
        self.lru.append(digest)


digests = st.sampled_from(sorted(REFERENCES, key=lambda digest: len(REFERENCES[digest])))
spaces = st.sampled_from(SPACES)


class DiskAgainstAModel(RuleBasedStateMachine):
    """Each step does the same to both; after each step both tell the same."""

    @initialize(persistent=st.booleans())
    def begin(self, persistent: bool) -> None:
        self.key = TIER_KEY if persistent else None
        self.directory = tempfile.TemporaryDirectory(prefix="dgt-")
        self.tier = Tier(Path(self.directory.name).resolve() / "tier")
        self.store = self.tier.open(self.key, PAGES * 4096)
        self.model = Model()

    def teardown(self) -> None:
        self.tier.close()
        self.tier.slab.close()
        self.directory.cleanup()

    @rule(digest=digests, space=spaces)
    def keep(self, digest: Sha256, space: Deltaspace) -> None:
        model = self.model
        kept = self.store.keep(self.tier.blob(REFERENCES[digest], [space], TTL))
        assert kept == (file_bytes(digest) <= PAGES * 4096)
        if not kept:
            return
        if digest not in model.lru:
            while model.bytes() + file_bytes(digest) > PAGES * 4096:
                model.drop(model.lru[0])
            model.lru.append(digest)
            model.created[digest] = self.tier.clock.now
            model.written.add((space, digest))
        model.bound.add((space, digest))

    @rule(digest=digests)
    def load(self, digest: Sha256) -> None:
        found = self.tier.load(self.store, digest)
        if digest in self.model.lru:
            assert found == REFERENCES[digest]
            self.model.use(digest)
        else:
            assert found is None

    @rule(digest=digests, space=spaces)
    def bind(self, digest: Sha256, space: Deltaspace) -> None:
        self.store.bind(space, digest)
        if digest in self.model.lru:
            self.model.bound.add((space, digest))

    @rule(digest=digests)
    def forget(self, digest: Sha256) -> None:
        present = digest in self.model.lru
        assert self.store.forget(digest) == (len(REFERENCES[digest]) if present else 0)
        if present:
            self.model.drop(digest)

    @rule(space=spaces)
    def evict(self, space: Deltaspace) -> None:
        model = self.model
        own = {digest for s, digest in model.bound if s == space}
        model.bound = {pair for pair in model.bound if pair[0] != space}
        gone = own - {digest for _, digest in model.bound}
        freed = self.store.evict(space)
        assert (freed.entries, freed.bytes) == (len(gone), sum(len(REFERENCES[d]) for d in gone))
        for digest in gone:
            model.drop(digest)

    @rule(rekey=st.booleans())
    def clear(self, rekey: bool) -> None:
        assert self.store.clear(rekey=rekey).entries == len(self.model.lru)
        self.model = Model()

    @rule(seconds=st.integers(1, TTL))
    def wait(self, seconds: int) -> None:
        self.tier.advance(seconds)
        now = self.tier.clock.now
        for digest in [d for d, at in self.model.created.items() if at + TTL <= now]:
            self.model.drop(digest)
        self.store.sweep()

    @rule()
    def restart(self) -> None:
        """With a key everything stays but bindings that came later, in the order of making."""
        model = self.model
        self.store = self.tier.open(self.key, PAGES * 4096)
        if self.key is None:
            self.model = Model()
            return
        model.bound = set(model.written)
        # made in the same second, any order is right: take the store's
        known = [entry.sha256 for entry in self.store.entries()][::-1]
        assert sorted(known) == sorted(model.lru)
        assert [model.created[digest] for digest in known] == sorted(model.created.values())
        model.lru = known

    @precondition(lambda self: self.model.lru)
    @rule(data=st.data(), audited=st.booleans())
    def tamper(self, data: st.DataObject, audited: bool) -> None:
        """One byte of one file is changed in place."""
        digest = data.draw(st.sampled_from(self.model.lru))
        with self.store._ring.lend() as keys:
            path = self.tier.path / keys.file_name(digest)
        self.tier.tick()
        position = data.draw(st.integers(0, path.stat().st_size - 1))
        with path.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)
            file.seek(position)
            file.write(bytes((byte[0] ^ 1,)))
        if audited:
            (finding,) = self.store.audit(path)
            assert finding.kind is DiskEventKind.SECURITY
        else:
            try:
                self.store.load(digest, anonymous_memory, self.tier.slab)
                raise AssertionError("it was served")
            except CacheCorruptionError:
                pass
        assert self.tier.take_events() == [DiskEventKind.SECURITY]
        self.model.drop(digest)

    @invariant()
    def tells_the_same(self) -> None:
        store, model = self.store, self.model
        status = store.status()
        assert status.enabled
        assert (status.entries, status.bytes) == (len(model.lru), model.bytes())
        assert status.bytes <= status.max_bytes
        assert status.bindings == len(model.bound)
        entries = store.entries()
        assert [entry.sha256 for entry in entries] == model.lru[::-1]
        now = self.tier.clock.now
        for entry in entries:
            assert entry.deltaspaces == sorted(s for s, d in model.bound if d == entry.sha256)
            assert entry.expires_in_seconds == model.created[entry.sha256] + TTL - now
        for digest in REFERENCES:
            assert store.contains(digest) == (digest in model.lru)
        on_disk = sum(page_rounded(path.stat().st_size) for path in self.tier.files())
        assert on_disk == status.bytes
        assert not self.tier.events


TestDiskAgainstAModel = DiskAgainstAModel.TestCase
TestDiskAgainstAModel.settings = settings(DETERMINISTIC, max_examples=40, stateful_step_count=30)
