"""Commit and abort, as generators: who is asked what in which order, and what follows from each answer.

::

    branches, and something replicated    PREPARE all ─▶ DECIDE ─▶ COMMIT all
    only replicated changes               DECIDE, remembered by nobody but the session: as cheap as a put
    one branch and nothing else           COMMIT in one phase                                    no entry in the log
    all but one expected to read only     PREPARE those; all READ_ONLY: the one in one phase     no entry
    all READ_ONLY                         nothing                                                no entry
    a last resource and others            PREPARE the others ─▶ it commits with its marker ─▶ COMMIT the others

Presumed abort: there is no entry for the beginning, and none for an abort while its initiator lives.

What must not live here: how branches do what they are asked (`members`), and what is done about what could not be
reached (`recovery`).

Source: Gray and Lamport, "Consensus on Transaction Commit"; dynamic one-phase commit is Narayana's, the logging last
resource WebLogic's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, cast

from coordlib.errors import (
    CoordError,
    DefiniteError,
    HeuristicOutcome,
    ResourceNotTwoPhase,
    TooManyLastResources,
    TransactionAborted,
    TransactionConflict,
    TransactionOutcomeUnknown,
    UsageError,
    invariant,
)
from coordlib.machine import commands
from coordlib.machine.commands import TxStatus
from coordlib.node.operations import Do, Failure, OpGen, Outcome, Step, Success, Together
from coordlib.txn.branches import BranchFailed, DecidingResource, Finish
from coordlib.txn.gtid import text_of
from coordlib.txn.members import Ballot, LocalMember, Member, obeyed
from coordlib.txn.transaction import Decided, State, Transaction
from coordlib.wire.messages import RequestKind

__all__ = ["Context", "Counters", "Unfinished", "abort_gen", "commit_gen", "finish_gen", "leave"]

GRACE_MS: Final = 2000
"""How long an answer to the decision is waited for beyond the deadline, and again for the resolution."""

ABORT_MS: Final = 1000
"""How long members are waited for that are told of an abort: those that do not hear it find out by themselves."""

RETRY_SECONDS: Final = 0.05

Counters = dict[str, int]


class Unfinished(NamedTuple):
    """What is left of a transaction whose initiator can do no more in its caller's time."""

    gtid: bytes
    is_committed: bool | None  # None: not known; the log is to be asked
    members: tuple[Member, ...]  # still to be told
    decider: DecidingResource | None = None  # the last resource, where that has the answer
    is_one_phase: bool = False  # nobody has the answer but its only branch: no one else may be asked


class Context:
    """
    What commit needs besides the transaction.

    Attributes:
        clock: This process's monotonic clock, in ms.
        finish_later: Given what is left to be done. It must neither block nor raise.
        forget: Given (gtid, bqual) of branches that have obeyed, for a lazy FORGET. It must neither block nor raise.
        counters: By name; see docs/transactions.md.
    """

    __slots__ = ("clock", "counters", "finish_later", "forget")

    def __init__(
        self,
        clock: Callable[[], int],
        finish_later: Callable[[Unfinished], None],
        forget: Callable[[Sequence[tuple[bytes, bytes]]], None],
        counters: Counters,
    ) -> None:
        self.clock = clock
        self.finish_later = finish_later
        self.forget = forget
        self.counters = counters

    def count(self, name: str, number: int = 1) -> None:
        try:
            self.counters[name] += number
        except KeyError:
            self.counters[name] = number


def _name(tx: Transaction) -> str:
    return f"transaction {text_of(tx.gtid)}" if tx.gtid else "the transaction"


def _aborted(
    tx: Transaction, reason: str, why: str, cause: BaseException | None = None
) -> TransactionAborted:
    kind = TransactionConflict if reason == "conflict" else TransactionAborted
    error = kind(f"{_name(tx)} was aborted ({reason}): {why}", reason=reason, gtid=tx.gtid)
    error.__cause__ = cause
    return error


