"""The SDK reads every layer, says once what is to be said, and refuses what it cannot trust."""

import logging
from pathlib import Path

import pytest

import dgcache
from dgcache import Settings, SettingsError


@pytest.fixture
def file(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's file is; it does not exist yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(short_directory))
    monkeypatch.setenv("DG_CACHE_SOCKET_DIR", str(short_directory / "s"))
    (short_directory / "dg-cached").mkdir(mode=0o700)
    return short_directory / "dg-cached" / "config.toml"


def write(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file with a mode, whatever the umask."""
    path.write_text(text)
    path.chmod(mode)


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    """Return what was said on the logger `dgcache` at a level."""
    return [r.getMessage() for r in caplog.records if (r.name, r.levelno) == ("dgcache", level)]


def test_the_files_settings_are_used_and_the_environment_beats_them(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dgcache.open()` without arguments; what is built in code reads nothing."""
    write(file, "[client]\nbackend = 'filesystem'\n")
    monkeypatch.setenv("DG_CACHE_DIR", str(file.parent.parent / "c"))
    with dgcache.open() as cache:
        assert cache.backend == "filesystem"
    monkeypatch.setenv("DG_CACHE_BACKEND", "memory")
    with dgcache.open() as cache:
        assert cache.backend == "memory"
    assert Settings.from_environment(backend="dg-cached").backend == "dg-cached"
    assert Settings().backend == "dg-cached"


@pytest.mark.parametrize(("text", "mode"), [("ttl_seconds = 5", 0o666), ("ttl = 5", 0o600)])
def test_a_file_that_is_untrusted_or_wrong_is_an_error_at_once(
    file: Path, text: str, mode: int
) -> None:
    """As a wrong variable is; it names the file."""
    write(file, text, mode)
    with pytest.raises(SettingsError, match=r"config\.toml"):
        dgcache.open()


def test_a_backend_left_over_from_deltaglider_is_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its documents say so for Docker; who writes it into our file means it."""
    caplog.set_level(logging.DEBUG, "dgcache")
    write(file, "[client]\nbackend = 'memory'\n")
    dgcache.open().close()
    assert caplog.records == []
    monkeypatch.setenv("DG_CACHE_BACKEND", "memory")
    dgcache.open().close()
    [line] = said(caplog, logging.INFO)
    assert line.startswith("DG_CACHE_BACKEND=memory: the in-process cache is used")
    assert "unset it" in line
    assert len(caplog.records) == 1


def test_encryption_is_not_switched_off_and_a_warning_says_so(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, when the in-process cache is made; the bytes come back all the same."""
    monkeypatch.setenv("DG_CACHE_ENCRYPTION", "false")
    monkeypatch.setenv("DG_CACHE_BACKEND", "memory")
    with dgcache.open() as cache:
        assert said(caplog, logging.WARNING) == []
        for _ in range(2):
            digest = cache.put("b", "p", b"data")
            with cache.get("b", "p", digest) as reference:
                assert reference.read() == b"data"
    [warning] = said(caplog, logging.WARNING)
    assert "encrypts all the same" in warning
