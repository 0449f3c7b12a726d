"""The right to fetch a reference that is missing, while other processes wait for it."""

from contextlib import suppress
from typing import TYPE_CHECKING

from dgcache_core.errors import CacheError

if TYPE_CHECKING:
    from dgcache.remote import DaemonBackend


class Claim:
    """A missing reference is this caller's to fetch. A context manager: its end gives it back.

    Where a daemon holds others back meanwhile, storing the reference ends their wait; giving the
    claim back without a store makes the next of them fetch. Giving it back never fails.
    """

    def __init__(self, daemon: "DaemonBackend | None" = None, lease_id: int = 0) -> None:
        """Claim by a daemon's lease; without one nobody waits for this caller."""
        self._daemon = daemon
        self._lease_id = lease_id

    def cannot_be_stored(self) -> None:
        """Give it back: the reference is there, but no daemon keeps it, so nobody need wait."""
        self._end(cannot_be_stored=True)

    def give_back(self) -> None:
        """Give it back. Does nothing where it ended already."""
        self._end(cannot_be_stored=False)

    def stored(self) -> None:
        """The daemon has the reference, which ended the lease."""
        self._daemon = None

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def _end(self, *, cannot_be_stored: bool) -> None:
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            with suppress(CacheError):
                daemon.release(self._lease_id, cannot_be_stored=cannot_be_stored)
