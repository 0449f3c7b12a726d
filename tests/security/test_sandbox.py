"""A sandbox that was asked for and is not there."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.wire import SECONDS, own_environment, running

# A daemon is under systemd when this names it (systemd.exec(5)); the shell becomes the daemon.
_AS_A_UNIT = ("sh", "-c", 'SYSTEMD_EXEC_PID=$$ exec "$@"', "sh")


def _dg_cache(place: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "dgcache_cli", *words],
        env={**own_environment(), "DG_CACHE_SOCKET_DIR": str(place), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_68_a_sandbox_that_is_silently_ineffective_is_told(short_directory: Path) -> None:
    """Under systemd and in the machine's own user namespace: status says so, doctor is unwell and
    names the directive that is missing."""
    place = short_directory / "s"
    with running(place, prefix=_AS_A_UNIT):
        said = " ".join(_dg_cache(place, "status").stdout.split())
        judged = _dg_cache(place, "doctor", "--json")
    assert "no user namespace of its own" in said
    assert "/ writable" in said
    bad = {one["what"]: one for one in json.loads(judged.stdout) if one["level"] == "bad"}
    assert judged.returncode == 1
    assert {"user namespace", "root directory", "network"} <= set(bad)
    for one in bad.values():
        assert "PrivateUsers=yes" in one["mend"], one
        assert "silently ignores" in one["why"], one
