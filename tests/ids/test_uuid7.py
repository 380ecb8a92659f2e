"""UUIDs of version 7: their form, their order, and what clocks and forks do to them."""

from __future__ import annotations

import os
import threading
import uuid
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordlib.errors import IdOverflow, UsageError
from coordlib.ids import uuid7, uuid7_time
from coordlib.ids.uuid7 import Source
from tests.ids.support import in_child, needs_fork, tortured


def counter(value: uuid.UUID) -> int:
    """Time and counter as one number."""
    return (value.int >> 80) << 42 | (value.int >> 64 & 0xFFF) << 30 | (value.int >> 32 & 0x3FFF_FFFF)


def test_the_example_of_the_rfc_decodes_right() -> None:
    """RFC 9562, A.6: 2022-02-22 14:22:22 in a zone five hours behind."""
    example = uuid.UUID("017F22E2-79B0-7CC3-98C4-DC0C0C07398F")
    assert uuid7_time(example) == datetime(2022, 2, 22, 19, 22, 22, tzinfo=UTC)


def test_a_uuid_has_version_variant_and_time() -> None:
    """And the random bits are where RFC 9562 puts them: with all ones and zeros known."""
    source = Source(lambda: 1_645_557_742_000_999_999, lambda n: b"\xff" * n)
    value = source()
    # The counter's top bit is zero.
    assert str(value) == "017f22e2-79b0-77ff-bfff-ffffffffffff"
    assert (value.version, value.variant) == (7, uuid.RFC_4122)
    assert uuid7_time(value) == datetime(2022, 2, 22, 19, 22, 22, tzinfo=UTC)
    low = Source(lambda: 1_645_557_742_000_000_000, bytes)()
    assert str(low) == "017f22e2-79b0-7000-8000-000000000000"


def test_the_public_one_is_of_now() -> None:
    """Both clocks are the machine's."""
    before = datetime.now(UTC).replace(microsecond=0)
    value = uuid7()
    assert value.version == 7
    # The counter can carry into the time only after 2**41 of them.
    assert uuid7_time(value) >= before


@given(st.lists(st.integers(-5, 5_000_000_000_000), max_size=60))
def test_they_rise_strictly_whatever_the_clock_does(readings: list[int]) -> None:
    """Standing still, stepping back, before 1970; the time in them is never behind the largest reading."""
    clock = iter(readings)
    source = Source(lambda: next(clock) * 1_000_000)
    values = [source() for _ in readings]
    assert all(a < b for a, b in pairwise(values))
    latest = 0
    for reading, value in zip(readings, values, strict=True):
        latest = max(latest, reading)
        assert value.int >> 80 == latest


def test_a_counter_that_is_used_up_carries_into_the_time() -> None:
    """From the last of a millisecond to the first of the next."""
    source = Source(lambda: 1_000_000_000, lambda n: b"\xff" * n)
    first = source()
    source._last |= (1 << 42) - 1
    carried = source()
    assert carried > first
    assert (carried.int >> 80, counter(carried) & (1 << 42) - 1) == (1001, 0)


def test_the_end_of_time_is_refused() -> None:
    """48 bits of milliseconds; the next would have another version."""
    source = Source(lambda: ((1 << 48) - 1) * 1_000_000)
    assert source().int >> 80 == (1 << 48) - 1
    source._last |= (1 << 42) - 1
    with pytest.raises(IdOverflow):
        source()
    with pytest.raises(UsageError, match="9999"):
        uuid7_time(uuid.UUID(int=(1 << 48) - 1 << 80 | 7 << 76 | 2 << 62))


@pytest.mark.parametrize(
    "value", [uuid.uuid4(), uuid.UUID(int=7 << 76), "017F22E2-79B0-7CC3-98C4-DC0C0C07398F"]
)
def test_the_time_of_another_uuid_is_refused(value: uuid.UUID) -> None:
    """Its bits say nothing about time: another version, another variant, a text."""
    with pytest.raises(UsageError, match="version 7"):
        uuid7_time(value)


def test_threads_never_get_the_same_counter() -> None:
    """Eight of them, traced, switched every microsecond; each sees its own rise."""
    source = Source(lambda: 1_000_000_000)
    lists = tortured(lambda: [source() for _ in range(150)])
    assert all(a < b for values in lists for a, b in pairwise(values))
    counters = [counter(value) for values in lists for value in values]
    assert len(set(counters)) == len(counters) == 8 * 150


@needs_fork
def test_a_forked_child_begins_with_another_counter() -> None:
    """Above all of the parent's until then, at another place than the parent goes on from; though a thread that
    did not come along held the lock."""
    source = Source(lambda: 1_000_000_000)
    last = source()
    reader, writer = os.pipe()

    def child() -> None:
        os.write(writer, source().bytes)

    holder = threading.Thread(target=source._lock.acquire)
    holder.start()
    holder.join()
    in_child(child)
    of_child = uuid.UUID(bytes=os.read(reader, 16))
    os.close(reader)
    os.close(writer)
    assert of_child > last
    assert counter(of_child) != counter(last) + 1


def test_being_interrupted_by_itself_is_refused_instead_of_hanging() -> None:
    """A signal handler or finaliser that wants one while the same thread is at it."""
    caught: list[UsageError] = []

    def clock() -> int:
        if not caught:
            try:
                source()
            except UsageError as error:
                caught.append(error)
        return 1_000_000_000

    source = Source(clock)
    source()
    assert "elsewhere" in str(caught[0])
