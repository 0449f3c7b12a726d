"""Which deltaspaces a blob serves: many to many, since a deltaspace bound anew keeps its old blob.

(The same bucket and prefix on two endpoints, staging and production, must both go on hitting.)
Not thread-safe: the store's lock covers it.
"""

from collections import OrderedDict

from dgcache_core.references import Deltaspace, Sha256


class Bindings:
    """A bounded table: past `max_deltaspaces` the one bound longest ago is forgotten."""

    def __init__(self, max_deltaspaces: int = 65_536, max_per_deltaspace: int = 16) -> None:
        self._max_deltaspaces = max_deltaspaces
        self._max_per_deltaspace = max_per_deltaspace
        self._blobs: OrderedDict[Deltaspace, OrderedDict[Sha256, None]] = OrderedDict()
        self._deltaspaces: dict[Sha256, set[Deltaspace]] = {}

    def bind(self, deltaspace: Deltaspace, sha256: Sha256) -> None:
        """Let the deltaspace name the blob; its newest binding is the current one."""
        blobs = self._blobs.setdefault(deltaspace, OrderedDict())
        blobs[sha256] = None
        blobs.move_to_end(sha256)
        self._blobs.move_to_end(deltaspace)
        self._deltaspaces.setdefault(sha256, set()).add(deltaspace)
        if len(blobs) > self._max_per_deltaspace:
            self._drop(deltaspace, next(iter(blobs)))
        if len(self._blobs) > self._max_deltaspaces:
            self.unbind(next(iter(self._blobs)))

    def current(self, deltaspace: Deltaspace) -> Sha256 | None:
        """Return the digest the deltaspace was bound to last."""
        blobs = self._blobs.get(deltaspace)
        return next(reversed(blobs)) if blobs else None

    def deltaspaces(self, sha256: Sha256) -> list[Deltaspace]:
        """Return the deltaspaces a blob serves, sorted."""
        return sorted(self._deltaspaces.get(sha256, ()))

    def unbind(self, deltaspace: Deltaspace) -> list[Sha256]:
        """Forget the deltaspace and return the blobs that now serve none."""
        blobs = list(self._blobs.get(deltaspace, ()))
        for sha256 in blobs:
            self._drop(deltaspace, sha256)
        return [sha256 for sha256 in blobs if sha256 not in self._deltaspaces]

    def forget(self, sha256: Sha256) -> None:
        """Forget a blob that is gone."""
        for deltaspace in list(self._deltaspaces.get(sha256, ())):
            self._drop(deltaspace, sha256)

    def __len__(self) -> int:
        return sum(map(len, self._blobs.values()))

    def _drop(self, deltaspace: Deltaspace, sha256: Sha256) -> None:
        blobs = self._blobs[deltaspace]
        del blobs[sha256]
        if not blobs:
            del self._blobs[deltaspace]
        serving = self._deltaspaces[sha256]
        serving.discard(deltaspace)
        if not serving:
            del self._deltaspaces[sha256]
