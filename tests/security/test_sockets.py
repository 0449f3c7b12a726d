"""Where the daemon listens: modes, takeover, one daemon only, and the places it chooses from."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import dgcache
from tests.security.test_directories import squatted, use
from tests.support.socket_files import FILES, modes, run
from tests.support.wire import (
    FOREIGN_UID,
    OWNER_UID,
    SECONDS,
    Client,
    eventually,
    own_environment,
    running,
    script_running,
)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="a second real user is made by root")
def test_13_a_squatted_rpc_socket_gets_nothing(short_directory: Path) -> None:
    """The session's socket is the daemon's own, the other one a stranger's: gRPC would tell him
    session, bucket and digest, and asks nobody for its uid, so the client looks at the file."""
    short_directory.chmod(0o755)
    os.chown(short_directory, OWNER_UID, OWNER_UID)
    place = short_directory.resolve() / "s"
    with running(place, uid=OWNER_UID, limits={"watch_mechanisms": (), "audit_seconds": 3600}):
        assert use(place)["backend"] == "dg-cached"
        (place / "rpc.sock").unlink()
        place.chmod(0o777)
        with squatted(place, 0, "rpc") as got:
            place.chmod(0o700)
            told = use(place)
    assert (told["backend"], told["right"], len(told["said"])) == ("memory", True, 1)
    assert f"rpc.sock belongs to uid {FOREIGN_UID}, not to uid {OWNER_UID}" in told["said"][0]
    assert got == [0, 0]


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_16_directory_and_sockets_are_the_users_alone_whatever_the_umask(
    short_directory: Path, umask: int
) -> None:
    """0700 and 0600: neither a lax nor an absurd umask of the starter changes that."""
    place = short_directory / "made" / "on the way"
    with running(place, umask=umask), Client(place) as client:
        assert client.status().connections == 1
        assert modes(place) == FILES
        assert modes(place / "inner") == {"inner.sock": 0o600}
        assert modes(place.parent) == {place.name: 0o700}
        assert modes(short_directory) == {"made": 0o700}


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_16_start_makes_private_files_whatever_the_umask(short_directory: Path, umask: int) -> None:
    """`dg-cache start` makes the starters' lock and the log before the daemon runs."""
    place, state = short_directory / "s", short_directory / "state"
    environ = {"DG_CACHE_SOCKET_DIR": str(place), "XDG_STATE_HOME": str(state)}
    started = run("dgcache_cli", "start", umask=umask, **environ)
    try:
        assert started.returncode == 0, started.stderr
        assert modes(place) == {**FILES, "start.lock": 0o600}
        assert modes(state) == {"dg-cached": 0o700}
        assert modes(state / "dg-cached") == {"dg-cached.log": 0o600, "dg-cached.log.1": 0o600}
    finally:
        run("dgcache_cli", "stop", **environ)


def test_19_what_a_killed_daemon_left_is_taken_over(short_directory: Path) -> None:
    """Nobody has to remove a socket file or a lock by hand."""
    place = short_directory / "s"
    with running(place) as killed:
        killed.stop(signal.SIGKILL)
        assert modes(place) == FILES
        with running(place) as successor, Client(place) as client:
            assert client.status().pid == successor.pid
            assert modes(place) == FILES
            assert modes(place / "inner") == {"inner.sock": 0o600}


def test_20_a_second_daemon_says_so_and_leaves_the_first_alone(short_directory: Path) -> None:
    """It ends with status 75, and the first goes on serving."""
    with running(short_directory / "s") as shared:
        second = run("dgcached", "--socket-dir", shared.directory)
        assert second.returncode == 75
        assert f"already serves in {shared.directory}" in second.stderr
        assert "dg-cache status" in second.stderr
        with Client(shared.directory) as client:
            assert client.status().pid == shared.pid


def test_20_a_herd_of_starters_starts_one_daemon(short_directory: Path) -> None:
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


# Everything is imported before the fork, and all begin when the pipe closes: at once, as far as the
# processors allow.
_HERD = """
import json, time
import asyncinotify, dgcached.main, dgcached.server, dgcached.logs
place, count = sys.argv[1], int(sys.argv[2])
gate, opener = os.pipe()
children = {}
for number in range(count):
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(opener)
        os.dup2(write_end, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os.read(gate, 1)
        status = dgcached.main.main(["--memory-size-mb", "64", "--socket-dir", place])
        sys.stderr.flush()
        os._exit(status)
    os.close(write_end)
    children[pid] = read_end
os.close(opener)
ended = {}
while len(ended) < count - 1:
    pid, status = os.waitpid(-1, 0)
    ended[pid] = os.waitstatus_to_exitcode(status)
said = [os.read(children[pid], 4096).decode() for pid in ended]
(left,) = set(children) - set(ended)
print(json.dumps([left, list(ended.values()), said]), flush=True)
sys.stdin.read()
os.kill(left, 15)
os.waitpid(left, 0)
"""


