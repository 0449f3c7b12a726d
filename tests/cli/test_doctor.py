"""`dg-cache doctor`: what is not as it should be."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dgcache_cli.diagnosis import Level, of_daemon
from tests.support.wire import SECONDS, own_environment, running

WELL: dict[str, Any] = {
    "kernel": "6.18.0",
    "dumpable": False,
    "core_limit_bytes": 0,
    "keys": "memfd_secret",
    "no_new_privileges": True,
    "capabilities": 0,
    "swap": "",
    "shares_handouts": True,
    "landlock_abi": 7,
    "landlock_refuses": ["files", "tcp", "abstract-sockets"],
    "landlock_trouble": "",
    "user_namespace": True,
    "root_read_only": True,
    "home": "hidden",
    "network": False,
    "filters_system_calls": True,
    "directory_modes": {"/run/user/1000/dg-cached": 0o700},
}


def doctor(place: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "dgcache_cli", "doctor", *words],
        env={**own_environment(), "DG_CACHE_SOCKET_DIR": str(place), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_a_daemon_in_its_whole_sandbox_has_nothing_bad() -> None:
    """Every finding of it is ok, and explains nothing."""
    found = list(of_daemon({"hardening": WELL, "supervisor": "systemd"}))
    assert [(one.level, one.why, one.mend) for one in found] == [(Level.OK, "", "")] * len(found)


@pytest.mark.parametrize(
    ("field", "value", "level"),
    [
        ("dumpable", True, "bad"),
        ("core_limit_bytes", 4096, "bad"),
        ("keys", "unlocked", "bad"),
        ("no_new_privileges", False, "bad"),
        ("capabilities", 1, "bad"),
        ("swap", "/dev/sda2", "warn"),
        ("shares_handouts", False, "warn"),
        ("landlock_abi", 0, "warn"),
        ("landlock_trouble", "3 threads ran before", "bad"),
        ("user_namespace", False, "bad"),
        ("root_read_only", False, "bad"),
        ("home", "writable", "bad"),
        ("network", True, "bad"),
        ("filters_system_calls", False, "warn"),
        ("directory_modes", {"/d": 0o755}, "bad"),
    ],
)
def test_each_thing_that_is_missing_is_one_finding(field: str, value: object, level: str) -> None:
    """With why it matters and what mends it."""
    status = {"hardening": {**WELL, field: value}, "supervisor": "systemd"}
    (finding,) = [one for one in of_daemon(status) if one.level is not Level.OK]
    assert finding.level == level
    assert finding.why
    assert finding.mend


def test_it_works_without_a_daemon_and_makes_nothing(short_directory: Path) -> None:
    """Nothing is bad, no directory is made, and in a pipe there is no colour and no long line."""
    place = short_directory / "s"
    done = doctor(place)
    assert (done.returncode, done.stderr) == (0, "")
    assert not place.exists()
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "not running" in done.stdout


def test_a_directory_that_is_open_to_others_is_bad(short_directory: Path) -> None:
    """The command that mends it is there, and makes doctor content again."""
    place = short_directory / "s"
    place.mkdir()
    place.chmod(0o755)
    done = doctor(place, "--json")
    (bad,) = [one for one in json.loads(done.stdout) if one["what"] == "place"][:1]
    assert done.returncode == 1
    assert "chmod 0700" in bad["mend"]
    place.chmod(0o700)
    assert doctor(place).returncode == 0


def test_problems_alone_are_shown_on_wish(short_directory: Path) -> None:
    """On its own the daemon has no sandbox but Landlock, which is a warning and not bad."""
    with running(short_directory / "s") as daemon:
        done = doctor(daemon.directory, "--problems", "--json")
    found = json.loads(done.stdout)
    assert {one["level"] for one in found} == {"warn"}
    assert done.returncode == 0
    assert "user namespace" in {one["what"] for one in found}
