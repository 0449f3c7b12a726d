"""The template in a real system manager: accounts without a manager of their own are served."""

import contextlib
import json
import pwd
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.real_users import real_user
from tests.support.system_manager import SystemManager, require_system_manager
from tests.support.user_manager import shared_wheel
from tests.support.wire import eventually

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

CLIENT = """
import dgcache, json, sys
data = b"of " + sys.argv[1].encode() * 100_000
with dgcache.open() as cache:
    found = cache.has("bucket", "app", sys.argv[2]) if len(sys.argv) > 2 else None
    digest = cache.put("bucket", "app", data)
    with cache.get("bucket", "app", digest) as reference:
        assert reference.read() == data
    print(json.dumps([cache.backend, digest, found]))
"""
PATIENT = {"DG_CACHE_CONNECT_TIMEOUT_MS": "20000"}


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` directory of the installed wheel, one for all workers of a run."""
    require_system_manager()
    return shared_wheel(tmp_path_factory)


@pytest.fixture
def manager(programs: Path) -> Iterator[SystemManager]:
    """A system manager with the template in place, and nothing enabled."""
    with SystemManager(readable=[programs.parent]) as running:
        # the wheel under test is below /tmp, of which services have one of their own
        place = "/run/systemd/system/service.d"
        bound = f"[Service]\\nBindReadOnlyPaths={programs.parent}\\n"
        running.succeed("sh", "-c", f"mkdir {place}; printf '{bound}' > {place}/tests.conf")
        said = running.succeed(programs / "dg-cache", "install", "--system")
        assert "wrote /etc/systemd/system/dg-cached@.service\n" in said
        assert said.splitlines()[-1].startswith("next: systemctl enable --now dg-cached@")
        yield running


@pytest.fixture
def accounts() -> Iterator[list[pwd.struct_passwd]]:
    """Two real users."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(real_user()) for _ in range(2)]


def use(
    manager: SystemManager, programs: Path, account: pwd.struct_passwd, *words: str
) -> tuple[str, str, bool | None]:
    """Run a client as an account: what served it, the digest, whether it saw another's."""
    argv = [programs / "python", "-c", CLIENT, account.pw_name, *words]
    done = manager.run(argv, PATIENT, uid=account.pw_uid, home=account.pw_dir)
    assert done.returncode == 0, f"{done.stderr}\n{manager.log()}"
    backend, digest, found = json.loads(done.stdout)
    return backend, digest, found


def test_two_accounts_are_served_at_once_each_by_its_own(
    manager: SystemManager, programs: Path, accounts: list[pwd.struct_passwd]
) -> None:
    """Each has a private directory, a daemon of its own uid, and nothing of the other's."""
    first, second = accounts
    for account in accounts:
        manager.succeed("systemctl", "enable", "--now", f"dg-cached@{account.pw_uid}.service")
    for account in accounts:
        place = f"/run/dg-cached/{account.pw_uid}"
        kept = manager.succeed("stat", "--format=%a %u", place, f"{place}/session.sock")
        assert kept.split("\n")[:2] == [f"700 {account.pw_uid}", f"600 {account.pw_uid}"]
        pid = manager.show(f"dg-cached@{account.pw_uid}.service", "MainPID")["MainPID"]
        status = manager.succeed("cat", f"/proc/{pid}/status")
        assert f"\nUid:\t{account.pw_uid}\t{account.pw_uid}\t" in status
    backend, digest, _ = use(manager, programs, first)
    assert backend == "dg-cached"
    assert use(manager, programs, second, digest)[::2] == ("dg-cached", False)
    assert use(manager, programs, first, digest)[::2] == ("dg-cached", True)
    elsewhere = {"DG_CACHE_SOCKET_DIR": f"/run/dg-cached/{first.pw_uid}"}
    status_of_first = [programs / "dg-cache", "status"]
    assert manager.run(status_of_first, elsewhere, uid=second.pw_uid).returncode == 77


def test_a_client_before_the_daemon_falls_back_and_the_next_is_served(
    manager: SystemManager, programs: Path, accounts: list[pwd.struct_passwd]
) -> None:
    """Until the daemon took the sockets over they are root's (SO_PEERCRED), and are refused."""
    account = accounts[0]
    service = f"dg-cached@{account.pw_uid}.service"
    manager.succeed("systemctl", "start", f"dg-cached@{account.pw_uid}.socket")
    assert use(manager, programs, account)[0] == "memory"
    eventually(lambda: manager.show(service, "ActiveState")["ActiveState"] == "active")
    assert use(manager, programs, account)[0] == "dg-cached"
    manager.succeed("systemctl", "stop", service)  # they stay the account's from now on
    assert use(manager, programs, account)[0] == "dg-cached"


def test_doctor_has_nothing_to_say_against_an_instance(
    manager: SystemManager, programs: Path, accounts: list[pwd.struct_passwd]
) -> None:
    """It is served without units of its own and without lingering."""
    account = accounts[0]
    manager.succeed("systemctl", "start", f"dg-cached@{account.pw_uid}.service")
    argv = [programs / "dg-cache", "doctor", "--json"]
    done = manager.run(argv, PATIENT, uid=account.pw_uid, home=account.pw_dir)
    found = {one["what"]: one for one in json.loads(done.stdout)}
    assert found["units"]["found"].startswith(f"dg-cached@{account.pw_uid}.service")
    assert not {"lingering", "socket unit"} & set(found)
    sandbox = ("user namespace", "root directory", "home", "network", "system calls")
    assert [found[what]["level"] for what in sandbox] == ["ok"] * len(sandbox)


def test_an_instance_named_otherwise_than_by_the_uid_is_refused(
    manager: SystemManager, accounts: list[pwd.struct_passwd]
) -> None:
    """No client would find it."""
    name = accounts[0].pw_name
    assert manager.run(["systemctl", "start", f"dg-cached@{name}.socket"]).returncode != 0
    assert f"name the instance by the uid: dg-cached@{accounts[0].pw_uid}" in manager.log()


@pytest.fixture
def with_disk(manager: SystemManager) -> SystemManager:
    """The same manager; every instance of the template has a disk tier."""
    drop_in = "/etc/systemd/system/dg-cached@.service.d"
    size = "[Service]\\nEnvironment=DG_CACHE_DISK_SIZE_MB=64 DG_CACHE_MEMORY_SIZE_MB=16\\n"
    manager.succeed("sh", "-c", f"mkdir {drop_in}; printf '{size}' > {drop_in}/disk.conf")
    manager.succeed("systemctl", "daemon-reload")
    return manager


def status(manager: SystemManager, programs: Path, account: pwd.struct_passwd) -> dict[str, Any]:
    """Return what an account's daemon says of itself."""
    asked = [programs / "dg-cache", "status", "--json"]
    told = manager.run(asked, PATIENT, uid=account.pw_uid, home=account.pw_dir)
    assert told.returncode == 0, f"{told.stderr}\n{manager.log()}"
    said: dict[str, Any] = json.loads(told.stdout)
    return said


def key_origin(said: dict[str, Any]) -> str:
    (origin,) = [
        one["origin"] for one in said["settings"] if one["name"] == "DG_CACHE_ENCRYPTION_KEY"
    ]
    return str(origin)


def test_the_disk_tier_is_in_the_system_s_cache_and_a_missing_key_is_no_failure(
    with_disk: SystemManager, programs: Path, accounts: list[pwd.struct_passwd]
) -> None:
    """Homes are read-only for an instance, and /var/cache has a private directory for each."""
    uid = accounts[0].pw_uid
    with_disk.succeed("systemctl", "start", f"dg-cached@{uid}.service")
    said = status(with_disk, programs, accounts[0])
    assert said["disk"]["enabled"]
    assert said["disk"]["directory"].startswith(f"/var/cache/dg-cached/{uid}/")
    assert (key_origin(said), said["disk"]["persistent"]) == ("default", False)
    assert said["findings"] == []  # what the unit says is meant
    assert "cannot look into" not in with_disk.log()


def test_the_disk_tier_with_the_account_s_key_outlives_a_restart(
    with_disk: SystemManager, programs: Path, accounts: list[pwd.struct_passwd]
) -> None:
    """Root keeps the key in the store of credentials (here /run's, which systemd searches as well
    as /etc's), the account has a copy that nobody else can read, and another account has none."""
    first, second = accounts
    with_disk.succeed(
        "sh",
        "-euc",
        "umask 077; mkdir /run/credstore; head -c 32 /dev/urandom | base64"
        f" > /run/credstore/dg-cache-key.{first.pw_uid}",
    )
    for account in accounts:
        with_disk.succeed("systemctl", "start", f"dg-cached@{account.pw_uid}.service")
    said = status(with_disk, programs, first)
    assert (key_origin(said), said["disk"]["persistent"]) == ("credential dg-cache-key", True)
    assert key_origin(status(with_disk, programs, second)) == "default"
    copy = f"/run/credentials/dg-cached@{first.pw_uid}.service/dg-cache-key"
    assert with_disk.run(["cat", copy], uid=second.pw_uid).returncode != 0
    _, digest, _ = use(with_disk, programs, first)
    with_disk.succeed("systemctl", "restart", f"dg-cached@{first.pw_uid}.service")
    assert use(with_disk, programs, first, digest)[::2] == ("dg-cached", True)


def test_an_account_ends_and_wakes_its_own_daemon_and_is_told_what_root_must_do(
    manager: SystemManager, programs: Path, accounts: list[pwd.struct_passwd]
) -> None:
    """`dg-cache stop`, `start` and `restart` by the account itself, which may not ask systemd."""
    account = accounts[0]
    service = f"dg-cached@{account.pw_uid}.service"
    manager.succeed("systemctl", "start", service)

    def said(*words: str) -> str:
        argv = [programs / "dg-cache", *words]
        done = manager.run(argv, PATIENT, uid=account.pw_uid, home=account.pw_dir)
        assert (done.returncode, done.stderr) == (0, ""), manager.log()
        return done.stdout

    def pid() -> str:
        return manager.show(service, "MainPID")["MainPID"]

    before = pid()
    advice = f"sudo systemctl stop dg-cached@{account.pw_uid}.socket"
    stopped = said("stop")
    assert stopped.startswith("dg-cached (pid ")
    assert stopped.endswith(f"{advice}\n")
    eventually(lambda: manager.show(service, "ActiveState")["ActiveState"] == "inactive")
    assert said("stop").startswith("dg-cached is not running; ")
    assert pid() == "0"  # to look is not to wake
    assert said("start") == f"{service} serves\n"
    woken = pid()
    assert woken not in {"0", before}
    assert said("start").startswith("dg-cached already serves in /run/dg-cached/")
    assert said("restart") == f"{service} serves\n"
    assert pid() not in {"0", woken}
    assert manager.show(service, "Result")["Result"] == "success"


def test_the_first_start_wakes_an_instance_whose_sockets_are_root_s_as_yet(
    manager: SystemManager, programs: Path, accounts: list[pwd.struct_passwd]
) -> None:
    """No second daemon is started beside it."""
    account = accounts[0]
    manager.succeed("systemctl", "start", f"dg-cached@{account.pw_uid}.socket")
    start = [programs / "dg-cache", "start"]
    done = manager.run(start, PATIENT, uid=account.pw_uid, home=account.pw_dir)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"dg-cached@{account.pw_uid}.service serves\n",
        "",
    )
    assert status(manager, programs, account)["supervisor"] == "systemd"


def test_root_stops_and_restarts_an_instance_by_its_manager(
    manager: SystemManager, programs: Path, accounts: list[pwd.struct_passwd]
) -> None:
    """Where its directory is named; stopping ends the listening, too."""
    uid = accounts[0].pw_uid
    service = f"dg-cached@{uid}.service"
    manager.succeed("systemctl", "start", service)
    before = manager.show(service, "MainPID")
    named = {"DG_CACHE_SOCKET_DIR": f"/run/dg-cached/{uid}"}
    for words, answer in (
        (("restart",), f"{service} serves\n"),
        (("stop",), f"dg-cached@{uid}.socket and {service} stopped\n"),
    ):
        done = manager.run([programs / "dg-cache", *words], named)
        assert (done.returncode, done.stdout) == (0, answer), done.stderr
        assert manager.show(service, "MainPID") != before
    for unit in (service, f"dg-cached@{uid}.socket"):
        assert manager.show(unit, "ActiveState")["ActiveState"] == "inactive"


def test_the_log_of_an_instance_is_shown_or_the_command_that_shows_it(
    manager: SystemManager, programs: Path, accounts: list[pwd.struct_passwd]
) -> None:
    """Root reads every journal; who may read none is told the command."""
    uid = accounts[0].pw_uid
    service = f"dg-cached@{uid}.service"
    manager.succeed("systemctl", "start", service)
    logs = [programs / "dg-cache", "logs"]
    named = {"DG_CACHE_SOCKET_DIR": f"/run/dg-cached/{uid}"}
    eventually(lambda: " started build=" in manager.run(logs, named).stdout)
    refused = manager.run(logs, uid=uid, home=accounts[0].pw_dir)
    assert (refused.returncode, refused.stdout) == (77, "")
    assert refused.stderr.endswith(f"sudo journalctl --unit {service}\n")


def test_uninstall_stops_every_instance_and_leaves_nothing(
    manager: SystemManager, programs: Path, accounts: list[pwd.struct_passwd]
) -> None:
    """Also of those that are enabled; caches go with --purge."""
    for account in accounts:
        manager.succeed("systemctl", "enable", "--now", f"dg-cached@{account.pw_uid}.service")
    said = manager.succeed(programs / "dg-cache", "uninstall", "--system", "--purge")
    assert f"stopped dg-cached@{accounts[0].pw_uid}.socket\n" in said
    left = manager.succeed("find", "/etc/systemd/system", "/run", "-name", "*dg*cached*")
    assert left.split() in ([], ["/run/dg-cached"])
    assert manager.succeed("find", "/var/cache").split() == ["/var/cache"]
    assert manager.succeed("systemctl", "list-units", "--all", "--no-legend", "dg-cached@*") == ""


def test_systemd_finds_nothing_to_say_about_the_template(
    manager: SystemManager, accounts: list[pwd.struct_passwd]
) -> None:
    """No unknown key, no missing program, no ordering cycle."""
    place = "/etc/systemd/system"
    units = [f"{place}/dg-cached@.socket", f"{place}/dg-cached@.service"]
    verified = manager.run(["systemd-analyze", "verify", "--man=no", *units])
    assert (verified.returncode, verified.stderr) == (0, "")


def test_the_exposure_that_systemd_counts_for_an_instance_is_at_most_1(
    manager: SystemManager, accounts: list[pwd.struct_passwd]
) -> None:
    """As for the user's unit; what holds is asked of the kernel elsewhere."""
    service = f"dg-cached@{accounts[0].pw_uid}.service"
    manager.succeed("systemctl", "start", service)
    said = manager.succeed("systemd-analyze", "security", "--no-pager", service)
    found = re.search(rf"Overall exposure level for {re.escape(service)}: (\d+\.\d)", said)
    assert found is not None, said
    assert float(found[1]) <= 1.0


def test_only_root_places_the_template(
    manager: SystemManager, programs: Path, accounts: list[pwd.struct_passwd]
) -> None:
    """The refusal names the command."""
    argv = [programs / "dg-cache", "install", "--system"]
    refused = manager.run(argv, uid=accounts[0].pw_uid, home=accounts[0].pw_dir)
    assert (refused.returncode, "with sudo" in refused.stderr) == (77, True)
