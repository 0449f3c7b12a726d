"""Every target holds for what was kept of earlier searches, and for a few inputs made of that."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from dgcache.session import Session
from dgcache_core import aead, settings_files

from . import TARGETS, worlds
from .corpus import HERE, corpus_of, crashes_of, seeds_of
from .mutation import mutated

COUNTS = {
    "session_packets": 400,
    "entry": 2000,
    "disk_files": 300,
    "settings_file": 600,
    "rpc": 150,
}
"""A few seconds each, on a machine that has other things to do."""
MOST_CORPUS_BYTES = 200_000


@pytest.fixture(scope="module", autouse=True)
def _worlds_end() -> Iterator[None]:
    yield
    worlds.end()


def target(name: str) -> Callable[[bytes], None]:
    """Return a target's `run`."""
    run: Callable[[bytes], None] = import_module(f"tests.fuzz.{name}").run
    return run


def kept(name: str) -> list[bytes]:
    """Return what earlier searches left, which is the same at every run."""
    return [path.read_bytes() for of in (crashes_of, seeds_of, corpus_of) for path in of(name)]


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_begins_with_its_invariant(name: str) -> None:
    """Its first line is one sentence, so that a finding can be judged by it."""
    first = str(import_module(f"tests.fuzz.{name}").__doc__).splitlines()[0]
    assert first.startswith("Whatever ")
    assert first.endswith(".")


@pytest.mark.parametrize(
    "path",
    [path for name in TARGETS for path in crashes_of(name)],
    ids=lambda path: f"{path.parent.name}-{path.name}",
)
def test_what_once_broke_a_target_does_so_no_more(path: Path) -> None:
    """Every crash that was ever found is here."""
    target(path.parent.name)(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_holds(name: str) -> None:
    """The inputs that together reach what a search has reached."""
    run = target(name)
    assert len(corpus_of(name)) >= 5
    for data in kept(name):
        run(data)


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_made_of_the_corpus_hold(name: str) -> None:
    """The same ones at every run."""
    run = target(name)
    for data in mutated(kept(name), COUNTS[name], name):
        run(data)


def opens_without_check(
    key: memoryview, nonce: bytes, sealed: memoryview, associated: bytes, out: memoryview
) -> None:
    """AES-GCM with its tag ignored: counter mode from 2 on (NIST SP 800-38D, 7.2)."""
    counter = modes.CTR(nonce + (2).to_bytes(4))
    out[:] = Cipher(algorithms.AES(bytes(key)), counter).decryptor().update(bytes(sealed[:-16]))


MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "entry": (aead, "_decrypt_into", opens_without_check),
    "disk_files": (aead, "_decrypt_into", opens_without_check),
    "settings_file": (settings_files, "_table", lambda _, document, name: document.get(name, {})),
    "session_packets": (Session, "close", lambda self: self._connection.close()),
}
"""Of each target that works in this process, one that its invariant forbids."""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_target_finds_a_mistake(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is planted, and one of the inputs above shows it."""
    run = target(name)
    run(b"")  # what it needs is made without the mistake
    monkeypatch.setattr(*MISTAKES[name])

    def search() -> None:
        for data in (*kept(name), *mutated(kept(name), COUNTS[name], name)):
            run(data)

    with pytest.raises(Exception, match=r"(?s).*"):
        search()


def test_the_corpus_stays_small() -> None:
    """It travels with every clone."""
    files = [path for path in (HERE / "corpus").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_CORPUS_BYTES


def test_nothing_here_needs_atheris() -> None:
    """Only `search` imports it, and only `make fuzz` runs that."""
    program = "import sys; sys.modules['atheris'] = None; import tests.fuzz.test_fuzz as t\n"
    program += "for name in t.TARGETS: t.target(name)"
    subprocess.run([sys.executable, "-c", program], cwd=HERE.parents[1], check=True)
