"""Packed outcomes: a sorted map, whatever the order of insertion, that costs what its records have."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordlib.errors import InvariantViolation
from coordlib.machine.ledger import RECORD_BYTES, Ledger, Line, packed

LINE = Line(1, 7, -1)


def gtid(number: int) -> bytes:
    return number.to_bytes(16)


def copy(ledger: Ledger) -> Ledger:
    other = Ledger()
    for count, data in packed(ledger.blocks()):
        assert other.load(data) == count
    return other


@given(
    st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=80),
    st.sampled_from([2, 3, 5]),
)
def test_it_is_a_sorted_map(steps: list[tuple[int, bool]], records_max: int) -> None:
    """Insertions in any order, the oldest dropped, pages from anywhere; a copy of it is the same."""
    model: dict[bytes, Line] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coordlib.machine.ledger._BLOCK_BYTES_MAX", records_max * RECORD_BYTES)
        ledger = Ledger()
        for number, is_drop in steps:
            if is_drop and model:
                assert ledger.first() == min(model)
                ledger.remove_first()
                del model[min(model)]
            elif gtid(number) not in model:
                line = Line(number % 8, number * 1000, number - 1)
                ledger.insert(gtid(number), line)
                model[gtid(number)] = line
            for each in (ledger, copy(ledger)):
                assert each.check_invariants() == sorted(model)
                assert len(each) == len(model)
                assert each.first() == min(model, default=None)
        for number in range(41):
            assert ledger.get(gtid(number)) == model.get(gtid(number))
            following = [key for key in sorted(model) if key > gtid(number)]
            assert [ledger.after(gtid(number), limit) for limit in (1, 3, 99)] == [
                following[:1],
                following[:3],
                following,
            ]
        assert ledger.after(None, 99) == sorted(model)


def test_the_largest_line_fits() -> None:
    """A log index of 48 bits, and the last of the conditions that there may be."""
    ledger = Ledger()
    line = Line(7, (1 << 48) - 1, 4095)
    ledger.insert(b"\xff" * 16, line)
    assert ledger.get(b"\xff" * 16) == line
    with pytest.raises(InvariantViolation, match="already"):
        ledger.insert(b"\xff" * 16, line)


def test_a_record_costs_24_bytes_also_if_they_come_a_little_out_of_order() -> None:
    """Blocks stay full, so that there is little beside them."""
    rng = random.Random(1)
    ledger = Ledger()
    numbers = list(range(100_000))
    for number in sorted(numbers, key=lambda number: number + rng.random() * 50):
        ledger.insert(gtid(number), LINE)
    blocks = ledger.blocks()
    assert ledger.check_invariants() == [gtid(number) for number in numbers]
    size = sum(sys.getsizeof(block) + sys.getsizeof(block[:16]) + 16 for block in blocks)
    assert size < 26 * len(numbers)


def test_what_was_taken_stays_as_it_was() -> None:
    """While the ledger goes on changing; and its pieces follow from the content alone."""
    ledger = Ledger()
    for number in range(0, 6000, 2):
        ledger.insert(gtid(number), LINE)
    taken = ledger.blocks()
    before = list(packed(taken))
    for number in range(1, 6000, 2):
        ledger.insert(gtid(number), LINE)
    for _ in range(1000):
        ledger.remove_first()
    assert list(packed(taken)) == before
    assert [count for count, _ in before] == [1024, 1024, 952]
    assert list(packed(copy(ledger).blocks())) == list(packed(ledger.blocks()))


@pytest.mark.parametrize(
    "data",
    [
        bytes(RECORD_BYTES - 1),
        gtid(2) + bytes(8) + gtid(1) + bytes(8),
        gtid(2) + bytes(8) + gtid(2) + bytes(8),
    ],
)
def test_malformed_records_are_refused(data: bytes) -> None:
    """Of a wrong size, or out of order, within a piece and between two."""
    ledger = Ledger()
    with pytest.raises(ValueError, match="ledger"):
        ledger.load(data)
    ledger.load(gtid(5) + bytes(8))
    with pytest.raises(ValueError, match="order"):
        ledger.load(gtid(4) + bytes(8))
