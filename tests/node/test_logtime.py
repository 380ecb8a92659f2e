"""log_time: monotone whatever the clocks do, and slowly right."""

from __future__ import annotations

import random

from coordlib.node.logtime import GAP_MS_MAX, LogClock

SET_MS = 1_700_000_000_000


def test_it_advances_with_the_leaders_clock() -> None:
    """Without anybody's wall clock too."""
    clock = LogClock(5000, 100, 2)
    assert [clock.read(now) for now in (100, 150, 150, 1100)] == [5000, 5050, 5050, 6000]


def test_it_never_goes_back() -> None:
    """Neither when a clock is set back, nor when ours stands still."""
    rng = random.Random(1)
    clock, now, last = LogClock(10_000, 0, 2), 0, 0
    for _ in range(2000):
        now += rng.randint(-5, 300)
        clock.observe(rng.choice("abc"), rng.choice((0, 10_000 + now, 10**13)), now)
        read = clock.read(now)
        assert read >= last
        last = read


def test_it_is_slewed_toward_the_median_by_a_tenth_at_most() -> None:
    """One voter's wrong clock moves nothing."""
    clock = LogClock(SET_MS, 0, 2)
    for voter, wall in (("a", SET_MS + 5000), ("b", SET_MS + 5000), ("c", 10**13)):
        clock.observe(voter, wall, 0)
    assert clock.read(1000) == SET_MS + 1100
    clock = LogClock(SET_MS + 5000, 0, 2)
    for voter in "abc":
        clock.observe(voter, SET_MS, 0)
    assert clock.read(1000) == SET_MS + 5900


def test_a_jump_forward_needs_a_quorum() -> None:
    """As after a long stop of the whole cluster."""
    target = SET_MS + 2 * GAP_MS_MAX
    clock = LogClock(SET_MS, 0, 2)
    clock.observe("a", target, 0)
    assert clock.read(0) == SET_MS
    clock.observe("b", target, 0)
    assert clock.read(0) == target


def test_a_leader_goes_on_from_what_is_in_the_log_once_it_has_applied_it() -> None:
    """Elected with an empty state (it had just been started), it must not let time stand still until it caught up."""
    clock = LogClock(0, 100, 2)
    clock.observe("a", 10**13, 100)
    assert clock.read(150) == 50
    clock.follow(29_597)
    assert clock.read(1150) == 30_597
    clock.follow(20_000)
    assert clock.read(1151) == 30_598


def test_a_new_cluster_begins_at_the_time_of_a_quorum() -> None:
    """Not in 1970."""
    clock = LogClock(0, 0, 2)
    clock.observe("a", 1_700_000_000_000, 0)
    clock.observe("b", 1_700_000_000_100, 0)
    assert clock.read(0) >= 1_700_000_000_000


def test_a_new_cluster_begins_at_the_earlier_time_when_its_clocks_disagree() -> None:
    """The epoch of ids is after 1970: time that stays there grants no windows. Also under a second leader."""
    clock = LogClock(0, 0, 2)
    clock.observe("a", 1_700_003_600_000, 0)
    assert clock.read(500) == 500
    clock.observe("b", 1_700_000_000_000, 0)
    assert clock.read(1000) == 1_700_000_001_000
    second = LogClock(500, 0, 2)
    for voter, wall_ms in (("a", 1_700_003_600_000), ("b", 1_700_000_000_000), ("c", 1_700_007_200_000)):
        second.observe(voter, wall_ms, 0)
    assert second.read(0) == 1_700_003_600_000
