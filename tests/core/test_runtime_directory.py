"""Where the sockets are: one order for daemon and client, and only in places that pass."""

import hashlib
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from dgcache_core.errors import CacheRefusedError, CacheUnavailableError
from dgcache_core.runtime_directory import (
    SESSION_SOCKET,
    Candidate,
    candidates,
    machine_key,
    make_first_usable,
    open_where_served,
)

UID = os.geteuid()
needs_root = pytest.mark.skipif(UID != 0, reason="needs a second uid")


def paths(environ: dict[str, str], explicit: Path | None = None) -> list[str]:
    """Return the places to try."""
    return [str(place.path) for place in candidates(explicit, environ)]


def test_the_places_are_tried_in_order() -> None:
    """XDG_RUNTIME_DIR, the user manager's, the administrator's, the home, by machine."""
    assert paths({"XDG_RUNTIME_DIR": "/xdg", "HOME": "/home/me"}) == [
        "/xdg/dg-cached",
        f"/run/user/{UID}/dg-cached",
        f"/run/dg-cached/{UID}",
        f"/home/me/.cache/deltaglider/run/{machine_key()}",
    ]


def test_what_was_asked_for_is_the_only_place() -> None:
    """No silent second choice for an explicit directory."""
    environ = {"XDG_RUNTIME_DIR": "/xdg", "HOME": "/home/me"}
    assert paths(environ, Path("/asked/for")) == ["/asked/for"]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"XDG_RUNTIME_DIR": "", "HOME": ""},
        {"XDG_RUNTIME_DIR": "relative", "HOME": "relative"},
        {"XDG_RUNTIME_DIR": f"/run/user/{UID}"},
        {"DG_CACHE_SOCKET_DIR": "/elsewhere", "TMPDIR": "/tmp"},
    ],
)
def test_without_a_proper_environment_two_places_are_left(environ: dict[str, str]) -> None:
    """Empty and relative values are as good as none (XDG says so), a place is named once."""
    assert paths(environ) == [f"/run/user/{UID}/dg-cached", f"/run/dg-cached/{UID}"]


def test_no_place_is_below_tmp_by_default() -> None:
    """Anybody could have been there first."""
    assert not any(path.startswith("/tmp") for path in paths({"HOME": "/home/me"}))


def test_the_machine_key_names_the_machine_and_does_not_tell_its_id() -> None:
    """Sixteen hexadecimal digits, always the same, no part of the machine-id or its bare hash."""
    key = machine_key()
    assert re.fullmatch("[0-9a-f]{16}", key)
    assert key == machine_key()
    try:
        machine_id = Path("/etc/machine-id").read_text().strip()
    except FileNotFoundError:
        machine_id = os.uname().nodename
    assert key not in machine_id
    assert machine_id not in key or not machine_id
    assert not hashlib.sha256(machine_id.encode()).hexdigest().startswith(key)


# -- making and finding --------------------------------------------------------------------------


def place_in(base: Path, name: str = "dg-cached") -> Candidate:
    """Return a place as XDG_RUNTIME_DIR makes one."""
    return Candidate(base / name, base)


@pytest.fixture
def bases(short_directory: Path) -> list[Path]:
    """Three directories that may hold the sockets' directory, best first."""
    made = [short_directory.resolve() / name for name in ("first", "second", "third")]
    for base in made:
        base.mkdir(0o700)
    return made


def made(places: list[Candidate]) -> tuple[Path, list[str]]:
    """Return the place that was made, and what was said about the others."""
    path, descriptor, refusals = make_first_usable(places)
    assert os.path.samestat(os.fstat(descriptor), path.stat())
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    os.close(descriptor)
    return path, [str(refusal) for refusal in refusals]


def test_the_first_place_that_passes_is_made(bases: list[Path]) -> None:
    """And no other."""
    assert made([place_in(base) for base in bases]) == (bases[0] / "dg-cached", [])
    assert [list(base.iterdir()) for base in bases[1:]] == [[], []]


