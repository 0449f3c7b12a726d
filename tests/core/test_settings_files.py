"""Flag, environment, the user's file, /etc, default; below the ceilings; or refused by name."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgcache_core.errors import SettingsError
from dgcache_core.settings import ClientSettings, DaemonSettings, Resolved, declared
from dgcache_core.settings_files import TABLES, read_settings, user_file

from .support import DETERMINISTIC, run_python

Kind = type[ClientSettings] | type[DaemonSettings]
SOMEBODY_ELSE = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving files to others needs root")
VALUES = {
    "fallback_size_mb": (11, 12, "13", 14),
    "ttl_seconds": (21, 22, "23", 24),
    "connect_timeout_ms": (31, 32, "33", 34),
    "wait_seconds": (41, 42, "43", 44),
    "memory_size_mb": (51, 52, "53", 54),
    "disk_size_mb": (61, 62, "63", 64),
    "backend": ("memory", "filesystem", "dg-cached", "memory"),
    "transport": ("grpc", "direct", "auto", "grpc"),
    "ephemeral": (True, False, "true", False),
    "no_cache": (True, False, "true", False),
    "report": (True, False, "true", False),
    "encryption": (False, True, "false", True),
    "socket_dir": ("/a", "/b", "/c", Path("/d")),
    "cache_dir": ("/a", "/b", "/c", Path("/d")),
    "encryption_key_file": ("/a", "/b", "/c", Path("/d")),
}
"""For each field a value for /etc, the user's file, the environment, and the flag."""


class Files:
    """The two files, and how settings are read from them."""

    def __init__(self, base: Path) -> None:
        self.system = base / "etc" / "config.toml"
        self.user = base / "config" / "dg-cached" / "config.toml"
        self.environ = {"XDG_CONFIG_HOME": str(base / "config")}

    def write(self, path: Path, text: str | bytes) -> None:
        """Write one of them, as nobody else can have done."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(0o600)

    def read(self, kind: Any, environ: dict[str, str] | None = None, **flags: Any) -> Resolved[Any]:
        return read_settings(kind, {**self.environ, **(environ or {})}, flags, self.system)

    def refusal(self, kind: Any) -> str:
        """Assert that the files are refused, and return why."""
        with pytest.raises(SettingsError) as error:
            self.read(kind)
        assert "\n" not in str(error.value)
        return str(error.value)


@pytest.fixture
def files(short_directory: Path) -> Files:
    """No file yet."""
    return Files(short_directory.resolve())


def toml(name: str, value: Any) -> str:
    """Return a file that sets one field, where it belongs."""
    [table] = [table for table in ("", "client", "daemon") if name in TABLES[table]]
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return (f"[{table}]\n" if table else "") + f"{name} = {shown}\n"


CASES = [
    pytest.param(kind, name, id=f"{kind.__name__}.{name}")
    for kind in (ClientSettings, DaemonSettings)
    for name, one in declared(kind).items()
    if not one.secret
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_setting_can_stand_in_a_file_and_each_layer_beats_the_next(
    files: Files, kind: Kind, name: str
) -> None:
    """/etc beats the default, the user's file that, then the environment, then the flag."""
    system, user, text, flag = VALUES[name]
    variable = declared(kind)[name].variable

    def effective(environ: dict[str, str] | None = None, **flags: Any) -> tuple[str, str]:
        resolved = files.read(kind, environ, **flags)
        assert resolved.findings == ()
        assert set(resolved.origins) == set(declared(kind))
        return str(getattr(resolved.settings, name)).lower(), resolved.origins[name]

    assert effective() == (str(getattr(kind(), name)).lower(), "default")
    files.write(files.system, toml(name, system))
    assert effective() == (str(system).lower(), str(files.system))
    files.write(files.user, toml(name, user))
    assert effective() == (str(user).lower(), str(files.user))
    assert effective({variable: ""}) == (str(user).lower(), str(files.user))
    said = effective({variable: text})
    assert (float(said[0]) if said[0][0].isdigit() else said[0]) == (
        float(text) if text[0].isdigit() else text
    )
    assert said[1] == f"environment {variable}"
    assert effective({variable: text}, **{name: flag}) == (str(flag).lower(), "flag")


