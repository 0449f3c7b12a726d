"""Settings files: the user's, then the administrator's, both TOML and both vetted before use.

`socket_dir`, `ttl_seconds` and `cache_dir`, which client and daemon share, stand above the first
table; the rest in `[client]` and `[daemon]`, named as the fields are. `[limits]`, in /etc only, has
the ceilings of numbers. A reader checks what it reads and leaves the other party's table alone, so
that a newer daemon's setting does not stop an older client. Where there is no file this costs an
lstat(2); what reads one (tomllib: 20 ms) is imported only where there is one.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dgcache_core.errors import CacheRefusedError, SettingsError
from dgcache_core.settings import (
    BACKENDS,
    TRANSPORTS,
    ClientSettings,
    DaemonSettings,
    FileLayer,
    Resolved,
    Setting,
    declared,
    parse_backend,
    parse_boolean,
    parse_number,
    parse_path,
    parse_transport,
    resolve,
)

SYSTEM_FILE = Path("/etc/dg-cached/config.toml")
MOST_BYTES = 64 << 10

T = TypeVar("T", bound=ClientSettings | DaemonSettings)

_CLIENT, _DAEMON = declared(ClientSettings), declared(DaemonSettings)
_SETTINGS: dict[str, Setting] = {**_CLIENT, **_DAEMON}
_COMMON = [name for name in _CLIENT if name in _DAEMON]
TABLES: dict[str, list[str]] = {
    "": _COMMON,
    "client": [name for name in _CLIENT if name not in _COMMON],
    "daemon": [name for name, one in _DAEMON.items() if name not in _COMMON and not one.secret],
    "limits": [name for name, one in _SETTINGS.items() if one.parse is parse_number],
}
"""What may stand where; "" is above the first table."""

_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    parse_number: ((int, float), "a number such as 512 or 0.5, without quotes"),
    parse_boolean: ((bool,), "true or false, without quotes"),
    parse_path: ((str,), "an absolute path in quotes"),
    parse_backend: ((str,), " or ".join(f'"{name}"' for name in BACKENDS)),
    parse_transport: ((str,), " or ".join(f'"{name}"' for name in TRANSPORTS)),
}


def read_settings(
    kind: type[T],
    environ: Mapping[str, str],
    overrides: Mapping[str, Any],
    system_file: Path = SYSTEM_FILE,
) -> Resolved[T]:
    """Build settings from every layer: overrides, environment, the two files, defaults.

    Raises:
        SettingsError: a value is wrong, or a file cannot be trusted; the message names the check
            and the mending command.
    """
    paths = [path for path in (user_file(environ), system_file) if path is not None]
    layers = [
        _layer(kind, path, content, may_limit=path == system_file)
        for path in dict.fromkeys(paths)
        if (content := _content(path, is_users=path != system_file)) is not None
    ]
    return resolve(kind, environ, overrides, layers)


def user_file(environ: Mapping[str, str]) -> Path | None:
    """Return where the user's file is (XDG Base Directory Specification); None without a home."""
    for variable, below in (("XDG_CONFIG_HOME", ""), ("HOME", ".config")):
        if environ.get(variable, "").startswith("/"):
            return Path(environ[variable], below, "dg-cached", "config.toml")
    return None


def _content(path: Path, *, is_users: bool) -> bytes | None:
    """Return what a file holds; None where there is none."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if is_users and isinstance(error, PermissionError):
            return None  # the HOME of somebody else, as after sudo -u: nothing there is ours
        raise SettingsError(f"{path}: {error.strerror}") from error
    from dgcache_core.directories import read_trusted_file

    try:
        return read_trusted_file(path, MOST_BYTES)
    except FileNotFoundError as error:
        raise SettingsError(f"{path} is a link that leads nowhere: remove it") from error
    except CacheRefusedError as error:
        raise SettingsError(str(error)) from error


def _layer(kind: type[T], path: Path, content: bytes, *, may_limit: bool) -> FileLayer:
    """Read what a file says for one party."""
    document = _document(path, content)
    for name in document:
        if not name or name not in (*TABLES, *_COMMON):
            _refuse_unknown(path, name, "")
    tables = {name: _table(path, document, name) for name in TABLES if name}
    if tables["limits"] and not may_limit:
        raise SettingsError(f"{path}: [limits] counts only in {SYSTEM_FILE}: remove it here")
    own = "daemon" if issubclass(kind, DaemonSettings) else "client"
    values = {name: document[name] for name in _COMMON if name in document} | tables[own]
    for table in (own, "limits"):
        for name in tables[table]:
            if name not in TABLES[table]:
                _refuse_unknown(path, name, table)
    limits = {name: value for name, value in tables["limits"].items() if name in declared(kind)}
    return FileLayer(
        path, _checked(kind, f"{path}: ", values), _checked(kind, f"{path}: limits.", limits)
    )


def _document(path: Path, content: bytes) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{path} is not UTF-8 at byte {error.start}: save it as such"
        ) from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError; a number of too many digits
        raise SettingsError(f"{path} is not TOML: {error}") from error


def _table(path: Path, document: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise SettingsError(f"{path}: {name} must be a table: write [{name}]")
    return table


def _checked(kind: type[T], where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as the fields want them, each held to its field's own check."""
    checked = {}
    for name, value in values.items():
        one = declared(kind)[name]
        types, accepted = _TYPES[one.parse]
        if type(value) not in types:
            raise SettingsError(f"{where}{name} must be {accepted}, got {_shown(value)}")
        try:
            checked[name] = one.parse(value) if isinstance(value, str) else value
            kind(**{name: checked[name]})
        except (ValueError, SettingsError) as error:
            raise SettingsError(f"{where}{name}: {error}") from error
    return checked


def _shown(value: Any) -> str:
    """Return a value of any kind as a message has room for it."""
    import reprlib

    try:
        return reprlib.repr(value)
    except ValueError:  # hexadecimal in the file, of more digits than Python writes in decimal
        return "a number of thousands of digits"


def _refuse_unknown(path: Path, name: str, table: str) -> NoReturn:
    """Name the key, the file, and what was probably meant."""
    from difflib import get_close_matches

    where = f" in [{table}]" if table else ""
    if _SETTINGS.get(name) is not None and _SETTINGS[name].secret:
        raise SettingsError(
            f"{path}: the key never stands in a settings file: put it into a private file "
            f"and name that with encryption_key_file in [daemon]"
        )
    by_variable = {one.variable: field for field, one in _SETTINGS.items()}
    known = {field: _place(t) for t in ("", "client", "daemon") for field in TABLES[t]}
    places = known if table != "limits" else dict.fromkeys(TABLES["limits"], "in [limits]")
    meant = by_variable.get(name.upper(), name)
    names = [*places, *(() if table else TABLES)]
    near = [meant] if meant in places else get_close_matches(meant, names, 1, 0.5)
    if near and near[0] in places:
        hint = f"did you mean {near[0]}, {places[near[0]]}?"
    elif near:
        hint = f"did you mean [{near[0]}]?"
    else:
        hint = f"known are {', '.join(TABLES[table])}"
    raise SettingsError(f"{path}: unknown key {name!r}{where}: {hint}")


def _place(table: str) -> str:
    return f"in [{table}]" if table else "above the first table"
