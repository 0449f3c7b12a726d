"""Settings: frozen, checked when they are made, with their unit in the name.

Each field names the environment variable it answers to and how its text is read. Nothing here reads
the environment; an entry point passes it in, once (`settings_files.read_settings`). `resolve` also
tells where each value came from.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from dgcache_core.errors import SettingsError
from dgcache_core.secret import SecretKey, parse_key

BACKENDS = ("dg-cached", "memory", "filesystem")
TRANSPORTS = ("grpc", "direct", "auto")
MEBIBYTE = 1 << 20
"""What DeltaGlider's own DG_CACHE_MEMORY_SIZE_MB counts in."""
DEFAULT_CACHE_DIR = "~/.cache/deltaglider"

_UNSET = {
    "cache_dir": DEFAULT_CACHE_DIR,
    "encryption_key": "ephemeral",
    "encryption_key_file": "none",
}
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})

T = TypeVar("T", bound="_Checked")


@dataclass(frozen=True, slots=True)
class Setting:
    """What a field is called outside, how its text is read, and what it means."""

    variable: str
    parse: Callable[[str], Any]
    meaning: str
    secret: bool = False
    """Its value is never shown, and never in a settings file, which others may read."""


def setting(
    default: Any,
    variable: str,
    parse: Callable[[str], Any],
    meaning: str,
    *,
    secret: bool = False,
) -> Any:
    """Declare a field with its outside name."""
    return field(default=default, metadata={"setting": Setting(variable, parse, meaning, secret)})


def declared(kind: "type[_Checked]") -> dict[str, Setting]:
    """Return the settings of a class by field name."""
    return {f.name: f.metadata["setting"] for f in dataclasses.fields(kind)}  # type: ignore[arg-type] # every subclass is a dataclass


@dataclass(frozen=True, slots=True)
class FileLayer:
    """What one settings file says for one party, and the ceilings it sets."""

    path: Path
    values: Mapping[str, Any]
    limits: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Resolved(Generic[T]):
    """Settings and, for every field, where its value came from."""

    settings: T
    origins: Mapping[str, str]
    """`flag`, `environment NAME`, a file's path, `default`, or `ceiling` and what set it."""
    findings: tuple[str, ...] = ()
    """What is to be said about them, a line each."""
    ceilings: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    """What nobody exceeds, by field name, and the file that says so."""


def resolve(
    kind: type[T],
    environ: Mapping[str, str],
    overrides: Mapping[str, Any],
    files: Sequence[FileLayer] = (),
) -> Resolved[T]:
    """Build settings: override, environment, files in their order, default; then the ceilings.

    Raises:
        SettingsError: a value does not parse, is out of range, or an override is unknown.
    """
    known = declared(kind)
    for name in overrides:
        if name not in known:
            raise SettingsError(f"unknown setting {name!r}; known are {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")
    for name, one in known.items():
        if overrides.get(name) is not None:
            values[name], origins[name] = overrides[name], "flag"
        elif environ.get(one.variable):
            values[name] = _parsed(one, environ[one.variable])
            origins[name] = f"environment {one.variable}"
        else:
            for layer in files:
                if name in layer.values:
                    values[name], origins[name] = layer.values[name], str(layer.path)
                    break
    ceilings = {
        name: (limit, str(layer.path)) for layer in files for name, limit in layer.limits.items()
    }
    return _below(ceilings, Resolved(kind(**values), origins, ceilings=ceilings))


def _parsed(one: Setting, text: str) -> Any:
    try:
        return one.parse(text)
    except ValueError as error:
        given = one.variable if one.secret else f"{one.variable}={text!r}"
        raise SettingsError(f"{given}: {error}") from error


def _below(ceilings: Mapping[str, tuple[float, str]], resolved: Resolved[T]) -> Resolved[T]:
    """Clamp what exceeds its ceiling, and say so where somebody had wished for it."""
    for name, (limit, setter) in ceilings.items():
        wanted = getattr(resolved.settings, name)
        if wanted is not None and wanted > limit:
            resolved = clamped(resolved, name, limit, setter, wanted)
    return resolved


