"""A key is taken in the forms people make it in, and nothing prints it."""

import base64
import copy
import dataclasses
import os
import pickle
import subprocess
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgcache_core.errors import SettingsError
from dgcache_core.secret import SecretKey, parse_key, parse_key_file
from dgcache_core.settings import DaemonSettings, as_text, resolve

from .support import DETERMINISTIC

KEY = bytes(range(0xE0, 0x100))
"""In base64 it has characters of both alphabets."""
STANDARD, URL_SAFE = base64.b64encode(KEY).decode(), base64.urlsafe_b64encode(KEY).decode()


def test_the_two_alphabets_are_told_apart_here() -> None:
    """Or the tests below would show nothing."""
    assert set("+/") & set(STANDARD)
    assert set("-_") & set(URL_SAFE)


@pytest.mark.parametrize("text", [STANDARD, URL_SAFE, STANDARD[:-1], f"  {URL_SAFE}\r\n"])
def test_a_key_is_read_in_either_alphabet(text: str) -> None:
    """With or without padding, with white space around."""
    assert parse_key(text).view() == KEY
    assert parse_key_file(text.encode()).view() == KEY


def test_what_openssl_makes_is_a_key() -> None:
    """`openssl rand -base64 32`, as DeltaGlider's documents say, with its line end."""
    made = subprocess.run(["openssl", "rand", "-base64", "32"], capture_output=True, check=True)
    assert parse_key_file(made.stdout).view() == base64.b64decode(made.stdout)
    assert parse_key(made.stdout.decode()).view() == base64.b64decode(made.stdout)


@DETERMINISTIC
@given(st.binary(min_size=32, max_size=32))
def test_every_key_survives_both_alphabets(key: bytes) -> None:
    """Also those whose text has no character that differs."""
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        assert parse_key(encode(key).decode()).view() == key


def test_a_file_may_hold_32_bytes_as_they_are() -> None:
    """No printable text: that is a password, or half a key in hexadecimal digits."""
    raw = bytes(31) + b"x"
    assert parse_key_file(raw).view() == raw
    for weak in (b"p" * 32, b"0123456789abcdef" * 2):
        with pytest.raises(ValueError, match="must be 32 bytes in base64"):
            parse_key_file(weak)


WRONG = {
    "empty": "",
    "31 bytes": base64.b64encode(KEY[1:]).decode(),
    "33 bytes": base64.b64encode(KEY + b"x").decode(),
    "hexadecimal": KEY.hex(),
    "mixed alphabets": "+_" + STANDARD[2:],
    "inner space": STANDARD[:20] + " " + STANDARD[20:],
    "another character": "!" + STANDARD[1:],
    "beyond ASCII": "é" + STANDARD[1:],
    "stray bits": STANDARD[:-2] + chr(ord(STANDARD[-2]) + 1) + "=",
    "two paddings": STANDARD + "=",
    "padding within": STANDARD[:20] + "=" + STANDARD[20:],
    "a NUL": STANDARD[:-1] + "\0",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_any_other_text_is_refused_without_being_shown(text: str) -> None:
    """By the variable's name, with how to make a key; the traceback does not hold it either."""
    for read in (parse_key, lambda text: parse_key_file(text.encode())):
        with pytest.raises(ValueError, match="must be 32 bytes in base64") as wrong:
            read(text)
        shown = "".join(traceback.format_exception(wrong.value))
        assert not text or text[:12] not in shown
    if text and "\0" not in text:
        with pytest.raises(SettingsError, match=r"DG_CACHE_ENCRYPTION_KEY: .* openssl") as refused:
            resolve(DaemonSettings, {"DG_CACHE_ENCRYPTION_KEY": text}, {})
        assert text[:12] not in "".join(traceback.format_exception(refused.value))


def test_a_key_of_the_wrong_type_is_refused_without_being_shown() -> None:
    """Somebody may pass the text instead of a `SecretKey`."""
    with pytest.raises(SettingsError, match=r"`encryption_key`.*must be a key") as refused:
        DaemonSettings(encryption_key=STANDARD)  # type: ignore[arg-type] # that is the test
    assert STANDARD[:12] not in str(refused.value)


def test_nothing_prints_copies_or_pickles_a_key() -> None:
    """repr, str, format, of the settings as well; a deep copy is the same object."""
    key = SecretKey(KEY)
    settings = DaemonSettings(encryption_key=key)
    for text in (repr(key), str(key), f"{key}", repr(settings), as_text("encryption_key", key)):
        for form in (STANDARD[:12], URL_SAFE[:12], KEY.hex()[:12], repr(KEY)[2:20]):
            assert form not in text
    assert repr(key) == "<SecretKey, 32 bytes>"
    assert copy.copy(key) is key
    assert dataclasses.asdict(settings)["encryption_key"] is key
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(key)
    assert not hasattr(key, "__dict__")


def test_a_wiped_key_is_zero_and_is_not_used() -> None:
    """What still looks at it sees zeros; who asks for it is refused."""
    key = SecretKey(KEY)
    view = key.view()
    assert view.readonly
    key.wipe()
    key.wipe()
    assert bytes(view) == bytes(32)
    with pytest.raises(ValueError, match="wiped"):
        key.view()


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_has_32_bytes(size: int) -> None:
    """Whoever makes it."""
    with pytest.raises(ValueError, match="32 bytes"):
        SecretKey(os.urandom(size))
