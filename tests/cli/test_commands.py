"""`dg-cache` as a user meets it: what it prints, what it says when it fails, how it exits."""

import fcntl
import hashlib
import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DATA = b"reference" * 100_000
DIGEST = hashlib.sha256(DATA).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()


class Shell:
    """Runs dg-cache with everything of its own below one directory."""

    def __init__(self, base: Path) -> None:
        self.base = base
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("DG_", "XDG_"))}
        self.environment = {
            **kept,
            "HOME": str(base),
            "DG_CACHE_SOCKET_DIR": str(base / "s"),
            "COLUMNS": "80",
        }

    def __call__(
        self, *words: str | Path, status: int = 0, given: bytes | None = None, **extra: str
    ) -> "subprocess.CompletedProcess[bytes]":
        done = subprocess.run(
            [sys.executable, "-m", "dgcache_cli", *map(str, words)],
            env={**self.environment, **extra},
            cwd=self.base,
            input=given,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, (done.stdout, done.stderr)
        assert b"Traceback" not in done.stderr
        return done

    def said(self, *words: str | Path, **extra: str) -> str:
        return self(*words, **extra).stdout.decode()

    def refused(self, *words: str | Path, status: int, **extra: str) -> str:
        """Return the one line that says what is wrong."""
        done = self(*words, status=status, **extra)
        assert done.stdout == b""
        text = done.stderr.decode()
        assert text.startswith("dg-cache: ")
        assert text.count("\n") == 1
        return text


def is_over(pid: int) -> bool:
    """Tell whether a process has ended, whether or not its new parent has reaped it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def cold(short_directory: Path) -> Shell:
    """No daemon."""
    return Shell(short_directory)


@pytest.fixture
def shell(cold: Shell) -> Iterator[Shell]:
    """A running daemon, and DATA in a file named `reference`."""
    (cold.base / "reference").write_bytes(DATA)
    cold("start")
    yield cold
    cold("stop")


def test_start_is_ready_when_it_returns_and_stop_ends_it(cold: Shell) -> None:
    """Both may be said twice; nothing but the locks and the log is left."""
    assert "started in" in cold.said("start")
    assert "already serves" in cold.said("start")
    pid = json.loads(cold.said("status", "--json"))["pid"]
    assert f"(pid {pid}) stopped" in cold.said("stop")
    assert is_over(pid)
    assert "is not running" in cold.said("stop")
    assert {p.name for p in (cold.base / "s").iterdir()} == {"daemon.lock", "start.lock"}
    log = cold.base / ".local/state/dg-cached/dg-cached.log"
    assert (log.stat().st_mode & 0o777, log.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert " started " in cold.said("logs")
    assert cold.said("logs", "-n", "1").count("\n") == 1


def test_restart_begins_with_an_empty_cache(shell: Shell) -> None:
    """Another process, with nothing in it."""
    shell("put", "b/p", "reference")
    before = json.loads(shell.said("status", "--json"))
    shell("restart")
    after = json.loads(shell.said("status", "--json"))
    assert before["pid"] != after["pid"]
    assert (before["store"]["entries"], after["store"]["entries"]) == (1, 0)


def test_restart_keeps_the_options_that_it_is_not_given(cold: Shell) -> None:
    """As the daemon was started, but for what is said now."""
    cold("start", "--memory-size-mb", "16", "--ttl-seconds", "600", "--disk-size-mb", "32")
    cold("restart", "--ttl-seconds", "700")
    settings = {
        one["name"]: (float(one["value"]), one["origin"])
        for one in json.loads(cold.said("status", "--json"))["settings"]
        if one["name"].endswith(("_MB", "_SECONDS"))
    }
    cold("stop")
    assert settings == {
        "DG_CACHE_MEMORY_SIZE_MB": (16, "flag"),
        "DG_CACHE_TTL_SECONDS": (700, "flag"),
        "DG_CACHE_DISK_SIZE_MB": (32, "flag"),
    }


def test_a_start_that_fails_says_why(cold: Shell) -> None:
    """The daemon's own last word, and its exit status."""
    text = cold.refused("start", "--memory-size-mb", "-1", status=78)
    assert "DG_CACHE_MEMORY_SIZE_MB" in text
    (cold.base / "s").chmod(0o755)
    text = cold.refused("start", status=77)
    assert f"chmod 0700 {cold.base / 's'}" in text


def test_put_and_get_give_the_same_bytes_in_every_form(shell: Shell) -> None:
    """To a file, to a pipe, to a command; from a file and from standard input."""
    assert shell.said("put", "s3://b/p/", "reference") == f"{DIGEST}\n"
    assert shell("get", "b/p", DIGEST).stdout == DATA
    shell("get", "b/p", DIGEST.upper(), "--verify", "-o", "out")
    assert (shell.base / "out").read_bytes() == DATA
    assert [p.name for p in shell.base.iterdir() if p.name.startswith(".out")] == []
    summed = shell.said("get", "b/p", DIGEST, "--exec", "sha256sum", "{}")
    assert summed.startswith(DIGEST)
    shell("get", "b/p", DIGEST, "--exec", "sh", "-c", "exit 7", status=7)
    other = shell("put", "b/q", "-", "--json", given=b"other").stdout
    assert json.loads(other) == {"deltaspace": "b/q", "sha256": OTHER, "size": 5}


def opens(device: Path) -> bool:
    """Devices are none in a place that is mounted with nodev."""
    try:
        with device.open("wb"):
            return True
    except PermissionError:
        return False


def test_get_writes_into_what_is_no_regular_file(shell: Shell) -> None:
    """A FIFO, a device (of its own: one like /dev/null) and a link are still there afterwards."""
    shell("put", "b/p", "reference")
    fifo, device, link, behind = (shell.base / name for name in ("fifo", "null", "link", "behind"))
    os.mkfifo(fifo)
    link.symlink_to(behind)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 1 << 20) > len(DATA)
        shell("get", "b/p", DIGEST, "-o", fifo)
        assert fifo.is_fifo()
        assert b"".join(iter(lambda: os.read(reader, 1 << 20), b"")) == DATA
    finally:
        os.close(reader)
    shell("get", "b/p", DIGEST, "-o", link)
    assert link.is_symlink()
    assert behind.read_bytes() == DATA
    assert shell("get", "b/p", DIGEST, "-o", "/dev/stdout").stdout == DATA
    if os.geteuid() == 0:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        shell("get", "b/p", DIGEST, "-o", device, status=0 if opens(device) else 2)
        assert device.is_char_device()


