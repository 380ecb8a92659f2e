"""Windows of id time: no two of one worker ever overlap, whatever is asked, lost, restored or skipped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordlib.errors import ConditionFailed, IdOverflow, NotHolder, QuotaExceeded, UsageError
from coordlib.machine import Limits, Machine, commands
from coordlib.machine.ids import DEFAULT_EPOCH_MS, HISTORY_MAX, SKIP_MS_MAX
from tests.machine.driver import Driver, restore, snapshot

NAME = b"orders"
CL64 = (41, 12, 10, 1, 1, 1)  # units are milliseconds since the driver's zero, less one
FEW = (41, 12, 1, 1, 1, 1)  # two workers


def ready(limits: Limits | None = None, now_ms: int = 1001) -> tuple[Driver, int]:
    driver = Driver(limits)
    driver.now_ms = now_ms
    return driver, driver.open("one")


def lease(
    driver: Driver, session: int, window_ms: int = 100, layout: Any = CL64, name: bytes = NAME
) -> list[Any]:
    """Worker, lease, from, until, now, epoch."""
    return driver.run(session, commands.ids_lease(name, layout, window_ms))


# --- granting ---------------------------------------------------------------------------------------------


def test_a_window_begins_at_log_time_and_lasts_as_long_as_was_asked() -> None:
    """The first of a generator is of worker 0."""
    driver, session = ready()
    assert lease(driver, session) == [0, 1, 1000, 1100, 1000, 1]


def test_units_are_rounded_up_to_the_next_that_begins() -> None:
    """A window never reaches back to a time before it was granted."""
    driver, session = ready(now_ms=1001)
    assert lease(driver, session, 95, (39, 8, 16, 10, 500, 1)) == [0, 1, 51, 60, 51, 500]
    assert lease(driver, session, 3, (39, 8, 16, 10, 501, 1), b"other") == [0, 2, 50, 51, 50, 501]


def test_an_epoch_of_zero_is_the_clusters_own() -> None:
    """It is fixed with the name; naming it is the same layout."""
    driver, session = ready(now_ms=DEFAULT_EPOCH_MS + 5)
    assert lease(driver, session, layout=(41, 12, 10, 1, 0, 1)) == [0, 1, 5, 105, 5, DEFAULT_EPOCH_MS]
    assert lease(driver, session, layout=(41, 12, 10, 1, DEFAULT_EPOCH_MS, 1))[0] == 1


def test_time_before_the_epoch_is_unit_zero() -> None:
    """A clock that is years behind makes no negative ids."""
    driver, session = ready()
    assert lease(driver, session, layout=(41, 12, 10, 1, 0, 1))[2:5] == [0, 100, 0]


def test_workers_that_were_never_used_come_first_then_the_longest_free() -> None:
    """So that a worker rests as long as possible."""
    driver, session = ready()
    windows = (300, 100, 200, 400)
    assert [lease(driver, session, window, (41, 12, 2, 1, 1, 1))[0] for window in windows] == [0, 1, 2, 3]
    driver.now_ms += 350
    assert [lease(driver, session, 1000, (41, 12, 2, 1, 1, 1))[0] for _ in range(3)] == [1, 2, 0]


def test_a_worker_is_leased_again_only_when_its_window_has_ended() -> None:
    """Until then the refusal says how many there are, and how long it takes."""
    driver, session = ready()
    lease(driver, session, 100, FEW)
    lease(driver, session, 70, FEW)
    driver.now_ms += 69
    with pytest.raises(QuotaExceeded) as caught:
        lease(driver, session, 100, FEW)
    assert (caught.value.maximum, caught.value.free_in_ms) == (2, 1)
    assert "all 2 workers" in caught.value.message
    driver.now_ms += 1
    assert lease(driver, session, 100, FEW)[:4] == [1, 3, 1070, 1170]


def test_a_request_sent_twice_is_one_lease() -> None:
    """The second copy gets the first one's window, and takes no worker."""
    driver, session = ready()
    operation = commands.ids_lease(NAME, CL64, 100)
    first = driver.apply(session, operation)
    assert first == driver.apply(session, operation, sequence=1)
    assert lease(driver, session)[0] == 1


