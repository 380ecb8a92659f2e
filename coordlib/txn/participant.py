"""A service that takes part in others' transactions: what it has under way, by (gtid, branch), and what it answers.

::

    ACTIVE ──PREPARE──▶ PREPARED ──COMMIT──▶ committed ─┐
       │        │            └─────ABORT───▶ aborted    ├─▶ ended: remembered, so that whatever of it still
       │        ├─ NO, READ_ONLY ─────────────────────▶ │   comes (late, again, in another order) is refused
       ├─COMMIT_1P, ABORT, its time is over ──────────▶ ┘   or answered as it was

Only one thing of a branch is under way at a time: whatever comes meanwhile is told to ask again. A branch that has
promised waits for its outcome however long it takes: it is told, or asks (`inquire_gen`). One that has not promised
rolls back when its time is over.

Invariant: what has ended is never begun again. Ended branches are remembered, the newest `ENDED_MAX` of them; of what
was minted before the oldest that was forgotten nothing new is taken. No clock is asked for that.

What must not live here: what handlers do, threads, and which session the calls come from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import Any, Final

from coordlib.errors import CoordError, UsageError, invariant
from coordlib.node.operations import Do, OpGen, Outcome, Together
from coordlib.txn.branches import Branch, Finish
from coordlib.txn.gtid import BranchName
from coordlib.txn.members import Ballot, LocalMember
from coordlib.txn.recovery import Recovery, heuristic_gen, outcome_gen
from coordlib.txn.service import Answer, Status, Verb, Wish, text_of_error
from coordlib.txn.transaction import BRANCHES_MAX

__all__ = ["ENDED_MAX", "WORKS_MAX", "Participants", "Work", "WorkState"]

WORKS_MAX: Final = 10_000
"""Branches under way at once; calls of more transactions are refused."""

ENDED_MAX: Final = 100_000
ASK_AFTER_MS: Final = 1000
ASK_EVERY_MS_MAX: Final = 5000

Key = tuple[bytes, int]


class WorkState(Enum):
    ACTIVE = "active"
    PREPARED = "prepared"


class Work:
    """
    One transaction's work in a service of this process. Its branches are enlisted by what the handlers do.

    Attributes:
        is_busy: Something of it is under way.
        doomed: Why it will vote no.
        expires_ms: By this process's clock: an ACTIVE one rolls back then.
        state_of: What the handlers keep for the transaction (a dict of theirs).
    """

    __slots__ = (
        "_numbers",
        "answers",
        "ask_ms",
        "ask_pause_ms",
        "deadline_ms",
        "decider_tag",
        "decision",
        "doomed",
        "expires_ms",
        "gtid",
        "is_abort_wanted",
        "is_busy",
        "key",
        "members",
        "node",
        "node_tag",
        "notes",
        "seq",
        "service",
        "state",
    )

    def __init__(self, wish: Wish, node: str, node_tag: bytes, expires_ms: int) -> None:
        self.key: Key = (wish.gtid, wish.branch)
        self.gtid = wish.gtid
        self.service = wish.service
        self.deadline_ms = wish.deadline_ms
        self.decider_tag = wish.decider_tag
        self.node = node
        self.node_tag = node_tag
        self.expires_ms = expires_ms
        self.members: list[LocalMember] = []
        self.state = WorkState.ACTIVE
        self.seq = 0  # of the last thing that was done
        self.answers: dict[int, Answer] = {}  # by seq: the last one, and the vote
        self.is_busy = False
        self.is_abort_wanted = False
        self.doomed = ""
        self.decision: bool | None = None
        self.ask_ms = 0
        self.ask_pause_ms = ASK_AFTER_MS
        self.notes: dict[Any, Any] = {}
        self._numbers = 0

    def name_branch(self, resource_tag: bytes) -> bytes:
        """The bqual for one branch more: distinct from those of every other service of this transaction here."""
        if self._numbers >= BRANCHES_MAX // 8:
            raise UsageError(f"a service has at most {BRANCHES_MAX // 8} branches in one transaction")
        # The initiator's own branches have small numbers; each service has eight of its own.
        number = 64 + (self.key[1] * 8 + self._numbers) % 192
        self._numbers += 1
        return BranchName(resource_tag, self.node_tag, number, self.decider_tag).pack()

    def enlist(self, branch: Branch, *, expects_read_only: bool = False) -> None:
        invariant(self.state is WorkState.ACTIVE, "a branch joined what has promised")
        self.members.append(LocalMember(branch, self.node, expects_read_only=expects_read_only))


class _Ended:
    __slots__ = ("answer", "is_committed", "seq")

    def __init__(self, is_committed: bool, seq: int, answer: Answer) -> None:
        self.is_committed = is_committed
        self.seq = seq
        self.answer = answer  # to the last question


Execute = Callable[[Work, str, bytes], Do]


class Participants:
    """
    All work of this process for others' transactions.

    Args:
        node: This process's name, in lists of participants.
        recovery: Of this process.
        lock: Held for moments, never while anything is waited for.
    """

    def __init__(
        self,
        node: str,
        node_tag: bytes,
        recovery: Recovery,
        lock: AbstractContextManager[Any],
        *,
        ended_max: int = ENDED_MAX,
    ) -> None:
        self._node = node
        self._node_tag = node_tag
        self._recovery = recovery
        self._lock = lock
        self._ended_max = ended_max
        self.works: dict[Key, Work] = {}
        self._ended: OrderedDict[Key, _Ended] = OrderedDict()
        self._closed = b""  # gtids up to this one are not begun any more

    def is_live(self, gtid: bytes) -> bool:
        """Whether something of the transaction is under way here: its branches are ended from here."""
        with self._lock:
            return any(key[0] == gtid for key in self.works)

    def promised(self) -> set[bytes]:
        """Transactions whose outcome is waited for here."""
        with self._lock:
            return {work.gtid for work in self.works.values() if work.state is WorkState.PREPARED}

    # -- questions

    def handle_gen(self, wish: Wish, budget_ms: int, execute: Execute) -> OpGen[Answer]:
        """
        Do what is asked, and answer. Never raises for what handlers and resources do.

        Args:
            execute: What runs a service's operation in a transaction's work and returns the result as bytes.
        """
        work = self._begin(wish, budget_ms)
        if isinstance(work, Answer):
            return work
        try:
            if wish.verb == Verb.CALL:
                answer = yield from self._call_gen(work, wish, execute)
            elif wish.verb == Verb.PREPARE:
                answer = yield from self._prepare_gen(work)
            elif wish.verb == Verb.COMMIT_1P:
                answer = yield from self._one_phase_gen(work)
            else:
                answer = yield from self._finish_gen(work, wish.verb == Verb.COMMIT)
            if wish.verb in (Verb.CALL, Verb.PREPARE, Verb.COMMIT_1P):
                with self._lock:
                    work.seq = wish.seq
                    work.answers = {wish.seq: answer}
                    ended = self._ended.get(work.key)
                    if ended is not None:
                        ended.seq, ended.answer = wish.seq, answer
            if work.is_abort_wanted and work.state is WorkState.ACTIVE and work.key in self.works:
                yield from self._finish_gen(work, False)
        finally:
            work.is_busy = False
        return answer

    def _begin(self, wish: Wish, budget_ms: int) -> Work | Answer:
        """The work that this is about, which is busy from now on; or what is answered at once."""
        key = (wish.gtid, wish.branch)
        with self._lock:
            ended = self._ended.get(key)
            if ended is not None:
                return self._answer_ended(wish, ended)
            work = self.works.get(key)
            if work is None:
                if wish.verb == Verb.ABORT:
                    # Whatever of it still comes is late. (A late PREPARE must not bring it to life.)
                    self._remember(key, _Ended(False, wish.seq, _ended()))
                    return _ended()
                if wish.verb != Verb.CALL or wish.seq != 1:
                    # Its calls were lost with an earlier run of this process, or have not come: no promise on that.
                    return Answer(
                        Status.NO if wish.verb == Verb.PREPARE else Status.REFUSED, "not known here"
                    )
                if wish.gtid <= self._closed:
                    return Answer(
                        Status.REFUSED, "too late: others that began after it are forgotten already"
                    )
                if len(self.works) >= WORKS_MAX:
                    return Answer(Status.REFUSED, f"{WORKS_MAX} transactions are under way here")
                expires_ms = self._recovery.clock() + budget_ms
                work = self.works[key] = Work(wish, self._node, self._node_tag, expires_ms)
            elif work.service != wish.service:
                return Answer(Status.REFUSED, "another service has this branch")
            if work.is_busy:
                work.is_abort_wanted |= wish.verb == Verb.ABORT
                return Answer(Status.BUSY)
            if wish.verb in (Verb.CALL, Verb.PREPARE, Verb.COMMIT_1P):
                if wish.seq in work.answers:
                    return work.answers[wish.seq]
                if work.state is not WorkState.ACTIVE:
                    return Answer(Status.REFUSED, "it has promised, and can do nothing more")
                if wish.seq != work.seq + 1:
                    return Answer(Status.REFUSED, f"out of order: {wish.seq} after {work.seq}")
            elif wish.verb == Verb.COMMIT and work.state is not WorkState.PREPARED:
                return Answer(Status.REFUSED, "told to commit what was never promised")
            work.is_busy = True
            return work

    def _answer_ended(self, wish: Wish, ended: _Ended) -> Answer:
        if wish.verb == Verb.COMMIT:
            return _ended() if ended.is_committed else Answer(Status.REFUSED, "it was rolled back")
        if wish.verb == Verb.ABORT:
            return Answer(Status.REFUSED, "it was committed") if ended.is_committed else _ended()
        if wish.verb == Verb.COMMIT_1P and ended.answer.status == Status.ENDED:
            # It could only prepare then, and has been told the outcome since.
            return _ended() if ended.is_committed else Answer(Status.NO, "it was rolled back")
        if wish.seq == ended.seq:
            return ended.answer
        return Answer(Status.NO if wish.verb == Verb.PREPARE else Status.REFUSED, "it has ended")

    def _remember(self, key: Key, ended: _Ended) -> None:
        self._ended[key] = ended
        while len(self._ended) > self._ended_max:
            (gtid, _), _ = self._ended.popitem(last=False)
            self._closed = max(self._closed, gtid)

    def _end(self, work: Work, is_committed: bool, answer: Answer) -> Answer:
        with self._lock:
            invariant(self.works.pop(work.key, None) is work, "a branch ended twice")
            self._remember(work.key, _Ended(is_committed, work.seq, answer))
        return answer

    # -- phases

    def _call_gen(self, work: Work, wish: Wish, execute: Execute) -> OpGen[Answer]:
        try:
            result: bytes = yield execute(work, wish.operation, wish.payload)
        except Exception as error:
            # What it had done so far may be half of it: whoever swallows this error must not commit it.
            text = text_of_error(error)
            work.doomed = f"{wish.operation} raised {type(error).__name__}: {text}"
            return Answer(Status.RAISED, [type(error).__name__, text])
        is_reader = all(member.expects_read_only for member in work.members)
        return Answer(Status.READ if is_reader else Status.RETURNED, result)

    def _prepare_gen(self, work: Work) -> OpGen[Answer]:
        if work.doomed or work.is_abort_wanted:
            yield from self._tell_gen(work, False)
            return self._end(work, False, Answer(Status.NO, work.doomed or "it was told to abort"))
        outcomes: list[Outcome] = yield Together([member.prepare(work.expires_ms) for member in work.members])
        ballots = [member.read_vote(outcome) for member, outcome in zip(work.members, outcomes, strict=True)]
        failed = next((ballot for ballot in ballots if ballot.error is not None), None)
        if failed is not None:
            # What may be prepared all the same is found in its resource, if it cannot be rolled back now.
            yield from self._tell_gen(work, False)
            return self._end(work, False, Answer(Status.NO, _why(failed)))
        work.members = [member for member in work.members if member.participants]
        if not work.members:
            return self._end(work, True, Answer(Status.READ_ONLY))
        promised = [list(participant) for member in work.members for participant in member.participants]
        with self._lock:
            work.state = WorkState.PREPARED
            work.ask_ms = self._recovery.clock() + work.ask_pause_ms
        return Answer(Status.VOTED, promised)

    def _one_phase_gen(self, work: Work) -> OpGen[Answer]:
        if work.doomed or work.is_abort_wanted or len(work.members) != 1:
            return (yield from self._prepare_gen(work))
        (member,) = work.members
        (outcome,) = yield Together([member.commit_one_phase(work.expires_ms)])
        ballot = member.read_one_phase(outcome)
        if ballot.error is None:
            return self._end(work, True, _ended())
        status = Status.REFUSED if ballot.is_lost else Status.NO
        return self._end(work, False, Answer(status, _why(ballot)))

    def _finish_gen(self, work: Work, commit: bool) -> OpGen[Answer]:
        """The outcome is known: obey it."""
        invariant(work.decision in (None, commit), "a branch was told two outcomes")
        invariant(not commit or work.state is WorkState.PREPARED, "told to commit what was never promised")
        work.decision = commit
        waiting, ended, heuristics = yield from self._tell_gen(work, commit)
        payload = [ended, [[bqual, finish.value] for bqual, finish in heuristics]]
        if waiting and work.state is WorkState.PREPARED:
            work.members = waiting
            return Answer(Status.PENDING, payload)
        return self._end(work, commit, Answer(Status.ENDED, payload))

    def _tell_gen(
        self, work: Work, commit: bool
    ) -> OpGen[tuple[list[LocalMember], list[bytes], list[tuple[bytes, Finish]]]]:
        by = self._recovery.clock() + ASK_EVERY_MS_MAX
        outcomes: list[Outcome] = yield Together([member.finish(commit, by) for member in work.members])
        waiting: list[LocalMember] = []
        ended: list[bytes] = []
        heuristics: list[tuple[bytes, Finish]] = []
        for member, outcome in zip(work.members, outcomes, strict=True):
            ending = member.read_ending(commit, outcome)
            if not ending.is_done:
                waiting.append(member)
            ended += ending.ended
            heuristics += ending.heuristics
        return waiting, ended, heuristics

    # -- by itself

    def due(self) -> list[Work]:
        """What has something to do by itself now: `inquire_gen` does it."""
        now = self._recovery.clock()
        with self._lock:
            found = [
                work
                for work in self.works.values()
                if not work.is_busy
                and now >= (work.expires_ms if work.state is WorkState.ACTIVE else work.ask_ms)
            ]
            for work in found:
                work.is_busy = True
        return found

    def inquire_gen(self, work: Work) -> OpGen[None]:
        """One that is `due`: roll back what is over, ask for the outcome of what was promised, and obey."""
        try:
            if work.state is WorkState.ACTIVE:
                self._recovery.count("expired")
                work.decision = None
                yield from self._finish_gen(work, False)
                return
            work.ask_pause_ms = min(2 * work.ask_pause_ms, ASK_EVERY_MS_MAX)
            work.ask_ms = self._recovery.clock() + work.ask_pause_ms
            if work.decision is None:
                try:
                    is_committed, _ = yield from outcome_gen(
                        work.gtid, work.members[0].branch.bqual, self._recovery, deadline_ms=work.deadline_ms
                    )
                except CoordError:
                    return  # the cluster cannot be asked now
                if is_committed is None:
                    return
            else:
                is_committed = work.decision
            answer = yield from self._finish_gen(work, is_committed)
            ended, heuristics = answer.payload
            self._obeyed(work, is_committed, ended)
            for bqual, name in heuristics:
                yield from heuristic_gen(work.gtid, bqual, Finish(name), self._recovery)
        finally:
            work.is_busy = False

    def _obeyed(self, work: Work, is_committed: bool, bquals: Sequence[bytes]) -> None:
        if is_committed and not work.decider_tag:
            self._recovery.forget([(work.gtid, bqual) for bqual in bquals])


def _why(ballot: Ballot) -> str:
    return "" if ballot.error is None else text_of_error(ballot.error)


def _ended() -> Answer:
    return Answer(Status.ENDED, [[], []])
