"""What the documents say is so: commands exist, help is current, names and links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dgcache import Settings
from dgcache.testing import running_daemon
from dgcache_cli.main import make_parser
from dgcache_core.settings import DaemonSettings, declared
from dgcache_core.settings_files import read_settings

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], key=str)
README = (ROOT / "README.md").read_text()


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def console_lines() -> list[tuple[str, str]]:
    """Return every line of every console block, with its document."""
    return [
        (path.name, line.split("   #")[0].strip())
        for path in DOCUMENTS
        for block in blocks(path.read_text(), "console")
        for line in block.splitlines()
        if line.strip()
    ]


def test_the_help_in_the_readme_is_the_program_s() -> None:
    """Word for word; Python 3.13 sets the columns otherwise than 3.11."""
    done = subprocess.run(
        [sys.executable, "-m", "dgcache_cli", "--help"],
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() in [block.split() for block in blocks(README, "text")]


def test_every_dg_cache_command_in_the_documents_parses() -> None:
    """With its options, as the parser of the program sees it."""
    parser = make_parser()
    seen = set()
    for name, line in console_lines():
        words = shlex.split(line)
        if words[0] != "dg-cache":
            continue
        digest = ["0" * 64 if word == "SHA256" else word for word in words[1:]]
        parser.parse_args(digest)
        seen.add((name, words[1]))
    assert ("README.md", "get") in seen
    assert ("README.md", "deltaglider") in seen


def test_every_make_target_in_the_documents_exists() -> None:
    """make -n knows it."""
    targets = {
        word
        for _, line in console_lines()
        if "make " in line
        for word in line.split("make ", 1)[1].split("   ")[0].split()[:1]
        if "=" not in word
    }
    assert {"demo", "test", "lint", "proto"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    "program",
    [block for block in blocks(README, "python") if "deltaglider" not in block],
    ids=lambda block: block.splitlines()[0],
)
def test_the_python_in_the_readme_runs(program: str, tmp_path: Path) -> None:
    """As it stands, against a daemon."""
    with running_daemon() as settings:
        subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            env={**os.environ, "DG_CACHE_SOCKET_DIR": str(settings.socket_dir)},
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )


def test_every_setting_is_in_the_readme_with_its_default() -> None:
    """No more and no fewer than the program has."""
    rows = dict(re.findall(r"^\| `(DG_\w+)` \| `?([^|`]+)`? \|", README, re.MULTILINE))
    known = {**declared(DaemonSettings), **declared(Settings)}
    variables = {one.variable for one in known.values()}
    assert variables == {*rows, "DG_CACHE_SOCKET_DIR"}
    for field, one in declared(Settings).items():
        default = getattr(Settings(), field)
        if default is not None:
            shown = str(default).lower() if isinstance(default, bool) else str(default)
            assert rows[one.variable].strip() == shown


def test_the_settings_file_in_the_readme_is_accepted(short_directory: Path) -> None:
    """By both parties, as it stands, where [limits] may stand."""
    [text] = blocks(README, "toml")
    file = short_directory.resolve() / "config.toml"
    file.write_text(text)
    file.chmod(0o600)
    daemon = read_settings(DaemonSettings, {}, {}, file).settings
    assert (daemon.memory_size_mb, daemon.ttl_seconds) == (1024, 43200)
    assert read_settings(Settings, {}, {}, file).settings.fallback_size_mb == 256


@pytest.mark.parametrize("document", ["SECURITY.md", "docs/roadmap.md"])
def test_every_test_named_as_a_proof_exists(document: str) -> None:
    """They name files and functions."""
    named = re.findall(r"tests/[\w/]+\.py(?:::\w+)?", (ROOT / document).read_text())
    assert len(named) >= 10
    for name in named:
        path, _, function = name.partition("::")
        assert (ROOT / path).is_file(), name
        assert f"def {function}" in (ROOT / path).read_text(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    """Relative links name files that are there."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target
