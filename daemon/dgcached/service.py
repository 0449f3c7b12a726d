"""The gRPC service: turns messages into calls of the store, and handouts into descriptors.

Decryption and hashing happen in worker threads; the event loop only looks things up, and decrypts
what is one chunk, which takes less than to wake a thread up. A handout that nobody waits for any
more is closed by whoever finds out.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from functools import partial
from typing import TypeVar

from grpc import aio

from dgcache_core.aead import CHUNK_BYTES
from dgcache_core.errors import (
    CacheCorruptionError,
    CacheError,
    CacheFullError,
    CacheMissError,
    CacheUnavailableError,
    InvalidReferenceError,
    MissReason,
)
from dgcache_core.handouts import Handout
from dgcache_core.leases import GoAlone, Granted
from dgcache_core.references import Deltaspace, Sha256, parse_sha256
from dgcache_core.store import ResidentStore
from dgcache_proto.v1 import dgcache_pb2 as pb
from dgcache_proto.v1 import dgcache_pb2_grpc
from dgcached.admission import current_caller
from dgcached.deposits import Deposit
from dgcached.flights import Flights
from dgcached.limits import Limits
from dgcached.pages import event_message, page_of_entries
from dgcached.security_events import SecurityEvents
from dgcached.sessions import Session

T = TypeVar("T")

_LONGEST_WAIT_SECONDS = 3600.0
_MOST_LOOKS = 3
"""How often a lookup that waited looks again: what was stored may be evicted before it looks."""


class CacheService(dgcache_pb2_grpc.ReferenceCacheServicer):
    """Implements `dgcache.v1.ReferenceCache`; the contract is in the .proto."""

    def __init__(
        self,
        store: ResidentStore,
        limits: Limits,
        security: SecurityEvents,
        *,
        on_change: Callable[[], None],
        flights: Flights,
        on_rekey: Callable[[], None],
        describe: Callable[[], pb.StatusResponse],
    ) -> None:
        """Serve `store`.

        Args:
            store: where references live.
            limits: the bounds.
            security: what Watch streams.
            on_change: called after the store handed something out or took something in.
            flights: who fetches what.
            on_rekey: called after the keys were made anew.
            describe: makes the answer to Status.
        """
        self._store = store
        self._limits = limits
        self._security = security
        self._on_change = on_change
        self._flights = flights
        self._on_rekey = on_rekey
        self._describe = describe
        self._decryption = ThreadPoolExecutor(limits.decryptions_at_once, "dg-cache-lookup")
        self._reading = ThreadPoolExecutor(limits.stores_at_once, "dg-cache-deposit")
        self._deposits = 0
        self._reads = 0

    @property
    def stores_in_progress(self) -> int:
        """How many deposits are open."""
        return self._deposits

    @property
    def reads_in_progress(self) -> int:
        """How many streams of Read are open."""
        return self._reads

    def close(self) -> None:
        """Wait for the worker threads; every session must be closed before."""
        self._decryption.shutdown(wait=True)
        self._reading.shutdown(wait=True)

    # -- handing out ---------------------------------------------------------------------------

    async def Lookup(
        self, request: pb.LookupRequest, context: aio.ServicerContext
    ) -> pb.LookupResponse:
        """See the .proto."""
        session = current_caller().require_session()
        found = await self._handout_or_lease(request, session)
        if isinstance(found, pb.Lease):
            return pb.LookupResponse(lease=found)
        handout = found
        try:
            session.send_descriptor(request.request_id, pb.Descriptor.PURPOSE_HANDOUT, handout.fd)
        finally:
            os.close(handout.fd)
        return pb.LookupResponse(size=handout.size)

    async def Read(
        self, request: pb.ReadRequest, context: aio.ServicerContext
    ) -> AsyncIterator[pb.ReadResponse]:
        """See the .proto."""
        with self._one_more_read():
            handout = await self._handout(_deltaspace(request.deltaspace), _sha256(request.sha256))
            try:
                yield pb.ReadResponse(size=handout.size)
                for offset in range(0, handout.size, CHUNK_BYTES):
                    yield pb.ReadResponse(data=os.pread(handout.fd, CHUNK_BYTES, offset))
            finally:
                os.close(handout.fd)

    @contextmanager
    def _one_more_read(self) -> Iterator[None]:
        """Hold a place among the streams in progress."""
        if self._reads >= self._limits.reads_at_once:
            raise CacheFullError(f"{self._reads} byte streams are in progress, more are not opened")
        self._reads += 1
        try:
            yield
        finally:
            self._reads -= 1

    async def ReleaseLease(
        self, request: pb.ReleaseLeaseRequest, context: aio.ServicerContext
    ) -> pb.ReleaseLeaseResponse:
        """See the .proto."""
        self._flights.give_back(
            request.lease_id,
            current_caller().require_session(),
            cannot_be_stored=request.cannot_be_stored,
        )
        return pb.ReleaseLeaseResponse()

    async def _handout_or_lease(
        self, request: pb.LookupRequest, session: Session
    ) -> Handout | pb.Lease:
        """Look up; where a lease is wanted, wait for whoever fetches, and look again."""
        deltaspace, sha256 = _deltaspace(request.deltaspace), _sha256(request.sha256)
        wants_lease = request.on_miss == pb.LookupRequest.ON_MISS_LEASE
        if not wants_lease:
            return await self._handout(deltaspace, sha256)
        for _ in range(_MOST_LOOKS):
            try:
                return await self._handout(deltaspace, sha256)
            except CacheCorruptionError as error:
                miss = CacheMissError(str(error), MissReason.DROPPED_CORRUPT)
            except CacheMissError as error:
                miss = error
            answer = await self._flights.ask(sha256, session, _wait_seconds(request))
            if isinstance(answer, Granted):
                seconds = self._flights.lease_seconds
                return pb.Lease(id=answer.id, seconds=seconds, miss_reason=miss.reason)
            if isinstance(answer, GoAlone):
                break
        raise miss

    async def _handout(self, deltaspace: Deltaspace, sha256: Sha256) -> Handout:
        try:
            handout = self._store.lookup_now(deltaspace, sha256)
            if handout is None:
                handout = await _run_owned(
                    self._decryption,
                    lambda: self._store.lookup(deltaspace, sha256),
                    lambda unwanted: os.close(unwanted.fd),
                )
        except CacheCorruptionError as error:
            reason = str(error).replace(sha256, sha256[:12])
            self._security.report("entry-dropped", sha256=sha256[:12], reason=reason)
            raise
        self._on_change()
        return handout

    # -- storing -------------------------------------------------------------------------------

    async def BeginStore(
        self, request: pb.BeginStoreRequest, context: aio.ServicerContext
    ) -> pb.BeginStoreResponse:
        """See the .proto."""
        session = current_caller().require_session()
        if request.request_id in session.deposits:
            raise InvalidReferenceError("this request id is of a store in progress")
        if len(session.deposits) >= self._limits.deposits_per_session:
            raise CacheFullError("this session has too many stores that it did not end")
        deposit = await self._open_deposit(
            _deltaspace(request.deltaspace), request.size, request.expected_sha256
        )
        if request.request_id in session.deposits:  # begun while this one waited for room
            await deposit.end()
            raise InvalidReferenceError("this request id is of a store in progress")
        session.deposits[request.request_id] = deposit
        deposit.when_over(lambda: session.deposits.pop(request.request_id, None))
        write_end = deposit.lend()
        try:
            session.send_descriptor(request.request_id, pb.Descriptor.PURPOSE_DEPOSIT, write_end)
        except CacheError:
            del session.deposits[request.request_id]
            await deposit.end()
            raise
        finally:
            os.close(write_end)
        return pb.BeginStoreResponse()

    async def CommitStore(
        self, request: pb.CommitStoreRequest, context: aio.ServicerContext
    ) -> pb.CommitStoreResponse:
        """See the .proto."""
        deposits = current_caller().require_session().deposits
        try:
            sha256 = await self._deposit(request.request_id).commit()
        finally:
            deposits.pop(request.request_id, None)
        self._took_in(sha256)
        return pb.CommitStoreResponse(sha256=bytes.fromhex(sha256))

    async def AbortStore(
        self, request: pb.AbortStoreRequest, context: aio.ServicerContext
    ) -> pb.AbortStoreResponse:
        """See the .proto."""
        deposit = self._deposit(request.request_id)
        del current_caller().require_session().deposits[request.request_id]
        await deposit.end()
        return pb.AbortStoreResponse()

    async def Write(
        self, request_iterator: AsyncIterator[pb.WriteRequest], context: aio.ServicerContext
    ) -> pb.WriteResponse:
        """See the .proto."""
        first = await anext(aiter(request_iterator), None)
        if not isinstance(first, pb.WriteRequest) or first.WhichOneof("part") != "begin":
            raise InvalidReferenceError("the first message of a Write is its begin")
        deposit = await self._open_deposit(
            _deltaspace(first.begin.deltaspace), first.begin.size, first.begin.expected_sha256
        )
        pouring = asyncio.create_task(_pour(request_iterator, deposit.lend()))
        try:
            await asyncio.wait({pouring, deposit.filled}, return_when=asyncio.FIRST_COMPLETED)
            if pouring.done():
                pouring.result()
                await asyncio.wait({deposit.filled})
            if context.cancelled():  # its messages end as if the client had said so
                raise CacheUnavailableError("the client went away")
            sha256 = await deposit.commit()
        finally:
            pouring.cancel()
            deposit.cancel()
        self._took_in(sha256)
        return pb.WriteResponse(sha256=bytes.fromhex(sha256))

    def _took_in(self, sha256: Sha256) -> None:
        self._flights.stored(sha256)
        self._on_change()

    async def _open_deposit(self, deltaspace: Deltaspace, size: int, expected: bytes) -> Deposit:
        """Reserve room and a place among the stores in progress."""
        if self._deposits >= self._limits.stores_at_once:
            raise CacheFullError(f"{self._deposits} stores are in progress, more are not admitted")
        digest = _sha256(expected) if expected else None
        begin = partial(
            self._store.begin,
            size,
            deltaspace,
            expected=digest,
            stored_by=str(current_caller().peer),
        )
        self._deposits += 1
        try:  # making room may mean writing to disk
            ingest = await _run_owned(None, begin, lambda unwanted: unwanted.abort())
            deposit = Deposit(ingest, self._limits, self._reading)
        except BaseException as error:
            self._deposits -= 1
            if isinstance(error, CacheFullError) and digest is not None:
                self._flights.cannot_be_stored(digest)
            if isinstance(error, OSError):
                raise CacheFullError(f"no descriptors for a store: {error.strerror}") from error
            raise
        deposit.filled.add_done_callback(self._count_ended)
        return deposit

    def _count_ended(self, _: "asyncio.Future[None]") -> None:
        self._deposits -= 1

    def _deposit(self, request_id: int) -> Deposit:
        deposit = current_caller().require_session().deposits.get(request_id)
        if deposit is None:
            raise InvalidReferenceError("this session has no such store in progress")
        return deposit

    # -- the rest ------------------------------------------------------------------------------

    async def Contains(
        self, request: pb.ContainsRequest, context: aio.ServicerContext
    ) -> pb.ContainsResponse:
        """See the .proto."""
        look = partial(
            self._store.miss_reason, _deltaspace(request.deltaspace), _sha256(request.sha256)
        )
        reason = await asyncio.get_running_loop().run_in_executor(None, look)
        return pb.ContainsResponse(contained=reason is None, miss_reason=reason or "")

    async def Evict(
        self, request: pb.EvictRequest, context: aio.ServicerContext
    ) -> pb.EvictResponse:
        """See the .proto."""
        evict = partial(self._store.evict, _deltaspace(request.deltaspace))
        freed = await asyncio.get_running_loop().run_in_executor(None, evict)
        return pb.EvictResponse(freed_entries=freed.entries, freed_bytes=freed.bytes)

    async def Clear(
        self, request: pb.ClearRequest, context: aio.ServicerContext
    ) -> pb.ClearResponse:
        """See the .proto."""
        clear = partial(self._store.clear, rekey=request.rekey)
        freed = await asyncio.get_running_loop().run_in_executor(None, clear)
        if request.rekey:
            self._on_rekey()
        return pb.ClearResponse(freed_entries=freed.entries, freed_bytes=freed.bytes)

    async def List(self, request: pb.ListRequest, context: aio.ServicerContext) -> pb.ListResponse:
        """See the .proto."""
        after = _sha256(request.after_sha256) if request.after_sha256 else None
        return page_of_entries(
            self._store.entries(), request.page_size, after, self._limits.message_bytes // 2
        )

    async def Status(
        self, request: pb.StatusRequest, context: aio.ServicerContext
    ) -> pb.StatusResponse:
        """See the .proto."""
        return self._describe()

    async def Watch(
        self, request: pb.WatchRequest, context: aio.ServicerContext
    ) -> AsyncIterator[pb.Event]:
        """See the .proto."""
        async with aclosing(self._security.stream(follow=request.follow)) as stream:
            async for one, dropped in stream:
                yield event_message(one, dropped)


def _deltaspace(message: pb.Deltaspace) -> Deltaspace:
    return Deltaspace(message.bucket, message.prefix)


def _wait_seconds(request: pb.LookupRequest) -> float:
    seconds = request.wait_seconds
    if not 0 <= seconds <= _LONGEST_WAIT_SECONDS:  # false for nan
        raise InvalidReferenceError(f"a wait is 0 to {_LONGEST_WAIT_SECONDS:g} seconds")
    return seconds


def _sha256(raw: bytes) -> Sha256:
    return parse_sha256(raw.hex())


async def _run_owned(
    executor: Executor | None, make: Callable[[], T], dispose: Callable[[T], None]
) -> T:
    """Run `make` in a thread; what it makes is disposed of if this task is cancelled meanwhile."""
    made = asyncio.get_running_loop().run_in_executor(executor, make)

    def dispose_of(future: "asyncio.Future[T]") -> None:
        if not future.cancelled() and future.exception() is None:
            dispose(future.result())

    try:
        return await asyncio.shield(made)
    except asyncio.CancelledError:
        made.add_done_callback(dispose_of)
        raise


async def _pour(requests: AsyncIterator[pb.WriteRequest], write_end: int) -> None:
    """Write the data of every message into a pipe, and close it. The reader's limits bound it."""
    os.set_blocking(write_end, False)
    try:
        async for request in requests:
            if not isinstance(request, pb.WriteRequest) or request.WhichOneof("part") != "data":
                raise InvalidReferenceError("after its begin, the messages of a Write are data")
            data = memoryview(request.data)
            while data:
                try:
                    data = data[os.write(write_end, data) :]
                except BlockingIOError:
                    await _writable(write_end)
                except BrokenPipeError:
                    return  # the reader gave up and will say why at the commit
    finally:
        os.close(write_end)


async def _writable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    with _watching(loop, descriptor, ready):
        await ready


@contextmanager
def _watching(
    loop: asyncio.AbstractEventLoop, descriptor: int, ready: "asyncio.Future[None]"
) -> Iterator[None]:
    def on_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_writer(descriptor, on_ready)
    try:
        yield
    finally:
        loop.remove_writer(descriptor)
