"""`ReferenceCache`: the daemon while it can be used, the in-process cache when it cannot.

The cache never fails the user's operation. An answer about the reference itself (a miss, a failed
check, a wrong argument) is passed on; anything about the daemon (absent, refused, stalled, killed
in mid-call, full) makes the same operation run on the in-process cache. A daemon that was lost is
looked for again, after a pause that doubles up to a minute.
"""

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dgcache.backends import Backend
from dgcache.claims import Claim
from dgcache.connecting import connect
from dgcache.copies import (
    DAEMON_LOST,
    MAX_SPOOL_BYTES,
    Mirror,
    only_hash,
    pieces_of,
    private_copy,
)
from dgcache.reference import Reference, sha256_of_descriptor
from dgcache.report import logger, report_fallback, report_fetch, report_hit
from dgcache.settings import Settings
from dgcache.sources import Source, StoreSource, opened
from dgcache_core.errors import (
    CacheCorruptionError,
    CacheError,
    CacheFullError,
    CacheMissError,
    InvalidReferenceError,
)
from dgcache_core.handouts import Handout
from dgcache_core.references import Deltaspace, Sha256, parse_sha256
from dgcache_core.sealed_files import create_memory_file, open_again, seal, write_at
from dgcache_core.store import EntryInfo, Freed

if TYPE_CHECKING:
    from dgcache.local import LocalBackend
    from dgcache.remote import DaemonBackend

T = TypeVar("T")

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0


