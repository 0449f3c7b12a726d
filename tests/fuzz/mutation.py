"""Inputs made of others, the same at every run: for the test suite, which has no atheris."""

import random
from collections.abc import Iterator

MOST_BYTES = 2048
_INTERESTING = [
    b"\0",
    b"\1",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\0\0\0\0",
    b"\xff" * 8,
    b"\x80" + bytes(7),
]


def mutated(seeds: list[bytes], count: int, seed: str) -> Iterator[bytes]:
    """Yield so many inputs, each a seed changed a few times, or random bytes."""
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(chance.choice(seeds) if seeds and chance.random() < 0.9 else b"")
        if not data:
            data += chance.randbytes(chance.randrange(64))
        for _ in range(chance.randrange(1, 5)):
            _change(data, chance, seeds)
        yield bytes(data[:MOST_BYTES])


def _change(data: bytearray, chance: random.Random, seeds: list[bytes]) -> None:
    at = chance.randrange(len(data) + 1)
    length = chance.randrange(1, 17)
    how = chance.randrange(6)
    if how == 0 and at < len(data):
        data[at] = chance.randrange(256)
    elif how == 1:
        data[at:at] = chance.randbytes(length)
    elif how == 2:
        del data[at : at + length]
    elif how == 3:
        piece = chance.choice(_INTERESTING)
        data[at : at + len(piece)] = piece
    elif how == 4 and seeds:
        other = chance.choice(seeds)
        start = chance.randrange(len(other) + 1)
        data[at:] = other[start:]
    else:
        data[at:at] = data[at : at + length]
