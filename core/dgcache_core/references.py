"""How references are named: by the SHA-256 of their bytes, and by the deltaspaces they serve.

Both names come from outside, so both are checked here, once, before anything else sees them.
"""

import re
from dataclasses import dataclass
from typing import NewType

from dgcache_core.errors import InvalidReferenceError

Sha256 = NewType("Sha256", str)
"""64 lower-case hexadecimal digits."""

MAX_BUCKET_BYTES = 255
"""S3 names buckets in 3-63 characters; names of the first years had up to 255 (Amazon S3 User
Guide, "Bucket naming rules")."""

MAX_PREFIX_BYTES = 1024
"""The longest object key in S3, in bytes of UTF-8 (Amazon S3 User Guide, "Object key naming")."""

_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")


def parse_sha256(text: str) -> Sha256:
    """Return the digest in lower case.

    Raises:
        InvalidReferenceError: it is not exactly 64 hexadecimal digits.
    """
    if not isinstance(text, str):
        raise InvalidReferenceError(f"a digest is a string, not {type(text).__name__}")
    folded = text.lower()
    if not _HEX_SHA256.fullmatch(folded):
        raise InvalidReferenceError(
            f"a SHA-256 digest has 64 hexadecimal digits, got {_abridged(text)}"
        )
    return Sha256(folded)


@dataclass(frozen=True, slots=True, order=True)
class Deltaspace:
    """Where a reference belongs: a bucket and a prefix, which may be empty.

    Raises:
        InvalidReferenceError: the bucket is empty, or either name is too long, holds NUL, or is
            not valid Unicode.
    """

    bucket: str
    prefix: str

    def __post_init__(self) -> None:
        if not self.bucket:
            raise InvalidReferenceError("the bucket's name is empty")
        _check_name("bucket", self.bucket, MAX_BUCKET_BYTES)
        _check_name("prefix", self.prefix, MAX_PREFIX_BYTES)

    def __str__(self) -> str:
        return f"{self.bucket}/{self.prefix}" if self.prefix else self.bucket


def parse_deltaspace(text: str) -> Deltaspace:
    """Return the deltaspace that `s3://bucket/prefix` or `bucket/prefix` names.

    Slashes at the end of the prefix are dropped, as DeltaGlider does.

    Raises:
        InvalidReferenceError: as `Deltaspace`.
    """
    bucket, _, prefix = text.removeprefix("s3://").partition("/")
    return Deltaspace(bucket, prefix.rstrip("/"))


def _check_name(what: str, name: str, max_bytes: int) -> None:
    if not isinstance(name, str):
        raise InvalidReferenceError(f"a {what} is a string, not {type(name).__name__}")
    if len(name) > max_bytes:  # before encoding: a name of a gigabyte is not worth a copy
        raise InvalidReferenceError(f"the {what} is longer than {max_bytes} bytes")
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise InvalidReferenceError(f"the {what} is not valid Unicode") from error
    if len(encoded) > max_bytes:
        raise InvalidReferenceError(f"the {what} is longer than {max_bytes} bytes")
    if "\0" in name:
        raise InvalidReferenceError(f"the {what} holds a NUL character")


def _abridged(text: str) -> str:
    shown = text if len(text) <= 72 else text[:69] + "..."
    return f"{len(text)} characters: {shown!r}"
