"""The user units in a real user manager: installed from the wheel, started, woken, killed."""

import json
from pathlib import Path

import pytest

from tests.support.user_manager import UserManager, succeed

pytestmark = pytest.mark.root

SERVICE = "dg-cached.service"
SOCKET = "dg-cached.socket"

# What a user's short-lived process does: store, get back, say who served it.
CLIENT = """
import json, dgcache
data = bytes(range(256)) * 4096
with dgcache.open() as cache:
    digest = cache.put("bucket", "releases", data)
    with cache.get("bucket", "releases", digest, verify=True) as reference:
        print(json.dumps({"same": reference.read() == data, "backend": cache.backend}))
"""
SERVED = {"same": True, "backend": "dg-cached"}
# A busy test machine may take longer than the default 50 ms to answer; only where that is the
# subject does a client keep the default.
PATIENT = {"DG_CACHE_CONNECT_TIMEOUT_MS": "20000"}


def client(manager: UserManager, programs: Path, env: dict[str, str]) -> dict[str, object]:
    """Run the client as the user, and return what it saw."""
    done = manager.run([programs / "python", "-c", CLIENT], env)
    assert done.returncode == 0, done.stderr
    seen: dict[str, object] = json.loads(done.stdout)
    return seen


def state(manager: UserManager, unit: str = SERVICE) -> str:
    return manager.show(unit, "ActiveState")["ActiveState"]


def sockets(manager: UserManager) -> list[str]:
    """Return mode, owner, kind and name of the sockets and of their directory."""
    place = manager.runtime_dir / "dg-cached"
    names = [
        "(",
        "-path",
        str(place),
        "-o",
        "-name",
        "rpc.sock",
        "-o",
        "-name",
        "session.sock",
        ")",
    ]
    listed = manager.run(["find", place, "-maxdepth", "1", *names, "-printf", "%#m %u %y %f\n"])
    return sorted(listed.stdout.splitlines())


def test_the_units_are_installed_with_the_path_of_the_program(
    manager: UserManager, programs: Path
) -> None:
    """A user manager does not have the PATH of a login, so the units name the program in full."""
    place = manager.home / ".config/systemd/user"
    assert {path.name for path in place.iterdir()} == {SERVICE, SOCKET}
    assert f'ExecStart="{programs / "dg-cached"}"\n' in (place / SERVICE).read_text()
    for unit in (SERVICE, SOCKET):
        assert "@DG_CACHED@" not in (place / unit).read_text()
        assert manager.show(unit, "FragmentPath")["FragmentPath"] == str(place / unit)


def test_systemd_finds_nothing_to_say_about_the_units(manager: UserManager) -> None:
    """No unknown key, no missing program, no ordering cycle."""
    verified = manager.run(["systemd-analyze", "--user", "verify", SOCKET, SERVICE])
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


def test_start_brings_up_sockets_and_daemon_and_the_next_client_is_served(
    manager: UserManager, programs: Path
) -> None:
    """`systemctl --user start dg-cached` returns when the daemon is ready."""
    succeed(manager, "start", "dg-cached")
    assert (state(manager), state(manager, SOCKET)) == ("active", "active")
    assert sockets(manager) == [
        f"0600 {manager.name} s rpc.sock",
        f"0600 {manager.name} s session.sock",
        f"0700 {manager.name} d dg-cached",
    ]
    assert client(manager, programs, PATIENT) == SERVED


def test_enable_now_listens_and_starts_no_daemon(manager: UserManager) -> None:
    """Enabling either unit enables the socket unit, and a daemon nobody uses does not run."""
    succeed(manager, "enable", "--now", SOCKET)
    assert (state(manager, SOCKET), state(manager)) == ("active", "inactive")
    succeed(manager, "disable", "--now", SOCKET)
    succeed(manager, "enable", SERVICE)
    assert succeed(manager, "is-enabled", SOCKET).strip() == "enabled"


def test_the_status_is_shown(manager: UserManager) -> None:
    """STATUS= of sd_notify(3) is what `systemctl --user status` shows."""
    succeed(manager, "start", SERVICE)
    text = manager.show(SERVICE, "StatusText")["StatusText"]
    assert str(manager.runtime_dir / "dg-cached") in text
    assert f'Status: "{text}"' in succeed(manager, "status", SERVICE)


def test_the_journal_has_events_with_their_priorities(manager: UserManager) -> None:
    """Priorities are the journal's own field and not a part of the text (sd-daemon(3))."""
    succeed(manager, "start", SERVICE)
    succeed(manager, "stop", SERVICE)
    journal = ["journalctl", "--user", "_COMM=dg-cached", "--output=json", "--no-pager"]

    def events() -> list[dict[str, str]]:
        return [json.loads(line) for line in manager.run(journal).stdout.splitlines()]

    manager.wait_for(lambda: any(e["MESSAGE"].startswith("stopped") for e in events()))
    assert all(event["PRIORITY"] == "6" for event in events())
    assert not any(event["MESSAGE"].startswith("<") for event in events())