def test_xdelta3_decodes_from_the_sealed_path(shell: Shell) -> None:
    """As the help says it."""
    (shell.base / "new").write_bytes(DATA[:500] + b"changed" + DATA[500:])
    shell("put", "b/p", "reference")
    encode = ("xdelta3", "-e", "-s", "{}", "new", "delta")
    shell("get", "b/p", DIGEST, "--exec", *encode)
    shell("get", "b/p", DIGEST, "--exec", "xdelta3", "-d", "-s", "{}", "delta", "again")
    assert (shell.base / "again").read_bytes() == (shell.base / "new").read_bytes()


def test_fetch_runs_on_a_miss_only(shell: Shell) -> None:
    """Its output is the bytes; they are warm afterwards; wrong or failed output is nothing."""
    fetch = "echo ran >> fetches; cat reference"
    for _ in range(2):
        assert shell("get", "b/p", DIGEST, "--fetch", fetch).stdout == DATA
    assert (shell.base / "fetches").read_text() == "ran\n"
    text = shell.refused("get", "b/p", OTHER, "--fetch", "cat reference", status=2)
    assert "SHA-256 mismatch" in text
    text = shell.refused("get", "b/p", OTHER, "--fetch", "exit 3", status=1)
    assert "ended with status 3" in text


def test_fetch_works_without_a_daemon(cold: Shell) -> None:
    """The operation succeeds without the cache."""
    assert cold("get", "b/p", OTHER, "--fetch", "printf other").stdout == b"other"


def test_has_ls_evict_and_clear_tell_what_they_found(shell: Shell) -> None:
    """For people and for programs."""
    shell("has", "b/p", DIGEST, status=1)
    assert shell.said("ls") == "the cache is empty\n"
    shell("put", "b/p", "reference")
    shell("put", "b/q", "reference")
    assert shell.said("has", "b/p", DIGEST) == "cached\n"
    assert json.loads(shell.said("has", "b/p", DIGEST, "--json"))["cached"] is True
    (entry,) = json.loads(shell.said("ls", "--json"))
    assert (entry["sha256"], entry["deltaspaces"]) == (DIGEST, ["b/p", "b/q"])
    table = shell.said("ls")
    assert DIGEST[:12] in table
    assert "b/p" in table
    assert shell.said("evict", "b/p") == "freed 0 references, 0 B\n"
    assert shell.said("evict", "b/q") == "freed 1 reference, 900 kB\n"
    shell("put", "b/p", "reference")
    assert json.loads(shell.said("clear", "--json")) == {
        "freed_entries": 1,
        "freed_bytes": len(DATA),
    }


