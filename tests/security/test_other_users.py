"""Who is let in: the kernel's word on the peer's user, and nothing else."""

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from tests.support.wire import (
    FOREIGN_UID,
    OWNER_UID,
    Daemon,
    as_user,
    connected,
    eventually,
    read_to_end,
    running,
)

pytestmark = pytest.mark.root

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
KINDS = {"session.sock": socket.SOCK_SEQPACKET, "rpc.sock": socket.SOCK_STREAM}
SPOKEN = {"session.sock": b"", "rpc.sock": PREFACE, "inner/inner.sock": PREFACE}

# Prints what was heard; an empty line is a connection that was closed without a word.
HEAR = """
kind, first = (socket.SOCK_SEQPACKET, b"") if "session" in sys.argv[1] else (
    socket.SOCK_STREAM, bytes.fromhex(sys.argv[2]))
try:
    print("heard", heard(sys.argv[1], kind, first).hex(), os.getpid())
except OSError as error:
    print(error.strerror)
"""


@pytest.fixture(scope="module")
def owned() -> Iterator[Daemon]:
    """The daemon of an ordinary user, without the monitor, which would put modes back."""
    with running(uid=OWNER_UID, limits={"watch_mechanisms": (), "audit_seconds": 3600}) as daemon:
        yield daemon


@pytest.fixture
def ajar(owned: Daemon) -> Iterator[Daemon]:
    """The same with every mode loosened, so that the kernel's file modes keep nobody out."""
    _set_modes(owned, directory=0o755, sockets=0o666)
    yield owned
    _set_modes(owned, directory=0o700, sockets=0o600)


def _set_modes(daemon: Daemon, directory: int, sockets: int) -> None:
    daemon.directory.parent.chmod(directory)
    daemon.directory.chmod(directory)
    for name in (*KINDS, "inner/inner.sock"):
        (daemon.directory / name).chmod(sockets)


def hear(daemon: Daemon, name: str, uid: int | None, before: str = "") -> list[str]:
    """Let a user connect, speak, and tell what it heard."""
    return as_user(uid, before + HEAR, daemon.directory / name, SPOKEN[name].hex()).split(" ")


@pytest.mark.parametrize("name", KINDS)
def test_the_own_user_is_served(owned: Daemon, name: str) -> None:
    """What the refusals below are measured against: both sockets answer their owner."""
    word, answer, _ = hear(owned, name, OWNER_UID)
    assert (word, len(answer) > 0) == ("heard", True)


@pytest.mark.parametrize("name", SPOKEN)
def test_another_user_cannot_even_connect(owned: Daemon, name: str) -> None:
    """The directory is 0700: the kernel says EACCES before the daemon hears of it."""
    assert " ".join(hear(owned, name, FOREIGN_UID)) == os.strerror(errno.EACCES)


@pytest.mark.parametrize("name", KINDS)
def test_another_user_is_refused_where_the_modes_let_him_in(ajar: Daemon, name: str) -> None:
    """SO_PEERCRED decides before one byte is read or written, and the log says who it was."""
    word, answer, pid = hear(ajar, name, FOREIGN_UID)
    assert (word, answer) == ("heard", "")
    line = f"peer-refused socket={name.partition('.')[0]} uid={FOREIGN_UID} pid={pid}"
    eventually(lambda: line in ajar.logged())


@pytest.mark.parametrize("name", KINDS)
def test_root_is_refused(owned: Daemon, name: str) -> None:
    """The rule is "exactly my user": a client run with sudo by mistake is told so."""
    with connected(str(owned.directory / name), KINDS[name]) as connection:
        assert read_to_end(connection) == b""
    line = f"peer-refused socket={name.partition('.')[0]} uid=0 pid={os.getpid()}"
    eventually(lambda: line in owned.logged())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("inner_uid", [0, OWNER_UID])
def test_another_users_namespace_is_refused(ajar: Daemon, name: str, inner_uid: int) -> None:
    """Being root, or having the owner's number, inside a namespace is being a stranger here."""
    said = hear(ajar, name, FOREIGN_UID, f"enter_user_namespace({inner_uid})\n")
    _skip_without_namespaces(said)
    assert said[:2] == ["heard", ""]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("inner_uid", [0, 1000])
def test_the_own_user_is_served_from_his_namespace(
    owned: Daemon, name: str, inner_uid: int
) -> None:
    """A rootless container of the user is the user."""
    said = hear(owned, name, OWNER_UID, f"enter_user_namespace({inner_uid})\n")
    _skip_without_namespaces(said)
    assert (said[0], len(said[1]) > 0) == ("heard", True)


@pytest.mark.parametrize("name", KINDS)
def test_the_overflow_user_is_nobody_in_particular(ajar: Daemon, name: str) -> None:
    """65534 is how every unmapped user looks, so it is refused as a client and as the owner."""
    assert hear(ajar, name, 65534)[:2] == ["heard", ""]
    with running(uid=65534) as nobodys:
        assert hear(nobodys, name, 65534)[:2] == ["heard", ""]


def test_a_connection_is_its_openers_whoever_holds_it_later(owned: Daemon) -> None:
    """The kernel froze the credentials at connect(2): the owner's connection serves its heir."""
    script = f"""
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(sys.argv[1])
if os.fork() == 0:
    sys.exit(0)
os.wait()
print(os.getuid() == {OWNER_UID}, len(connection.recv(4096)) > 0)
"""
    assert as_user(OWNER_UID, script, owned.directory / "session.sock") == "True True"


def test_refusals_do_not_disturb_the_owner(ajar: Daemon) -> None:
    """Two hundred refused connections later the daemon has no descriptor more and serves."""
    before = ajar.descriptors()
    script = f"""
for _ in range(200):
    assert heard(sys.argv[1], {int(socket.SOCK_SEQPACKET)}) == b""
"""
    as_user(FOREIGN_UID, script, ajar.directory / "session.sock")
    eventually(lambda: ajar.descriptors() == before)
    assert hear(ajar, "session.sock", OWNER_UID)[0] == "heard"


def _skip_without_namespaces(said: list[str]) -> None:
    if " ".join(said).startswith("no user namespace"):
        pytest.skip(" ".join(said))
