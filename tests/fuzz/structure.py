"""Bytes read as choices. Any bytes will do; where they end, every further choice is the first.

(atheris has a FuzzedDataProvider of the kind, but what was found must mean the same without it.)
"""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

EXTREMES = (0, 1, 2, 2**7, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


class Choices:
    """A position in some bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        piece = self._data[self._at : self._at + count]
        self._at += len(piece)
        return piece

    def number(self, count: int = 2) -> int:
        """Return a number of so many bytes."""
        return int.from_bytes(self.take(count))

    def below(self, bound: int) -> int:
        """Return a number from 0 to below `bound`, which is at most 2^16; 0 where there is none."""
        return self.number(1 if bound <= 256 else 2) % max(1, bound)

    def of(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[self.below(len(options))]

    def extreme(self) -> int:
        """Return a number of 64 bits, often one at the end of a range."""
        which = self.below(16)
        return EXTREMES[which] if which < len(EXTREMES) else self.number(8)

    def piece(self) -> bytes:
        """Return some bytes, whose length comes first."""
        return self.take(self.number(2))

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(len(self._data))

    def __bool__(self) -> bool:
        return self._at < len(self._data)


def edited(original: bytes, choices: Choices, others: Sequence[bytes] = ()) -> bytes:
    """Return the bytes after what an attacker may do to them, as long as there are choices."""
    data = bytearray(original)
    while choices:
        action, at = choices.below(7), choices.below(len(data) + 1)
        if action == 0 and at < len(data):
            data[at] ^= choices.number(1)
        elif action == 1:
            piece = choices.take(choices.below(32))
            data[at : at + len(piece)] = piece
        elif action == 2:
            data[at:at] = choices.take(choices.below(64))
        elif action == 3:
            del data[at : at + choices.below(1024)]
        elif action == 4:
            del data[at:]
        elif action == 5:
            start, length = choices.below(len(data) + 1), choices.below(256)
            data[at : at + length] = data[start : start + length]
        elif others:
            other = choices.of(others)
            start, length = choices.below(len(other) + 1), choices.number(2)
            data[at : at + length] = other[start : start + length]
    return bytes(data)