class ReferenceCache:
    """A cache of references. Thread-safe; usable after fork; a context manager."""

    _lock: threading.Lock
    _remote: "DaemonBackend | None"
    _local: "LocalBackend | None"

    def __init__(self, settings: Settings) -> None:
        """Look for the daemon once; see `dgcache.open`."""
        self._settings = settings
        self._closed = False
        self._begin_anew(may_use_daemon=True)
        _open_caches.add(self)
        self._daemon()

    # -- what users call -----------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """What serves now: "dg-cached", "memory", or "filesystem"."""
        daemon = self._remote
        return daemon.name if daemon is not None else self._local_name

    def get(self, bucket: str, prefix: str, sha256: str, verify: bool = False) -> Reference:
        """Return the reference whose bytes have this digest. Close it when you are done.

        Args:
            bucket: 1 to 255 bytes of UTF-8.
            prefix: at most 1024 bytes of UTF-8; may be empty.
            sha256: 64 hexadecimal digits.
            verify: hash all bytes here once more. (Every chunk was authenticated anyway.)

        Raises:
            CacheMissError: it is not here; `reason` says why. Fetch it and `put` it.
            CacheCorruptionError: a check failed; the entry is gone. Fetch it again.
            CacheFullError: even the in-process cache has no room for its plaintext.
            InvalidReferenceError: an argument is not what it must be.
        """
        deltaspace, digest = Deltaspace(bucket, prefix), parse_sha256(sha256)
        started = time.monotonic()
        reference = self._look_up(deltaspace, digest)
        if verify:
            try:
                reference.verify()
            except CacheCorruptionError:
                reference.close()
                raise
        if self._settings.report:
            report_hit(reference.source, reference.size, time.monotonic() - started)
        return reference

    def put(self, bucket: str, prefix: str, source: StoreSource, sha256: str | None = None) -> str:
        """Store a reference and return its digest.

        Args:
            bucket: as `get`.
            prefix: as `get`.
            source: a path, a binary file object (from its position on), a descriptor, or bytes.
            sha256: what the digest must be, if known.

        Raises:
            InvalidReferenceError: the digest differs, the source cannot be read, or it changed
                meanwhile. Nothing is stored.
            CacheFullError: it is too large for every cache there is.
        """
        deltaspace = Deltaspace(bucket, prefix)
        expected = parse_sha256(sha256) if sha256 is not None else None
        with opened(source, MAX_SPOOL_BYTES) as opened_source:
            return self._store(deltaspace, opened_source, expected)[0]

    def has(self, bucket: str, prefix: str, sha256: str) -> bool:
        """Tell whether `get` would find it now. Counts as no use.

        Raises:
            InvalidReferenceError: an argument is not what it must be.
        """
        deltaspace, digest = Deltaspace(bucket, prefix), parse_sha256(sha256)
        on_daemon = self._try_daemon(lambda daemon: daemon.miss_reason(deltaspace, digest) is None)
        if on_daemon is True:
            return True
        local = self._existing_local()
        return local is not None and local.miss_reason(deltaspace, digest) is None

    def get_or_fetch(
        self, bucket: str, prefix: str, sha256: str, fetch: Callable[[], StoreSource]
    ) -> Reference:
        """Return the reference, from the cache or else from `fetch`, and keep it for the next.

        Of many processes that miss it at once, one fetches and the others wait for it, at most
        `DG_CACHE_WAIT_SECONDS` before one more may fetch.

        Args:
            bucket: as `get`.
            prefix: as `get`.
            sha256: as `get`.
            fetch: returns what `put` takes; a file object is closed here. Its errors pass through.

        Raises:
            InvalidReferenceError: an argument is wrong, or what was fetched has another digest.
        """
        deltaspace, digest = Deltaspace(bucket, prefix), parse_sha256(sha256)
        found = self.get_or_claim(deltaspace, digest)
        if isinstance(found, Reference):
            return found
        started = time.monotonic()
        with ExitStack() as stack:
            claim = stack.enter_context(found)
            fetched = fetch()
            if hasattr(fetched, "close"):
                stack.callback(fetched.close)
            return self.adopt(deltaspace, digest, fetched, started=started, claim=claim)

    def evict(self, bucket: str, prefix: str) -> Freed:
        """Forget a deltaspace; references that serve no other are freed.

        Raises:
            InvalidReferenceError: an argument is not what it must be.
        """
        deltaspace = Deltaspace(bucket, prefix)
        return self._on_both(lambda backend: backend.evict(deltaspace))

    def clear(self, rekey: bool = False) -> Freed:
        """Free every entry, the daemon's too. References that are open stay valid.

        Args:
            rekey: also make every key anew; the old keys' memory is zeroed and unmapped. A store
                in progress elsewhere is then not kept.
        """
        return self._on_both(lambda backend: backend.clear(rekey=rekey))

    def forget(self) -> Freed:
        """Free the in-process cache only; the daemon's entries are other processes' as well."""
        local = self._existing_local()
        return local.clear() if local is not None else Freed()

    def entries(self) -> list[EntryInfo]:
        """Return every entry, most recently used first."""
        daemon_entries = self._try_daemon(lambda daemon: daemon.entries())
        if daemon_entries is not None:
            return daemon_entries
        local = self._existing_local()
        return local.entries() if local is not None else []

    def status(self) -> dict[str, Any]:
        """Return figures, ready for JSON; `backend` says whose they are. Sizes are in bytes."""
        daemon_status = self._try_daemon(lambda daemon: daemon.status())
        if daemon_status is not None:
            return {"backend": "dg-cached", **daemon_status}
        local = self._existing_local()
        return {"backend": self.backend, "store": local.status() if local is not None else None}

    def close(self) -> None:
        """End the session and free the in-process cache. Open references stay valid."""
        with self._lock:
            remote, self._remote = self._remote, None
            local, self._local = self._local, None
            self._closed = True
        for backend in (remote, local):
            if backend is not None:
                backend.close()

    def __enter__(self) -> "ReferenceCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ReferenceCache {'closed' if self._closed else self.backend}>"

    # -- for adapters --------------------------------------------------------------------------

    def get_or_claim(self, deltaspace: Deltaspace, sha256: Sha256) -> Reference | Claim:
        """Return the reference, or the claim to fetch it; may wait for another process's fetch.

        Whatever is wrong with the cache makes it a claim.
        """
        started = time.monotonic()
        try:
            found = self._look_up_or_claim(deltaspace, sha256)
        except (CacheMissError, CacheCorruptionError, CacheFullError):
            return Claim()
        if isinstance(found, Reference) and self._settings.report:
            report_hit(found.source, found.size, time.monotonic() - started)
        return found

    def adopt(
        self,
        deltaspace: Deltaspace,
        sha256: Sha256,
        fetched: StoreSource,
        *,
        size: int | None = None,
        started: float | None = None,
        claim: Claim | None = None,
    ) -> Reference:
        """Return fetched bytes as a reference and keep them where there is room.

        The bytes go into a sealed memory file of this process and, at the same time where their
        size is known, into the cache; so nothing that happens to the cache can lose them.

        Args:
            deltaspace: where they belong.
            sha256: what their digest must be.
            fetched: what `put` takes.
            size: the length of a stream, in bytes, if known.
            started: when the fetch began (time.monotonic), for the report.
            claim: ends here, with what became of it.

        Raises:
            InvalidReferenceError: the digest is another.
        """
        started = time.monotonic() if started is None else started
        with self._tee(deltaspace, sha256, size) as (memory_file, mirror):
            length = 0
            for piece in pieces_of(fetched):
                write_at(memory_file, piece, length)
                mirror.write(piece)
                length += len(piece)
            stored_in = mirror.commit()
            seal(memory_file)  # what is hashed is what nobody can change any more
            digest = sha256_of_descriptor(memory_file, length)
            if digest != sha256:
                raise InvalidReferenceError(
                    f"SHA-256 mismatch: {sha256} was asked for, the fetched bytes have {digest}"
                )
            reference = Reference(
                Handout(open_again(memory_file), length, sha256), source="fetched"
            )
        if stored_in is None:
            try:
                _, stored_in = self._store_reference(deltaspace, reference)
            except CacheError as error:
                logger.debug("the fetched reference could not be kept: %s", error)
        if claim is not None:
            (claim.stored if stored_in == "dg-cached" else claim.cannot_be_stored)()
        if self._settings.report:
            report_fetch(reference.size, time.monotonic() - started, stored_in)
        return reference

    def keep(self, deltaspace: Deltaspace, path: Path) -> Reference:
        """Store a file and return it as a reference; where no cache can keep it, as a private copy.

        Raises:
            InvalidReferenceError: the file cannot be read.
        """
        with opened(path, MAX_SPOOL_BYTES) as source:
            try:
                digest, _ = self._store(deltaspace, source, None)
                return self._look_up(deltaspace, digest)
            except (CacheMissError, CacheFullError, CacheCorruptionError) as error:
                logger.debug("%s is not cached: %s", path, error)
            return private_copy(source)

    # -- choosing a backend --------------------------------------------------------------------

    def _begin_anew(self, *, may_use_daemon: bool) -> None:
        """Forget every resource; also in a forked child, where none of them is ours."""
        chosen = self._settings
        self._lock = threading.Lock()
        self._remote = None
        self._local = None
        self._local_name = "filesystem" if chosen.backend == "filesystem" else "memory"
        self._daemon_wanted = (
            may_use_daemon
            and chosen.backend == "dg-cached"
            and not chosen.ephemeral
            and not chosen.no_cache
        )
        self._look_again_at = 0.0
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._fallback_reported = False

    def _daemon(self) -> "DaemonBackend | None":
        """Return the daemon's backend, or None where it cannot be used now."""
        with self._lock:
            if self._closed:
                raise ValueError("this cache is closed")
            if self._remote is not None or not self._daemon_wanted:
                return self._remote
            if time.monotonic() < self._look_again_at:
                return None
            try:
                self._remote = connect(self._settings)
            except CacheError as error:
                self._pause(error)
                return None
            self._pause_seconds = _FIRST_PAUSE_SECONDS
            return self._remote

    def _lose_daemon(self, daemon: "DaemonBackend | None", error: CacheError) -> None:
        with self._lock:
            if daemon is None or self._remote is not daemon:
                return
            self._remote = None
            self._pause(error)
        daemon.close()

    def _pause(self, error: CacheError) -> None:
        self._look_again_at = time.monotonic() + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
        if not self._fallback_reported:
            self._fallback_reported = True
            report_fallback(error, self._settings.socket_dir, os.environ)

    def _try_daemon(self, operation: "Callable[[DaemonBackend], T]") -> T | None:
        """Run an operation on the daemon; None where it cannot be done there."""
        daemon = self._daemon()
        return None if daemon is None else self._on_daemon(daemon, operation)

    def _on_daemon(
        self, daemon: "DaemonBackend", operation: "Callable[[DaemonBackend], T]"
    ) -> T | None:
        try:
            return operation(daemon)
        except DAEMON_LOST as error:
            self._lose_daemon(daemon, error)
        except CacheFullError as error:
            logger.debug("the daemon has no room: %s", error)
        return None

    def _existing_local(self) -> "LocalBackend | None":
        with self._lock:
            return self._local

    def _local_backend(self) -> "LocalBackend":
        with self._lock:
            if self._closed:
                raise ValueError("this cache is closed")
            if self._local is None:
                from dgcache.local import make_local  # cryptography is loaded only now

                self._local, problem = make_local(self._settings)
                self._local_name = self._local.name
                if problem is not None:
                    logger.warning("using memory instead of files: %s", problem)
            return self._local

    # -- operations on whichever backend -----------------------------------------------------------

    def _look_up(self, deltaspace: Deltaspace, sha256: Sha256) -> Reference:
        miss: CacheMissError | None = None
        try:
            handout = self._try_daemon(lambda daemon: daemon.get(deltaspace, sha256))
            if handout is not None:
                return Reference(handout, source="dg-cached")
        except CacheMissError as error:
            miss = error
        local = self._existing_local()
        if local is None:
            raise miss or CacheMissError(f"no reference {sha256} for {deltaspace}: unknown")
        try:
            handout = local.get(deltaspace, sha256)
        except CacheMissError as error:
            raise (miss or error) from None
        return Reference(handout, source=local.name, on_close=_sweeper(local))

    def _look_up_or_claim(self, deltaspace: Deltaspace, sha256: Sha256) -> Reference | Claim:
        """What this process has counts first: nobody waits for bytes that are at hand."""
        local = self._existing_local()
        if local is not None and local.miss_reason(deltaspace, sha256) is None:
            return self._look_up(deltaspace, sha256)
        wait_seconds = self._settings.wait_seconds
        found = self._try_daemon(
            lambda daemon: daemon.get_or_lease(deltaspace, sha256, wait_seconds)
        )
        if found is None:
            return self._look_up(deltaspace, sha256)
        return found if isinstance(found, Claim) else Reference(found, source="dg-cached")

    def _store(
        self, deltaspace: Deltaspace, source: Source, expected: Sha256 | None
    ) -> tuple[Sha256, str]:
        """Return the digest and the name of the backend that keeps it."""
        if self._settings.no_cache:
            return only_hash(source, expected), "nothing"
        stored = self._try_daemon(lambda daemon: daemon.put(deltaspace, source, expected))
        if stored is not None:
            return stored, "dg-cached"
        local = self._local_backend()
        return local.put(deltaspace, source, expected), local.name

    def _store_reference(
        self, deltaspace: Deltaspace, reference: Reference
    ) -> tuple[Sha256, str | None]:
        with opened(reference.fd, MAX_SPOOL_BYTES) as source:
            digest, where = self._store(deltaspace, source, Sha256(reference.sha256))
        return digest, None if where == "nothing" else where

    def _on_both(self, operation: Callable[[Backend], Freed]) -> Freed:
        freed = [self._try_daemon(operation)]
        local = self._existing_local()
        if local is not None:
            freed.append(operation(local))
        done = [one for one in freed if one is not None]
        return Freed(sum(one.entries for one in done), sum(one.bytes for one in done))

    @contextmanager
    def _tee(
        self, deltaspace: Deltaspace, sha256: Sha256, size: int | None
    ) -> Iterator[tuple[int, Mirror]]:
        daemon = self._daemon() if size is not None and not self._settings.no_cache else None
        deposit = None
        if daemon is not None and size is not None:
            deposit = self._on_daemon(daemon, lambda daemon: daemon.begin(deltaspace, size, sha256))
        with ExitStack() as stack:
            mirror = Mirror(deposit, lambda error: self._lose_daemon(daemon, error))
            stack.callback(mirror.abandon)
            memory_file = create_memory_file()
            stack.callback(os.close, memory_file)
            yield memory_file, mirror


def _sweeper(local: "LocalBackend") -> Callable[[], None]:
    """Let the store see at once that a reference was closed, without keeping the store alive."""
    weak = weakref.ref(local)

    def sweep() -> None:
        backend = weak()
        if backend is not None:
            backend.sweep()

    return sweep


_open_caches: "weakref.WeakSet[ReferenceCache]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Give every cache of the child a life of its own; what is the parent's is only closed.

    grpc cannot be used in a child of a process that used it, so such a child falls back.
    """
    grpc_loaded = "grpc" in sys.modules
    for cache in _open_caches:
        remote = cache._remote
        cache._begin_anew(may_use_daemon=not grpc_loaded)
        if remote is not None:
            remote._session.close()
            logger.warning(
                "using the in-process cache: this process was forked from one that uses dg-cached; "
                "start it with multiprocessing's spawn or forkserver to share the warm cache"
            )


os.register_at_fork(after_in_child=_after_fork_in_child)
