"""The demo is what a reader runs first: it works, fails when it should, and leaves nothing."""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from benchmarks.testbed import ROOT

SECONDS = 100.0
_PR_SET_CHILD_SUBREAPER = 36
_IN_CREATE = 0x100
_IN_PRIVATE_TMP = (
    'mount -t tmpfs tmpfs /tmp && trap : INT TERM && "$@"; status=$?; '
    'left=$(ls -A /tmp); echo "left in /tmp: ${left:-none}"; exit $status'
)


@pytest.fixture
def work() -> Iterator[Path]:
    """A short path for the demo's directory, which the demo makes and removes; not below /tmp."""
    with tempfile.TemporaryDirectory(prefix="demo-", dir="/var/tmp") as parent:
        yield Path(parent) / "work"


@contextmanager
def demo(
    work: Path, *options: str, size: int = 2, wrapper: Sequence[str] = ()
) -> "Iterator[subprocess.Popen[str]]":
    """The demo as a process group of its own; what it leaves behind becomes our child."""
    prctl = ctypes.CDLL(None).prctl
    before = set(psutil.Process().children(recursive=True))
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    process = subprocess.Popen(
        [
            *(*wrapper, sys.executable, "-m", "benchmarks.demo"),
            *(f"--size={size}", f"--work={work}", *options),
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    try:
        yield process
        left = set(psutil.Process().children(recursive=True)) - before
        assert not left, f"the demo left processes: {left}"
        assert not work.exists(), "the demo left its directory"
    finally:
        for child in set(psutil.Process().children(recursive=True)) - before:
            child.kill()
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        process.communicate()


def read_until(process: "subprocess.Popen[str]", text: str) -> None:
    """Read the demo's output up to `text`."""
    assert process.stdout is not None
    deadline = time.monotonic() + SECONDS
    seen = ""
    while text not in seen:
        ready, _, _ = select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))
        block = os.read(process.stdout.fileno(), 4096).decode() if ready else ""
        assert block, f"no {text!r} in: {seen}"
        seen += block


@contextmanager
def watched(directory: Path) -> Iterator[int]:
    """A descriptor that tells what is made in a directory (inotify(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_CLOEXEC)
    try:
        assert libc.inotify_add_watch(descriptor, bytes(directory), _IN_CREATE) >= 0
        yield descriptor
    finally:
        os.close(descriptor)


def wait_until_made(descriptor: int, name: bytes) -> None:
    """Wait for something whose name holds `name`."""
    deadline = time.monotonic() + SECONDS
    while select.select([descriptor], [], [], max(0, deadline - time.monotonic()))[0]:
        if name in os.read(descriptor, 1 << 16):
            return
    pytest.fail(f"nothing like {name!r} was made")


def private_tmp() -> Sequence[str]:
    """What to put before a command to give it a /tmp of its own, and to tell what is left in it.

    Nothing where that is not allowed, or would hide the clone: then /tmp is everybody's, and what
    appears in it may be another test's.
    """
    command = ["unshare", "--mount", "sh", "-c", _IN_PRIVATE_TMP, "sh"]
    hidden = any(Path(path).is_relative_to("/tmp") for path in (ROOT, sys.prefix))
    if hidden or not shutil.which("unshare"):
        return []
    allowed = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if allowed.returncode == 0 else []


def test_the_demo_shows_that_the_same_bytes_arrive_and_warm_runs_fetch_no_reference(
    work: Path,
) -> None:
    """All of it, with the real DeltaGlider, S3 over HTTP and one dg-cached, in small."""
    with demo(work) as process:
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, output
    rows = [line for line in output.splitlines() if line.rstrip().endswith("identical")]
    assert len(rows) == 10
    assert max(map(len, output.splitlines())) <= 80
    assert "\x1b" not in output


def test_the_demo_fails_where_a_warm_run_fetches_or_a_byte_differs(work: Path) -> None:
    """In place of dg-cache stands DeltaGlider alone, and one byte is added to each download."""
    stock = ROOT / ".venv-deltaglider" / "bin" / "deltaglider"
    programs = work.parent / "environment" / "bin"
    programs.mkdir(parents=True)
    (programs / "deltaglider").symlink_to(stock)
    impostor = programs / "dg-cache"
    impostor.write_text(
        '#!/bin/sh\n[ "$1" = deltaglider ] || exit 0\nshift\n'
        f'"{stock}" "$@" || exit\ncase "$3" in *download.zip) printf x >> "$3";; esac\n'
    )
    impostor.chmod(0o700)
    with demo(work, f"--environment={programs.parent}", size=1) as process:
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 1, output
    assert "FAILED: upload 2, dg-cached: a warm run fetched the reference" in output
    assert "FAILED: download 1, dg-cached: the bytes differ" in output
    assert "FAILED: upload 1, dg-cached" not in output
    assert ", stock: the bytes differ" not in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process_and_no_file(
    work: Path, number: signal.Signals
) -> None:
    """A signal to its process group, as Ctrl-C sends it, once DeltaGlider made its directory."""
    wrapper = private_tmp()
    with demo(work, wrapper=wrapper) as process:
        read_until(process, "make version 1 of 5")
        with watched(Path(f"/proc/{process.pid}/root/tmp")) as descriptor:
            wait_until_made(descriptor, b"deltaglider-")
            os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 128 + number, output
    assert f"{number.name}: what ran was ended" in output
    if wrapper:
        assert output.endswith("left in /tmp: none\n")
