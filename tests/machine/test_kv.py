"""Maps: each method of a mapping is one command, complete or refused."""

from __future__ import annotations

from typing import Any

import pytest

from coordlib.cbor import encode
from coordlib.errors import CoordError, KeyExists, QuotaExceeded, RevisionCompacted
from coordlib.machine import Limits, commands
from coordlib.machine.kv import CURSOR_IDLE_MS_MAX, CURSORS_MAX
from coordlib.machine.limits import ENTRY_OVERHEAD_BYTES
from tests.machine.driver import Driver

M = b"rates"


def ready(limits: Limits | None = None) -> tuple[Driver, int]:
    driver = Driver(limits)
    return driver, driver.open()


def content(driver: Driver, name: bytes = M, limit: int = 1000) -> dict[bytes, bytes]:
    """All of a map, read in pages."""
    found: dict[bytes, bytes] = {}
    revision = after = None
    more = True
    while more:
        revision, more, flat = driver.ask(commands.query_range(name, after, limit, 1 << 20, revision))
        found.update(zip(flat[::2], flat[1::2], strict=True))
        after = flat[-2] if flat else None
    return found


def test_put_overwrites_and_gives_its_revision() -> None:
    """A revision is the index of the log entry; creation, change and version are kept for each key."""
    driver, session = ready()
    assert driver.run(session, commands.map_put(M, b"k", b"1")) == [2]
    assert driver.run(session, commands.map_put(M, b"other", b"1")) == [3]
    assert driver.run(session, commands.map_put(M, b"k", b"2")) == [4]
    assert driver.ask(commands.query_get_meta(M, b"k")) == [b"2", 2, 4, 2]
    assert driver.ask(commands.query_get(M, b"k")) == [b"2"]
    assert driver.ask(commands.query_contains(M, b"k")) == [True]
    assert driver.ask(commands.query_len(M)) == [2]


def test_what_is_not_there_is_none() -> None:
    """Queries of missing keys and maps are answers, not errors."""
    driver, _ = ready()
    assert driver.ask(commands.query_get(M, b"k")) == [None]
    assert driver.ask(commands.query_get_meta(M, b"k")) == [None, 0, 0, 0]
    assert driver.ask(commands.query_contains(M, b"k")) == [False]
    assert driver.ask(commands.query_len(M)) == [0]
    assert driver.ask(commands.query_range(M)) == [0, False, []]


def test_an_empty_value_is_a_value() -> None:
    """And so is an empty key."""
    driver, session = ready()
    driver.run(session, commands.map_put(M, b"", b""))
    assert driver.ask(commands.query_get(M, b"")) == [b""]
    assert driver.run(session, commands.map_pop(M, b"")) == [b""]


def test_insert_refuses_a_key_that_is_there() -> None:
    """With the revision since which it is."""
    driver, session = ready()
    assert driver.run(session, commands.map_insert(M, b"k", b"1")) == [2]
    with pytest.raises(KeyExists) as caught:
        driver.run(session, commands.map_insert(M, b"k", b"2"))
    assert caught.value.revision == 2


def test_setdefault_gives_what_is_there_or_puts_it() -> None:
    """One command, and no race between asking and setting."""
    driver, session = ready()
    assert driver.run(session, commands.map_setdefault(M, b"k", b"1")) == [b"1", True]
    assert driver.run(session, commands.map_setdefault(M, b"k", b"2")) == [b"1", False]


def test_delete_and_pop_say_what_was_there() -> None:
    """A missing key is an answer."""
    driver, session = ready()
    driver.run(session, commands.map_put(M, b"k", b"1"))
    driver.run(session, commands.map_put(M, b"j", b"2"))
    assert driver.run(session, commands.map_delete(M, b"k")) == [True]
    assert driver.run(session, commands.map_delete(M, b"k")) == [False]
    assert driver.run(session, commands.map_pop(M, b"j")) == [b"2"]
    assert driver.run(session, commands.map_pop(M, b"j")) == [None]
    assert driver.run(session, commands.map_delete(b"no map", b"j")) == [False]


def test_popitem_takes_each_item_once_and_then_nothing() -> None:
    """In table order, which does not depend on history."""
    driver, session = ready()
    expected = {b"key-%d" % number: b"%d" % number for number in range(30)}
    driver.run(session, commands.map_update(M, expected.items()))
    taken = [tuple(driver.run(session, commands.map_popitem(M))) for _ in expected]
    assert expected == dict(taken)
    assert driver.run(session, commands.map_popitem(M)) == [None, None]


