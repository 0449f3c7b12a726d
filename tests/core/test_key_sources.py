"""The key comes from the first source that is given, and the others are named."""

import base64
import os
from pathlib import Path

import pytest

from dgcache_core.errors import SettingsError
from dgcache_core.key_sources import choose_key
from dgcache_core.settings import DaemonSettings, Resolved
from dgcache_core.settings_files import read_settings
from tests.support.wire import as_user

NAMES = ("flag", "variable", "variable's file", "credential", "settings file")
KEYS = {name: bytes([number]) * 32 for number, name in enumerate(NAMES)}
LOOK = """
from dgcache_core.key_sources import choose_key
from dgcache_core.settings import DaemonSettings, Resolved, declared
become(int(sys.argv[2]))  # now that the interpreter's files have been read
origins = dict.fromkeys(declared(DaemonSettings), "default")
resolved = choose_key(Resolved(DaemonSettings(), origins), sys.argv[1])
print(resolved.settings.encryption_key, resolved.origins["encryption_key"])
print(*resolved.findings, sep="\\n")
"""


@pytest.fixture
def place(short_directory: Path) -> Path:
    """A private directory for files of every kind."""
    return short_directory.resolve()


def key_file(path: Path, key: bytes, mode: int = 0o600) -> Path:
    """Write a key as openssl prints it."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_bytes(base64.b64encode(key) + b"\n")
    path.chmod(mode)
    return path


def chosen(place: Path, *given: str) -> Resolved[DaemonSettings]:
    """Return what counts where these sources are given."""
    environ = {"XDG_CONFIG_HOME": str(place)}
    flags, credentials = {}, ""
    for name in given:
        file = key_file(place / "keys" / name, KEYS[name])
        if name == "flag":
            flags["encryption_key_file"] = file
        elif name == "variable":
            environ["DG_CACHE_ENCRYPTION_KEY"] = base64.b64encode(KEYS[name]).decode()
        elif name == "variable's file":
            environ["DG_CACHE_ENCRYPTION_KEY_FILE"] = str(file)
        elif name == "credential":
            credentials = str(key_file(place / "credentials" / "dg-cache-key", KEYS[name]).parent)
        else:
            (place / "dg-cached").mkdir(exist_ok=True)
            text = f"[daemon]\nencryption_key_file = '{file}'\n"
            (place / "dg-cached" / "config.toml").write_text(text)
    return choose_key(read_settings(DaemonSettings, environ, flags, place / "none"), credentials)


ORIGINS = {
    "flag": "{place}/keys/flag, named by flag",
    "variable": "environment DG_CACHE_ENCRYPTION_KEY",
    "variable's file": (
        "{place}/keys/variable's file, named by environment DG_CACHE_ENCRYPTION_KEY_FILE"
    ),
    "credential": "credential dg-cache-key",
    "settings file": "{place}/keys/settings file, named by {place}/dg-cached/config.toml",
}


@pytest.mark.parametrize("name", NAMES)
def test_each_source_gives_its_key_and_says_so(place: Path, name: str) -> None:
    """One alone; nothing further is to be said about it."""
    only = chosen(place, name)
    assert only.settings.encryption_key is not None
    assert only.settings.encryption_key.view() == KEYS[name]
    assert only.origins["encryption_key"] == ORIGINS[name].format(place=place)
    assert only.findings == ()


# a flag, a variable and a settings file name the same setting, so that each hides the next
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("flag", "variable"),
        ("flag", "credential"),
        ("variable", "variable's file"),
        ("variable", "credential"),
        ("variable", "settings file"),
        ("variable's file", "credential"),
        ("credential", "settings file"),
    ],
)
def test_the_first_of_two_sources_counts_and_the_other_is_named(
    place: Path, first: str, second: str
) -> None:
    """In this order, whichever was given first."""
    for given in ((first, second), (second, first)):
        both = chosen(place, *given)
        assert both.settings.encryption_key is not None
        assert both.settings.encryption_key.view() == KEYS[first]
        [finding] = both.findings
        assert ORIGINS[second].format(place=place) in finding


def test_a_file_that_does_not_count_is_not_even_read(place: Path) -> None:
    """A wrong one is no obstacle then."""
    environ = {
        "DG_CACHE_ENCRYPTION_KEY": base64.b64encode(KEYS["variable"]).decode(),
        "DG_CACHE_ENCRYPTION_KEY_FILE": str(place / "none"),
    }
    resolved = choose_key(read_settings(DaemonSettings, environ, {}, place / "none"), "")
    assert resolved.settings.encryption_key is not None


def test_without_a_source_the_key_is_ephemeral(place: Path) -> None:
    """Also where the manager has credentials, and this one is not among them."""
    key_file(place / "credentials" / "another", KEYS["credential"])
    nothing = read_settings(DaemonSettings, {}, {}, place / "none")
    for directory in ("", "relative", str(place / "credentials"), str(place / "nowhere")):
        resolved = choose_key(nothing, directory)
        assert resolved.settings.encryption_key is None
        assert resolved.origins["encryption_key"] == "default"


@pytest.mark.root
def test_credentials_that_cannot_be_looked_into_are_no_end_and_are_said(place: Path) -> None:
    """An ordinary user before root's directory: where a manager could not mount it, it is one."""
    credentials = key_file(place / "credentials" / "dg-cache-key", KEYS["credential"]).parent
    place.chmod(0o711)
    said = as_user(None, LOOK, credentials, 1234)
    assert said.splitlines() == [
        "None default",
        f"no credential dg-cache-key is used: cannot look into {credentials}: Permission denied",
    ]


def refusal(file: Path) -> str:
    """Assert that the key file is refused, and return why."""
    flags = {"encryption_key_file": file}
    with pytest.raises(SettingsError) as error:
        choose_key(read_settings(DaemonSettings, {}, flags, file.parent / "none"), "")
    return str(error.value)


def test_a_key_file_must_be_private_and_hold_a_key(place: Path) -> None:
    """What is wrong with it is said, never what it holds."""
    text = base64.b64encode(KEYS["flag"]).decode()
    file = key_file(place / "key", KEYS["flag"], 0o644)
    assert f"chmod go-rwx {file}" in refusal(file)
    file.chmod(0o600)
    for content in (text + text, text[:-8], "password", "", "x" * 5000):
        file.write_text(content)
        message = refusal(file)
        assert "DG_CACHE_ENCRYPTION_KEY" in message
        assert str(file) in message
        assert text[:12] not in message
        assert "password" not in message
    file.unlink()
    assert f"there is no {file}" in refusal(file)
    os.mkfifo(file, 0o600)
    assert "not a regular file" in refusal(file)


def test_a_credential_may_be_readable_by_an_acl_and_by_no_others(place: Path) -> None:
    """systemd shows the entry for the service's user as the group's bits: 0440."""
    file = key_file(place / "credentials" / "dg-cache-key", KEYS["credential"], 0o440)
    nothing = read_settings(DaemonSettings, {}, {}, place / "none")
    key = choose_key(nothing, str(file.parent)).settings.encryption_key
    assert key is not None
    assert key.view() == KEYS["credential"]
    file.chmod(0o444)
    with pytest.raises(SettingsError, match="read by others"):
        choose_key(nothing, str(file.parent))
