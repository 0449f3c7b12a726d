"""DeltaGlider 6.2.0 as it is on PyPI, separate processes, one warm daemon, GETs counted at S3."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.testbed import S3Server

import dgcache
from dgcache import Settings
from tests.deltaglider.conftest import ENVIRONMENT, REFERENCE, User, run_suite


def test_the_reference_is_downloaded_once_or_never(s3: S3Server, user: User) -> None:
    """Uploads make it warm; every download after that, in a process of its own, hits."""
    for version in range(3):
        user.cached("cp", user.archive(version), user.key(f"app-{version}.zip"))
    assert s3.count("GET", REFERENCE) == 0  # what was uploaded is warm
    for round_ in range(2):
        for version in range(3):
            out = user.home / f"out-{round_}-{version}.zip"
            user.cached("cp", user.key(f"app-{version}.zip"), out)
            assert out.read_bytes() == user.archive(version).read_bytes()
    assert s3.count("GET", REFERENCE) == 0
    user.run("dg-cache", "clear")
    for version in range(3):
        out = user.home / f"again-{version}.zip"
        user.cached("cp", user.key(f"app-{version}.zip"), out)
        assert out.read_bytes() == user.archive(version).read_bytes()
    assert s3.count("GET", REFERENCE) == 1  # once, by the first


def test_stock_and_cached_understand_each_other(s3: S3Server, user: User) -> None:
    """What either uploads the other downloads; stock fetches the reference every time."""
    user.stock("cp", user.archive(0), user.key("app-0.zip"))
    user.cached("cp", user.archive(1), user.key("app-1.zip"))
    user.stock("cp", user.archive(2), user.key("app-2.zip"))
    s3.reset_counts()
    for version in range(3):
        for how in (user.stock, user.cached):
            out = user.home / f"{how.__name__}-{version}.zip"
            how("cp", user.key(f"app-{version}.zip"), out)
            assert out.read_bytes() == user.archive(version).read_bytes()
    assert s3.count("GET", REFERENCE) == 3


def test_no_plaintext_reference_is_ever_in_a_file(user: User) -> None:
    """Watch every file that the download opens for writing: the reference is not among them."""
    reference = user.archive(0).read_bytes()
    for version in range(2):
        user.cached("cp", user.archive(version), user.key(f"app-{version}.zip"))
    user.run("dg-cache", "clear")
    trace = user.home / "trace"
    argv = ["strace", "-f", "-qq", "-e", "trace=openat,creat,open", "-o", str(trace)]
    command = [str(ENVIRONMENT / "dg-cache"), "deltaglider", "cp", user.key("app-1.zip"), "out.zip"]
    subprocess.run(
        [*argv, *command],
        env=user.s3.environment(user.environment),
        cwd=user.home,
        check=True,
        capture_output=True,
        timeout=100,
    )
    written = [
        line.split('"')[1]
        for line in trace.read_text().splitlines()
        if "O_CREAT" in line and "= -1" not in line
    ]
    assert any(name.endswith("/output") for name in written)  # the trace sees what xdelta3 writes
    assert not [name for name in written if Path(name).name.startswith("tmp")]
    left = [p for p in user.home.rglob("*") if p.is_file() and p.suffix != ".zip"]
    assert not [p for p in left if reference[:4096] in p.read_bytes()]


def test_a_report_tells_what_was_saved(user: User) -> None:
    """With -v, or with the variable; `status` has the totals."""
    for version in range(2):
        user.cached("cp", user.archive(version), user.key(f"app-{version}.zip"))
    said = user.cached("-v", "cp", user.key("app-1.zip"), user.home / "out.zip")
    assert "reference 2.1 MB from dg-cached in" in said
    assert "1 GET, 2.1 MB saved" in said
    said = user.cached("cp", user.key("app-0.zip"), user.home / "out0.zip", DG_CACHE_REPORT="1")
    assert "1 GET, 2.1 MB saved" in said
    assert "saved" not in user.cached("cp", user.key("app-0.zip"), user.home / "out1.zip")
    assert "GETs, " in user.run("dg-cache", "status").stdout


def test_every_option_and_exit_status_is_deltagliders(user: User) -> None:
    """The same output and the same status for help, version, errors and listings."""
    user.stock("cp", user.archive(0), user.key("app-0.zip"))
    for arguments, status in (
        (("--version",), 0),
        (("cp", "--help"), 0),
        (("cp", "nowhere.zip", user.key("x.zip")), 1),
        (("cp", "--no-such-option"), 2),
        (("no-such-command",), 2),
        (("ls", f"s3://{user.bucket}/app/"), 0),
        (("cp", f"s3://{user.bucket}/missing.zip", "x.zip"), 1),
    ):
        stock = user.run("deltaglider", *arguments, status=status)
        cached = user.run("dg-cache", "deltaglider", *arguments, status=status)
        assert cached.stdout == stock.stdout


def test_a_shim_makes_scripts_use_the_cache(s3: S3Server, user: User) -> None:
    """A directory first in PATH, as with ccache; nothing else of a script changes."""
    said = user.run("dg-cache", "shim", user.home / "bin").stdout
    assert str(user.home / "bin") in said
    for version in range(2):
        user.cached("cp", user.archive(version), user.key(f"app-{version}.zip"))
    s3.reset_counts()
    script = f"deltaglider cp {user.key('app-1.zip')} out.zip"
    environment = user.s3.environment(user.environment)
    environment["PATH"] = f"{user.home / 'bin'}:{environment['PATH']}"
    subprocess.run(["sh", "-ec", script], env=environment, cwd=user.home, check=True, timeout=100)
    assert (user.home / "out.zip").read_bytes() == user.archive(1).read_bytes()
    assert s3.count("GET", REFERENCE) == 0
    (user.home / "other").mkdir()
    (user.home / "other" / "deltaglider").write_text("#!/bin/sh\n")
    said = user.run("dg-cache", "shim", user.home / "other", status=2).stderr
    assert "is not a shim" in said


def test_kill_9_of_the_daemon_fails_no_download(user: User, daemon: Settings) -> None:
    """The next process warns once, works by itself, and has the same bytes."""
    for version in range(2):
        user.cached("cp", user.archive(version), user.key(f"app-{version}.zip"))
    with dgcache.open(daemon) as cache:
        os.kill(int(cache.status()["pid"]), signal.SIGKILL)
    out = user.home / "out.zip"
    said = user.cached("cp", user.key("app-1.zip"), out)
    assert "using the in-process cache" in said
    assert out.read_bytes() == user.archive(1).read_bytes()


def test_values_left_over_from_stock_work(user: User) -> None:
    """DG_CACHE_BACKEND=memory breaks stock; here it means the in-process cache."""
    for version in range(2):
        user.cached("cp", user.archive(version), user.key(f"app-{version}.zip"))
    out = user.home / "out.zip"
    user.cached("cp", user.key("app-1.zip"), out, DG_CACHE_BACKEND="memory")
    assert out.read_bytes() == user.archive(1).read_bytes()
    said = user.run(
        "dg-cache",
        "deltaglider",
        "cp",
        user.key("app-1.zip"),
        out,
        status=78,
        DG_CACHE_FALLBACK_SIZE_MB="plenty",
    ).stderr
    assert "DG_CACHE_FALLBACK_SIZE_MB='plenty': must be a number" in said


def test_the_two_sides_run_on_different_cryptography(user: User) -> None:
    """DeltaGlider's pin holds in its environment; the daemon has its own."""
    versions = {
        python: subprocess.run(
            [python, "-c", "import cryptography; print(cryptography.__version__)"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for python in (str(ENVIRONMENT / "python"), sys.executable)
    }
    theirs, ours = versions.values()
    assert int(theirs.split(".")[0]) < 45 <= int(ours.split(".")[0])


@pytest.mark.parametrize("where", ["in-process", "dg-cached"])
def test_the_cache_port_honours_what_deltaglider_relies_on(
    daemon: Settings, tmp_path: Path, where: str
) -> None:
    """The port's own contract, run inside DeltaGlider's environment."""
    run_suite("port_contract.py", daemon=daemon if where == "dg-cached" else None, cwd=tmp_path)
