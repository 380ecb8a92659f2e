"""Locks: one holder, in order, with tokens that only rise."""

from __future__ import annotations

from typing import Any

import pytest

from coordlib.cbor import encode
from coordlib.errors import LockLost, QuotaExceeded, RemoteProtocolError
from coordlib.machine import (
    Limits,
    LockGranted,
    LockWithdrawn,
    Machine,
    SessionEnded,
    StaleRequest,
    commands,
)
from tests.machine.driver import Driver, restore, snapshot

LOCK = b"invoice-42"
ACQUIRE = commands.acquire(LOCK)


def acquire(driver: Driver, session: int, lock: bytes = LOCK) -> tuple[int, int]:
    """Acquire; the acquisition's sequence and the token, 0 if it waits."""
    _, token, _ = driver.run(session, commands.acquire(lock))
    return driver.last(session), token


def state(driver: Driver, session: int, sequence: int, lock: bytes = LOCK) -> list[object]:
    return driver.ask(commands.query_acquisition(lock, session, sequence))


def test_a_free_lock_is_granted_at_once() -> None:
    """With a token, and without an effect: the reply says it."""
    driver = Driver()
    session = driver.open()
    applied = driver.apply(session, ACQUIRE)
    assert commands.decode_reply(applied.reply) == [True, 1, 0]
    assert applied.effects == ()
    assert state(driver, session, 1) == ["held", 1, 0]


def test_waiters_are_granted_in_the_order_of_the_log() -> None:
    """First come, first served; each is told by an effect."""
    driver = Driver()
    sessions = [driver.open() for _ in range(4)]
    replies = [driver.run(session, ACQUIRE) for session in sessions]
    assert replies == [[True, 1, 0], [False, 0, 1], [False, 0, 2], [False, 0, 3]]
    for number, session in enumerate(sessions[:-1]):
        effects = driver.effects(session, commands.release(LOCK, 1))
        assert [LockGranted(sessions[number + 1], 1, LOCK, number + 2)] == effects
    assert state(driver, sessions[3], 1) == ["held", 4, 0]


def test_acquiring_without_waiting_leaves_nothing_behind() -> None:
    """A try that fails is not a place in the queue."""
    driver = Driver()
    first, second = driver.open(), driver.open()
    driver.run(first, ACQUIRE)
    assert driver.run(second, commands.acquire(LOCK, wait=False)) == [False, 0, 0]
    assert state(driver, second, 1) == ["none", 0, 0]
    assert driver.effects(first, commands.release(LOCK, 1)) == []
    assert driver.run(second, commands.acquire(LOCK, wait=False)) == [True, 2, 0]


def test_locks_are_not_reentrant() -> None:
    """Two acquisitions of one session are two owners, of which the second waits."""
    driver = Driver()
    session = driver.open()
    first, _ = acquire(driver, session)
    second, token = acquire(driver, session)
    assert token == 0
    assert [LockGranted(session, second, LOCK, 2)] == driver.effects(session, commands.release(LOCK, first))
    assert state(driver, session, first) == ["none", 0, 0]


def test_a_repeated_acquire_is_the_same_acquisition() -> None:
    """A retry neither queues twice nor deadlocks with itself."""
    driver = Driver()
    session = driver.open()
    first = driver.apply(session, ACQUIRE)
    again = driver.apply(session, ACQUIRE, sequence=1)
    assert first == again
    assert [[session, "worker", 1, 1000], [], 0] == driver.ask(commands.query_lock(LOCK))


def test_a_late_release_does_not_free_a_later_acquisition() -> None:
    """A release names its acquisition (etcd #22082)."""
    driver = Driver()
    session, other = driver.open(), driver.open()
    first, _ = acquire(driver, session)
    assert driver.run(session, commands.release(LOCK, first)) == ["held"]
    second, token = acquire(driver, session)
    assert driver.run(session, commands.release(LOCK, first)) == ["none"]
    assert driver.run(other, commands.release(LOCK, second)) == ["none"]
    assert ["held", token, 0] == state(driver, session, second)


