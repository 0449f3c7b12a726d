"""References made from a seed alone, so that every process knows each byte that is right.

Every 4 KiB of a reference begins with 64 bytes of its own, which begin with 16 of this run: whoever
searches a disk for those finds what was left of any reference, whatever its offset in a file.
Run as `python -m tests.soak.truth SEED NUMBER` it is the source that others fetch from.
"""

import hashlib
import random
import sys
from dataclasses import dataclass
from functools import cached_property

BLOCK_BYTES = 4096
SAMPLE_BYTES = 64
MARK_BYTES = 16
KIB, MIB = 1 << 10, 1 << 20

# the lengths where chunks begin and end, small ones of a job, and some that make room scarce
_EDGES = (0, 1, 4096, MIB - 1, MIB, MIB + 1)
_LARGE = (2 * MIB + 17, 3 * MIB, 4 * MIB - 1, 6 * MIB + 5)
_SMALL = 30


@dataclass(frozen=True)
class Truth:
    """What is right in the run of one seed."""

    seed: int

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The length of each reference."""
        chance = random.Random(f"{self.seed}/sizes")
        small = tuple(chance.randint(2 * KIB, 900 * KIB) for _ in range(_SMALL))
        return (*_EDGES, *_LARGE, *small)

    @cached_property
    def mark(self) -> bytes:
        """What every sample of this run begins with."""
        return hashlib.sha512(b"soak %d" % self.seed).digest()[:MARK_BYTES]

    def sample(self, number: int) -> bytes:
        """Return the 64 bytes that every block of a reference begins with."""
        own = hashlib.sha512(b"soak %d %d" % (self.seed, number)).digest()
        return self.mark + own[: SAMPLE_BYTES - MARK_BYTES]

    def data(self, number: int) -> bytes:
        """Return a reference's bytes."""
        size, sample = self.sizes[number], self.sample(number)
        data = bytearray(random.Random(f"{self.seed}/{number}").randbytes(size))
        for at in range(0, size - SAMPLE_BYTES + 1, BLOCK_BYTES):
            data[at : at + SAMPLE_BYTES] = sample
        return bytes(data)

    def digests(self) -> list[str]:
        """Return the digest of each reference."""
        return [hashlib.sha256(self.data(number)).hexdigest() for number in range(len(self.sizes))]


def space(number: int) -> tuple[str, str]:
    """Return the bucket and prefix where a reference belongs; some share one."""
    return f"soak-{number % 3}", f"releases/{number % 20}"


if __name__ == "__main__":
    sys.stdout.buffer.write(Truth(int(sys.argv[1])).data(int(sys.argv[2])))
