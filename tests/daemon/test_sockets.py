"""Where the daemon listens: modes under any umask, takeover, and directories it refuses."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.refused_syscalls import refusing_meanwhile
from tests.support.socket_files import run
from tests.support.wire import (
    FOREIGN_UID,
    OWNER_UID,
    SECONDS,
    Client,
    connected,
    eventually,
    own_environment,
    running,
)


def test_a_directory_whose_name_is_no_text_serves(short_directory: Path) -> None:
    """A path is bytes: what is no UTF-8 in it stops neither the daemon nor its Status."""
    place = short_directory / os.fsdecode(b"caf\xe9")
    with running(place) as daemon, Client(place) as client:
        assert client.status().pid == daemon.pid


def refuse(place: Path) -> str:
    """Start a daemon that must refuse its directory, and return what it said."""
    done = run("dgcached", DG_CACHE_SOCKET_DIR=str(place))
    assert done.returncode == 77, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_symbolic_link_is_refused(short_directory: Path) -> None:
    """Whoever may write the link could lead the clients elsewhere; nothing is made behind it."""
    target, link = short_directory / "target", short_directory / "li nk"
    target.mkdir(0o700)
    link.symlink_to(target)
    assert f"rm {shlex.quote(str(link))}" in refuse(link)
    assert list(target.iterdir()) == []


def test_a_directory_that_is_open_to_others_is_refused(short_directory: Path) -> None:
    """The message has the command that mends it, and that command mends it."""
    place = short_directory / "op en"
    place.mkdir()
    for mode in (0o701, 0o710, 0o1777):
        place.chmod(mode)
        mending = refuse(place).strip().rpartition("run ")[2]
        assert mending == f"chmod 0700 {shlex.quote(str(place))}"
    subprocess.run(shlex.split(mending), check=True, timeout=SECONDS)
    with running(place), Client(place) as client:
        assert client.status().pid


@pytest.mark.root
def test_a_directory_of_somebody_else_is_refused(short_directory: Path) -> None:
    """A squatter who made the directory first does not get the sockets."""
    place = short_directory / "squatted"
    place.mkdir(0o700)
    os.chown(place, FOREIGN_UID, FOREIGN_UID)
    said = refuse(place)
    assert f"belongs to uid {FOREIGN_UID}" in said
    assert f"sudo chown {os.geteuid()} {place}" in said


@pytest.mark.root
def test_a_directory_below_one_of_somebody_else_is_refused(short_directory: Path) -> None:
    """Its owner could swap the last component at any time."""
    above = short_directory / "above"
    (above / "place").mkdir(0o700, parents=True)
    os.chown(above, OWNER_UID, OWNER_UID)
    assert f"belongs to uid {OWNER_UID}" in refuse(above / "place")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DG_CACHE_MEMORY_SIZE_MB", "much"),
        ("DG_CACHE_MEMORY_SIZE_MB", "nan"),
        ("DG_CACHE_MEMORY_SIZE_MB", "-1"),
        ("DG_CACHE_MEMORY_SIZE_MB", "1e400"),
        ("DG_CACHE_TTL_SECONDS", "soon"),
        ("DG_CACHE_TTL_SECONDS", "0"),
        ("DG_CACHE_SOCKET_DIR", "relative"),
        ("DG_CACHE_SOCKET_DIR", "~nobody-has-this-name/x"),
    ],
)
def test_a_setting_that_does_not_parse_is_named(variable: str, value: str) -> None:
    """Status 78 and one line, with no guess in place of what was meant."""
    done = run("dgcached", **{variable: value})
    assert (done.returncode, done.stderr.count("\n")) == (78, 1), done.stderr
    assert variable in done.stderr


def test_a_word_is_not_a_command_of_the_daemon(short_directory: Path) -> None:
    """`dg-cached status` must not start a second daemon; it names the other program."""
    done = run("dgcached", "status", DG_CACHE_SOCKET_DIR=str(short_directory / "s"))
    assert done.returncode == 2
    assert "did you mean `dg-cache status`?" in done.stderr
    assert list(short_directory.iterdir()) == []


def test_a_log_file_that_cannot_be_opened_is_named(short_directory: Path) -> None:
    """One line tells which, and there is no traceback."""
    log = short_directory / "missing" / "log"
    done = run("dgcached", "--socket-dir", short_directory / "s", "--log-file", log)
    assert done.returncode not in {0, 1}, done.stderr
    assert str(log) in done.stderr
    assert "Traceback" not in done.stderr


def test_nonsense_from_a_supervisor_is_no_traceback(short_directory: Path) -> None:
    """LISTEN_FDS that is no number, for this very process (sd_listen_fds(3))."""
    script = 'LISTEN_PID=$$ LISTEN_FDS=many exec "$0" -m dgcached --socket-dir "$1"'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, short_directory / "s"],
        env=own_environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode not in {0, 1}, done.stderr
    assert "Traceback" not in done.stderr


def test_a_socket_that_somebody_listens_on_is_left_to_him(short_directory: Path) -> None:
    """A systemd socket unit listens without a daemon and without the lock: status 75, and its
    socket is still the same file."""
    place = short_directory / "s"
    place.mkdir(0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as unit:
        unit.bind(str(place / "session.sock"))
        unit.listen(8)
        before = (place / "session.sock").stat().st_ino
        done = run("dgcached", "--socket-dir", place)
        assert done.returncode == 75, done.stderr
        assert "already serves" in done.stderr
        assert (place / "session.sock").stat().st_ino == before


@pytest.mark.root
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, which refuses the calls")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_connection_that_cannot_be_set_up_is_closed(short_directory: Path, number: int) -> None:
    """Whichever of the three ioctl(2) of a relay is refused, or that of a session: none stays."""
    with running() as daemon, Client(daemon.directory) as client:
        eventually(lambda: client.status().connections == 1)
        before = daemon.descriptors()
        trace = short_directory / "trace"
        with refusing_meanwhile(daemon.pid, "ioctl", "EIO", trace, number=number) as called:
            for name in ("rpc.sock", "session.sock", "rpc.sock"):
                kind = socket.SOCK_SEQPACKET if name == "session.sock" else socket.SOCK_STREAM
                with suppress(OSError), connected(client.path(name), kind) as connection:
                    connection.recv(1)  # the first byte, or the end
            eventually(lambda: "(INJECTED)" in called())
        eventually(lambda: daemon.descriptors() == before)
        assert client.status().sessions == 1
        assert "Traceback" not in daemon.logged()
