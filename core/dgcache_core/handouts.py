"""The plaintext copies that clients hold at the moment: shared while held, closed when not.

Who holds a file is asked of the kernel, not of the clients: on a descriptor opened for reading, a
write lease is refused while anybody else has the file open or mapped, in whatever process, also
after a kill -9 (fcntl(2), F_SETLEASE). The lease is given back at once. An open() that meets it in
between makes the kernel signal us; F_SETSIG turns that signal into SIGURG, which is ignored by
default, where SIGIO would end the process.

An O_PATH descriptor holds the pages of a file and is no holder to that question. So what is closed
here counts on until the kernel tells that the file itself is gone (`Departures`).
"""

import errno
import fcntl
import os
import signal
from contextlib import suppress
from dataclasses import dataclass

from dgcache_core.departures import Departures
from dgcache_core.errors import CacheFullError
from dgcache_core.memory import page_rounded
from dgcache_core.references import Sha256
from dgcache_core.sealed_files import create_memory_file, open_again, seal


@dataclass(frozen=True, slots=True)
class Handout:
    """A sealed, read-only descriptor with the plaintext of one blob. Whoever gets it closes it."""

    fd: int
    size: int
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class _Shared:
    fd: int
    size: int
    watch: int | None


class Handouts:
    """The table of handouts somebody may hold. Not thread-safe: the store's lock covers it."""

    def __init__(self) -> None:
        self._shared: dict[Sha256, _Shared] = {}
        self.held_bytes = 0
        """Whole pages, of those that only an O_PATH descriptor keeps as well."""
        self._departures = Departures()
        self._lingering: dict[int, int] = {}
        self.can_share = _lease_probe_works()
        """False on kernels where the probe fails: then a handout is neither shared nor counted."""
        self.refusal = ""
        """Why the kernel did not tell the last sweep of some file whether it is held, or empty."""

    def __len__(self) -> int:
        return len(self._shared)

    @property
    def outstanding(self) -> int:
        """How many files were in memory at the last sweep, held or kept."""
        return len(self._shared) + len(self._lingering)

    def open_shared(self, sha256: Sha256) -> Handout | None:
        """Return one more handout of a blob whose plaintext is still held, else None.

        Raises:
            CacheFullError: no descriptor is left.
        """
        shared = self._shared.get(sha256)
        if shared is None:
            return None
        return Handout(_open_again(shared.fd, restore_mode=True), shared.size, sha256)

    def add(self, sha256: Sha256, sealed_fd: int, size: int) -> Handout:
        """Take over a sealed file of a blob that is not in the table; return its first handout.

        Raises:
            CacheFullError: no descriptor is left; the file is closed.
        """
        try:
            first = Handout(_open_again(sealed_fd), size, sha256)
            if self.can_share:
                self._keep(sha256, sealed_fd, size)
        finally:
            os.close(sealed_fd)  # the writable description goes: only readers are left
        return first

    def is_held(self, sha256: Sha256) -> bool:
        """Tell whether the plaintext of a blob was held at the last sweep."""
        return sha256 in self._shared

    def sweep(self) -> int:
        """Close what nobody holds any more and return how many bytes that freed.

        A file of which the kernel does not tell counts as held: the next sweep asks again.
        """
        self.refusal = ""
        unheld = [s for s, shared in self._shared.items() if not self._may_be_held(shared.fd)]
        before = self.held_bytes
        for sha256 in unheld:
            shared = self._shared.pop(sha256)
            os.close(shared.fd)
            if shared.watch is None:
                self.held_bytes -= page_rounded(shared.size)
            else:
                self._lingering[shared.watch] = page_rounded(shared.size)
        if self._lingering:
            for watch in self._departures.take():
                self.held_bytes -= self._lingering.pop(watch, 0)
        return before - self.held_bytes

    def close(self) -> None:
        """Close every descriptor of ours; what others hold stays theirs."""
        for shared in self._shared.values():
            os.close(shared.fd)
        self._shared.clear()
        self._lingering.clear()
        self._departures.close()
        self.held_bytes = 0

    def _may_be_held(self, fd: int) -> bool:
        try:
            return _is_open_elsewhere(fd)
        except OSError as error:
            self.refusal = error.strerror or str(error)
            return True

    def _keep(self, sha256: Sha256, sealed_fd: int, size: int) -> None:
        try:
            kept = _open_again(sealed_fd)
        except CacheFullError:
            return  # handed out all the same, only not shared
        self._shared[sha256] = _Shared(kept, size, self._departures.watch(kept))
        self.held_bytes += page_rounded(size)


def _open_again(fd: int, *, restore_mode: bool = False) -> int:
    try:
        if restore_mode:
            os.fchmod(fd, 0o400)  # any holder, as the owner, may have changed it for all
        return open_again(fd)
    except OSError as error:
        raise CacheFullError(f"no descriptor for a handout: {error.strerror}") from error


def _is_open_elsewhere(fd: int) -> bool:
    """Ask the kernel whether any other description or mapping of the file exists.

    Giving a lease back also resets the signal, so it is chosen anew each time; where that is
    refused no lease is taken, since its signal would end the process. A lease that cannot be given
    back goes with the descriptor, which the caller closes: nobody else has the file.
    """
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return True
        raise
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _lease_probe_works() -> bool:
    """Try the probe on a file of our own, held and not: older kernels may answer otherwise."""
    memory_file = create_memory_file()
    try:
        seal(memory_file)
        probe = open_again(memory_file)
    finally:
        os.close(memory_file)
    try:
        holder = open_again(probe)
        try:
            seen_held = _is_open_elsewhere(probe)
        finally:
            os.close(holder)
        return seen_held and not _is_open_elsewhere(probe)
    except OSError:
        return False
    finally:
        os.close(probe)
