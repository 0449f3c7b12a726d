"""A settings file with everything in it, made from the declared settings, every line a comment."""

import textwrap
from pathlib import Path
from typing import Any

from dgcache_core.settings import DEFAULT_CACHE_DIR, ClientSettings, DaemonSettings, declared
from dgcache_core.settings_files import SYSTEM_FILE, TABLES

_HEAD = f"""\
# Settings of dg-cached and its clients: ~/.config/dg-cached/config.toml for one user,
# {SYSTEM_FILE} for all. Order: flag, environment, the user's file, /etc, default.
"""
_LIMITS = f"""\
# Ceilings that nobody exceeds, in {SYSTEM_FILE} only; any number above may have one.
# [limits]
"""
_WITHOUT_DEFAULT: dict[str, Any] = {
    "socket_dir": "/run/user/1000/dg-cached",
    "cache_dir": DEFAULT_CACHE_DIR,
    "transport": "auto",
    "memory_size_mb": 512,
    "encryption_key_file": "~/.config/dg-cached/key",
}
"""What stands in the example where the default is chosen at run time."""


def example() -> str:
    """Return the file's text."""
    parts = [_HEAD]
    for table in ("", "client", "daemon"):
        lines = [f"# [{table}]\n"] if table else []
        parts.append("\n".join([*lines, *(_one(name) for name in TABLES[table])]))
    parts.append(_LIMITS + "".join(f"# {name} = {_toml(name)}\n" for name in TABLES["limits"]))
    return "\n".join(parts)


def _one(name: str) -> str:
    one = (declared(ClientSettings) | declared(DaemonSettings))[name]
    meaning = textwrap.wrap(f"{one.variable}: {one.meaning}", 90)
    return "".join(f"## {line}\n" for line in meaning) + f"# {name} = {_toml(name)}\n"


def _toml(name: str) -> str:
    kind = ClientSettings if name in declared(ClientSettings) else DaemonSettings
    value = getattr(kind(), name)
    value = _WITHOUT_DEFAULT[name] if value is None else value
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, (str, Path)) else str(value)
