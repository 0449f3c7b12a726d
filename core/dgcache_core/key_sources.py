"""Where the daemon's key comes from: the first that is given, in the order of all settings.

Flag (a file), DG_CACHE_ENCRYPTION_KEY, DG_CACHE_ENCRYPTION_KEY_FILE, the systemd credential, a
settings file's `encryption_key_file`. A file must be private; a credential is where the manager put
it, readable through an ACL that shows as the group's (systemd.exec(5)). A directory of credentials
that cannot be looked into is no end of the daemon, since it may hold none for it; it is said.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dgcache_core.directories import read_trusted_file
from dgcache_core.errors import CacheRefusedError, SettingsError
from dgcache_core.secret import SecretKey, parse_key_file
from dgcache_core.settings import DaemonSettings, Resolved, declared

CREDENTIAL = "dg-cache-key"

_MOST_BYTES = 4096
_PRIVATE, _READABLE_BY_ACL = 0o077, 0o037
_VARIABLE = declared(DaemonSettings)["encryption_key"].variable
_Source = tuple[str, Callable[[], SecretKey]]


def choose_key(
    resolved: Resolved[DaemonSettings], credentials_directory: str
) -> Resolved[DaemonSettings]:
    """Return the same settings with the key that counts, and where it came from.

    Args:
        resolved: without what a file or a credential holds.
        credentials_directory: what $CREDENTIALS_DIRECTORY says, or "".

    Raises:
        SettingsError: the source that counts is not private, or holds no key.
    """
    credential, trouble = _credential(credentials_directory)
    resolved = replace(resolved, findings=(*resolved.findings, *trouble))
    sources = _sources(resolved, credential)
    if not sources:
        return resolved
    (origin, take), *others = sources
    key, given = take(), resolved.settings.encryption_key
    if given is not None and given is not key:
        given.wipe()
    findings = [f"the key is from {origin}, not from {other}" for other, _ in others]
    return replace(
        resolved,
        settings=replace(resolved.settings, encryption_key=key),
        origins={**resolved.origins, "encryption_key": origin},
        findings=(*resolved.findings, *findings),
    )


def _credential(directory: str) -> tuple[Path | None, list[str]]:
    """Return the credential where there is one, and what is to be said where that is not known."""
    path = Path(directory) / CREDENTIAL
    if not directory.startswith("/"):
        return None, []
    try:
        path.lstat()
    except FileNotFoundError:
        return None, []
    except OSError as error:
        said = f"no credential {CREDENTIAL} is used: cannot look into {directory}: {error.strerror}"
        return None, [said]
    return path, []


def _sources(resolved: Resolved[DaemonSettings], credential: Path | None) -> list[_Source]:
    """Return every source that is given, first the one that counts."""
    key, file = resolved.settings.encryption_key, resolved.settings.encryption_key_file
    ranked: list[tuple[int, _Source]] = []
    if key is not None:
        ranked.append((1, (resolved.origins["encryption_key"], lambda: key)))
    if file is not None:
        origin = resolved.origins["encryption_key_file"]
        rank = 0 if origin == "flag" else 2 if origin.startswith("environment ") else 4
        ranked.append((rank, (f"{file}, named by {origin}", lambda: _read(file, _PRIVATE))))
    if credential is not None:
        name = f"credential {CREDENTIAL}"
        ranked.append((3, (name, lambda: _read(credential, _READABLE_BY_ACL))))
    return [source for _, source in sorted(ranked, key=lambda one: one[0])]


def _read(path: Path, forbidden_mode: int) -> SecretKey:
    try:
        return parse_key_file(read_trusted_file(path, _MOST_BYTES, forbidden_mode))
    except FileNotFoundError as error:
        raise SettingsError(f"{_VARIABLE}: there is no {path}") from error
    except CacheRefusedError as error:
        raise SettingsError(f"{_VARIABLE}: {error}") from error
    except ValueError as error:
        raise SettingsError(f"{_VARIABLE}: {path} {error}") from error