def test_update_is_all_or_nothing() -> None:
    """If the last pair does not fit, the first is not stored either."""
    room = 3 * (ENTRY_OVERHEAD_BYTES + 24 + 20)
    driver, session = ready(Limits(state_size_bytes_max=room))
    pairs = [(b"key-%d" % number, b"v" * 10) for number in range(4)]
    with pytest.raises(QuotaExceeded) as caught:
        driver.run(session, commands.map_update(M, pairs))
    assert ("state_size_bytes_max", room) == (caught.value.limit, caught.value.maximum)
    assert content(driver) == {}
    driver.run(session, commands.map_update(M, pairs[:3]))
    assert dict(pairs[:3]) == content(driver)


def test_update_with_equal_keys_keeps_the_last() -> None:
    """As a dict does; the quota counts it once."""
    driver, session = ready()
    driver.run(session, commands.map_update(M, [(b"k", b"1"), (b"k", b"2")]))
    assert driver.ask(commands.query_get_meta(M, b"k")) == [b"2", 2, 2, 1]
    driver.run(session, commands.map_update(M, []))
    driver.machine.check_invariants()


def test_clear_says_how_many_there_were() -> None:
    """And leaves no map."""
    driver, session = ready()
    driver.run(session, commands.map_update(M, [(b"%d" % number, b"") for number in range(7)]))
    assert driver.run(session, commands.map_clear(M)) == [7]
    assert driver.run(session, commands.map_clear(M)) == [0]
    assert tuple(driver.machine.counters[name] for name in ("maps", "keys", "state_bytes")) == (0, 0, 0)


@pytest.mark.parametrize(
    ("present", "expected", "new", "reply", "after"),
    [
        (None, None, b"1", [True, None, 3], b"1"),
        (None, None, None, [True, None, 0], None),
        (None, b"0", b"1", [False, None, 0], None),
        (b"0", b"0", b"1", [True, None, 3], b"1"),
        (b"0", b"0", None, [True, None, 3], None),
        (b"0", None, b"1", [False, b"0", 2], b"0"),
        (b"0", b"9", b"1", [False, b"0", 2], b"0"),
    ],
)
def test_compare_and_set(
    present: bytes | None, expected: bytes | None, new: bytes | None, reply: list[Any], after: bytes | None
) -> None:
    """Compares bytes; None stands for absent on either side; a failure says what was found."""
    driver, session = ready()
    driver.run(session, commands.map_put(M if present is not None else b"other", b"k", present or b""))
    assert reply == driver.run(session, commands.map_compare_and_set(M, b"k", expected, new))
    assert [after] == driver.ask(commands.query_get(M, b"k"))


def test_maps_come_and_go_with_their_keys() -> None:
    """They are listed by name with size and revision, and their number is limited."""
    driver, session = ready(Limits(maps_max=3))
    for name in (b"c", b"a", b"b"):
        driver.run(session, commands.map_put(name, b"k", b"v"))
    size = ENTRY_OVERHEAD_BYTES + 24 + 2
    assert [[[b"a", 1, size, 3], [b"b", 1, size, 4]], True] == driver.ask(commands.query_maps(None, 2))
    assert [[[b"c", 1, size, 2]], False] == driver.ask(commands.query_maps(b"b", 2))
    further = commands.map_put(b"d", b"k", b"v")
    with pytest.raises(QuotaExceeded) as caught:
        driver.machine.check(session, 4, 0, further)
    assert caught.value.limit == "maps_max"
    with pytest.raises(QuotaExceeded):
        driver.run(session, further)
    driver.run(session, commands.map_delete(b"a", b"k"))
    driver.run(session, further)


