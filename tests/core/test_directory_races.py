"""While an attacker swaps names, what is opened is ours or refused: never somebody else's."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

from dgcache_core.directories import open_private_directory
from dgcache_core.errors import CacheRefusedError

ROUNDS = 2_000
ATTACKER = 12345
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="an attacker needs a uid of his own"),
]


@pytest.fixture
def sticky(short_directory: Path) -> Path:
    """A directory as /tmp, with a trap in it: the attacker's directory, ready to be swapped in."""
    place = short_directory.resolve()
    place.chmod(0o1777)
    trap = place / "trap"
    for made in (trap, trap / "cache"):
        made.mkdir(0o700)
        os.chown(made, ATTACKER, ATTACKER)
    return place


@contextlib.contextmanager
def attack(step: Callable[[int], None]) -> Iterator[None]:
    """Do the steps 0, 1, 2 … in a thread, as fast as they go, and see that they were done."""
    end, begun, failures = Event(), Event(), []

    def work() -> None:
        turn = 0
        try:
            while not end.is_set():
                step(turn)
                turn += 1
                if turn > 10:
                    begun.set()
        except BaseException as error:
            failures.append(error)
            begun.set()

    thread = Thread(target=work)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        end.set()
        thread.join()
    assert not failures


def opened_safely(path: Path, *, create: bool) -> str:
    """Open the path once; whatever comes out is ours and private, or an error of the cache."""
    try:
        descriptor = open_private_directory(path, create=create)
    except CacheRefusedError:
        return "refused"
    except FileNotFoundError:
        return "missing"
    try:
        status = os.fstat(descriptor)
        assert status.st_uid == os.geteuid()
        assert stat.S_IMODE(status.st_mode) == 0o700
        return "ours"
    finally:
        os.close(descriptor)


def swap_in_theirs_link(name: Path, target: Path) -> Callable[[int], None]:
    """Swap a link of the attacker's and a directory of ours under one name, in turns."""
    ours, theirs = name.with_suffix(".ours"), name.with_suffix(".theirs")
    ours.mkdir(0o700)
    (ours / "cache").mkdir(0o700)
    theirs.symlink_to(target)
    os.chown(theirs, ATTACKER, ATTACKER, follow_symlinks=False)

    def step(turn: int) -> None:
        one = ours if turn % 2 == 0 else theirs
        one.rename(name)
        name.rename(one)

    return step


@pytest.mark.parametrize("create", [False, True])
def test_a_link_swapped_in_among_the_ancestors_never_leads_astray(
    sticky: Path, create: bool
) -> None:
    """A link to the attacker's directory takes turns with ours, while we open what is below."""
    step = swap_in_theirs_link(sticky / "name", sticky / "trap")
    if create:  # what we make in the gap must not stand in the attacker's way
        inner = step

        def step(turn: int) -> None:
            with contextlib.suppress(OSError):
                inner(turn)

    with attack(step):
        seen = {opened_safely(sticky / "name" / "cache", create=create) for _ in range(ROUNDS)}
    assert seen <= {"ours", "refused", "missing"}
    assert len(list((sticky / "trap").iterdir())) == 1, "nothing was made in the attacker's place"


@pytest.mark.parametrize("create", [False, True])
def test_a_link_swapped_in_for_the_directory_itself_is_never_opened(
    sticky: Path, create: bool
) -> None:
    """The last component is a link half of the time: to a private directory of ours even."""
    other = sticky / "other"
    other.mkdir(0o700)
    name, aside = sticky / "name", sticky / "aside"

    def step(_: int) -> None:
        with contextlib.suppress(OSError):
            name.symlink_to(other)
        with contextlib.suppress(OSError):
            name.unlink()
        with contextlib.suppress(OSError):
            name.rename(aside)
        with contextlib.suppress(OSError):
            aside.rmdir()

    other_inode = other.stat().st_ino
    with attack(step):
        for _ in range(ROUNDS):
            with contextlib.suppress(CacheRefusedError, FileNotFoundError):
                descriptor = open_private_directory(name, create=create)
                inode = os.fstat(descriptor).st_ino
                os.close(descriptor)
                assert inode != other_inode


def test_an_attackers_directory_in_place_of_ours_is_never_opened(sticky: Path) -> None:
    """His directory takes turns with ours under the name we open and make."""
    name, his, ours = sticky / "name", sticky / "his", sticky / "ours"
    for made in (his, ours):
        made.mkdir(0o700)
    os.chown(his, ATTACKER, ATTACKER)

    def step(turn: int) -> None:
        one = his if turn % 2 else ours
        with contextlib.suppress(OSError):
            one.rename(name)
            name.rename(one)

    with attack(step):
        seen = {opened_safely(name, create=False) for _ in range(ROUNDS)}
    assert "ours" in seen or "refused" in seen


def test_many_who_make_it_at_once_get_the_same(sticky: Path) -> None:
    """Eight threads, one directory: a herd of clients on the first day."""
    path = sticky / "new" / "cache"
    inodes: list[int] = []

    def make() -> None:
        descriptor = open_private_directory(path, create=True)
        inodes.append(os.fstat(descriptor).st_ino)
        os.close(descriptor)

    threads = [Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inodes) == 8
    assert len(set(inodes)) == 1
