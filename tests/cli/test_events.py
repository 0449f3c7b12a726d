"""`dg-cache events`: what a user sees of what others did."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from tests.support.wire import SECONDS, Client, Daemon, eventually, own_environment, running


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon of this test alone."""
    with running() as own:
        yield own


def chmod(daemon: Daemon, mode: int, count: int) -> None:
    """Do what raises an event, the so-manyth, and is not undone."""
    with Client(daemon.directory, session=False) as client:
        daemon.directory.chmod(mode)
        eventually(lambda: client.status().security_events["chmod"] == count)


def command(directory: Path, *words: str) -> list[str]:
    # a shell that starts the tests in the background has them ignore SIGINT
    return [
        "env",
        "--default-signal=INT",
        f"DG_CACHE_SOCKET_DIR={directory}",
        sys.executable,
        "-m",
        "dgcache_cli",
        *words,
    ]


def said(directory: Path, *words: str, status: int = 0) -> str:
    """Run one to its end."""
    done = subprocess.run(
        command(directory, *words),
        env=own_environment() | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@contextmanager
def following(directory: Path, *words: str) -> "Iterator[subprocess.Popen[str]]":
    """Follow in a process of its own, through a pipe."""
    with subprocess.Popen(
        command(directory, "events", "--follow", *words),
        env=own_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_nothing_happened_is_said(daemon: Daemon) -> None:
    """For people; for programs there is no line."""
    assert said(daemon.directory, "events") == "no security events\n"
    assert said(daemon.directory, "events", "--json") == ""
    text = said(daemon.directory, "status")
    assert "no events" in text
    assert "fanotify, 2 directories" in text or "inotify, 2 directories" in text


def test_an_event_is_a_line_for_people_and_an_object_for_programs(daemon: Daemon) -> None:
    """The time is local and has its zone; `status` counts by kind."""
    chmod(daemon, 0o755, 1)
    chmod(daemon, 0o700, 2)
    lines = said(daemon.directory, "events").splitlines()
    day, clock, *words = lines[1].split()
    assert (
        abs(datetime.fromisoformat(f"{day} {clock}").timestamp() - daemon.log.stat().st_mtime) < 60
    )
    assert " ".join(words) == "critical chmod detail=mode=0755->0700 name=. place=runtime"
    objects = [json.loads(line) for line in said(daemon.directory, "events", "--json").splitlines()]
    assert [one["sequence"] for one in objects] == [1, 2]
    assert objects[0]["fields"] == {"detail": "mode=0700->0755", "name": ".", "place": "runtime"}
    assert (objects[0]["kind"], objects[0]["dropped"]) == ("chmod", 0)
    assert "2 chmod: see dg-cache events" in said(daemon.directory, "status")
    status = json.loads(said(daemon.directory, "status", "--json"))
    assert status["security_events"] == {"chmod": 2}


def test_lost_events_are_told() -> None:
    """What the daemon does not keep any more."""
    with running(limits={"security_events_kept": 1}) as daemon:
        chmod(daemon, 0o755, 1)
        chmod(daemon, 0o700, 2)
        assert said(daemon.directory, "events").endswith("(1 before it are lost)\n")


def test_following_goes_on_until_the_daemon_stops(daemon: Daemon) -> None:
    """Each line comes at once, also through a pipe; the end of the daemon is the end, status 0."""
    chmod(daemon, 0o755, 1)
    chmod(daemon, 0o700, 2)  # clients refuse the directory otherwise
    with following(daemon.directory, "--json") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["sequence"] == 1
        assert json.loads(process.stdout.readline())["sequence"] == 2
        daemon.directory.chmod(0o755)
        assert json.loads(process.stdout.readline())["sequence"] == 3
        assert daemon.stop() == 0
        assert process.communicate(timeout=SECONDS) == ("", "")
        assert process.returncode == 0


def test_control_c_ends_following(daemon: Daemon) -> None:
    """With status 130 and no traceback."""
    chmod(daemon, 0o755, 1)
    chmod(daemon, 0o700, 2)
    with following(daemon.directory) as process:
        assert process.stdout is not None
        assert " chmod " in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=SECONDS)
        assert (process.returncode, complaint) == (130, "")


def test_a_follower_too_many_and_a_daemon_too_few_are_said(short_directory: Path) -> None:
    """With their exit statuses."""
    with running(limits={"followers": 0}) as daemon:
        assert "more are not admitted" in said(daemon.directory, "events", "-f", status=75)
    assert "dg-cache start" in said(short_directory / "none", "events", status=69)
