"""The daemon's own words as messages: entries in pages, figures for Status, events."""

from bisect import bisect_right

from dgcache_core.references import Sha256
from dgcache_core.store import EntryInfo, StoreStatus
from dgcache_proto.v1 import dgcache_pb2 as pb
from dgcached.security_events import SecurityEvent

_LARGEST_PAGE = 1000
_LISTED_DELTASPACES = 100
_FRAMING_BYTES = 8
"""What a repeated field adds to each entry at the most, and some."""


def page_of_entries(
    entries: list[EntryInfo], page_size: int, after: Sha256 | None, max_bytes: int
) -> pb.ListResponse:
    """Return the entries behind `after` in the order of their digests, in about `max_bytes`.

    There is always one; it has at most 130 kB, the length of the deltaspaces that are listed.
    """
    ordered = sorted(entries, key=lambda entry: entry.sha256)
    start = bisect_right(ordered, after, key=lambda entry: entry.sha256) if after else 0
    wanted = min(page_size, _LARGEST_PAGE) or _LARGEST_PAGE
    page = pb.ListResponse()
    size = 0
    for entry in ordered[start : start + wanted]:
        message = entry_message(entry)
        size += message.ByteSize() + _FRAMING_BYTES
        if size > max_bytes and page.entries:
            break
        page.entries.append(message)
    page.more = start + len(page.entries) < len(ordered)
    return page


def entry_message(entry: EntryInfo) -> pb.Entry:
    """Return one entry as a message."""
    listed = entry.deltaspaces[:_LISTED_DELTASPACES]
    return pb.Entry(
        sha256=bytes.fromhex(entry.sha256),
        size=entry.size,
        deltaspaces=[pb.Deltaspace(bucket=d.bucket, prefix=d.prefix) for d in listed],
        age_seconds=entry.age_seconds,
        expires_in_seconds=entry.expires_in_seconds,
        idle_seconds=entry.idle_seconds,
        hits=entry.hits,
        stored_by=entry.stored_by,
        held=entry.held,
        tier=entry.tier,
    )


def store_status_message(status: StoreStatus) -> pb.StoreStatus:
    """Return how full the store is as a message."""
    counters = status.counters
    return pb.StoreStatus(
        entries=status.entries,
        bindings=status.bindings,
        max_bytes=status.max_bytes,
        max_entry_bytes=status.max_entry_bytes,
        blob_bytes=status.blob_bytes,
        handout_bytes=status.handout_bytes,
        reserved_bytes=status.reserved_bytes,
        handouts=status.handouts,
        hits=counters.hits,
        shared_hits=counters.shared_hits,
        hit_bytes=counters.hit_bytes,
        stores=counters.stores,
        stored_bytes=counters.stored_bytes,
        refused_stores=counters.refused_stores,
        evictions=counters.evictions,
        expirations=counters.expirations,
        corruptions=counters.corruptions,
        pressure_evictions=counters.pressure_evictions,
        limit_bytes=status.limit_bytes,
        misses={str(reason): count for reason, count in counters.misses.items() if count},
    )


def event_message(event: SecurityEvent, dropped: int) -> pb.Event:
    """Return one security event as a message."""
    return pb.Event(
        sequence=event.sequence,
        time_seconds=event.time_seconds,
        kind=event.kind,
        severity=event.severity,
        fields=event.fields,
        dropped=dropped,
    )
