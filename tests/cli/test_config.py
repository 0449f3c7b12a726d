"""`dg-cache config` and the findings of `status`: each value, whose it is, what is odd about it."""

import base64
import json
import os
import secrets
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dgcache_cli.example import example
from dgcache_cli.findings import findings
from dgcache_core.settings import ClientSettings, DaemonSettings
from dgcache_core.settings_files import TABLES, read_settings
from tests.support.etc import own_etc

from .test_commands import Shell

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace needs root")
TTL, MEMORY = "DG_CACHE_TTL_SECONDS", "DG_CACHE_MEMORY_SIZE_MB"


@pytest.fixture
def cold(short_directory: Path) -> Shell:
    """No daemon, no file."""
    return Shell(short_directory)


@pytest.fixture
def shell(cold: Shell) -> Iterator[Shell]:
    """A daemon that was started with a flag."""
    cold("start", "--memory-size-mb", "32")
    yield cold
    cold("stop")


def write_file(shell: Shell, text: str) -> Path:
    """Write the user's settings file."""
    file = shell.base / ".config" / "dg-cached" / "config.toml"
    file.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    file.write_text(text)
    file.chmod(0o600)
    return file


def config(shell: Shell, **extra: str) -> dict[str, Any]:
    """Return what config says to programs, with settings by name."""
    said: dict[str, Any] = json.loads(shell.said("config", "--json", **extra))
    for party in ("client", "daemon", "next_daemon"):
        said[party] = {one["name"]: one for one in said[party] or []}
    return said


def of_status(shell: Shell, **extra: str) -> list[str]:
    """Return the findings of status."""
    found: list[str] = json.loads(shell.said("status", "--json", **extra))["findings"]
    return found


def test_each_value_has_its_layer(shell: Shell) -> None:
    """Of the client, of the daemon that runs, and of one that would be started from here."""
    file = write_file(shell, "ttl_seconds = 7\n[client]\nwait_seconds = 8\n")
    said = config(shell, DG_CACHE_REPORT="on", **{MEMORY: "16"})
    client, daemon, following = said["client"], said["daemon"], said["next_daemon"]
    assert (client[TTL]["value"], client[TTL]["origin"]) == ("7", str(file))
    assert client["DG_CACHE_WAIT_SECONDS"]["origin"] == str(file)
    report = client["DG_CACHE_REPORT"]
    assert (report["value"], report["origin"]) == ("true", "environment DG_CACHE_REPORT")
    assert (daemon[MEMORY]["value"], daemon[MEMORY]["origin"]) == ("32", "flag")
    assert (daemon[TTL]["value"], daemon[TTL]["origin"]) == ("86400", "default")
    assert following[MEMORY]["value"] == "16"


def test_without_a_daemon_the_next_one_is_described(cold: Shell) -> None:
    """What `dg-cache start` would give it."""
    said = config(cold)
    assert said["daemon"] == {}
    assert said["next_daemon"][TTL]["value"] == "86400"
    text = cold.said("config")
    assert "daemon: not running; dg-cache start" in text
    assert MEMORY in text


def test_everything_fits_80_columns(shell: Shell) -> None:
    """Long paths and long findings fold; nothing is cut off; no colour in a pipe."""
    long = shell.base / ("long-" * 12) / "er"
    write_file(shell, f"cache_dir = '{long}'\n[daemon]\nmemory_size_mb = 17\n")
    extra = {TTL: "100", "DG_CACHE_MEMORY_SIZE": "5", "DG_CACHE_BACKEND": "memory"}
    for command in ("config", "status"):
        text = shell.said(command, **extra)
        assert max(map(len, text.splitlines())) <= 80
        assert "\x1b" not in text
        assert "…" not in text
        together = "".join(text.split())
        assert str(long) in together
        for finding in config(shell, **extra)["findings"]:
            assert "".join(finding.split()) in together


def test_a_difference_names_the_command_that_applies_it(shell: Shell) -> None:
    """And that command does: nothing is left to say afterwards."""
    write_file(shell, "ttl_seconds = 7\n")
    for found in (of_status(shell), config(shell)["findings"]):
        [finding] = found
        assert f"{TTL} is 86400 in the daemon (default) and would be 7 from here" in finding
        assert "~/.config/dg-cached/config.toml" in finding
        assert "dg-cache restart applies it" in finding
    shell("restart")
    assert of_status(shell) == []


