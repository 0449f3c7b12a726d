"""The unit's sandbox in a real user manager: in effect, and everything works inside."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.etc import own_etc
from tests.support.user_manager import UserManager, succeed
from tests.support.wire import eventually
from tests.test_systemd import (
    PATIENT,
    SERVED,
    SERVICE,
    SOCKET,
    client,
    sockets,
    state,
)

pytestmark = pytest.mark.root

DROP_INS = Path(__file__).resolve().parents[1] / "systemd" / "drop-ins"
WATCHED_SECONDS = 2

# Reads half of a large reference, stops the unit, and reads the rest.
STOP_IN_MID_READ = """
import dgcache, hashlib, json, subprocess
data = bytes(range(256)) * (96 << 12)
with dgcache.open() as cache:
    digest = cache.put("bucket", "releases", data)
    with cache.get("bucket", "releases", digest) as held, open(held.path, "rb") as file:
        backend, read = cache.backend, file.read(len(data) // 2)
        subprocess.run(["systemctl", "--user", "stop", "dg-cached"], check=True)
        read += file.read()
print(json.dumps({"same": hashlib.sha256(read).hexdigest() == digest, "backend": backend}))
"""
# Asks without a pause, from before the unit is stopped until after it.
STOP_IN_MID_GET = """
import dgcache, hashlib, json, subprocess
data = bytes(range(256)) * (32 << 12)
digest, gets = hashlib.sha256(data).hexdigest(), 0
with dgcache.open() as cache:
    cache.put("bucket", "releases", data)
    backend = cache.backend
    stop = subprocess.Popen(["systemctl", "--user", "stop", "dg-cached.socket"])
    last = False
    while not last:
        last = stop.poll() is not None
        fetch = lambda: data
        with cache.get_or_fetch("bucket", "releases", digest, fetch) as reference:
            assert reference.read() == data
        gets += 1
print(json.dumps({"backend": backend, "status": stop.returncode, "several": gets > 1}))
"""
STORE = """
import dgcache
with dgcache.open() as cache:
    print(cache.backend, cache.put("bucket", "releases", b"kept" * 100_000))
"""
LOOK_UP = """
import dgcache, sys
with dgcache.open() as cache, cache.get("bucket", "releases", sys.argv[1]) as reference:
    print(cache.backend, reference.read() == b"kept" * 100_000)
"""


def units(manager: UserManager) -> Path:
    return manager.home / ".config/systemd/user"


def as_user(manager: UserManager, script: str) -> str:
    """Run a shell script as the user, which must succeed, and return what it prints."""
    done = manager.run(["sh", "-euc", script], PATIENT)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{manager.log.text()}"
    return done.stdout


def python(manager: UserManager, programs: Path, program: str, *arguments: str) -> str:
    done = manager.run([programs / "python", "-c", program, *arguments], PATIENT)
    assert done.returncode == 0, f"{done.stderr}\n{manager.log.text()}"
    return done.stdout


def drop_in(manager: UserManager, name: str, text: str) -> None:
    """Put a drop-in in place as the user would."""
    place = units(manager) / f"{SERVICE}.d"
    as_user(manager, f"mkdir -p {place}; : > {place / name}")
    (place / name).write_text(text)
    succeed(manager, "daemon-reload")


def shipped(name: str) -> str:
    return (DROP_INS / name).read_text()


def status(manager: UserManager, programs: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(as_user(manager, f"{programs}/dg-cache status --json"))
    return said


def setting(manager: UserManager, programs: Path, name: str) -> tuple[str, str]:
    """Return value and origin of one of the daemon's effective settings."""
    for one in status(manager, programs)["settings"]:
        if one["name"] == name:
            return one["value"], one["origin"]
    raise AssertionError(name)


def main_pid(manager: UserManager) -> int:
    pid = int(manager.show(SERVICE, "MainPID")["MainPID"])
    assert pid > 0, manager.log.text()
    return pid


def process_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def written_inside(pid: int, path: Path) -> str:
    """Let root write where the daemon sees it; return what refused it."""
    inside = ["nsenter", f"--target={pid}", "--mount", "sh", "-c", f"echo > {path}"]
    return subprocess.run(inside, capture_output=True, text=True, check=False).stderr


def test_the_sandbox_is_in_effect_and_the_client_is_served(
    manager: UserManager, programs: Path
) -> None:
    """What the kernel says of the process, since a user manager ignores in silence what it cannot
    do. Inside are credentials of the peer, sealed handouts and keys in secret memory."""
    succeed(manager, "start", SERVICE)
    pid = main_pid(manager)
    assert Path(f"/proc/{pid}/uid_map").read_text().split() == [str(manager.uid)] * 2 + ["1"]
    about = process_status(pid)
    assert (about["NoNewPrivs"], about["Seccomp"]) == ("1", "2")
    assert {about[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    for name in ("user", "mnt", "net", "ipc", "uts"):
        own, outer = (os.readlink(f"/proc/{who}/ns/{name}") for who in (pid, "self"))  # noqa: PTH115 - no path
        assert own != outer, name
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "500\n"
    assert client(manager, programs, PATIENT) == SERVED
    hardening = status(manager, programs)["hardening"]
    assert hardening["keys"] == "memfd_secret"
    assert (hardening["dumpable"], hardening["core_limit_bytes"]) in ((False, 0), (False, "0"))


def test_inside_the_daemon_writes_to_the_directory_of_its_sockets_only(
    manager: UserManager,
) -> None:
    """Read-only file systems stop root, too."""
    succeed(manager, "start", SERVICE)
    pid = main_pid(manager)
    for place in (manager.home, Path("/usr"), Path("/etc"), manager.runtime_dir, Path("/")):
        assert "Read-only file system" in written_inside(pid, place / "dgt-probe"), place
    assert written_inside(pid, manager.runtime_dir / "dg-cached" / "probe") == ""
    assert written_inside(pid, Path("/tmp/dgt-probe")) == ""
    assert not Path("/tmp/dgt-probe").exists()  # it is the unit's own /tmp
    assert not (Path(f"/proc/{pid}/root/dev/kmsg")).exists()


def test_the_exposure_that_systemd_counts_is_at_most_1(manager: UserManager) -> None:
    """`systemd-analyze security` counts what the unit says; the tests above what holds."""
    said = as_user(manager, "systemd-analyze --user security --no-pager dg-cached.service")
    found = re.search(r"Overall exposure level for dg-cached.service: (\d+\.\d)", said)
    assert found is not None, said
    assert float(found[1]) <= 1.0


def test_the_ceiling_of_etc_is_honoured_inside(
    manager: UserManager, programs: Path, short_directory: Path
) -> None:
    """Root's file shows there as nobody's; a file that anybody can write is refused as ever."""
    own_etc(short_directory, "[limits]\nttl_seconds = 600\n")
    manager.run_as_root(["mount", "--bind", str(short_directory / "etc"), "/etc"])
    as_user(manager, "mkdir -p ~/.config/dg-cached; umask 077; echo 'ttl_seconds = 9000'"
            " > ~/.config/dg-cached/config.toml")  # fmt: skip
    succeed(manager, "start", SERVICE)
    value, origin = setting(manager, programs, "DG_CACHE_TTL_SECONDS")
    assert float(value) == 600
    assert "/etc/dg-cached/config.toml" in origin
    succeed(manager, "stop", SERVICE)
    (short_directory / "etc/dg-cached/config.toml").chmod(0o666)
    assert manager.systemctl("start", SERVICE).returncode != 0
    assert "can be written by others" in manager.show(SERVICE, "StatusText")["StatusText"]
    manager.run_as_root(["umount", "/etc"])


def test_the_disk_tier_with_a_credential_outlives_a_restart(
    manager: UserManager, programs: Path
) -> None:
    """With the two shipped drop-ins; a third names the file of the key."""
    as_user(manager, "umask 077; mkdir -p ~/.cache/deltaglider ~/.config/dg-cached;"
            " head -c 32 /dev/urandom | base64 > ~/.config/dg-cached/key")  # fmt: skip
    drop_in(manager, "disk-tier.conf", shipped("disk-tier.conf"))
    drop_in(manager, "credential.conf", shipped("credential.conf"))
    named = "[Service]\nLoadCredential=dg-cache-key:%h/.config/dg-cached/key\n"
    drop_in(manager, "key.conf", named)
    succeed(manager, "start", SERVICE)
    origin = setting(manager, programs, "DG_CACHE_ENCRYPTION_KEY")[1]
    assert origin == "credential dg-cache-key"
    backend, digest = python(manager, programs, STORE).split()
    assert backend == "dg-cached"
    succeed(manager, "restart", SERVICE)
    assert python(manager, programs, LOOK_UP, digest).split() == ["dg-cached", "True"]
    assert "Read-only" in written_inside(main_pid(manager), manager.home / ".cache/probe")


@pytest.mark.parametrize("place", ["unit", "file"])
def test_a_variable_that_the_unit_sets_is_meant_and_changed_where_it_stands(
    manager: UserManager, programs: Path, place: str
) -> None:
    """`import-environment` and `unset-environment` do not get past it."""
    ttl = "DG_CACHE_TTL_SECONDS"
    if place == "unit":
        drop_in(manager, "ttl.conf", f"[Service]\nEnvironment=A=1 '{ttl}=700' B=2\n")
        command = "systemctl --user edit dg-cached"
    else:
        as_user(manager, f"echo {ttl}=700 > ~/variables")
        drop_in(manager, "ttl.conf", "[Service]\nEnvironmentFile=-%h/variables\n")
        command = f"edit {manager.home}/variables"
    succeed(manager, "start", SERVICE)
    assert setting(manager, programs, ttl) == ("700", f"environment {ttl}")
    assert status(manager, programs)["findings"] == []
    said = manager.run([programs / "dg-cache", "status", "--json"], {ttl: "5", **PATIENT})
    [finding] = json.loads(said.stdout)["findings"]
    assert finding.endswith(f": {command} && systemctl --user restart dg-cached applies it")


def test_a_variable_of_the_manager_is_taken_back_by_the_command_that_status_names(
    manager: UserManager, programs: Path
) -> None:
    """The command is run as it stands, and nothing is left to say."""
    succeed(manager, "set-environment", "DG_CACHE_TTL_SECONDS=700")
    succeed(manager, "start", SERVICE)
    [finding] = status(manager, programs)["findings"]
    as_user(manager, finding.partition("): ")[2].removesuffix(" applies it"))
    assert status(manager, programs)["findings"] == []


def test_a_credential_or_a_disk_directory_that_is_missing_fails_no_unit(
    manager: UserManager, programs: Path
) -> None:
    """The daemon serves from memory, with keys of its own."""
    drop_in(manager, "disk-tier.conf", shipped("disk-tier.conf"))
    drop_in(manager, "credential.conf", shipped("credential.conf"))
    succeed(manager, "start", SERVICE)
    assert setting(manager, programs, "DG_CACHE_ENCRYPTION_KEY")[1] == "default"
    assert client(manager, programs, PATIENT) == SERVED


def test_without_user_namespaces_a_drop_in_takes_back_what_does_not_hold(
    manager: UserManager, programs: Path
) -> None:
    """Filters of system calls and no new privileges stay; the unit claims nothing more."""
    drop_in(manager, "no-user-namespaces.conf", shipped("no-user-namespaces.conf"))
    succeed(manager, "start", SERVICE)
    pid = main_pid(manager)
    mapped, ours = (Path(f"/proc/{who}/uid_map").read_text() for who in (pid, "self"))
    assert mapped == ours
    about = process_status(pid)
    assert (about["NoNewPrivs"], about["Seccomp"], about["CapEff"]) == ("1", "2", "0" * 16)
    assert client(manager, programs, PATIENT) == SERVED
    doctor = manager.run([programs / "dg-cache", "doctor", "--problems", "--json"], PATIENT)
    found = {one["what"]: one["level"] for one in json.loads(doctor.stdout)}
    assert found["user namespace"] == found["root directory"] == found["home"] == "warn"
    assert (doctor.returncode, "bad" in found.values()) == (0, False)
    said = as_user(manager, "systemd-analyze --user security --no-pager dg-cached.service || true")
    found = re.search(r"Overall exposure level for dg-cached.service: (\d+\.\d)", said)
    assert found is not None
    assert float(found[1]) > 1.0


def test_what_a_client_holds_is_whole_though_the_unit_stops(
    manager: UserManager, programs: Path
) -> None:
    """96 MiB of sealed memory outlive the daemon that made them."""
    succeed(manager, "start", SERVICE)
    assert json.loads(python(manager, programs, STOP_IN_MID_READ)) == SERVED
    assert state(manager) == "inactive"


def test_a_client_in_the_middle_of_its_gets_goes_on_though_the_unit_stops(
    manager: UserManager, programs: Path
) -> None:
    """Each get gives the right bytes, by the daemon or without it, and stopping succeeds."""
    succeed(manager, "start", SERVICE)
    seen = json.loads(python(manager, programs, STOP_IN_MID_GET))
    assert seen == {"backend": "dg-cached", "status": 0, "several": True}
    assert manager.show(SERVICE, "Result")["Result"] == "success"
    assert sockets(manager) == [f"0700 {manager.name} d dg-cached"]


def test_a_client_that_comes_during_a_restart_is_served(
    manager: UserManager, programs: Path
) -> None:
    """It queues at the sockets, which are systemd's."""
    succeed(manager, "start", SERVICE)
    before = main_pid(manager)
    for _ in range(3):
        succeed(manager, "restart", "--no-block", SERVICE)
        assert client(manager, programs, PATIENT)["same"] is True
    manager.wait_for(lambda: state(manager) == "active")
    assert client(manager, programs, PATIENT) == SERVED
    assert main_pid(manager) != before


def test_a_daemon_that_hangs_is_killed_and_started_again(
    manager: UserManager, programs: Path
) -> None:
    """Stopped by a signal it takes no turn; one that works is left alone for longer than that."""
    drop_in(manager, "watchdog.conf", f"[Service]\nWatchdogSec={WATCHED_SECONDS}\n")
    succeed(manager, "start", SERVICE)
    pid, started = main_pid(manager), time.monotonic()
    signs: set[str] = set()

    def shows_life() -> bool:
        signs.add(manager.show(SERVICE, "WatchdogTimestampMonotonic")["WatchdogTimestampMonotonic"])
        return len(signs) >= 4 and time.monotonic() - started > 1.5 * WATCHED_SECONDS

    eventually(shows_life, 30)
    assert (main_pid(manager), manager.show(SERVICE, "NRestarts")["NRestarts"]) == (pid, "0")
    os.kill(pid, signal.SIGSTOP)
    manager.wait_for(lambda: manager.show(SERVICE, "NRestarts")["NRestarts"] == "1")
    manager.wait_for(lambda: state(manager) == "active")
    assert "Watchdog timeout" in manager.log.text()
    assert main_pid(manager) != pid
    assert client(manager, programs, PATIENT) == SERVED


def test_a_program_that_was_removed_leaves_no_failed_unit(
    manager: UserManager, programs: Path
) -> None:
    """Units of a package that is gone are skipped; who still finds the sockets falls back."""
    succeed(manager, "start", SOCKET)
    for unit in (SERVICE, SOCKET):
        path = units(manager) / unit
        path.write_text(path.read_text().replace(str(programs / "dg-cached"), "/nowhere/dg-cached"))
    succeed(manager, "daemon-reload")
    assert client(manager, programs, {}) == {"same": True, "backend": "memory"}
    succeed(manager, "start", SERVICE)
    shown = manager.show(SERVICE, "ActiveState", "ConditionResult")
    assert shown == {"ActiveState": "inactive", "ConditionResult": "no"}
    succeed(manager, "stop", SOCKET)
    manager.systemctl("reset-failed", SOCKET)
    succeed(manager, "start", SOCKET)
    shown = manager.show(SOCKET, "ActiveState", "ConditionResult")
    assert shown == {"ActiveState": "inactive", "ConditionResult": "no"}