def test_a_release_withdraws_a_waiting_acquisition() -> None:
    """Giving up is the same command; the queue closes ranks."""
    driver = Driver()
    sessions = [driver.open() for _ in range(3)]
    for session in sessions:
        driver.run(session, ACQUIRE)
    assert state(driver, sessions[2], 1) == ["queued", 0, 2]
    assert driver.run(sessions[1], commands.release(LOCK, 1)) == ["queued"]
    assert state(driver, sessions[2], 1) == ["queued", 0, 1]
    assert [LockGranted(sessions[2], 1, LOCK, 2)] == driver.effects(sessions[0], commands.release(LOCK, 1))


def test_an_acquisition_released_before_it_arrived_is_refused_when_it_does() -> None:
    """Whoever asked for it has given up: it would be held by nobody. So it is after a snapshot, too."""
    driver = Driver()
    session, other = driver.open(), driver.open()
    assert driver.run(session, commands.release(LOCK, 1), sequence=2) == ["none"]
    after = Driver(machine=restore(snapshot(driver.machine)))
    for each in (driver, after):
        with pytest.raises(StaleRequest):
            each.run(session, ACQUIRE, sequence=1)
        assert state(each, session, 1) == ["none", 0, 0]
        each.machine.sessions.check_invariants()
        assert each.run(other, ACQUIRE, sequence=1)[0] is True


@pytest.mark.parametrize("released", [2, 3])
def test_a_release_forbids_nothing_that_was_asked_after_it(released: int) -> None:
    """Its own reply stays its own, and a sequence to come is not to be used up in advance."""
    driver = Driver()
    session = driver.open()
    first = driver.apply(session, commands.release(LOCK, released), sequence=2)
    assert commands.decode_reply(first.reply) == ["none"]
    assert driver.apply(session, commands.release(LOCK, released), sequence=2) == first
    assert driver.run(session, ACQUIRE, sequence=3)[0] is True


def test_a_release_leaves_the_reply_of_what_it_released() -> None:
    """A copy of the acquisition still gets the answer that it got."""
    driver = Driver()
    session = driver.open()
    first = driver.apply(session, ACQUIRE)
    driver.run(session, commands.release(LOCK, 1))
    assert driver.apply(session, ACQUIRE, sequence=1).reply == first.reply


def test_a_lock_that_nobody_wants_leaves_no_memory() -> None:
    """Locks by the million, one after the other, cost nothing."""
    driver = Driver()
    session = driver.open()
    for number in range(50):
        sequence, _ = acquire(driver, session, b"lock-%d" % number)
        driver.run(session, commands.release(b"lock-%d" % number, sequence))
    assert driver.machine.counters["locks"] == 0
    assert driver.machine._locks._by_session == {}


def test_tokens_rise_over_all_locks_and_their_deletion() -> None:
    """One counter gives them all, so a lock that was forgotten never repeats one."""
    driver = Driver()
    session = driver.open()
    tokens = []
    for number in range(20):
        sequence, token = acquire(driver, session, b"lock-%d" % (number % 3))
        tokens.append(token)
        driver.run(session, commands.release(b"lock-%d" % (number % 3), sequence))
        if number == 10:
            driver = Driver(machine=restore(snapshot(driver.machine)))
            driver.sequences[session] = 1000
    assert sorted(set(tokens)) == tokens


def test_a_new_restore_epoch_lifts_all_tokens() -> None:
    """After a restore from back-up no token of the lost history is given again; an epoch never goes back."""
    driver = Driver()
    session = driver.open()
    _, before = acquire(driver, session)
    driver.run(0, commands.begin_epoch(3))
    driver.run(0, commands.begin_epoch(2))
    _, after = acquire(driver, session, b"other")
    assert (before, after, driver.machine.restore_epoch) == (1, 3 << 48 | 2, 3)


