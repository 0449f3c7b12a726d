"""What others do in the runtime directory is seen and undone, and clients go on being served."""

import asyncio
import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dgcache_core.directories import open_private_directory
from dgcache_core.ledger import ChangeKind
from dgcache_proto.v1 import dgcache_pb2 as pb
from dgcached.limits import Limits
from dgcached.monitor import Finding
from dgcached.runtime_guard import RuntimeGuard
from dgcached.security_events import SecurityEvents
from dgcached.sockets import Listeners, make_listeners
from tests.support.wire import (
    OWNER_UID,
    SECONDS,
    SPACE,
    Client,
    Daemon,
    as_user,
    eventually,
    running,
)

SOCKETS = ["session.sock", "rpc.sock"]

as_both = pytest.mark.parametrize(
    "uid", [None, pytest.param(OWNER_UID, marks=pytest.mark.root)], ids=["self", "user"]
)
with_all = pytest.mark.parametrize("mechanisms", [["fanotify"], ["inotify"], []], ids=str)

# Its standard error is a file; as the journal's pipe it would have this variable (systemd.exec(5)).
_TO_THE_JOURNAL = (
    "sh",
    "-c",
    'JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec "$@"',
    "sh",
)

# What a socket unit does: listens, then starts the daemon with descriptors 3 and 4.
_SOCKET_UNIT = """
import os, socket, sys
kinds = {"rpc": socket.SOCK_STREAM, "session": socket.SOCK_SEQPACKET}
for number, (name, kind) in enumerate(kinds.items()):
    made = socket.socket(socket.AF_UNIX, kind)
    made.bind(f"{sys.argv[1]}/{name}.sock")
    made.listen()
    os.fchmod(made.fileno(), 0o600)
    if sys.argv[2] == "removed":
        os.unlink(f"{sys.argv[1]}/{name}.sock")
    os.dup2(made.detach(), 13 + number)
os.dup2(13, 3)
os.dup2(14, 4)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2")
os.execvp(sys.argv[3], sys.argv[3:])
"""

# A client of its own, since the daemon admits its own user alone.
_SERVED = """
print(heard(sys.argv[1] + "/session.sock", socket.SOCK_SEQPACKET) != b"")
print(heard(sys.argv[1] + "/rpc.sock", socket.SOCK_STREAM, bytes.fromhex(sys.argv[2])) != b"")
"""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@contextmanager
def guarded(
    mechanisms: list[str] | None = None, uid: int | None = None, **limits: Any
) -> Iterator[Daemon]:
    """Run a daemon that logs as to the journal; without a mechanism it audits at every moment."""
    if mechanisms is not None:
        limits = {
            "watch_mechanisms": mechanisms,
            "audit_seconds": 3600 if mechanisms else 0.1,
            **limits,
        }
    with running(limits=limits, uid=uid, prefix=_TO_THE_JOURNAL) as daemon:
        if uid is None:
            assert served(daemon, None)  # so that the inner server runs
        yield daemon


def alarmed(daemon: Daemon, kind: str, name: str, times: int = 1) -> None:
    """Wait for so many lines with the journal's priority 2."""
    line = f"<2>security kind={kind} place=runtime name={name}"
    eventually(lambda: daemon.logged().count(line) >= times)
    assert daemon.logged().count(line) == times


def replace(path: Path) -> None:
    """Put a socket of our own in its place, as somebody would who wants to hear its clients."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as theirs:
        theirs.bind(str(path.with_name("x")))
        path.with_name("x").rename(path)


def served(daemon: Daemon, uid: int | None) -> bool:
    """Tell whether both sockets answer their owner."""
    return as_user(uid, _SERVED, daemon.directory, _PREFACE.hex()) == "True\nTrue"


@as_both
@with_all
@pytest.mark.parametrize("name", SOCKETS)
def test_a_socket_that_is_taken_away_is_made_again(
    name: str, mechanisms: list[str], uid: int | None
) -> None:
    """Removed, or replaced by somebody else's: one alarm each, and new clients are served."""
    with guarded(mechanisms, uid) as daemon:
        path = daemon.directory / name
        for change, kind in ((Path.unlink, "deleted"), (replace, "replaced")):
            change(path)
            alarmed(daemon, kind, name)
            eventually(lambda: served(daemon, uid))
            assert path.stat().st_mode & 0o777 == 0o600
        assert "monitor-limited" not in daemon.logged() or not mechanisms
        assert daemon.stop() == 0
        assert daemon.logged().count("<2>") == 2
        assert [one.name for one in daemon.directory.iterdir()] == ["daemon.lock"]