def test_generators_do_not_share_workers() -> None:
    """Each name counts its own from 0, also when one name is the beginning of the other."""
    driver, session = ready()
    names = (b"n", b"n\x00", b"n" + bytes(8), b"n" + bytes(16))
    assert [lease(driver, session, name=name)[0] for name in names] == [0, 0, 0, 0]
    driver.machine.check_invariants()


def test_the_layout_of_a_name_never_changes() -> None:
    """Two layouts under one name could compose the same number twice; the refusal shows both."""
    driver, session = ready()
    lease(driver, session)
    for other in ((41, 12, 9, 1, 1, 1), (41, 12, 10, 1, 2, 1), (41, 12, 10, 1, 1, 0), (41, 12, 10, 10, 1, 1)):
        with pytest.raises(ConditionFailed) as caught:
            lease(driver, session, layout=other)
        assert caught.value.present in caught.value.message
        assert caught.value.wanted in caught.value.message
        assert caught.value.present != caught.value.wanted


def test_the_end_of_its_session_does_not_end_a_lease() -> None:
    """Minting goes on without contact, so only time may give the worker to somebody else."""
    driver, session = ready()
    worker, number, *_ = lease(driver, session)
    other = driver.open("two")
    driver.run(0, commands.expire_sessions([session]))
    assert lease(driver, other)[0] == 1
    driver.now_ms += 50
    assert driver.run(other, commands.ids_renew(NAME, worker, number, 100)) == [1150, 1050]


# --- renewing and returning -------------------------------------------------------------------------------


def test_a_renewal_extends_the_window_and_never_shortens_it() -> None:
    """From now on, for as long as was asked."""
    driver, session = ready()
    lease(driver, session)
    driver.now_ms += 40
    assert driver.run(session, commands.ids_renew(NAME, 0, 1, 500)) == [1540, 1040]
    assert driver.run(session, commands.ids_renew(NAME, 0, 1, 10)) == [1540, 1040]
    assert driver.ask(commands.query_ids_owner(NAME, 0, 1000)) == ["one"]
    assert driver.ask(commands.query_ids_owner(NAME, 0, 1539)) == ["one"]


def test_a_lease_ends_at_the_end_of_its_window() -> None:
    """One unit before it can be renewed; at the end it cannot, even if nobody has taken the worker."""
    driver, session = ready()
    lease(driver, session)
    driver.now_ms += 99
    assert driver.run(session, commands.ids_renew(NAME, 0, 1, 1)) == [1100, 1099]
    driver.now_ms += 1
    with pytest.raises(NotHolder) as caught:
        driver.run(session, commands.ids_renew(NAME, 0, 1, 1000))
    assert (caught.value.worker, caught.value.lease) == (0, 1)


@pytest.mark.parametrize("place", [(b"other", 0, 1), (NAME, 1, 1), (NAME, 0, 2), (NAME, 1 << 62, 1)])
def test_only_the_lease_itself_is_renewed_or_returned(place: tuple[bytes, int, int]) -> None:
    """Another name, worker or lease is refused and nothing is changed."""
    driver, session = ready()
    lease(driver, session)
    for operation in (commands.ids_renew(*place, 500), commands.ids_return(*place, 1000)):
        with pytest.raises(NotHolder):
            driver.run(session, operation)
    assert driver.run(session, commands.ids_renew(NAME, 0, 1, 1)) == [1100, 1000]


