"""Finishing what others have left: prepared branches of the dead, and members that could not be told in time.

A branch in doubt is never resolved by guess. What decides is asked: the log, or the last resource whose tag is in the
branch's own name. Where nothing is decided yet and the initiator lives, the branch waits; where it does not live, or the
transaction's time is over, RESOLVE decides, and a DECIDE that comes later loses.

What must not live here: when all this is done (an agent in `coordlib.api`), and any clock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from coordlib.errors import FatalError, UsageError, invariant
from coordlib.machine import commands
from coordlib.machine.commands import TxStatus
from coordlib.node.operations import Do, OpGen, Outcome, Step, Together
from coordlib.txn.branches import DecidingResource, Finish, PreparedBranch, Resource
from coordlib.txn.commit import Unfinished
from coordlib.txn.gtid import BranchName, mint_ms_of
from coordlib.txn.journal import JournalResource
from coordlib.txn.members import Member, obeyed
from coordlib.wire.messages import RequestKind

__all__ = ["InDoubt", "Recovered", "Recovery", "complete_gen", "outcome_gen", "recover_gen", "sweep_gen"]

TELL_MS: Final = 2000
PAUSE_SECONDS: Final = 0.05
PAUSE_SECONDS_MAX: Final = 5.0
ATTEMPTS_MAX: Final = 24
"""About a minute and a half. Then members of other processes ask by themselves, and resources are searched."""


_BY_PEOPLE: Final = {Finish.HEURISTIC_COMMIT.value: True, Finish.HEURISTIC_ROLLBACK.value: False}
"""What is on record of a branch, where nobody else knows how it is to end: somebody has seen to that."""


class InDoubt(NamedTuple):
    """A branch that cannot be finished now, and why."""

    branch: PreparedBranch
    why: str


class Recovered(NamedTuple):
    """What a search of one resource has come to."""

    committed: int
    rolled_back: int
    in_doubt: tuple[InDoubt, ...]
    heuristics: int


class Recovery(Protocol):
    """What recovery needs of the process that it runs in."""

    def clock(self) -> int:
        """This process's monotonic clock, in ms."""

    @property
    def who(self) -> str:
        """This process's name, for records that people read."""

    @property
    def request_timeout_ms(self) -> int: ...

    def is_live(self, gtid: bytes) -> bool:
        """Whether this process is at work on the transaction: it ends its branches itself."""

    def decider(self, tag: bytes) -> DecidingResource | None:
        """The last resource of this tag, if it is in this process."""

    def ask_decider_gen(self, tag: bytes, gtid: bytes) -> OpGen[bool | None]:
        """Ask the process that has the last resource of this tag; None: it gives no answer now."""

    def forget(self, branches: Sequence[tuple[bytes, bytes]]) -> None:
        """(gtid, bqual) of branches that have obeyed a decision in the log. Neither blocks nor raises."""

    def count(self, name: str, number: int = 1) -> None: ...


def outcome_gen(
    gtid: bytes, bqual: bytes, recovery: Recovery, *, deadline_ms: int | None = None
) -> OpGen[tuple[bool | None, str]]:
    """
    Whether a transaction in doubt is committed: True, False, or None and why not.

    Asking may be what decides it (then: False).

    Args:
        bqual: Of any branch of it: says who decides.
        deadline_ms: In log time; None: the longest that a transaction may have. When nobody can decide to commit any
            more, asking is free: nothing is taken from whoever begun it.

    Raises:
        CoordError: The cluster cannot be asked now.
    """
    name = BranchName.unpack(bqual)
    invariant(name is not None, "a branch whose name is none: %s", bqual.hex())
    assert name is not None
    if name.decider_tag:
        return (yield from _ask_last_resource_gen(gtid, name.decider_tag, recovery))
    reply = yield Step(
        RequestKind.QUERY, commands.query_tx_state(gtid), recovery.clock() + recovery.request_timeout_ms
    )
    status, _, _, is_alive, _, _, notes = commands.decode_reply(reply)
    if status == TxStatus.NONE:
        if is_alive and (yield from _may_yet_be_decided_gen(gtid, deadline_ms, recovery)):
            return None, "not decided yet, and its initiator is alive"
        recovery.count("resolved")
        deadline = recovery.clock() + recovery.request_timeout_ms
        reply = yield Step(RequestKind.COMMAND, commands.tx_resolve(gtid), deadline)
        status, _, _ = commands.decode_reply(reply)
    said = next((ending for noted, ending, _, _ in notes if noted == bqual), "")
    if status == TxStatus.UNKNOWN and said in _BY_PEOPLE:
        return _BY_PEOPLE[said], ""
    if status == TxStatus.UNKNOWN:
        return None, "too old: its outcome is no longer kept. Only people can resolve it"
    return status == TxStatus.COMMITTED, ""


