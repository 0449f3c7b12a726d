"""Names come from outside: a digest, a bucket, a prefix, each refused before anything sees it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgcache_core.errors import InvalidReferenceError
from dgcache_core.references import Deltaspace, parse_deltaspace, parse_sha256

from .support import DETERMINISTIC

DIGEST = "0123456789abcdef" * 4
MEBIBYTE_OF_TEXT = "a" * (1 << 20)


def test_a_digest_is_64_hexadecimal_digits() -> None:
    """A digest in lower case comes back as it is."""
    assert parse_sha256(DIGEST) == DIGEST


def test_a_digest_in_upper_case_is_folded() -> None:
    """Upper and mixed case name the same reference as lower case."""
    assert parse_sha256(DIGEST.upper()) == DIGEST
    assert parse_sha256(DIGEST[:32].upper() + DIGEST[32:]) == DIGEST


@pytest.mark.parametrize(
    "text",
    [
        "",
        DIGEST[:-1],
        DIGEST + "0",
        "g" + DIGEST[1:],
        "0x" + DIGEST[2:],
        " " + DIGEST[1:],
        DIGEST + "\n",
        "\0" + DIGEST[1:],
        "fakehash",
        "\N{FULLWIDTH DIGIT ONE}" + DIGEST[1:],
        "\N{ARABIC-INDIC DIGIT ONE}" * 64,
        "\N{FULLWIDTH LATIN SMALL LETTER A}" * 64,
        "\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}" * 32,
        "\ud800" * 64,
        MEBIBYTE_OF_TEXT,
    ],
    ids=lambda text: ascii(text)[:16],
)
def test_any_other_digest_is_refused(text: str) -> None:
    """Wrong length, other characters, other scripts' digits: refused, and the message is short."""
    with pytest.raises(InvalidReferenceError, match="64 hexadecimal digits") as refusal:
        parse_sha256(text)
    assert len(str(refusal.value)) < 700
    assert str(len(text)) in str(refusal.value)


@pytest.mark.parametrize("other", [None, 7, DIGEST.encode(), [DIGEST]])
def test_a_digest_that_is_no_string_is_refused(other: object) -> None:
    """What is no string is refused as the caller's mistake, not as a bug of ours."""
    with pytest.raises(InvalidReferenceError, match="a digest is a string"):
        parse_sha256(other)  # type: ignore[arg-type] # that is the test


@DETERMINISTIC
@given(st.text(max_size=70))
def test_a_digest_is_parsed_or_refused(text: str) -> None:
    """Whatever text comes, the answer is 64 lower-case digits of it or InvalidReferenceError."""
    try:
        parsed = parse_sha256(text)
    except InvalidReferenceError:
        return
    assert len(parsed) == 64
    assert set(parsed) <= set("0123456789abcdef")
    assert parsed == text.lower()


@pytest.mark.parametrize(
    ("bucket", "prefix"),
    [
        ("b", ""),
        ("b" * 255, ""),
        ("b", "p" * 1024),
        ("b", "é" * 512),
        ("é" * 127 + "b", ""),
        ("b", "a/b//c "),
        ("b", "\N{SNOWMAN}"),
    ],
    ids=lambda name: ascii(name)[:12],
)
def test_names_up_to_the_limits_of_s3_are_accepted(bucket: str, prefix: str) -> None:
    """255 bytes of bucket and 1024 bytes of prefix, in UTF-8; the prefix may be empty."""
    deltaspace = Deltaspace(bucket, prefix)
    assert (deltaspace.bucket, deltaspace.prefix) == (bucket, prefix)


@pytest.mark.parametrize(
    ("bucket", "prefix", "says"),
    [
        ("", "p", "bucket's name is empty"),
        ("b" * 256, "", "bucket is longer than 255 bytes"),
        ("é" * 128, "", "bucket is longer than 255 bytes"),
        ("b", "p" * 1025, "prefix is longer than 1024 bytes"),
        ("b", "é" * 512 + "p", "prefix is longer than 1024 bytes"),
        (MEBIBYTE_OF_TEXT, "", "bucket is longer than 255 bytes"),
        ("b", MEBIBYTE_OF_TEXT, "prefix is longer than 1024 bytes"),
        ("b\0", "", "bucket holds a NUL"),
        ("b", "p\0q", "prefix holds a NUL"),
        ("\ud800", "", "bucket is not valid Unicode"),
        ("b", "\udcff", "prefix is not valid Unicode"),
        (7, "", "bucket is a string"),
        ("b", b"p", "prefix is a string"),
        ("b", None, "prefix is a string"),
    ],
    ids=lambda name: ascii(name)[:12],
)
def test_any_other_name_is_refused(bucket: str, prefix: str, says: str) -> None:
    """Empty, too long, NUL, a lone surrogate, no string: refused, and the message names which."""
    with pytest.raises(InvalidReferenceError, match=says) as refusal:
        Deltaspace(bucket, prefix)
    assert len(str(refusal.value)) < 100


@pytest.mark.parametrize(
    ("text", "bucket", "prefix"),
    [
        ("s3://b/p/q", "b", "p/q"),
        ("b/p/q", "b", "p/q"),
        ("s3://b", "b", ""),
        ("s3://b/", "b", ""),
        ("b/p/", "b", "p"),
        ("b/p///", "b", "p"),
        ("b//p", "b", "/p"),
    ],
)
def test_a_deltaspace_is_read_with_or_without_its_scheme(
    text: str, bucket: str, prefix: str
) -> None:
    """`s3://bucket/prefix` and `bucket/prefix` are the same; slashes at the end are dropped."""
    assert parse_deltaspace(text) == Deltaspace(bucket, prefix)


@pytest.mark.parametrize("text", ["", "s3://", "/p", "s3:///p", "b/\0", "b/" + MEBIBYTE_OF_TEXT])
def test_a_deltaspace_without_a_proper_bucket_or_prefix_is_refused(text: str) -> None:
    """Text that names no bucket, or names that do not pass, is refused."""
    with pytest.raises(InvalidReferenceError):
        parse_deltaspace(text)


@pytest.mark.parametrize("text", ["b", "b/p", "b/p/q"])
def test_a_deltaspace_is_written_as_it_is_read(text: str) -> None:
    """str() of a deltaspace reads as the same deltaspace."""
    assert str(parse_deltaspace(text)) == text
    assert parse_deltaspace(str(parse_deltaspace(text))) == parse_deltaspace(text)