@pytest.mark.parametrize(
    ("used_until", "expected"), [(1030, 1030), (0, 1000), (1000, 1000), (1100, 1100), (9999, 1100)]
)
def test_what_was_not_used_is_given_back(used_until: int, expected: int) -> None:
    """The worker is free from there on, and its next window begins no earlier."""
    driver, session = ready()
    lease(driver, session, 100, (41, 12, 0, 1, 1, 1))
    assert driver.run(session, commands.ids_return(NAME, 0, 1, used_until)) == [expected]
    driver.now_ms = 1001 + max(0, expected - 1000)
    assert lease(driver, session, 100, (41, 12, 0, 1, 1, 1))[2] == expected


def test_a_return_is_final_and_may_be_repeated() -> None:
    """A second, smaller mark does not give back what was used, and nothing can be renewed any more."""
    driver, session = ready()
    lease(driver, session)
    for used_until in (1060, 1060, 1010, 1090):
        assert driver.run(session, commands.ids_return(NAME, 0, 1, used_until)) == [1060]
    with pytest.raises(NotHolder):
        driver.run(session, commands.ids_renew(NAME, 0, 1, 100))


def test_a_late_return_does_not_touch_the_next_lease() -> None:
    """It names the lease that it ends."""
    driver, session = ready()
    one = (41, 12, 0, 1, 1, 1)
    lease(driver, session, 100, one)
    driver.now_ms += 100
    assert lease(driver, session, 100, one)[:4] == [0, 2, 1100, 1200]
    with pytest.raises(NotHolder):
        driver.run(session, commands.ids_return(NAME, 0, 1, 1000))
    assert driver.run(session, commands.ids_renew(NAME, 0, 2, 150)) == [1250, 1100]


def test_short_leases_by_the_thousand_cost_no_memory() -> None:
    """Pre-fork servers come and go; what finds the free worker stays as small as the workers are many."""
    driver, session = ready()
    for number in range(1, 2001):
        worker, _, begin, *_ = lease(driver, session, layout=FEW)
        driver.run(
            session, commands.ids_return(NAME, worker, number, begin + 1), acknowledged=driver.last(session)
        )
        driver.now_ms += 1
    driver.machine.check_invariants()
    assert len(driver.machine._ids._generators[NAME].heap) <= 2 * 2 + 64


# --- the end of time --------------------------------------------------------------------------------------


def test_windows_are_cut_at_the_last_unit_and_then_there_are_none() -> None:
    """The name is not created by a refusal either."""
    driver, session = ready(now_ms=1001)
    layout = (10, 12, 10, 1, 1, 1)
    assert lease(driver, session, 100, layout)[2:4] == [1000, 1024]
    assert driver.run(session, commands.ids_renew(NAME, 0, 1, 500)) == [1024, 1000]
    driver.now_ms = 1025
    for name in (NAME, b"new"):
        with pytest.raises(IdOverflow) as caught:
            lease(driver, session, 100, layout, name)
        assert caught.value.units == 1024
    assert driver.machine.counters["id_generators"] == 1


def test_bit_63_is_never_reached() -> None:
    """Of 42 bits of time over 22 others, only 41 can be used."""
    driver, session = ready(now_ms=(1 << 41) - 9)
    assert lease(driver, session, 100, (42, 12, 10, 1, 1, 0))[2:4] == [(1 << 41) - 10, 1 << 41]


# --- limits -----------------------------------------------------------------------------------------------


def test_generators_are_limited_before_append_and_when_applied() -> None:
    """A known name goes on being leased."""
    driver, session = ready(Limits(id_generators_max=1))
    lease(driver, session)
    lease(driver, session)
    new = commands.ids_lease(b"new", CL64, 100)
    with pytest.raises(QuotaExceeded) as caught:
        driver.machine.check(session, 3, 0, new)
    assert caught.value.limit == "id_generators_max"
    with pytest.raises(QuotaExceeded):
        driver.run(session, new)
    driver.machine.check(session, 4, 0, commands.ids_lease(NAME, CL64, 100))