def clamped(
    resolved: Resolved[T], name: str, limit: float, setter: str, wanted: float | None = None
) -> Resolved[T]:
    """Return the settings with one lowered to a ceiling.

    Args:
        resolved: the settings.
        name: the field.
        limit: its value from now on.
        setter: whose ceiling it is.
        wanted: what was wished for; None where it was only the default.
    """
    origin, said = resolved.origins[name], f"ceiling {setter}"
    findings = resolved.findings
    if wanted is not None and origin != "default":
        said += f" ({as_text(name, wanted)} wanted by {origin})"
        variable = declared(type(resolved.settings))[name].variable
        findings = (*findings, f"{variable} is {as_text(name, limit)}: {said}")
    return dataclasses.replace(
        resolved,
        settings=dataclasses.replace(resolved.settings, **{name: limit}),  # type: ignore[type-var] # every subclass is a dataclass
        origins={**resolved.origins, name: said},
        findings=findings,
    )


def as_text(name: str, value: Any) -> str:
    """Return a value as people read it; of a key, only whether there is one."""
    if value is None:
        return _UNSET.get(name, "automatic")
    if isinstance(value, SecretKey):
        return "set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return str(value)


def parse_boolean(text: str) -> bool:
    """Read a truth value as people write them."""
    folded = text.strip().lower()
    if folded in _TRUE | _FALSE:
        return folded in _TRUE
    raise ValueError("must be true/false, 1/0, yes/no, or on/off")


def parse_number(text: str) -> float:
    """Read a number that may have a fraction."""
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number such as 512 or 0.5") from None


def parse_path(text: str) -> Path:
    """Read a path; `~` is the home."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError("names the home of somebody unknown") from error


def parse_backend(text: str) -> str:
    """Read the name of a backend; the check of its value is the field's."""
    return text.strip().lower()


def parse_transport(text: str) -> str:
    """Read the name of a transport; the check of its value is the field's."""
    return text.strip().lower()


def base_directory(cache_dir: Path | None) -> Path:
    """Return where files are kept: what was set, or the default below the home.

    Raises:
        SettingsError: there is no home.
    """
    try:
        return cache_dir or Path(DEFAULT_CACHE_DIR).expanduser()
    except RuntimeError as error:
        raise SettingsError("there is no home directory: set DG_CACHE_DIR") from error


