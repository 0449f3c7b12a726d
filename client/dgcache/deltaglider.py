"""DeltaGlider on dg-cached: its cache port, and the two ways to put it in place.

`install()` makes DeltaGlider's CLI and `create_client` in this process use the cache; both end in
`EncryptedCache.from_env`, looked up when it is called. `create_client()` does it for one client.

DeltaGlider's service names a reference by path and does not say when it is done with it. What it
does is one operation after another in each thread, so a reference stays in the hand of its thread
until that thread's next operation. Its path names a descriptor by number; numbers are taken in turn
from the upper half of RLIMIT_NOFILE, so that a path handed out earlier does not come to mean
another file.
"""

import atexit
import inspect
import resource
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from deltaglider.adapters import EncryptedCache
from deltaglider.core.errors import (
    CacheCorruptionError as PortCorruptionError,
)
from deltaglider.core.errors import (
    CacheMissError as PortMissError,
)
from deltaglider.core.errors import (
    IntegrityMismatchError,
)
from deltaglider.core.service import DeltaService

import dgcache
from dgcache.cache import ReferenceCache
from dgcache.claims import Claim
from dgcache.reference import Reference
from dgcache.report import logger
from dgcache_core.errors import (
    CacheCorruptionError,
    CacheError,
    CacheMissError,
    InvalidReferenceError,
    MissReason,
)
from dgcache_core.references import Deltaspace, parse_sha256

_NO_REFERENCE = Path(tempfile.gettempdir()) / "dg-cached-keeps-no-files"
"""Where `ref_path` points while a reference is not in the hand: nothing here reads or writes it."""

_REMEMBERED_WRITES = 4096
_LOWEST_DESCRIPTOR = 64
_NOBODYS_DIGEST = "0" * 64

_Key = tuple[str, str, str]


