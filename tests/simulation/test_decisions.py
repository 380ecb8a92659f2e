"""Every lie about transactions is seen, and what keeps to the rules is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

import pytest

from coordlib.cbor import encode
from coordlib.machine import Machine, commands
from coordlib.machine.commands import TxStatus
from coordlib.machine.effects import Applied
from coordlib.machine.limits import Limits
from coordlib.raft.messages import Entry, EntryKind
from coordlib.testing.simulation.decisions import Decisions
from coordlib.testing.simulation.marks import Marks
from coordlib.testing.simulation.model import Violation
from coordlib.txn.gtid import join_gtid

NOW: Final = 1_000_000
COMMITTED, ABORTED, UNKNOWN = TxStatus.COMMITTED.value, TxStatus.ABORTED.value, TxStatus.UNKNOWN.value
PARTICIPANT: Final = ("orders", "n1", b"branch-01")
PUT: Final = commands.put_key(b"map", b"key", b"1")


def gtid(counter: int = 1, mint_ms: int = NOW) -> bytes:
    return join_gtid(mint_ms, 7, counter)


class Told:
    """What a log of one session is said to have come to."""

    def __init__(self, **limits: int) -> None:
        self.marks = Marks(())
        self.decisions = Decisions(self.marks, Limits(**limits))
        self.holders: dict[bytes, tuple[int, int, int]] = {}
        self.index = 0

    def tell(self, body: bytes, *results: Any, now_ms: int = NOW, sequence: int = 0) -> None:
        self.index += 1
        data = commands.pack_entry(now_ms, 7, sequence or self.index, 0, body)
        applied = Applied(7, self.index, encode([0, *results]), ())
        entry = Entry(1, self.index, EntryKind.COMMAND, data)
        self.decisions.apply(entry, applied, self.holders)

    def decide(
        self, name: bytes, *results: Any, now_ms: int = NOW, deadline_ms: int = NOW + 5000, **more: Any
    ) -> None:
        self.tell(commands.tx_decide(name, deadline_ms, **more), *results, now_ms=now_ms)

    def commit(self, name: bytes, **more: Any) -> None:
        self.decide(name, COMMITTED, "", self.index + 1, 0, -1, **more)

    def resolve(self, name: bytes, *results: Any, now_ms: int = NOW) -> None:
        self.tell(commands.tx_resolve(name), *results, now_ms=now_ms)


def test_what_keeps_to_the_rules_is_no_violation() -> None:
    """Decisions, resolutions, repetitions, conflicts, batches, and what is forgotten in time."""
    told = Told()
    told.commit(gtid(1), participants=[PARTICIPANT], writes=[PUT])
    told.decide(gtid(1), COMMITTED, "", 1, 0, -1)
    told.resolve(gtid(1), COMMITTED, "", 1)
    told.resolve(gtid(2), ABORTED, "resolved", 4)
    told.decide(gtid(2), ABORTED, "resolved", 4, 0, -1)
    told.decide(gtid(3), ABORTED, "deadline", 6, 0, -1, now_ms=NOW + 5001)
    stale = [commands.key_is_at(b"map", b"key", 0)]
    told.decide(gtid(4, NOW + 5001), ABORTED, "conflict", 7, 0, 0, conditions=stale, deadline_ms=NOW + 9000)
    told.decide(
        b"", COMMITTED, "", 8, 1, 0, conditions=stale, writes=[], otherwise=[PUT], deadline_ms=NOW + 9000
    )
    told.tell(commands.tx_forget([(gtid(1), b"branch-01")]), 1)
    told.tell(commands.tx_forget([(gtid(1), b"branch-01")]), 0)
    assert told.decisions.value(b"map", b"key") == b"1"
    assert told.decisions.were_together({(b"map", b"key"): b"1", (b"map", b"other"): None})
    assert not told.decisions.were_together({(b"map", b"key"): b"2"})
    told.tell(commands.tx_skip(NOW + 1), NOW + 1, True)
    told.resolve(gtid(9), UNKNOWN, "horizon", 0)
    told.resolve(gtid(1), COMMITTED, "", 1)
    late = NOW + Limits().tx_lifetime_ms + Limits().tx_retention_ms + 5002
    told.resolve(gtid(2), UNKNOWN, "horizon", 0, now_ms=late)


def committed() -> Told:
    told = Told()
    told.commit(gtid(), participants=[PARTICIPANT], writes=[PUT])
    return told


def an_outcome_that_changes() -> None:
    committed().resolve(gtid(), ABORTED, "resolved", 2)


def a_decision_after_a_resolution() -> None:
    told = Told()
    told.resolve(gtid(), ABORTED, "resolved", 1)
    told.commit(gtid())


def another_answer_than_before() -> None:
    committed().decide(gtid(), COMMITTED, "", 2, 0, -1)


def a_resolution_that_commits() -> None:
    Told().resolve(gtid(), COMMITTED, "", 1)


def a_commit_after_the_deadline() -> None:
    Told().decide(gtid(), COMMITTED, "", 1, 0, -1, now_ms=NOW + 5001)


def a_commit_after_the_longest_life() -> None:
    late = NOW + Limits().tx_lifetime_ms + 1
    Told().decide(gtid(), COMMITTED, "", 1, 0, -1, now_ms=late, deadline_ms=late + 1)


def a_commit_under_a_lock_that_is_lost() -> None:
    told = Told()
    told.holders[b"lock"] = (7, 1, 33)
    told.commit(gtid(1), guards=[(b"lock", 33)])
    told.commit(gtid(2), guards=[(b"lock", 32)])


def a_commit_in_spite_of_a_conflict() -> None:
    committed().commit(gtid(2), conditions=[commands.key_equals(b"map", b"key", b"0")])


def a_map_that_has_changed_after_all() -> None:
    committed().commit(gtid(2), conditions=[commands.map_is_at(b"map", 0)])


def an_abort_of_what_may_have_been_lost() -> None:
    told = Told()
    told.tell(commands.tx_skip(NOW + 1), NOW + 1, True)
    told.resolve(gtid(), ABORTED, "resolved", 2)


def a_commit_of_what_may_have_been_lost() -> None:
    told = Told()
    told.tell(commands.tx_skip(NOW + 1), NOW + 1, True)
    told.commit(gtid())


def a_horizon_that_is_not_raised() -> None:
    Told().tell(commands.tx_skip(NOW + 1), NOW, False)


def an_abort_without_a_reason() -> None:
    Told().decide(gtid(), ABORTED, "conflict", 1, 0, 0)


def an_early_deadline() -> None:
    Told().decide(gtid(), ABORTED, "deadline", 1, 0, -1)


def a_decision_of_another_entry() -> None:
    Told().decide(gtid(), COMMITTED, "", 9, 0, -1)


def an_answer_that_is_none() -> None:
    Told().decide(gtid(), TxStatus.NONE.value, "", 1, 0, -1)


def a_branch_forgotten_that_never_was() -> None:
    Told().tell(commands.tx_forget([(gtid(), b"branch-01")]), 1)


def a_heuristic_of_what_is_not_pending() -> None:
    Told().tell(commands.tx_heuristic(gtid(), b"branch-01", "hazard", "n1"), True)


def an_outcome_forgotten_too_early() -> None:
    told = committed()
    told.tell(commands.tx_forget([(gtid(), b"branch-01")]), 1)
    told.resolve(gtid(), UNKNOWN, "horizon", 0)


def a_pending_outcome_that_is_forgotten() -> None:
    told = Told(tx_lifetime_ms=10, tx_retention_ms=10)
    told.commit(gtid(), participants=[PARTICIPANT], deadline_ms=NOW)
    told.resolve(gtid(), UNKNOWN, "horizon", 0, now_ms=NOW + 1000)


def a_horizon_that_goes_back() -> None:
    told = Told()
    for horizon in (5, 4):
        state = SimpleNamespace(horizon_ms=horizon, close_ms=0)
        kernel = SimpleNamespace(machine=SimpleNamespace(_transactions=state))
        process: Any = SimpleNamespace(name="n1", start_number=1, _kernel=kernel)
        told.decisions.look(process)


def a_member_that_knows_nothing_of_it() -> None:
    committed().decisions.check("n1", Machine())


LIES: Final = {
    an_outcome_that_changes: "one outcome",
    a_decision_after_a_resolution: "one outcome",
    another_answer_than_before: "one outcome",
    a_resolution_that_commits: "one outcome",
    a_commit_after_the_deadline: "decision",
    a_commit_after_the_longest_life: "decision",
    a_commit_under_a_lock_that_is_lost: "decision",
    a_commit_in_spite_of_a_conflict: "decision",
    a_map_that_has_changed_after_all: "decision",
    an_abort_of_what_may_have_been_lost: "horizon",
    a_commit_of_what_may_have_been_lost: "horizon",
    a_horizon_that_is_not_raised: "horizon",
    an_abort_without_a_reason: "decision",
    an_early_deadline: "decision",
    a_decision_of_another_entry: "decision",
    an_answer_that_is_none: "decision",
    a_branch_forgotten_that_never_was: "pending branch",
    a_heuristic_of_what_is_not_pending: "pending branch",
    an_outcome_forgotten_too_early: "horizon",
    a_pending_outcome_that_is_forgotten: "horizon",
    a_horizon_that_goes_back: "horizon",
    a_member_that_knows_nothing_of_it: "one outcome",
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_lie_is_seen(lie: Any) -> None:
    """Each by the check that is there for it."""
    with pytest.raises(Violation) as caught:
        lie()
    assert caught.value.check == LIES[lie]


def test_a_command_that_comes_twice_counts_once() -> None:
    """The session's reply is given again; another answer would be seen by "exactly once"."""
    told = Told()
    body = commands.tx_decide(b"", NOW + 5000, writes=[PUT])
    told.tell(body, COMMITTED, "", 1, 0, -1, sequence=9)
    told.tell(body, COMMITTED, "", 1, 0, -1, sequence=9)
    assert told.marks.counts["tx_decide_repeated"] == 1