@pytest.mark.parametrize("name", SOCKETS)
def test_whoever_is_connected_goes_on_when_a_socket_is_made_again(name: str) -> None:
    """Its session, its calls and what it stored; counters and Watch tell what happened."""
    with guarded() as daemon, Client(daemon.directory) as client:
        digest = client.store(b"data")
        (daemon.directory / name).unlink()
        eventually(lambda: client.status().security_events == {"deleted": 1})
        os.close(client.lookup(digest))
        with Client(daemon.directory) as newcomer:
            os.close(newcomer.lookup(digest))
        (event,) = client.call("Watch", pb.WatchRequest())
        assert (event.sequence, event.kind, event.severity) == (1, "deleted", "critical")
        assert event.fields == {"place": "runtime", "name": name}


def test_a_socket_that_is_taken_away_while_it_is_made_is_not_forgotten(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its row in the ledger; the next look finds it missing."""
    directory = short_directory / "s"
    path = directory / "rpc.sock"
    make = Listeners.bind_again

    def make_and_lose(self: Listeners, name: str) -> socket.socket:
        old = make(self, name)
        path.unlink()
        return old

    async def rpc_listen_on(_: socket.socket) -> None:
        pass

    async def story() -> None:
        listeners = make_listeners(directory, open_private_directory(directory, create=True), 8)
        listeners.make_inner_directory()
        security = SecurityEvents(kept=8, followers=0)
        guard = RuntimeGuard(listeners, security, Limits(), give_up=pytest.fail)
        await guard.start(lambda _: None, rpc_listen_on)
        (place, _) = guard.watched_directories()
        path.unlink()
        for replacement in (make_and_lose, make):
            finding = guard.audit(place, "rpc.sock")
            assert finding == Finding(ChangeKind.DELETED, "rpc.sock")
            monkeypatch.setattr(Listeners, "bind_again", replacement)
            await guard.mend(guard, finding)
        assert path.is_socket()
        assert guard.audit(place, "rpc.sock") is None
        listeners.close()

    asyncio.run(story())


def test_nobody_listens_behind_a_link_to_a_socket(short_directory: Path) -> None:
    """A hard link in a directory that is open to others leads to nobody, as soon as it is seen."""

    def is_refused() -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            return connection.connect_ex(str(short_directory / "link")) == errno.ECONNREFUSED

    with guarded(audit_seconds=0.1) as daemon:
        os.link(daemon.directory / "rpc.sock", short_directory / "link")
        alarmed(daemon, "linked", "rpc.sock")
        eventually(is_refused)
        assert served(daemon, None)


@with_all
def test_modes_that_somebody_loosens_are_put_back(mechanisms: list[str]) -> None:
    """Of the sockets, the lock and what is inside; not the directory's own, which clients refuse
    with the command that mends it."""
    with guarded(mechanisms) as daemon:
        names = [*SOCKETS, "daemon.lock", "inner", "inner/inner.sock"]
        for name in names:
            path = daemon.directory / name
            before = path.stat().st_mode & 0o777
            path.chmod(0o777)
            alarmed(daemon, "chmod", name)
            eventually(lambda path=path, mode=before: path.stat().st_mode & 0o777 == mode)
        daemon.directory.chmod(0o755)
        alarmed(daemon, "chmod", ".")
        assert daemon.directory.stat().st_mode & 0o777 == 0o755
        assert daemon.stop() == 0
        assert daemon.logged().count("<2>") == len(names) + 1


@with_all
def test_a_lock_that_is_taken_away_is_taken_again(mechanisms: list[str]) -> None:
    """So that no second daemon serves in the directory."""
    with guarded(mechanisms) as daemon:
        lock = daemon.directory / "daemon.lock"
        lock.unlink()
        alarmed(daemon, "deleted", "daemon.lock")
        eventually(lambda: f":{lock.stat().st_ino} " in Path("/proc/locks").read_text())
        assert served(daemon, None)


def _remove_inner(directory: Path) -> None:
    (directory / "inner/inner.sock").unlink()


def _replace_inner(directory: Path) -> None:
    (directory / "inner").rename(directory / "x")
    (directory / "inner").mkdir(0o700)


def _move_away(directory: Path) -> None:
    directory.rename(directory.with_name("moved"))


@pytest.mark.parametrize("change", [_remove_inner, _replace_inner, _move_away])
@with_all
def test_what_cannot_be_made_again_ends_the_daemon(
    mechanisms: list[str], change: Callable[[Path], None]
) -> None:
    """In good order, with status 72, so that the next one serves where clients look."""
    with guarded(mechanisms) as daemon:
        change(daemon.directory)
        assert daemon.process.wait(SECONDS) == 72, daemon.logged()
        assert daemon.logged().count("was taken away") == 1
        assert "stopped uptime_seconds" in daemon.logged()
        with running(daemon.directory) as successor:
            assert served(successor, None)


def test_whoever_goes_on_taking_sockets_away_ends_the_daemon() -> None:
    """There is no endless war over a name."""
    with guarded(rebinds_per_minute=3) as daemon:
        path = daemon.directory / "rpc.sock"
        for times in range(1, 4):
            path.unlink()
            alarmed(daemon, "deleted", "rpc.sock", times)
            eventually(path.exists)
        path.unlink()
        assert daemon.process.wait(SECONDS) == 72
        assert "somebody goes on taking rpc.sock away" in daemon.logged()


def test_what_clients_and_others_may_do_raises_no_alarm() -> None:
    """A starter's lock, files of other names, connections, a second daemon that gives way."""
    with guarded(audit_seconds=0.01) as daemon, Client(daemon.directory) as client:
        (daemon.directory / "start.lock").touch()
        (daemon.directory / "start.lock").unlink()
        (daemon.directory / "other").mkdir()
        client.store(b"data")
        with pytest.raises(AssertionError, match="already serves"), running(daemon.directory):
            pass
        assert served(daemon, None)
        assert client.status().security_events == {}
        assert "<2>" not in daemon.logged()


@pytest.mark.parametrize("when", ["later", "removed"])
def test_the_sockets_of_a_unit_are_made_again_in_place_of_those_nobody_finds(
    short_directory: Path, when: str
) -> None:
    """The unit goes on listening on files that are gone; the daemon serves on its own, also where
    they were gone before it was started, and takes only these away in the end."""
    place = short_directory / "s"
    place.mkdir(0o700)
    prefix = (sys.executable, "-c", _SOCKET_UNIT, str(place), when)
    with running(place, prefix=prefix) as daemon, Client(place) as client:
        if when == "later":
            (place / "session.sock").unlink()
            eventually(lambda: client.status().security_events == {"deleted": 1})
        with Client(place) as newcomer:
            assert newcomer.store(b"data")
        assert client.status().security_events["deleted"] == (1 if when == "later" else 2)
        assert daemon.stop() == 0
        left = {path.name for path in place.iterdir()}
        assert left == {"daemon.lock"} | ({"rpc.sock"} if when == "later" else set())


def test_a_unit_whose_directory_is_gone_is_told_what_to_do(short_directory: Path) -> None:
    """Status 77, which systemd does not start again, and one line with the command."""
    place = short_directory / "s"
    place.mkdir(0o700)
    gone = f"mv {place} {place}-x && exec"
    prefix = (sys.executable, "-c", _SOCKET_UNIT, str(place), "later", "sh", "-c", f'{gone} "$@"')
    told = pytest.raises(AssertionError, match="is gone: run systemctl --user restart dg-cached")
    with told, running(place, prefix=(*prefix, "sh")):
        pass


def test_status_tells_who_watches() -> None:
    """The mechanism and how much of it there is; nothing is wrong."""
    with guarded(["inotify"]) as daemon, Client(daemon.directory) as client:
        monitor = client.status().monitor
        assert monitor == pb.Monitor(mechanism="inotify", watched_directories=2)
    with guarded([]) as daemon, Client(daemon.directory) as client:
        monitor = client.status().monitor
        assert monitor == pb.Monitor(mechanism="none", disabled_reason="switched off")
        assert daemon.logged().count("<4>monitor-limited") == 1


def test_a_filter_of_system_calls_makes_it_inotify() -> None:
    """systemd's sets kill who calls fanotify_init; a filter that allows everything is enough."""
    prefix = (sys.executable, "-c", _FILTERED)
    with running(prefix=prefix) as daemon, Client(daemon.directory) as client:
        assert client.status().monitor.mechanism == "inotify"
        (daemon.directory / "rpc.sock").unlink()
        eventually(lambda: client.status().security_events == {"deleted": 1})


# prctl(PR_SET_NO_NEW_PRIVS), then prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &one "return ALLOW")
_FILTERED = """
import ctypes, os, sys
class Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jump", ctypes.c_ushort), ("k", ctypes.c_uint)]
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Filter))]
allow = Filter(0x06, 0, 0x7FFF0000)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(1, ctypes.pointer(allow))), 0, 0) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""


def test_a_call_in_progress_survives_a_socket_that_is_made_again() -> None:
    """A stream that is being read goes on to its end."""
    data = os.urandom(3 << 20)
    with guarded() as daemon, Client(daemon.directory) as client:
        digest = client.store(data)
        request = pb.ReadRequest(deltaspace=SPACE, sha256=digest)
        stream: Iterator[pb.ReadResponse] = client.stub.Read(request, timeout=SECONDS)
        assert next(stream).size == len(data)
        (daemon.directory / "rpc.sock").unlink()
        alarmed(daemon, "deleted", "rpc.sock")
        assert b"".join(answer.data for answer in stream) == data
