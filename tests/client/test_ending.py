"""A daemon is found and ended whether or not it answers, and nobody else is."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dgcache import ending, launcher
from dgcache_core.errors import CacheUnavailableError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(short_directory: Path) -> dict[str, str]:
    """Where everything of the daemon's is below one directory."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DG_", "XDG_"))}
    place = str(short_directory / "s")
    return {**kept, "HOME": str(short_directory), "DG_CACHE_SOCKET_DIR": place}


def started(environ: dict[str, str], place: Path) -> "subprocess.Popen[bytes]":
    process = launcher.start(environ, place, log_file=place.parent / "log")
    assert process is not None
    return process


def test_nobody_serves_where_no_daemon_runs(
    short_directory: Path, environment: dict[str, str]
) -> None:
    """Not even a directory is made."""
    assert ending.find(short_directory / "s", environment) is None
    assert ending.stop(short_directory / "s", environment) is None
    assert list(short_directory.iterdir()) == []


def test_the_daemon_is_found_and_ends_in_order(
    short_directory: Path, environment: dict[str, str]
) -> None:
    """By its lock, with SIGTERM."""
    process = started(environment, short_directory / "s")
    found = ending.find(short_directory / "s", environment)
    assert found is not None
    assert found.pid == process.pid
    assert ending.stop(short_directory / "s", environment) == found
    assert process.wait(10) == 0
    assert ending.find(short_directory / "s", environment) is None


def test_the_daemon_serves_in_the_place_that_settings_in_code_name(
    short_directory: Path, environment: dict[str, str]
) -> None:
    """Whether the environment names none or another, which stays empty."""
    named, other = short_directory / "named", short_directory / "s"
    without = {name: value for name, value in environment.items() if name[:3] != "DG_"}
    for environ in (without, environment):
        process = started(environ, named)
        try:
            found = ending.find(named, environ)
            assert found is not None
            assert (found.directory, found.pid) == (named, process.pid)
            assert not other.exists()
        finally:
            process.terminate()
            process.wait(10)


def test_one_that_does_not_answer_is_ended_by_force_only(
    short_directory: Path, environment: dict[str, str]
) -> None:
    """SIGTERM waits in a stopped process for ever; who asked for it sends SIGKILL."""
    process = started(environment, short_directory / "s")
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(CacheUnavailableError, match="run dg-cache stop --force"):
        ending.stop(short_directory / "s", environment, budget_seconds=0.2)
    assert process.poll() is None
    ending.stop(short_directory / "s", environment, force=True, budget_seconds=0.2)
    assert process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("protocol", ["0", "99"])
def test_one_of_another_version_is_restarted_as_the_message_says(
    short_directory: Path, environment: dict[str, str], protocol: str
) -> None:
    """A client that refuses to talk to it can still end it."""
    other = short_directory / "other"
    for package in ("daemon/dgcached", "core/dgcache_core", "proto/dgcache_proto"):
        shutil.copytree(ROOT / package, other / Path(package).name)
    server = other / "dgcached" / "server.py"
    server.write_text(re.sub(r"PROTOCOL = \d\n", f"PROTOCOL = {protocol}\n", server.read_text()))
    process = started({**environment, "PYTHONPATH": str(other)}, short_directory / "s")

    def dg_cache(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "dgcache_cli", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    refused = dg_cache("status")
    assert (refused.returncode, f"speaks protocol {protocol}" in refused.stderr) == (69, True)
    assert "dg-cache restart" in refused.stderr
    restarted = dg_cache("restart")
    assert restarted.returncode == 0, restarted.stderr
    assert process.wait(10) == 0
    assert dg_cache("status").returncode == 0
    assert dg_cache("stop").returncode == 0


def test_who_holds_a_lock_elsewhere_is_left_alone(
    short_directory: Path, environment: dict[str, str]
) -> None:
    """A file of the same name in another directory is another lock."""
    for name in ("a", "b"):
        (short_directory / name).mkdir(mode=0o700)
        (short_directory / name / "daemon.lock").touch(mode=0o600)
    with (short_directory / "a" / "daemon.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert ending.stop(short_directory / "b", environment) is None
        found = ending.find(short_directory / "a", environment)
        assert found is not None
        assert found.pid == os.getpid()
