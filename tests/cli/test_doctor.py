"""`dg-cache doctor`: what is not as it should be."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dgcache_cli.diagnosis import Level, of_daemon
from dgcache_cli.kernel_features import locked_memory, of_kernel, swap_limit, user_namespaces
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


def test_a_sandbox_that_the_unit_forgoes_is_a_warning_with_the_reason() -> None:
    """`no-user-namespaces.conf` is documented; what is missing without it was ignored."""
    less = {"user_namespace": False, "root_read_only": False, "home": "writable", "network": True}
    status = {"hardening": {**WELL, **less}, "supervisor": "systemd"}
    for forgoes, level in ((True, Level.WARN), (False, Level.BAD)):
        found = [one for one in of_daemon(status, forgoes_namespaces=forgoes) if one.why]
        assert [one.level for one in found] == [level] * len(less)
        assert all("no-user-namespaces.conf" in one.why + one.mend for one in found)


def test_what_the_kernel_can_is_found_out_by_trying() -> None:
    """This one has what its tests of the daemon rely on; each has a line of its own."""
    found = {one.what: one for one in of_kernel()}
    assert list(found) == [
        "kernel",
        "SO_PEERPIDFD",
        "pidfs",
        "SO_PASSRIGHTS",
        "MFD_NOEXEC_SEAL",
        "RLIMIT_MEMLOCK",
        "user namespaces",
    ]
    release = tuple(map(int, os.uname().release.split(".")[:2]))
    for what, since in (("SO_PEERPIDFD", (6, 5)), ("pidfs", (6, 9)), ("MFD_NOEXEC_SEAL", (6, 3))):
        if release >= since:
            assert found[what].found.startswith("yes"), what
    assert all(one.level is Level.OK or (one.why and one.mend) for one in found.values())


@pytest.mark.parametrize(
    ("soft", "hard", "is_root", "level", "mend"),
    [
        (8 << 20, 8 << 20, False, "ok", ""),
        (-1, -1, False, "ok", ""),
        (64 << 10, 64 << 10, True, "ok", ""),
        (64 << 10, 8 << 20, False, "warn", "ulimit -l 1024; units"),
        (64 << 10, 64 << 10, False, "warn", "ulimit -l 1024 after raising memlock"),
    ],
)
def test_too_little_memory_to_lock_keys_in_is_a_warning(
    soft: int, hard: int, is_root: bool, level: str, mend: str
) -> None:
    """A mebibyte holds them; root is not bound."""
    finding = locked_memory(soft, hard, is_root=is_root)
    assert finding.level == level
    assert finding.mend.startswith(mend)
    assert bool(finding.mend) == (level != "ok")


def test_a_host_that_forbids_user_namespaces_is_a_warning_with_the_sysctl() -> None:
    """Each of the three ways there are, and all together."""
    assert user_namespaces({"user.max_user_namespaces": "9999"}).level is Level.OK
    finding = user_namespaces(
        {"user.max_user_namespaces": "0", "kernel.apparmor_restrict_unprivileged_userns": "1"}
    )
    assert finding.level is Level.WARN
    assert finding.mend.startswith(
        "sudo sysctl user.max_user_namespaces=15000 "
        "kernel.apparmor_restrict_unprivileged_userns=0; or no-user-namespaces.conf"
    )


SWAPS = "Filename Type Size Used Priority\n"


@pytest.mark.parametrize(
    ("group", "swaps", "level", "found"),
    [
        ("0::/a\n", f"{SWAPS}/dev/sda2 partition 1 0 -2\n", "ok", "cgroup v2"),
        ("4:memory:/a\n0::/a\n", SWAPS, "ok", "there is no swap"),
        ("4:memory:/a\n0::/a\n", f"{SWAPS}/dev/sda2 x\n", "warn", "with memory.memsw"),
        ("3:cpu,memory:/b\n", f"{SWAPS}/dev/sda2 x\n", "warn", "without memory.memsw"),
    ],
)
def test_version_1_of_control_groups_keeps_no_unit_from_the_swap(
    group: str, swaps: str, level: str, found: str, tmp_path: Path
) -> None:
    """systemd sets memory.swap.max, which only version 2 has."""
    limit = tmp_path / "memory" / "a" / "memory.memsw.limit_in_bytes"
    limit.parent.mkdir(parents=True)
    limit.touch()
    finding = swap_limit(group, swaps, tmp_path)
    assert finding.level == level
    assert found in finding.found


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