def test_the_end_of_a_session_frees_all_it_held() -> None:
    """In the order of names, after everything of the session has been withdrawn."""
    driver = Driver()
    dying, other = driver.open(), driver.open()
    for lock in (b"b", b"a", b"c"):
        driver.run(dying, commands.acquire(lock))
    for lock in (b"c", b"b", b"a"):
        driver.run(other, commands.acquire(lock))
    assert [
        LockWithdrawn(dying, 1),
        LockWithdrawn(dying, 2),
        LockWithdrawn(dying, 3),
        LockGranted(other, 3, b"a", 4),
        LockGranted(other, 2, b"b", 5),
        LockGranted(other, 1, b"c", 6),
        SessionEnded(dying, "expired"),
    ] == driver.effects(0, commands.expire_sessions([dying]))


def test_nothing_is_granted_to_a_session_that_ends_at_the_same_time() -> None:
    """Neither to its own next waiter, nor to another one that the same entry expires (etcd #11456)."""
    driver = Driver()
    first, second, alive = driver.open(), driver.open(), driver.open()
    for session in (first, first, second, alive):
        driver.run(session, ACQUIRE)
    assert [
        LockWithdrawn(first, 1),
        LockWithdrawn(first, 2),
        LockWithdrawn(second, 1),
        LockGranted(alive, 1, LOCK, 2),
        SessionEnded(first, "expired"),
        SessionEnded(second, "expired"),
    ] == driver.effects(0, commands.expire_sessions([second, first]))


def test_a_dead_waiter_is_never_granted_even_if_it_was_left_behind() -> None:
    """The second line of defence: the holder's release looks whether the next one is alive (etcd #11456)."""
    driver = Driver()
    holder, dead, alive = driver.open(), driver.open(), driver.open()
    for session in (holder, dead, alive):
        driver.run(session, ACQUIRE)
    driver.machine.sessions.remove(dead)
    assert [LockWithdrawn(dead, 1), LockGranted(alive, 1, LOCK, 2)] == driver.effects(
        holder, commands.release(LOCK, 1)
    )
    driver.machine.check_invariants()


def test_breaking_a_lock_takes_it_from_its_holder() -> None:
    """The next waiter gets it, and the old holder's release does nothing."""
    driver = Driver()
    holder, waiter, operator = driver.open(), driver.open(), driver.open()
    driver.run(holder, ACQUIRE)
    driver.run(waiter, ACQUIRE)
    applied = driver.apply(operator, commands.break_lock(LOCK))
    assert commands.decode_reply(applied.reply) == [True, 1]
    assert (LockWithdrawn(holder, 1), LockGranted(waiter, 1, LOCK, 2)) == applied.effects
    assert driver.run(holder, commands.release(LOCK, 1)) == ["none"]
    assert driver.run(operator, commands.break_lock(b"free")) == [False, 0]
    driver.machine.check_invariants()


def test_waiting_ends_when_the_lock_is_granted_or_gone() -> None:
    """A WAIT is answered when its acquisition no longer queues, whatever became of it."""
    driver = Driver()
    holder, waiter = driver.open(), driver.open()
    driver.run(holder, ACQUIRE)
    driver.run(waiter, ACQUIRE)
    query = commands.query_acquisition(LOCK, waiter, 1)
    assert driver.machine.wait_condition(query) is None
    driver.run(holder, commands.release(LOCK, 1))
    assert driver.machine.query(query) == driver.machine.wait_condition(query)
    assert state(driver, waiter, 1) == ["held", 2, 0]
    driver.run(0, commands.expire_sessions([waiter]))
    reply = driver.machine.wait_condition(query)
    assert reply is not None
    assert commands.decode_reply(reply) == ["none", 0, 0]


@pytest.mark.parametrize("query", [commands.query_len(b"m"), b"\xff", encode([999])])
def test_waiting_for_anything_else_is_an_error(query: bytes) -> None:
    """And an answer, so that nobody waits for ever."""
    reply = Machine().wait_condition(query)
    assert reply is not None
    with pytest.raises(RemoteProtocolError):
        commands.decode_reply(reply)


