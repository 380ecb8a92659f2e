"""CBOR: RFC 8949 Appendix A (accepted, refused, round trip), and what a strict reader must not accept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordlib import cbor
from coordlib.errors import ProtocolError, RemoteProtocolError

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "wire/vectors/cbor_appendix_a.json").read_text()
)

fuzz = settings(derandomize=True, deadline=None, max_examples=300)


def same(left: object, right: object) -> bool:
    """Equal, of the same type, and with the same sign of zero."""
    return repr(left) == repr(right)


@pytest.mark.parametrize(("encoded", "value"), VECTORS["values"])
def test_appendix_a_values_are_read_and_written_back_to_the_same_bytes(encoded: str, value: object) -> None:
    """RFC 8949 Appendix A, the part that we use: both directions."""
    decoded = cbor.decode(bytes.fromhex(encoded))
    assert same(value, decoded)
    assert encoded == cbor.encode_canonical(decoded).hex()


@pytest.mark.parametrize(("encoded", "value"), VECTORS["special_floats"])
def test_appendix_a_infinities_and_nans_are_read(encoded: str, value: str) -> None:
    """They are numbers to CBOR; whether a field may hold them is for its schema to say."""
    assert same(float(value), cbor.decode(bytes.fromhex(encoded)))


@pytest.mark.parametrize(("encoded", "value"), VECTORS["byte_strings"])
def test_appendix_a_byte_strings_are_read_and_written(encoded: str, value: str) -> None:
    """Bytes stay bytes."""
    assert cbor.decode(bytes.fromhex(encoded)) == bytes.fromhex(value)
    assert encoded == cbor.encode(bytes.fromhex(value)).hex()


@pytest.mark.parametrize("encoded", VECTORS["integer_keys"])
def test_appendix_a_integer_keys_are_read(encoded: str) -> None:
    """COSE headers are such maps."""
    assert cbor.decode(bytes.fromhex(encoded)) == {1: 2, 3: 4}


@pytest.mark.parametrize("encoded", VECTORS["tags"] + VECTORS["indefinite"])
def test_appendix_a_tags_and_indefinite_lengths_are_refused(encoded: str) -> None:
    """Well-formed, but nothing that a node of ours writes."""
    with pytest.raises(cbor.CBORError):
        cbor.decode(bytes.fromhex(encoded))


@pytest.mark.parametrize("encoded", VECTORS["simple_values"])
def test_simple_values_come_out_as_types_that_no_schema_names(encoded: str) -> None:
    """The reader leaves them to the schema: they must not look like None, a bool, a number, text or bytes."""
    value = cbor.decode(bytes.fromhex(encoded))
    assert type(value) in (cbor2.CBORSimpleValue, type(cbor2.undefined))


def tag_head(tag: int) -> bytes:
    if tag < 24:
        return bytes((0xC0 | tag,))
    for first, size in ((0xD8, 1), (0xD9, 2), (0xDA, 4)):
        if tag < 1 << 8 * size:
            return bytes((first,)) + tag.to_bytes(size, "big")
    raise AssertionError(tag)


def test_no_tag_up_to_70000_is_accepted() -> None:
    """The list of tags that cbor2 decodes by itself is complete for the version that is installed."""
    decode = cbor.decode
    accepted = []
    for tag in range(70_001):
        try:
            decode(tag_head(tag) + b"\x00")
        except cbor.CBORError:
            continue
        accepted.append(tag)
    assert accepted == []


@pytest.mark.parametrize("tag", cbor._BUILTIN_TAGS)
@pytest.mark.parametrize("content", ["00", "6161", "4101", "80", "820101", "a0", "f6", "c000"])
def test_tags_that_cbor2_knows_are_refused_whatever_they_hold(tag: int, content: str) -> None:
    """Neither a shared reference nor a regular expression nor a big number is ever built from the content."""
    for wrapped in (b"", b"\x81", b"\xa1\x00"):
        with pytest.raises(cbor.CBORError, match="semantic tag"):
            cbor.decode(wrapped + tag_head(tag) + bytes.fromhex(content))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("", "empty"),
        ("0102", "trailing byte"),
        ("a2010201f6", "duplicate integer key"),
        ("a2616101616102", "duplicate text key"),
        ("62c328", "not UTF-8"),
        ("1c", "reserved additional information"),
        ("ff", "break without a beginning"),
        ("5bffffffffffffffff00", "declared length of 16 EiB"),
        ("9bffffffffffffffff00", "declared array of 16 EiB"),
        ("bbffffffffffffffff00", "declared map of 16 EiB"),
        ("44010203", "truncated"),
        ("f818", "simple(24), which RFC 7049 listed and RFC 8949 calls ill-formed"),
        ("81" * 17 + "00", "17 arrays deep"),
        ("81" * 5000 + "00", "5000 arrays deep"),
        ("a100" * 3000 + "00", "3000 maps deep"),
    ],
)
def test_malformed_items_are_refused(data: str, why: str) -> None:
    """One error for all of it, which is a RemoteProtocolError."""
    with pytest.raises(cbor.CBORError) as caught:
        cbor.decode(bytes.fromhex(data))
    assert isinstance(caught.value, RemoteProtocolError), why
    assert caught.value.code == "cbor"


def test_sixteen_levels_of_nesting_are_accepted() -> None:
    """The bound is what its name says."""
    value = cbor.decode(bytes.fromhex("81" * 16 + "00"))
    for _ in range(16):
        (value,) = value
    assert value == 0


@fuzz
@given(st.binary(max_size=64))
def test_arbitrary_bytes_decode_or_raise_a_protocol_error(data: bytes) -> None:
    """Nothing else escapes."""
    try:
        cbor.decode(data)
    except ProtocolError:
        pass


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@fuzz
@given(values)
def test_what_we_encode_is_read_back_unchanged(value: object) -> None:
    """Both writers, one reader."""
    assert value == cbor.decode(cbor.encode(value))
    assert value == cbor.decode(cbor.encode_canonical(value))


@fuzz
@given(st.dictionaries(st.text(max_size=4), st.integers(0, 9), max_size=6))
def test_canonical_encoding_does_not_depend_on_the_order_of_keys(value: dict[str, int]) -> None:
    """Equal maps have equal bytes."""
    assert cbor.encode_canonical(value) == cbor.encode_canonical(dict(reversed(value.items())))


def test_nan_is_read_back_as_nan() -> None:
    """The one value that is not equal to itself."""
    assert math.isnan(cbor.decode(cbor.encode(math.nan)))