def test_workers_ever_used_are_limited_and_those_used_go_on() -> None:
    """A layout of millions of workers does not fill the memory: the ones that became free are taken instead."""
    driver, session = ready(Limits(id_workers_max=3))
    wide = (41, 0, 20, 1, 1, 1)
    assert [lease(driver, session, 100, wide)[0] for _ in range(3)] == [0, 1, 2]
    for name in (NAME, b"new"):
        with pytest.raises(QuotaExceeded) as caught:
            lease(driver, session, 100, wide, name)
        assert caught.value.limit == "id_workers_max"
    driver.now_ms += 100
    assert lease(driver, session, 100, wide)[0] == 0
    driver.machine.check_invariants()


# --- skipping ---------------------------------------------------------------------------------------------


def test_after_a_skip_no_window_begins_before_the_floor() -> None:
    """Of known and of new generators; and every lease there was has ended."""
    driver, session = ready()
    lease(driver, session, 100)
    assert driver.run(session, commands.ids_skip(5001)) == [5001, True]
    for operation in (commands.ids_renew(NAME, 0, 1, 10), commands.ids_return(NAME, 0, 1, 1000)):
        with pytest.raises(NotHolder):
            driver.run(session, operation)
    worker, number, *window = lease(driver, session)
    assert (worker, window) == (1, [5000, 5100, 5000, 1])
    assert number > 5001 << 15
    assert lease(driver, session, name=b"new")[2] == 5000
    assert lease(driver, session, 100, (41, 12, 10, 10, 1, 1), b"coarse")[2] == 500
    driver.machine.check_invariants()


def test_a_lease_that_runs_ahead_is_renewed_by_its_own_clock() -> None:
    """
    Until log_time has come to the floor, windows last as long as any other, and workers are not used up faster.
    """
    driver, session = ready()
    driver.run(session, commands.ids_skip(5001))
    _, number, begin, until, now, _ = lease(driver, session, 100, FEW)
    assert (begin, until, now) == (5000, 5100, 5000)
    driver.now_ms += 60
    assert driver.run(session, commands.ids_renew(NAME, 0, number, 100)) == [5160, 5060]
    driver.now_ms += 100
    with pytest.raises(NotHolder):
        driver.run(session, commands.ids_renew(NAME, 0, number, 100))
    # Its clock has reached the end of its window: it is free, and its next window follows the last.
    assert lease(driver, session, 100, FEW)[0] == 1
    assert lease(driver, session, 100, FEW)[:1] == [0]
    assert driver.ask(commands.query_ids_owner(NAME, 0, 5160)) == ["one"]


def test_a_skip_frees_all_workers_but_not_their_time() -> None:
    """A floor that is too early cannot make a window begin within another."""
    driver, session = ready()
    for window_ms in (500, 300):
        lease(driver, session, window_ms, FEW)
    driver.run(session, commands.ids_skip(1002))
    windows = [lease(driver, session, 50, FEW) for _ in range(2)]
    assert [(found[0], found[2], found[3]) for found in windows] == [(0, 1500, 1550), (1, 1300, 1350)]


def test_a_floor_that_is_no_later_changes_nothing() -> None:
    """A skip may be repeated: it does not end the leases that were granted since."""
    driver, session = ready()
    driver.run(session, commands.ids_skip(5001))
    _, number, *_ = lease(driver, session)
    for floor in (5001, 4000, 0):
        assert driver.run(session, commands.ids_skip(floor)) == [5001, False]
    assert driver.run(session, commands.ids_renew(NAME, 0, number, 200)) == [5200, 5000]


def test_a_floor_in_another_unit_of_time_is_refused() -> None:
    """A floor in microseconds would end all ids for good."""
    driver, session = ready()
    with pytest.raises(UsageError):
        driver.run(session, commands.ids_skip(driver.now_ms + SKIP_MS_MAX + 1))
    assert driver.run(session, commands.ids_skip(driver.now_ms + SKIP_MS_MAX))[1] is True


