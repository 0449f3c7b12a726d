"""The daemon as a backend: calls by either transport, descriptors on the session.

Every call has a deadline, so that a stopped daemon costs its budget and no more.
"""

import itertools
import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from dgcache.session import Session
from dgcache.statuses import miss_reason
from dgcache.transports import transport_on
from dgcache_core.errors import CacheError, CacheUnavailableError, MissReason
from dgcache_core.handouts import Handout
from dgcache_core.references import Deltaspace, Sha256
from dgcache_core.sealed_files import require_sealed
from dgcache_proto import messages as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from dgcache.claims import Claim
    from dgcache.sources import Source
    from dgcache_core.store import EntryInfo, Freed

M = TypeVar("M", bound="Message")

_LOOKUP_SECONDS = 10.0
_COMMIT_SECONDS = 10.0
_SHORT_SECONDS = 2.0
_PIPE_STALL_SECONDS = 5.0
_DESCRIPTOR_SECONDS = 1.0
_LONGEST_WAITS = 2
"""How many leases long the daemon makes anybody wait beyond its budget, at the most."""


class DaemonBackend:
    """Implements `Backend` over one session."""

    name = "dg-cached"

    def __init__(self, session: Session, transport: str = "grpc") -> None:
        """Take over the session.

        Args:
            session: a new one.
            transport: `grpc`, `direct`, or `auto`.

        Raises:
            CacheUnavailableError: the daemon does not speak it; the session stays the caller's.
        """
        self._transport = transport_on(session, transport)
        self._session = session
        self._request_ids = itertools.count(1)
        # more at once would only wait in the daemon, or be refused; every call has a deadline
        calls = max(1, session.hello.limits.calls_per_session)
        self._calls = threading.BoundedSemaphore(calls)
        # beside the calls, so that the store which ends a wait is never behind it
        self._waits = threading.BoundedSemaphore(max(1, calls // 2))
        self.max_entry_bytes = session.hello.limits.max_entry_bytes

    def get(self, deltaspace: Deltaspace, sha256: Sha256) -> Handout:
        """See `Backend`. The descriptor's seals and size are checked here once more."""
        request_id = next(self._request_ids)
        request = pb.LookupRequest(
            request_id=request_id, deltaspace=_message(deltaspace), sha256=bytes.fromhex(sha256)
        )
        size = self._call("Lookup", request, pb.LookupResponse, _LOOKUP_SECONDS).size
        return self._receive(request_id, size, sha256)

    def get_or_lease(
        self, deltaspace: Deltaspace, sha256: Sha256, wait_seconds: float
    ) -> "Handout | Claim":
        """Return a handout, at once or when another process has stored it, or the claim to fetch.

        Args:
            deltaspace: as `get`.
            sha256: as `get`.
            wait_seconds: how long to wait for somebody else's fetch before fetching beside it.

        Raises:
            CacheMissError: fetch it; nobody waits for you.
        """
        if not self._waits.acquire(timeout=wait_seconds):
            return self.get(deltaspace, sha256)
        try:
            request_id = next(self._request_ids)
            request = pb.LookupRequest(
                request_id=request_id,
                deltaspace=_message(deltaspace),
                sha256=bytes.fromhex(sha256),
                on_miss=pb.LookupRequest.ON_MISS_LEASE,
                wait_seconds=wait_seconds,
            )
            longest = wait_seconds + _LONGEST_WAITS * self._session.hello.limits.lease_seconds
            answer = self._transport.call(
                "Lookup", request, pb.LookupResponse, _LOOKUP_SECONDS + longest
            )
        finally:
            self._waits.release()
        if answer.HasField("lease"):
            from dgcache.claims import Claim

            return Claim(self, answer.lease.id)
        return self._receive(request_id, answer.size, sha256)

    def release(self, lease_id: int, *, cannot_be_stored: bool) -> None:
        """Give a lease back."""
        request = pb.ReleaseLeaseRequest(lease_id=lease_id, cannot_be_stored=cannot_be_stored)
        self._call("ReleaseLease", request, pb.ReleaseLeaseResponse, _SHORT_SECONDS)

    def _receive(self, request_id: int, size: int, sha256: Sha256) -> Handout:
        fd = self._session.take_descriptor(request_id, _DESCRIPTOR_SECONDS)
        try:
            require_sealed(fd, size)
        except CacheError:
            os.close(fd)
            raise
        return Handout(fd, size, sha256)

    def put(self, deltaspace: Deltaspace, source: "Source", expected: Sha256 | None) -> Sha256:
        """See `Backend`."""
        source.rewind()
        deposit = self.begin(deltaspace, source.size, expected)
        try:
            deposit.pour(source)
            source.require_unchanged()
        except CacheError:
            deposit.abort()
            raise
        return deposit.commit()

    def begin(self, deltaspace: Deltaspace, size: int, expected: Sha256 | None) -> "RemoteDeposit":
        """Open a deposit for exactly `size` bytes."""
        request_id = next(self._request_ids)
        request = pb.BeginStoreRequest(
            request_id=request_id,
            deltaspace=_message(deltaspace),
            size=size,
            expected_sha256=bytes.fromhex(expected or ""),
        )
        self._call("BeginStore", request, pb.BeginStoreResponse, _SHORT_SECONDS)
        write_end = self._session.take_descriptor(request_id, _DESCRIPTOR_SECONDS)
        return RemoteDeposit(self, request_id, write_end)

    def miss_reason(self, deltaspace: Deltaspace, sha256: Sha256) -> MissReason | None:
        """See `Backend`."""
        request = pb.ContainsRequest(deltaspace=_message(deltaspace), sha256=bytes.fromhex(sha256))
        answer = self._call("Contains", request, pb.ContainsResponse, _SHORT_SECONDS)
        return None if answer.contained else miss_reason(answer.miss_reason)

    def evict(self, deltaspace: Deltaspace) -> "Freed":
        """See `Backend`."""
        from dgcache_core.store import Freed

        request = pb.EvictRequest(deltaspace=_message(deltaspace))
        answer = self._call("Evict", request, pb.EvictResponse, _SHORT_SECONDS)
        return Freed(answer.freed_entries, answer.freed_bytes)

    def clear(self, *, rekey: bool = False) -> "Freed":
        """See `Backend`."""
        from dgcache_core.store import Freed

        answer = self._call(
            "Clear", pb.ClearRequest(rekey=rekey), pb.ClearResponse, _LOOKUP_SECONDS
        )
        return Freed(answer.freed_entries, answer.freed_bytes)

    def entries(self) -> "list[EntryInfo]":
        """See `Backend`."""
        entries: list[pb.Entry] = []
        more = True
        while more:
            after = entries[-1].sha256 if entries else b""
            page = self._call(
                "List", pb.ListRequest(after_sha256=after), pb.ListResponse, _SHORT_SECONDS
            )
            entries.extend(page.entries)
            more = page.more and len(page.entries) > 0
        entries.sort(key=lambda entry: entry.idle_seconds)
        return [_entry_info(entry) for entry in entries]

    def status(self) -> dict[str, Any]:
        """See `Backend`. The daemon's whole answer, field names as in the .proto."""
        from google.protobuf.json_format import MessageToDict

        answer = self._call("Status", pb.StatusRequest(), pb.StatusResponse, _SHORT_SECONDS)
        # MessageToDict gives 64-bit integers as strings (protobuf's JSON mapping): undo that
        status: dict[str, Any] = MessageToDict(
            answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        status["store"] = _with_numbers(status["store"])
        for part in ("hardening", "leases", "security_events", "monitor", "pressure", "disk"):
            status[part] = _with_numbers(status.get(part, {}))  # an older daemon has not all
        status["directory"] = str(self._session.directory)
        return status

    def events(self, *, follow: bool) -> Iterator[dict[str, Any]]:
        """Yield the daemon's security events, oldest first, field names as in the .proto.

        Args:
            follow: go on, without a deadline, with those that come, until the daemon stops.

        Raises:
            CacheError: the daemon is gone, or too many follow already.
        """
        from google.protobuf.json_format import MessageToDict

        seconds = None if follow else _SHORT_SECONDS
        for one in self._transport.stream("Watch", pb.WatchRequest(follow=follow), seconds):
            yield _with_numbers(
                MessageToDict(
                    one,
                    preserving_proto_field_name=True,
                    always_print_fields_with_no_presence=True,
                )
            )

    def sweep(self) -> None:
        """See `Backend`; the daemon sees by itself who holds what."""

    def close(self) -> None:
        """See `Backend`."""
        self._transport.close()
        self._session.close()

    def _call(self, method: str, request: "Message", kind: type[M], seconds: float) -> M:
        with self._calls:
            return self._transport.call(method, request, kind, seconds)


class RemoteDeposit:
    """A store in progress in the daemon, seen from its writer."""

    def __init__(self, backend: DaemonBackend, request_id: int, write_end: int) -> None:
        self._backend = backend
        self._request_id = request_id
        self._write_end = write_end
        self._poll = select.poll()
        self._poll.register(write_end, select.POLLOUT)
        os.set_blocking(write_end, False)

    def pour(self, source: "Source") -> None:
        """Send the whole source. Where the daemon stops reading, the commit tells why.

        Raises:
            CacheUnavailableError: the daemon takes nothing for five seconds.
        """
        while self._step(partial(source.send_into, self._write_end)):
            pass

    def write(self, data: memoryview) -> None:
        """Send some bytes. Raises as `pour`."""
        while data:
            written = self._step(partial(os.write, self._write_end, data))
            if not written:
                return
            data = data[written:]

    def commit(self) -> Sha256:
        """End the bytes and return the digest of what the daemon keeps now.

        Raises:
            CacheError: nothing was kept.
        """
        self._close()
        request = pb.CommitStoreRequest(request_id=self._request_id)
        answer = self._backend._call(
            "CommitStore", request, pb.CommitStoreResponse, _COMMIT_SECONDS
        )
        return Sha256(answer.sha256.hex())

    def abort(self) -> None:
        """Keep nothing; a daemon that cannot be told any more does the same by itself."""
        self._close()
        request = pb.AbortStoreRequest(request_id=self._request_id)
        with suppress(CacheError):
            self._backend._call("AbortStore", request, pb.AbortStoreResponse, _SHORT_SECONDS)

    def _step(self, move: Callable[[], int]) -> int:
        """Move some bytes once the pipe has room; 0 at the end or where the reader is gone."""
        while True:
            try:
                return move()
            except BlockingIOError:
                if not self._poll.poll(_PIPE_STALL_SECONDS * 1000):
                    raise CacheUnavailableError("the daemon takes no bytes any more") from None
            except BrokenPipeError:
                return 0

    def _close(self) -> None:
        if self._write_end >= 0:
            os.close(self._write_end)
            self._write_end = -1


def _message(deltaspace: Deltaspace) -> "pb.Deltaspace":
    return pb.Deltaspace(bucket=deltaspace.bucket, prefix=deltaspace.prefix)


def _entry_info(entry: "pb.Entry") -> "EntryInfo":
    from dgcache_core.store import EntryInfo

    return EntryInfo(
        sha256=Sha256(entry.sha256.hex()),
        size=entry.size,
        deltaspaces=[Deltaspace(d.bucket, d.prefix) for d in entry.deltaspaces],
        age_seconds=entry.age_seconds,
        expires_in_seconds=entry.expires_in_seconds,
        idle_seconds=entry.idle_seconds,
        hits=entry.hits,
        stored_by=entry.stored_by,
        held=entry.held,
        tier=entry.tier or "memory",
    )


def _with_numbers(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: int(value)
        if isinstance(value, str) and value.isdigit()
        else (_with_numbers(value) if isinstance(value, dict) else value)
        for name, value in fields.items()
    }