def _unknown(tx: Transaction, why: str, cause: BaseException | None) -> TransactionOutcomeUnknown:
    error = TransactionOutcomeUnknown(
        f"transaction {text_of(tx.gtid)}: {why}. It has one outcome, the same everywhere; ask for it by the gtid",
        gtid=tx.gtid,
    )
    error.__cause__ = cause
    return error


# --- commit -----------------------------------------------------------------------------------------------


def commit_gen(tx: Transaction, context: Context, *, until_applied: bool = True) -> OpGen[Decided]:
    """
    Commit a transaction that is ACTIVE: everywhere, or nowhere.

    When this returns, the transaction is committed, for ever; and with `until_applied` every member has obeyed, or
    could not be reached for `GRACE_MS` and will obey as soon as it can be. Without it the members are told after the
    return: the caller runs `finish_gen`.

    Raises:
        TransactionAborted: Nothing happened, nor will. `reason`: "vote-no" (its cause says whose and why), "deadline",
            "lock-lost", "quota", "resolved" (somebody in doubt asked first), "doomed", "no-quorum".
        TransactionConflict: The same; what had been read was changed by others. Retryable.
        TransactionOutcomeUnknown: It has an outcome that could not be learnt in time.
        HeuristicOutcome: It is committed, but somebody had rolled back some of its branches by hand.
        TooManyLastResources, ResourceNotTwoPhase: It was aborted.
    """
    invariant(tx.state is State.ACTIVE, "commit of a transaction that is %s", tx.state)
    try:
        decided = yield from _commit_gen(tx, context, until_applied)
    except GeneratorExit:
        # Nobody runs this any more, so that nothing can be waited for.
        leave(tx, context)
        raise
    except BaseException as error:
        _count_failure(context, error)
        # Its caller was interrupted (or an adapter has a bug). Before the decision was asked for nothing is
        # committed, and whatever was promised can be rolled back; after that, only the log can tell.
        if tx.state in (State.ACTIVE, State.PREPARING):
            try:
                yield from abort_gen(tx, context)
            except HeuristicOutcome:
                pass  # must not hide what is on its way; `coordlib tx` shows it
        elif tx.state in (State.DECIDING, State.ONE_PHASE):
            leave(tx, context)
        raise
    context.count("committed")
    return decided


def _count_failure(context: Context, error: BaseException) -> None:
    if isinstance(error, TransactionAborted):
        context.count(f"aborted_{error.reason}")
    elif isinstance(error, (TooManyLastResources, ResourceNotTwoPhase)):
        context.count("aborted_refused")
    elif isinstance(error, TransactionOutcomeUnknown):
        context.count("unknown")
    elif isinstance(error, HeuristicOutcome):
        context.count("heuristic")
    else:
        context.count("interrupted")


def _timed_gen(phase: str, request: Step | Together, context: Context) -> OpGen[Any]:
    """Have it done, and add to how often and how long this phase was waited for."""
    began_ms = context.clock()
    try:
        return (yield request)
    finally:
        context.count(f"{phase}_rounds")
        context.count(f"{phase}_ms", context.clock() - began_ms)


def _commit_gen(tx: Transaction, context: Context, until_applied: bool) -> OpGen[Decided]:
    refusal = _refusal(tx, context)
    if refusal is not None:
        yield from abort_gen(tx, context)
        raise refusal
    if not tx.members:
        return (yield from _commit_state_gen(tx, context))
    last = next((member for member in tx.members if member.is_last_resource), None)
    if last is not None and len(tx.members) > 1:
        return (yield from _commit_by_last_resource_gen(tx, last, context, until_applied))
    to_ask = tx.members
    if not tx.change.is_needed:
        writers = [member for member in tx.members if not member.expects_read_only]
        if len(tx.members) == 1:
            context.count("one_phase")
            return (yield from _one_phase_gen(tx, tx.members[0], context, until_applied))
        if len(writers) == 1:
            ballots = yield from _prepare_gen(tx, [m for m in tx.members if m.expects_read_only], context)
            if not any(ballot.promised for ballot in ballots):
                context.count("dynamic_one_phase")
                return (yield from _one_phase_gen(tx, writers[0], context, until_applied))
            to_ask = writers
    yield from _prepare_gen(tx, to_ask, context)
    return (yield from _commit_prepared_gen(tx, context, until_applied))


