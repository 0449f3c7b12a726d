"""Which deltaspaces a blob serves: many to many, bounded, the newest binding is the current one."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dgcache_core.bindings import Bindings
from dgcache_core.references import Deltaspace, Sha256

from .support import DETERMINISTIC, NIGHTLY, RELEASES, digest_of

A, B, C = (digest_of(name) for name in (b"a", b"b", b"c"))


def test_a_deltaspace_bound_anew_keeps_its_old_blob() -> None:
    """Staging and production use the same bucket and prefix, and both go on hitting."""
    bindings = Bindings()
    bindings.bind(RELEASES, A)
    bindings.bind(RELEASES, B)
    assert bindings.current(RELEASES) == B
    assert bindings.deltaspaces(A) == bindings.deltaspaces(B) == [RELEASES]


def test_binding_again_makes_an_old_binding_the_current_one() -> None:
    """It is the order of binding that counts, not of first binding."""
    bindings = Bindings()
    for digest in (A, B, A):
        bindings.bind(RELEASES, digest)
    assert bindings.current(RELEASES) == A
    assert len(bindings) == 2


def test_unbinding_names_only_the_blobs_that_serve_nobody_else() -> None:
    """A shared blob stays with the other deltaspace."""
    bindings = Bindings()
    bindings.bind(RELEASES, A)
    bindings.bind(RELEASES, B)
    bindings.bind(NIGHTLY, B)
    assert bindings.unbind(RELEASES) == [A]
    assert bindings.unbind(RELEASES) == []
    assert bindings.unbind(NIGHTLY) == [B]
    assert len(bindings) == 0


def test_forgetting_a_blob_leaves_the_deltaspaces_their_others() -> None:
    """The binding before becomes the current one."""
    bindings = Bindings()
    for digest in (A, B):
        bindings.bind(RELEASES, digest)
    bindings.bind(NIGHTLY, B)
    bindings.forget(B)
    assert bindings.current(RELEASES) == A
    assert bindings.current(NIGHTLY) is None
    bindings.forget(C)
    assert len(bindings) == 1


def test_past_its_bound_a_deltaspace_forgets_its_oldest_binding() -> None:
    """Seventeen digests in one deltaspace: the first is bound no more."""
    bindings = Bindings(max_per_deltaspace=16)
    digests = [digest_of(bytes([n])) for n in range(17)]
    for digest in digests:
        bindings.bind(RELEASES, digest)
    assert len(bindings) == 16
    assert bindings.deltaspaces(digests[0]) == []
    assert bindings.deltaspaces(digests[1]) == [RELEASES]


def test_past_its_bound_the_table_forgets_the_deltaspace_bound_longest_ago() -> None:
    """Binding once more counts as use."""
    bindings = Bindings(max_deltaspaces=3)
    spaces = [Deltaspace("bucket", str(n)) for n in range(4)]
    for space in (*spaces[:3], spaces[0], spaces[3]):
        bindings.bind(space, A)
    assert bindings.deltaspaces(A) == [spaces[0], spaces[2], spaces[3]]


def test_the_table_is_bounded_by_default() -> None:
    """A client that binds for ever does not grow the daemon for ever."""
    bindings = Bindings()
    for n in range(66_000):
        bindings.bind(Deltaspace("bucket", str(n)), A)
    assert len(bindings) == len(bindings.deltaspaces(A)) == 65_536


def test_deltaspaces_come_sorted() -> None:
    """So that people find them."""
    bindings = Bindings()
    spaces = [Deltaspace("b", "z"), Deltaspace("a", "z"), Deltaspace("a", ""), Deltaspace("b", "a")]
    for space in spaces:
        bindings.bind(space, A)
    assert bindings.deltaspaces(A) == sorted(spaces)


DIGESTS = st.sampled_from([digest_of(bytes([n])) for n in range(6)])
SPACES = st.sampled_from([Deltaspace("bucket", str(n)) for n in range(6)])
MAX_SPACES, MAX_PER_SPACE = 4, 3


class BindingsAgainstAModel(RuleBasedStateMachine):
    """The model is a list of pairs, in the order of binding."""

    def __init__(self) -> None:
        super().__init__()
        self.bindings = Bindings(MAX_SPACES, MAX_PER_SPACE)
        self.pairs: list[tuple[Deltaspace, Sha256]] = []
        self.bound: list[Deltaspace] = []  # the deltaspaces, in the order of their last binding

    def spaces(self) -> list[Deltaspace]:
        """Return the model's deltaspaces, the one bound longest ago first."""
        return sorted({space for space, _ in self.pairs}, key=self.bound.index)

    @rule(space=SPACES, digest=DIGESTS)
    def bind(self, space: Deltaspace, digest: Sha256) -> None:
        self.bindings.bind(space, digest)
        self.bound = [other for other in self.bound if other != space] + [space]
        self.pairs = [pair for pair in self.pairs if pair != (space, digest)] + [(space, digest)]
        own = [pair for pair in self.pairs if pair[0] == space]
        if len(own) > MAX_PER_SPACE:
            self.pairs.remove(own[0])
        if len(self.spaces()) > MAX_SPACES:
            oldest = self.spaces()[0]
            self.pairs = [pair for pair in self.pairs if pair[0] != oldest]

    @rule(space=SPACES)
    def unbind(self, space: Deltaspace) -> None:
        own = [digest for s, digest in self.pairs if s == space]
        self.pairs = [pair for pair in self.pairs if pair[0] != space]
        serving = {digest for _, digest in self.pairs}
        assert self.bindings.unbind(space) == [d for d in own if d not in serving]

    @rule(digest=DIGESTS)
    def forget(self, digest: Sha256) -> None:
        self.bindings.forget(digest)
        self.pairs = [pair for pair in self.pairs if pair[1] != digest]

    @rule(space=SPACES)
    def current(self, space: Deltaspace) -> None:
        own = [digest for s, digest in self.pairs if s == space]
        assert self.bindings.current(space) == (own[-1] if own else None)

    @rule(digest=DIGESTS)
    def deltaspaces(self, digest: Sha256) -> None:
        assert self.bindings.deltaspaces(digest) == sorted(s for s, d in self.pairs if d == digest)

    @invariant()
    def counts(self) -> None:
        assert len(self.bindings) == len(self.pairs)


TestBindingsAgainstAModel = BindingsAgainstAModel.TestCase
TestBindingsAgainstAModel.settings = DETERMINISTIC
