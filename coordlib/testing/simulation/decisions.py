"""What the log says of transactions, read from the same commands another way: one outcome for each gtid, for ever.

The model forgets nothing. It follows the first member that applies each command and works out by itself what had to be
decided: from log_time, from the locks that are held, and from the content of the maps that only decisions write.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

from coordlib.cbor import decode
from coordlib.errors import CoordError
from coordlib.machine import Machine, commands
from coordlib.machine.commands import OpCode, TxStatus
from coordlib.machine.effects import Applied
from coordlib.machine.limits import Limits
from coordlib.raft.messages import Entry
from coordlib.testing.simulation.marks import Marks
from coordlib.testing.simulation.model import Violation
from coordlib.txn.gtid import mint_ms_of

if TYPE_CHECKING:
    from coordlib.testing.simulation.processes import MemberProcess

__all__ = ["Decision", "Decisions"]

_MAP_COMMANDS: Final = range(OpCode.MAP_PUT, OpCode.MAP_COMPARE_AND_SET + 1)
_TX_COMMANDS: Final = range(OpCode.TX_DECIDE, OpCode.TX_SKIP + 1)


class Decision:
    """What was decided of one gtid, and by which entry."""

    __slots__ = ("gtid", "index", "is_committed", "participants", "pending", "reason", "result")

    def __init__(
        self, gtid: bytes, is_committed: bool, reason: str, index: int, result: list[Any], participants: Any
    ) -> None:
        self.gtid = gtid
        self.is_committed = is_committed
        self.reason = reason
        self.index = index
        self.result = result  # status, reason, revision, branch, failed
        self.participants: tuple[bytes, ...] = tuple(bqual for _, _, bqual in participants)
        self.pending = dict.fromkeys(self.participants)

    def __str__(self) -> str:
        outcome = "committed" if self.is_committed else f"aborted ({self.reason})"
        return f"{self.gtid.hex()} was {outcome} by entry {self.index}"


class Decisions:
    """
    All decisions of one cluster.

    Args:
        limits: The replicated ones.
    """

    __slots__ = (
        "_foreign", "_horizons", "_limits", "_maps", "_marks", "_past", "_revisions", "_seen", "_skipped_ms",
        "all", "log_time_ms",
    )  # fmt: skip

    def __init__(self, marks: Marks, limits: Limits) -> None:
        self._marks = marks
        self._limits = limits
        self._seen: set[tuple[int, int]] = set()  # commands, by session and sequence
        self.all: dict[bytes, Decision] = {}
        self.log_time_ms = 0
        self._skipped_ms = 0  # what was minted before is not to be presumed aborted
        self._maps: dict[bytes, dict[bytes, tuple[bytes, int]]] = {}  # name -> key -> value, mod revision
        self._past: dict[tuple[bytes, bytes], list[tuple[int, bytes | None]]] = {}
        self._revisions: dict[bytes, int] = {}  # name -> the last change of the map
        self._foreign: set[bytes] = set()  # maps that other commands write: their content is not followed
        self._horizons: dict[tuple[str, int], tuple[int, int]] = {}

    def apply(self, entry: Entry, applied: Applied, holders: dict[bytes, tuple[int, int, int]]) -> None:
        """
        The first member has applied a command.

        Args:
            holders: lock -> session, sequence, token; before the command.
        """
        log_time_ms, session, sequence, _, operation = commands.unpack_entry(entry.data)
        self.log_time_ms = max(self.log_time_ms, log_time_ms)
        if not commands.is_success(applied.reply):
            return  # refused: nothing came of it
        args = decode(operation)
        opcode, index = args[0], entry.index
        if opcode in _MAP_COMMANDS:
            if args[1] not in self._foreign:
                self._foreign.add(args[1])
                self._maps.pop(args[1], None)
            return
        if opcode not in _TX_COMMANDS:
            return
        if session and (session, sequence) in self._seen:
            if opcode == OpCode.TX_DECIDE:
                self._marks.hit("tx_decide_repeated")  # in the log a second time, and not executed again
            return
        self._seen.add((session, sequence))
        results = commands.decode_reply(applied.reply)
        if opcode == OpCode.TX_DECIDE:
            self._decided(index, args, results, holders)
        elif opcode == OpCode.TX_RESOLVE:
            self._resolved(index, args[1], results)
        elif opcode == OpCode.TX_FORGET:
            count = sum([self._forget(gtid, branch) for gtid, branch in args[1]])
            if results != [count]:
                raise Violation(
                    "pending branch", f"entry {index} forgets {results[0]} branches, {count} were pending"
                )
        elif opcode == OpCode.TX_SKIP:
            self._marks.hit("tx_skipped")
            self._skipped_ms = max(self._skipped_ms, args[1])
            if results[0] < self._skipped_ms:
                raise Violation("horizon", f"entry {index} skips to {args[1]}, and is answered {results}")
        elif args[3]:
            self._marks.hit("tx_heuristic_recorded")
            if results != [self._forget(args[1], args[2])]:
                raise Violation("pending branch", f"entry {index} says that a branch was pending: {results}")

    def _forget(self, gtid: bytes, branch: bytes) -> bool:
        decision = self.all.get(gtid)
        if decision is None or not decision.is_committed or branch not in decision.pending:
            return False
        del decision.pending[branch]
        return True

    # -- outcomes

    def _known(self, index: int, gtid: bytes, what: str, results: list[Any]) -> bool:
        """Whether it had been decided; that the answer says so is checked."""
        decision = self.all.get(gtid)
        status, reason = results[:2]
        if status == TxStatus.UNKNOWN:
            if not self._may_be_forgotten(gtid):
                raise Violation(
                    "horizon",
                    f"entry {index} ({what}) answers UNKNOWN of {gtid.hex()}, and nothing that was minted later "
                    "could be forgotten yet",
                )
            self._marks.hit("tx_outcome_forgotten")
            return True
        if decision is None:
            if mint_ms_of(gtid) < self._skipped_ms:
                raise Violation(
                    "horizon", f"entry {index} ({what}) answers {results} of {gtid.hex()}, skipped before"
                )
            return False
        if decision.is_committed is not (status == TxStatus.COMMITTED):
            raise Violation("one outcome", f"{decision}, and entry {index} ({what}) answers {results}")
        is_later = not decision.is_committed and reason == "deadline"  # its record is no longer needed
        if not is_later and results != decision.result[: len(results)]:
            raise Violation(
                "one outcome", f"{decision} with {decision.result}; entry {index} answers {results}"
            )
        return True

    def _may_be_forgotten(self, gtid: bytes) -> bool:
        limits = self._limits
        mint_ms = mint_ms_of(gtid)
        if mint_ms < self._skipped_ms:
            return True
        finished = [d.gtid for d in self.all.values() if d.is_committed and not d.pending]
        is_crowded = len(finished) > limits.tx_finished_max
        due_ms = self.log_time_ms - limits.tx_lifetime_ms - limits.tx_retention_ms
        return any(
            mint_ms_of(other) >= mint_ms and (is_crowded or mint_ms_of(other) < due_ms) for other in finished
        )

    def _may_be_closed(self, gtid: bytes) -> bool:
        """Whether so many were aborted that none of its age may be committed any more."""
        aborted = [d.gtid for d in self.all.values() if not d.is_committed]
        return len(aborted) > self._limits.tx_outcomes_max

    def _resolved(self, index: int, gtid: bytes, results: list[Any]) -> None:
        if self._known(index, gtid, "RESOLVE", results):
            if results[0] == TxStatus.COMMITTED:
                self._marks.hit("tx_resolve_found_a_decision")
            return
        if results[0] != TxStatus.ABORTED:
            raise Violation(
                "one outcome", f"entry {index} (RESOLVE) answers {results} of {gtid.hex()}, never decided"
            )
        self.all[gtid] = Decision(gtid, False, results[1], index, [*results, 0, -1], ())

    def _decided(
        self, index: int, args: list[Any], results: list[Any], holders: dict[bytes, tuple[int, int, int]]
    ) -> None:
        _, gtid, deadline_ms, participants, guards, conditions, writes, _, otherwise, _ = args
        if gtid and self._known(index, gtid, "DECIDE", results):
            decision = self.all.get(gtid)
            if decision is not None and not decision.is_committed:
                self._marks.hit("tx_resolve_won")
            return
        status, reason, revision, branch, failed = results
        what = f"entry {index} (DECIDE of {gtid.hex() or 'a batch'}) answers {results}"
        is_late = self.log_time_ms > deadline_ms
        is_over = bool(gtid) and self.log_time_ms > mint_ms_of(gtid) + self._limits.tx_lifetime_ms
        is_lost = any(lock not in holders or holders[lock][2] != token for lock, token in guards)
        place = self._failed_condition(conditions)
        if status == TxStatus.COMMITTED:
            wrong = ""
            if is_late or is_over:
                wrong = f"its time was over: it is {self.log_time_ms}, the deadline {deadline_ms}"
            elif is_lost:
                wrong = f"a guard does not hold: {guards} of {holders}"
            elif place is not None and (branch, failed) != (place >= 0, place):
                wrong = f"the first condition that fails is {place} of {conditions}"
            elif branch and otherwise is None:
                wrong = "there is nothing to be done otherwise"
            elif revision != index:
                wrong = "it says that another entry decided"
            if wrong:
                raise Violation("decision", f"{what}, and {wrong}")
            self._change(index, otherwise if branch else writes)
        elif status == TxStatus.ABORTED:
            pending = sum(bool(d.pending) for d in self.all.values())
            is_right = {
                "deadline": is_late or is_over or (bool(gtid) and self._may_be_closed(gtid)),
                "lock-lost": is_lost,
                "conflict": otherwise is None and place in (None, failed) and failed >= 0,
                "quota": bool(participants) and pending >= self._limits.tx_outcomes_max,
            }.get(reason, False)
            if not is_right:
                raise Violation(
                    "decision",
                    f"{what}: at {self.log_time_ms}, deadline {deadline_ms}, first condition that fails {place}",
                )
            self._marks.hit(f"tx_aborted_{reason}")
        else:
            raise Violation("decision", f"{what}, which is no decision")
        if gtid:
            committed = status == TxStatus.COMMITTED
            self.all[gtid] = Decision(
                gtid, committed, reason, index, results, participants if committed else ()
            )

    # -- maps

    def _failed_condition(self, conditions: list[list[Any]]) -> int | None:
        """The place of the first that does not hold, -1: all do, None: it is about maps that are not followed."""
        for place, (kind, name, *rest) in enumerate(conditions):
            if name in self._foreign:
                return None
            record = self._maps.get(name, {}).get(rest[0]) if kind != 1 else None
            if kind == 1:
                holds = (self._revisions.get(name, 0) if self._maps.get(name) else 0) == rest[0]
            elif kind == 0:
                holds = (0 if record is None else record[1]) == rest[1]
            else:
                holds = (None if record is None else record[0]) == rest[1]
            if not holds:
                return place
        return -1

    def _change(self, index: int, writes: list[list[Any]]) -> None:
        last = {(name, key): value for _, name, key, *value in writes if name not in self._foreign}
        for (name, key), value in last.items():
            content = self._maps.setdefault(name, {})
            self._past.setdefault((name, key), [(0, None)]).append((index, value[0] if value else None))
            if value:
                content[key] = (value[0], index)
                self._revisions[name] = index
            elif content.pop(key, None) is not None:
                self._revisions[name] = index

    def value(self, name: bytes, key: bytes) -> bytes | None:
        """What a map that only decisions write holds now."""
        record = self._maps.get(name, {}).get(key)
        return None if record is None else record[0]

    def were_together(self, found: Mapping[tuple[bytes, bytes], bytes | None]) -> bool:
        """Whether there was a revision at which maps that only decisions write held all of this."""
        pasts = [(self._past.get(place, [(0, None)]), value) for place, value in found.items()]
        moments = sorted({index for past, _ in pasts for index, _ in past})
        return any(
            all(past[bisect_right(past, moment, key=itemgetter(0)) - 1][1] == value for past, value in pasts)
            for moment in reversed(moments)
        )

    # -- members

    def look(self, process: MemberProcess) -> None:
        """A member has applied a command: what it no longer remembers it does not remember again in this life."""
        transactions = process._kernel.machine._transactions
        horizon, close = transactions.horizon_ms, transactions.close_ms
        life = (process.name, process.start_number)
        before = self._horizons.get(life, (0, 0))
        if horizon < before[0] or close < before[1]:
            raise Violation(
                "horizon", f"{process.name} goes from horizon and close {before} back to {horizon}, {close}"
            )
        self._horizons[life] = (horizon, close)

    def check(self, member: str, machine: Machine) -> None:
        """A member's own records at the end: every outcome as it was, and pending what is pending."""
        for gtid, decision in self.all.items():
            try:
                status, _, _, _, _, pending, _ = commands.decode_reply(
                    machine.query(commands.query_tx_state(gtid))
                )
            except CoordError as error:
                raise Violation("one outcome", f"{member} cannot say that {decision}: {error}") from error
            expected = TxStatus.COMMITTED if decision.is_committed else TxStatus.ABORTED
            if status == TxStatus.UNKNOWN and not decision.pending and self._may_be_forgotten(gtid):
                continue
            if status != expected:
                raise Violation("one outcome", f"{decision}, and {member} says {TxStatus(status).name}")
            if {bqual for _, _, bqual in pending} != decision.pending.keys():
                raise Violation(
                    "pending branch",
                    f"{decision}; {member} has pending {pending}, and {list(decision.pending)} is",
                )
