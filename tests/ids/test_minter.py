"""The minter: rising ids, never outside of a window, never twice, whatever the clocks do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordlib.errors import ClusterClosed, IdOverflow, UsageError
from coordlib.ids import DEFAULT, JS53, SONYFLAKE, TWITTER, IdBlock, Layout, Minter, NeedsWait, NeedsWindow
from tests.ids.support import MS, Clock

TINY = Layout(time_bits=8, sequence_bits=2, worker_bits=2)
TINY_BETWEEN = Layout(time_bits=8, sequence_bits=2, worker_bits=2, worker_is_lowest=False)
TINY_WAITING = Layout(time_bits=8, sequence_bits=2, worker_bits=2, worker_is_lowest=False, on_overflow="wait")
TINY_SLOW = Layout(time_bits=8, sequence_bits=0, worker_bits=2, unit_ms=10)

both_paths = pytest.mark.parametrize("locked", [False, True], ids=["free", "locked"])


def rising(ids: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(ids))


operations = st.lists(
    st.one_of(
        st.tuples(st.just("mint"), st.integers(1, 6)),
        st.tuples(st.just("many"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.integers(-40, 40).map(lambda n: n * MS // 2)),
        st.tuples(st.just("install"), st.integers(0, 3)),
        st.tuples(st.just("extend"), st.integers(-5, 30)),
    ),
    max_size=60,
)


@both_paths
@pytest.mark.parametrize(
    "layout", [TINY, TINY_BETWEEN, TINY_WAITING, TINY_SLOW], ids=["lowest", "between", "waiting", "slow"]
)
@given(script=operations, lag=st.integers(-8, 8))
@settings(max_examples=150)
def test_ids_rise_inside_of_their_windows_under_arbitrary_clocks(
    locked: bool, layout: Layout, script: list[tuple[str, int]], lag: int
) -> None:
    """The clock runs, stands and steps back; windows end, go on and change their worker; the time that comes with
    them is ahead or behind. Every id is larger than the last, has the worker and a unit of the window, is never
    further ahead of id time than allowed; and what was asked for helps."""
    clock = Clock()
    ahead_max = 0 if layout.on_overflow == "wait" else 10 // layout.unit_ms
    minter = Minter(layout, clock_ns=clock, max_ahead_ms=10, lock_every_call=locked)
    last = -1
    granted_until = 0  # of every worker at once: simpler than one for each, and as disjoint
    window: tuple[int, int, int] | None = None
    for operation, number in script:
        if operation == "step":
            clock.now_ns += number
        elif operation == "install":
            start = granted_until + number
            granted_until = min(start + 12, layout.units_max)
            if start < granted_until:
                minter.install(number, start, granted_until, start + lag)
                window = (number, start, granted_until)
        elif operation == "extend" and window is not None:
            now = minter.info().now_unit + lag
            granted_until = max(granted_until, min(now + number, layout.units_max))
            minter.extend(now + number, now)
            window = (window[0], window[1], granted_until)
        elif operation in ("mint", "many"):
            try:
                if operation == "mint":
                    ids: Sequence[int] = [minter.mint() for _ in range(number)]
                else:
                    ids = minter.mint_many(min(number, minter.block_max))
            except NeedsWindow as need:
                info = minter.info()
                assert need.reason in ("none", "ended", "used")
                assert (need.reason == "none") == (window is None)
                assert (need.reason == "ended") == (window is not None and info.now_unit >= info.until_unit)
                continue
            except NeedsWait as need:
                assert need.seconds > 0
                clock.now_ns += round(need.seconds * 1e9) + 1
                try:
                    ids = [minter.mint()]
                except NeedsWindow:
                    continue
                except IdOverflow:
                    assert minter.info().until_unit == layout.units_max
                    continue
            except IdOverflow:
                assert minter.info().until_unit == layout.units_max
                continue
            assert window is not None
            worker, start, until = window
            now = minter.info().now_unit
            assert rising([last, *ids])
            for number in ids:
                unit, _, minted_by = layout.decompose(number)
                assert minted_by == worker
                assert start <= unit < until
                # The rest of a chunk is still good when the clock, or the time granted, has stepped back.
                assert unit - now <= ahead_max or (last >= 0 and unit == layout.decompose(last)[0])
                last = number


@both_paths
def test_a_window_is_used_from_its_first_tick_to_its_last(locked: bool) -> None:
    """Each tick once, in order, and then no more; with time for all of them."""
    clock = Clock()
    minter = Minter(TINY, clock_ns=clock, max_ahead_ms=10, lock_every_call=locked)
    minter.install(3, 100, 105, 100)
    ids = [minter.mint() for _ in range(5 * 4)]
    assert ids == [TINY.compose(unit, sequence, 3) for unit in range(100, 105) for sequence in range(4)]
    for _ in range(2):
        with pytest.raises(NeedsWindow, match="used"):
            minter.mint()
    clock.advance_ms(5)
    with pytest.raises(NeedsWindow, match="ended"):
        minter.mint()
    minter.extend(106, 105)
    assert minter.mint() == TINY.compose(105, 0, 3)


@both_paths
def test_nothing_is_minted_when_the_window_has_ended(locked: bool) -> None:
    """Though a chunk was begun and has ids left: its time is over. A nanosecond earlier it was not."""
    clock = Clock()
    minter = Minter(DEFAULT, clock_ns=clock, lock_every_call=locked)
    minter.install(1, 100, 102, 100)
    minter.mint()
    clock.now_ns = 2 * MS - 1
    assert DEFAULT.decompose(minter.mint()) == (101, 0, 1)
    clock.now_ns += 1
    for attempt in (minter.mint, lambda: minter.mint_many(1), lambda: minter.mint_many(0)):
        with pytest.raises(NeedsWindow, match="ended"):
            attempt()


def test_before_the_first_window_nothing_is_minted() -> None:
    """The reason is told from that of a window that has ended."""
    minter = Minter(DEFAULT, clock_ns=Clock())
    with pytest.raises(NeedsWindow, match="none"):
        minter.mint()
    with pytest.raises(UsageError, match="install"):
        minter.extend(5, 0)
    assert minter.info().worker is None
    assert minter.revoke() == 0


@pytest.mark.parametrize("layout", [DEFAULT, TWITTER, JS53, SONYFLAKE], ids=lambda layout: layout.name)
def test_the_last_unit_of_the_layout_ends_in_an_error_and_never_in_bit_63(layout: Layout) -> None:
    """The very last id is all ones; after it IdOverflow, for ever, by time and by number."""
    clock = Clock()
    minter = Minter(layout, clock_ns=clock)
    last = layout.units_max - 1
    minter.install(layout.workers - 1, last, layout.units_max + 5, last)
    ids = [minter.mint() for _ in range(layout.sequences - 1)]
    ids += minter.mint_many(1)
    assert ids[-1] == layout.compose(last, layout.sequences - 1, layout.workers - 1)
    assert rising(ids)
    for late_ms in (0, layout.unit_ms, 10**9):
        clock.advance_ms(late_ms)
        for attempt in (minter.mint, lambda: minter.mint_many(1)):
            with pytest.raises(IdOverflow, match=layout.name):
                attempt()


@both_paths
def test_a_frozen_clock_borrows_to_the_bound_and_then_waits(locked: bool) -> None:
    """A unit after the other, each counted; the wait is as long as it takes until the next is near enough."""
    clock = Clock()
    minter = Minter(TINY, clock_ns=clock, max_ahead_ms=3, lock_every_call=locked)
    minter.install(0, 10, 200, 10)
    ids = [minter.mint() for _ in range(4 * 4)]
    assert TINY.decompose(ids[-1])[0] == 13
    assert rising(ids)
    with pytest.raises(NeedsWait) as caught:
        minter.mint()
    assert caught.value.seconds == pytest.approx(0.001)
    clock.advance_ms(0.25)
    with pytest.raises(NeedsWait) as caught:
        minter.mint()
    assert caught.value.seconds == pytest.approx(0.00075)
    clock.advance_ms(0.75)
    assert TINY.decompose(minter.mint())[0] == 14
    info = minter.info()
    assert (info.borrowed, info.waits, info.regressions) == (4, 2, 0)


@both_paths
def test_a_clock_that_steps_back_goes_on_from_the_last_id(locked: bool) -> None:
    """An hour: the rest of what may be ahead is minted, then it waits for the hour to pass. Counted once."""
    clock = Clock(3_600_000 * MS)
    minter = Minter(DEFAULT, clock_ns=clock, max_ahead_ms=1000, lock_every_call=locked)
    minter.install(7, 10_000_000, 20_000_000, 10_000_000)
    before = minter.mint()
    clock.advance_ms(-500)
    after = [minter.mint() for _ in range(300)]
    assert rising([before, *after])
    assert {DEFAULT.decompose(i)[0] for i in after} == {10_000_000}
    assert minter.info().regressions == 1
    clock.advance_ms(-3_600_000)
    with pytest.raises(NeedsWait) as caught:
        minter.mint_many(1)
    assert 3599 < caught.value.seconds < 3601
    clock.advance_ms(caught.value.seconds * 1000)
    assert minter.mint() > after[-1]
    assert minter.info().regressions == 2


def test_a_layout_that_waits_is_never_ahead() -> None:
    """The classic manner: the next unit's ids come in the next unit; a block is of one unit."""
    clock = Clock()
    minter = Minter(TINY_WAITING, clock_ns=clock)
    minter.install(2, 10, 100, 10)
    assert [TINY_WAITING.decompose(minter.mint())[:2] for _ in range(3)] == [(10, 0), (10, 1), (10, 2)]
    assert minter.block_max == 4
    # Two do not fit into what is left of this unit.
    with pytest.raises(NeedsWait):
        minter.mint_many(2)
    assert TINY_WAITING.decompose(minter.mint()) == (10, 3, 2)
    with pytest.raises(NeedsWait) as caught:
        minter.mint()
    assert caught.value.seconds == pytest.approx(0.001)
    clock.advance_ms(1)
    assert [TINY_WAITING.decompose(i)[:2] for i in minter.mint_many(4)] == [(11, s) for s in range(4)]
    with pytest.raises(UsageError, match="0 to 4 ids"):
        minter.mint_many(5)
    assert minter.info().borrowed == 0


