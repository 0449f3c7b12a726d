"""Where the daemon listens: modes under any umask, takeover, and directories it refuses."""

import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.wire import (
    FOREIGN_UID,
    OWNER_UID,
    SECONDS,
    Client,
    Daemon,
    own_environment,
    running,
)

FILES = {"rpc.sock": 0o600, "session.sock": 0o600, "daemon.lock": 0o600, "inner": 0o700}


def run(*argv: str | Path, umask: int = -1, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run one of our programs to its end."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, argv)],
        env={**own_environment(), **environ},
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
        check=False,
        umask=umask,
    )


def modes(directory: Path) -> dict[str, int]:
    """Return the mode of everything in a directory."""
    return {path.name: stat.S_IMODE(path.lstat().st_mode) for path in directory.iterdir()}


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_directory_and_sockets_are_the_users_alone_whatever_the_umask(
    short_directory: Path, umask: int
) -> None:
    """0700 and 0600: neither a lax nor an absurd umask of the starter changes that."""
    place = short_directory / "made" / "on the way"
    with running(place, umask=umask):
        assert modes(place) == FILES
        assert modes(place / "inner") == {"inner.sock": 0o600}
        assert modes(place.parent) == {place.name: 0o700}
        assert modes(short_directory) == {"made": 0o700}


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_start_makes_private_files_whatever_the_umask(short_directory: Path, umask: int) -> None:
    """`dg-cache start` makes the starters' lock and the log before the daemon runs."""
    place, state = short_directory / "s", short_directory / "state"
    environ = {"DG_CACHE_SOCKET_DIR": str(place), "XDG_STATE_HOME": str(state)}
    started = run("dgcache_cli", "start", umask=umask, **environ)
    try:
        assert started.returncode == 0, started.stderr
        assert modes(place) == {**FILES, "start.lock": 0o600}
        assert modes(state) == {"dg-cached": 0o700}
        assert modes(state / "dg-cached") == {"dg-cached.log": 0o600}
    finally:
        run("dgcache_cli", "stop", **environ)


def test_what_a_killed_daemon_left_is_taken_over(short_directory: Path) -> None:
    """Nobody has to remove a socket file or a lock by hand."""
    place = short_directory / "s"
    with running(place) as killed:
        killed.stop(signal.SIGKILL)
        assert modes(place) == FILES
        with running(place) as successor, Client(place) as client:
            assert client.status().pid == successor.pid
            assert modes(place) == FILES
        assert modes(place / "inner") == {"inner.sock": 0o600}


def test_a_second_daemon_says_so_and_leaves_the_first_alone(shared: Daemon) -> None:
    """It ends with status 75, and the first goes on serving."""
    second = run("dgcached", "--socket-dir", shared.directory)
    assert second.returncode == 75
    assert f"already serves in {shared.directory}" in second.stderr
    assert "dg-cache status" in second.stderr
    with Client(shared.directory) as client:
        assert client.status().pid == shared.pid


def test_a_herd_of_starters_starts_one_daemon(short_directory: Path) -> None:
    """Twenty at once all succeed, and one of them says that it started the daemon."""
    place = short_directory / "s"
    environ = own_environment() | {
        "DG_CACHE_SOCKET_DIR": str(place),
        "XDG_STATE_HOME": str(short_directory),
    }
    argv = [sys.executable, "-m", "dgcache_cli"]
    herd = [
        subprocess.Popen(
            [*argv, "start"],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(20)
    ]
    try:
        said = [process.communicate(timeout=3 * SECONDS)[0].strip() for process in herd]
        assert [process.returncode for process in herd] == [0] * 20, said
        assert sum(line.startswith("dg-cached started") for line in said) == 1, said
        log = (short_directory / "dg-cached" / "dg-cached.log").read_text()
        assert log.count(" started ") == 1
        with Client(place) as client:
            assert {line.rpartition("(pid ")[2] for line in said} == {f"{client.status().pid})"}
    finally:
        subprocess.run([*argv, "stop"], env=environ, timeout=SECONDS, check=True)


def test_a_directory_too_long_for_a_socket_name_serves(short_directory: Path) -> None:
    """sun_path holds 107 bytes (unix(7)); the directory's own path has 138."""
    place = short_directory / ("d" * (138 - len(str(short_directory)) - 1))
    assert len(str(place)) == 138
    with running(place), Client(place) as client:
        assert client.store(b"data")


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