def test_a_guard_holds_while_its_grant_is_the_locks() -> None:
    """A write with the token of a lost grant is refused by the cluster itself."""
    driver = Driver()
    holder, next_holder = driver.open(), driver.open()
    _, token = acquire(driver, holder)
    driver.run(next_holder, ACQUIRE)
    driver.run(holder, commands.map_put(b"m", b"k", b"1", (LOCK, token)))
    driver.run(holder, commands.release(LOCK, 1))
    stale = (LOCK, token)
    for operation in (
        commands.map_put(b"m", b"k", b"2", stale),
        commands.map_insert(b"m", b"j", b"2", stale),
        commands.map_setdefault(b"m", b"j", b"2", stale),
        commands.map_delete(b"m", b"k", stale),
        commands.map_pop(b"m", b"k", stale),
        commands.map_popitem(b"m", stale),
        commands.map_update(b"m", [(b"k", b"2")], stale),
        commands.map_clear(b"m", stale),
        commands.map_compare_and_set(b"m", b"k", b"1", b"2", stale),
        commands.map_put(b"m", b"k", b"2", (b"never held", token)),
    ):
        with pytest.raises(LockLost) as caught:
            driver.run(holder, operation)
        assert token == caught.value.token
    assert driver.ask(commands.query_len(b"m")) == [1]
    driver.run(next_holder, commands.map_put(b"m", b"k", b"3", (LOCK, token + 1)))
    assert driver.ask(commands.query_get(b"m", b"k")) == [b"3"]


@pytest.mark.parametrize(
    "limits",
    [Limits(acquisitions_max=2), Limits(session_acquisitions_max=1), Limits(lock_waiters_max=1)],
    ids=["acquisitions_max", "session_acquisitions_max", "lock_waiters_max"],
)
def test_acquisitions_are_limited_and_releases_are_not(limits: Limits) -> None:
    """Refused by name before append and when applied; a release makes room."""
    driver = Driver(limits)
    sessions = [driver.open() for _ in range(3)]
    driver.run(sessions[0], ACQUIRE)
    driver.run(sessions[1], ACQUIRE)
    greedy = sessions[1] if limits.session_acquisitions_max == 1 else sessions[2]
    with pytest.raises(QuotaExceeded) as caught:
        driver.machine.check(greedy, 2, 0, ACQUIRE)
    assert getattr(limits, caught.value.limit) < getattr(Limits(), caught.value.limit)
    with pytest.raises(QuotaExceeded):
        driver.run(greedy, ACQUIRE)
    driver.run(greedy, commands.acquire(LOCK, wait=False))
    driver.machine.check(sessions[0], 2, 0, commands.release(LOCK, 1))
    driver.run(sessions[0], commands.release(LOCK, 1))
    driver.run(sessions[1], commands.release(LOCK, 1))
    driver.run(greedy, ACQUIRE)
    driver.machine.check_invariants()


def test_locks_are_listed_page_by_page() -> None:
    """With holder, token, time and the length of the queue; the order is the table's."""
    driver = Driver()
    first, second = driver.open("one"), driver.open("two")
    names = [b"lock-%d" % number for number in range(25)]
    for name in names:
        driver.run(first, commands.acquire(name))
    driver.run(second, commands.acquire(names[3]))
    rows: list[list[Any]] = []
    after, more = None, True
    while more:
        page, more = driver.ask(commands.query_locks(after, 10))
        rows += page
        after = page[-1][0]
    assert sorted(names) == sorted(row[0] for row in rows)
    assert [[names[3], first, "one", 4, 1000, 1]] == [row for row in rows if row[0] == names[3]]
    assert [[first, "one", 4, 1000], [[second, "two"]], 1] == driver.ask(commands.query_lock(names[3]))