def test_a_place_whose_base_is_missing_is_passed_over_in_silence(bases: list[Path]) -> None:
    """No user manager, no directory of the administrator: nothing is made there."""
    bases[0].rmdir()
    assert made([place_in(base) for base in bases]) == (bases[1] / "dg-cached", [])
    assert not bases[0].exists()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_base_that_others_can_write_to_is_passed_over_and_said(
    bases: list[Path], mode: int
) -> None:
    """The wrong mode of XDG_RUNTIME_DIR is no reason to fail, and none to be silent."""
    bases[0].chmod(mode)
    path, refusals = made([place_in(base) for base in bases])
    assert path == bases[1] / "dg-cached"
    assert len(refusals) == 1
    assert "written by others" in refusals[0]


def test_a_directory_with_the_wrong_mode_is_passed_over_and_said(bases: list[Path]) -> None:
    """The message has the command that mends it."""
    (bases[0] / "dg-cached").mkdir(0o755)
    path, [refusal] = made([place_in(base) for base in bases])
    assert path == bases[1] / "dg-cached"
    assert "chmod" in refusal


@pytest.mark.root
@needs_root
def test_somebody_elses_base_is_passed_over_and_said(bases: list[Path]) -> None:
    """What su and sudo leave in XDG_RUNTIME_DIR."""
    os.chown(bases[0], 12345, 12345)
    path, [refusal] = made([place_in(base) for base in bases])
    assert path == bases[1] / "dg-cached"
    assert "12345" in refusal


@pytest.mark.root
@needs_root
def test_a_base_out_of_reach_is_passed_over(
    bases: list[Path], as_somebody_else: Callable[[Callable[[], str]], str]
) -> None:
    """Below a directory of root's that we may not even look into: as if it were not there."""
    hidden = bases[0] / "hidden"
    hidden.mkdir()
    bases[0].parent.chmod(0o755)
    own = bases[1]
    os.chown(own, 12345, 12345)
    places = [place_in(hidden), place_in(own)]
    assert as_somebody_else(lambda: str(made(places)[0])) == str(own / "dg-cached")

    def look() -> str:
        with pytest.raises(CacheUnavailableError):
            open_where_served([place_in(own, "nothing")])
        with pytest.raises(CacheRefusedError, match="Permission denied"):
            open_where_served(places[:1])
        return "looked"

    assert as_somebody_else(look) == "looked"


def test_without_any_place_the_setting_is_named(bases: list[Path]) -> None:
    """No base there, and one that does not pass: the first refusal is what the user reads."""
    missing = place_in(bases[0] / "missing")
    with pytest.raises(CacheRefusedError, match="DG_CACHE_SOCKET_DIR"):
        make_first_usable([missing])
    (bases[1] / "dg-cached").mkdir(0o755)
    with pytest.raises(CacheRefusedError, match="chmod"):
        make_first_usable([missing, place_in(bases[1])])


def serve(place: Path) -> None:
    """Leave what a running daemon has there."""
    place.mkdir(0o700)
    (place / SESSION_SOCKET).touch()


def test_the_first_place_with_a_session_socket_is_found(bases: list[Path]) -> None:
    """A vetted directory that is empty is no reason to look no further."""
    (bases[0] / "dg-cached").mkdir(0o700)
    serve(bases[1] / "dg-cached")
    serve(bases[2] / "dg-cached")
    path, descriptor = open_where_served([place_in(base) for base in bases])
    assert path == bases[1] / "dg-cached"
    assert os.path.samestat(os.fstat(descriptor), path.stat())
    os.close(descriptor)


def test_a_served_place_that_fails_its_check_is_never_used(bases: list[Path]) -> None:
    """The next one is; where there is none, the refusal is what the user reads."""
    serve(bases[0] / "dg-cached")
    (bases[0] / "dg-cached").chmod(0o777)
    with pytest.raises(CacheRefusedError, match="chmod"):
        open_where_served([place_in(base) for base in bases])
    serve(bases[2] / "dg-cached")
    path, descriptor = open_where_served([place_in(base) for base in bases])
    os.close(descriptor)
    assert path == bases[2] / "dg-cached"


def test_where_nothing_runs_the_command_that_starts_it_is_named(bases: list[Path]) -> None:
    """Looking makes nothing."""
    with pytest.raises(CacheUnavailableError, match="dg-cache start"):
        open_where_served([place_in(base) for base in bases])
    assert not any(list(base.iterdir()) for base in bases)