def _may_yet_be_decided_gen(gtid: bytes, deadline_ms: int | None, recovery: Recovery) -> OpGen[bool]:
    # By the time that would be logged now: in a cluster in which nothing else is written, that of the last entry stands.
    deadline = recovery.clock() + recovery.request_timeout_ms
    reply = yield Step(RequestKind.QUERY, commands.query_tx_clock(), deadline)
    log_now_ms, lifetime_ms, _ = commands.decode_reply(reply)
    last_ms = mint_ms_of(gtid) + lifetime_ms
    return bool(log_now_ms <= (last_ms if deadline_ms is None else min(deadline_ms, last_ms)))


def _ask_last_resource_gen(gtid: bytes, tag: bytes, recovery: Recovery) -> OpGen[tuple[bool | None, str]]:
    decider = recovery.decider(tag)
    if decider is None:
        answer = yield from recovery.ask_decider_gen(tag, gtid)
        return answer, "" if answer is not None else "the process that has its last resource gives no answer"
    try:
        is_committed: bool = yield Do(lambda: decider.outcome(gtid))
    except Exception as error:
        return None, f"its last resource {decider.name!r} cannot be asked: {error}"
    return is_committed, ""


def recover_gen(resource: Resource, recovery: Recovery) -> OpGen[Recovered]:
    """
    Finish what is prepared in one resource, of transactions whose outcome is known or nobody alive will decide.

    A branch that cannot be finished now is in doubt like one whose outcome is not known: the others are finished.

    Raises:
        CoordError: The cluster cannot be asked now. What was finished is finished.
        Exception: The resource cannot be reached now.
    """
    found: list[PreparedBranch] = yield Do(resource.prepared)
    done = {True: 0, False: 0}
    in_doubt: list[InDoubt] = []
    heuristics = 0
    for branch in sorted(found):
        if recovery.is_live(branch.gtid):
            continue
        deadline_ms = None
        if isinstance(resource, JournalResource):
            deadline_ms = yield Do(_deadline_in(resource, branch))
        is_committed, why = yield from outcome_gen(
            branch.gtid, branch.bqual, recovery, deadline_ms=deadline_ms
        )
        if is_committed is None:
            in_doubt.append(InDoubt(branch, why))
            continue
        if not is_committed and branch not in (yield Do(resource.prepared)):
            # Somebody has ended it since it was found. A last resource may have removed its marker after that, as
            # nobody was in doubt any more: what it says now is not the outcome.
            continue
        try:
            finish = yield Do(_finishing(resource, branch, is_committed))
        except Exception as error:
            # A connection that still holds it, a missing privilege: the branches behind it do not wait for that.
            in_doubt.append(InDoubt(branch, f"cannot be finished now: {error}"))
            continue
        if finish in (Finish.DONE, Finish.ALREADY):
            done[is_committed] += 1
            recovery.count("recovered")
            _obeyed(branch.gtid, branch.bqual, is_committed, recovery)
        else:
            heuristics += 1
            yield from heuristic_gen(branch.gtid, branch.bqual, finish, recovery)
    return Recovered(done[True], done[False], tuple(in_doubt), heuristics)


def sweep_gen(
    resources: Mapping[str, Resource], node: str, seen: Collection[tuple[bytes, bytes]], recovery: Recovery
) -> OpGen[frozenset[tuple[bytes, bytes]]]:
    """
    Have those branches forgotten that have obeyed, but whoever was to say so ended before it could.

    Returns what is still pending in these resources: to be handed in as `seen` the next time. Only what was pending
    the last time, too, is looked at; the rest is most likely about to be forgotten anyway.

    Args:
        resources: By name; those of this process.
        node: This process's name in lists of participants. What is in a journal is looked at only where it is: in the
            process that wrote it, and in those that open it later.

    Raises:
        CoordError: The cluster cannot be asked now.
    """
    pending: list[tuple[bytes, bytes, Resource]] = []
    after: bytes | None = None
    is_more = True
    while is_more:
        deadline = recovery.clock() + recovery.request_timeout_ms
        reply = yield Step(RequestKind.QUERY, commands.query_tx_list(after, only_pending=True), deadline)
        rows, is_more = commands.decode_reply(reply)
        for gtid, _, _, _, branches in rows:
            after = gtid
            for name, where, bqual in branches:
                resource = resources.get(name)
                if resource is None:
                    continue
                if isinstance(resource, JournalResource) and where != node and not resource.holds(bqual):
                    continue  # another replica's journal: that nothing is prepared in this one says nothing
                pending.append((gtid, bqual, resource))
    for gtid, bqual, resource in pending:
        if (gtid, bqual) not in seen or recovery.is_live(gtid):
            continue
        # It is committed, whatever has become of the branch: told again, it says so.
        branch = PreparedBranch(gtid, bqual, "pending")
        try:
            finish = yield Do(_finishing(resource, branch, True))
        except Exception:
            recovery.count("retries")  # as in `recover_gen`: it is still pending, and looked at again
            continue
        if finish in (Finish.DONE, Finish.ALREADY):
            recovery.count("swept")
            recovery.forget([(gtid, bqual)])
        else:
            yield from heuristic_gen(gtid, bqual, finish, recovery)
    return frozenset((gtid, bqual) for gtid, bqual, _ in pending)