def _refusal(tx: Transaction, context: Context) -> CoordError | None:
    if tx.doomed:
        return _aborted(tx, "doomed", tx.doomed)
    if context.clock() >= tx.expires_ms:
        return _aborted(tx, "deadline", "its time was over before it came to commit")
    last = [member for member in tx.members if member.is_last_resource]
    if len(last) > 1:
        return TooManyLastResources(
            "two resources of this transaction cannot prepare (SQLite cannot), and only one can decide; "
            "it was aborted. Give one of them a transaction of its own"
        )
    if last and tx.change.is_needed:
        return ResourceNotTwoPhase(
            "a resource that cannot prepare (SQLite cannot) decides by its own commit, and so cannot be committed "
            "together with replicated changes; the transaction was aborted. Keep that state in the same "
            "database, or change the map in a transaction of its own"
        )
    return None


def _commit_state_gen(tx: Transaction, context: Context) -> OpGen[Decided]:
    if not (tx.change.has_effect if tx.members else tx.change.is_needed):
        context.count("read_only")
        tx.become(State.COMMITTED)
        tx.become(State.ENDED)
        return Decided()
    context.count("state_only")
    context.count("log_entries")
    tx.become(State.DECIDING)
    # No gtid: nobody can be in doubt of it but its caller, and that the session's reply answers. What is
    # remembered of transactions is kept for those who have participants.
    step = Step(RequestKind.COMMAND, _decide_body(tx, b""), _answer_by(tx, context))
    try:
        reply = yield from _timed_gen("decide", step, context)
    except (DefiniteError, UsageError) as error:
        tx.become(State.ABORTED)
        raise _not_decided(tx, error) from error
    except CoordError as error:
        tx.become(State.UNKNOWN)
        raise TransactionOutcomeUnknown(
            f"the answer to the decision of {_name(tx)} was lost: its changes may have taken effect, "
            "or may yet, all of them or none. Read back before repeating it",
            gtid=tx.gtid,
        ) from error
    decided = _read_decision(tx, reply)
    tx.become(State.ENDED)
    return decided


def _one_phase_gen(tx: Transaction, member: Member, context: Context, until_applied: bool) -> OpGen[Decided]:
    tx.become(State.ONE_PHASE)
    by = tx.expires_ms + GRACE_MS
    (outcome,) = yield Together([member.commit_one_phase(by)])
    ballot = member.read_one_phase(outcome)
    while ballot.is_lost and member.is_remote and context.clock() + RETRY_SECONDS * 1000 < by:
        # Asked again, it does not do it again: it says what it did.
        yield Step.pause(RETRY_SECONDS)
        (outcome,) = yield Together([member.commit_one_phase(by)])
        ballot = member.read_one_phase(outcome)
    if ballot.promised:
        # It has several branches itself, and could only prepare.
        return (yield from _commit_prepared_gen(tx, context, until_applied))
    if ballot.error is None:
        tx.become(State.COMMITTED)
        tx.become(State.ENDED)
        return Decided()
    if ballot.is_lost:
        tx.become(State.UNKNOWN)
        raise _unknown(tx, "the connection was lost while its only branch committed", ballot.error)
    tx.become(State.ABORTED)
    yield from _rollback_gen(tx, context, () if member.is_remote else tx.members)
    raise _aborted(tx, "vote-no", f"its only branch could not commit: {ballot.error}", ballot.error)