def test_numbers_take_fractions_and_paths_the_home(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the environment."""
    monkeypatch.setenv("HOME", "/home/me")
    files.write(files.user, 'cache_dir = "~/c"\n[daemon]\nmemory_size_mb = 0.5\n')
    settings = files.read(DaemonSettings).settings
    assert (settings.memory_size_mb, settings.cache_dir) == (0.5, Path("/home/me/c"))


def test_each_party_leaves_the_others_table_alone(files: Files) -> None:
    """A newer daemon's setting does not stop an older client, nor the other way round."""
    files.write(files.user, "[daemon]\nnewer = 1\nttl_seconds = 'x'\n[client]\nreport = true\n")
    assert files.read(ClientSettings).settings.report is True
    assert "'newer' in [daemon]" in files.refusal(DaemonSettings)
    files.write(files.user, "[client]\nnewer = 1\n[daemon]\nmemory_size_mb = 8\n")
    assert files.read(DaemonSettings).settings.memory_size_mb == 8
    assert "'newer' in [client]" in files.refusal(ClientSettings)


# -- ceilings -----------------------------------------------------------------

LIMITED = [(kind, n) for kind in (ClientSettings, DaemonSettings) for n in TABLES["limits"]]
LIMITED = [(kind, name) for kind, name in LIMITED if name in declared(kind)]


@pytest.mark.parametrize(("kind", "name"), LIMITED)
@pytest.mark.parametrize("layer", ["flag", "environment", "user", "system"])
def test_nobody_exceeds_a_ceiling(files: Files, kind: Kind, name: str, layer: str) -> None:
    """The wish is clamped, and it is said what was wished for, by whom, and whose ceiling it is."""
    variable = declared(kind)[name].variable
    limits = f"[limits]\n{name} = 5\n"
    files.write(files.system, (toml(name, 9) if layer == "system" else "") + limits)
    if layer == "user":
        files.write(files.user, toml(name, 9))
    resolved = files.read(
        kind,
        {variable: "9"} if layer == "environment" else {},
        **({name: 9} if layer == "flag" else {}),
    )
    assert getattr(resolved.settings, name) == 5
    origins = {
        "flag": "flag",
        "environment": f"environment {variable}",
        "user": str(files.user),
        "system": str(files.system),
    }
    said = f"ceiling {files.system} (9 wanted by {origins[layer]})"
    assert resolved.origins[name] == said
    assert resolved.findings == (f"{variable} is 5: {said}",)


@pytest.mark.parametrize(("kind", "name"), LIMITED)
def test_a_wish_up_to_the_ceiling_is_granted(files: Files, kind: Kind, name: str) -> None:
    """The ceiling itself, and what is below it."""
    files.write(files.system, f"[limits]\n{name} = 5\n")
    for wish in (5, 4, 2.5):
        resolved = files.read(kind, **{name: wish})
        assert (getattr(resolved.settings, name), resolved.origins[name]) == (wish, "flag")
        assert resolved.findings == ()


def test_a_default_above_the_ceiling_is_lowered_without_ado(files: Files) -> None:
    """Nobody wished for it; the origin tells all the same."""
    files.write(files.system, "[limits]\nttl_seconds = 60\nmemory_size_mb = 100\n")
    resolved = files.read(DaemonSettings)
    assert (resolved.settings.ttl_seconds, resolved.findings) == (60, ())
    assert resolved.origins["ttl_seconds"] == f"ceiling {files.system}"
    assert resolved.settings.memory_size_mb is None  # chosen later, below this:
    assert resolved.ceilings["memory_size_mb"] == (100, str(files.system))


def test_limits_in_the_users_file_are_refused(files: Files) -> None:
    """They would look as if they bound somebody."""
    files.write(files.user, "[limits]\nttl_seconds = 60\n")
    message = files.refusal(ClientSettings)
    assert f"{files.user}: [limits] counts only in" in message


def test_the_administrators_file_is_not_read_as_the_users(files: Files) -> None:
    """Where XDG_CONFIG_HOME leads to /etc."""
    files.system = files.user
    files.write(files.system, "[limits]\nttl_seconds = 60\n")
    assert files.read(DaemonSettings).settings.ttl_seconds == 60


# -- wrong in itself ------------------------------------------------------------

UNKNOWN = [
    (ClientSettings, "ttl_second = 5", "'ttl_second': did you mean ttl_seconds, above the first"),
    (ClientSettings, "[clients]\n", "'clients': did you mean [client]?"),
    (DaemonSettings, "[deamon]\n", "'deamon': did you mean [daemon]?"),
    (DaemonSettings, "memory_size_mb = 5", "did you mean memory_size_mb, in [daemon]?"),
    (DaemonSettings, "[daemon]\nttl_seconds = 5", "in [daemon]: did you mean ttl_seconds, above"),
    (DaemonSettings, "[daemon]\nreport = true", "did you mean report, in [client]?"),
    (DaemonSettings, "[daemon]\nmemory_size = 5", "did you mean memory_size_mb, in [daemon]?"),
    (DaemonSettings, "DG_CACHE_TTL_SECONDS = 5", "did you mean ttl_seconds, above"),
    (ClientSettings, "[client]\nxyzzy = 5", "'xyzzy' in [client]: known are backend, "),
    (ClientSettings, "'' = 5", "unknown key ''"),
    (ClientSettings, '"a\\nb" = 5', "unknown key 'a\\nb'"),
    (DaemonSettings, "encryption_key = 'k'", "a private file"),
    (DaemonSettings, "[daemon]\nencryption_key = 'k'", "encryption_key_file in [daemon]"),
    (DaemonSettings, "[daemon.more]\nx = 1", "unknown key 'more' in [daemon]"),
]


@pytest.mark.parametrize(("kind", "text", "said"), UNKNOWN)
def test_unknown_keys_and_tables_are_refused_with_the_nearest_known(
    files: Files, kind: Kind, text: str, said: str
) -> None:
    """Naming the file, the key, and where it belongs; of a key's value, nothing."""
    files.write(files.user, text)
    message = files.refusal(kind)
    assert message.startswith(f"{files.user}: ")
    assert said in message
    assert "'k'" not in message


@pytest.mark.parametrize("name", ["ttl_second", "report", "x"])
def test_unknown_ceilings_are_refused(files: Files, name: str) -> None:
    """Only numbers have one."""
    files.write(files.system, f"[limits]\n{name} = 5\n")
    for kind in (ClientSettings, DaemonSettings):
        assert f"unknown key {name!r} in [limits]" in files.refusal(kind)


WRONG = [
    (ClientSettings, "ttl_seconds = '5'", "ttl_seconds must be a number such as"),
    (ClientSettings, "ttl_seconds = true", "ttl_seconds must be a number such as"),
    (ClientSettings, "ttl_seconds = [5]", "ttl_seconds must be a number such as"),
    (ClientSettings, "ttl_seconds = 2026-01-01", "ttl_seconds must be a number such as"),
    (ClientSettings, "[ttl_seconds]\nx = 1", "ttl_seconds must be a number such as"),
    (ClientSettings, "ttl_seconds = nan", "must be a number from 1 to"),
    (ClientSettings, "ttl_seconds = inf", "must be a number from 1 to"),
    (ClientSettings, "ttl_seconds = 0", "must be a number from 1 to"),
    (ClientSettings, "ttl_seconds = " + "9" * 400, "must be a number from 1 to"),
    (ClientSettings, "ttl_seconds = " + "9" * 5000, "is not TOML"),
    (ClientSettings, "socket_dir = 5", "socket_dir must be an absolute path in quotes"),
    (ClientSettings, "socket_dir = 'x'", "must be an absolute path"),
    (ClientSettings, "socket_dir = '~nobody-has-this-name/x'", "somebody unknown"),
    (ClientSettings, "[client]\nreport = 'yes'", "report must be true or false, without quotes"),
    (ClientSettings, "[client]\nreport = 1", "report must be true or false, without quotes"),
    (ClientSettings, "[client]\nbackend = 'redis'", "must be one of dg-cached, memory, filesystem"),
    (ClientSettings, "[client]\nbackend = 1", 'backend must be "dg-cached" or "memory" or'),
    (ClientSettings, "client = 5", "client must be a table: write [client]"),
    (ClientSettings, "[[client]]\nreport = true", "client must be a table: write [client]"),
    (DaemonSettings, "daemon = 5", "daemon must be a table: write [daemon]"),
    (ClientSettings, "ttl_seconds 5", "is not TOML: "),
    (ClientSettings, "ttl_seconds = 5\nttl_seconds = 6", "is not TOML: "),
    (ClientSettings, "x = " + "[" * 60_000, "is not TOML: "),
    (ClientSettings, b"# \xe9\n", "is not UTF-8 at byte 2"),
    (ClientSettings, b"\xff\xfet\0", "is not UTF-8 at byte 0"),
]


@pytest.mark.parametrize(("kind", "text", "said"), WRONG, ids=lambda case: str(case)[:24])
def test_wrong_values_are_refused_with_the_accepted_ones(
    files: Files, kind: Kind, text: str | bytes, said: str
) -> None:
    """Naming the file and the key; so is what is no TOML at all."""
    files.write(files.user, text)
    message = files.refusal(kind)
    assert str(files.user) in message
    assert said in message
    assert len(message) < 1000


@pytest.mark.parametrize("text", ["ttl_seconds = '5'", "ttl_seconds = 0", "memory_size_mb = 0.1"])
def test_a_ceiling_is_held_to_its_fields_own_check(files: Files, text: str) -> None:
    """Nobody could stay below it."""
    files.write(files.system, f"[limits]\n{text}\n")
    assert f"{files.system}: limits.{text.split(maxsplit=1)[0]}" in files.refusal(DaemonSettings)


@DETERMINISTIC
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_file_is_read_or_refused(content: bytes) -> None:
    """Settings, or SettingsError that names the file; nothing else."""
    from dgcache_core import settings_files

    path = Path("/f.toml")
    said = str(path)
    try:
        settings_files._layer(ClientSettings, path, content, may_limit=True)
    except SettingsError as error:
        said = str(error)
    assert str(path) in said


# -- whose it is -----------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["user", "system"])
def test_a_file_that_others_can_write_is_refused_with_the_mending_command(
    files: Files, which: str
) -> None:
    """Whatever it says; so is one in such a directory."""
    path: Path = getattr(files, which)
    files.write(path, "ttl_seconds = 5\n")
    path.chmod(0o620)
    assert f"chmod go-w {path}" in files.refusal(ClientSettings)
    path.chmod(0o600)
    path.parent.chmod(0o1777)
    assert f"chmod go-w {path.parent}" in files.refusal(ClientSettings)


def test_a_fifo_does_not_block_whoever_reads_settings(files: Files) -> None:
    """It is refused, as is a directory."""
    files.user.parent.mkdir(parents=True, mode=0o700)
    os.mkfifo(files.user, 0o600)
    assert "not a regular file" in files.refusal(ClientSettings)
    files.user.unlink()
    files.user.mkdir(0o700)
    assert "not a regular file" in files.refusal(ClientSettings)


def test_a_file_has_at_most_64_kib(files: Files) -> None:
    """One byte more is refused before it is parsed."""
    files.write(files.user, b"#" * 65_535 + b"\n")
    assert files.read(ClientSettings).settings == ClientSettings()
    files.write(files.user, b"#" * 65_536 + b"\n")
    assert "larger than 65536 bytes" in files.refusal(ClientSettings)


def test_an_own_link_is_followed_and_one_that_leads_nowhere_is_refused(files: Files) -> None:
    """To a file that passes the same checks."""
    real = files.user.parent.parent / "real.toml"
    files.write(real, "ttl_seconds = 5\n")
    files.user.parent.mkdir(mode=0o700)
    files.user.symlink_to("../real.toml")
    assert files.read(ClientSettings).settings.ttl_seconds == 5
    real.chmod(0o602)
    assert "can be written by others" in files.refusal(ClientSettings)
    real.unlink()
    assert "leads nowhere" in files.refusal(ClientSettings)


@pytest.mark.root
@needs_root
def test_somebody_elses_file_directory_or_link_is_refused(files: Files) -> None:
    """As after sudo -E, with another's HOME; the message says both ways out."""
    files.write(files.user, "ttl_seconds = 5\n")
    os.chown(files.user, SOMEBODY_ELSE, SOMEBODY_ELSE)
    message = files.refusal(ClientSettings)
    assert f"belongs to uid {SOMEBODY_ELSE}" in message
    assert "chown" in message
    assert "set HOME to your own" in message
    os.chown(files.user, 0, 0)
    os.chown(files.user.parent, SOMEBODY_ELSE, SOMEBODY_ELSE)
    assert f"'dg-cached' belongs to uid {SOMEBODY_ELSE}" in files.refusal(ClientSettings)
    os.chown(files.user.parent, 0, 0)
    files.user.unlink()
    files.user.symlink_to("/etc/hostname")
    os.chown(files.user, SOMEBODY_ELSE, SOMEBODY_ELSE, follow_symlinks=False)
    assert f"is a link of uid {SOMEBODY_ELSE}" in files.refusal(ClientSettings)


@pytest.mark.root
@needs_root
def test_an_ordinary_user_is_bound_by_roots_file(
    files: Files, as_somebody_else: Callable[[Callable[[], str]], str]
) -> None:
    """He reads it where he may, and is refused, not unbound, where he may not."""
    files.write(files.system, "[limits]\nttl_seconds = 60\n")
    for directory in (files.system.parent, files.system.parent.parent):
        directory.chmod(0o755)
    files.system.chmod(0o644)
    assert as_somebody_else(lambda: str(files.read(DaemonSettings).settings.ttl_seconds)) == "60"
    files.system.chmod(0o600)
    assert "Permission denied" in as_somebody_else(lambda: files.refusal(DaemonSettings))
    files.system.parent.chmod(0o700)
    assert "Permission denied" in as_somebody_else(lambda: files.refusal(DaemonSettings))


@pytest.mark.root
@needs_root
def test_a_home_that_cannot_be_entered_has_no_file_of_mine(
    files: Files, as_somebody_else: Callable[[Callable[[], str]], str]
) -> None:
    """`sudo -u` leaves HOME as it was: that is no reason to fail."""
    files.write(files.user, "ttl_seconds = 5\n")
    files.user.parent.parent.parent.chmod(0o755)
    files.user.parent.parent.chmod(0o700)
    files.system = Path("/dev/null/none")
    ttl = as_somebody_else(lambda: str(files.read(ClientSettings).settings.ttl_seconds))
    assert ttl == "86400"


# -- where it is, and what it costs ----------------------------------------------------------------


def test_the_users_file_is_where_xdg_says() -> None:
    """A relative XDG_CONFIG_HOME is ignored, as the specification has it."""
    expected = Path("/h/.config/dg-cached/config.toml")
    assert user_file({"XDG_CONFIG_HOME": "/x", "HOME": "/h"}) == Path("/x/dg-cached/config.toml")
    for ignored in ("", "relative"):
        assert user_file({"XDG_CONFIG_HOME": ignored, "HOME": "/h"}) == expected
    assert user_file({"HOME": "/h"}) == expected
    assert user_file({}) is None


def test_without_a_file_nothing_is_imported_and_two_names_are_looked_at(files: Files) -> None:
    """`import dgcache` and its settings stay light; with a file, tomllib comes."""
    program = (
        "import dgcache, sys; dgcache.Settings.from_environment(); print('tomllib' in sys.modules)"
    )
    environ = {**os.environ, **files.environ}
    argv = [sys.executable, "-W", "error", "-c", program]
    for said in (b"False\n", b"True\n"):
        done = subprocess.run(argv, env=environ, capture_output=True, check=True)
        assert done.stdout == said
        files.write(files.user, "")
    looked_at = run_python(
        "import os\n"
        "seen, lstat = [], os.lstat\n"
        "os.lstat = lambda path: seen.append(path) or lstat(path)\n"
        "import dgcache_core.settings_files as s\n"
        "s.read_settings(s.ClientSettings, {'HOME': '/dev/null'}, {}, s.Path('/dev/null/x'))\n"
        "print(len(seen))"
    )
    assert looked_at == "2"
