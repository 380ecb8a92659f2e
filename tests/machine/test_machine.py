"""The whole machine against a dumb model, twice over, and against garbage."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordlib.cbor import encode
from coordlib.errors import CoordError, InvariantViolation, RemoteProtocolError
from coordlib.machine import (
    Applied,
    LockGranted,
    LockWithdrawn,
    Machine,
    UnknownCommand,
    commands,
    decode_reply,
    pack_entry,
)
from coordlib.machine.commands import OpCode
from tests.machine.driver import Driver, restore, snapshot
from tests.machine.test_commands import OPERATIONS, QUERIES

LOCKS = st.sampled_from([b"x", b"y"])
KEYS = st.sampled_from([b"a", b"b", b"c", b"d"])
VALUES = st.sampled_from([b"", b"1", b"2"])
MAYBE = st.one_of(st.none(), VALUES)


class Model(RuleBasedStateMachine):
    """
    Dicts and lists that do what the machine is said to do, and a second machine restored from a snapshot.
    """

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver()
        self.sessions: list[int] = []
        self.map: dict[bytes, bytes] = {}
        self.locks: dict[bytes, list[tuple[int, int]]] = {b"x": [], b"y": []}  # first is the holder
        self.tokens: dict[tuple[int, int], int] = {}
        self.last_token = 0
        self.kept: dict[tuple[int, int], bytes] = {}
        self.marks: dict[int, int] = {}
        self.source: Any = None
        self.parts: list[bytes] = []
        self.expected = b""

    def send(self, pick: int, operation: bytes) -> Applied:
        session = self.sessions[pick % len(self.sessions)]
        sequence = self.driver.sequences.get(session, 0) + 1
        acknowledged = max(self.marks[session], sequence - 1 - pick % 4, 0)
        self.marks[session] = acknowledged
        self.driver.machine.check(session, sequence, acknowledged, operation)
        applied = self.driver.apply(session, operation, acknowledged=acknowledged)
        self.kept[(session, sequence)] = applied.reply
        return applied

    def run(self, pick: int, operation: bytes) -> list[Any]:
        return decode_reply(self.send(pick, operation).reply)

    def grant(self, lock: bytes) -> list[LockGranted]:
        if not self.locks[lock]:
            return []
        self.last_token += 1
        session, sequence = self.locks[lock][0]
        self.tokens[(session, sequence)] = self.last_token
        return [LockGranted(session, sequence, lock, self.last_token)]

    @rule(owner=st.sampled_from(["one", "two"]))
    def open(self, owner: str) -> None:
        if len(self.sessions) < 4:
            session = self.driver.open(owner)
            self.sessions.append(session)
            self.marks[session] = 0

    @precondition(lambda self: self.sessions)
    @rule(pick=st.integers(0, 20), key=KEYS, value=VALUES)
    def put(self, pick: int, key: bytes, value: bytes) -> None:
        assert [self.driver.index + 1] == self.run(pick, commands.map_put(b"m", key, value))
        self.map[key] = value

    @precondition(lambda self: self.sessions)
    @rule(pick=st.integers(0, 20), key=KEYS, value=VALUES)
    def setdefault(self, pick: int, key: bytes, value: bytes) -> None:
        expected = [self.map.get(key, value), key not in self.map]
        assert expected == self.run(pick, commands.map_setdefault(b"m", key, value))
        self.map.setdefault(key, value)

    @precondition(lambda self: self.sessions)
    @rule(pick=st.integers(0, 20), key=KEYS)
    def pop(self, pick: int, key: bytes) -> None:
        assert [self.map.pop(key, None)] == self.run(pick, commands.map_pop(b"m", key))

    @precondition(lambda self: self.sessions)
    @rule(pick=st.integers(0, 20), pairs=st.dictionaries(KEYS, VALUES))
    def update(self, pick: int, pairs: dict[bytes, bytes]) -> None:
        self.run(pick, commands.map_update(b"m", pairs.items()))
        self.map.update(pairs)

    @precondition(lambda self: self.sessions)
    @rule(pick=st.integers(0, 20))
    def clear(self, pick: int) -> None:
        assert [len(self.map)] == self.run(pick, commands.map_clear(b"m"))
        self.map.clear()

    @precondition(lambda self: self.sessions)
    @rule(pick=st.integers(0, 20), key=KEYS, expected=MAYBE, new=MAYBE)
    def compare_and_set(self, pick: int, key: bytes, expected: bytes | None, new: bytes | None) -> None:
        current = self.map.get(key)
        reply = self.run(pick, commands.map_compare_and_set(b"m", key, expected, new))
        assert [current == expected, None if current == expected else current] == reply[:2]
        if current == expected:
            self.map.pop(key, None)
            if new is not None:
                self.map[key] = new

    @precondition(lambda self: self.sessions)
    @rule(pick=st.integers(0, 20), lock=LOCKS, wait=st.booleans())
    def acquire(self, pick: int, lock: bytes, wait: bool) -> None:
        applied = self.send(pick, commands.acquire(lock, wait))
        queue = self.locks[lock]
        if queue and not wait:
            assert decode_reply(applied.reply) == [False, 0, 0]
            return
        queue.append((applied.session, applied.sequence))
        if len(queue) == 1:
            self.grant(lock)
            assert [True, self.last_token, 0] == decode_reply(applied.reply)
        else:
            assert [False, 0, len(queue) - 1] == decode_reply(applied.reply)
        assert applied.effects == ()

    @precondition(lambda self: self.sessions)
    @rule(pick=st.integers(0, 20), lock=LOCKS, place=st.integers(0, 3))
    def release(self, pick: int, lock: bytes, place: int) -> None:
        queue = self.locks[lock]
        session = self.sessions[pick % len(self.sessions)]
        owner, sequence = queue[place % len(queue)] if queue else (0, 1)
        applied = self.send(pick, commands.release(lock, sequence))
        if owner != session and (session, sequence) not in queue:
            assert decode_reply(applied.reply) == ["none"]
            return
        was_held = queue[0] == (session, sequence)
        queue.remove((session, sequence))
        assert ["held" if was_held else "queued"] == decode_reply(applied.reply)
        expected = self.grant(lock) if was_held else [LockWithdrawn(session, sequence)]
        assert expected == list(applied.effects)

    @precondition(lambda self: self.sessions)
    @rule(pick=st.integers(0, 20))
    def expire(self, pick: int) -> None:
        session = self.sessions.pop(pick % len(self.sessions))
        effects = self.driver.effects(0, commands.expire_sessions([session]))
        granted: list[LockGranted] = []
        withdrawn = []
        for lock in (b"x", b"y"):
            queue = self.locks[lock]
            was_held = bool(queue) and queue[0][0] == session
            withdrawn += [LockWithdrawn(*item) for item in queue if item[0] == session]
            queue[:] = [item for item in queue if item[0] != session]
            if was_held:
                granted += self.grant(lock)
        assert granted == [effect for effect in effects if isinstance(effect, LockGranted)]
        assert sorted(withdrawn) == [effect for effect in effects if isinstance(effect, LockWithdrawn)]

    @precondition(lambda self: self.kept)
    @rule(pick=st.integers(0, 1000))
    def repeat(self, pick: int) -> None:
        """A copy of an old request changes nothing but the mark, and gets the old reply if it gets any."""
        session, sequence = sorted(self.kept)[pick % len(self.kept)]
        before = self.driver.machine.digest()
        index = self.driver.machine.applied_index
        applied = self.driver.apply(session, commands.map_clear(b"m"), sequence=sequence)
        if session in self.sessions and sequence >= self.marks[session]:
            assert self.kept[(session, sequence)] == applied.reply
        else:
            assert commands.error_reply(applied.reply) is not None
        assert applied.effects == ()
        self.driver.machine.applied_index = index
        assert before == self.driver.machine.digest()
        self.driver.machine.applied_index = self.driver.index

    @precondition(lambda self: self.source is None)
    @rule()
    def begin_snapshot(self) -> None:
        self.expected = snapshot(self.driver.machine)
        self.source = self.driver.machine.begin_snapshot()
        self.parts = []

    @precondition(lambda self: self.source is not None)
    @rule(size=st.integers(1, 200))
    def next_slice(self, size: int) -> None:
        data = self.source.next(size)
        if data is not None:
            self.parts.append(data)
            return
        self.source.close()
        self.source = None
        assert self.expected == b"".join(self.parts)

    @rule()
    def restart(self) -> None:
        """Go on with a machine that was restored from a snapshot."""
        old, self.driver.machine = self.driver.machine, restore(snapshot(self.driver.machine))
        if self.source is not None:
            self.source.close()
            self.source = None
        assert old.digest() == self.driver.machine.digest()

    @invariant()
    def agrees(self) -> None:
        machine = self.driver.machine
        machine.check_invariants()
        _, _, flat = self.driver.ask(commands.query_range(b"m"))
        assert self.map == dict(zip(flat[::2], flat[1::2], strict=True))
        for lock, queue in self.locks.items():
            for place, (session, sequence) in enumerate(queue):
                query = commands.query_acquisition(lock, session, sequence)
                token = self.tokens.get((session, sequence), 0)
                expected = ["queued", 0, place] if place else ["held", token, 0]
                assert expected == self.driver.ask(query)
                assert (machine.wait_condition(query) is None) == bool(place)
        assert sum(map(len, self.locks.values())) == machine.counters["acquisitions"]

    def teardown(self) -> None:
        assert self.driver.replay().digest() == self.driver.machine.digest()


Model.TestCase.settings = settings(derandomize=True, deadline=None, max_examples=60, stateful_step_count=40)
TestModel = Model.TestCase


# --- garbage ----------------------------------------------------------------------------------------------


def garbage(rng: random.Random) -> bytes:
    """An operation that is nearly right."""
    operation = bytearray(rng.choice(sorted(OPERATIONS.values())))
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(4)
        place = rng.randrange(len(operation)) if operation else 0
        if kind == 0:
            del operation[place:]
        elif kind == 1 and operation:
            operation[place] = rng.randrange(256)
        elif kind == 2:
            operation[place:place] = rng.randbytes(rng.randrange(1, 4))
        elif operation:
            del operation[place]
    return bytes(operation)


def test_garbage_in_the_log_is_a_reply_everywhere_and_changes_nothing() -> None:
    """
    Truncated and mutated operations never raise, except for a number from the future, which changes nothing.

    What is refused leaves the state as it was, but for the request's own reply.
    """
    driver = Driver()
    session = driver.open()
    driver.run(session, commands.acquire(b"lock"))
    driver.run(session, commands.map_put(b"m", b"k", b"v"))
    rng = random.Random(11)
    refused = stopped = 0
    for _ in range(1000):
        operation = garbage(rng)
        where = session if rng.random() < 0.8 else 0
        before = _content(driver.machine)
        try:
            applied = driver.apply(
                where, operation, acknowledged=max(0, driver.sequences[session] - 3) if where else 0
            )
        except UnknownCommand:
            stopped += 1
            driver.index -= 1
            driver.sequences[session] -= 1 if where else 0
            driver.log.pop()
            assert before == _content(driver.machine)
            continue
        if commands.error_reply(applied.reply) is not None:
            refused += 1
            assert before == _content(driver.machine)
        driver.machine.check_invariants()
        if not driver.machine.sessions.is_alive(session):
            session = driver.open()
            driver.run(session, commands.map_put(b"m", b"k", b"v"))
    assert refused > 300 and stopped > 10
    assert driver.replay().digest() == driver.machine.digest()


def _content(machine: Machine) -> object:
    """Everything but replies, marks and indexes."""
    tables = [found.table for _, found in sorted(machine._maps.maps.items())]
    return (
        sorted(machine._maps.maps),
        [_drained(table) for table in tables],
        _drained(machine._locks.table),
        _drained(machine._members.table),
        _drained(machine._ids.layouts),
        _drained(machine._ids.workers),
        (machine._ids.floor_ms, machine._ids.last_lease),
        _drained(machine._transactions.outcomes),
        _drained(machine._transactions.heuristics),
        (machine._transactions.horizon_ms, machine._transactions.close_ms),
        _drained(machine._services.table),
        [session[:2] for session in machine.sessions.live()],
        machine._locks.counter,
    )


def _drained(table: Any) -> list[tuple[bytes, bytes]]:
    view = table.view()
    try:
        return list(view.drain())
    finally:
        view.close()


def test_garbage_is_refused_before_append_without_a_change() -> None:
    """`check` raises only what it says, and touches nothing."""
    driver = Driver()
    session = driver.open()
    before = driver.machine.digest()
    rng = random.Random(12)
    for _ in range(2000):
        operation = garbage(rng)
        try:
            driver.machine.check(rng.choice([0, session]), 1, 0, operation)
        except CoordError as error:
            assert not isinstance(error, UnknownCommand | InvariantViolation)
    assert before == driver.machine.digest()


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes_are_an_answer_or_a_stop(data: bytes) -> None:
    """Entries and queries of random bytes."""
    machine = Machine()
    decode_or_error(machine.query(data))
    try:
        decode_or_error(machine.apply(1, 1, pack_entry(0, 0, 0, 0, data)).reply)
    except UnknownCommand:
        assert machine.applied_index == 0
    with pytest.raises(UnknownCommand):
        machine.apply(2, 1, b"\x07" + data)


def decode_or_error(reply: bytes) -> None:
    try:
        decode_reply(reply)
    except CoordError:
        pass


@pytest.mark.parametrize("number", [0, 5, 41, 1 << 40, -1])
def test_an_unknown_command_stops_before_anything_is_changed(number: int) -> None:
    """And is refused by the leader before it gets so far."""
    driver = Driver()
    session = driver.open()
    before = (driver.machine.digest(), driver.machine.applied_index, driver.machine.log_time_ms)
    driver.now_ms += 1000
    with pytest.raises(UnknownCommand):
        driver.apply(session, encode([number, b"x"]))
    assert before == (driver.machine.digest(), driver.machine.applied_index, driver.machine.log_time_ms)
    with pytest.raises(RemoteProtocolError):
        driver.machine.check(session, 1, 0, encode([number, b"x"]))


def test_an_entry_is_applied_once_and_in_order() -> None:
    """A driver that repeats or skips back has a bug, and must not go on."""
    driver = Driver()
    driver.open()
    index, data = driver.log[-1]
    with pytest.raises(InvariantViolation):
        driver.machine.apply(index, 1, data)


def test_a_bug_in_applying_stops_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises: the state may be half changed."""
    driver = Driver()
    session = driver.open()

    def broken(*_: object) -> tuple[int, ...]:
        raise ZeroDivisionError

    driver.machine._handlers[OpCode.MAP_PUT] = broken
    with pytest.raises(InvariantViolation):
        driver.run(session, commands.map_put(b"m", b"k", b"v"))