def _prepare_gen(tx: Transaction, members: Sequence[Member], context: Context) -> OpGen[list[Ballot]]:
    """
    Ask for promises, all at once.

    Raises:
        TransactionAborted: Somebody could not promise; all have been rolled back.
    """
    if tx.state is State.ACTIVE:
        tx.become(State.PREPARING)
    votes = Together([member.prepare(tx.expires_ms) for member in members])
    outcomes: list[Outcome] = yield from _timed_gen("prepare", votes, context)
    ballots = [member.read_vote(outcome) for member, outcome in zip(members, outcomes, strict=True)]
    failed = next((ballot for ballot in ballots if ballot.error is not None), None)
    if failed is not None:
        context.count("votes_no")
        ended = [
            member
            for member, ballot in zip(members, ballots, strict=True)
            if not ballot.promised and not ballot.is_lost
        ]
        yield from abort_gen(tx, context, ended)
        raise _aborted(tx, "vote-no", f"a branch could not promise to commit: {failed.error}", failed.error)
    return ballots


def _commit_prepared_gen(tx: Transaction, context: Context, until_applied: bool) -> OpGen[Decided]:
    """The log decides; everybody who takes part has promised, or read only."""
    if not any(member.participants for member in tx.members):
        return (yield from _commit_state_gen(tx, context))
    context.count("two_phase")
    context.count("log_entries")
    tx.become(State.DECIDING)
    step = Step(RequestKind.COMMAND, _decide_body(tx, tx.gtid), _answer_by(tx, context))
    try:
        reply = yield from _timed_gen("decide", step, context)
    except (DefiniteError, UsageError) as error:
        # It was never appended, and never will be: no entry is needed for what everybody presumes.
        yield from abort_gen(tx, context)
        raise _not_decided(tx, error) from error
    except CoordError as error:
        decided = yield from _resolve_gen(tx, context, error)
    else:
        try:
            decided = _read_decision(tx, reply)
        except TransactionAborted:
            yield from _rollback_gen(tx, context, ())
            raise
    if until_applied:
        yield from finish_gen(tx, context)
    return decided


def _resolve_gen(tx: Transaction, context: Context, cause: CoordError) -> OpGen[Decided]:
    """The answer to the decision was lost. Whoever is applied first decides; either way there is an answer."""
    context.count("resolved")
    context.count("log_entries")
    by = context.clock() + GRACE_MS
    try:
        reply = yield Step(RequestKind.COMMAND, commands.tx_resolve(tx.gtid), by)
    except CoordError as error:
        tx.become(State.UNKNOWN)
        leave(tx, context)
        raise _unknown(tx, "the cluster did not answer in time whether it is decided", error) from cause
    try:
        return _read_decision(tx, reply)
    except TransactionAborted as error:
        yield from _rollback_gen(tx, context, ())
        raise error from cause


def _commit_by_last_resource_gen(
    tx: Transaction, last: Member, context: Context, until_applied: bool
) -> OpGen[Decided]:
    others = [member for member in tx.members if member is not last]
    ballots = yield from _prepare_gen(tx, others, context)
    if not any(ballot.promised for ballot in ballots):
        context.count("one_phase")
        return (yield from _one_phase_gen(tx, last, context, until_applied))
    assert isinstance(last, LocalMember)
    decider = cast(DecidingResource, last.branch.resource)
    context.count("last_resource")
    tx.become(State.DECIDING)
    (outcome,) = yield from _timed_gen("decide", Together([last.decide(tx.gtid)]), context)
    if isinstance(outcome, Failure) and not isinstance(outcome.error, BranchFailed):
        # Its connection was lost in the middle. It knows whether it has committed; if not, it never will from now on.
        try:
            is_committed = yield Do(lambda: decider.outcome(tx.gtid))
        except Exception as error:
            tx.become(State.UNKNOWN)
            leave(tx, context)
            raise _unknown(
                tx, f"the last resource cannot be asked whether it committed ({error})", error
            ) from error
        if is_committed:
            outcome = Success(None)
    if isinstance(outcome, Failure):
        tx.become(State.ABORTED)
        yield from _rollback_gen(tx, context, (last,))
        raise _aborted(tx, "vote-no", f"the last resource could not commit: {outcome.error}", outcome.error)
    tx.become(State.COMMITTED)
    if until_applied:
        yield from finish_gen(tx, context)
    return Decided()


