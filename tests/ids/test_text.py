"""Ids as text: sorted as numbers, one text for each, everything else refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordlib.errors import UsageError
from coordlib.ids import from_base32, from_base62, from_hex, to_base32, to_base62, to_hex

LAST = 2**63 - 1
ids = st.integers(0, LAST)


class Form(NamedTuple):
    write: Callable[[int], str]
    read: Callable[[str], int]
    length: int
    last: str
    too_large: str


FORMS = {
    "base32": Form(to_base32, from_base32, 13, "7ZZZZZZZZZZZZ", "8000000000000"),
    "base62": Form(to_base62, from_base62, 11, "AzL8n0Y58m7", "AzL8n0Y58m8"),
    "hex": Form(to_hex, from_hex, 16, "7fffffffffffffff", "8000000000000000"),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@each_form
@given(number=ids)
def test_a_text_reads_as_the_id_it_was_written_from(form: Form, number: int) -> None:
    """In the width of the form, whatever the number."""
    text = form.write(number)
    assert len(text) == form.length
    assert form.read(text) == number


@each_form
@given(numbers=st.lists(ids, max_size=20))
def test_texts_sort_as_the_numbers_do(form: Form, numbers: list[int]) -> None:
    """By characters, which are bytes here."""
    assert [form.write(n) for n in sorted(numbers)] == sorted(form.write(n) for n in numbers)


@each_form
@given(
    text=st.text(max_size=20) | st.text(alphabet="0123456789abcdefXYZxyzilouILOU-", min_size=11, max_size=16)
)
def test_a_text_that_is_read_is_the_only_one_of_its_id(form: Form, text: str) -> None:
    """Whatever is accepted is what would be written: no second text for an id."""
    try:
        number = form.read(text)
    except UsageError:
        return
    assert form.write(number) == text


@each_form
def test_the_ends_are_where_they_belong(form: Form) -> None:
    """0 and 2**63 - 1 are ids; one more is an overflow that is named."""
    assert form.write(0) == "0" * form.length
    assert form.write(LAST) == form.last
    assert form.read(form.last) == LAST
    with pytest.raises(UsageError, match=r"2\*\*63 - 1"):
        form.read(form.too_large)
    for wrong in (-1, LAST + 1, True, 1.5):
        with pytest.raises(UsageError):
            form.write(wrong)  # type: ignore[arg-type]


def test_published_texts_are_right() -> None:
    """Digits have the values that the forms' sources give them."""
    assert to_base32(32 * 17 + 31) == "00000000000HZ"  # Crockford: H is 17, Z is 31
    assert to_base62(62 * 10 + 61) == "000000000Az"
    assert to_hex(175928847299117063) == format(175928847299117063, "016x")


@pytest.mark.parametrize(
    ("read", "text", "says"),
    [
        (from_base32, "7zzzzzzzzzzzz", "'z' at place 2"),
        (from_base32, "000000000000O", "'O' at place 13"),
        (from_base32, "000000000000I", "'I' at place 13"),
        (from_base32, "000000000000U", "'U' at place 13"),
        (from_base32, "000000000000", "13 characters; got 12"),
        (from_base32, "00000-0000000", "'-' at place 6"),
        (from_base62, " 0000000000", "' ' at place 1"),
        (from_base62, "000000000_0", "'_' at place 10"),
        (from_base62, "0000000000٣", "at place 11"),
        (from_hex, "000000000000000A", "'A' at place 16"),
        (from_hex, "0x00000000000001", "'x' at place 2"),
        (from_hex, "", "16 characters; got 0"),
    ],
)
def test_an_error_says_what_is_wrong_with_the_text(read: Callable[[str], int], text: str, says: str) -> None:
    """Which character at which place, or which length."""
    with pytest.raises(UsageError, match=says):
        read(text)


@each_form
def test_only_a_str_is_read(form: Form) -> None:
    """Bytes and numbers are a mistake that is named."""
    with pytest.raises(UsageError, match="is a str"):
        form.read(b"0" * form.length)  # type: ignore[arg-type]