def test_what_a_flag_said_is_no_difference(shell: Shell) -> None:
    """Whoever started the daemon so meant it, until something here says otherwise."""
    assert of_status(shell) == []
    assert f"{MEMORY} is 32 in the daemon (flag)" in of_status(shell, **{MEMORY: "16"})[0]


def test_a_variable_of_the_daemon_that_is_unset_here_is_a_difference(cold: Shell) -> None:
    """The next daemon would not have it."""
    cold("start", **{TTL: "50"})
    try:
        [finding] = of_status(cold)
        assert of_status(cold, **{TTL: "50"}) == []
    finally:
        cold("stop")
    assert f"{TTL} is 50 in the daemon (environment) and would be 86400" in finding


@pytest.mark.parametrize(
    ("here", "there", "command"),
    [
        ({TTL: "5"}, "default", f"systemctl --user import-environment {TTL} && systemctl"),
        ({}, f"environment {TTL}", f"systemctl --user unset-environment {TTL} && systemctl"),
        ({}, "/etc/dg-cached/config.toml", ": systemctl --user restart dg-cached applies"),
    ],
)
def test_under_systemd_the_managers_environment_is_what_counts(
    here: dict[str, str], there: str, command: str
) -> None:
    """A restart alone would not bring a shell's variable to the daemon, nor take it away."""
    from dgcache import Settings

    status = {
        "supervisor": "systemd",
        "pid": os.getpid(),  # in no unit
        "directory": "/run/user/0/dg-cached",
        "settings": [{"name": TTL, "value": "77", "origin": there}],
    }
    [finding] = findings(here, Settings.resolved(), status)
    assert command in finding
    assert "systemctl --user restart dg-cached applies it" in finding


def test_variables_that_nobody_reads_are_named_with_the_nearest(cold: Shell) -> None:
    """Of ours only; DeltaGlider has settings of its own."""
    found = config(cold, DG_CACHE_MEMORY_MB="5", DG_CACHE_XYZZY="1", DG_LOG_LEVEL="x")["findings"]
    assert found == [
        "DG_CACHE_MEMORY_MB is no setting: did you mean DG_CACHE_MEMORY_SIZE_MB?",
        "DG_CACHE_XYZZY is no setting",
    ]


def test_what_is_left_over_from_deltaglider_is_named(shell: Shell) -> None:
    """With what follows from it."""
    extra = {"DG_CACHE_BACKEND": "memory", "DG_CACHE_ENCRYPTION": "false"}
    for found in (of_status(shell, **extra), config(shell, **extra)["findings"]):
        assert [line.split("=")[0] for line in found] == list(extra)


@pytest.mark.root
@needs_root
def test_a_ceiling_of_etc_is_named_by_both(cold: Shell) -> None:
    """By the daemon's own account, and for the client's own wish."""
    enter = own_etc(cold.base, "[limits]\nttl_seconds = 60\nfallback_size_mb = 10\n")
    extra = {TTL: "61", "DG_CACHE_FALLBACK_SIZE_MB": "11"}
    argv = [*enter, sys.executable, "-m", "dgcache_cli"]

    def run(*words: str) -> str:
        done = subprocess.run(
            [*argv, *words], env={**cold.environment, **extra}, capture_output=True, check=True
        )
        return done.stdout.decode()

    run("start")
    try:
        said = json.loads(run("config", "--json"))
        text = run("config")
    finally:
        run("stop")
    daemon = {one["name"]: one for one in said["daemon"]}
    assert daemon[TTL]["value"] == "60"
    assert daemon[TTL]["origin"].startswith("ceiling /etc/dg-cached/config.toml (61 wanted by ")
    assert sorted(line.split(":")[0] for line in said["findings"]) == [
        "DG_CACHE_FALLBACK_SIZE_MB is 10",
        f"{TTL} is 60",
    ]
    assert max(map(len, text.splitlines())) <= 80