def _decider_of(tx: Transaction) -> DecidingResource | None:
    for member in tx.members:
        if member.is_last_resource:
            assert isinstance(member, LocalMember)
            return cast(DecidingResource, member.branch.resource)
    return None


def _answer_by(tx: Transaction, context: Context) -> int:
    # The entry itself carries the deadline: a late one decides "aborted". So the answer may be waited for.
    return max(tx.expires_ms, context.clock()) + GRACE_MS


def _decide_body(tx: Transaction, gtid: bytes) -> bytes:
    change = tx.change
    participants = [participant for member in tx.members for participant in member.participants]
    return commands.tx_decide(
        gtid,
        tx.deadline_ms if gtid else commands.NO_DEADLINE,
        participants=participants,
        guards=change.guards,
        conditions=change.conditions,
        writes=change.writes,
        releases=change.releases,
        otherwise=change.otherwise,
    )


_WHY: Final = {
    "deadline": "its time was over",
    "lock-lost": "a lock that guards it was lost",
    "conflict": "what it had read was changed by others meanwhile; run it again",
    "quota": "the replicated state would become too large",
    "resolved": "somebody in doubt asked for its outcome before it was decided",
}


def _read_decision(tx: Transaction, reply: bytes) -> Decided:
    """
    The outcome, of a reply to DECIDE or RESOLVE.

    Raises:
        TransactionAborted, TransactionConflict, TransactionOutcomeUnknown: It is that.
    """
    status, reason, revision, *more = commands.decode_reply(reply)
    if status == TxStatus.COMMITTED:
        tx.become(State.COMMITTED)
        return Decided(revision, *more)
    if status == TxStatus.ABORTED:
        tx.become(State.ABORTED)
        raise _aborted(tx, reason, _WHY.get(reason, "it was refused"))
    tx.become(State.UNKNOWN)
    raise _unknown(tx, "it was begun so long ago that its outcome is no longer kept", None)


def _not_decided(tx: Transaction, error: CoordError) -> TransactionAborted:
    return _aborted(tx, error.code, f"the decision was never taken: {error}", error)


# --- what follows -----------------------------------------------------------------------------------------


def finish_gen(tx: Transaction, context: Context) -> OpGen[None]:
    """
    Tell everybody who promised that the transaction is committed.

    When this returns each has obeyed, or is left to `context.finish_later`.

    Raises:
        HeuristicOutcome: Some had been rolled back by somebody else. All others have obeyed, or will.
    """
    invariant(tx.state is State.COMMITTED, "told to commit what is %s", tx.state)
    decider = _decider_of(tx)
    waiting: list[Member] = [member for member in tx.members if member.participants]
    heuristics: list[tuple[bytes, Finish]] = []
    by = context.clock() + GRACE_MS
    try:
        while waiting:
            waiting = yield from _tell_gen(tx, waiting, True, by, heuristics, context)
            if waiting and context.clock() + RETRY_SECONDS * 1000 >= by:
                break
            if waiting:
                yield Step.pause(RETRY_SECONDS)
    except BaseException:
        context.finish_later(Unfinished(tx.gtid, True, tuple(waiting), decider))
        raise
    if waiting:
        context.count("left_to_recovery")
        context.finish_later(Unfinished(tx.gtid, True, tuple(waiting), decider))
    else:
        tx.become(State.ENDED)
        if decider is not None and not heuristics:
            context.finish_later(Unfinished(tx.gtid, True, (), decider))  # its marker has served its time
    yield from _report_heuristics_gen(tx, True, heuristics, context)


def abort_gen(tx: Transaction, context: Context, ended: Iterable[Member] = ()) -> OpGen[None]:
    """
    Roll back a transaction that is not decided, and nobody has been asked to decide. Never raises for what members do.

    Args:
        ended: Members that have ended by themselves.
    """
    invariant(tx.state in (State.ACTIVE, State.PREPARING, State.DECIDING), "abort of what is %s", tx.state)
    tx.become(State.ABORTED)
    yield from _rollback_gen(tx, context, ended)


