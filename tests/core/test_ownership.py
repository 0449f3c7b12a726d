"""In a real user namespace root looks like any stranger, and only root's own places are trusted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

USER, STRANGER, OVERFLOW = 12345, 12346, 65534
SETTINGS = "/etc/dg-cached/config.toml"

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="directories of several users need root"),
]

# Makes the places in a mount namespace of its own, becomes the user, enters a user namespace in
# which only he exists (or nobody), and says what becomes of each path. All is imported before.
PROBE = """
import ctypes, json, os, sys
from pathlib import Path
from dgcache_core.directories import open_private_directory, read_trusted_file
from dgcache_core.errors import CacheRefusedError

USER, STRANGER, OVERFLOW = 12345, 12346, 65534
case = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)

def checked(result):
    if result != 0:
        raise OSError(ctypes.get_errno(), "no namespaces")

def tmpfs(place):
    checked(libc.mount(b"tmpfs", place.encode(), b"tmpfs", 0, b"mode=0755"))

checked(libc.unshare(0x00020000))  # CLONE_NEWNS
checked(libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None))  # MS_REC | MS_PRIVATE
for place in ("/run", "/home", "/etc", "/srv"):
    tmpfs(place)
for path, owner, mode in case["made"]:
    path = Path(path)
    if isinstance(mode, str):
        path.symlink_to(mode)
    elif path.suffix == ".toml":
        path.write_text("content")
    else:
        path.mkdir()
    os.chown(path, owner, owner, follow_symlinks=False)
    if not path.is_symlink():
        path.chmod(mode)
for path, owner, mode in case["changed"]:
    os.chown(path, owner, owner)
    os.chmod(path, mode)
os.setgroups([])
os.setresgid(case["uid"], case["uid"], case["uid"])
os.setresuid(case["uid"], case["uid"], case["uid"])
if case["mapped"] is not None:
    checked(libc.prctl(4, 1, 0, 0, 0))  # PR_SET_DUMPABLE: or the map would be root's to write
    checked(libc.unshare(0x10000000))  # CLONE_NEWUSER
    if case["mapped"]:
        Path("/proc/self/uid_map").write_text(case["mapped"])

def outcome(path):
    try:
        if path.endswith(".toml"):
            return read_trusted_file(Path(path), 100).decode()
        os.close(open_private_directory(Path(path), create=True))
        return "served"
    except CacheRefusedError as error:
        return str(error)
    except FileNotFoundError:
        return "not there"

print(json.dumps([outcome(path) for path in case["paths"]]))
"""
ONLY_ME = f"{USER} {USER} 1"
ME_AS_ROOT = f"0 {USER} 1"
PRIVATE, OPEN = 0o700, 0o755
PLACES = [
    ("/run/user", 0, OPEN),
    (f"/run/user/{USER}", USER, PRIVATE),
    ("/run/dg-cached", 0, OPEN),
    (f"/run/dg-cached/{USER}", USER, PRIVATE),
    ("/home/me", USER, PRIVATE),
    ("/etc/dg-cached", 0, OPEN),
    (SETTINGS, 0, 0o644),
]
WANTED = [
    f"/run/user/{USER}/dg-cached",
    f"/run/dg-cached/{USER}",
    "/home/me/.cache/deltaglider/run/here",
]


def outcomes(
    paths: list[str],
    made: list[tuple[str, int, int | str]],
    changed: list[tuple[str, int, int]] | None = None,
    mapped: str | None = ONLY_ME,
    uid: int = USER,
) -> list[str]:
    """Return what becomes of each path; `mapped` is the uid_map, None for no user namespace."""
    case = {"paths": paths, "made": made, "changed": changed or [], "mapped": mapped, "uid": uid}
    program = [sys.executable, "-c", PROBE, json.dumps(case)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0 and "no namespaces" in done.stderr.splitlines()[-1]:
        pytest.skip(f"needs mount and user namespaces: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    answers: list[str] = json.loads(done.stdout)
    return answers


@pytest.mark.parametrize("mapped", [ONLY_ME, ME_AS_ROOT, None])
def test_the_places_of_the_daemon_are_accepted(mapped: str | None) -> None:
    """Runtime directory, the administrator's, the home and /etc, as under PrivateUsers=yes, as in
    a rootless container, and without a namespace."""
    answers = outcomes([*WANTED, SETTINGS], PLACES, mapped=mapped)
    assert answers == ["served"] * 3 + ["content"]


@pytest.mark.parametrize("mapped", [ONLY_ME, ME_AS_ROOT])
@pytest.mark.parametrize("owner", [0, STRANGER, OVERFLOW])
def test_whatever_cannot_be_told_from_a_strangers_is_refused_elsewhere(
    mapped: str, owner: int
) -> None:
    """Root's, a stranger's and nobody's look the same: an ancestor, a file, a place like /run/user
    below another directory, and one's own directory that is not."""
    made = [
        ("/srv/theirs", owner, OPEN),
        ("/srv/theirs/mine", USER, PRIVATE),
        ("/srv/theirs/run", owner, OPEN),
        ("/srv/theirs/run/user", owner, OPEN),
        ("/srv/theirs/file.toml", owner, 0o644),
        ("/etc/other.toml", owner, 0o644),
        ("/home/me", USER, PRIVATE),
        ("/home/me/theirs", owner, PRIVATE),
        ("/home/me/theirs.toml", owner, 0o644),
    ]
    paths = [
        "/srv/theirs/mine",
        "/srv/theirs/run/user/mine",
        "/srv/theirs/file.toml",
        "/etc/other.toml",
        "/home/me/theirs",
        "/home/me/theirs.toml",
    ]
    for answer in outcomes(paths, made, mapped=mapped):
        assert "belongs to uid 65534 (anybody: root is not mapped" in answer


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_roots_place_that_others_can_write_is_refused(mode: int) -> None:
    """As without a namespace; sticky keeps others from what is mine."""
    (answer,) = outcomes(WANTED[:1], PLACES, [("/run/user", 0, mode)])
    assert "'user' can be written by others" in answer
    assert outcomes(WANTED[:1], PLACES, [("/run/user", 0, mode | 0o1000)]) == ["served"]
    assert "can be written by others" in outcomes([SETTINGS], PLACES, [(SETTINGS, 0, 0o666)])[0]


