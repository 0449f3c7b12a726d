"""The disk tier as the daemon keeps it: opened, watched, and told of.

Whatever is wrong with the disk is one line in the log and one in Status; the daemon serves on from
memory. What somebody else did to its files is a security event, whoever found it: the monitor, or a
lookup that met the file.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dgcache_core.directories import open_private_directory
from dgcache_core.disk_names import tier_directory
from dgcache_core.disk_records import DiskEvent, DiskEventKind, DiskStatus
from dgcache_core.disk_store import DiskStore
from dgcache_core.errors import CacheError
from dgcache_core.settings import MEBIBYTE, DaemonSettings, base_directory
from dgcache_proto.v1 import dgcache_pb2 as pb
from dgcached.logs import as_unicode, event
from dgcached.monitor import Finding
from dgcached.security_events import SecurityEvents
from dgcached.watchers import ITSELF, Directory

_NO_ALARMS = (DiskEventKind.DISABLED, DiskEventKind.ENABLED)


class DiskTier:
    """A `DiskStore` with its events and its watched directories. Implements `Audited`."""

    place = "disk"

    def __init__(self, store: DiskStore, directory_fd: int) -> None:
        """Take over both; see `open_disk_tier`."""
        self.store = store
        self.directory_fd = directory_fd
        self.on_new_directory: Callable[[Directory], None] = lambda _: None

    def watched_directories(self) -> list[Directory]:
        """See `Audited`."""
        return [self._directory(path) for path in self.store.watched_directories()]

    def audit(self, directory: Directory, name: str) -> Finding | None:
        """See `Audited`. The store tells of what it finds by itself, so nothing is returned."""
        relative = name if directory.name == ITSELF else f"{directory.name}/{name}"
        self.store.audit(relative)
        return None

    def audit_all(self) -> list[Finding]:
        """See `Audited`; as `audit`."""
        self.store.audit_all()
        return []

    def add_directory(self, path: Path) -> None:
        """Hear of a directory that the store made."""
        self.on_new_directory(self._directory(path))

    def close(self) -> None:
        """Close the directory; the store is closed by whoever has it."""
        os.close(self.directory_fd)

    def message(self) -> pb.DiskStatus:
        """Return its figures for Status."""
        return disk_status_message(self.store.status())

    def _directory(self, path: Path) -> Directory:
        relative = path.relative_to(self.store.status().directory)
        return Directory(self.directory_fd, ITSELF if relative == Path() else str(relative))


def open_disk_tier(
    settings: DaemonSettings, security: SecurityEvents
) -> tuple[DiskTier | None, pb.DiskStatus | None]:
    """Return the tier that the settings ask for, or, with a line in the log, why there is none.

    The key in the settings is wiped: the tier has its own copy, in protected memory.

    Returns:
        the tier, and what Status says instead where it fails; neither where none is asked for.
    """
    if settings.disk_size_mb <= 0:
        return None, None
    tier: DiskTier | None = None

    def on_directory(path: Path) -> None:
        if tier is not None:
            tier.add_directory(path)

    key = settings.encryption_key
    try:
        directory = tier_directory(base_directory(settings.cache_dir))
        store = DiskStore(
            directory,
            int(settings.disk_size_mb * MEBIBYTE),
            key=key.view() if key is not None else None,
            may_fork=False,
            on_event=_reporter(security),
            on_directory=on_directory,
        )
        try:
            tier = DiskTier(store, open_private_directory(directory))
        except BaseException:
            store.close()
            raise
    except (CacheError, OSError) as error:
        event(logging.ERROR, "disk-disabled", reason=error)
        return None, pb.DiskStatus(disabled_reason=as_unicode(error))
    finally:
        if key is not None:
            key.wipe()
    status = store.status()
    event(
        logging.INFO,
        "disk-opened",
        directory=directory,
        max_bytes=status.max_bytes,
        entries=status.entries,
        persistent=status.persistent,
    )
    return tier, None


def _reporter(security: SecurityEvents) -> Callable[[DiskEvent], None]:
    """Return what hears the store's events, in any thread, and reports them in the loop."""
    loop = asyncio.get_running_loop()

    def report(told: DiskEvent) -> None:
        if told.kind in _NO_ALARMS:
            level = logging.ERROR if told.kind is DiskEventKind.DISABLED else logging.WARNING
            event(level, told.kind, reason=told.message)
        else:
            security.report(told.kind, place=DiskTier.place, name=told.name, detail=told.message)

    def on_event(told: DiskEvent) -> None:
        with suppress(RuntimeError):  # the loop is over
            loop.call_soon_threadsafe(report, told)

    return on_event


def disk_status_message(status: DiskStatus) -> pb.DiskStatus:
    """Return how full the tier is as a message."""
    counters = status.counters
    return pb.DiskStatus(
        directory=as_unicode(status.directory),
        enabled=status.enabled,
        disabled_reason=status.disabled_reason,
        persistent=status.persistent,
        entries=status.entries,
        bytes=status.bytes,
        max_bytes=status.max_bytes,
        loads=counters.loads,
        loaded_bytes=counters.loaded_bytes,
        keeps=counters.keeps,
        kept_bytes=counters.kept_bytes,
        evictions=counters.evictions,
        expirations=counters.expirations,
        corruptions=counters.corruptions,
        alarms=counters.alarms,
        foreign_files=counters.foreign_files,
        other_key_files=counters.other_key_files,
    )