def _deadline_in(resource: JournalResource, branch: PreparedBranch) -> Callable[[], int | None]:
    return lambda: resource.deadline_ms(branch.gtid, branch.bqual)


def _finishing(resource: Resource, branch: PreparedBranch, commit: bool) -> Callable[[], Finish]:
    return lambda: resource.finish(branch, commit)


def _obeyed(gtid: bytes, bqual: bytes, commit: bool, recovery: Recovery) -> None:
    name = BranchName.unpack(bqual)
    if commit and name is not None and not name.decider_tag:
        recovery.forget([(gtid, bqual)])


def heuristic_gen(gtid: bytes, bqual: bytes, finish: Finish, recovery: Recovery) -> OpGen[None]:
    """Record that a branch was ended otherwise than decided; it is no longer pending."""
    recovery.count("heuristics")
    body = commands.tx_heuristic(gtid, bqual, finish.value, recovery.who)
    yield Step(RequestKind.COMMAND, body, recovery.clock() + recovery.request_timeout_ms)


def complete_gen(unfinished: Unfinished, recovery: Recovery) -> OpGen[bool]:
    """
    Do for a transaction what its initiator had no time for. Whether all of it is done; if not, the rest is found by
    those who have it.

    Raises:
        UsageError, FatalError: The node has stopped.
    """
    gtid, is_committed, waiting, decider, is_one_phase = unfinished
    members: list[Member] = list(waiting)
    pause = PAUSE_SECONDS
    is_resolved = is_committed is True or is_one_phase or not members
    for attempt in range(ATTEMPTS_MAX):
        if attempt:
            yield Step.pause(pause)
            pause = min(2 * pause, PAUSE_SECONDS_MAX)
        try:
            if not is_resolved:
                # Of an aborted one, too: whoever was not told asks, and is not to wait until its time is over.
                is_committed = yield from _resolve_gen(gtid, decider, recovery)
                if is_committed is None:
                    recovery.count("unresolved")
                    return False
                is_resolved = True
                if is_committed:
                    # Whoever has promised nothing has read only, and ended.
                    members = [member for member in members if member.participants]
            if members:
                members = yield from _tell_gen(gtid, members, bool(is_committed), decider, recovery)
            if not members:
                if decider is not None and is_committed:
                    yield Do(lambda: decider.forget(gtid))
                return True
        except (UsageError, FatalError):
            raise  # the node has stopped
        except Exception:
            recovery.count("retries")  # the cluster or the last resource cannot be asked now
    recovery.count("given_up")
    return False


def _resolve_gen(gtid: bytes, decider: DecidingResource | None, recovery: Recovery) -> OpGen[bool | None]:
    if decider is not None:
        return bool((yield Do(lambda: decider.outcome(gtid))))
    deadline = recovery.clock() + recovery.request_timeout_ms
    reply = yield Step(RequestKind.COMMAND, commands.tx_resolve(gtid), deadline)
    status, _, _ = commands.decode_reply(reply)
    return None if status == TxStatus.UNKNOWN else bool(status == TxStatus.COMMITTED)


def _tell_gen(
    gtid: bytes, members: Sequence[Member], commit: bool, decider: DecidingResource | None, recovery: Recovery
) -> OpGen[list[Member]]:
    by = recovery.clock() + TELL_MS
    outcomes: list[Outcome] = yield Together([member.finish(commit, by) for member in members])
    waiting: list[Member] = []
    for member, outcome in zip(members, outcomes, strict=True):
        ending = member.read_ending(commit, outcome)
        if not ending.is_done:
            waiting.append(member)
        if commit and decider is None:
            recovery.forget([(gtid, bqual) for bqual in obeyed(member, ending)])
        for bqual, finish in ending.heuristics:
            yield from heuristic_gen(gtid, bqual, finish, recovery)
    return waiting
