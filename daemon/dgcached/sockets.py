"""The two listening sockets: made here or handed over by systemd, and who may make them.

A lock on `daemon.lock` decides who serves in a directory; it ends with the process, so what is
found under a free lock is stale. A socket is bound under a temporary name and renamed over the old
one: a client finds the old or the new, never none.
"""

import fcntl
import os
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dgcache_core.directories import open_private_directory
from dgcache_core.errors import CacheRefusedError
from dgcache_core.runtime_directory import DAEMON_LOCK, RPC_SOCKET, SESSION_SOCKET

INNER_DIRECTORY = "inner"
"""A directory of its own, 0700 like the one it is in: should somebody loosen that one's modes, the
inner server, which cannot ask who connects, stays out of reach."""
INNER_SOCKET = "inner/inner.sock"
_SOCKET_MODE = 0o600
_SO_PASSRIGHTS = 83  # Linux 6.17


class AlreadyServing(Exception):  # noqa: N818 - an answer, not an error
    """Another daemon serves in this directory."""


@dataclass(slots=True)
class Listeners:
    """The sockets, their vetted directory, and the lock that makes them ours."""

    directory: Path
    directory_fd: int
    lock_fd: int
    session: socket.socket
    rpc: socket.socket
    backlog: int
    made_here: set[str] = field(default_factory=set)

    def make_inner_directory(self) -> None:
        """Make the place of the inner server's socket.

        Raises:
            CacheRefusedError: what is there already failed its check.
        """
        os.close(open_private_directory(self.directory / INNER_DIRECTORY, create=True))
        with suppress(FileNotFoundError):  # of a daemon that was killed
            os.unlink(INNER_SOCKET, dir_fd=self.directory_fd)

    def withdraw(self) -> None:
        """Take the names away first, so that nobody comes any more; systemd's stay with it."""
        for name in self.made_here:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.directory_fd)

    def bind_again(self, name: str) -> socket.socket:
        """Make one of the sockets anew in place of whatever has its name, and listen on it.

        The lock makes the name ours. Where the socket was systemd's, its unit goes on listening on
        what nobody finds any more; clients are served here until that unit is started again.

        Returns:
            The old socket, which the caller closes once nothing accepts on it any more.

        Raises:
            OSError: it cannot be made; the directory is gone, for example.
        """
        is_session = name == SESSION_SOCKET
        kind = socket.SOCK_SEQPACKET if is_session else socket.SOCK_STREAM
        made = _bind(self.directory_fd, name, kind, self.backlog)
        self.made_here.add(name)
        old = self.session if is_session else self.rpc
        if is_session:
            self.session = made
        else:
            self.rpc = made
        return old

    def lock_again(self) -> None:
        """Take the lock of the file that has its name now.

        Raises:
            AlreadyServing: somebody else was faster.
            OSError: it cannot be opened.
        """
        lock_fd = _take_lock(self.directory, self.directory_fd)
        os.close(self.lock_fd)
        self.lock_fd = lock_fd

    def is_in_place(self) -> bool:
        """Tell whether clients still find this directory under its path."""
        try:
            return os.path.samestat(os.lstat(self.directory), os.fstat(self.directory_fd))
        except OSError:
            return False

    def remove_inner(self) -> None:
        """Take away what is inside, once the inner server has stopped."""
        with suppress(OSError):
            os.unlink(INNER_SOCKET, dir_fd=self.directory_fd)
        with suppress(OSError):
            os.rmdir(INNER_DIRECTORY, dir_fd=self.directory_fd)

    def close(self) -> None:
        """Close the sockets and give up the lock. `withdraw` comes first."""
        self.session.close()
        self.rpc.close()
        os.close(self.lock_fd)
        os.close(self.directory_fd)

    def path_of(self, name: str) -> str:
        """Return a path that no rename can redirect and that fits into sun_path (unix(7))."""
        return f"/proc/self/fd/{self.directory_fd}/{name}"


