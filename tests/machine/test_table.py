"""The table: a dict that can be read as it was, in slices."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordlib.machine.limits import ENTRY_OVERHEAD_BYTES
from coordlib.machine.table import BUCKETS, Allowance, BytesTable, Reclaimer, Table, View, ViewLost

KEYS = st.sampled_from([b"%d" % number for number in range(40)])
CHANGES = st.one_of(
    st.tuples(st.just("put"), KEYS, st.binary(max_size=4)),
    st.tuples(st.just("delete"), KEYS, st.just(b"")),
    st.tuples(st.just("clear"), st.just(b""), st.just(b"")),
    st.tuples(st.just("view"), st.just(b""), st.just(b"")),
    st.tuples(st.just("close"), st.just(b""), st.just(b"")),
    st.tuples(st.just("slice"), st.just(b""), st.just(b"")),
    st.tuples(st.just("free"), st.just(b""), st.just(b"")),
)


def filled(count: int, reclaimer: Reclaimer | None = None) -> BytesTable:
    table = BytesTable(Reclaimer() if reclaimer is None else reclaimer)
    for number in range(count):
        table.put(b"key-%d" % number, b"%d" % number)
    return table


def pages(view: View, limit: int) -> list[bytes]:
    keys: list[bytes] = []
    while page := view.keys_after(keys[-1] if keys else None, limit):
        keys += page
    return keys


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(CHANGES, max_size=60))
def test_table_and_its_views_agree_with_copied_dicts(changes: list[tuple[str, bytes, bytes]]) -> None:
    """Whatever happens to the table, each view shows it as it was when the view was opened."""
    reclaimer = Reclaimer()
    table = BytesTable(reclaimer)
    model: dict[bytes, bytes] = {}
    views: list[tuple[View, dict[bytes, bytes]]] = []
    drains: list[tuple[View, Iterator[tuple[bytes, bytes]], dict[bytes, bytes], dict[bytes, bytes]]] = []
    for what, key, value in changes:
        if what == "put":
            table.put(key, value)
            model[key] = value
        elif what == "delete":
            assert model.pop(key, None) == table.delete(key)
        elif what == "clear":
            table.clear()
            model.clear()
        elif what == "view":
            views.append((table.view(), dict(model)))
            drained = table.view()
            drains.append((drained, drained.drain(), {}, dict(model)))
        elif what == "close" and views:
            views.pop(0)[0].close()
        elif what == "slice" and drains:
            for _ in range(5):
                pair = next(drains[0][1], None)
                if pair is not None:
                    drains[0][2][pair[0]] = pair[1]
        elif what == "free":
            reclaimer.free(3)
        assert len(model) == len(table)
        assert sum(len(k) + len(v) + ENTRY_OVERHEAD_BYTES for k, v in model.items()) == table.size_bytes
        assert model.get(key) == table.get(key)
        assert (key in model) == (key in table)
    for view, expected in views:
        keys = pages(view, 7)
        assert sorted(expected) == sorted(keys)
        assert expected == {key: view.get(key) for key in keys}
        assert view.get(b"absent") is None
    for view, drain, seen, expected in drains:
        seen.update(drain)
        assert expected == seen
        view.close()


def test_order_does_not_depend_on_history() -> None:
    """Two tables with the same content show it in the same order."""
    keys = [b"key-%d" % number for number in range(2000)]
    orders = []
    for seed in range(2):
        random.Random(seed).shuffle(keys)
        table = BytesTable(Reclaimer())
        for key in keys:
            table.put(key, b"other")
            table.delete(key)
            table.put(key, b"value")
        orders.append(list(table.view().drain()))
    assert orders[0] == orders[1]


def test_first_key_is_the_first_in_order() -> None:
    """Taken without sorting anything."""
    table = filled(3000)
    assert next(table.view().drain())[0] == table.first_key()
    assert BytesTable(Reclaimer()).first_key() is None


def test_a_view_remembers_each_key_once_and_none_that_it_has_passed() -> None:
    """Memory is bounded by what has changed since, and what was handed out is let go of."""
    table = filled(2560)
    view = table.view()
    drain = view.drain()
    for number in range(2560):
        table.put(b"key-%d" % number, b"new")
        table.put(b"key-%d" % number, b"newer")
    assert sum(map(len, view._old.values())) == 2560
    seen = [next(drain) for _ in range(1280)]
    assert sum(map(len, view._old.values())) < 1400
    before = sum(map(len, view._old.values()))
    for key, _ in seen[:1000]:
        table.put(key, b"newest")
    assert before == sum(map(len, view._old.values()))
    assert {b"key-%d" % number: b"%d" % number for number in range(2560)} == dict([*seen, *drain])


def test_a_view_that_exceeds_its_allowance_is_lost_and_gives_it_back() -> None:
    """Scans may cost so much memory and no more; losing one costs the writer nothing."""
    table = filled(100)
    allowance = Allowance(10 * (ENTRY_OVERHEAD_BYTES + 8))
    view = table.view(allowance)
    other = table.view()
    for number in range(100):
        table.put(b"key-%d" % number, b"new")
    assert view.is_closed
    assert not other.is_closed
    assert allowance.remaining_bytes == 10 * (ENTRY_OVERHEAD_BYTES + 8)
    with pytest.raises(ViewLost):
        view.get(b"key-1")
    with pytest.raises(ViewLost):
        view.keys_after(None, 1)
    with pytest.raises(ViewLost):
        next(view.drain())
    assert (other,) == table.views


def test_clearing_moves_buckets_and_frees_nothing_itself() -> None:
    """Clearing costs the same for any content; the reclaimer frees it a few buckets at a time."""
    reclaimer = Reclaimer()
    table = filled(20_000, reclaimer)
    view = table.view()
    table.clear()
    assert (len(table), table.size_bytes, len(reclaimer)) == (0, 0, BUCKETS)
    steps = 1
    while reclaimer.free(4):
        steps += 1
    assert steps == BUCKETS // 4
    assert len(dict(view.drain())) == 20_000
    view.close()
    assert len(reclaimer) == BUCKETS  # the view was the last to hold them


def test_reclaimer_has_a_bounded_backlog() -> None:
    """If nobody ever calls it, what is cleared is freed all the same."""
    reclaimer = Reclaimer()
    for _ in range(40):
        filled(1000, reclaimer).clear()
    assert len(reclaimer) <= 16 * BUCKETS


def test_empty_tables_are_small() -> None:
    """A bucket that was never written to is shared by all tables."""
    one, two = BytesTable(Reclaimer()), BytesTable(Reclaimer())
    assert len({id(bucket) for bucket in one._buckets + two._buckets}) == 1


def test_values_changed_in_place_are_frozen_before_they_change() -> None:
    """A table of objects shows in its views what they were."""
    table: Table[list[int]] = Table(Reclaimer(), bytes)
    table.put(b"a", [1])
    table.put(b"b", [2])
    view = table.view()
    for key in (b"a", b"a", b"missing"):
        table.touch(key)
        value = table.get(key)
        if value is not None:
            value.append(9)
    assert dict(view.drain()) == {b"a": b"\x01", b"b": b"\x02"}
    assert table.view().get(b"a") == b"\x01\x09\x09"


def test_closing_twice_is_harmless() -> None:
    """And a closed view is no longer the table's."""
    table = filled(10)
    view = table.view()
    view.close()
    view.close()
    assert table.views == ()
