"""systemctl, asked of the account's own manager or of the system's. Every call has an end.

su, cron and sudo carry a wrong or no XDG_RUNTIME_DIR, without which systemctl finds no user
manager; where one listens in /run/user/UID, that one is meant.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from dgcache_core.errors import CacheUnavailableError

_CALL_SECONDS = 120.0  # a stop and a start, each of which the units give 30 s
_SOCKET = "systemd/private"


class Manager:
    """One manager of units, which may be out of reach."""

    def __init__(self, environ: Mapping[str, str], *, is_system: bool = False) -> None:
        """Ask nobody as yet."""
        self.is_system = is_system
        self._environ = dict(environ) if is_system else _leading_to_manager(environ)
        self._scope = ["--system" if is_system else "--user"]

    @property
    def command(self) -> str:
        """Return how a person calls it."""
        return "systemctl" if self.is_system else "systemctl --user"

    def why_out_of_reach(self) -> str | None:
        """Return why it does not answer; None where it does."""
        if shutil.which("systemctl", path=self._environ.get("PATH")) is None:
            return "systemctl is not installed"
        done = self._call("show", "--property=Version")
        if done.returncode == 0:
            return None
        said = done.stderr.strip().splitlines()
        return said[-1] if said else "no manager answers"

    def run(self, *words: str) -> None:
        """Run one verb.

        Raises:
            CacheUnavailableError: it failed; the message has systemctl's own last word.
        """
        done = self._call(*words)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise CacheUnavailableError(f"{self.command} {' '.join(words)}: {said[0]}")

    def enable(self, *units: str) -> None:
        """Make the links of [Install] sections, which needs no manager (systemctl(1)).

        Raises:
            CacheUnavailableError: it failed.
        """
        self._environ["SYSTEMD_OFFLINE"] = "1"
        try:
            self.run("enable", *units)
        finally:
            del self._environ["SYSTEMD_OFFLINE"]

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit; of one that there is not, as it would be."""
        done = self._call("show", unit, f"--property={','.join(properties)}")
        return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)

    def values(self, unit: str, name: str) -> list[str]:
        """Return what one property says, a line each; nothing where no manager answers.

        Raises:
            CacheUnavailableError: systemctl does not end.
        """
        if shutil.which("systemctl", path=self._environ.get("PATH")) is None:
            return []
        return self._call("show", unit, f"--property={name}", "--value").stdout.splitlines()

    def loaded(self, *patterns: str) -> list[str]:
        """Return the names of loaded units that match."""
        done = self._call("list-units", "--all", "--plain", "--no-legend", "--full", *patterns)
        return [line.split()[0] for line in done.stdout.splitlines() if line.strip()]

    def _call(self, *words: str) -> "subprocess.CompletedProcess[str]":
        try:
            return subprocess.run(
                ["systemctl", *self._scope, "--no-pager", *words],  # noqa: S607 - as a user calls it
                env={**self._environ, "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_CALL_SECONDS,
                check=False,
            )
        except FileNotFoundError as error:
            raise CacheUnavailableError("systemctl is not installed") from error
        except subprocess.TimeoutExpired as error:
            raise CacheUnavailableError(
                f"{self.command} {' '.join(words)} did not end within {_CALL_SECONDS:.0f} s"
            ) from error


def _leading_to_manager(environ: Mapping[str, str]) -> dict[str, str]:
    usual = f"/run/user/{os.geteuid()}"
    given = environ.get("XDG_RUNTIME_DIR", "")
    if not Path(given or "/", _SOCKET).exists() and Path(usual, _SOCKET).exists():
        return {**environ, "XDG_RUNTIME_DIR": usual}
    return dict(environ)
