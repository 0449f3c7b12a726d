"""`dg-cache cleanup` on real directories: what it finds and says, what goes, and what never."""

import contextlib
import hashlib
import json
import os
import pty
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from dgcache_cli import legacy
from dgcache_cli.removals import Removal, remove
from dgcache_cli.trees import Bounds, Rules, identity
from tests.support.wire import FOREIGN_UID, OWNER_UID, SECONDS, script_running

ROUNDS = 1_000
DAY = 86_400
DIGEST = "ab" * 32
DIGEST_OF_NOTHING = hashlib.sha256(b"").hexdigest()
MIGRATION = Path(__file__).parents[2] / "docs" / "migration.md"
root = pytest.mark.root
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes files of a second real user")

# `dg-cache`, with another directory instead of /tmp, as another user where one is named: everything
# is imported before, since that user may not be able to read the interpreter's files.
_DRIVER = """\
import json, os, sys, rich.console, rich.table, rich.text, rich.box
from pathlib import Path
from dgcache_cli import legacy
from dgcache_cli.commands import cleanup, daemon, deltaglider, references, setup
from dgcache_cli.main import main
legacy.SYSTEM_TEMPORARY = Path(sys.argv[1])
uid = int(sys.argv[2])
if uid != os.geteuid():
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
sys.exit(main(["cleanup", *sys.argv[3:]]))
"""


