"""Whatever bytes a settings file holds, reading it gives settings or SettingsError, soon.

Settings are then within what their fields declare, and under the ceilings. It is read as the user's
file and as the administrator's, for client and daemon: as bytes, and as TOML made of what stands in
real ones.
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from dgcache_core.errors import SettingsError
from dgcache_core.settings import ClientSettings, DaemonSettings, as_text
from dgcache_core.settings_files import TABLES, read_settings

from .structure import Choices
from .worlds import lasting, open_descriptors, require_descriptors

NAMES = sorted({name for names in TABLES.values() for name in names})
WORDS = [
    *(name.encode() for name in NAMES),
    *(b"[client]\n", b"[daemon]\n", b"[limits]\n", b"[[daemon]]\n", b"[client.daemon]\n"),
    *(b"encryption_key", b"DG_NO_CACHE", b"true", b"false", b"inf", b"-nan", b"1e308", b"0.5"),
    *(b"512", b"-1", b"0x", b"f" * 64, b"9" * 64, b"0o7", b"1979-05-27T07:32:00Z", b"07:32:00"),
    *(b'"/tmp/x"', b'"~nobody/x"', b'"~/x"', b'"memory"', b'"\\u0000"', b'"""', b"'''", b"''"),
    *(b"=", b" = ", b"\n", b".", b",", b"[", b"]", b"{", b"}", b"#", b" ", b"\r\n", b'"', b"\\"),
    *("é".encode(), b"\xff", b"\0", b"\xef\xbb\xbf", b"{a=1}", b"[1,[2]]", b"a.b.c=1\n"),
]
SECTIONS = [b"client", b"daemon", b"limits", b"client.x", b"[daemon]", b"other"]
KEYS = [*(name.encode() for name in NAMES), b"limits", b"a.b", b'""', b"encryption_key"]
VALUES = [word for word in WORDS if word[-1:].isalnum() or word.startswith((b'"/', b'"~', b'"m'))]
VALUES += [b"0b", b"9", b'"', b"1e999", b"-0.0", b"1_000"]
LENGTHS = (1, 8, 64, 1024, 4299, 4301, 20_000)


def run(data: bytes) -> None:
    """Hold the invariant for one input."""
    choices = Choices(data)
    is_users = choices.below(2)
    content = choices.of((Choices.rest, _made_of_words, _made_of_assignments))(choices)
    system_file, users_file = lasting(_files)
    for path in (system_file, users_file):
        path.write_bytes(content if (path == users_file) == bool(is_users) else b"")
    environ = {"XDG_CONFIG_HOME": str(users_file.parents[1])}
    for kind in (ClientSettings, DaemonSettings):
        before = open_descriptors()
        with suppress(SettingsError):
            _require_sound(kind, environ, system_file)
        require_descriptors(before)


def _require_sound(
    kind: type[ClientSettings] | type[DaemonSettings], environ: dict[str, str], system_file: Path
) -> None:
    resolved = read_settings(kind, environ, {}, system_file)
    replace(resolved.settings)  # checks every field once more
    for name in resolved.origins:
        value = getattr(resolved.settings, name)
        assert as_text(name, value)
        if isinstance(value, float):
            assert math.isfinite(value)
    for name, (ceiling, _) in resolved.ceilings.items():
        value = getattr(resolved.settings, name)
        assert value is None or value <= ceiling


def _made_of_words(choices: Choices) -> bytes:
    words = []
    while choices:
        which = choices.below(256)
        if which < 4:
            words.append(choices.take(choices.below(16)))
        elif which < 8:
            words.append(choices.of(WORDS) * choices.number(2))
        else:
            words.append(WORDS[which % len(WORDS)])
    return b"".join(words)[:70_000]


def _made_of_assignments(choices: Choices) -> bytes:
    """Return what parses, so that the checks behind the parser are reached."""
    lines = []
    while choices:
        if choices.below(4) == 3:
            lines.append(b"[" + choices.of(SECTIONS) + b"]")
        else:
            lines.append(choices.of(KEYS) + b"=" + _made_value(choices))
    return b"\n".join(lines)[:70_000]


def _made_value(choices: Choices) -> bytes:
    value = choices.of(VALUES)
    if value in (b"0x", b"0b"):
        value += b"1" * choices.of(LENGTHS)
    elif value == b"9":
        value *= choices.of(LENGTHS)
    elif value == b'"':
        value = b'"/' + choices.take(choices.below(8)).hex().encode() * choices.of(LENGTHS) + b'"'
    around = choices.below(8)
    return (value, b"[" + value + b"]", b"{a=" + value + b"}")[max(0, around - 5)]


@contextmanager
def _files() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory(prefix="dgf-") as directory:
        system_file = Path(directory).resolve() / "config.toml"
        users_file = system_file.parent / "dg-cached" / "config.toml"
        users_file.parent.mkdir(mode=0o700)
        for path in (system_file, users_file):
            path.touch(mode=0o600)
        yield system_file, users_file