@pytest.mark.parametrize("count", [2, 50])
def test_20_of_many_daemons_at_once_exactly_one_serves(short_directory: Path, count: int) -> None:
    """The others say so and end with status 75, all of them; what serves goes on serving."""
    place = short_directory / "s"
    with script_running(None, _HERD, place, count) as herd:
        assert herd.stdout is not None
        left, statuses, said = json.loads(herd.stdout.readline())
        assert Counter(statuses) == {75: count - 1}, said
        assert all("already serves in" in words for words in said), said
        with Client(place) as client:
            assert client.status().pid == left
            assert client.store(b"data")
        _, complaint = herd.communicate(timeout=SECONDS)
        assert herd.returncode == 0, complaint


# As a user's login has it: settings from the environment alone.
_DAEMON = """
import json
import asyncinotify, dgcached.main, dgcached.server, dgcached.logs
become(int(sys.argv[1]))
os.environ.update(json.loads(sys.argv[2]))
sys.exit(dgcached.main.main(["--memory-size-mb", "64"]))
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="a second real user is made by root")
@pytest.mark.parametrize("wrong", ["missing", "owner", "mode"])
def test_21_a_wrong_xdg_runtime_dir_is_passed_over(short_directory: Path, wrong: str) -> None:
    """Daemon and client take the same next choice; without a daemon the client falls back, with
    one message."""
    base = short_directory.resolve()
    base.chmod(0o755)
    home, runtime = base / "home", base / "runtime"
    for path in (home, runtime):
        path.mkdir(0o700)
        os.chown(path, OWNER_UID, OWNER_UID)
    if wrong == "missing":
        runtime.rmdir()
    elif wrong == "owner":
        os.chown(runtime, FOREIGN_UID, FOREIGN_UID)
    else:
        runtime.chmod(0o777)
    environ = {"HOME": str(home), "XDG_RUNTIME_DIR": str(runtime)}
    told = use(None, **environ)
    assert (told["backend"], told["right"], len(told["said"])) == ("memory", True, 1)
    with script_running(None, _DAEMON, OWNER_UID, json.dumps(environ)) as daemon:
        eventually(lambda: list(home.glob(".cache/deltaglider/run/*/session.sock")))
        eventually(lambda: use(None, **environ)["backend"] == "dg-cached")
        told = use(None, **environ)
        assert (told["backend"], told["right"], told["said"]) == ("dg-cached", True, [])
        daemon.send_signal(signal.SIGTERM)
        _, log = daemon.communicate(timeout=SECONDS)
        assert daemon.returncode == 0, log
    assert log.count("directory-refused") == (wrong != "missing")
    assert not runtime.exists() or list(runtime.iterdir()) == []


def test_22_a_directory_too_long_for_a_socket_name_serves(short_directory: Path) -> None:
    """sun_path holds 107 bytes (unix(7)); the directory's own path has 138."""
    place = short_directory / ("d" * (138 - len(str(short_directory)) - 1))
    assert len(str(place)) == 138
    with running(place), Client(place) as client:
        assert client.store(b"data")
        with dgcache.open(dgcache.Settings(socket_dir=place)) as cache:
            digest = cache.put("bucket", "prefix", b"other data")
            with cache.get("bucket", "prefix", digest) as reference:
                assert (reference.source, reference.read()) == ("dg-cached", b"other data")


@pytest.mark.parametrize("name", ["session.sock", "rpc.sock"])
def test_23_a_deleted_socket_is_made_again_within_a_minute(name: str) -> None:
    """Without any help of the kernel, by the audit alone, with its real interval; whoever was
    connected is served meanwhile, and a new client afterwards."""
    with running(limits={"watch_mechanisms": ()}) as daemon, Client(daemon.directory) as bystander:
        digest = bystander.store(b"data")
        (daemon.directory / name).unlink()
        deleted = time.monotonic()
        while not (daemon.directory / name).exists():
            assert time.monotonic() < deleted + 60 + SECONDS / 4
            os.close(bystander.lookup(digest))
            bystander.status()
        os.close(bystander.lookup(digest))
        with Client(daemon.directory) as newcomer:
            os.close(newcomer.lookup(digest))
        assert bystander.status().security_events == {"deleted": 1}


def test_23_a_deleted_socket_is_made_again_at_once_where_the_kernel_tells() -> None:
    """As the daemon runs by default."""
    with running() as daemon:
        for name in ("session.sock", "rpc.sock"):
            (daemon.directory / name).unlink()
            eventually((daemon.directory / name).exists, 5)
        with Client(daemon.directory) as newcomer:
            assert newcomer.store(b"data")
