"""The daemon's settings as a real one takes them: files, ceilings, the key, and what it tells."""

import base64
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import text_format

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.etc import own_etc
from tests.support.wire import SECONDS, Client, Daemon, own_environment, running

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace needs root")
MEMORY, TTL, KEY = "DG_CACHE_MEMORY_SIZE_MB", "DG_CACHE_TTL_SECONDS", "DG_CACHE_ENCRYPTION_KEY"


def told(daemon: Daemon) -> dict[str, tuple[str, str]]:
    """Return each effective value and its origin, as Status has them."""
    with Client(daemon.directory) as client:
        return {one.name: (one.value, one.origin) for one in client.status().settings}


def refusal(*options: str, **environ: str) -> str:
    """Assert that a daemon refuses its settings with exit status 78, and return why."""
    done = subprocess.run(
        [sys.executable, "-m", "dgcached", *options],
        env={**own_environment(), **environ},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (78, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def write(path: Path, text: str) -> Path:
    """Write a file that only we can write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_each_layer_is_named_as_the_origin(short_directory: Path) -> None:
    """Flag, environment, the user's file, default."""
    file = write(
        short_directory / "dg-cached" / "config.toml",
        "ttl_seconds = 7\ncache_dir = '/c'\n[daemon]\nmemory_size_mb = 9\ndisk_size_mb = 9\n",
    )
    environ = {"XDG_CONFIG_HOME": str(short_directory), MEMORY: "8", TTL: "500.5"}
    with running(environ=environ, options=("--memory-size-mb", "64")) as daemon:
        settings = told(daemon)
    assert settings[MEMORY] == ("64", "flag")
    assert settings[TTL] == ("500.5", f"environment {TTL}")
    assert settings["DG_CACHE_DISK_SIZE_MB"] == ("9", str(file))
    assert settings["DG_CACHE_DIR"] == ("/c", str(file))
    assert settings[KEY] == ("ephemeral", "default")
    assert settings["DG_CACHE_ENCRYPTION_KEY_FILE"] == ("none", "default")


def test_more_memory_than_there_is_is_clamped_and_said() -> None:
    """By the host; the origin says what was wished for."""
    with running(options=("--memory-size-mb", "9999999")) as daemon:
        value, origin = told(daemon)[MEMORY]
        assert "budget-clamped" in daemon.logged()
    assert float(value) < 9_999_999
    assert origin == "ceiling host memory (9999999 wanted by flag)"


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("wish", [(), ("--memory-size-mb", "64")], ids=["default", "flag"])
def test_the_ceilings_of_etc_bind_the_daemon(short_directory: Path, wish: tuple[str, ...]) -> None:
    """The default, too, which is chosen by the memory there is; the log says what was wished."""
    etc = own_etc(short_directory, "[limits]\nmemory_size_mb = 8\nttl_seconds = 60\n")
    with running(prefix=etc, options=wish, environ={TTL: "61"}) as daemon:
        settings, log = told(daemon), daemon.logged()
    file = "/etc/dg-cached/config.toml"
    wanted = " (64 wanted by flag)" if wish else ""
    assert settings[MEMORY] == ("8", f"ceiling {file}{wanted}")
    assert settings[TTL] == ("60", f"ceiling {file} (61 wanted by environment {TTL})")
    assert log.count("WARNING settings finding=") == (2 if wish else 1)
    assert f"{TTL} is 60: ceiling {file} (61 wanted by" in log


def test_an_untrusted_or_wrong_file_stops_the_daemon(short_directory: Path) -> None:
    """Exit status 78, one line, with the command that mends it."""
    file = write(short_directory / "dg-cached" / "config.toml", "[daemon]\nmemory_size_mb = '9'\n")
    xdg = {"XDG_CONFIG_HOME": str(short_directory)}
    assert f"{file}: memory_size_mb must be a number" in refusal(**xdg)
    file.chmod(0o666)
    assert f"chmod go-w {file}" in refusal(**xdg)
    file.unlink()
    os.mkfifo(file, 0o600)
    assert "not a regular file" in refusal(**xdg)


# -- the key ----------------------------------------------------------------------------------


def forms_of(key: bytes) -> list[bytes]:
    """Return pieces of every text that would give the key away."""
    whole = [base64.b64encode(key), base64.urlsafe_b64encode(key), key.hex().encode(), key]
    return [text[:16] for text in whole]


def tells(daemon: Daemon, key: bytes) -> list[str]:
    """Return where the key, or its text, is to be found: it should be nowhere."""
    with Client(daemon.directory) as client:
        status = text_format.MessageToString(client.status(), as_utf8=True)
        entries = text_format.MessageToString(client.call("List", pb.ListRequest()), as_utf8=True)
    process = Path("/proc") / str(daemon.pid)
    places = {
        "status": status.encode(),
        "entries": entries.encode(),
        "log": daemon.log.read_bytes(),
    }
    if os.geteuid() == 0:  # the process is not dumpable
        places |= {name: (process / name).read_bytes() for name in ("environ", "cmdline")}
    return [name for name, text in places.items() if any(form in text for form in forms_of(key))]


def test_a_key_in_the_environment_is_taken_out_of_it(short_directory: Path) -> None:
    """Neither /proc nor the log nor an answer has it; that there is one is told."""
    key = secrets.token_bytes(32)
    environ = {KEY: base64.b64encode(key).decode()}
    with running(environ=environ, options=("--memory-size-mb", "8", "--verbose")) as daemon:
        assert told(daemon)[KEY] == ("set", f"environment {KEY}")
        assert tells(daemon, key) == []
        if os.geteuid() == 0:  # or this test would look at the wrong process
            assert b"\0DG_CACHE_ENCRYPTION_KEY=" in Path(f"/proc/{daemon.pid}/environ").read_bytes()


def test_a_key_file_is_used_and_the_other_source_is_named(short_directory: Path) -> None:
    """The flag counts; the variable is taken out of the environment all the same."""
    key, other = secrets.token_bytes(32), secrets.token_bytes(32)
    file = write(short_directory / "key", base64.urlsafe_b64encode(key).decode() + "\n")
    environ = {KEY: base64.b64encode(other).decode()}
    options = ("--memory-size-mb", "8", "--encryption-key-file", str(file))
    with running(environ=environ, options=options) as daemon:
        assert told(daemon)[KEY] == ("set", f"{file}, named by flag")
        assert tells(daemon, key) == tells(daemon, other) == []
        assert f"the key is from {file}, named by flag, not from environment" in daemon.logged()


def test_a_credential_of_the_manager_is_used(short_directory: Path) -> None:
    """From a directory as systemd makes it for a user's service: 0500 with files of 0400."""
    key = secrets.token_bytes(32)
    credentials = short_directory / "credentials" / "dg-cached.service"
    file = write(credentials / "dg-cache-key", base64.b64encode(key).decode() + "\n")
    file.chmod(0o400)
    credentials.chmod(0o500)
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    with running(environ=environ) as daemon:
        assert told(daemon)[KEY] == ("set", "credential dg-cache-key")
        assert tells(daemon, key) == []
    file.chmod(0o444)
    assert "can be read by others" in refusal(**environ)
    credentials.chmod(0o700)  # or an ordinary user could not remove it


def test_a_wrong_key_stops_the_daemon_without_being_shown(short_directory: Path) -> None:
    """Exit status 78; neither the text nor a piece of it is in the message."""
    key = secrets.token_bytes(33)
    text = base64.b64encode(key).decode()
    file = write(short_directory / "key", text)
    for message in (refusal(**{KEY: text}), refusal("--encryption-key-file", str(file))):
        assert KEY in message
        assert "openssl rand -base64 32" in message
        assert not any(form in message.encode() for form in forms_of(key))
    file.chmod(0o640)
    assert f"chmod go-rwx {file}" in refusal("--encryption-key-file", str(file))


def test_there_is_no_flag_for_the_key_itself() -> None:
    """A command line is for everybody to read."""
    argv = [sys.executable, "-m", "dgcached", "--help"]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert "--encryption-key-file" in said
    assert "--encryption-key " not in said