class ReferenceCachePort:
    """DeltaGlider's `CachePort` over a `ReferenceCache`. Thread-safe.

    No method fails because of the cache. `has_ref` that says True is a promise: the reference is in
    the thread's hand, and the next `get_validated_ref` takes it.
    """

    def __init__(self, cache: ReferenceCache | Callable[[], ReferenceCache]) -> None:
        """Use `cache`, which stays the caller's to close.

        Args:
            cache: the cache, or what opens it when it is first needed: a listing needs none.
        """
        self._given = cache
        self._local = threading.local()
        self._hands: weakref.WeakSet[_Hand] = weakref.WeakSet()
        self._numbers = _DescriptorNumbers()
        self._lock = threading.Lock()
        self._forgetful = False
        self._written: OrderedDict[tuple[str, str], None] = OrderedDict()

    @cached_property
    def _cache(self) -> ReferenceCache:
        return self._given if isinstance(self._given, ReferenceCache) else self._given()

    def ref_path(self, bucket: str, prefix: str) -> Path:
        """Return the path of the reference in this thread's hand, else one that does not exist."""
        path = self._hand().path_of(bucket, prefix)
        return path or _NO_REFERENCE / bucket / prefix / "reference.bin"

    def has_ref(self, bucket: str, prefix: str, sha: str) -> bool:
        """Tell whether the reference is cached, and take it into the hand if it is.

        While another process fetches it, this one waits. False means that DeltaGlider fetches it
        now, and others may wait for that: the claim ends with `stream_ref`, `write_ref`, or this
        thread's next operation.
        """
        hand = self._hand()
        hand.open()
        if self._is_forgotten(bucket, prefix):
            return False
        try:
            found = self._cache.get_or_claim(Deltaspace(bucket, prefix), parse_sha256(sha))
        except (CacheError, OSError) as error:
            logger.debug("no reference for %s/%s: %s", bucket, prefix, error)
            return False
        if isinstance(found, Claim):
            hand.claim = found
            return False
        self._take(hand, (bucket, prefix, sha), found)
        return True

    def get_validated_ref(self, bucket: str, prefix: str, expected_sha: str) -> Path:
        """Return the path of a sealed reference, valid until this thread's next operation.

        Raises:
            deltaglider.core.errors.CacheMissError: it is not cached.
            deltaglider.core.errors.CacheCorruptionError: the deltaspace has another reference, or a
                check failed.
        """
        hand = self._hand()
        key = (bucket, prefix, expected_sha)
        if hand.key != key:
            hand.open()
            self._take(hand, key, self._validated(bucket, prefix, expected_sha))
        path = hand.path_of(bucket, prefix)
        if path is None:  # evicted by another thread in between
            raise PortMissError(f"Cache miss for {bucket}/{prefix}")
        return path

    def write_ref(self, bucket: str, prefix: str, src: Path) -> Path:
        """Store a reference and take it into the hand; without a cache, as a copy in memory."""
        hand = self._hand()
        hand.open()
        try:
            reference = self._cache.keep(Deltaspace(bucket, prefix), Path(src))
        except (CacheError, OSError) as error:
            logger.debug("%s/%s is not kept: %s", bucket, prefix, error)
        else:
            self._take(hand, (bucket, prefix, reference.sha256), reference)
            self._remember(bucket, prefix)
        return self.ref_path(bucket, prefix)

    def stream_ref(self, bucket: str, prefix: str, sha: str, stream: BinaryIO) -> None:
        """Store a reference from a stream and take it into the hand; no file is written.

        Raises:
            InvalidReferenceError: the bytes have another digest.
        """
        hand = self._hand()
        claim, hand.claim = hand.claim, None
        hand.open()
        with claim or Claim() as ending:
            reference = self._cache.adopt(
                Deltaspace(bucket, prefix),
                parse_sha256(sha),
                stream,
                size=_length_of(stream),
                claim=ending,
            )
        self._take(hand, (bucket, prefix, sha), reference)
        self._remember(bucket, prefix)

    def evict(self, bucket: str, prefix: str) -> None:
        """Forget a deltaspace; paths handed out for it do not exist any more."""
        for hand in list(self._hands):
            hand.open_if(bucket, prefix)
        with self._lock:
            self._written.pop((bucket, prefix), None)
        try:
            self._cache.evict(bucket, prefix)
        except CacheError as error:
            logger.debug("nothing evicted for %s/%s: %s", bucket, prefix, error)

    def clear(self) -> None:
        """Forget everything in this client, never the daemon's entries.

        DeltaGlider's documents recommend this after each job; other processes go on hitting. Until
        its next `write_ref`, a deltaspace counts as not cached here.
        """
        for hand in list(self._hands):
            hand.open()
        with self._lock:
            self._forgetful = True
            self._written.clear()
        self._cache.forget()

    def _validated(self, bucket: str, prefix: str, sha: str) -> Reference:
        if self._is_forgotten(bucket, prefix):
            raise PortMissError(f"Cache miss for {bucket}/{prefix}")
        try:
            return self._cache.get(bucket, prefix, sha)
        except CacheMissError as error:
            reason = error.reason
        except InvalidReferenceError:  # not a digest at all, so no reference can have it
            reason = self._reason_without_digest(bucket, prefix)
        except CacheCorruptionError as error:
            raise PortCorruptionError(f"SHA mismatch for {bucket}/{prefix}: {error}") from error
        except (CacheError, OSError) as error:
            raise PortMissError(f"Cache miss for {bucket}/{prefix}: {error}") from error
        if reason is MissReason.DIGEST_CHANGED:
            raise PortCorruptionError(
                f"SHA mismatch for {bucket}/{prefix}: {sha} is not the reference it has"
            )
        raise PortMissError(f"Cache miss for {bucket}/{prefix}: {reason}")

    def _reason_without_digest(self, bucket: str, prefix: str) -> MissReason:
        try:
            self._cache.get(bucket, prefix, _NOBODYS_DIGEST).close()
        except CacheMissError as error:
            return error.reason
        except CacheError:
            pass
        return MissReason.UNKNOWN

    def _take(self, hand: "_Hand", key: _Key, reference: Reference) -> None:
        self._numbers.renumber(reference)
        hand.take(key, reference)

    def _hand(self) -> "_Hand":
        hand: _Hand | None = getattr(self._local, "hand", None)
        if hand is None:
            hand = self._local.hand = _Hand()
            self._hands.add(hand)
        return hand

    def _is_forgotten(self, bucket: str, prefix: str) -> bool:
        with self._lock:
            return self._forgetful and (bucket, prefix) not in self._written

    def _remember(self, bucket: str, prefix: str) -> None:
        with self._lock:
            self._written[bucket, prefix] = None
            if len(self._written) > _REMEMBERED_WRITES:
                self._written.popitem(last=False)