class _Checked:
    """Checks by field name, so that a value given in code is held to the same as one read."""

    __slots__ = ()

    def _require(self, name: str, ok: bool, must: str) -> None:
        if not ok:
            one = declared(type(self))[name]
            got = "" if one.secret else f", got {getattr(self, name)!r}"
            raise SettingsError(f"{one.variable} (`{name}`) {must}{got}")

    def _require_between(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        self._require(
            name,
            number and low <= value <= high,  # false for nan
            f"must be a number from {low:g} to {high:g}",
        )

    def _require_boolean(self, name: str) -> None:
        self._require(name, isinstance(getattr(self, name), bool), "must be true or false")

    def _require_absolute(self, name: str) -> None:
        path = getattr(self, name)
        self._require(
            name,
            path is None or (isinstance(path, Path) and path.is_absolute()),
            "must be an absolute path",
        )


_SOCKET_DIR = "directory of the sockets, mode 0700 (default: below XDG_RUNTIME_DIR)"
_CACHE_DIR = f"base directory of what is kept in files (default: {DEFAULT_CACHE_DIR})"
_TTL = "how long an entry lives after it was stored, in seconds"
_MAX_MB = 1 << 24
_MAX_SECONDS = 10 * 365 * 86_400


@dataclass(frozen=True, kw_only=True)
class ClientSettings(_Checked):
    """How a client uses the cache.

    Raises:
        SettingsError: a value is out of range; the message names the setting.
    """

    backend: str = setting(
        "dg-cached", "DG_CACHE_BACKEND", parse_backend, "dg-cached, memory or filesystem"
    )
    ephemeral: bool = setting(
        False, "DG_EPHEMERAL_CACHE", parse_boolean, "true: never use the daemon"
    )
    no_cache: bool = setting(
        False, "DG_NO_CACHE", parse_boolean, "true: keep nothing beyond the operation in hand"
    )
    fallback_size_mb: float = setting(
        1024, "DG_CACHE_FALLBACK_SIZE_MB", parse_number, "budget of the in-process cache, in MiB"
    )
    ttl_seconds: float = setting(86_400, "DG_CACHE_TTL_SECONDS", parse_number, _TTL)
    connect_timeout_ms: float = setting(
        50, "DG_CACHE_CONNECT_TIMEOUT_MS", parse_number, "budget to decide for the fallback, in ms"
    )
    transport: str | None = setting(
        None,
        "DG_CACHE_TRANSPORT",
        parse_transport,
        "way of calls to the daemon: grpc, direct, or auto (default: auto for dg-cache and "
        "DeltaGlider, grpc for the SDK)",
    )
    encryption: bool = setting(
        True, "DG_CACHE_ENCRYPTION", parse_boolean, "false changes nothing but a warning"
    )
    wait_seconds: float = setting(
        120, "DG_CACHE_WAIT_SECONDS", parse_number, "longest wait on somebody else's fetch, in s"
    )
    report: bool = setting(
        False, "DG_CACHE_REPORT", parse_boolean, "true: one line per reference on what it saved"
    )
    socket_dir: Path | None = setting(None, "DG_CACHE_SOCKET_DIR", parse_path, _SOCKET_DIR)
    cache_dir: Path | None = setting(None, "DG_CACHE_DIR", parse_path, _CACHE_DIR)

    def __post_init__(self) -> None:
        self._require("backend", self.backend in BACKENDS, f"must be one of {', '.join(BACKENDS)}")
        self._require(
            "transport",
            self.transport is None or self.transport in TRANSPORTS,
            f"must be one of {', '.join(TRANSPORTS)}",
        )
        for name in ("ephemeral", "no_cache", "encryption", "report"):
            self._require_boolean(name)
        self._require_between("fallback_size_mb", 0, _MAX_MB)
        self._require_between("ttl_seconds", 1, _MAX_SECONDS)
        self._require_between("connect_timeout_ms", 1, 60_000)
        self._require_between("wait_seconds", 0, 3600)
        self._require_absolute("socket_dir")
        self._require_absolute("cache_dir")

    @property
    def fallback_bytes(self) -> int:
        """The in-process cache's budget in bytes."""
        return int(self.fallback_size_mb * MEBIBYTE)


@dataclass(frozen=True, kw_only=True)
class DaemonSettings(_Checked):
    """How the daemon serves.

    Raises:
        SettingsError: a value is out of range; the message names the setting.
    """

    memory_size_mb: float | None = setting(
        None,
        "DG_CACHE_MEMORY_SIZE_MB",
        parse_number,
        "byte budget in MiB (default: a tenth of the effective memory, at most 2048)",
    )
    ttl_seconds: float = setting(86_400, "DG_CACHE_TTL_SECONDS", parse_number, _TTL)
    disk_size_mb: float = setting(
        0, "DG_CACHE_DISK_SIZE_MB", parse_number, "budget of the disk tier in MiB; 0: no disk tier"
    )
    socket_dir: Path | None = setting(None, "DG_CACHE_SOCKET_DIR", parse_path, _SOCKET_DIR)
    cache_dir: Path | None = setting(None, "DG_CACHE_DIR", parse_path, _CACHE_DIR)
    encryption_key: SecretKey | None = setting(
        None,
        "DG_CACHE_ENCRYPTION_KEY",
        parse_key,
        "32 bytes in base64; lets the disk tier outlive the daemon",
        secret=True,
    )
    encryption_key_file: Path | None = setting(
        None, "DG_CACHE_ENCRYPTION_KEY_FILE", parse_path, "private file that holds the key"
    )

    def __post_init__(self) -> None:
        if self.memory_size_mb is not None:
            self._require_between("memory_size_mb", 0.25, _MAX_MB)
        self._require_between("ttl_seconds", 1, _MAX_SECONDS)
        self._require_between("disk_size_mb", 0, _MAX_MB)
        for name in ("socket_dir", "cache_dir", "encryption_key_file"):
            self._require_absolute(name)
        key = self.encryption_key
        self._require("encryption_key", key is None or isinstance(key, SecretKey), "must be a key")

    @property
    def disk_bytes(self) -> int:
        """The disk tier's budget in bytes; 0 means that there is none."""
        return int(self.disk_size_mb * MEBIBYTE)
