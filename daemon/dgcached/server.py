"""Puts the daemon together and carries it from the first socket to the last.

Start: directory, lock, sockets, listeners, READY; the first connection to rpc.sock starts the inner
gRPC server. Stop (SIGTERM, SIGINT): the names go first, then calls in progress get `drain_seconds`,
then sessions end, then keys are erased.
"""

import asyncio
import logging
import os
import signal
import socket
import stat
import time
from collections.abc import Mapping
from dataclasses import asdict

from dgcache_core.keyslab import KeyProtection
from dgcache_core.memory_store import MemoryStore
from dgcache_core.runtime_directory import candidates, make_first_usable
from dgcache_core.settings import MEBIBYTE, DaemonSettings, Resolved, as_text, declared
from dgcache_core.store import ResidentStore
from dgcache_core.tiered_store import TieredStore, spill_to
from dgcache_proto.v1 import dgcache_pb2 as pb
from dgcached import BUILD
from dgcached.direct_calls import DirectCalls
from dgcached.disk_tier import open_disk_tier
from dgcached.flights import Flights
from dgcached.hardening import effective
from dgcached.host_memory import Budget
from dgcached.inner_server import InnerServer
from dgcached.limits import Limits
from dgcached.listener import Listener
from dgcached.lockdown import Confinement, confine, preload
from dgcached.logs import as_unicode, event
from dgcached.monitor import Audited, Monitor
from dgcached.pages import store_status_message
from dgcached.pressure_watcher import PressureWatcher
from dgcached.refused_peers import RefusedPeers
from dgcached.registry import Registry
from dgcached.repeated import Repeated
from dgcached.runtime_guard import RuntimeGuard
from dgcached.security_events import SecurityEvents
from dgcached.service import CacheService
from dgcached.sessions import Session, SessionListener
from dgcached.sockets import Listeners, adopt_listeners, make_listeners
from dgcached.supervisor import Notifier, take_watchdog_interval
from dgcached.sweeper import Sweeper
from dgcached.watchdog import Watchdog

PROTOCOL = 2
OLDEST_PROTOCOL = 1
EX_TAKEN_AWAY = 72
"""Exit status, "critical OS file missing" (sysexits.h); systemd starts the daemon again."""

_UNLOCKED_KEYS = (
    "the kernel locks no memory for this user, so keys could be swapped out: raise RLIMIT_MEMLOCK "
    "(LimitMEMLOCK= of the unit, ulimit -l) to 1 MiB or more"
)


def open_listeners(
    settings: DaemonSettings,
    environ: Mapping[str, str],
    handed_over: list[socket.socket],
    limits: Limits,
) -> Listeners:
    """Use what systemd handed over, else listen in the first place that passes.

    Raises:
        AlreadyServing: another daemon serves there.
        CacheRefusedError: no directory passes its check.
    """
    if handed_over:
        return adopt_listeners(handed_over, limits.backlog)
    directory, descriptor, refusals = make_first_usable(candidates(settings.socket_dir, environ))
    for refusal in refusals:
        event(logging.WARNING, "directory-refused", reason=refusal)
    return make_listeners(directory, descriptor, limits.backlog)