class _Hand:
    """What one thread holds: at most one reference. It ends with its thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reference: Reference | None = None
        self.key: _Key | None = None
        self.claim: Claim | None = None
        """Of a reference that this thread is about to fetch."""

    def take(self, key: _Key, reference: Reference) -> None:
        with self._lock:
            self.key, self._reference = key, reference

    def path_of(self, bucket: str, prefix: str) -> Path | None:
        with self._lock:
            if self._reference is None or self.key is None or self.key[:2] != (bucket, prefix):
                return None
            return self._reference.path

    def open(self) -> None:
        """Let go of what is in it."""
        with self._lock:
            reference, self._reference, self.key = self._reference, None, None
            claim, self.claim = self.claim, None
        if reference is not None:
            reference.close()
        if claim is not None:
            claim.give_back()

    def open_if(self, bucket: str, prefix: str) -> None:
        """Let go of it if it is of this deltaspace."""
        if self.path_of(bucket, prefix) is not None:
            self.open()

    def __del__(self) -> None:
        self.open()


class _DescriptorNumbers:
    """Deals descriptor numbers in turn, so that a number comes again only after all others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0

    def renumber(self, reference: Reference) -> None:
        """Move the reference's descriptor to the next number; without one it keeps its own."""
        with self._lock:
            soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            lowest = max(_LOWEST_DESCRIPTOR, soft_limit // 2)
            for start in (max(lowest, self._next), lowest):
                try:
                    reference.move_descriptor(start)
                except OSError:
                    continue
                self._next = reference.fd + 1
                return


# -- putting it in place ---------------------------------------------------------------------------

_stock_from_env = EncryptedCache.__dict__["from_env"]
_stock_cache_reference = DeltaService._cache_reference
_shared_port: ReferenceCachePort | None = None


def install(cache: ReferenceCache | None = None) -> None:
    """Make DeltaGlider's CLI and `create_client` in this process use the cache.

    Args:
        cache: which one; opened from the environment when DeltaGlider first asks, where None.
    """

    def from_env(cls: type, backend: Any) -> Any:  # noqa: ARG001 - DeltaGlider's signature
        return _port_of(cache)

    EncryptedCache.from_env = classmethod(from_env)
    _take_over_fetch()


def uninstall() -> None:
    """Give DeltaGlider its own cache back."""
    EncryptedCache.from_env = _stock_from_env
    DeltaService._cache_reference = _stock_cache_reference


def create_client(cache: ReferenceCache | None = None, **kwargs: Any) -> Any:
    """Return `deltaglider.create_client(**kwargs)` on the cache.

    Args:
        cache: which one; one for the whole process, from the environment, where None.
        kwargs: what DeltaGlider's function takes.
    """
    import deltaglider

    client = deltaglider.create_client(**kwargs)
    client.service.cache = _port_of(cache)
    _take_over_fetch()
    return client


def _port_of(cache: ReferenceCache | None) -> ReferenceCachePort:
    global _shared_port  # noqa: PLW0603 - one cache for the process
    if cache is not None:
        return ReferenceCachePort(cache)
    if _shared_port is None:
        # a wrong setting is an error at once
        settings = dgcache.Settings.from_environment().for_one_shot().patient()
        _shared_port = ReferenceCachePort(lambda: _open_until_exit(settings))
    return _shared_port


def _open_until_exit(settings: dgcache.Settings) -> ReferenceCache:
    cache = dgcache.open(settings)
    atexit.register(cache.close)
    return cache


def _take_over_fetch() -> None:
    """Replace the download of a reference, which leaves plaintext in $TMPDIR after an error."""
    parameters = list(inspect.signature(_stock_cache_reference).parameters)
    if parameters == ["self", "delta_space", "expected_sha"]:
        DeltaService._cache_reference = _cache_reference
    else:
        logger.warning(
            "this DeltaGlider fetches references in a way not known here: they pass through files"
        )


def _cache_reference(service: Any, delta_space: Any, expected_sha: str) -> None:
    """Stand in for `DeltaService._cache_reference`: from S3 into the cache, without a file."""
    port = service.cache
    if not isinstance(port, ReferenceCachePort):
        _stock_cache_reference(service, delta_space, expected_sha)
        return
    ref_key = delta_space.reference_key()
    service.logger.info("Caching reference", key=ref_key)
    stream = service.storage.get(f"{delta_space.bucket}/{ref_key}")
    try:
        port.stream_ref(delta_space.bucket, delta_space.prefix, expected_sha, stream)
    except InvalidReferenceError as error:
        raise IntegrityMismatchError(f"Reference SHA mismatch: {error}") from error
    finally:
        if hasattr(stream, "close"):
            stream.close()


def _length_of(stream: Any) -> int | None:
    """Return a stream's length where it tells: botocore's bodies keep the Content-Length.

    With it the bytes go to the daemon while they arrive; without it, afterwards.
    """
    length = getattr(stream, "_content_length", None)
    try:
        return int(length) if isinstance(length, (int, str)) else None
    except ValueError:
        return None