def test_a_link_that_may_be_a_strangers_is_not_followed() -> None:
    """Not even to a place of root's, from a place of root's."""
    made = [*PLACES, ("/run/link", 0, "user"), ("/etc/dg-cached/link.toml", 0, SETTINGS)]
    made += [("/home/me/file.toml", 0, SETTINGS)]
    paths = [f"/run/link/{USER}/dg-cached", "/etc/dg-cached/link.toml", "/home/me/file.toml"]
    for answer in outcomes(paths, made):
        assert "is a link of uid 65534 (anybody" in answer


def test_my_own_link_leads_to_roots_place_by_where_it_is_and_not_by_its_name() -> None:
    """What counts is the place without links: mine may lead there, or make another look like it."""
    made = [
        *PLACES,
        ("/home/me/there", USER, "../../run/user"),
        ("/home/me/settings.toml", USER, "/etc/dg-cached/../dg-cached/config.toml"),
        ("/home/me/theirs", STRANGER, OPEN),
        ("/home/me/theirs/mine", USER, PRIVATE),
        ("/home/me/user", USER, "theirs"),
    ]
    paths = [f"/home/me/there/{USER}/dg-cached", "/home/me/settings.toml", "/home/me/user/mine"]
    answers = outcomes(paths, made)
    assert answers[:2] == ["served", "content"]
    assert "'theirs' belongs to uid 65534" in answers[2]


@pytest.mark.parametrize("place", ["/run", "/run/user", "/run/dg-cached", "/home", "/etc"])
@pytest.mark.parametrize("owner", [OVERFLOW, STRANGER])
def test_outside_a_namespace_a_strangers_system_directory_is_refused(
    place: str, owner: int
) -> None:
    """Uid 65534 is a user like others there: the rule for namespaces does not hold."""
    paths = [path for path in [*WANTED, SETTINGS] if Path(place) in Path(path).parents]
    for answer in outcomes(paths, PLACES, [(place, owner, OPEN)], mapped=None):
        assert f"belongs to uid {owner}, not to root or uid {USER}" in answer


def test_outside_a_namespace_the_settings_file_of_nobody_is_refused() -> None:
    """So is his directory."""
    (answer,) = outcomes([SETTINGS], PLACES, [(SETTINGS, OVERFLOW, 0o644)], mapped=None)
    assert f"belongs to uid {OVERFLOW}, not to root" in answer


def test_who_is_not_mapped_has_nothing_of_his_own() -> None:
    """In a namespace without any user I look like all others, and theirs look like mine."""
    for answer in outcomes(WANTED[:2], PLACES, mapped=""):
        assert f"belongs to uid {OVERFLOW}" in answer


def test_the_user_nobody_is_served_where_he_is_a_user() -> None:
    """Outside of a namespace uid 65534 owns what it owns."""
    made = [("/home/me", OVERFLOW, PRIVATE)]
    assert outcomes(["/home/me/cache"], made, mapped=None, uid=OVERFLOW) == ["served"]
