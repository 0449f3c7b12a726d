"""Lingering is what logind's files say, and unknown where systemd does not run the machine."""

from pathlib import Path

import pytest

from dgcache_cli.lingering import enabling, lingers


@pytest.fixture
def booted(tmp_path: Path) -> Path:
    place = tmp_path / "system"
    place.mkdir()
    return place


def test_who_has_a_file_of_logind_s_lingers_and_nobody_else(tmp_path: Path, booted: Path) -> None:
    """One empty file for each; the directory itself is made for the first."""
    files = tmp_path / "linger"
    assert lingers("ann", files, booted) is False
    files.mkdir()
    (files / "ann").touch()
    assert lingers("ann", files, booted) is True
    assert lingers("bob", files, booted) is False


def test_it_is_unknown_where_systemd_does_not_run_the_machine(tmp_path: Path) -> None:
    """In a container, for example; a warning would name a command that cannot work."""
    (tmp_path / "ann").touch()
    assert lingers("ann", tmp_path, tmp_path / "missing") is None


@pytest.mark.parametrize("user", ["", ".", "..", "../ann", "a/b"])
def test_it_is_unknown_for_what_is_no_name(user: str, tmp_path: Path, booted: Path) -> None:
    """Such a name would ask for another file."""
    assert lingers(user, tmp_path, booted) is None


def test_it_is_unknown_where_the_files_cannot_be_looked_at(tmp_path: Path, booted: Path) -> None:
    """Here: their directory is a file."""
    (tmp_path / "linger").touch()
    assert lingers("ann", tmp_path / "linger", booted) is None


def test_the_mending_command_names_the_account() -> None:
    """It is copied as it stands."""
    assert enabling("ann") == "sudo loginctl enable-linger ann"