def make_listeners(directory: Path, directory_fd: int, backlog: int) -> Listeners:
    """Take the directory over and listen in it. Takes ownership of `directory_fd`.

    Raises:
        AlreadyServing: somebody else holds the lock, or listens there (a systemd socket unit).
    """
    if _somebody_listens(directory_fd):
        os.close(directory_fd)
        raise AlreadyServing(f"a dg-cached or its systemd socket already serves in {directory}")
    lock_fd = _take_lock_or_close(directory, directory_fd)
    rpc = _bind(directory_fd, RPC_SOCKET, socket.SOCK_STREAM, backlog)
    session = _bind(directory_fd, SESSION_SOCKET, socket.SOCK_SEQPACKET, backlog)
    made_here = {RPC_SOCKET, SESSION_SOCKET}
    return Listeners(directory, directory_fd, lock_fd, session, rpc, backlog, made_here)


def adopt_listeners(handed_over: list[socket.socket], backlog: int) -> Listeners:
    """Use the sockets systemd made, after vetting the directory they are in.

    `listen` is called again: it stamps the sockets with our credentials in place of the manager's
    (unix(7), SO_PEERCRED), and sets the backlog.

    Raises:
        AlreadyServing: somebody else holds the lock.
        CacheRefusedError: these are not the two sockets, or their directory fails its check.
    """
    by_type = {listener.type: listener for listener in handed_over}
    if len(handed_over) != 2 or set(by_type) != {socket.SOCK_STREAM, socket.SOCK_SEQPACKET}:
        raise CacheRefusedError(
            "systemd must hand over one stream and one sequential-packet socket: "
            "run dg-cache install again"
        )
    directory = Path(by_type[socket.SOCK_SEQPACKET].getsockname()).parent
    try:
        directory_fd = open_private_directory(directory)
    except FileNotFoundError as error:
        raise CacheRefusedError(
            f"{directory} is gone: run systemctl --user restart dg-cached.socket"
        ) from error
    lock_fd = _take_lock_or_close(directory, directory_fd)
    for listener in handed_over:
        listener.listen(backlog)
        listener.setblocking(False)
        _refuse_descriptors(listener)
    return Listeners(
        directory,
        directory_fd,
        lock_fd,
        by_type[socket.SOCK_SEQPACKET],
        by_type[socket.SOCK_STREAM],
        backlog,
    )


def _somebody_listens(directory_fd: int) -> bool:
    """A socket file that accepts is in use: a unit's socket has no daemon, and no lock, as yet."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(f"/proc/self/fd/{directory_fd}/{SESSION_SOCKET}")
        except BlockingIOError:
            return True  # somebody listens, and is busy
        except OSError:
            return False
    return True


def _take_lock_or_close(directory: Path, directory_fd: int) -> int:
    try:
        return _take_lock(directory, directory_fd)
    except AlreadyServing:
        os.close(directory_fd)
        raise


def _take_lock(directory: Path, directory_fd: int) -> int:
    lock_fd = os.open(
        DAEMON_LOCK,
        os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC,
        _SOCKET_MODE,
        dir_fd=directory_fd,
    )
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock_fd)
        raise AlreadyServing(f"a dg-cached already serves in {directory}") from None
    return lock_fd


def _bind(directory_fd: int, name: str, kind: socket.SocketKind, backlog: int) -> socket.socket:
    temporary = f".{secrets.token_hex(8)}"
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    path = f"/proc/self/fd/{directory_fd}/{temporary}"
    listener.bind(path)
    os.chmod(path, _SOCKET_MODE)  # noqa: PTH101 - not reachable by others before: the directory is 0700
    listener.listen(backlog)
    _refuse_descriptors(listener)
    os.rename(temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    return listener


def _refuse_descriptors(listener: socket.socket) -> None:
    """Where the kernel can, senders of descriptors get EPERM; elsewhere recv(2) drops them."""
    with suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