def test_a_wrong_file_is_refused_by_config_and_named_by_status(shell: Shell) -> None:
    """Exit status 78 where it is the client's; a finding where it is only the next daemon's."""
    file = write_file(shell, "[daemon]\nmemory = 5\n")
    assert f"{file}: unknown key 'memory' in [daemon]" in shell.refused("config", status=78)
    [finding] = of_status(shell)
    assert "a daemon started from here would refuse: " in finding
    write_file(shell, "[client]\nbackends = 5\n")
    assert "did you mean backend" in shell.refused("status", status=78)
    file.chmod(0o666)
    assert f"chmod go-w {file}" in shell.refused("get", "b/p", "0" * 64, status=78)
    file.unlink()


def test_start_passes_its_options_on_and_says_what_is_wrong(cold: Shell) -> None:
    """Relative paths are from here; a wrong setting is exit status 78, as everywhere."""
    (cold.base / "key").write_text(base64.b64encode(secrets.token_bytes(32)).decode())
    (cold.base / "key").chmod(0o644)
    words = ("start", "--disk-size-mb", "0", "--cache-dir", "c", "--encryption-key-file", "key")
    assert "chmod go-rwx" in cold.refused(*words, status=78)
    (cold.base / "key").chmod(0o600)
    cold(*words)
    try:
        daemon = config(cold)["daemon"]
    finally:
        cold("stop")
    assert daemon["DG_CACHE_DIR"]["value"] == str(cold.base / "c")
    assert daemon["DG_CACHE_ENCRYPTION_KEY"]["value"] == "set"
    assert daemon["DG_CACHE_ENCRYPTION_KEY"]["origin"] == f"{cold.base / 'key'}, named by flag"
    assert daemon["DG_CACHE_DISK_SIZE_MB"] == {
        "name": "DG_CACHE_DISK_SIZE_MB",
        "value": "0",
        "origin": "flag",
    }


def test_no_command_and_no_file_has_the_key(cold: Shell) -> None:
    """config, status, logs, errors; and nothing below the home holds it."""
    key = secrets.token_bytes(32)
    text = base64.b64encode(key).decode()
    forms = [text[:12], base64.urlsafe_b64encode(key).decode()[:12], key.hex()[:12]]
    extra = {"DG_CACHE_ENCRYPTION_KEY": text}
    cold("start", **extra)
    try:
        outputs = [
            cold(*words, **extra)
            for words in (("config",), ("config", "--json"), ("status",), ("status", "--json"))
        ]
        outputs.append(cold("logs"))
        outputs.append(cold("start", status=0, DG_CACHE_ENCRYPTION_KEY=text + "x"))
    finally:
        cold("stop")
    outputs.append(cold("start", status=78, DG_CACHE_ENCRYPTION_KEY=text + "x"))
    outputs.append(cold("config", status=78, DG_CACHE_ENCRYPTION_KEY=text[:-4]))
    shown = b"".join(done.stdout + done.stderr for done in outputs).decode()
    shown += "".join(
        path.read_text(errors="replace")
        for path in cold.base.rglob("*")
        if stat.S_ISREG(path.lstat().st_mode)
    )
    assert "DG_CACHE_ENCRYPTION_KEY" in shown
    assert not [form for form in forms if form in shown]
    assert '"value": "set"' in shown


def test_the_example_is_a_file_with_every_setting_and_its_default(
    cold: Shell, short_directory: Path
) -> None:
    """As printed it sets nothing; without the `# ` it is a file that is accepted as it stands."""
    said = cold.said("config", "--example")
    assert said == example()
    assert tomllib.loads(said) == {}
    lines = [line.removeprefix("# ") for line in said.splitlines()[2:]]
    text = "\n".join(line for line in lines if not line.startswith("Ceilings"))
    document = tomllib.loads(text)
    names = [set(document.get(table, {})) for table in ("client", "daemon", "limits")]
    assert [set(document) & set(TABLES[""]), *names] == [set(t) for t in TABLES.values()]
    file = write_file(cold, text)
    for kind in (ClientSettings, DaemonSettings):
        resolved = read_settings(kind, {}, {}, file)
        for name, value in vars(kind()).items():
            if value is not None:
                assert getattr(resolved.settings, name) == value
