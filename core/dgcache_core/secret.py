"""A key from outside: 32 bytes that nothing prints, copies or pickles.

Whoever is given a `SecretKey` uses it through `view` and wipes it when it is needed no longer. What
the interpreter copied on the way (the text of a variable, a decoder's result) is freed, not wiped.
"""

from typing import NoReturn, Self

KEY_BYTES = 32
ACCEPTED = "must be 32 bytes in base64, 44 characters: make one with openssl rand -base64 32"

_URL_SAFE = str.maketrans("-_", "+/")


class SecretKey:
    """Key material of 32 bytes; its text is always the same."""

    __slots__ = ("_bytes",)

    def __init__(self, key: bytes | bytearray | memoryview) -> None:
        """Copy the key; the caller wipes its own.

        Raises:
            ValueError: it has not 32 bytes. The message does not hold it.
        """
        if len(key) != KEY_BYTES:
            raise ValueError(ACCEPTED)
        self._bytes = bytearray(key)

    def view(self) -> memoryview:
        """Return the bytes, read-only. `wipe` zeroes what every view shows.

        Raises:
            ValueError: the key was wiped; a key of zeros is never used.
        """
        if not self._bytes:
            raise ValueError("the key was wiped")
        return memoryview(self._bytes).toreadonly()

    def wipe(self) -> None:
        """Zero the bytes; twice is fine."""
        self._bytes[:] = bytes(len(self._bytes))
        self._bytes = bytearray()

    def __repr__(self) -> str:
        return f"<SecretKey, {len(self._bytes)} bytes>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is not pickled")


def parse_key(text: str) -> SecretKey:
    """Read a key in base64, in the standard alphabet or the URL-safe one, spaces around it aside.

    Raises:
        ValueError: wrong length or alphabet. The message does not hold the text.
    """
    import binascii  # most readers of settings have no key

    plain = text.strip()
    if not ("+" in plain or "/" in plain):
        plain = plain.translate(_URL_SAFE)
    if len(plain) == 43:
        plain += "="
    try:
        key = binascii.a2b_base64(plain, strict_mode=True)
    except ValueError:  # binascii.Error, and characters beyond ASCII
        raise ValueError(f"{ACCEPTED}; this has other characters, or not as many") from None
    if len(key) != KEY_BYTES:
        raise ValueError(f"{ACCEPTED}; this has {len(text.strip())}")
    if binascii.b2a_base64(key, newline=False).decode() != plain:
        raise ValueError(f"{ACCEPTED}; the last character of this holds more than the 32 bytes")
    return SecretKey(key)


def parse_key_file(content: bytes) -> SecretKey:
    """Read what a key file holds: base64, or 32 bytes as they are.

    Raises:
        ValueError: it is neither. 32 printable characters are a password, not a key.
    """
    if len(content) == KEY_BYTES and not all(0x20 <= byte < 0x7F for byte in content):
        return SecretKey(content)
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError:
        raise ValueError(f"{ACCEPTED}; this is neither that nor 32 bytes as they are") from None
    return parse_key(text)