@pytest.mark.parametrize(
    "operation",
    [
        commands.map_put(M, b"new", b"v" * 50),
        commands.map_put(M, b"k", b"v" * 51),
        commands.map_insert(M, b"new", b"v" * 50),
        commands.map_setdefault(M, b"new", b"v" * 50),
        commands.map_update(M, [(b"k", b""), (b"new", b"v" * 50)]),
        commands.map_compare_and_set(M, b"new", None, b"v" * 50),
    ],
)
def test_a_full_state_refuses_what_grows(operation: bytes) -> None:
    """Before append and again when applied, with the name of the limit."""
    driver, session = ready(Limits(state_size_bytes_max=ENTRY_OVERHEAD_BYTES + 24 + 1 + 50))
    driver.run(session, commands.map_put(M, b"k", b"v" * 50))
    before = content(driver)
    with pytest.raises(QuotaExceeded) as caught:
        driver.machine.check(session, 2, 0, operation)
    assert caught.value.limit == "state_size_bytes_max"
    with pytest.raises(QuotaExceeded):
        driver.run(session, operation)
    assert before == content(driver)


@pytest.mark.parametrize(
    "operation",
    [
        commands.map_put(M, b"k", b"w" * 50),
        commands.map_put(M, b"k", b""),
        commands.map_setdefault(M, b"k", b"v" * 500),
        commands.map_compare_and_set(M, b"k", b"other", b"v" * 500),
        commands.map_compare_and_set(M, b"k", b"v" * 50, None),
        commands.map_delete(M, b"k"),
        commands.map_pop(M, b"k"),
        commands.map_popitem(M),
        commands.map_clear(M),
        commands.acquire(b"lock"),
    ],
)
def test_a_full_state_takes_what_does_not_grow(operation: bytes) -> None:
    """Deleting, shrinking and locking still work when full."""
    driver, session = ready(Limits(state_size_bytes_max=ENTRY_OVERHEAD_BYTES + 24 + 1 + 50))
    driver.run(session, commands.map_put(M, b"k", b"v" * 50))
    driver.machine.check(session, 2, 0, operation)
    driver.run(session, operation)
    driver.machine.check_invariants()


def test_what_is_on_its_way_counts_before_append() -> None:
    """A burst of proposals cannot pass the check all at once."""
    driver, session = ready(Limits(state_size_bytes_max=1000))
    put = commands.map_put(M, b"k", b"v" * 100)
    driver.machine.check(session, 1, 0, put, 0, 500)
    with pytest.raises(QuotaExceeded):
        driver.machine.check(session, 1, 0, put, 0, 800)


# --- iteration --------------------------------------------------------------------------------------------


def numbered(count: int) -> list[tuple[bytes, bytes]]:
    return [(b"key-%d" % number, b"%d" % number) for number in range(count)]


@pytest.mark.parametrize("limit", [1, 7, 100, 5000])
def test_iteration_in_pages_of_any_size_finds_everything(limit: int) -> None:
    """Each key once."""
    driver, session = ready()
    driver.run(session, commands.map_update(M, numbered(100)))
    assert dict(numbered(100)) == content(driver, limit=limit)


@pytest.mark.parametrize("change", ["put", "delete", "clear", "replace"])
def test_iteration_is_at_one_revision_whatever_happens_meanwhile(change: str) -> None:
    """Even if the map is emptied under it."""
    driver, session = ready()
    driver.run(session, commands.map_update(M, numbered(100)))
    revision, more, flat = driver.ask(commands.query_range(M, None, 10))
    for number in range(100):
        if change == "put":
            driver.run(session, commands.map_put(M, b"key-%d" % number, b"new"))
            driver.run(session, commands.map_put(M, b"extra-%d" % number, b"new"))
        elif change == "delete":
            driver.run(session, commands.map_delete(M, b"key-%d" % number))
    if change in ("clear", "replace"):
        driver.run(session, commands.map_clear(M))
    if change == "replace":
        driver.run(session, commands.map_update(M, [(b"key-%d" % number, b"new") for number in range(50)]))
    while driver.machine.free_slice():
        pass
    while more:
        again, more, page = driver.ask(commands.query_range(M, flat[-2], 10, 1 << 20, revision))
        assert revision == again
        flat += page
    assert dict(numbered(100)) == dict(zip(flat[::2], flat[1::2], strict=True))
    assert len(flat) == 200


def test_a_page_asked_for_twice_is_the_same() -> None:
    """A lost answer costs nothing, and two who iterate at one revision do not disturb each other."""
    driver, session = ready()
    driver.run(session, commands.map_update(M, numbered(50)))
    first = driver.machine.query(commands.query_range(M, None, 10))
    revision, _, flat = commands.decode_reply(first)
    driver.run(session, commands.map_put(M, b"key-1", b"new"))
    second = commands.query_range(M, flat[-2], 10, 1 << 20, revision)
    assert driver.machine.query(second) == driver.machine.query(second)