class Host:
    """A /tmp and a home of its own, and `dg-cache cleanup` on them."""

    def __init__(self, base: Path) -> None:
        base.chmod(0o755)
        self.tmp, self.home = base / "tmp", base / "home"
        self.tmp.mkdir()
        self.tmp.chmod(0o1777)
        self.home.mkdir()
        self.account = self.home / ".cache" / "deltaglider"
        self.shared = self.tmp / ".deltaglider" / "cache"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("DG_", "XDG_"))}
        self.environment = {
            **kept,
            "HOME": str(self.home),
            "TMPDIR": str(self.tmp),
            "DG_CACHE_SOCKET_DIR": str(base / "s"),
            "COLUMNS": "80",
        }

    def argv(self, *words: str, uid: int | None = None) -> list[str]:
        as_uid = os.geteuid() if uid is None else uid
        return [sys.executable, "-c", _DRIVER, str(self.tmp), str(as_uid), *words]

    def said(
        self, *words: str, status: int = 0, uid: int | None = None, **environment: str | Path
    ) -> str:
        """Run it without a terminal, and return what it printed."""
        done = subprocess.run(
            self.argv(*words, uid=uid),
            env={**self.environment, **{k: str(v) for k, v in environment.items()}},
            stdin=subprocess.DEVNULL,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def told(self, *words: str, **extra: Any) -> dict[str, dict[str, Any]]:
        """Return what --json tells, by the cache's path."""
        return {
            one["path"]: one for one in json.loads(self.said("--json", *words, **extra))["caches"]
        }

    def process_cache(self, name: str = "deltaglider-abcdefgh", days: float = 3) -> Path:
        """Make what a killed DeltaGlider 6.2 leaves, as old as that."""
        cache = self.tmp / name
        write(cache / "ab" / "cd" / DIGEST, b"ciphertext")
        write(cache / "ab" / "cd" / f"{DIGEST}.decrypted", b"plaintext")
        cache.chmod(0o700)
        age(cache, days)
        return cache

    def search(self, bounds: Bounds = Bounds()) -> legacy.Search:  # noqa: B008 - frozen
        return legacy.Search(legacy.Places([self.tmp], self.account, None, []), bounds)


@pytest.fixture
def host(short_directory: Path) -> Host:
    """A host on which DeltaGlider was never used."""
    return Host(short_directory.resolve())


def write(path: Path, data: bytes = b"reference", mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return path


def age(tree: Path, days: float) -> None:
    """Make everything in a tree look unchanged for so long."""
    then = time.time() - days * DAY
    for path in (*tree.rglob("*"), tree):
        os.utime(path, (then, then), follow_symlinks=False)


def snapshot(tree: Path) -> dict[str, tuple[int, int, int]]:
    """Return every name with its inode, mode and time of change."""
    return {
        str(path): (status.st_ino, status.st_mode, status.st_ctime_ns)
        for path in (tree, *tree.rglob("*"))
        for status in [path.lstat()]
    }


# -- what is found and said ------------------------------------------------------------------------


def test_nothing_is_found_where_deltaglider_never_was(host: Host) -> None:
    """Other temporary directories are nobody's business."""
    write(host.tmp / "tmpabcdefgh" / "reference.bin")
    write(host.tmp / "deltaglider-notes.txt")
    assert host.said("--yes") == "nothing of DeltaGlider's own caches is here\n"


def test_the_shared_cache_of_5_0_is_shown_with_what_is_wrong_with_it_and_goes(host: Host) -> None:
    """As 5.0.0 leaves it: the SDK's with mode 0600, the CLI's readable by everybody."""
    write(host.shared / "bkt" / "app" / "reference.bin", b"r" * 1000, 0o600)
    write(host.shared.with_name("reference_cache") / "bkt" / "app" / "reference.bin", b"r" * 2000)
    text = host.said("--yes")
    first, second = text.split("reference_cache\n", 1)
    assert "1 reference in plaintext\n" in first
    assert "1 reference in plaintext that others can read" in second
    assert "a name that anybody on this host can take first" in text
    assert "freed 3 kB" in text
    assert list(host.tmp.iterdir()) == [], ".deltaglider itself goes when it is empty"


def test_what_others_cannot_come_to_is_not_called_readable(host: Host) -> None:
    """A 0644 file in a 0700 directory; and one that others can write to."""
    host.process_cache("deltaglider-private_")
    open_one = host.process_cache("deltaglider-opened__")
    open_one.chmod(0o777)
    age(open_one, 3)
    told = host.told()
    private, opened = (
        told[str(host.tmp / f"deltaglider-{n}__"[:20])] for n in ("private", "opened")
    )
    assert private["wrong"][0] == "1 reference in plaintext"
    assert opened["wrong"][:3] == [
        "1 reference in plaintext that others can read",
        "1 other file that others can read",
        "1 entry that others can write to",
    ]


@pytest.mark.parametrize("words", [(), ("--dry-run",), ("--json",), ("--json", "--dry-run")])
def test_without_yes_nothing_changes_in_a_pipe(host: Host, words: tuple[str, ...]) -> None:
    """Exit status 0; and it says so where it would have asked."""
    write(host.shared / "bkt" / "reference.bin")
    host.process_cache()
    write(host.account / "old" / "reference.bin")
    before = snapshot(host.tmp), snapshot(host.home)
    text = host.said(*words)
    assert (snapshot(host.tmp), snapshot(host.home)) == before
    assert ("nobody can be asked here: dg-cache cleanup --yes" in text) == (words == ())


def test_what_is_printed_fits_80_columns_and_cannot_steer_a_terminal(host: Host) -> None:
    """Anybody chooses names in /tmp."""
    cache = host.process_cache("deltaglider-\x1b[2J\x1b]0;" + "x" * 60)
    write(cache / "\x1b[31m\nred\udcff")
    write(host.shared / ("bucket" * 20) / "reference.bin")
    age(host.tmp, 3)
    text = host.said()
    assert "\x1b" not in text
    assert "\\x1b[2J" in text
    table = list(takewhile(lambda line: not line.startswith("/"), text.splitlines()))
    assert len(table) >= 6
    assert max(map(len, table)) <= 80
    # below it only what has a path in it, to be copied, may be longer
    below = [line for line in text.splitlines() if "deltaglider" not in line]
    assert max(map(len, below)) <= 80
    told = host.told()
    assert str(cache) in told


def test_json_tells_everything_and_removes_only_with_yes(host: Host) -> None:
    """Sizes in bytes, ages in seconds; what was removed where something was."""
    write(host.shared / "bkt" / "reference.bin", b"r" * 1000)
    age(host.shared, 2)
    (cache,) = host.told().values()
    assert 2 * DAY <= cache.pop("age_seconds") < 2 * DAY + 600
    assert cache == {
        "path": str(host.shared),
        "kind": "shared",
        "names": ["cache"],
        "owner": cache["owner"],
        "uid": os.geteuid(),
        "mode": f"{host.shared.stat().st_mode & 0o7777:04o}",
        "size": 1000,
        "files": 1,
        "complete": True,
        "wrong": [
            "1 reference in plaintext that others can read",
            "shared under a name that anybody on this host can take first",
        ],
        "kept": None,
        "removed": None,
    }
    (removed,) = host.told("--yes").values()
    assert removed["removed"] == {
        "entries": 3,
        "size": 1000,
        "left": [],
        "left_entries": 0,
        "failed": 0,
        "stopped": None,
    }
    assert host.told() == {}


def test_the_help_has_examples_and_the_exit_statuses(host: Host) -> None:
    """Within 80 columns."""
    text = host.said("--help")
    assert "dg-cache cleanup --dry-run" in text
    assert "77 something of yours could not be removed" in text
    assert max(map(len, text.splitlines())) <= 80


# -- the prompt ------------------------------------------------------------------------------------


def answered(host: Host, *answers: bytes) -> str:
    """Run it in a terminal, give the answers one by one, and return what was on the screen."""
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        host.argv(),
        env={**host.environment, "TERM": "dumb"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd="/",
    ) as child:
        os.close(terminal)
        screen = b""
        try:
            for answer in answers:
                asked = screen.count(b"[y/N]")
                while screen.count(b"[y/N]") == asked:
                    screen += os.read(controller, 65_536)
                os.write(controller, answer)
            with contextlib.suppress(OSError):  # EIO: the other end is closed
                while piece := os.read(controller, 65_536):
                    screen += piece
        finally:
            os.close(controller)
        assert child.wait(SECONDS) == 0, screen
    return screen.decode()


def test_each_cache_goes_only_after_a_yes(host: Host) -> None:
    """Return alone is no, and so is the end of input."""
    names = [f"deltaglider-{number}aaaaaaa" for number in range(5)]
    for name in names:
        host.process_cache(name)
    screen = answered(host, b"y\n", b"\n", b"YES\n", b"no\n", b"\x04")
    assert sorted(path.name for path in host.tmp.iterdir()) == [names[1], names[3], names[4]]
    assert f"remove {host.tmp / names[0]} (19 B)? [y/N]" in screen.replace("\r\n", "")
    assert "freed 38 B" in screen


# -- what stays ------------------------------------------------------------------------------------


def test_a_process_s_cache_that_changed_today_stays(host: Host) -> None:
    """The newest entry counts, however deep it is; a file from the future is new as well."""
    young, deep, future, old = (
        host.process_cache(f"deltaglider-{n}aaaaaaa") for n in ("1", "2", "3", "4")
    )
    age(young, 0.9)
    age(deep / "ab" / "cd" / DIGEST, 0.5)
    age(future / "ab", -400)
    told = host.told("--yes")
    for cache in (young, deep, future):
        assert "in the last 24 h" in told[str(cache)]["kept"]
        assert (cache / "ab" / "cd" / DIGEST).exists()
    assert not old.exists()


_HOLD = {
    "descriptor": "held = open(sys.argv[1] + '/' + sys.argv[2])",
    "working directory": "os.chdir(sys.argv[1])",
    "map": (
        "import mmap\n"
        "with open(sys.argv[1] + '/' + sys.argv[2], 'rb') as file:\n"
        "    held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "os.closerange(3, 64)"  # mmap keeps a descriptor of its own
    ),
}


@pytest.mark.parametrize("how", _HOLD)
def test_what_a_live_process_has_open_stays_until_it_ends(host: Host, how: str) -> None:
    """A descriptor, a working directory, a map whose descriptor is closed: with its pid."""
    for place in (host.process_cache(), host.shared):
        write(host.shared / "ab/cd" / DIGEST)
        script = _HOLD[how] + "\nprint('held', flush=True)\nsys.stdin.read()"
        with script_running(None, script, place, f"ab/cd/{DIGEST}") as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            told = host.told("--yes")
            assert f"(pid {process.pid}) has it open" in told[str(place)]["kept"]
            assert (place / "ab/cd" / DIGEST).exists()
            process.communicate()
        host.said("--yes")
        assert not place.exists()


def test_a_directory_with_other_files_than_deltaglider_s_stays(host: Host) -> None:
    """A checkout in /tmp, a link, a socket: look, then remove it yourself."""
    checkout = host.process_cache("deltaglider-source")
    write(checkout / "ab" / "Makefile")
    linked = host.process_cache("deltaglider-linked__")
    (linked / DIGEST).symlink_to("/etc/passwd")
    for cache in (checkout, linked):
        age(cache, 3)
    told = host.told("--yes")
    assert "deltaglider-source/ab/Makefile" in told[str(checkout)]["kept"]
    assert f"rm -r -- {checkout}" in told[str(checkout)]["kept"]
    assert (checkout / "ab" / "cd" / DIGEST).exists()
    assert (linked / DIGEST).is_symlink()


def test_what_dg_cached_uses_in_the_home_stays(host: Host) -> None:
    """v2 and run; everything else there is older."""
    current = [write(host.account / name / "x" / "file") for name in ("v2", "run")]
    write(host.account / "bkt" / "reference.bin")
    write(host.account / "index.json")
    before = [snapshot(host.account / name) for name in ("v2", "run")]
    told = host.told("--yes")
    assert told[str(host.account)]["names"] == ["bkt", "index.json"]
    assert {path.name for path in host.account.iterdir()} == {"v2", "run"}
    assert [snapshot(host.account / name) for name in ("v2", "run")] == before
    assert all(path.exists() for path in current)
    assert host.told() == {}


def test_only_references_go_from_a_chosen_directory(host: Host) -> None:
    """DG_CACHE_DIR may name a directory that has other things in it."""
    chosen = host.home / "data"
    write(chosen / "bkt" / "app" / "reference.bin")
    write(chosen / "v2" / "reference.bin")
    write(chosen / "project" / "reference.bin")
    write(chosen / "project" / "main.c")
    (chosen / "empty").mkdir()
    write(chosen / "notes.txt")
    told = host.told("--yes", DG_CACHE_DIR=chosen)
    assert told[str(chosen)]["names"] == ["bkt"]
    assert {path.name for path in chosen.iterdir()} == {"v2", "project", "empty", "notes.txt"}
    assert (chosen / "project" / "reference.bin").exists()


def test_a_chosen_directory_that_holds_the_home_is_not_looked_into(host: Host) -> None:
    """Nor the home itself."""
    write(host.home / "bkt" / "reference.bin")
    for chosen in (host.home, host.home.parent, Path("/")):
        assert "it holds your home" in host.said("--yes", DG_CACHE_DIR=chosen)
    assert (host.home / "bkt" / "reference.bin").exists()


def test_what_dg_cached_uses_stays_even_inside_a_shared_cache(host: Host) -> None:
    """DG_CACHE_DIR or the sockets may be in what DeltaGlider 5 called its cache."""
    kept = write(host.shared / "v2" / "ephemeral" / "file")
    sockets = write(host.shared / "sockets" / "daemon.lock")
    write(host.shared / "bkt" / "reference.bin")
    text = host.said("--yes", DG_CACHE_DIR=host.shared, DG_CACHE_SOCKET_DIR=host.shared / "sockets")
    assert "cache/v2 stays: dg-cached uses it" in text
    assert kept.exists()
    assert sockets.exists()
    assert not (host.shared / "bkt").exists()


# -- links and mounts ------------------------------------------------------------------------------


def test_links_in_a_cache_go_and_where_they_lead_stays(host: Host) -> None:
    """To a file and to a directory."""
    victim = write(host.home / "victim" / "file")
    host.shared.mkdir(parents=True)
    (host.shared / "file").symlink_to(victim)
    (host.shared / "directory").symlink_to(victim.parent)
    host.said("--yes")
    assert not host.shared.exists()
    assert victim.exists()


def test_a_cache_that_is_a_link_is_not_followed(host: Host) -> None:
    """At each level; the command that removes the link is named."""
    victim = write(host.home / "victim" / "cache" / "reference.bin")
    process = host.tmp / "deltaglider-abcdefgh"
    process.symlink_to(victim.parent)
    for link, target in (
        (host.shared.parent, victim.parents[1]),
        (host.shared, victim.parent),
    ):
        shutil.rmtree(host.shared.parent, ignore_errors=True)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(target)
        told = host.told("--yes")
        assert f"rm -- {link}" in told[str(link)]["kept"]
        assert f"rm -- {process}" in told[str(process)]["kept"]
        assert link.is_symlink()
        link.unlink()
    assert victim.exists()


def test_a_file_with_a_second_name_keeps_its_bytes_there(host: Host) -> None:
    """It frees nothing, which is said before and after."""
    write(host.shared / "bkt" / "reference.bin", b"r" * 1000)
    (host.home / "mine").hardlink_to(host.shared / "bkt" / "reference.bin")
    write(host.shared / "bkt" / "other", b"o" * 10)
    assert host.told()[str(host.shared)]["size"] == 10
    text = host.said("--yes")
    assert "1 file with a second name" in text
    assert "freed 10 B" in text
    assert (host.home / "mine").read_bytes() == b"r" * 1000


def in_mounts(host: Host, *setup: str, argv: list[str] | None = None) -> str:
    """Run it in a mount namespace after these shell commands; skip where there can be none."""
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no mount namespace can be made here")
    script = " && ".join(["mount --make-rprivate /", *setup, 'exec "$@"'])
    done = subprocess.run(
        [*unshare, "sh", "-c", script, "sh", *(argv or host.argv("--yes", uid=0))],
        env=host.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, 77), done.stdout + done.stderr
    return done.stdout + done.stderr


def test_another_mount_is_not_entered_even_of_the_same_file_system(host: Host) -> None:
    """A directory bound into the cache, a file bound over one in it, and a whole cache."""
    victim = write(host.home / "victim" / "reference.bin")
    write(host.shared / "bkt" / "file")
    (host.shared / "bound").mkdir()
    other = host.process_cache()
    text = in_mounts(
        host,
        f"mount --bind {victim.parent} {host.shared}/bound",
        f"mount --bind {victim} {host.shared}/bkt/file",
        f"mount --bind {victim.parent} {other}",
    )
    assert victim.exists()
    assert "cache/bound stays: something is mounted there" in text
    assert "cache/bkt/file stays: something is mounted there" in text
    assert f"another file system is mounted there: see findmnt {other}" in text


def test_a_mounted_dot_deltaglider_is_left_to_its_owner(host: Host) -> None:
    """As `docker run -v /shared-cache:/tmp/.deltaglider` has it."""
    volume = write(host.home / "volume" / "cache" / "reference.bin").parents[1]
    host.shared.parent.mkdir()
    text = in_mounts(host, f"mount --bind {volume} {host.shared.parent}")
    assert "another file system is mounted there" in text
    assert (volume / "cache" / "reference.bin").exists()


def test_it_is_slash_tmp_that_is_looked_into(host: Host) -> None:
    """The command itself, in a namespace with a /tmp of its own, in which this checkout is too."""
    checkout = Path(__file__).resolve().parents[2]
    cleanup = f"{sys.executable} -m dgcache_cli cleanup --yes"
    text = in_mounts(
        host,
        f"mount --bind {checkout} /mnt",
        "mount -t tmpfs none /tmp",
        f"mkdir -p {checkout}",
        f"mount --bind /mnt {checkout}",
        "mkdir -p /tmp/.deltaglider/cache/bkt /tmp/deltaglider-abcdefgh",
        "echo reference > /tmp/.deltaglider/cache/bkt/reference.bin",
        "touch -d '3 days ago' /tmp/deltaglider-abcdefgh",
        argv=["sh", "-c", f"{cleanup}; echo /tmp/.delta* /tmp/delta*"],
    )
    assert "removed /tmp/.deltaglider/cache: 3 entries, 10 B" in text
    assert text.endswith("freed 10 B\n/tmp/.delta* /tmp/delta*\n")  # nothing is left


# -- other users -----------------------------------------------------------------------------------


@root
@needs_root
def test_files_of_others_in_our_cache_stay_and_are_named(host: Host) -> None:
    """With the directories that lead to them, as they were; exit status 0, since it is the rule."""
    theirs = write(host.shared / "bkt" / "theirs.bin")
    write(host.shared / "bkt" / "reference.bin")
    their_directory = host.shared / "their"
    ours = write(their_directory / "ours.bin")
    for path in (theirs, their_directory):
        os.chown(path, FOREIGN_UID, FOREIGN_UID)
    for path in (host.shared, theirs.parent):
        path.chmod(0o777)
    text = host.said("--yes")
    assert "2 entries of others in it: they stay" in text
    assert f"cache/bkt/theirs.bin stays: it belongs to uid {FOREIGN_UID}" in text
    assert f"cache/their stays: it belongs to uid {FOREIGN_UID}" in text
    assert sorted(path.name for path in host.shared.rglob("*")) == ["bkt", "their", "theirs.bin"]
    assert not ours.exists()
    assert {stat.S_IMODE(p.stat().st_mode) for p in (host.shared, theirs.parent)} == {0o777}


@root
@needs_root
def test_a_user_removes_his_own_and_nothing_of_anybody_else(host: Host) -> None:
    """Of a cache that two real users shared with umask 0, each takes his own away."""
    for uid in (OWNER_UID, FOREIGN_UID):
        file = write(host.shared / f"bucket-{uid}" / "reference.bin")
        os.chown(file, uid, uid)
        os.chown(file.parent, uid, uid)
        process = host.process_cache(f"deltaglider-{uid:08}")
        for path in (process, *process.rglob("*")):
            os.chown(path, uid, uid)
    for path in (host.shared, host.shared.parent):
        os.chown(path, OWNER_UID, OWNER_UID)
        path.chmod(0o777)
    told = host.told("--yes", uid=FOREIGN_UID)
    theirs = told[str(host.tmp / f"deltaglider-{OWNER_UID:08}")]
    assert theirs["removed"] is None
    assert "removes it with dg-cache cleanup" in theirs["kept"]
    assert [path.name for path in host.shared.iterdir()] == [f"bucket-{OWNER_UID}"]
    host.said("--yes", uid=OWNER_UID)
    assert list(host.tmp.iterdir()) == []


@root
@needs_root
def test_a_cache_of_somebody_else_stays_whole(host: Host) -> None:
    """Even where we could write to it."""
    file = write(host.shared / "reference.bin")
    for path in (file, host.shared, host.shared.parent):
        os.chown(path, OWNER_UID, OWNER_UID)
        path.chmod(0o777)
    before = snapshot(host.tmp)
    told = host.told("--yes", uid=FOREIGN_UID)
    assert "nothing in it is yours" in told[str(host.shared)]["kept"]
    host.said("--yes")
    assert snapshot(host.tmp) == before


@root
@needs_root
def test_a_directory_of_ours_that_we_closed_ourselves_goes_as_well(host: Host) -> None:
    """Mode 0 keeps nobody out of what is his; where the age cannot be told, it stays."""
    write(host.shared / "bkt" / "reference.bin")
    process = host.process_cache()
    for path in (*host.tmp.rglob("*"),):
        os.chown(path, OWNER_UID, OWNER_UID)
    (host.shared / "bkt").chmod(0)
    (process / "ab").chmod(0)
    told = host.told("--yes", uid=OWNER_UID)
    assert not host.shared.exists()
    assert f"chmod -R u+rwX {process}" in told[str(process)]["kept"]


@root
@needs_root
def test_what_cannot_be_removed_is_said_with_exit_status_77(host: Host) -> None:
    """An immutable file; the rest goes, and the directories to it keep their modes."""
    fixed = write(host.shared / "bkt" / "reference.bin")
    write(host.shared / "bkt" / "other.bin")
    fixed.parent.chmod(0o755)
    if subprocess.run(["chattr", "+i", fixed], capture_output=True, check=False).returncode != 0:
        pytest.skip("this file system has no immutable files")
    try:
        text = host.said("--yes", status=77)
        assert "cache/bkt/reference.bin stays: it cannot be removed (immutable" in text
        assert [path.name for path in fixed.parent.iterdir()] == ["reference.bin"]
        assert stat.S_IMODE(fixed.parent.stat().st_mode) == 0o755
    finally:
        subprocess.run(["chattr", "-i", fixed], check=True)
    host.said("--yes")
    assert not host.shared.exists()


# -- what changes meanwhile ------------------------------------------------------------------------


def test_what_took_the_place_of_a_cache_after_the_question_stays(host: Host) -> None:
    """The inode that was judged goes, or nothing."""
    write(host.shared / "reference.bin")
    with host.search() as search:
        (judged,) = search.judge_all(time.time())
        host.shared.rename(host.tmp / "aside")
        other = write(host.shared / "other")
        removal = search.remove(search.caches[0], judged, time.time())
    assert [left.reason for left in removal.left] == ["it was replaced meanwhile"]
    assert (removal.failed, removal.entries) == (1, 0)
    assert other.exists()


def test_a_cache_that_came_to_life_after_the_question_stays(host: Host) -> None:
    """It is judged again."""
    cache = host.process_cache()
    with host.search() as search:
        (judged,) = search.judge_all(time.time())
        assert judged.kept is None
        write(cache / "reference.bin")
        removal = search.remove(search.caches[0], judged, time.time())
    assert "in the last 24 h" in removal.left[0].reason
    assert (cache / "ab" / "cd" / DIGEST).exists()


def test_a_directory_is_closed_to_others_while_it_is_emptied(host: Host) -> None:
    """Seen from within the removal of its only file; where it stays, it gets its mode back."""
    file = write(host.shared / "bkt" / "file")
    file.parent.chmod(0o2777)
    seen = []

    def look(name: str, _: os.stat_result) -> bool:
        seen.append(stat.S_IMODE(file.parent.stat().st_mode) & 0o777)
        return False

    result = Removal()
    parent = os.open(host.tmp, os.O_RDONLY | os.O_DIRECTORY)
    try:
        expected = identity(host.shared.parent.stat())
        remove(parent, ".deltaglider", expected, Rules(is_expected=look), result)
    finally:
        os.close(parent)
    assert seen == [0o700]
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o2777
    assert [left.path for left in result.left] == [".deltaglider/cache/bkt/file"]


@contextlib.contextmanager
def attack(step: Callable[[], None]) -> Iterator[None]:
    """Do the step again and again in a thread, as fast as it goes, and see that it was done."""
    end, begun, failures = Event(), Event(), []

    def work() -> None:
        try:
            while not end.is_set():
                step()
                begun.set()
        except BaseException as error:
            failures.append(error)
            begun.set()

    thread = Thread(target=work)
    thread.start()
    begun.wait(SECONDS)
    try:
        yield
    finally:
        end.set()
        thread.join()
    assert not failures


@pytest.mark.parametrize("level", ["cache", "bucket", "file"])
def test_a_link_swapped_in_meanwhile_never_leads_out(host: Host, level: str) -> None:
    """The attacker may even be we ourselves, whom no mode stops: the victim is never touched."""
    victim = host.home / "victim"
    kept = [write(victim / name) for name in ("reference.bin", "bkt/reference.bin", "x/y/z")]
    swapped = {
        "cache": host.shared,
        "bucket": host.shared / "bkt",
        "file": host.shared / "bkt" / "reference.bin",
    }[level]
    link, aside = host.tmp / "link", host.tmp / "aside"

    def step() -> None:
        with contextlib.suppress(OSError):
            link.symlink_to(victim)
        with contextlib.suppress(OSError):
            swapped.rename(aside)
        with contextlib.suppress(OSError):
            link.rename(swapped)
        with contextlib.suppress(OSError):
            swapped.unlink()
        with contextlib.suppress(OSError):
            aside.rename(swapped)

    host.shared.parent.mkdir()
    parent = os.open(host.shared.parent, os.O_RDONLY | os.O_DIRECTORY)
    removed = 0
    try:
        with attack(step):
            for _ in range(ROUNDS):
                with contextlib.suppress(OSError):
                    write(host.shared / "bkt" / "reference.bin")
                with contextlib.suppress(OSError):
                    expected = identity(host.shared.lstat())
                    result = Removal()
                    remove(parent, "cache", expected, Rules(), result)
                    removed += result.entries
                # a link may have been in the way when the reference was written
                assert all(path.exists() for path in kept)
    finally:
        os.close(parent)
    assert removed > ROUNDS / 100


# -- bounds ----------------------------------------------------------------------------------------


def test_a_walk_stops_at_its_bound_and_the_next_one_goes_on(host: Host) -> None:
    """It is said before and after; nothing is removed twice or forgotten."""
    for number in range(50):
        write(host.shared / f"bucket-{number % 5}" / f"{number}.bin")
    runs = 0
    while host.shared.exists():
        with host.search(Bounds(max_entries=20)) as search:
            (judged,) = search.judge_all(time.time())
            removal = search.remove(search.caches[0], judged, time.time())
        if host.shared.exists():
            assert judged.wrong[-1] == "there is more in it: stopped after 20 entries"
            assert removal.stopped == "stopped after 20 entries"
        assert removal.entries > 0
        runs += 1
    assert runs > 2


def test_what_is_deeper_than_the_bound_stays_and_is_named(host: Host) -> None:
    """A tree cannot be made so deep that the walk runs out of descriptors."""
    deep = host.shared.joinpath(*["d"] * 100)
    deep.mkdir(parents=True)
    write(host.shared / "reference.bin")
    text = host.said("--yes", status=77)
    assert "stopped 64 directories deep" in " ".join(text.split())
    assert deep.exists()
    assert not (host.shared / "reference.bin").exists()


def test_a_process_s_cache_too_large_to_be_seen_whole_stays(host: Host) -> None:
    """What was not seen may be new."""
    cache = host.process_cache()
    with host.search(Bounds(max_entries=3)) as search:
        (judged,) = search.judge_all(time.time())
    assert judged.kept is not None
    assert "stopped after 3 entries" in judged.kept
    assert cache.exists()


# -- the way back ----------------------------------------------------------------------------------


def test_the_commands_of_the_way_back_remove_every_file_that_was_made(host: Host) -> None:
    """docs/migration.md says which files exist where; after its commands there are none."""
    runtime = host.home.parent / "runtime"
    runtime.mkdir(mode=0o700)
    environment = {**host.environment, "XDG_RUNTIME_DIR": str(runtime)}
    del environment["DG_CACHE_SOCKET_DIR"]

    def dg_cache(*words: str, **extra: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "dgcache_cli", *words],
            env={**environment, **extra},
            cwd="/",
            check=True,
            capture_output=True,
            timeout=60,
        )

    elsewhere = str(host.account / "run" / "0123456789abcdef")
    for place in ({}, {"DG_CACHE_SOCKET_DIR": elsewhere}):
        dg_cache("start", **place)
        dg_cache("put", "bkt/app", __file__, **place)
        dg_cache("stop", **place)
    local = ("get", "bkt/app", DIGEST_OF_NOTHING, "--fetch", "true", "-o", str(host.tmp / "out"))
    dg_cache(*local, DG_CACHE_BACKEND="filesystem")
    dg_cache("install", "--units-only")
    dg_cache("shim", str(host.home / ".local/lib/dg-cache"))
    made = [path for place in (host.home, runtime) for path in place.rglob("*")]
    assert len([path for path in made if path.is_file()]) == 9
    assert (host.account / "v2" / "ephemeral").is_dir()
    commands = re.findall(r"^\|.*\| `(rm -[^`]+)`", MIGRATION.read_text(), re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        subprocess.run(["sh", "-c", command], env=environment, check=True)
    left = [path for place in (host.home, runtime) for path in place.rglob("*")]
    assert [path for path in left if not path.is_dir()] == []
    assert {path.name for path in left} == {
        *(".cache", "deltaglider"),
        *(".local", "state", "lib", "dg-cache"),
        *(".config", "systemd", "user"),
    }