def test_clear_with_rekey_says_that_the_keys_are_others(shell: Shell) -> None:
    """For people; a program asked for it and hears what was freed."""
    shell("put", "b/p", "reference")
    assert shell.said("clear", "--rekey") == "every key was made anew\nfreed 1 reference, 900 kB\n"
    shell("has", "b/p", DIGEST, status=1)
    assert json.loads(shell.said("clear", "--rekey", "--json"))["freed_entries"] == 0
    assert "rekeyed" in shell.said("logs")


def test_status_fits_80_columns_and_has_no_colour_in_a_pipe(shell: Shell) -> None:
    """It tells what was saved."""
    shell("put", "b/p", "reference")
    shell("get", "b/p", DIGEST)
    text = shell.said("status")
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert re.search(r"saved +1 GETs, 900 kB", text)
    assert "not dumpable" in text
    assert re.search(r"modes +0700 /", text)
    assert re.search(r"kernel +[0-9]+\.[0-9]+.*: Landlock ABI", text)
    assert re.search(r"lingering +(on|off|of no meaning here, or unknown)\n", text)
    assert text == "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    assert re.search(r"pressure +none so far; watched by (alarms and )?samples *\n", text)


def test_config_tells_each_value_and_its_origin(shell: Shell) -> None:
    """And a difference between here and the daemon, with the command that applies it."""
    config = json.loads(shell.said("config", "--json", DG_CACHE_TTL_SECONDS="100"))
    client = {one["name"]: one for one in config["client"]}
    assert client["DG_CACHE_TTL_SECONDS"]["value"] == "100"
    assert client["DG_CACHE_TTL_SECONDS"]["origin"] == "environment DG_CACHE_TTL_SECONDS"
    assert client["DG_CACHE_BACKEND"]["origin"] == "default"
    daemon = {one["name"]: one for one in config["daemon"]}
    assert daemon["DG_CACHE_TTL_SECONDS"]["value"] == "86400"
    assert ["dg-cache restart" in line for line in config["findings"]] == [True]
    text = shell.said("config")
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    "words",
    [
        ("status",),
        ("ls",),
        ("clear",),
        ("evict", "b/p"),
        ("has", "b/p", DIGEST),
        ("get", "b/p", DIGEST),
        ("put", "b/p", __file__),
        ("logs",),
    ],
    ids=lambda words: words[0],
)
def test_without_a_daemon_the_mending_command_is_named(cold: Shell, words: tuple[str, ...]) -> None:
    """Exit status 69 where the command is about the daemon."""
    assert "dg-cache start" in cold.refused(*words, status=69, PATH="/nonexistent")


def test_every_failure_has_its_exit_status_and_one_line(shell: Shell) -> None:
    """Miss, usage, settings, refused; never a traceback."""
    base = shell.base
    assert "unknown" in shell.refused("get", "b/p", DIGEST, status=1)
    assert "64 hexadecimal" in shell.refused("get", "b/p", "zz", status=2)
    assert "bucket's name is empty" in shell.refused("has", "s3:///p", DIGEST, status=2)
    assert "No such file" in shell.refused("put", "b/p", "missing", status=2)
    assert "is a directory" in shell.refused("put", "b/p", base, status=2)
    assert "SHA-256 mismatch" in shell.refused(
        "put", "b/p", "reference", "--sha256", OTHER, status=2
    )
    assert "cannot run" in shell.refused(
        "get", "b/p", OTHER, "--fetch", "printf other", "--exec", "no-such-program", status=2
    )
    shell("put", "b/p", "reference")
    assert "cannot write" in shell.refused("get", "b/p", DIGEST, "-o", "no/such/file", status=2)
    with (base / "large").open("wb") as large:
        large.truncate(8 << 30)
    assert "one reference may have" in shell.refused("put", "b/p", "large", status=75)
    assert "DG_CACHE_CONNECT_TIMEOUT_MS" in shell.refused(
        "status", status=78, DG_CACHE_CONNECT_TIMEOUT_MS="soon"
    )
    (base / "s").chmod(0o777)
    assert "chmod 0700" in shell.refused("status", status=77)
    (base / "s").chmod(0o700)


def test_usage_errors_are_argparse_s_and_exit_2(cold: Shell) -> None:
    """Unknown commands, missing words."""
    for words in ((), ("frobnicate",), ("get",), ("put", "b/p"), ("install", "x")):
        assert b"usage: dg-cache" in cold(*words, status=2).stderr