# --- what must not matter ---------------------------------------------------------------------------------


def test_it_does_not_matter_whether_a_command_was_checked_here() -> None:
    """The leader has checked, followers have not; both come to the same state."""
    leader, follower = Driver(), Driver()
    for driver in (leader, follower):
        session = driver.open()
        for number in range(200):
            operation = commands.map_put(b"m", b"%d" % (number % 7), b"%d" % number)
            if driver is leader:
                driver.machine.check(session, number + 1, number, operation)
                if number % 5 == 0:  # another command than the one checked comes out of the log
                    operation = commands.map_delete(b"m", b"%d" % (number % 3))
            elif number % 5 == 0:
                operation = commands.map_delete(b"m", b"%d" % (number % 3))
            driver.run(session, operation, acknowledged=number)
    assert leader.machine.digest() == follower.machine.digest()


def test_queries_of_every_kind_change_nothing() -> None:
    """Reading is free of traces in the replicated state."""
    driver = Driver()
    session = driver.open()
    driver.run(session, commands.map_put(b"m", b"k", b"v"))
    driver.run(session, commands.acquire(b"lock"))
    before = driver.machine.digest()
    for query in QUERIES.values():
        decode_or_error(driver.machine.query(query))
        decode_or_error(driver.machine.wait_condition(query) or encode([0]))
    assert before == driver.machine.digest()


@pytest.mark.parametrize(
    "operation",
    [
        lambda: commands.map_put(b"m", b"k", b"v"),
        lambda: commands.acquire(b"lock"),
        commands.close_session,
    ],
)
def test_checking_changes_nothing(operation: Callable[[], bytes]) -> None:
    """However often."""
    driver = Driver()
    session = driver.open()
    before = driver.machine.digest()
    for _ in range(3):
        driver.machine.check(session, 1, 0, operation())
    assert before == driver.machine.digest()