@both_paths
def test_a_block_is_a_range_that_mint_goes_on_from(locked: bool) -> None:
    """Where the worker is lowest; nothing is lost between blocks and single ids."""
    clock = Clock()
    minter = Minter(DEFAULT, clock_ns=clock, lock_every_call=locked)
    minter.install(5, 1000, 9000, 1000)
    first = minter.mint()
    block = minter.mint_many(5000)
    assert isinstance(block, range)
    assert (len(block), block.step) == (5000, 1024)
    assert block[0] == first + 1024
    assert minter.mint() == block[-1] + 1024
    assert len(minter.mint_many(0)) == 0
    assert minter.mint() == block[-1] + 2 * 1024
    assert minter.info().borrowed == 1


def test_a_block_is_as_large_as_may_be_ahead_and_no_larger() -> None:
    """A second of the layout: 4,096,000; the error names it."""
    minter = Minter(DEFAULT, clock_ns=Clock())
    minter.install(5, 1000, 9000, 1000)
    assert len(minter.mint_many(4_096_000)) == 4_096_000
    assert minter.info().borrowed == 999
    for wrong in (4_096_001, -1, 1.0, True):
        with pytest.raises(UsageError, match="0 to 4096000 ids"):
            minter.mint_many(wrong)  # type: ignore[arg-type]