def test_every_command_has_help(cold: Shell) -> None:
    """With examples on top and for `get`."""
    top = cold.said("--help")
    assert "examples:" in top
    commands = re.findall(r"^    ([a-z]+)\b", top, re.MULTILINE)
    assert len(commands) >= 16
    for command in commands:
        assert "usage:" in cold.said(command, "--help")
    assert "xdelta3" in cold.said("get", "--help")


@pytest.mark.parametrize("name", ["bash", "zsh", "tcsh"])
def test_completions_are_printed(cold: Shell, name: str) -> None:
    """They know the commands."""
    script = cold.said("completion", name)
    assert "evict" in script
    if name == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_units_are_put_in_place_with_the_program_s_path(cold: Shell) -> None:
    """Nothing is enabled or started; saying it twice is fine."""
    for _ in range(2):
        said = cold.said("install", "--units-only")
    units = cold.base / ".config/systemd/user"
    assert "systemctl --user" in said
    assert {p.name for p in units.iterdir()} == {"dg-cached.socket", "dg-cached.service"}
    service = (units / "dg-cached.service").read_text()
    assert "ExecStart=" in service
    program = Path(re.search(r'^ExecStart="?([^"\n ]+)', service, re.MULTILINE)[1])  # type: ignore[index]
    assert program.is_absolute()
    assert os.access(program, os.X_OK)


def test_deltaglider_missing_is_one_line_with_the_command(cold: Shell) -> None:
    """The project's own environment has none."""
    text = cold.refused("deltaglider", "cp", "a", "b", status=69)
    assert "pip install 'dg-cached[deltaglider]'" in text


def test_bytes_are_not_written_to_a_terminal(shell: Shell) -> None:
    """Who types `get` without -o is told what to do."""
    shell("put", "b/p", "reference")
    controller, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dgcache_cli", "get", "b/p", DIGEST],
            env=shell.environment,
            stdout=terminal,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(terminal)
        os.close(controller)
    assert done.returncode == 2
    assert b"use -o FILE" in done.stderr


def test_a_bar_is_drawn_in_a_terminal_and_not_in_a_pipe(shell: Shell) -> None:
    """Long work shows progress on standard error; it is wiped at the end."""
    large = shell.base / "large"
    with large.open("wb") as file:
        file.truncate(64 << 20)
    argv = [sys.executable, "-m", "dgcache_cli", "put", "b/p", str(large)]
    controller, terminal = pty.openpty()
    child = subprocess.Popen(
        argv,
        env={**shell.environment, "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=terminal,
    )
    os.close(terminal)
    drawn = b""
    try:
        while piece := os.read(controller, 65536):
            drawn += piece
    except OSError:  # EIO: the other end is closed
        pass
    os.close(controller)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert b"storing" in drawn
    assert len(out.strip()) == 64
    assert shell("put", "b/p", large).stderr == b""


def test_a_reader_that_goes_away_is_no_traceback(shell: Shell) -> None:
    """`dg-cache get … | head -c 1`."""
    large = shell.base / "large"
    large.write_bytes(os.urandom(4 << 20))
    digest = shell.said("put", "b/p", large).strip()
    line = f"{sys.executable} -m dgcache_cli get b/p {digest} | head -c 1 | wc -c"
    done = subprocess.run(
        ["sh", "-c", line], env=shell.environment, capture_output=True, check=True, timeout=60
    )
    assert done.stdout.strip() == b"1"
    assert b"Traceback" not in done.stderr


def test_a_daemon_that_does_not_answer_is_not_called_absent(shell: Shell) -> None:
    """Stopped by a signal, it still holds its sockets: exit status 69, and a command that helps."""
    pid = json.loads(shell.said("status", "--json"))["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert "run dg-cache restart --force" in shell.refused("status", status=69)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_output_that_is_lost_is_told_at_the_end(tmp_path: Path) -> None:
    """By Python itself, with its status 120, also where nobody flushed before."""
    body = (
        "from dgcache_cli.scripts import run_as_script; run_as_script(lambda: print('lost') or 0)"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", body],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 120
    assert "No space left" in done.stderr


def test_the_script_ends_as_python_would(tmp_path: Path) -> None:
    """Exit functions ran, what they print arrived in a pipe, and the status is the command's."""
    body = (
        "import atexit, sys; from dgcache_cli.main import script;"
        "atexit.register(print, 'the end', file=sys.stderr);"
        "script()"
    )
    for words, status in ((("completion", "bash"), 0), (("has", "s3://b/p", "no digest"), 2)):
        done = subprocess.run(
            [sys.executable, "-c", body, *words],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.stderr.endswith("the end\n")
        assert done.returncode == status, done.stderr
        assert bool(done.stdout) == (status == 0)