def test_a_history_that_was_lost_is_skipped() -> None:
    """
    Its leases, which have the numbers that the next ones would have had, are nobody's, and its windows are no one's.
    """
    driver, session = ready()
    lease(driver, session)
    backup = snapshot(driver.machine)
    lost = [lease(driver, session, 600_000)[:4] for _ in range(3)]
    restored = Driver(machine=restore(backup))
    restored.now_ms, restored.opened = 2000, 100
    other = restored.open("new")
    assert restored.run(other, commands.ids_skip(driver.now_ms + 600_000))[1] is True
    for worker, number, _, until in lost:
        found = lease(restored, other)
        assert (found[0], found[2] >= until) == (worker, True)
        with pytest.raises(NotHolder):
            restored.run(other, commands.ids_renew(NAME, worker, number, 100))


# --- queries ----------------------------------------------------------------------------------------------


def test_the_owner_of_a_worker_is_remembered_for_its_last_windows() -> None:
    """To tell where an id came from."""
    driver, _ = ready()
    one = (41, 12, 0, 1, 1, 1)
    for number in range(HISTORY_MAX + 2):
        lease(driver, driver.open(f"node-{number}"), 100, one)
        driver.now_ms += 150
    found = [
        driver.ask(commands.query_ids_owner(NAME, 0, 1000 + 150 * number))[0]
        for number in range(HISTORY_MAX + 2)
    ]
    assert found == [None, None, *[f"node-{number}" for number in range(2, HISTORY_MAX + 2)]]
    assert driver.ask(commands.query_ids_owner(NAME, 0, 2350 + 99)) == ["node-9"]
    assert driver.ask(commands.query_ids_owner(NAME, 0, 2350 + 100)) == [None]
    assert driver.ask(commands.query_ids_owner(NAME, 1, 2350)) == [None]
    assert driver.ask(commands.query_ids_owner(b"other", 0, 2350)) == [None]


def test_a_state_says_how_far_its_leases_may_be_ahead() -> None:
    """Who restores it skips as much more: the original went on to grant windows that far beyond the time."""
    driver, _ = ready(now_ms=1_000_000)
    assert driver.ask(commands.query_ids_list())[-1] == 0
    driver.run(driver.open("operator"), commands.ids_skip(driver.now_ms + 600_000))
    # Before anything was leased: what the original did next is nowhere in the back-up.
    backup = snapshot(driver.machine)
    session = driver.open("two")
    worker, _, _, _, _, _ = lease(driver, session, 600_000)
    driver.now_ms += 300_000
    granted = lease(driver, session, 600_000)
    original_ms = granted[3]
    restored = Driver(machine=restore(backup))
    restored.now_ms = driver.now_ms + 60_000
    ahead_ms = restored.ask(commands.query_ids_list())[-1]
    floor_ms = restored.now_ms + ahead_ms + 600_000
    restored.opened = 500
    restored.run(restored.open("operator"), commands.ids_skip(floor_ms))
    assert floor_ms >= original_ms + CL64[4]
    assert lease(restored, restored.open("three"))[2] >= original_ms
    assert worker == 0


def test_generators_can_be_looked_at() -> None:
    """Layout, how many workers there are, were ever used and are leased; all names, page by page."""
    driver, session = ready()
    assert driver.ask(commands.query_ids_info(NAME)) == [None, 0, 0, 0, 0, 0]
    for window_ms in (100, 200, 300):
        lease(driver, session, window_ms)
    lease(driver, session, layout=FEW, name=b"a")
    driver.now_ms += 200
    driver.run(session, commands.ids_skip(7))
    assert driver.ask(commands.query_ids_info(NAME)) == [list(CL64), 1024, 3, 0, 1200, 7]
    lease(driver, session)
    assert driver.ask(commands.query_ids_info(NAME)) == [list(CL64), 1024, 4, 1, 1200, 7]
    # A skip to a time that is past: workers are given away whose last windows may not be over.
    assert driver.ask(commands.query_ids_list()) == [
        [[b"a", list(FEW), 1], [NAME, list(CL64), 4]],
        False,
        600_000,
    ]
    assert driver.ask(commands.query_ids_list(None, 1)) == [[[b"a", list(FEW), 1]], True, 600_000]
    assert driver.ask(commands.query_ids_list(b"a", 1)) == [[[NAME, list(CL64), 4]], False, 600_000]


