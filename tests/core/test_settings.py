"""A setting is taken as it is written, or refused by name with what would be accepted."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgcache_core.errors import SettingsError
from dgcache_core.settings import ClientSettings, DaemonSettings, declared, resolve

from .support import DETERMINISTIC

Kind = type[ClientSettings] | type[DaemonSettings]
NUMBERS = [
    (ClientSettings, "fallback_size_mb", "DG_CACHE_FALLBACK_SIZE_MB"),
    (ClientSettings, "ttl_seconds", "DG_CACHE_TTL_SECONDS"),
    (ClientSettings, "connect_timeout_ms", "DG_CACHE_CONNECT_TIMEOUT_MS"),
    (ClientSettings, "wait_seconds", "DG_CACHE_WAIT_SECONDS"),
    (DaemonSettings, "memory_size_mb", "DG_CACHE_MEMORY_SIZE_MB"),
    (DaemonSettings, "ttl_seconds", "DG_CACHE_TTL_SECONDS"),
    (DaemonSettings, "disk_size_mb", "DG_CACHE_DISK_SIZE_MB"),
]
BOOLEANS = [
    (ClientSettings, "ephemeral", "DG_EPHEMERAL_CACHE"),
    (ClientSettings, "no_cache", "DG_NO_CACHE"),
    (ClientSettings, "report", "DG_CACHE_REPORT"),
    (ClientSettings, "encryption", "DG_CACHE_ENCRYPTION"),
]
PATHS = [
    (ClientSettings, "socket_dir", "DG_CACHE_SOCKET_DIR"),
    (ClientSettings, "cache_dir", "DG_CACHE_DIR"),
    (DaemonSettings, "socket_dir", "DG_CACHE_SOCKET_DIR"),
    (DaemonSettings, "cache_dir", "DG_CACHE_DIR"),
    (DaemonSettings, "encryption_key_file", "DG_CACHE_ENCRYPTION_KEY_FILE"),
]
CHOICES = [
    (ClientSettings, "backend", "DG_CACHE_BACKEND"),
    (ClientSettings, "transport", "DG_CACHE_TRANSPORT"),
]
KEYS = [(DaemonSettings, "encryption_key", "DG_CACHE_ENCRYPTION_KEY")]  # see test_secret.py
ALL = [*NUMBERS, *BOOLEANS, *PATHS, *CHOICES, *KEYS]


def read(kind: Kind, environ: Mapping[str, str], **overrides: Any) -> Any:
    """Build settings from an environment."""
    return resolve(kind, environ, overrides).settings


def refused(kind: Kind, environ: Mapping[str, str], **overrides: Any) -> str:
    """Assert that the settings are refused, and return why."""
    with pytest.raises(SettingsError) as error:
        resolve(kind, environ, overrides)
    return str(error.value)


def test_every_setting_is_tried_here() -> None:
    """A new field without a case in these tables fails this test."""
    for kind in (ClientSettings, DaemonSettings):
        tried = {name: variable for of, name, variable in ALL if of is kind}
        assert tried == {name: one.variable for name, one in declared(kind).items()}
        assert all(one.meaning for one in declared(kind).values())


def test_the_defaults_are_the_documented_ones() -> None:
    """An empty environment is a complete one."""
    assert read(ClientSettings, {}) == ClientSettings()
    client, daemon = ClientSettings(), DaemonSettings()
    assert (client.backend, client.ephemeral, client.no_cache) == ("dg-cached", False, False)
    assert (client.fallback_size_mb, client.fallback_bytes) == (1024, 1 << 30)
    assert (client.ttl_seconds, client.connect_timeout_ms, client.report) == (86_400, 50, False)
    assert (client.encryption, client.wait_seconds) == (True, 120)
    assert (daemon.memory_size_mb, daemon.ttl_seconds, daemon.socket_dir) == (None, 86_400, None)
    assert (daemon.disk_size_mb, daemon.disk_bytes, daemon.cache_dir) == (0, 0, None)
    assert (daemon.encryption_key, daemon.encryption_key_file) == (None, None)


@pytest.mark.parametrize(("kind", "name", "variable"), NUMBERS)
@pytest.mark.parametrize(
    ("text", "number"), [("512", 512), ("1.5", 1.5), (" 7 ", 7), ("1e3", 1000), ("+2", 2)]
)
def test_numbers_may_have_fractions(
    kind: Kind, name: str, variable: str, text: str, number: float
) -> None:
    """Sizes, times and budgets alike."""
    assert getattr(read(kind, {variable: text}), name) == number


def test_a_fraction_of_a_mebibyte_is_a_budget_in_bytes() -> None:
    """Half of one is 524,288 bytes."""
    assert ClientSettings(fallback_size_mb=0.5).fallback_bytes == 524_288


@pytest.mark.parametrize(("kind", "name", "variable"), NUMBERS)
@pytest.mark.parametrize(
    "text",
    ["nan", "-nan", "inf", "-inf", "infinity", "-1", "1e99", "1e999", "lots", "1,5", "5MB", "0x10"],
)
def test_what_is_no_proper_number_is_refused_by_name(
    kind: Kind, name: str, variable: str, text: str
) -> None:
    """Not a number, not finite, negative, with a unit: variable, value and range are named."""
    message = refused(kind, {variable: text})
    assert variable in message
    assert "must be a number" in message
    assert repr(text) in message or f"{float(text)!r}" in message


@pytest.mark.parametrize(
    ("kind", "name", "low", "high"),
    [
        (ClientSettings, "fallback_size_mb", 0, 1 << 24),
        (ClientSettings, "ttl_seconds", 1, 315_360_000),
        (ClientSettings, "connect_timeout_ms", 1, 60_000),
        (ClientSettings, "wait_seconds", 0, 3600),
        (DaemonSettings, "memory_size_mb", 0.25, 1 << 24),
        (DaemonSettings, "ttl_seconds", 1, 315_360_000),
        (DaemonSettings, "disk_size_mb", 0, 1 << 24),
    ],
)
def test_numbers_have_bounds(kind: Kind, name: str, low: float, high: float) -> None:
    """The bounds themselves are accepted; what is just outside names them."""
    for inside in (low, high):
        assert getattr(kind(**{name: inside}), name) == inside
    for outside in (low - 0.01, high + 1):
        with pytest.raises(SettingsError, match=f"from {low:g} to"):
            kind(**{name: outside})


TRUE = ["true", "1", "yes", "on", "TRUE", "Yes", "oN", " true "]
FALSE = ["false", "0", "no", "off", "FALSE", "No", "oFF", " 0\n"]


@pytest.mark.parametrize(("kind", "name", "variable"), BOOLEANS)
@pytest.mark.parametrize("text", TRUE + FALSE)
def test_truth_is_read_as_people_write_it(kind: Kind, name: str, variable: str, text: str) -> None:
    """Four spellings of each, in any case, with spaces around."""
    assert getattr(read(kind, {variable: text}), name) is (text in TRUE)


@pytest.mark.parametrize(("kind", "name", "variable"), BOOLEANS)
@pytest.mark.parametrize("text", ["2", "y", "t", "enabled", "truefalse", "-1", " "])
def test_any_other_truth_is_refused_by_name(
    kind: Kind, name: str, variable: str, text: str
) -> None:
    """A typing error is never taken for false."""
    message = refused(kind, {variable: text})
    assert variable in message
    assert "true/false, 1/0, yes/no, or on/off" in message


@pytest.mark.parametrize("text", ["dg-cached", "memory", "filesystem", "MEMORY", " Filesystem "])
def test_each_backend_is_accepted(text: str) -> None:
    """In any case, with spaces around."""
    assert read(ClientSettings, {"DG_CACHE_BACKEND": text}).backend == text.strip().lower()


@pytest.mark.parametrize("text", ["redis", "dgcached", " "])
def test_any_other_backend_is_refused_with_the_choice(text: str) -> None:
    """The variable and the three names."""
    message = refused(ClientSettings, {"DG_CACHE_BACKEND": text})
    assert "DG_CACHE_BACKEND" in message
    assert "dg-cached, memory, filesystem" in message


@pytest.mark.parametrize(("kind", "name", "variable"), PATHS)
def test_paths_are_absolute_and_may_begin_at_the_home(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, name: str, variable: str
) -> None:
    """A tilde is the home; what is relative, or of a user nobody knows, is refused by name."""
    monkeypatch.setenv("HOME", "/home/me")
    assert getattr(read(kind, {variable: "/run/x"}), name) == Path("/run/x")
    assert getattr(read(kind, {variable: "~/x"}), name) == Path("/home/me/x")
    for wrong in ("relative/x", "./x", "~nobody-has-this-name/x"):
        assert variable in refused(kind, {variable: wrong})


@pytest.mark.parametrize(("kind", "name", "variable"), ALL)
def test_an_empty_variable_counts_as_unset(kind: Kind, name: str, variable: str) -> None:
    """As `VARIABLE= command` is meant."""
    resolved = resolve(kind, {variable: ""}, {})
    assert getattr(resolved.settings, name) == getattr(kind(), name)
    assert resolved.origins[name] == "default"


@pytest.mark.parametrize(("kind", "name", "variable"), NUMBERS)
def test_a_flag_beats_the_environment_and_that_the_default(
    kind: Kind, name: str, variable: str
) -> None:
    """And each origin is told; a flag that was not given, None, beats nothing."""
    both = resolve(kind, {variable: "7"}, {name: 9})
    assert (getattr(both.settings, name), both.origins[name]) == (9, "flag")
    one = resolve(kind, {variable: "7"}, {name: None})
    assert (getattr(one.settings, name), one.origins[name]) == (7, f"environment {variable}")
    none = resolve(kind, {}, {})
    assert (getattr(none.settings, name), none.origins[name]) == (getattr(kind(), name), "default")
    assert set(none.origins) == set(declared(kind))


def test_false_and_zero_are_flags_too() -> None:
    """Only None means that a flag was not given."""
    settings = read(ClientSettings, {"DG_NO_CACHE": "1"}, no_cache=False, fallback_size_mb=0)
    assert (settings.no_cache, settings.fallback_bytes) == (False, 0)


@pytest.mark.parametrize("kind", [ClientSettings, DaemonSettings])
def test_an_unknown_flag_is_refused_with_the_known_ones(kind: Kind) -> None:
    """A typing error in code is found at once."""
    message = refused(kind, {}, ttl_second=5)
    assert "'ttl_second'" in message
    assert "ttl_seconds" in message


def test_unknown_variables_are_nobodys_business() -> None:
    """DeltaGlider has settings of its own."""
    assert read(ClientSettings, {"DG_CACHE_UNKNOWN": "x", "DG_LOG_LEVEL": "y"}) == ClientSettings()


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        *[
            (kind, {name: value})
            for kind, name, _ in NUMBERS
            for value in ("5", float("nan"), float("inf"), -1, True, 10**400, b"5", [])
        ],
        *[(kind, {name: value}) for kind, name, _ in BOOLEANS for value in (1, "true", None)],
        *[(kind, {name: value}) for kind, name, _ in PATHS for value in ("/x", Path("x"), b"/x")],
        *[(kind, {name: value}) for kind, name, _ in KEYS for value in ("x" * 44, bytes(32), 1)],
        *[(ClientSettings, {"backend": value}) for value in ("MEMORY", "", None, 1, [])],
    ],
    ids=lambda case: str(case)[:40],
)
def test_settings_built_in_code_are_held_to_the_same(kind: Kind, wrong: dict[str, Any]) -> None:
    """Values of the wrong type or out of range are refused by variable and by field."""
    [name] = wrong
    with pytest.raises(SettingsError, match=name) as error:
        kind(**wrong)
    assert declared(kind)[name].variable in str(error.value)
    assert refused(kind, {}, **wrong) if wrong[name] is not None else True


@pytest.mark.parametrize("settings", [ClientSettings(), DaemonSettings()])
def test_settings_do_not_change(settings: ClientSettings | DaemonSettings) -> None:
    """What was built once at the entry point is what holds."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.ttl_seconds = 5  # type: ignore[misc] # that is the test


@DETERMINISTIC
@given(st.sampled_from(ALL), st.text(max_size=12).filter(lambda text: "\0" not in text))
def test_any_text_is_read_or_refused(case: tuple[Kind, str, str], text: str) -> None:
    """Whatever stands in a variable: settings, or SettingsError that names it; nothing else."""
    kind, _, variable = case
    said = variable
    try:
        resolve(kind, {variable: text}, {})
    except SettingsError as error:
        said = str(error)
    assert variable in said
