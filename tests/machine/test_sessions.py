"""Sessions: liveness by the log, and every request executed at most once."""

from __future__ import annotations

import pytest

from coordlib.errors import Overloaded, QuotaExceeded, RemoteProtocolError, SessionExpired
from coordlib.machine import Limits, LiveSession, SessionEnded, SessionOpened, StaleRequest, commands
from tests.machine.driver import Driver

PUT = commands.map_put(b"m", b"k", b"v")
POP = commands.map_pop(b"m", b"k")


def test_a_session_is_the_index_of_the_entry_that_opened_it() -> None:
    """So that no session id is ever used twice."""
    driver = Driver()
    driver.index = 41
    applied = driver.apply(0, commands.open_session(b"n" * 16, 5000, "worker"))
    assert commands.decode_reply(applied.reply) == [42]
    assert (SessionOpened(42, 5000),) == applied.effects
    assert [LiveSession(42, 5000, None, "worker")] == list(driver.machine.sessions.live())


def test_opening_again_with_the_same_nonce_finds_the_same_session() -> None:
    """An OPEN whose answer was lost is simply sent again."""
    driver = Driver()
    operation = commands.open_session(b"n" * 16, 5000, "worker")
    first = driver.run(0, operation)
    applied = driver.apply(0, operation)
    assert first == commands.decode_reply(applied.reply)
    assert applied.effects == ()
    driver.run(first[0], commands.close_session())
    assert first != driver.run(0, operation)


def test_a_request_sent_twice_is_executed_once() -> None:
    """The second copy in the log gets the first one's reply, and has no effects."""
    driver = Driver()
    session = driver.open()
    driver.run(session, PUT)
    first = driver.apply(session, POP)
    driver.run(session, commands.map_put(b"m", b"k", b"other"))
    again = driver.apply(session, POP, sequence=2)
    assert first == again
    assert commands.decode_reply(again.reply) == [b"v"]
    assert driver.ask(commands.query_get(b"m", b"k")) == [b"other"]
    assert first.reply == driver.machine.lookup(session, 2)
    assert driver.machine.lookup(session, 4) is None


def test_an_error_is_a_reply_that_is_kept_like_any_other() -> None:
    """A retry must not succeed where the first attempt was answered with a refusal."""
    driver = Driver()
    session = driver.open()
    driver.run(session, PUT)
    insert = commands.map_insert(b"m", b"k", b"new")
    first = driver.apply(session, insert)
    driver.run(session, POP)
    assert first == driver.apply(session, insert, sequence=2)


def test_requests_may_arrive_out_of_order() -> None:
    """Sequences above the mark are executed in whatever order the log has them, once each."""
    driver = Driver()
    session = driver.open()
    for sequence in (5, 2, 9, 3):
        driver.run(session, commands.map_put(b"m", b"%d" % sequence, b"v"), sequence=sequence, acknowledged=1)
    assert driver.ask(commands.query_len(b"m")) == [4]
    assert driver.run(session, commands.map_put(b"m", b"k", b"v"), sequence=4, acknowledged=4) == [6]
    assert [
        1 if driver.machine.sessions._live[session].replies.get(number) else None
        for number in (2, 3, 4, 5, 9)
    ] == [None, None, 1, 1, 1]


def test_a_request_below_the_mark_is_refused_and_not_executed() -> None:
    """Its reply is forgotten; executing it could be the second time."""
    driver = Driver()
    session = driver.open()
    driver.run(session, PUT)
    driver.run(session, PUT, sequence=2, acknowledged=2)
    digest = driver.machine.sessions._live[session].replies.copy()
    with pytest.raises(StaleRequest):
        driver.run(session, POP, sequence=1)
    with pytest.raises(StaleRequest):
        driver.machine.lookup(session, 1)
    with pytest.raises(StaleRequest):
        driver.machine.check(session, 1, 1, POP)
    assert digest == driver.machine.sessions._live[session].replies
    assert driver.ask(commands.query_get(b"m", b"k")) == [b"v"]


def test_a_request_of_an_unknown_session_is_refused_and_not_executed() -> None:
    """After expiry nothing that was under way may still happen."""
    driver = Driver()
    session = driver.open()
    driver.run(session, PUT)
    driver.run(0, commands.expire_sessions([session]))
    with pytest.raises(SessionExpired):
        driver.run(session, POP)
    with pytest.raises(SessionExpired):
        driver.machine.check(session, 2, 1, POP)
    with pytest.raises(SessionExpired):
        driver.machine.lookup(session, 1)
    assert driver.ask(commands.query_get(b"m", b"k")) == [b"v"]


def test_acknowledging_more_than_was_asked_is_refused() -> None:
    """A request cannot have been answered before it was made."""
    driver = Driver()
    session = driver.open()
    for sequence, acknowledged in ((1, 2), (0, 0)):
        with pytest.raises(RemoteProtocolError):
            driver.machine.check(session, sequence, acknowledged, PUT)
        with pytest.raises(RemoteProtocolError):
            driver.run(session, PUT, sequence=sequence, acknowledged=acknowledged)
    assert driver.machine.sessions._live[session].mark == 0


def test_a_jump_of_the_mark_costs_what_is_kept_not_how_far_it_goes() -> None:
    """Sequences are 63 bits wide; the mark may be moved over all of them at once."""
    driver = Driver()
    session = driver.open()
    driver.run(session, PUT, sequence=7)
    driver.run(session, PUT, sequence=1 << 62, acknowledged=1 << 62)
    assert list(driver.machine.sessions._live[session].replies) == [1 << 62]
    driver.machine.check_invariants()


