"""Where the daemon that runs has its environment from, and which command changes that.

A unit has its manager's environment and its own: what its Environment= and EnvironmentFile= say
counts more (systemd.exec(5)), and no `import-environment` or `unset-environment` gets past it. An
instance of the template has none of its account's environment at all.
"""

import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dgcache.ending import Serving
from dgcache_cli.manager import Manager
from dgcache_cli.units import SERVICE

_ALONE = "dg-cache restart"


class Supervision:
    """Who started the daemon, and with what."""

    def __init__(self, status: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        """Ask no manager as yet.

        Args:
            status: of the daemon.
            environ: leads to the manager.
        """
        self._environ = environ
        self._is_systemd = status["supervisor"] == "systemd"
        # empty where its processes are not seen from here: most run the user's unit
        found = Serving(Path(status["directory"]), status["pid"]).unit
        self._unit = (found or SERVICE) if self._is_systemd else ""
        self._is_instance = "@" in self._unit

    @property
    def instance(self) -> str:
        """Return the template's instance that the daemon is; empty where it is none."""
        return self._unit if self._is_instance else ""

    def is_of_the_unit(self, variable: str) -> bool:
        """Tell whether the unit itself, by a drop-in for example, sets the variable."""
        return self._is_instance or (self._is_systemd and self._setter(variable) is not None)

    def applying(self, variable: str, here: str, there: str) -> str:
        """Return the command by which a restarted daemon has what would be from here.

        Args:
            variable: of the setting.
            here: the origin of its value from here.
            there: the origin of its value in the daemon.
        """
        if not self._is_systemd:
            return _ALONE
        by_environment = f"environment {variable}"
        if self._is_instance:
            edit = f"sudo systemctl edit {self._unit} && sudo systemctl restart {self._unit}"
            return edit if by_environment in (here, there) else _ALONE
        restart = f"systemctl --user restart {self._unit.removesuffix('.service')}"
        setter = self._setter(variable) if there == by_environment else None
        if setter is not None:
            return f"{setter} && {restart}"
        if here == by_environment:
            return f"systemctl --user import-environment {variable} && {restart}"
        if there == by_environment:
            return f"systemctl --user unset-environment {variable} && {restart}"
        return restart

    def forgoes_namespaces(self) -> bool:
        """Tell whether the unit says itself that it wants no user namespace (drop-in
        `no-user-namespaces.conf`)."""
        if not self._is_systemd:
            return False
        manager = Manager(self._environ, is_system=self._is_instance)
        return manager.values(self._unit, "PrivateUsers") == ["no"]

    def _setter(self, variable: str) -> str | None:
        """Return the command that changes what the unit itself sets; None where it sets nothing."""
        manager = Manager(self._environ)
        for line in manager.values(self._unit, "EnvironmentFiles"):  # they count more than the rest
            path = line.rpartition(" (")[0]
            if _file_sets(Path(path), variable):
                return f"edit {shlex.quote(path)}"
        for line in manager.values(self._unit, "Environment"):
            with suppress(ValueError):  # quotes without an end
                if any(word.startswith(f"{variable}=") for word in shlex.split(line)):
                    return f"systemctl --user edit {self._unit.removesuffix('.service')}"
        return None


def _file_sets(path: Path, variable: str) -> bool:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return False
    return re.search(rf"^\s*{re.escape(variable)}=", text, re.MULTILINE) is not None