def _rollback_gen(tx: Transaction, context: Context, ended: Iterable[Member]) -> OpGen[None]:
    invariant(tx.state is State.ABORTED, "told to roll back what is %s", tx.state)
    done = list(ended)
    decider = _decider_of(tx)
    waiting = [member for member in tx.members if not any(member is other for other in done)]
    heuristics: list[tuple[bytes, Finish]] = []
    try:
        if waiting:
            by = context.clock() + ABORT_MS
            waiting = yield from _tell_gen(tx, waiting, False, by, heuristics, context)
    except BaseException:
        context.finish_later(Unfinished(tx.gtid, False, tuple(waiting), decider))
        raise
    if waiting:
        context.finish_later(Unfinished(tx.gtid, False, tuple(waiting), decider))
    else:
        tx.become(State.ENDED)
    yield from _report_heuristics_gen(tx, False, heuristics, context)


def _tell_gen(
    tx: Transaction,
    members: Sequence[Member],
    commit: bool,
    deadline_ms: int,
    heuristics: list[tuple[bytes, Finish]],
    context: Context,
) -> OpGen[list[Member]]:
    """Tell all at once; returns those that have not obeyed."""
    orders = Together([member.finish(commit, deadline_ms) for member in members])
    phase = "apply" if commit else "rollback"
    outcomes: list[Outcome] = yield from _timed_gen(phase, orders, context)
    waiting: list[Member] = []
    ended: list[tuple[bytes, bytes]] = []
    for member, outcome in zip(members, outcomes, strict=True):
        ending = member.read_ending(commit, outcome)
        if not ending.is_done:
            waiting.append(member)
        heuristics += ending.heuristics
        if commit:
            ended += [(tx.gtid, bqual) for bqual in obeyed(member, ending)]
    if commit and ended and not tx.decider_tag:
        context.forget(ended)
    return waiting


def _report_heuristics_gen(
    tx: Transaction, is_committed: bool, heuristics: list[tuple[bytes, Finish]], context: Context
) -> OpGen[None]:
    """
    Raises:
        HeuristicOutcome: There are some. People can see them in the cluster's own records, if it could be reached.
    """
    if not heuristics:
        return
    context.count("heuristics", len(heuristics))
    by = context.clock() + GRACE_MS
    yield Together(
        [
            Step(RequestKind.COMMAND, commands.tx_heuristic(tx.gtid, bqual, finish.value, tx.node), by)
            for bqual, finish in heuristics
        ]
    )
    outcome = "committed" if is_committed else "aborted"
    raise HeuristicOutcome(
        f"transaction {text_of(tx.gtid)} is {outcome}, but {len(heuristics)} of its branches were ended otherwise by "
        "somebody else: repair them by hand",
        gtid=tx.gtid,
        branches=[bqual.hex() for bqual, _ in heuristics],
    )


def leave(tx: Transaction, context: Context) -> None:
    """Give what is left to recovery, without doing anything that could take time."""
    if tx.state in (State.ACTIVE, State.PREPARING):
        tx.become(State.ABORTED)
    elif tx.state is State.ONE_PHASE:
        # The log knows nothing of it, and would call it aborted for ever. What is not committed rolls back: here when it
        # is told, elsewhere by itself when its time is over.
        tx.become(State.UNKNOWN)
        here = tuple(member for member in tx.members if not member.is_remote)
        context.finish_later(Unfinished(tx.gtid, False, here, is_one_phase=True))
        return
    elif tx.state is State.DECIDING:
        tx.become(State.UNKNOWN)
    if tx.state is State.ENDED or not tx.members:
        return
    decided = {State.COMMITTED: True, State.ABORTED: False}.get(tx.state)
    decider = _decider_of(tx)
    context.finish_later(Unfinished(tx.gtid, decided, tuple(tx.members), decider))
