"""Transactions against a model that forgets nothing, with time, sessions, locks, snapshots and restores between."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordlib.errors import QuotaExceeded
from coordlib.machine import Limits, commands, decode_reply
from coordlib.machine.commands import TxStatus
from tests.machine.driver import Driver, restore, snapshot

LIFETIME_MS = 50
RETENTION_MS = 100
OUTCOMES_MAX = 3
LIMITS = Limits(
    tx_lifetime_ms=LIFETIME_MS,
    tx_retention_ms=RETENTION_MS,
    tx_outcomes_max=OUTCOMES_MAX,
    tx_finished_max=OUTCOMES_MAX,
    tx_participants_max=3,
    maps_max=2,
)
NAMES = [b"m", b"n", b"o"]
LOCKS = st.sampled_from([b"x", b"y"])
PICK = st.integers(0, 1000)
TRANSACTION = st.tuples(PICK, st.sampled_from([-60, -50, -3, 0, 0, 1, 2, 3, 50, 60]))
WRITE = st.tuples(st.sampled_from(NAMES), st.sampled_from([b"a", b"b"]), st.sampled_from([None, b"", b"1"]))
WRITES = st.lists(WRITE, max_size=4)
CONDITION = st.tuples(
    st.integers(0, 2), st.sampled_from(NAMES), st.sampled_from([b"a", b"b"]), st.booleans() | st.just(True)
)


class Decided:
    """What the first command decided, and whose obedience is missing."""

    def __init__(self, status: int, reason: str, revision: int, pending: list[bytes]) -> None:
        self.status = status
        self.reason = reason
        self.revision = revision
        self.pending = pending


class Model(RuleBasedStateMachine):
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(LIMITS)
        self.sessions: list[int] = [self.driver.open(), self.driver.open()]
        self.maps: dict[bytes, dict[bytes, tuple[bytes, int]]] = {}  # value, revision
        self.revisions: dict[bytes, int] = {}
        self.locks: dict[bytes, tuple[int, int, int]] = {}  # session, sequence, token
        self.gtids: list[bytes] = []
        self.decided: dict[bytes, Decided] = {}
        self.times = (0, 0)  # horizon, close
        self.skipped_ms = 0
        self.source: Any = None
        self.parts: list[bytes] = []
        self.expected = b""

    # --- commands ---------------------------------------------------------------------------------------

    def gtid(self, transaction: tuple[int, int]) -> bytes:
        """One of the last few, or a new one, which costs nothing to mint. Session 1 ended long ago."""
        pick, mint = transaction
        if pick % 2 and self.gtids:
            return self.gtids[-1 - pick // 2 % min(8, len(self.gtids))]
        session = [1, *self.sessions][pick // 2 % (1 + len(self.sessions))]
        gtid = (self.driver.now_ms + mint).to_bytes(6) + session.to_bytes(8) + (pick % 5).to_bytes(2)
        if gtid not in self.gtids:
            self.gtids.append(gtid)
        return gtid

    @rule(ms=st.sampled_from([1, 3, 10, 51, 160]))
    def time_passes(self, ms: int) -> None:
        self.driver.now_ms += ms

    @rule(pick=PICK, lock=LOCKS)
    def acquire(self, pick: int, lock: bytes) -> None:
        session = self.sessions[pick % len(self.sessions)]
        granted, token, _ = self.driver.run(session, commands.acquire(lock, False))
        assert granted == (lock not in self.locks)
        if granted:
            self.locks[lock] = (session, self.driver.last(session), token)

    @rule(pick=PICK)
    def expire(self, pick: int) -> None:
        session = self.sessions.pop(pick % len(self.sessions))
        self.driver.run(0, commands.expire_sessions([session]))
        self.locks = {lock: held for lock, held in self.locks.items() if held[0] != session}
        self.sessions.append(self.driver.open())

    @rule(
        pick=PICK,
        transaction=st.none() | TRANSACTION | TRANSACTION,
        participants=st.integers(0, 2),
        budget_ms=st.integers(-1, 60),
        lock=st.none() | LOCKS,
        is_held=st.booleans() | st.just(True),
        conditions=st.lists(CONDITION, max_size=2),
        writes=WRITES,
        otherwise=st.none() | WRITES,
    )
    def decide(
        self,
        pick: int,
        transaction: tuple[int, int] | None,
        participants: int,
        budget_ms: int,
        lock: bytes | None,
        is_held: bool,
        conditions: list[tuple[int, bytes, bytes, bool]],
        writes: list[tuple[bytes, bytes, bytes | None]],
        otherwise: list[tuple[bytes, bytes, bytes | None]] | None,
    ) -> None:
        session = self.sessions[pick % len(self.sessions)]
        gtid = b"" if transaction is None else self.gtid(transaction)
        branches = [b"%d" % number for number in range(participants if gtid else 0)]
        deadline_ms = self.driver.now_ms + budget_ms
        guards, releases = [], []
        if lock is not None:
            _, sequence, token = self.locks.get(lock, (0, 1, 0))
            guards = [(lock, token if is_held else token + 7)]
            releases = [(lock, sequence)]
        failed = next((place for place, item in enumerate(conditions) if not item[3]), -1)
        operation = commands.tx_decide(
            gtid,
            deadline_ms,
            participants=[("r", "n", branch) for branch in branches],
            guards=guards,
            conditions=[self.condition(*item) for item in conditions],
            writes=[self.write(*item) for item in writes],
            releases=releases,
            otherwise=None if otherwise is None else [self.write(*item) for item in otherwise],
        )
        is_refused = False
        try:
            self.driver.machine.check(session, self.driver.sequences.get(session, 0) + 1, 0, operation)
        except QuotaExceeded:
            is_refused = True
        applied = self.driver.apply(session, operation)
        if gtid and self.was_decided(gtid, applied.reply, 5):
            return
        # This is the first one: what it says is what counts.
        status, reason, revision, branch, failed_place = decode_reply(applied.reply)
        assert revision == self.driver.index
        assert failed_place == (failed if reason in ("", "conflict", "quota") else -1)
        chosen = writes if failed < 0 else otherwise
        if budget_ms < 0:
            expected = "deadline"
        elif guards and not (is_held and lock in self.locks):
            expected = "lock-lost"
        elif chosen is None:
            expected = "conflict"
        elif self.maps_after(chosen) > max(LIMITS.maps_max, len(self.maps)) or (
            branches and sum([bool(item.pending) for item in self.decided.values()]) >= OUTCOMES_MAX
        ):
            expected = "quota"
            assert is_refused
        else:
            expected = ""
        assert expected == reason
        assert (TxStatus.ABORTED if reason else TxStatus.COMMITTED) == status
        if not reason:
            assert branch == (failed >= 0)
            assert chosen is not None
            self.change(chosen, revision)
            if lock is not None and self.locks[lock][0] == session:
                del self.locks[lock]
        if gtid:
            self.decided[gtid] = Decided(status, reason, revision, branches if not reason else [])

    @rule(pick=PICK, transactions=st.lists(TRANSACTION, min_size=1, max_size=4))
    def resolve(self, pick: int, transactions: list[tuple[int, int]]) -> None:
        session = self.sessions[pick % len(self.sessions)]
        for gtid in [self.gtid(transaction) for transaction in transactions]:
            applied = self.driver.apply(session, commands.tx_resolve(gtid))
            if not self.was_decided(gtid, applied.reply, 3):
                assert [TxStatus.ABORTED, "resolved", self.driver.index] == decode_reply(applied.reply)
                self.decided[gtid] = Decided(TxStatus.ABORTED, "resolved", self.driver.index, [])
            self.check_times()

    @precondition(lambda self: self.gtids)
    @rule(pick=PICK, obeyed=st.lists(st.tuples(PICK, st.integers(0, 1)), max_size=4))
    def forget(self, pick: int, obeyed: list[tuple[int, int]]) -> None:
        named = [
            (self.gtids[-1 - place % min(8, len(self.gtids))], b"%d" % number) for place, number in obeyed
        ]
        count = 0
        for gtid, branch in named:
            known = self.decided.get(gtid)
            if known is not None and branch in known.pending:
                known.pending.remove(branch)
                count += 1
        session = self.sessions[pick % len(self.sessions)]
        assert [count] == self.driver.run(session, commands.tx_forget(named))

    @rule(pick=PICK, ahead_ms=st.sampled_from([-60, 0, 3, 100, 101]))
    def skip(self, pick: int, ahead_ms: int) -> None:
        """People say that a log was lost in which anything before may have been decided."""
        session = self.sessions[pick % len(self.sessions)]
        horizon_ms = self.driver.now_ms + ahead_ms
        reply = self.driver.apply(session, commands.tx_skip(horizon_ms)).reply
        if ahead_ms > 2 * LIFETIME_MS:
            assert commands.error_reply(reply) is not None
            return
        assert decode_reply(reply) == [max(self.times[0], horizon_ms), horizon_ms > self.times[0]]
        self.skipped_ms = max(self.skipped_ms, horizon_ms)

    # --- the machine goes on somewhere else -------------------------------------------------------------

    @precondition(lambda self: self.source is None)
    @rule()
    def begin_snapshot(self) -> None:
        self.expected = snapshot(self.driver.machine)
        self.source = self.driver.machine.begin_snapshot()
        self.parts = []

    @precondition(lambda self: self.source is not None)
    @rule(size=st.integers(100, 600))
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
        old, self.driver.machine = self.driver.machine, restore(snapshot(self.driver.machine))
        if self.source is not None:
            self.source.close()
            self.source = None
        assert old.digest() == self.driver.machine.digest()

    # --- what must hold ---------------------------------------------------------------------------------

    def was_decided(self, gtid: bytes, reply: bytes, count: int) -> bool:
        """
        Whether a command found the transaction decided, or not to be decided. If so, its answer was right.
        """
        mint_ms = int.from_bytes(gtid[:6])
        error = commands.error_reply(reply)
        if error is not None:
            assert (error.code, gtid in self.decided) == ("condition", False)
            assert mint_ms > self.driver.now_ms + LIFETIME_MS
            return True
        assert mint_ms < max(self.driver.now_ms + LIFETIME_MS + 1, self.times[0])
        answer = decode_reply(reply)
        assert len(answer) == count
        if answer[2]:
            known = self.decided.get(gtid)
            assert known is None or answer[:3] == [known.status, known.reason, known.revision]
            return known is not None
        # There is no record, so it follows from the times, and nothing that was committed may be denied.
        self.check_unrecorded(gtid, answer[0], answer[1])
        return True

    def check_unrecorded(self, gtid: bytes, status: int, reason: str) -> None:
        mint_ms = int.from_bytes(gtid[:6])
        horizon_ms, close_ms = self.times
        known = self.decided.get(gtid)
        assert known is None or not known.pending
        if mint_ms < horizon_ms:
            assert (status, reason) == (TxStatus.UNKNOWN, "horizon")
        else:
            assert (status, reason) == (TxStatus.ABORTED, "deadline")
            assert known is None or known.status == TxStatus.ABORTED
            assert mint_ms < close_ms or mint_ms + LIFETIME_MS < self.driver.now_ms

    @invariant()
    def agrees(self) -> None:
        machine = self.driver.machine
        machine.check_invariants()
        self.check_times()
        for name in NAMES:
            revision, _, flat = self.driver.ask(commands.query_range(name))
            assert revision == self.revisions.get(name, 0)
            found = dict(zip(flat[::2], flat[1::2], strict=True))
            assert found == {key: value for key, (value, _) in self.maps.get(name, {}).items()}
        for lock in (b"x", b"y"):
            holder = self.driver.ask(commands.query_lock(lock))[0]
            expected = self.locks.get(lock)
            assert (None if holder is None else holder[2]) == (None if expected is None else expected[2])
        recorded = 0
        # The state is as of the last entry; a record may be due since, and is dropped by the next command.
        now_ms = machine.log_time_ms
        for gtid in self.gtids:
            status, reason, revision, is_alive, log_time_ms, pending, _ = self.driver.ask(
                commands.query_tx_state(gtid)
            )
            assert (is_alive, log_time_ms) == (int.from_bytes(gtid[6:14]) in self.sessions, now_ms)
            known = self.decided.get(gtid)
            if revision:
                assert known is not None
                assert (status, reason, revision) == (known.status, known.reason, known.revision)
                assert [item[2] for item in pending] == known.pending
                recorded += 1
            elif status == TxStatus.NONE:
                assert known is None
            else:
                self.check_unrecorded(gtid, status, reason)
        counters = machine.counters
        assert recorded == counters["tx_committed"] + counters["tx_aborted"]
        assert counters["tx_pending"] == sum([bool(item.pending) for item in self.decided.values()])
        assert counters["tx_pending"] <= OUTCOMES_MAX
        assert counters["tx_committed"] - counters["tx_pending"] <= OUTCOMES_MAX
        assert counters["tx_aborted"] <= OUTCOMES_MAX

    def check_times(self) -> None:
        """They go forward, and only to where a record of their kind was dropped, or people said so."""
        transactions = self.driver.machine._transactions
        times = (transactions.horizon_ms, transactions.close_ms)
        for before, after, status in zip(
            self.times, times, (TxStatus.COMMITTED, TxStatus.ABORTED), strict=True
        ):
            assert after >= before
            if after > before and not (status == TxStatus.COMMITTED and after == self.skipped_ms):
                assert any(
                    int.from_bytes(gtid[:6]) + 1 == after and item.status == status and not item.pending
                    for gtid, item in self.decided.items()
                )
        self.times = times

    def teardown(self) -> None:
        assert self.driver.replay(LIMITS).digest() == self.driver.machine.digest()

    # --- the model's maps -------------------------------------------------------------------------------

    def condition(self, kind: int, name: bytes, key: bytes, holds: bool) -> Any:
        value, revision = self.maps.get(name, {}).get(key, (None, 0))
        if kind == 0:
            return commands.key_is_at(name, key, revision if holds else revision + 1)
        if kind == 1:
            revision = self.revisions.get(name, 0)
            return commands.map_is_at(name, revision if holds else revision + 1)
        return commands.key_equals(name, key, value if holds else b"other")

    @staticmethod
    def write(name: bytes, key: bytes, value: bytes | None) -> Any:
        return commands.delete_key(name, key) if value is None else commands.put_key(name, key, value)

    def maps_after(self, writes: list[tuple[bytes, bytes, bytes | None]]) -> int:
        keys = {name: set(values) for name, values in self.maps.items()}
        for name, key, value in writes:
            if value is None:
                keys.setdefault(name, set()).discard(key)
            else:
                keys.setdefault(name, set()).add(key)
        return sum([bool(item) for item in keys.values()])

    def change(self, writes: list[tuple[bytes, bytes, bytes | None]], revision: int) -> None:
        before = {name: dict(values) for name, values in self.maps.items()}
        for name, key, value in writes:
            values = self.maps.setdefault(name, {})
            if value is None:
                values.pop(key, None)
            else:
                values[key] = (value, revision)
        self.maps = {name: values for name, values in self.maps.items() if values}
        for name in NAMES:
            if name not in self.maps:
                self.revisions.pop(name, None)
            elif self.maps[name] != before.get(name):
                self.revisions[name] = revision


Model.TestCase.settings = settings(derandomize=True, deadline=None, max_examples=50, stateful_step_count=50)
TestModel = Model.TestCase