def test_stop_drains_and_succeeds(manager: UserManager, programs: Path) -> None:
    """SIGTERM ends the daemon with status 0; the sockets stay, and the next client wakes it."""
    succeed(manager, "start", SERVICE)
    assert client(manager, programs, PATIENT) == SERVED
    listening = sockets(manager)
    succeed(manager, "stop", SERVICE)
    ended = manager.show(SERVICE, "ActiveState", "Result", "ExecMainCode", "ExecMainStatus")
    assert ended == {
        "ActiveState": "inactive",
        "Result": "success",
        "ExecMainCode": "1",  # CLD_EXITED, not killed by the signal
        "ExecMainStatus": "0",
    }
    assert (state(manager, SOCKET), sockets(manager)) == ("active", listening)
    assert client(manager, programs, PATIENT) == SERVED


def test_a_stopped_socket_unit_leaves_no_dead_socket(manager: UserManager, programs: Path) -> None:
    """It takes the daemon with it, and a client falls back at once since it finds nothing."""
    succeed(manager, "start", SERVICE)
    succeed(manager, "stop", SOCKET)
    assert state(manager) == "inactive"
    assert sockets(manager) == [f"0700 {manager.name} d dg-cached"]
    assert client(manager, programs, PATIENT) == {"same": True, "backend": "memory"}


def test_the_first_client_wakes_the_daemon_and_the_next_is_served(
    manager: UserManager, programs: Path
) -> None:
    """The first may fall back within its 50 ms; it succeeds, and nobody else starts the daemon."""
    succeed(manager, "start", SOCKET)
    assert state(manager) == "inactive"
    assert client(manager, programs, {})["same"] is True
    manager.wait_for(lambda: state(manager) == "active")
    assert client(manager, programs, PATIENT) == SERVED


def test_the_first_client_is_served_if_its_budget_outlasts_the_start(
    manager: UserManager, programs: Path
) -> None:
    """systemd keeps the connection until the daemon takes it."""
    succeed(manager, "start", SOCKET)
    assert client(manager, programs, PATIENT) == SERVED


def test_a_killed_daemon_comes_back_and_the_next_client_is_served(
    manager: UserManager, programs: Path
) -> None:
    """Restart=on-failure, with the sockets listening all the while."""
    succeed(manager, "start", SERVICE)
    killed = manager.show(SERVICE, "MainPID")["MainPID"]
    succeed(manager, "kill", "--signal=KILL", SERVICE)

    def came_back() -> bool:
        now = manager.show(SERVICE, "ActiveState", "MainPID", "NRestarts")
        return now["ActiveState"] == "active" and now["MainPID"] not in {"0", killed}

    manager.wait_for(came_back)
    assert client(manager, programs, PATIENT) == SERVED


def test_the_command_knows_that_systemd_supervises(manager: UserManager, programs: Path) -> None:
    """`dg-cache` reads the journal, and stops through systemd, which would only start it again."""
    succeed(manager, "start", SERVICE)

    def dg_cache(*words: str) -> str:
        done = manager.run([programs / "dg-cache", *words])
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "under systemd" in dg_cache("status")
    manager.wait_for(lambda: "started" in dg_cache("logs"))
    before = manager.show(SERVICE, "MainPID")
    dg_cache("restart")
    assert (state(manager), manager.show(SERVICE, "MainPID") == before) == ("active", False)
    dg_cache("stop")
    assert (state(manager), state(manager, SOCKET)) == ("inactive", "inactive")
    assert sockets(manager) == [f"0700 {manager.name} d dg-cached"]


def test_clients_of_a_daemon_that_cannot_start_fall_back(
    manager: UserManager, programs: Path
) -> None:
    """Who queues for it is sent away at once; soon systemd gives up, and resets who queues then."""
    succeed(manager, "set-environment", "DG_CACHE_TTL_SECONDS=soon")
    succeed(manager, "start", SOCKET)
    for _ in range(20):
        assert client(manager, programs, PATIENT) == {"same": True, "backend": "memory"}
        if state(manager, SOCKET) == "failed":
            break
    assert manager.show(SOCKET, "Result")["Result"] == "service-start-limit-hit"
    assert sockets(manager) == [f"0700 {manager.name} d dg-cached"]


def test_a_wrong_setting_is_named_by_status_and_not_tried_again(
    manager: UserManager, programs: Path
) -> None:
    """Starting again mends no setting; the client's work goes on without the daemon."""
    succeed(manager, "set-environment", "DG_CACHE_TTL_SECONDS=soon")
    assert manager.systemctl("start", SERVICE).returncode != 0
    ended = manager.show(SERVICE, "ActiveState", "ExecMainStatus", "NRestarts")
    assert ended == {"ActiveState": "failed", "ExecMainStatus": "78", "NRestarts": "0"}
    assert "DG_CACHE_TTL_SECONDS" in manager.show(SERVICE, "StatusText")["StatusText"]
    assert client(manager, programs, {}) == {"same": True, "backend": "memory"}