# --- against a dumb model ---------------------------------------------------------------------------------

LAYOUTS = {b"x": (41, 12, 2, 1, 1, 1), b"y": (41, 8, 1, 10, 400, 0)}


class Model(RuleBasedStateMachine):
    """
    A set of all units that anybody may ever have used, and a scan over all workers to find a free one.

    Histories are lost and restored from a back-up; the units used in them stay used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.driver, self.session = ready()
        self.used: set[tuple[bytes, int, int]] = set()
        self.last_ms = 0  # the end of the latest window of any history
        # All that a back-up has: for each name and worker the lease, its offset, from, until, is it returned.
        self.state: dict[tuple[bytes, int], list[Any]] = {}
        self.given: list[tuple[bytes, int, int]] = []  # of all histories
        self.backup: tuple[bytes, int, Any] | None = None

    def run(self, operation: bytes) -> list[Any]:
        acknowledged = self.driver.sequences.get(self.session, 0)
        return self.driver.run(self.session, operation, acknowledged=acknowledged)

    def now(self, name: bytes) -> int:
        _, _, _, unit_ms, epoch_ms, _ = LAYOUTS[name]
        return max(0, -((epoch_ms - self.driver.now_ms) // unit_ms))

    def take(self, name: bytes, worker: int, units: range) -> None:
        wanted = {(name, worker, unit) for unit in units}
        assert not wanted & self.used
        self.used |= wanted
        self.last_ms = max(self.last_ms, LAYOUTS[name][4] + units.stop * LAYOUTS[name][3])

    @rule(name=st.sampled_from(sorted(LAYOUTS)), window_ms=st.integers(1, 90))
    def lease(self, name: bytes, window_ms: int) -> None:
        operation = commands.ids_lease(name, LAYOUTS[name], window_ms)
        now, workers = self.now(name), 1 << LAYOUTS[name][2]
        unused = [worker for worker in range(workers) if (name, worker) not in self.state]
        free = sorted(
            (0 if lease is None else until - offset, worker)
            for (other, worker), (lease, offset, _, until, _) in self.state.items()
            if other == name and (lease is None or until - offset <= now)
        )
        if not unused and not free:
            with pytest.raises(QuotaExceeded):
                self.run(operation)
            return
        worker, lease, begin, until, clock, _ = self.run(operation)
        assert worker == (unused[0] if unused else free[0][1])
        assert (clock, until - begin) == (begin, max(1, window_ms // LAYOUTS[name][3]))
        assert begin >= now
        assert (name, worker, lease) not in self.given
        self.take(name, worker, range(begin, until))
        self.state[name, worker] = [lease, begin - now, begin, until, False]
        self.given.append((name, worker, lease))

    @precondition(lambda self: self.given)
    @rule(pick=st.integers(0, 1000), window_ms=st.integers(1, 90))
    def renew(self, pick: int, window_ms: int) -> None:
        name, worker, lease = self.given[-1 - pick % len(self.given)]
        operation = commands.ids_renew(name, worker, lease, window_ms)
        held = self.state.get((name, worker), [None, 0, 0, 0, False])
        clock = self.now(name) + held[1]
        if held[0] != lease or held[4] or clock >= held[3]:
            with pytest.raises(NotHolder):
                self.run(operation)
            return
        until = max(held[3], clock + max(1, window_ms // LAYOUTS[name][3]))
        assert [until, clock] == self.run(operation)
        self.take(name, worker, range(held[3], until))
        held[3] = until

    @precondition(lambda self: self.given)
    @rule(pick=st.integers(0, 1000), used=st.integers(-5, 100))
    def give_back(self, pick: int, used: int) -> None:
        name, worker, lease = self.given[-1 - pick % len(self.given)]
        held = self.state.get((name, worker), [None, 0, 0, 0, False])
        used_until = max(0, held[2] + used)
        operation = commands.ids_return(name, worker, lease, used_until)
        if held[0] != lease:
            with pytest.raises(NotHolder):
                self.run(operation)
            return
        if not held[4]:
            until = max(held[2], min(held[3], used_until))
            self.used -= {(name, worker, unit) for unit in range(until, held[3])}
            held[3:] = [until, True]
        assert [held[3]] == self.run(operation)

    @rule(delta_ms=st.integers(1, 60))
    def wait(self, delta_ms: int) -> None:
        self.driver.now_ms += delta_ms

    @rule(delta_ms=st.integers(-50, 200))
    def skip(self, delta_ms: int) -> None:
        if self.run(commands.ids_skip(self.driver.now_ms + delta_ms))[1]:
            for held in self.state.values():
                held[0] = None

    @rule()
    def back_up(self) -> None:
        self.backup = (snapshot(self.driver.machine), len(self.driver.log), copy.deepcopy(self.state))

    @precondition(lambda self: self.backup is not None)
    @rule(delta_ms=st.integers(0, 50))
    def lose(self, delta_ms: int) -> None:
        """Go on from the back-up, past all that the history that is lost can have granted."""
        assert self.backup is not None
        data, entries, state = self.backup
        self.driver.machine = restore(data)
        self.driver.index = self.driver.machine.applied_index
        del self.driver.log[entries:]
        self.state = copy.deepcopy(state)
        floor_ms = max(self.last_ms, self.driver.machine._ids.floor_ms + 1) + delta_ms
        assert self.run(commands.ids_skip(floor_ms)) == [floor_ms, True]
        for held in self.state.values():
            held[0] = None
        self.backup = None

    @rule()
    def restart(self) -> None:
        """Go on with a machine that was restored from a snapshot."""
        old, self.driver.machine = self.driver.machine, restore(snapshot(self.driver.machine))
        assert old.digest() == self.driver.machine.digest()

    @invariant()
    def agrees(self) -> None:
        self.driver.machine.check_invariants()

    def teardown(self) -> None:
        assert self.driver.replay().digest() == self.driver.machine.digest()


Model.TestCase.settings = settings(derandomize=True, deadline=None, max_examples=100, stateful_step_count=50)
TestModel = Model.TestCase


def test_a_restored_machine_chooses_as_the_others_do() -> None:
    """Which worker is next follows from the state, not from how it came about."""
    driver, session = ready()
    for number in range(300):
        worker, lease_number, begin, *_ = lease(driver, session, 1 + number * 37 % 90, (41, 12, 8, 1, 1, 1))
        if number % 3 == 0:
            driver.run(
                session,
                commands.ids_return(NAME, worker, lease_number, begin + 1),
                acknowledged=driver.last(session),
            )
        driver.now_ms += 1
    other = Driver(machine=restore(snapshot(driver.machine)))
    other.sequences = dict(driver.sequences)
    driver.now_ms = other.now_ms = driver.now_ms + 200
    for _ in range(256):
        operation = commands.ids_lease(NAME, (41, 12, 8, 1, 1, 1), 100)
        assert driver.apply(session, operation) == other.apply(session, operation)
    assert driver.machine.digest() == other.machine.digest()


def test_an_empty_machine_has_no_ids() -> None:
    """Nor does a snapshot from before there were any."""
    machine = Machine()
    assert (machine.counters["id_generators"], machine.counters["id_workers"]) == (0, 0)