def test_iteration_over_a_forgotten_revision_is_refused() -> None:
    """On another node, after a long rest, or when too many iterate: an error, never a mixture."""
    driver, session = ready()
    driver.run(session, commands.map_update(M, numbered(50)))
    revision, _, flat = driver.ask(commands.query_range(M, None, 10))
    further = commands.query_range(M, flat[-2], 10, 1 << 20, revision)
    elsewhere = driver.replay()
    # The map is still what it was: any node can answer.
    assert driver.machine.query(further) == driver.replay().query(further)
    driver.run(session, commands.map_put(M, b"key-1", b"new"))
    index, data = driver.log[-1]
    elsewhere.apply(index, 1, data)
    with pytest.raises(RevisionCompacted):
        commands.decode_reply(elsewhere.query(further))
    driver.ask(further)
    driver.now_ms += CURSOR_IDLE_MS_MAX + 1
    driver.run(session, commands.map_put(M, b"key-1", b"newer"))
    driver.machine.free_slice()
    with pytest.raises(RevisionCompacted) as caught:
        driver.ask(further)
    assert caught.value.oldest == driver.index


def test_cursors_are_bounded_and_the_longest_unused_goes_first() -> None:
    """And all of them can be given up at once."""
    driver, session = ready()
    driver.run(session, commands.map_update(M, numbered(50)))
    opened = []
    for number in range(CURSORS_MAX + 1):
        opened.append(driver.ask(commands.query_range(M, None, 10)))
        driver.run(session, commands.map_put(M, b"key-1", b"%d" % number))
    assert driver.machine.counters["cursors"] == CURSORS_MAX
    results = []
    for revision, _, flat in (opened[0], opened[1], opened[-1]):
        try:
            driver.ask(commands.query_range(M, flat[-2], 10, 1 << 20, revision))
            results.append("found")
        except RevisionCompacted:
            results.append("compacted")
    assert results == ["compacted", "found", "found"]
    driver.machine.close_cursors()
    assert driver.machine.counters["cursors"] == 0
    assert all(not found.table.views for found in driver.machine._maps.maps.values())


def test_a_cursor_that_has_to_remember_too_much_is_lost() -> None:
    """Iterating costs bounded memory: past it, the iteration is told to begin again."""
    driver, session = ready()
    driver.run(session, commands.map_update(M, numbered(50)))
    driver.machine._maps._allowance.remaining_bytes = 1000
    revision, _, flat = driver.ask(commands.query_range(M, None, 10))
    for number in range(20):
        driver.run(session, commands.map_put(M, b"key-%d" % number, b"new"))
    with pytest.raises(RevisionCompacted):
        driver.ask(commands.query_range(M, flat[-2], 10, 1 << 20, revision))
    assert (driver.machine.counters["cursors"], driver.machine._maps._allowance.remaining_bytes) == (0, 1000)


def test_pages_are_limited_in_bytes_but_never_empty() -> None:
    """One item larger than the page comes all the same."""
    driver, session = ready()
    driver.run(session, commands.map_update(M, [(b"%d" % number, b"v" * 100) for number in range(10)]))
    _, more, flat = driver.ask(commands.query_range(M, None, 1000, 310))
    assert (more, len(flat)) == (True, 6)
    _, more, flat = driver.ask(commands.query_range(M, None, 1000, 0))
    assert (more, len(flat)) == (True, 2)


def test_keys_can_be_had_without_values() -> None:
    """For iterating over keys of large values."""
    driver, session = ready()
    driver.run(session, commands.map_update(M, numbered(30)))
    _, more, keys = driver.ask(commands.query_range(M, None, 1000, keys_only=True))
    assert (False, sorted(key for key, _ in numbered(30))) == (more, sorted(keys))


@pytest.mark.parametrize("query", [b"", b"\xff", encode([999]), encode([1, b"m"])])
def test_a_bad_query_is_answered_with_an_error(query: bytes) -> None:
    """A query is in nobody's log: even an unknown one stops no node."""
    driver, _ = ready()
    with pytest.raises(CoordError):
        driver.ask(query)
