"""The integrity monitor: what others do is seen, with either mechanism and with none.

"Others" are this process: the files are kept, and watched, by another one. Each change is one
system call, so that there is one difference to see.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.wire import OWNER_UID, SECONDS, own_environment

MECHANISMS = ["fanotify", "inotify"]
POOR_UID, POORER_UID = 54_323, 54_324
"""Users whose instances are used up; nobody else's tests run as them at the same time."""
NEVER = 3600.0
"""Seconds to the next audit of everything, where only notices may tell."""

as_both = pytest.mark.parametrize(
    "uid", [os.geteuid(), pytest.param(OWNER_UID, marks=pytest.mark.root)], ids=["self", "user"]
)
with_both = pytest.mark.parametrize("mechanism", MECHANISMS)


class Keeper:
    """The process that owns the files, and how it is spoken to."""

    def __init__(self, process: "subprocess.Popen[str]", place: Path) -> None:
        self.process = process
        self.place = place
        self.ours = place / "ours"
        self._alarms: list[dict[str, str]] = []
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._pump).start()
        assert self._lines.get(timeout=SECONDS) == "ready\n", self.complaint()

    def _pump(self) -> None:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            self._lines.put(line)
        self._lines.put("")

    def _line(self) -> Any:
        line = self._lines.get(timeout=SECONDS)
        assert line, self.complaint()
        return json.loads(line)

    def complaint(self) -> str:
        """Return what it wrote to standard error until its end."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def ask(self, *words: object) -> dict[str, Any]:
        """Say something, and return the monitor's status afterwards."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        while "kind" in (line := self._line()):
            self._alarms.append(line)
        answer: dict[str, Any] = line
        return answer

    def alarm(self) -> tuple[str, str]:
        """Wait for the next security event; its kind and the file's name."""
        one = self._alarms.pop(0) if self._alarms else self._line()
        assert one["place"] == "files"
        return one["kind"], one["name"]

    def stop(self) -> list[tuple[str, str]]:
        """End it, and return the alarms nobody has asked for."""
        assert self.process.stdin is not None
        self.process.stdin.write("stop\n")
        self.process.stdin.flush()
        while line := self._lines.get(timeout=SECONDS):
            self._alarms.append(json.loads(line))
        assert self.process.wait(SECONDS) == 0, self.complaint()
        return [(one["kind"], one["name"]) for one in self._alarms]


@contextmanager
def keeper(place: Path, uid: int, mechanism: str | None, **limits: Any) -> Iterator[Keeper]:
    """Run a keeper of `ours` and `other`, watched with one mechanism or as it comes."""
    files = place / "files"
    files.mkdir(0o700)
    for name in ("ours", "other"):
        (files / name).write_bytes(b"as we wrote it")
        os.chown(files / name, uid, uid)
    for path in (place, files):
        os.chown(path, uid, uid)
    wish = {"audit_seconds": NEVER, **limits}
    if mechanism is not None:
        wish["watch_mechanisms"] = [mechanism]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.monitored", str(uid), str(files), json.dumps(wish)],
        env=own_environment(),
        cwd=Path(__file__).parent.parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        try:
            yield Keeper(process, files)
        finally:
            process.kill()


@as_both
@with_both
def test_each_change_by_another_process_is_seen_at_once(
    short_directory: Path, mechanism: str, uid: int
) -> None:
    """By its notice alone, with its kind; what was changed is trusted anew only by its owner."""
    with keeper(short_directory, uid, mechanism) as files:
        assert files.ask("status") == {
            "mechanism": mechanism,
            "watched_directories": 1,
            "rescans": 0,
            "disabled_reason": "",
        }
        theirs = files.place / "theirs"
        for change, seen in (
            (lambda: os.truncate(files.ours, 1), {("overwritten", "ours")}),
            (lambda: files.ours.chmod(0o666), {("chmod", "ours")}),
            (lambda: os.mknod(theirs), {("foreign", "theirs")}),
            (lambda: theirs.rename(files.ours), {("deleted", "theirs"), ("replaced", "ours")}),
            ((files.place / "other").unlink, {("deleted", "other")}),
        ):
            change()
            assert {files.alarm() for _ in seen} == seen
        assert files.stop() == []


@with_both
def test_what_gives_no_notice_is_found_by_the_next_audit(
    short_directory: Path, mechanism: str
) -> None:
    """A hard link elsewhere, and a write through it: inotify(7) and fanotify(7) do not tell."""
    with keeper(short_directory, os.geteuid(), mechanism, audit_seconds=0.2) as files:
        os.link(files.ours, short_directory / "link")
        assert files.alarm() == ("linked", "ours")
        os.truncate(short_directory / "link", 1)
        assert files.alarm() == ("overwritten", "ours")