class Daemon:
    """The running daemon; made and run inside one event loop."""

    def __init__(
        self,
        resolved: Resolved[DaemonSettings],
        budget: Budget,
        listeners: Listeners,
        notifier: Notifier,
        limits: Limits,
        *,
        supervisor: str,
        log: str,
    ) -> None:
        self._resolved = resolved
        self._budget = budget
        self._listeners = listeners
        self._notifier = notifier
        self._limits = limits
        self._supervisor = supervisor
        self._log = log
        self._started = time.monotonic()
        self._stop = asyncio.Event()
        self._status = 0
        self._security = SecurityEvents(
            kept=limits.security_events_kept, followers=limits.followers
        )
        self._disk, self._no_disk = open_disk_tier(resolved.settings, self._security)
        self._store = self._make_store()
        self._registry = Registry()
        self._sweeper = Sweeper(self._store)
        self._flights = Flights(limits.lease_seconds)
        self._guard = RuntimeGuard(listeners, self._security, limits, give_up=self._give_up)
        audited: list[Audited] = [self._guard]
        if self._disk is not None:
            audited.append(self._disk)
        self._monitor = Monitor(audited, self._security, limits, on_finding=self._guard.mend)
        self._service = CacheService(
            self._store,
            limits,
            self._security,
            on_change=self._on_change,
            on_rekey=self._on_rekey,
            flights=self._flights,
            describe=self._describe,
        )
        self._direct = DirectCalls(self._service, limits)
        self._pressure = PressureWatcher(self._store, limits)
        self._watchdog = Watchdog(notifier, take_watchdog_interval(), self._store.status)
        self._warned_of_keys = False
        self._confinement = Confinement(0, trouble="not asked for")

    def confine(self) -> None:
        """Give up what is not needed to serve; to be called in the process's only thread."""
        preload()
        changed = [self._listeners.directory_fd]
        if self._disk is not None:
            changed.append(self._disk.directory_fd)
        self._confinement = confine(changed)

    async def run(self) -> int:
        """Serve until a signal says stop, or somebody takes away what cannot be made again.

        Returns:
            The exit status.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self._listeners.make_inner_directory()
        inner = InnerServer(
            self._service,
            self._registry,
            self._listeners,
            self._limits,
            own_change=self._guard.change_of_inner,
            give_up=self._give_up,
        )
        refused, repeated = RefusedPeers(self._security, self._limits), Repeated()
        listener = Listener(
            self._listeners.rpc,
            inner,
            self._registry,
            self._limits,
            refused=refused,
            repeated=repeated,
            give_up=self._give_up,
        )
        sessions = SessionListener(
            self._listeners.session,
            self._registry,
            self._limits,
            self._hello(),
            self._end_session,
            refused,
            repeated,
            self._direct.take,
        )
        await listener.start()
        sessions.start()
        self._sweeper.start()
        await self._guard.start(sessions.listen_on, listener.listen_on)
        self._monitor.start()
        self._pressure.start()
        self._watchdog.start()
        event(
            logging.INFO,
            "started",
            build=BUILD,
            directory=self._listeners.directory,
            max_bytes=self._budget.max_bytes,
            keys=self._store.status().key_protection,
        )
        self._warn_of_unlocked_keys()
        self._notifier.notify(READY="1", STATUS=f"Serving in {self._listeners.directory}")
        await self._stop.wait()
        self._notifier.notify(STOPPING="1", STATUS="Finishing calls in progress")
        event(logging.INFO, "stopping")
        await self._monitor.stop()
        sessions.stop_accepting()
        listener.stop_accepting()
        self._listeners.withdraw()
        self._flights.close()
        refused.close()
        self._security.close()
        draining = asyncio.create_task(inner.close())
        answering = asyncio.create_task(self._direct.drain())
        # gRPC waits without an end for a connection whose client takes nothing (one that is
        # stopped, say): closing the relays ends that
        await asyncio.wait({draining, answering}, timeout=self._limits.drain_seconds)
        sessions.close()
        await answering
        await listener.close()
        repeated.close()
        await draining
        await self._sweeper.stop()
        await self._pressure.stop()
        await self._watchdog.stop()
        await loop.run_in_executor(None, self._service.close)
        await loop.run_in_executor(None, self._store.close)
        if self._disk is not None:
            self._disk.close()
        self._listeners.remove_inner()
        self._listeners.close()
        event(logging.INFO, "stopped", uptime_seconds=round(time.monotonic() - self._started))
        return self._status

    def _make_store(self) -> ResidentStore:
        """Make the memory tier, over the disk tier where there is one."""
        memory = MemoryStore(
            self._budget.max_bytes,
            self._resolved.settings.ttl_seconds,
            may_fork=False,
            spill=spill_to(self._disk.store) if self._disk is not None else None,
        )
        if self._disk is None:
            return memory
        return TieredStore(memory, self._disk.store, flush_seconds=self._limits.disk_flush_seconds)

    def _give_up(self, reason: str) -> None:
        """End in good order: whoever starts the daemon the next time gets everything anew."""
        if self._stop.is_set():
            return
        event(logging.ERROR, "giving-up", reason=reason)
        self._status = EX_TAKEN_AWAY
        self._stop.set()

    def _end_session(self, session: Session) -> None:
        self._direct.end_session(session)
        self._flights.end_session(session)

    def _on_change(self) -> None:
        self._sweeper.wake()
        self._pressure.wake()

    def _on_rekey(self) -> None:
        event(logging.INFO, "rekeyed", keys=self._store.status().key_protection)
        self._warn_of_unlocked_keys()

    def _warn_of_unlocked_keys(self) -> None:
        """Once: what protects the keys can only change when they are made anew."""
        unlocked = self._store.status().key_protection == KeyProtection.UNLOCKED
        if unlocked and not self._warned_of_keys:
            self._warned_of_keys = True
            event(logging.WARNING, "keys-unlocked", reason=_UNLOCKED_KEYS)

    def _hello(self) -> pb.Hello:
        return pb.Hello(
            protocol=PROTOCOL,
            oldest_protocol=OLDEST_PROTOCOL,
            build=BUILD,
            limits=pb.Limits(
                max_entry_bytes=self._store.max_entry_bytes,
                max_message_bytes=self._limits.message_bytes,
                calls_per_session=self._limits.calls_per_session,
                stores_at_once=self._limits.stores_at_once,
                reads_at_once=self._limits.reads_at_once,
                lease_seconds=self._limits.lease_seconds,
            ),
        )

    def _describe(self) -> pb.StatusResponse:
        status = self._store.status()
        hardening = effective()
        return pb.StatusResponse(
            build=BUILD,
            protocol=PROTOCOL,
            pid=os.getpid(),
            uptime_seconds=time.monotonic() - self._started,
            supervisor=self._supervisor,
            store=store_status_message(status),
            sessions=len(self._registry.sessions),
            connections=self._registry.connections,
            stores_in_progress=self._service.stores_in_progress,
            reads_in_progress=self._service.reads_in_progress,
            hardening=pb.Hardening(
                **asdict(hardening),
                keys=status.key_protection,
                shares_handouts=status.shares_handouts,
                landlock_abi=self._confinement.landlock_abi,
                landlock_refuses=self._confinement.refuses,
                landlock_trouble=self._confinement.trouble,
                directory_modes=self._directory_modes(),
            ),
            settings=self._effective_settings(),
            log=as_unicode(self._log),
            leases=self._flights.describe(),
            security_events=self._security.counts,
            monitor=pb.Monitor(**asdict(self._monitor.status)),
            pressure=self._pressure.message(),
            disk=self._disk.message() if self._disk is not None else self._no_disk,
        )

    def _directory_modes(self) -> dict[str, int]:
        found = {as_unicode(self._listeners.directory): self._listeners.directory_fd}
        if self._disk is not None:
            found[as_unicode(self._disk.store.status().directory)] = self._disk.directory_fd
        return {path: stat.S_IMODE(os.fstat(fd).st_mode) for path, fd in found.items()}

    def _effective_settings(self) -> list[pb.EffectiveSetting]:
        values = {
            **{
                field: getattr(self._resolved.settings, field) for field in declared(DaemonSettings)
            },
            "memory_size_mb": self._budget.max_bytes / MEBIBYTE,
            "socket_dir": self._listeners.directory,
        }
        return [
            pb.EffectiveSetting(
                name=one.variable,
                value=as_unicode(as_text(field, values[field])),
                origin=as_unicode(self._resolved.origins[field]),
            )
            for field, one in declared(DaemonSettings).items()
        ]
