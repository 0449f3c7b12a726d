"""install and uninstall in a real user manager: what they put in place, start, and leave."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.user_manager import UserManager

pytestmark = pytest.mark.root

SERVICE = "dg-cached.service"
SOCKET = "dg-cached.socket"
USE = """
import dgcache, os, sys
data = bytes(range(256)) * 4096
with dgcache.open() as cache:
    digest = cache.put("bucket", "releases", data)
    with cache.get("bucket", "releases", digest) as reference:
        assert reference.read() == data
    print(cache.backend, flush=True)
    if len(sys.argv) > 1:
        open(sys.argv[1]).read()
        with cache.get_or_fetch("bucket", "releases", digest, lambda: data) as reference:
            assert reference.read() == data
        print("done")
"""
PATIENT = {"DG_CACHE_CONNECT_TIMEOUT_MS": "20000"}


class Account:
    """A user with a manager, and dg-cache as that user calls it."""

    def __init__(self, manager: UserManager, programs: Path) -> None:
        self.manager = manager
        self.programs = programs
        self.units = manager.home / ".config/systemd/user"

    def __call__(
        self, *words: str, status: int = 0, **env: str
    ) -> "subprocess.CompletedProcess[str]":
        done = self.manager.run([self.programs / "dg-cache", *words], PATIENT | env)
        said = f"{done.stdout}\n{done.stderr}\n{self.manager.log.text()}"
        assert done.returncode == status, said
        assert "Traceback" not in done.stderr
        return done

    def said(self, *words: str, **env: str) -> list[str]:
        return self(*words, **env).stdout.splitlines()

    def backend(self) -> str:
        done = self.manager.run([self.programs / "python", "-c", USE], PATIENT)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, unit: str = SERVICE) -> str:
        return self.manager.show(unit, "ActiveState")["ActiveState"]

    def pid(self) -> str:
        return self.manager.show(SERVICE, "MainPID")["MainPID"]

    def tree(self) -> list[str]:
        """Return everything in the home and in the runtime directory, with modes and owners."""
        places = [self.manager.home, self.manager.runtime_dir]
        listed = self.manager.run(["find", *places, "-printf", "%#m %u %y %p %l\n"])
        return sorted(listed.stdout.splitlines())


@pytest.fixture
def account(programs: Path) -> Iterator[Account]:
    """Nothing is installed as yet."""
    with UserManager(readable=[programs.parent]) as running:
        yield Account(running, programs)


def write_as(account: Account, path: Path, text: str) -> None:
    script = f"umask 077; mkdir -p {path.parent}; printf '{text}' > {path}"
    done = account.manager.run(["sh", "-euc", script])
    assert done.returncode == 0, done.stderr


def test_install_enables_starts_and_says_so_and_a_second_one_changes_nothing(
    account: Account,
) -> None:
    """Each step names its path; the daemon was asked before it says `serves`."""
    would = account.said("install", "--dry-run")
    assert f"would write {account.units / SERVICE}" in would
    assert not account.units.exists()
    first = account.said("install")
    link = account.units / "sockets.target.wants" / SOCKET
    assert first[:3] == [
        f"wrote {account.units / SOCKET}",
        f"wrote {account.units / SERVICE}",
        f"enabled {SOCKET}: {link}",
    ]
    assert first[-1].startswith(f"serves {account.manager.runtime_dir / 'dg-cached'}: dg-cached ")
    assert link.is_symlink()
    assert (account.state(), account.state(SOCKET)) == ("active", "active")
    assert account.backend() == "dg-cached"
    pid, before = account.pid(), account.tree()
    second = account.said("install")
    assert [line for line in second if line.startswith(("wrote", "enabled", "start"))] == []
    assert sum(line.startswith("unchanged ") for line in second) == 4
    assert (account.pid(), account.tree()) == (pid, before)


def test_a_changed_unit_is_replaced_and_a_drop_in_stays(account: Account) -> None:
    """What is lost is shown, and the daemon runs by the new unit."""
    account("install")
    unit, drop_in = account.units / SERVICE, account.units / f"{SERVICE}.d" / "own.conf"
    mine = unit.read_text().replace("TimeoutStopSec=30", "TimeoutStopSec=7")
    account.manager.run(["sh", "-c", f"cat > {unit} <<'X'\n{mine}X\n"])
    write_as(account, drop_in, "[Service]\\nEnvironment=DG_CACHE_MEMORY_SIZE_MB=9\\n")
    pid = account.pid()
    said = account.said("install")
    assert f"replaced {unit}: gone is TimeoutStopSec=7" in said
    assert f"kept {drop_in}: a drop-in" in said
    assert account.pid() not in ("0", pid)
    shown = account.manager.show(SERVICE, "TimeoutStopUSec", "Environment", "NeedDaemonReload")
    assert shown == {
        "TimeoutStopUSec": "30s",
        "Environment": "DG_CACHE_MEMORY_SIZE_MB=9",
        "NeedDaemonReload": "no",
    }
    assert f"left {drop_in}: a drop-in" in account.said("uninstall")
    assert drop_in.exists()


def test_a_masked_unit_is_refused_before_anything_changes(account: Account) -> None:
    """Somebody meant it not to run; the command that lifts it is named."""
    script = f"mkdir -p {account.units}; ln -s /dev/null {account.units / SERVICE}"
    account.manager.run(["sh", "-c", script])
    before = account.tree()
    assert "masks the unit: remove it with rm " in account("install", status=77).stderr
    assert account.tree() == before


def test_lingering_off_is_warned_of_and_lingering_on_is_not(account: Account) -> None:
    """With the command that mends it, on standard error."""
    name = account.manager.name
    warned = account("install").stderr
    assert "lingering is off" in warned
    assert f"sudo loginctl enable-linger {name}" in warned
    account.manager.run_as_root(["mkdir", "-p", "/var/lib/systemd/linger"])
    account.manager.run_as_root(["mount", "-t", "tmpfs", "tmpfs", "/var/lib/systemd/linger"])
    account.manager.run_as_root(["touch", f"/var/lib/systemd/linger/{name}"])
    assert account("install").stderr == ""


def test_a_daemon_on_its_own_is_not_stopped_unasked(account: Account) -> None:
    """It is named, nothing changes; --replace stops it and takes its place."""
    account("start")
    refused = account("install", status=77).stderr
    assert "runs on its own" in refused
    assert "dg-cache install --replace" in refused
    assert not account.units.exists()
    said = account.said("install", "--replace")
    assert any(line.startswith("stopped dg-cached (pid ") for line in said)
    assert (account.state(), account.backend()) == ("active", "dg-cached")


def test_without_a_manager_the_units_wait_for_the_next_login(account: Account) -> None:
    """They are in place and enabled; the status is 69, and what helps now is named."""
    away = {"XDG_RUNTIME_DIR": "/nowhere"}
    account.manager.systemctl("exit")
    account.manager.wait_for(lambda: account.manager.systemctl("show").returncode != 0)
    done = account("install", status=69, **away)
    assert "no user manager answers" in done.stderr
    assert "dg-cache start" in done.stderr
    assert (account.units / "sockets.target.wants" / SOCKET).is_symlink()
    removed = account.said("uninstall", **away)
    assert f"removed {account.units / SERVICE}" in removed
    assert not (account.manager.home / ".config").exists()


def test_json_has_the_steps_and_the_problem(account: Account) -> None:
    """Also where it fails."""
    told = json.loads(account("install", "--json").stdout)
    assert told["problem"] is None
    assert {"action": "write", "what": str(account.units / SOCKET), "detail": ""} in told["steps"]
    assert len(told["warnings"]) == 1
    assert json.loads(account("uninstall", "--json", "--purge").stdout)["problem"] is None


def test_uninstall_purge_leaves_nothing_of_a_daemon_that_served(account: Account) -> None:
    """With settings, a key and a disk tier in use: both trees are afterwards what they were."""
    write_as(account, account.manager.home / ".config/other/file", "kept")
    before = account.tree()
    config = account.manager.home / ".config/dg-cached/config.toml"
    write_as(account, config, "[daemon]\\ndisk_size_mb = 64\\nmemory_size_mb = 3\\n")
    account("start")  # a log, too
    account("stop")
    account("install")
    assert account.backend() == "dg-cached"
    account("put", "bkt/app", "/etc/services", DG_CACHE_BACKEND="dg-cached")
    tier = account.manager.home / ".cache/deltaglider/v2/disk"
    assert tier.is_dir()
    account("uninstall", "--purge", "--dry-run")
    assert account.state() == "active"
    listed = account.said("uninstall")
    left = {line.split()[1].rstrip(":") for line in listed if line.startswith("left ")}
    assert str(config.parent) in left
    assert any(path.startswith(str(tier)) for path in left)
    assert account.state(SOCKET) == "inactive"
    account("uninstall", "--purge")
    assert account.tree() == before
    account("uninstall", "--purge")  # there is nothing to do
    assert account.tree() == before


def test_a_client_that_is_connected_goes_on_without_the_daemon(account: Account) -> None:
    """Its next use falls back; nothing starts the daemon again."""
    account("install")
    gate = account.manager.home / "gate"
    account.manager.run(["mkfifo", gate])
    script = (
        f"{account.programs / 'python'} -c '{USE}' {gate} > {gate}.out 2>&1 & client=$!\n"
        f"until grep -q dg-cached {gate}.out; do :; done\n"
        f"{account.programs / 'dg-cache'} uninstall --purge\n"
        f": > {gate}; wait $client; cat {gate}.out"
    )
    done = account.manager.run(["sh", "-c", script], PATIENT)
    assert done.stdout.splitlines()[-1] == "done", done.stdout + done.stderr
    assert account.state() == "inactive"
    assert not (account.manager.runtime_dir / "dg-cached").exists()


def test_purge_follows_no_link_and_keeps_what_is_not_ours(account: Account) -> None:
    """A settings directory that is a link stays, and so does what it leads to."""
    home = account.manager.home
    write_as(account, home / "dotfiles/config.toml", "ttl_seconds = 60\\n")
    account.manager.run(["sh", "-c", "mkdir -p .config; ln -s ~/dotfiles .config/dg-cached"])
    account("install")
    said = account.said("uninstall", "--purge")
    assert f"left {home / '.config/dg-cached'}: a link to {home / 'dotfiles'}" in said
    assert (home / "dotfiles/config.toml").exists()