def test_a_block_that_does_not_fit_takes_nothing() -> None:
    """All or none: the window has no room for it, and has its ids still."""
    minter = Minter(TINY, clock_ns=Clock(), max_ahead_ms=10)
    minter.install(1, 20, 22, 20)
    first = minter.mint()
    with pytest.raises(NeedsWindow, match="used"):
        minter.mint_many(8)
    assert list(minter.mint_many(7)) == [first + 4 * n for n in range(1, 8)]


def test_a_block_of_a_layout_with_the_worker_between_is_a_sequence() -> None:
    """Over the ends of units: as a list of what single mints give, with slices and membership."""
    clock = Clock()
    minter, single = (Minter(TINY_BETWEEN, clock_ns=clock, max_ahead_ms=10) for _ in range(2))
    minter.install(2, 20, 60, 20)
    single.install(2, 20, 60, 20)
    block = minter.mint_many(11)
    expected = [single.mint() for _ in range(11)]
    assert isinstance(block, IdBlock)
    assert list(block) == expected
    assert [block[i] for i in range(-11, 11)] == expected * 2
    assert list(block[2:9:3]) == expected[2:9:3]
    assert list(reversed(block)) == expected[::-1]
    assert [number in block for number in range(min(expected) - 20, max(expected) + 20)] == [
        number in expected for number in range(min(expected) - 20, max(expected) + 20)
    ]
    assert "x" not in block  # type: ignore[comparison-overlap]  # as a caller without types would ask
    assert (block[3:6], hash(block[3:6])) == (block[3:][:3], hash(block[3:][:3]))
    assert (block[:3] != block[1:4], block[:0] == block[5:5]) == (True, True)
    assert repr(block) == f"<IdBlock of 11 ids from {expected[0]} to {expected[-1]}>"
    assert repr(block[:0]) == "<IdBlock, empty>"
    with pytest.raises(IndexError):
        block[11]


