"""Layouts: what constructs works, what does not says what would; ids of others decode as theirs."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordlib.errors import ConfigError, UsageError
from coordlib.ids import (
    COORDLIB_EPOCH_MS,
    DEFAULT,
    DISCORD,
    INSTAGRAM,
    JS53,
    LAYOUTS,
    SONYFLAKE,
    TWITTER,
    Layout,
    inspect,
)

bits = st.integers(0, 22)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    sequence_bits, worker_bits = draw(bits), draw(bits)
    return Layout(
        time_bits=draw(st.integers(1, min(63 - sequence_bits - worker_bits, 34))),
        sequence_bits=sequence_bits,
        worker_bits=worker_bits,
        unit_ms=draw(st.sampled_from([1, 10, 1000, 10_000])),
        epoch_ms=draw(st.none() | st.integers(1, 2 * COORDLIB_EPOCH_MS)),
        worker_is_lowest=draw(st.booleans()),
        datacenter_bits=draw(st.integers(0, worker_bits)),
    )


@given(layouts(), st.data())
def test_an_id_decomposes_into_what_it_was_composed_of(layout: Layout, data: st.DataObject) -> None:
    """For every layout, both orders and every part up to its last value; and it has a date, and 63 bits."""
    unit = data.draw(st.integers(0, layout.units_max - 1))
    sequence = data.draw(st.integers(0, layout.sequences - 1))
    worker = data.draw(st.integers(0, layout.workers - 1))
    number = layout.compose(unit, sequence, worker)
    assert 0 <= number < 2**63
    assert layout.decompose(number) == (unit, sequence, worker)
    assert layout.start_of(0) <= layout.time_of(number) < layout.expires_at


@given(layouts(), st.data())
def test_time_comes_first(layout: Layout, data: st.DataObject) -> None:
    """An id of a later unit is larger, whatever sequence and worker are."""
    earlier = data.draw(st.integers(0, layout.units_max - 2))
    last = layout.compose(earlier, layout.sequences - 1, layout.workers - 1)
    assert last < layout.compose(earlier + 1, 0, 0)
    assert last + 1 == layout.compose(earlier + 1, 0, 0)


@pytest.mark.parametrize(
    ("layout", "number", "time", "worker", "datacenter", "in_datacenter", "sequence"),
    [
        # The example of Wikipedia's "Snowflake ID": machine 378.
        (TWITTER, 1541815603606036480, "2022-06-28T16:07:40.105", 378, 11, 26, 0),
        # The example of Discord's documentation: worker 1, process 0, increment 7, 1462015105796 ms.
        (DISCORD, 175928847299117063, "2016-04-30T11:18:25.796", 32, 1, 0, 7),
        # The example of "Sharding & IDs at Instagram": 1387263000 ms, shard 1341, 5001 % 1024; by its real epoch.
        (INSTAGRAM, 1387263000 << 23 | 1341 << 10 | 905, "2011-09-09T22:28:04.721", 1341, None, 1341, 905),
        # Minted by sonyflake-py 1.3.0, which decomposes it into time 38587328314, sequence 1, machine 4711.
        (SONYFLAKE, 647387941986964071, "2026-11-23T03:01:23.140", 4711, None, 4711, 1),
    ],
    ids=["twitter", "discord", "instagram", "sonyflake"],
)
def test_known_ids_decode_right(
    layout: Layout,
    number: int,
    time: str,
    worker: int,
    datacenter: int | None,
    in_datacenter: int,
    sequence: int,
) -> None:
    """Ids that others have published, or minted, have the parts that they say."""
    info = inspect(number, layout)
    assert info.time == datetime.fromisoformat(time).replace(tzinfo=UTC)
    assert (info.worker, info.datacenter, info.worker_in_datacenter) == (worker, datacenter, in_datacenter)
    assert (info.sequence, info.id, info.layout, info.node) == (sequence, number, layout, None)


def test_an_inspected_id_reads_well() -> None:
    """All of it in one line; who minted it, where that is known."""
    info = inspect(1541815603606036480, TWITTER)
    assert str(info) == (
        "1541815603606036480: 2022-06-28T16:07:40.105Z, "
        "worker 378 (data centre 11, worker 26 in it), sequence 0, layout twitter"
    )
    known = dataclasses.replace(inspect(5 << 22 | 1 << 10 | 3), node="orders-1")
    assert (
        str(known)
        == "20972547: 2025-01-01T00:00:00.005Z, worker 3, sequence 1, layout default, minted by orders-1"
    )


def test_the_presets_are_what_they_say() -> None:
    """Bits, and the day on which each ends."""
    parts = {
        n: (
            p.time_bits,
            p.sequence_bits,
            p.worker_bits,
            p.unit_ms,
            p.worker_is_lowest,
            str(p.expires_at)[:10],
        )
        for n, p in LAYOUTS.items()
    }
    assert parts == {
        "default": (41, 12, 10, 1, True, "2094-09-07"),
        "twitter": (41, 12, 10, 1, False, "2080-07-10"),
        "discord": (41, 12, 10, 1, False, "2084-09-06"),
        "instagram": (40, 10, 13, 1, False, "2046-06-27"),
        "sonyflake": (39, 8, 16, 10, True, "2188-11-16"),
        "js53": (37, 8, 8, 10, True, "2068-07-21"),
    }
    assert JS53.compose(JS53.units_max - 1, JS53.sequences - 1, JS53.workers - 1) == 2**53 - 1
    assert all(p.compose(p.units_max - 1, p.sequences - 1, p.workers - 1) < 2**63 for p in LAYOUTS.values())


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"time_bits": 42}, "use at most 41 time_bits"),
        ({"sequence_bits": 32, "worker_bits": 32}, "use fewer sequence_bits and worker_bits"),
        ({"time_bits": 0}, "41 of 1 ms"),
        ({"sequence_bits": -1}, "12 are 4096"),
        ({"worker_bits": 33}, "10 are 1024"),
        ({"worker_bits": True}, "10 are 1024"),
        ({"unit_ms": 0}, "1 is usual"),
        ({"unit_ms": 10_001}, "1 is usual"),
        ({"epoch_ms": 0}, "None for the cluster's own"),
        ({"epoch_ms": -5}, "None for the cluster's own"),
        ({"unit_ms": 10_000}, "use at most 34 time_bits, or a smaller unit_ms"),
        ({"time_bits": 63, "sequence_bits": 0, "worker_bits": 0}, "use at most 47 time_bits$"),
        ({"datacenter_bits": 11}, "high part of worker_bits"),
        ({"worker_is_lowest": 1}, "True or False"),
        ({"on_overflow": "spin"}, '"borrow" or "wait"'),
        ({"name": ""}, "a text for people"),
    ],
)
def test_a_layout_that_cannot_work_is_refused_with_what_would(fields: dict[str, object], advice: str) -> None:
    """At construction, by ConfigError."""
    with pytest.raises(ConfigError, match=advice):
        dataclasses.replace(DEFAULT, **fields)  # type: ignore[arg-type]


def test_the_advice_about_time_bits_works() -> None:
    """What the message recommends constructs, and one more does not."""
    assert dataclasses.replace(DEFAULT, unit_ms=10_000, time_bits=34).expires_at.year < 9999
    with pytest.raises(ConfigError, match="year 9999"):
        dataclasses.replace(DEFAULT, unit_ms=10_000, time_bits=35)


def test_an_epoch_is_the_clusters_own_until_it_is_fixed() -> None:
    """None stands for 2025-01-01; with_epoch gives the same layout with another."""
    assert (DEFAULT.epoch_ms, DEFAULT.epoch) == (None, COORDLIB_EPOCH_MS)
    assert DEFAULT.start_of(0) == datetime(2025, 1, 1, tzinfo=UTC)
    moved = DEFAULT.with_epoch(COORDLIB_EPOCH_MS - 1000)
    assert moved.epoch == COORDLIB_EPOCH_MS - 1000
    assert dataclasses.replace(moved, epoch_ms=None) == DEFAULT
    with pytest.raises(ConfigError):
        DEFAULT.with_epoch(0)


@pytest.mark.parametrize("parts", [(-1, 0, 0), (1 << 41, 0, 0), (0, 4096, 0), (0, -1, 0), (0, 0, 1024)])
def test_a_part_that_does_not_fit_is_refused(parts: tuple[int, int, int]) -> None:
    """It never spills into its neighbour's bits."""
    with pytest.raises(UsageError, match="does not fit"):
        DEFAULT.compose(*parts)


@pytest.mark.parametrize("number", [-1, 2**63, True, 1.0, "7"])
def test_what_is_no_id_is_refused(number: int) -> None:
    """Negative, above 63 bits, or no int."""
    with pytest.raises(UsageError):
        DEFAULT.decompose(number)


def test_a_number_too_large_for_a_small_layout_is_refused() -> None:
    """An id of 63 bits is none of a layout of 53."""
    with pytest.raises(UsageError, match="js53"):
        inspect(2**53, JS53)
