"""The ledger: every change by somebody else is named, none of our own is."""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dgcache_core.ledger import Change, ChangeKind, Ledger
from tests.support.wire import eventually


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A directory and its descriptor, with the file `ours` in it."""
    (tmp_path / "d").mkdir(0o700)
    (tmp_path / "d" / "ours").write_bytes(b"as we wrote it")
    descriptor = os.open(tmp_path / "d", os.O_RDONLY | os.O_DIRECTORY)
    yield tmp_path / "d", descriptor
    os.close(descriptor)


def next_tick() -> None:
    """Wait until files get a later time than before (a kernel before 6.13 has but this clock)."""
    coarse_clock = 5  # CLOCK_REALTIME_COARSE, clock_gettime(2)
    before = time.clock_gettime_ns(coarse_clock)
    eventually(lambda: time.clock_gettime_ns(coarse_clock) > before)


def kind_of(change: Change | None) -> str | None:
    return None if change is None else str(change.kind)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"AS")


def overwrite_and_put_the_time_back(path: Path) -> None:
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


def replace_by_a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


def link(path: Path) -> None:
    os.link(path, path.parent.parent / "elsewhere")


def link_and_unlink(path: Path) -> None:
    link(path)
    (path.parent.parent / "elsewhere").unlink()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (overwrite, "overwritten"),
        (overwrite_and_put_the_time_back, "overwritten"),
        (lambda path: os.truncate(path, 1), "overwritten"),
        (replace, "replaced"),
        (replace_by_a_link, "replaced"),
        (link, "linked"),
        (link_and_unlink, "overwritten"),
        (lambda path: path.chmod(0o666), "chmod"),
        (lambda path: path.unlink(), "deleted"),
        (lambda path: path.read_bytes(), None),
    ],
)
def test_each_change_by_somebody_else_has_its_kind(
    place: tuple[Path, int], change: Callable[[Path], object], kind: str | None
) -> None:
    """Also where the clock of the file was put back; reading is no change."""
    directory, descriptor = place
    ledger = Ledger()
    ledger.record(descriptor, "ours")
    assert ledger.compare(descriptor, "ours") is None
    next_tick()
    change(directory / "ours")
    assert kind_of(ledger.compare(descriptor, "ours")) == kind
    ledger.record(descriptor, "ours")
    assert ledger.compare(descriptor, "ours") is None


def test_a_file_that_was_never_recorded_is_foreign(place: tuple[Path, int]) -> None:
    """So is one that was forgotten; a name without file and row is nothing."""
    _, descriptor = place
    ledger = Ledger()
    assert kind_of(ledger.compare(descriptor, "ours")) == "foreign"
    ledger.record(descriptor, "ours")
    assert ledger.names() == ["ours"]
    ledger.forget("ours")
    assert kind_of(ledger.compare(descriptor, "ours")) == "foreign"
    assert ledger.compare(descriptor, "missing") is None


def test_of_a_directory_only_its_owner_and_modes_count(place: tuple[Path, int]) -> None:
    """What is made and removed in it has names of its own."""
    directory, descriptor = place
    ledger = Ledger()
    ledger.record(descriptor, ".")
    (directory / "sub").mkdir()
    (directory / "more").write_bytes(b"")
    assert ledger.compare(descriptor, ".") is None
    directory.chmod(0o755)
    change = ledger.compare(descriptor, ".")
    assert change == Change(ChangeKind.CHMOD, "mode=0700->0755")


def test_connecting_to_a_socket_is_no_change(place: tuple[Path, int]) -> None:
    """Every client does it."""
    directory, descriptor = place
    ledger = Ledger()
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        listening.bind(f"/proc/self/fd/{descriptor}/s")
        listening.listen()
        ledger.record(descriptor, "s")
        client.connect(f"/proc/self/fd/{descriptor}/s")
        assert ledger.compare(descriptor, "s") is None
        (directory / "s").unlink()
        assert kind_of(ledger.compare(descriptor, "s")) == "deleted"


def test_an_own_change_is_none_and_ends_with_a_new_row(place: tuple[Path, int]) -> None:
    """Meanwhile, and afterwards; also where it removed the file, or failed."""
    directory, descriptor = place
    ledger = Ledger()
    with ledger.own_change(descriptor, "ours", "temporary"):
        (directory / "temporary").write_bytes(b"new")
        assert ledger.compare(descriptor, "temporary") is None
        (directory / "temporary").rename(directory / "ours")
        assert ledger.compare(descriptor, "ours") is None
    assert ledger.names() == ["ours"]
    with pytest.raises(RuntimeError), ledger.own_change(descriptor, "ours"):
        overwrite(directory / "ours")
        raise RuntimeError
    assert ledger.compare(descriptor, "ours") is None
    with ledger.own_change(descriptor, "ours"), ledger.own_change(descriptor, "ours"):
        (directory / "ours").unlink()
    assert ledger.compare(descriptor, "ours") is None
    (directory / "ours").write_bytes(b"")
    assert kind_of(ledger.compare(descriptor, "ours")) == "foreign"


def test_a_thread_that_compares_all_the_time_never_sees_an_own_write(
    place: tuple[Path, int],
) -> None:
    """3,000 rewrites, by writing and by renaming, with comparisons in between."""
    directory, descriptor = place
    ledger = Ledger()
    ledger.record(descriptor, "ours")
    over = threading.Event()
    compared: list[Change | None] = []

    def compare() -> None:
        while not over.wait(0.0002):
            compared.extend(ledger.compare(descriptor, name) for name in ("ours", "temporary"))

    thread = threading.Thread(target=compare)
    thread.start()
    for number in range(3000):
        with ledger.own_change(descriptor, "ours", "temporary"):
            path = directory / ("ours" if number % 2 else "temporary")
            path.write_bytes(b"%d" % number)
            path.rename(directory / "ours")
    over.set()
    thread.join(20)
    assert len(compared) > 1000
    assert set(compared) == {None}


def test_what_cannot_be_looked_at_is_an_error_and_no_all_clear(place: tuple[Path, int]) -> None:
    """Fail closed: the caller hears of it."""
    directory, descriptor = place
    ledger = Ledger()
    ledger.record(descriptor, "ours")
    subprocess.run(["mv", directory / "ours", directory / "file"], check=True)
    with pytest.raises(NotADirectoryError):
        ledger.compare(descriptor, "file/ours")