@as_both
@with_both
def test_own_writes_raise_no_alarm(short_directory: Path, mechanism: str, uid: int) -> None:
    """3,000 rewrites, in place and by a rename, while everything is audited all the time; the
    write of another process after them is the only alarm."""
    with keeper(short_directory, uid, mechanism, audit_seconds=0.01) as files:
        files.ask("rewrite", 3000)
        os.truncate(files.ours, 1)
        assert files.alarm() == ("overwritten", "ours")
        assert files.stop() == []


@as_both
@with_both
def test_lost_events_lead_to_an_audit_of_everything(
    short_directory: Path, mechanism: str, uid: int
) -> None:
    """The keeper is stopped while 20,000 events overflow the kernel's queue of 16,384; the change
    behind them, whose own event is lost, is found."""
    queue = Path(f"/proc/sys/fs/{mechanism}/max_queued_events").read_text()
    with keeper(short_directory, uid, mechanism, waiting_audits=10**6) as files:
        os.kill(files.process.pid, signal.SIGSTOP)
        for number in range(max(10_000, int(queue))):
            (files.place / f"{number}").touch()
            (files.place / f"{number}").unlink()
        os.truncate(files.ours, 1)
        os.kill(files.process.pid, signal.SIGCONT)
        assert files.alarm() == ("overwritten", "ours")
        assert files.ask("status")["rescans"] == 1
        assert files.stop() == []


@with_both
def test_more_names_than_can_wait_lead_to_an_audit_of_everything(
    short_directory: Path, mechanism: str
) -> None:
    """The table has a bound, and what does not fit into it is not forgotten."""
    with keeper(short_directory, os.geteuid(), mechanism, waiting_audits=3) as files:
        os.kill(files.process.pid, signal.SIGSTOP)
        for name in "abcdef":
            (files.place / name).mkdir()
            (files.place / name).rmdir()
        (files.place / "other").unlink()
        os.kill(files.process.pid, signal.SIGCONT)
        assert files.alarm() == ("deleted", "other")
        assert files.ask("status")["rescans"] >= 1


@with_both
def test_a_directory_made_later_is_watched_also_when_it_is_made_again(
    short_directory: Path, mechanism: str
) -> None:
    """The owner tells of it; what it makes there is known, what others make is foreign."""
    with keeper(short_directory, os.geteuid(), mechanism) as files:
        theirs = files.place / "sub" / "theirs"
        for _ in range(2):
            files.ask("directory", "sub")
            assert files.ask("status")["watched_directories"] == 2
            os.mknod(theirs)
            assert files.alarm() == ("foreign", "sub/theirs")
            theirs.unlink()
            assert files.alarm() == ("deleted", "sub/theirs")
            theirs.parent.rmdir()
            assert files.alarm() == ("deleted", "sub")
        assert files.stop() == []


@with_both
def test_a_directory_that_its_owner_makes_again_stays_watched(
    short_directory: Path, mechanism: str
) -> None:
    """The notice that the old one is over may come before or after the word of the new one."""
    with keeper(short_directory, os.geteuid(), mechanism) as files:
        files.ask("directory", "sub")
        for _ in range(10):
            files.ask("again", "sub")
        os.mknod(files.place / "sub" / "theirs")
        assert files.alarm() == ("foreign", "sub/theirs")
        assert files.ask("status")["watched_directories"] == 2
        assert files.stop() == []


@with_both
def test_more_directories_than_may_be_watched_are_audited(
    short_directory: Path, mechanism: str
) -> None:
    """The bound is told, and what is beyond it is found later."""
    limits = {"watched_directories": 1, "audit_seconds": 0.2}
    with keeper(short_directory, os.geteuid(), mechanism, **limits) as files:
        files.ask("directory", "sub")
        status = files.ask("status")
        assert (status["mechanism"], status["watched_directories"]) == (mechanism, 1)
        assert "more than 1 directories" in status["disabled_reason"]
        os.mknod(files.place / "sub" / "theirs")
        assert files.alarm() == ("foreign", "sub/theirs")


@pytest.mark.root
def test_without_fanotify_inotify_watches(short_directory: Path) -> None:
    """This user's groups are used up for real; nothing is lost, so nothing is warned of."""
    with keeper(short_directory, POOR_UID, None, used_up=["fanotify"]) as files:
        status = files.ask("status")
        assert (status["mechanism"], status["disabled_reason"]) == ("inotify", "")
        files.ours.unlink()
        assert files.alarm() == ("deleted", "ours")


@pytest.mark.root
def test_without_a_mechanism_there_is_one_warning_and_the_audit(short_directory: Path) -> None:
    """Both are used up for real; the change is found all the same."""
    with keeper(
        short_directory, POORER_UID, None, used_up=["fanotify", "inotify"], audit_seconds=0.2
    ) as files:
        status = files.ask("status")
        assert (status["mechanism"], status["watched_directories"]) == ("none", 0)
        for name in MECHANISMS:
            assert f"{name}: Too many open files" in status["disabled_reason"]
        files.ours.chmod(0o666)
        assert files.alarm() == ("chmod", "ours")
        assert files.stop() == []
        assert files.complaint().count("monitor-limited") == 1