@pytest.mark.parametrize("layout", [TINY, TINY_BETWEEN], ids=["lowest", "between"])
def test_ids_rise_over_a_change_to_a_smaller_worker(layout: Layout) -> None:
    """Though the new window begins in the unit of the last id, and earlier."""
    minter = Minter(layout, clock_ns=Clock(), max_ahead_ms=10)
    minter.install(3, 20, 30, 20)
    ids = [minter.mint() for _ in range(6)]
    minter.install(0, 15, 30, 16)
    ids += minter.mint_many(3)
    minter.install(2, 18, 40, 20)
    ids.append(minter.mint())
    assert rising(ids)
    assert [layout.decompose(i)[2] for i in ids[-4:]] == [0, 0, 0, 2]


def test_renewal_is_due_once_when_a_quarter_has_passed() -> None:
    """Told to the mint that finds it; again after an extension, and after a failure when it is asked for."""
    clock, due = Clock(), []
    minter = Minter(DEFAULT, clock_ns=clock, on_renewal_due=lambda: due.append(clock.now_ns // MS))
    minter.install(1, 1000, 1400, 1000)

    def mint_until(end_ms: int) -> list[int]:
        due.clear()
        while clock.now_ns < end_ms * MS:
            minter.mint()
            clock.advance_ms(1)
        return due

    assert mint_until(300) == [100]
    minter.rearm_renewal(20)
    assert mint_until(330) == [320]
    minter.extend(1730, 1330)
    assert mint_until(600) == [430]
    minter.rearm_renewal()
    minter.mint_many(1)
    assert due == [430, 600]


def test_renewal_is_due_to_a_block_too_and_what_the_hook_raises_is_raised() -> None:
    """Having minted nothing; the next mint goes on."""
    clock = Clock()

    def fail() -> None:
        raise RuntimeError("hook")

    minter = Minter(DEFAULT, clock_ns=clock, on_renewal_due=fail)
    minter.install(1, 1000, 1400, 1000)
    first = minter.mint()
    clock.advance_ms(100)
    with pytest.raises(RuntimeError, match="hook"):
        minter.mint_many(10)
    assert minter.mint() > first


def test_the_hook_for_what_is_needed_is_asked_instead_of_raising() -> None:
    """It waits or installs, outside of all locks, and the mint goes on; what it raises is raised."""
    clock, needs = Clock(), []

    def help_it(need: NeedsWindow | NeedsWait) -> None:
        needs.append(type(need).__name__)
        if isinstance(need, NeedsWait):
            clock.now_ns += round(need.seconds * 1e9)
        elif need.reason == "none":
            minter.install(1, 20, 25, 20)
        elif need.reason == "used":
            minter.extend(27, 20)
        else:
            raise need

    minter = Minter(TINY, clock_ns=clock, max_ahead_ms=5, on_exhausted=help_it)
    ids = [minter.mint() for _ in range(7 * 4)]
    assert rising(ids)
    assert needs == ["NeedsWindow", "NeedsWindow", "NeedsWait"]
    clock.advance_ms(100)
    with pytest.raises(NeedsWindow, match="ended"):
        minter.mint()


@both_paths
def test_revoking_is_for_good_and_tells_what_was_used(locked: bool) -> None:
    """The rest of the window, from the unit after the last id's, is never minted, so it can be given back."""
    minter = Minter(TINY, clock_ns=Clock(), max_ahead_ms=10, lock_every_call=locked)
    minter.install(1, 20, 60, 20)
    for _ in range(5):
        minter.mint()
    assert (minter.revoke(), minter.revoke()) == (22, 22)
    minter.install(2, 60, 90, 60)
    minter.extend(200, 60)
    minter.rearm_renewal()
    assert minter.info().until_unit == 60
    for attempt in (minter.mint, lambda: minter.mint_many(1), lambda: minter.mint_many(0)):
        with pytest.raises(ClusterClosed):
            attempt()


def test_what_is_left_of_a_chunk_counts_as_unused() -> None:
    """Chunks are of 256; the unit after is the one after the last id; the whole window, if there is none."""
    minter = Minter(DEFAULT, clock_ns=Clock())
    minter.install(1, 20, 60, 20)
    assert minter.revoke() == 20
    minter = Minter(DEFAULT, clock_ns=Clock())
    minter.install(1, 20, 60, 20)
    ids = [minter.mint() for _ in range(4096)]
    assert minter.revoke() == DEFAULT.decompose(ids[-1])[0] + 1 == 21


def test_id_time_follows_what_comes_with_an_extension() -> None:
    """Ahead at once; back by a quarter of what may be ahead, so that nobody waits; small lags not at all."""
    clock = Clock()
    minter = Minter(DEFAULT, clock_ns=clock, max_ahead_ms=1000)
    minter.install(1, 1000, 60_000, 1000)
    clock.advance_ms(500)
    for told, expected in [(1400, 1500), (5000, 5000), (4750, 5000), (4749, 4750), (10, 4500), (4500, 4500)]:
        minter.extend(60_000, told)
        assert minter.info().now_unit == expected
        minter.mint()
    for _ in range(50):
        minter.extend(60_000, 0)
    assert minter.info().now_unit == 1000  # never before the window


@both_paths
def test_setting_the_time_wastes_no_id(locked: bool) -> None:
    """What is left of a chunk goes on, be it after an extension, a failed renewal or another window of the worker."""
    minter = Minter(DEFAULT, clock_ns=Clock(), lock_every_call=locked)
    minter.install(1, 1000, 2000, 1000)
    ids = [minter.mint()]
    minter.extend(3000, 1000)
    ids.append(minter.mint())
    minter.rearm_renewal()
    ids.append(minter.mint())
    minter.install(1, 1000, 4000, 1000)
    ids.append(minter.mint())
    assert ids == [ids[0] + 1024 * n for n in range(4)]


def test_a_window_never_gets_shorter() -> None:
    """An old answer that comes late takes nothing back."""
    minter = Minter(DEFAULT, clock_ns=Clock())
    minter.install(1, 1000, 2000, 1000)
    minter.extend(1500, 1000)
    assert minter.info().until_unit == 2000


def test_a_window_from_the_future_begins_at_its_beginning() -> None:
    """Id time is that of the window, not the cluster's: a restored cluster skips ahead, and nobody waits for it."""
    minter = Minter(DEFAULT, clock_ns=Clock())
    minter.install(1, 600_000, 660_000, 1000)
    assert DEFAULT.decompose(minter.mint())[0] == 600_000


@pytest.mark.parametrize(
    "window", [(-1, 0, 5, 0), (4, 0, 5, 0), (0, -1, 5, 0), (0, 5, 5, 0), (0, 256, 300, 256)]
)
def test_what_is_no_window_is_refused(window: tuple[int, int, int, int]) -> None:
    """Another layout's worker, nothing in it, or past the last unit."""
    minter = Minter(TINY, clock_ns=Clock(), max_ahead_ms=10)
    with pytest.raises(UsageError, match="no window"):
        minter.install(*window)


def test_less_ahead_than_a_unit_is_refused() -> None:
    """10 ms of a second's unit would be none."""
    with pytest.raises(UsageError, match="at least 10"):
        Minter(SONYFLAKE, max_ahead_ms=9)


def test_the_cheap_clock_only_ends_chunks() -> None:
    """One that stands still, as a machine's in suspend, mints the rest of its chunk; then the real time counts."""
    clock, pace = Clock(), Clock(10**15)
    minter = Minter(DEFAULT, clock_ns=clock, pace_ns=pace)
    minter.install(1, 1000, 2000, 1000)
    minter.mint()
    clock.advance_ms(500)
    ids = [minter.mint() for _ in range(256)]
    assert [DEFAULT.decompose(i)[0] for i in ids] == [1000] * 255 + [1500]
    clock.advance_ms(500)
    pace.advance_ms(1)
    with pytest.raises(NeedsWindow, match="ended"):
        minter.mint()


@both_paths
def test_the_clocks_of_this_machine_make_ids_too(locked: bool) -> None:
    """By default, with the wait that a hook would do: ids rise, and time goes on."""
    minter = Minter(SONYFLAKE, lock_every_call=locked)
    minter.install(1, 1000, 1_000_000, 1000)
    ids = [minter.mint() for _ in range(2000)]
    assert rising(ids)
    assert minter.info().now_unit >= 1000
