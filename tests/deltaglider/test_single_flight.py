"""Many DeltaGlider processes at once on a cold cache: the reference is downloaded once."""

import subprocess

from benchmarks.testbed import S3Server

from tests.deltaglider.conftest import ENVIRONMENT, REFERENCE, User

PROCESSES = 8


def at_once(user: User, commands: list[list[str]]) -> None:
    """Start every command before any is waited for; all must succeed."""
    processes = [
        subprocess.Popen(
            [str(ENVIRONMENT / "dg-cache"), "deltaglider", *command],
            env=user.s3.environment(user.environment),
            cwd=user.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(commands), said


def test_downloads_that_start_together_make_one_get(s3: S3Server, user: User) -> None:
    """The first to miss fetches; the others wait for it, or come later and hit."""
    for version in range(2):
        user.cached("cp", user.archive(version), user.key(f"app-{version}.zip"))
    user.run("dg-cache", "clear")
    s3.reset_counts()
    outs = [user.home / f"out-{number}.zip" for number in range(PROCESSES)]
    at_once(user, [["cp", user.key("app-1.zip"), str(out)] for out in outs])
    assert {out.read_bytes() for out in outs} == {user.archive(1).read_bytes()}
    assert s3.count("GET", REFERENCE) == 1


def test_uploads_that_start_together_make_one_get(s3: S3Server, user: User) -> None:
    """An upload needs the reference to make its delta."""
    user.cached("cp", user.archive(0), user.key("app-0.zip"))
    user.run("dg-cache", "clear")
    s3.reset_counts()
    versions = range(1, PROCESSES + 1)
    at_once(user, [["cp", str(user.archive(v)), user.key(f"app-{v}.zip")] for v in versions])
    assert s3.count("GET", REFERENCE) == 1
    for version in (1, PROCESSES):
        out = user.home / f"out-{version}.zip"
        user.cached("cp", user.key(f"app-{version}.zip"), out)
        assert out.read_bytes() == user.archive(version).read_bytes()
