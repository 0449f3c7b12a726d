"""What is worth knowing about the settings, a line each, with the command where one mends it.

Used by `config` and `status` alike: what the settings themselves have to say (see `Resolved`),
variables that nobody reads, and where the daemon that runs has other settings than one that would
be started from here.
"""

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from dgcache import Settings
from dgcache_cli.supervision import Supervision
from dgcache_core.errors import SettingsError
from dgcache_core.key_sources import choose_key
from dgcache_core.settings import DaemonSettings, Resolved, as_text, declared
from dgcache_core.settings_files import read_settings

_CLIENT, _DAEMON = declared(Settings), declared(DaemonSettings)
_KNOWN = sorted({one.variable for one in (*_CLIENT.values(), *_DAEMON.values())})
_PREFIX = "DG_CACHE_"
_NOT_COMPARED = ("socket_dir",)  # it led to this very daemon


def daemon_from_here(environ: Mapping[str, str]) -> Resolved[DaemonSettings]:
    """Return the settings that a daemon would have that is started from here, without its key.

    Raises:
        SettingsError: one is wrong.
    """
    resolved = read_settings(DaemonSettings, environ, {})
    with_key = choose_key(resolved, environ.get("CREDENTIALS_DIRECTORY", ""))
    if with_key.settings.encryption_key is not None:
        with_key.settings.encryption_key.wipe()
    return with_key


def findings(
    environ: Mapping[str, str], client: Resolved[Settings], status: Mapping[str, Any] | None
) -> list[str]:
    """Return everything, without repetition; `status` is None where no daemon runs."""
    found = [*client.findings, *_unknown_variables(environ)]
    try:
        here = daemon_from_here(environ)
    except SettingsError as error:
        found.append(f"a daemon started from here would refuse: {error}")
    else:
        found += here.findings
        if status is not None:
            found += _differences(here, status, Supervision(status, environ))
    return list(dict.fromkeys(found))


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(environ):
        if name.startswith(_PREFIX) and name not in _KNOWN:
            known = [one.removeprefix(_PREFIX) for one in _KNOWN]
            near = get_close_matches(name.removeprefix(_PREFIX), known, 1)
            meant = f": did you mean {_PREFIX}{near[0]}?" if near else ""
            yield f"{ascii(name)[1:-1]} is no setting{meant}"


def _differences(
    here: Resolved[DaemonSettings], status: Mapping[str, Any], supervision: Supervision
) -> Iterator[str]:
    theirs = {one["name"]: one for one in status["settings"]}
    for name, one in _DAEMON.items():
        if name in _NOT_COMPARED or one.variable not in theirs:
            continue
        value, origin = theirs[one.variable]["value"], theirs[one.variable]["origin"]
        wanted = as_text(name, getattr(here.settings, name))
        if origin.startswith("ceiling ") and not _is_less(wanted, value):
            said_already = f"{one.variable} is {value}: {origin}" in here.findings
            if "wanted by" in origin and not said_already:
                yield f"{one.variable} is {value} in the daemon: {origin}"
        elif _differs(here, name, value, origin) and not (
            here.origins[name] == "default"
            and origin == f"environment {one.variable}"
            and supervision.is_of_the_unit(one.variable)  # who wrote that into the unit meant it
        ):
            yield (
                f"{one.variable} is {value} in the daemon ({_briefly(origin)}) and would be "
                f"{wanted} from here ({_briefly(here.origins[name])}): "
                f"{supervision.applying(one.variable, here.origins[name], origin)} applies it"
            )


def _differs(here: Resolved[DaemonSettings], name: str, value: str, origin: str) -> bool:
    """Tell whether a restart would change it; what a flag said is meant, unless unsaid here."""
    wish = getattr(here.settings, name)
    if here.origins[name] == "default" and origin.endswith(("default", "flag")):
        return False
    if wish is None and origin.startswith("ceiling "):
        return False
    return as_text(name, wish) != value


def _is_less(wanted: str, value: str) -> bool:
    try:
        return float(wanted) < float(value)
    except ValueError:
        return False


def _briefly(origin: str) -> str:
    """Return an origin without what the line says anyway, and the home as `~`."""
    home = os.path.expanduser("~")  # noqa: PTH111 - a text
    return "environment" if origin.startswith("environment ") else origin.replace(home, "~")