def test_too_many_unanswered_requests_are_refused_before_append() -> None:
    """Counting those that are on their way, and not counting what this very request acknowledges."""
    driver = Driver(Limits(replies_max=4))
    session = driver.open()
    for _ in range(3):
        driver.run(session, PUT)
    driver.machine.check(session, 4, 1, PUT)
    with pytest.raises(Overloaded):
        driver.machine.check(session, 4, 1, PUT, pending=1)
    driver.machine.check(session, 4, 2, PUT, pending=1)


def test_replies_too_large_together_are_refused_before_append() -> None:
    """Bytes count as well as numbers."""
    driver = Driver(Limits(replies_size_bytes_max=1000))
    session = driver.open()
    driver.run(session, commands.map_put(b"m", b"k", b"v" * 1000))
    driver.run(session, commands.map_setdefault(b"m", b"k", b""))
    with pytest.raises(Overloaded) as caught:
        driver.machine.check(session, 3, 1, PUT)
    assert caught.value.limit == "replies_size_bytes_max"
    driver.machine.check(session, 3, 3, PUT)


def test_an_overload_that_reaches_the_log_is_refused_and_stays_refused() -> None:
    """The refusal is kept as the reply: a second copy of the request cannot run after the mark has moved."""
    driver = Driver(Limits(replies_max=2))
    session = driver.open()
    driver.run(session, PUT)
    driver.run(session, PUT)
    refused = driver.apply(session, POP)
    with pytest.raises(Overloaded):
        commands.decode_reply(refused.reply)
    again = driver.apply(session, POP, sequence=3, acknowledged=3)
    assert refused.reply == again.reply
    assert driver.ask(commands.query_get(b"m", b"k")) == [b"v"]
    assert driver.run(session, PUT, sequence=4, acknowledged=4) == [6]


def test_a_session_that_never_acknowledges_is_ended() -> None:
    """Memory is bounded even if a leader appends what it should have refused."""
    driver = Driver(Limits(replies_max=2))
    session = driver.open()
    driver.run(session, commands.acquire(b"lock"))
    ended = []
    for _ in range(20):
        ended += [effect for effect in driver.apply(session, PUT).effects if isinstance(effect, SessionEnded)]
    assert [SessionEnded(session, "overloaded")] == ended
    assert driver.ask(commands.query_lock(b"lock")) == [None, [], 0]
    driver.machine.check_invariants()


def test_sessions_are_limited() -> None:
    """Known before append and again when applied; a known nonce is no further session."""
    driver = Driver(Limits(sessions_max=1))
    driver.open()
    known = commands.open_session(b"%016d" % 1, 1000, "x")
    driver.machine.check(0, 0, 0, known)
    driver.run(0, known)
    other = commands.open_session(b"o" * 16, 1000, "x")
    with pytest.raises(QuotaExceeded) as caught:
        driver.machine.check(0, 0, 0, other)
    assert caught.value.limit == "sessions_max"
    with pytest.raises(QuotaExceeded):
        driver.run(0, other)


def test_closing_ends_the_session() -> None:
    """And a repeated close finds it gone."""
    driver = Driver()
    session = driver.open()
    applied = driver.apply(session, commands.close_session())
    assert commands.decode_reply(applied.reply) == []
    assert (SessionEnded(session, "closed"),) == applied.effects
    with pytest.raises(SessionExpired):
        driver.run(session, commands.close_session(), sequence=1)
    assert list(driver.machine.sessions.live()) == []


def test_expiry_ends_those_that_are_alive_in_order() -> None:
    """Unknown, repeated and ended sessions are passed over."""
    driver = Driver()
    sessions = [driver.open() for _ in range(3)]
    applied = driver.apply(0, commands.expire_sessions([sessions[2], 999, sessions[0], sessions[2]]))
    assert commands.decode_reply(applied.reply) == [2]
    assert (SessionEnded(sessions[0], "expired"), SessionEnded(sessions[2], "expired")) == applied.effects


def test_remaining_times_are_checkpointed_and_cleared() -> None:
    """A new leader gives a session no more than it had left, unless it was heard of since."""
    driver = Driver()
    first, second = driver.open(), driver.open()
    driver.run(0, commands.checkpoint_sessions([(first, 700), (second, 99_999), (999, 5)]))
    assert [item.remaining_ms for item in driver.machine.sessions.live()] == [700, 10_000]
    driver.run(0, commands.checkpoint_sessions([(first, -1), (second, 0)]))
    assert [item.remaining_ms for item in driver.machine.sessions.live()] == [None, 0]


def test_operations_are_refused_in_the_wrong_place() -> None:
    """Only openings and the leader's own commands go outside of a session, and they go nowhere else."""
    driver = Driver()
    session = driver.open()
    for where, operation in ((0, PUT), (session, commands.open_session(b"n" * 16, 1000, "x"))):
        with pytest.raises(RemoteProtocolError):
            driver.machine.check(where, 1, 0, operation)
        with pytest.raises(RemoteProtocolError):
            driver.run(where, operation)


def test_log_time_never_goes_back() -> None:
    """Whatever a leader writes into an entry."""
    driver = Driver()
    session = driver.open()
    for now_ms, expected in ((5000, 5000), (100, 5000), (5001, 5001)):
        driver.now_ms = now_ms
        driver.run(session, PUT)
        assert expected == driver.machine.log_time_ms
