"""The decisions of transactions: one outcome for each, for ever, given by the first command that is applied.

A transaction is known by its *gtid*: 16 bytes, mint time in ms (6; an estimate of log_time), the initiator's session (8),
a counter (2), so that the order of bytes is the order of minting. DECIDE commits it, if all it depends on still
holds, or aborts it; RESOLVE aborts it, if nothing was decided. Whoever comes second gets the first one's answer.

Invariants:

- A gtid has one outcome. What is remembered of it is either a record or follows from three times that never go
  back: log_time, the *horizon* and the *close*.
- Nothing is committed later than `tx_lifetime_ms` after it was minted. So a gtid older than that, or minted before the
  close, which has no record, was never committed and never will be.
- That holds for gtids minted at the horizon or after. Records of committed ones before it have been dropped: without
  a record nothing is known of them, and nobody may presume anything.
- The record of a committed transaction with a participant that has not obeyed yet is never dropped.

Everything is bounded. When there are too many records, the oldest are dropped at the price of moving the horizon
(committed) or the close (aborted) forward. What is pending is in a table; the rest is packed, in ledgers.

What must not live here: maps and locks (asked for through `Store` and callables), and whoever carries decisions out.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import nsmallest
from typing import Any, NamedTuple, Protocol, TypeAlias

from coordlib.cbor import decode, encode
from coordlib.errors import ConditionFailed, LockLost, QuotaExceeded, UsageError, invariant
from coordlib.machine.commands import TxStatus
from coordlib.machine.effects import Effect, Meta
from coordlib.machine.ledger import Ledger, Line
from coordlib.machine.limits import ENTRY_OVERHEAD_BYTES, Limits, exceeded
from coordlib.machine.table import BytesTable, Reclaimer

__all__ = ["HEURISTICS_MAX", "Store", "Transactions"]

HEURISTICS_MAX = 1000
"""What is kept for people to see: the newest ones. Disk: never changed, logs are replayed with it."""

_DROPPED_MAX = 8  # for each command, of either kind: more than one command can add
_ROWS_MAX = 1000
_GTID = 16
_RECORD_BYTES = 32  # of an outcome's record, beside its participants; at least that much
_PAGE_BYTES_MAX = 256 * 1024

Result: TypeAlias = tuple[Any, ...]
Changes: TypeAlias = dict[bytes, dict[bytes, bytes | None]]
Release: TypeAlias = Callable[[Meta, int, int, bytes, int, list[Effect]], None]


class Store(Protocol):
    """What transactions need of the maps; see there."""

    def failed_condition(self, conditions: list[list[Any]]) -> int: ...

    def check_changes(self, changes: Changes, pending_bytes: int = 0) -> None: ...

    def change(self, changes: Changes, index: int) -> None: ...


class _Outcome(NamedTuple):
    """
    What was decided. Disk: the order of fields is part of the snapshot format.
    """

    status: int
    reason: str
    revision: int  # log index of the command that decided; 0: nothing is recorded
    branch: int = 0
    failed: int = -1
    pending: list[list[Any]] = []  # [resource, node, branch], of a committed one. Never changed in place.


# How an outcome that nothing is pending of is kept. Disk: numbers are part of the snapshot format.
_REASONS = ("", "", "deadline", "lock-lost", "conflict", "quota", "resolved")  # by kind; 1: by `otherwise`
_KINDS = {reason: kind for kind, reason in enumerate(_REASONS) if reason}


class Transactions:
    """All outcomes that are remembered, and the heuristics."""

    __slots__ = (
        "_check_guard",
        "_is_alive",
        "_limits",
        "_noted",
        "_pending",
        "_release",
        "_store",
        "aborted",
        "close_ms",
        "finished",
        "heuristics",
        "horizon_ms",
        "outcomes",
    )

    def __init__(
        self,
        limits: Limits,
        reclaimer: Reclaimer,
        *,
        store: Store,
        check_guard: Callable[[list[Any]], None],
        release: Release,
        is_alive: Callable[[int], bool],
    ) -> None:
        self._limits = limits
        self._store = store
        self._check_guard = check_guard
        self._release = release
        self._is_alive = is_alive
        self.outcomes = BytesTable(reclaimer)  # gtid -> _Outcome, with something pending
        self.finished = Ledger()  # committed, nothing pending
        self.aborted = Ledger()
        self.heuristics = BytesTable(reclaimer)  # gtid and branch -> outcome, who, log_time, log index
        self.horizon_ms = 0  # of what was minted before, committed outcomes may have been dropped
        self.close_ms = 0  # what was minted before and has no record is not committed any more
        self._noted: dict[bytes, int] = {}  # derived: key of a heuristic -> log index
        self._pending: dict[bytes, None] = {}  # derived: what is in outcomes

    @property
    def counters(self) -> dict[str, int]:
        return {
            "tx_committed": len(self.finished) + len(self._pending),
            "tx_pending": len(self._pending),
            "tx_pending_since_ms": min(map(_mint_ms, self._pending), default=0),  # in log_time; 0: nothing is
            "tx_aborted": len(self.aborted),
            "tx_heuristics": len(self.heuristics),
            "tx_horizon_ms": self.horizon_ms,
        }

    # --- commands -----------------------------------------------------------------------------------------

    def check_decide(self, args: list[Any], pending_bytes: int = 0) -> None:
        """
        Refuse a decision that makes no sense, or would make the state too large as it is now.

        Args:
            pending_bytes: What may be added by commands that were appended and are not yet applied.

        Raises:
            UsageError: Participants without a transaction, or the same branch twice.
            QuotaExceeded: Names the limit.
        """
        _, gtid, _, participants, _, conditions, writes, _, otherwise, _ = args
        _check_participants(gtid, participants)
        if gtid and self._recorded(gtid) is not None:
            return
        if self._store.failed_condition(conditions) < 0:
            chosen = writes
        elif otherwise is None:
            return  # will be refused without leaving anything behind but a short record
        else:
            chosen = otherwise
        self._check_room(gtid, participants, _changes(chosen), pending_bytes)

    def decide(
        self, meta: Meta, session: int, sequence: int, args: list[Any], effects: list[Effect]
    ) -> Result:
        _, gtid, deadline_ms, participants, guards, conditions, writes, releases, otherwise, _ = args
        if gtid:
            known = self._known(gtid, meta.now_ms)
            if known is not None:
                return _answer(known)
        _check_participants(gtid, participants)
        if meta.now_ms > deadline_ms:
            return _answer(self._abort(gtid, "deadline", meta))
        try:
            for guard in guards:
                self._check_guard(guard)
        except LockLost:
            return _answer(self._abort(gtid, "lock-lost", meta))
        failed = self._store.failed_condition(conditions)
        branch = 0
        if failed >= 0:
            if otherwise is None:
                return _answer(self._abort(gtid, "conflict", meta, failed))
            branch, writes = 1, otherwise
        changes = _changes(writes)
        try:
            self._check_room(gtid, participants, changes, 0)
        except QuotaExceeded:
            return _answer(self._abort(gtid, "quota", meta, failed))
        # Nothing has been changed above this line, and nothing below it can be refused.
        self._store.change(changes, meta.index)
        for lock, acquisition in releases:
            self._release(meta, session, sequence, lock, acquisition, effects)
        outcome = _Outcome(TxStatus.COMMITTED.value, "", meta.index, branch, failed, participants)
        if gtid:
            self._record(gtid, outcome, meta.now_ms)
        return _answer(outcome)

    def resolve(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        gtid = args[1]
        outcome = self._known(gtid, meta.now_ms)
        if outcome is None:
            outcome = self._abort(gtid, "resolved", meta)
        return (0, outcome.status, outcome.reason, outcome.revision)

    def forget(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        count = sum([self._clear(gtid, branch) for gtid, branch in args[1]])
        self._tidy(meta.now_ms)
        return (0, count)

    def heuristic(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        _, gtid, branch, outcome, who = args
        key = gtid + branch
        if not outcome:
            self.heuristics.delete(key)
            self._noted.pop(key, None)
            return (0, False)
        self.heuristics.put(key, encode((outcome, who, meta.now_ms, meta.index)))
        self._noted[key] = meta.index
        if len(self._noted) > HEURISTICS_MAX:
            _, oldest = min([(index, noted) for noted, index in self._noted.items()])
            self.heuristics.delete(oldest)
            del self._noted[oldest]
        return (0, self._clear(gtid, branch))

    def skip(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        horizon_ms = args[1]
        latest_ms = meta.now_ms + 2 * self._limits.tx_lifetime_ms
        if horizon_ms > latest_ms:
            raise UsageError(
                f"a horizon of {horizon_ms} ms is more than {2 * self._limits.tx_lifetime_ms} ms after log_time "
                f"({meta.now_ms} ms): no transaction could begin for long. Are the clocks of the members right?"
            )
        is_raised = horizon_ms > self.horizon_ms
        self.horizon_ms = max(self.horizon_ms, horizon_ms)
        return (0, self.horizon_ms, is_raised)

    # --- queries ------------------------------------------------------------------------------------------

    def state(self, args: list[Any], now_ms: int) -> Result:
        gtid = args[1]
        outcome = self._remembered(gtid, now_ms) or _Outcome(TxStatus.NONE.value, "", 0)
        notes = [
            (key[_GTID:], *decode(self.heuristics.get(key) or b"")[:3])
            for key in sorted([key for key in self._noted if key[:_GTID] == gtid])
        ]
        is_alive = self._is_alive(int.from_bytes(gtid[6:14]))
        return (
            0,
            outcome.status,
            outcome.reason,
            outcome.revision,
            is_alive,
            now_ms,
            outcome.pending,
            notes,
        )

    def listing(self, args: list[Any]) -> Result:
        _, after, limit, is_only_pending = args
        limit = max(1, min(limit, _ROWS_MAX))
        gtids = nsmallest(limit + 1, [gtid for gtid in self._pending if after is None or gtid > after])
        if not is_only_pending:
            gtids += self.finished.after(after, limit + 1) + self.aborted.after(after, limit + 1)
            gtids = sorted(gtids)[: limit + 1]
        rows: list[Result] = []
        size = 0
        for gtid in gtids[:limit]:
            outcome = self._recorded(gtid)
            assert outcome is not None
            size += _RECORD_BYTES + sum([len(text) + len(node) for text, node, _ in outcome.pending])
            if size > _PAGE_BYTES_MAX and rows:
                break
            rows.append((gtid, outcome.status, outcome.reason, outcome.revision, outcome.pending))
        return (0, rows, len(gtids) > len(rows))

    def heuristics_listing(self, args: list[Any]) -> Result:
        _, after, limit = args
        limit = max(1, min(limit, _ROWS_MAX))
        keys = sorted([key for key in self._noted if after is None or key > after[0] + after[1]])
        rows = [
            (key[:_GTID], key[_GTID:], *decode(self.heuristics.get(key) or b"")[:3]) for key in keys[:limit]
        ]
        return (0, rows, len(keys) > limit)

    # --- state --------------------------------------------------------------------------------------------

    def load(self, gtid: bytes, record: bytes) -> None:
        """Take an outcome of a snapshot."""
        self._keep(gtid, _Outcome(*decode(record)))

    def load_heuristic(self, key: bytes, record: bytes) -> None:
        """Take a heuristic of a snapshot."""
        self.heuristics.put(key, record)
        self._noted[key] = decode(record)[3]

    def check_invariants(self) -> None:
        """For tests: what is derived agrees with what it is derived from, and nothing contradicts the times."""
        pending: list[bytes] = []
        view = self.outcomes.view()
        for gtid, record in view.drain():
            outcome = _Outcome(*decode(record))
            invariant(outcome.status == TxStatus.COMMITTED, "%r is pending and not committed", gtid)
            invariant(outcome.revision > 0, "%r was decided by no command", gtid)
            invariant(bool(outcome.pending), "%r has nothing pending and is not in the ledger", gtid)
            pending.append(gtid)
        view.close()
        gtids = pending + self.finished.check_invariants() + self.aborted.check_invariants()
        invariant(len(set(gtids)) == len(gtids), "a transaction is recorded twice")
        for gtid in gtids:
            found = self._recorded(gtid)
            invariant(found is not None and found.revision > 0, "%r was decided by no command", gtid)
        invariant(sorted(pending) == sorted(self._pending), "index of the pending differs from the table")
        view = self.heuristics.view()
        noted = {key: decode(record)[3] for key, record in view.drain()}
        view.close()
        invariant(noted == self._noted, "index of the heuristics differs from the table")
        invariant(len(noted) <= HEURISTICS_MAX, "too many heuristics: %d", len(noted))

    def _recorded(self, gtid: bytes) -> _Outcome | None:
        if gtid in self._pending:
            return _Outcome(*decode(self.outcomes.get(gtid) or b""))
        line = self.finished.get(gtid)
        if line is not None:
            return _Outcome(TxStatus.COMMITTED.value, "", line.revision, line.kind, line.failed)
        line = self.aborted.get(gtid)
        if line is not None:
            return _Outcome(TxStatus.ABORTED.value, _REASONS[line.kind], line.revision, 0, line.failed)
        return None

    def _remembered(self, gtid: bytes, now_ms: int) -> _Outcome | None:
        """What is recorded, or follows from the times; None: not decided."""
        outcome = self._recorded(gtid)
        if outcome is not None:
            return outcome
        mint_ms = _mint_ms(gtid)
        if mint_ms < self.horizon_ms:
            return _Outcome(TxStatus.UNKNOWN.value, "horizon", 0)
        if mint_ms < self.close_ms or now_ms > mint_ms + self._limits.tx_lifetime_ms:
            return _Outcome(TxStatus.ABORTED.value, "deadline", 0)
        return None

    def _known(self, gtid: bytes, now_ms: int) -> _Outcome | None:
        outcome = self._remembered(gtid, now_ms)
        if outcome is None and _mint_ms(gtid) > now_ms + self._limits.tx_lifetime_ms:
            # A record of it would have to be kept until its time has come: any number of them, for any time.
            raise ConditionFailed(
                f"transaction {gtid.hex()} was minted {_mint_ms(gtid) - now_ms} ms ahead of log_time: "
                "nothing is decided yet. Does whoever minted it take log_time from this cluster?",
                gtid=gtid,
                log_time_ms=now_ms,
            )
        return outcome

    def _check_room(
        self, gtid: bytes, participants: list[list[Any]], changes: Changes, pending_bytes: int
    ) -> None:
        limits = self._limits
        self._store.check_changes(changes, pending_bytes)
        if participants:
            if len(self._pending) >= limits.tx_outcomes_max:
                raise exceeded("tx_outcomes_max", limits.tx_outcomes_max, len(self._pending) + 1)
            size = len(gtid) + len(encode(participants)) + _RECORD_BYTES + ENTRY_OVERHEAD_BYTES
            if self.outcomes.size_bytes + size > limits.state_size_bytes_max:
                wanted = self.outcomes.size_bytes + size
                raise exceeded("state_size_bytes_max", limits.state_size_bytes_max, wanted)

    def _abort(self, gtid: bytes, reason: str, meta: Meta, failed: int = -1) -> _Outcome:
        outcome = _Outcome(TxStatus.ABORTED.value, reason, meta.index, 0, failed)
        if gtid:
            self._record(gtid, outcome, meta.now_ms)
        return outcome

    def _record(self, gtid: bytes, outcome: _Outcome, now_ms: int) -> None:
        invariant(self._recorded(gtid) is None, "transaction %r would be decided twice", gtid)
        self._keep(gtid, outcome)
        self._tidy(now_ms)

    def _keep(self, gtid: bytes, outcome: _Outcome) -> None:
        if outcome.pending:
            self.outcomes.put(gtid, encode(tuple(outcome)))
            self._pending[gtid] = None
        elif outcome.status == TxStatus.ABORTED:
            self.aborted.insert(gtid, Line(_KINDS[outcome.reason], outcome.revision, outcome.failed))
        else:
            self.finished.insert(gtid, Line(outcome.branch, outcome.revision, outcome.failed))

    def _clear(self, gtid: bytes, branch: bytes) -> bool:
        """Have a branch pending no longer; whether it was."""
        if gtid not in self._pending:
            return False
        record = self.outcomes.get(gtid)
        assert record is not None
        outcome = _Outcome(*decode(record))
        left = [item for item in outcome.pending if item[2] != branch]
        if len(left) == len(outcome.pending):
            return False
        if not left:
            self.outcomes.delete(gtid)
            del self._pending[gtid]
        self._keep(gtid, outcome._replace(pending=left))
        return True

    def _tidy(self, now_ms: int) -> None:
        """Drop a few records that are no longer needed, or too many; the oldest first."""
        limits = self._limits
        for _ in range(_DROPPED_MAX):
            gtid = self.aborted.first()
            if gtid is None:
                break
            mint_ms = _mint_ms(gtid)
            if now_ms <= mint_ms + limits.tx_lifetime_ms:
                if len(self.aborted) <= limits.tx_outcomes_max:
                    break
                self.close_ms = max(self.close_ms, mint_ms + 1)
            self.aborted.remove_first()
        for _ in range(_DROPPED_MAX):
            gtid = self.finished.first()
            if gtid is None:
                break
            mint_ms = _mint_ms(gtid)
            is_due = now_ms > mint_ms + limits.tx_lifetime_ms + limits.tx_retention_ms
            # Those that are pending have a limit of their own: many of them must not bring the horizon up to now.
            if not is_due and len(self.finished) <= limits.tx_finished_max:
                break
            self.horizon_ms = max(self.horizon_ms, mint_ms + 1)
            self.finished.remove_first()


def _mint_ms(gtid: bytes) -> int:
    return int.from_bytes(gtid[:6])


def _check_participants(gtid: bytes, participants: list[list[Any]]) -> None:
    if participants:
        if not gtid:
            raise UsageError("a batch without a gtid can have no participants")
        if len({branch for _, _, branch in participants}) != len(participants):
            raise UsageError("two participants have the same branch: each needs a name of its own")


def _changes(writes: list[list[Any]]) -> Changes:
    """What is left of writes when each key is written once, as it is to be in the end."""
    changes: Changes = {}
    for _, name, key, *value in writes:
        changes.setdefault(name, {})[key] = value[0] if value else None
    return changes


def _answer(outcome: _Outcome) -> Result:
    return (0, outcome.status, outcome.reason, outcome.revision, outcome.branch, outcome.failed)
