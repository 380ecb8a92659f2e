"""Who takes part in a transaction, as commit sees them: one request or one piece of I/O for each phase, and what its
outcome means. Branches of this process here; services elsewhere in `coordlib.txn.service`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

from coordlib.node.operations import Do, Failure, Outcome, Step
from coordlib.txn.branches import (
    Branch,
    BranchFailed,
    BranchHeuristic,
    DecidingBranch,
    Finish,
    Vote,
)

__all__ = ["Ballot", "Ending", "LocalMember", "Member", "Participant", "obeyed"]

Participant = tuple[str, str, bytes]
"""(resource, node, bqual), as in the decision."""


class Ballot(NamedTuple):
    """
    What a member answered when it was asked to prepare, or to commit in one phase.

    `error` is None if it promised (`promised` then says with what), or has ended well.
    """

    promised: tuple[Participant, ...] = ()
    error: Exception | None = None
    is_lost: bool = (
        False  # with an error: it may be prepared, or committed in one phase; else it has rolled back
    )


class Ending(NamedTuple):
    """
    What a member answered when it was told the outcome.
    """

    is_done: bool  # nothing more is to be done for it
    error: Exception | None = None
    heuristics: tuple[tuple[bytes, Finish], ...] = ()  # its branches that had ended otherwise
    ended: tuple[bytes, ...] = ()  # its branches that have obeyed: nobody need remember them


class Member(Protocol):
    """
    One who takes part. Each phase is one thing to be done and a reading of how it ended.

    Attributes:
        is_last_resource: It cannot prepare and would have to decide.
        expects_read_only: It is thought to have written nothing: it is asked before those that have.
        participants: What it has promised; empty before.
    """

    @property
    def is_last_resource(self) -> bool: ...

    @property
    def expects_read_only(self) -> bool: ...

    @property
    def is_remote(self) -> bool: ...

    @property
    def participants(self) -> tuple[Participant, ...]: ...

    def prepare(self, deadline_ms: int) -> Step | Do: ...

    def read_vote(self, outcome: Outcome) -> Ballot: ...

    def commit_one_phase(self, deadline_ms: int) -> Step | Do: ...

    def read_one_phase(self, outcome: Outcome) -> Ballot: ...

    def finish(self, commit: bool, deadline_ms: int) -> Step | Do: ...

    def read_ending(self, commit: bool, outcome: Outcome) -> Ending: ...


def obeyed(member: Member, ending: Ending) -> tuple[bytes, ...]:
    """
    Its branches that need not be remembered any more, after it was told to commit.

    One that had obeyed before (the answer to that was lost) no longer knows which they were.
    """
    if not ending.is_done:
        return ending.ended
    otherwise = {bqual for bqual, _ in ending.heuristics}
    return tuple(bqual for _, _, bqual in member.participants if bqual not in otherwise)


class LocalMember:
    """A branch in this process."""

    __slots__ = ("_is_asked", "_is_declared_reader", "branch", "node", "participants")

    is_remote = False

    def __init__(self, branch: Branch, node: str, *, expects_read_only: bool = False) -> None:
        self.branch = branch
        self.node = node
        self._is_declared_reader = expects_read_only  # by the application
        self.participants: tuple[Participant, ...] = ()
        self._is_asked = False  # for a promise, whatever came of it

    @property
    def is_last_resource(self) -> bool:
        return self.branch.is_last_resource

    @property
    def expects_read_only(self) -> bool:
        return self._is_declared_reader or bool(getattr(self.branch, "seems_read_only", False))

    @expects_read_only.setter
    def expects_read_only(self, is_declared: bool) -> None:
        self._is_declared_reader = is_declared

    def prepare(self, deadline_ms: int) -> Do:
        self._is_asked = True
        return self._do("prepare")

    def read_vote(self, outcome: Outcome) -> Ballot:
        if isinstance(outcome, Failure):
            return Ballot(error=outcome.error, is_lost=not isinstance(outcome.error, BranchFailed))
        if outcome.value is Vote.READ_ONLY:
            return Ballot()
        self.participants = ((self.branch.resource.name, self.node, self.branch.bqual),)
        return Ballot(self.participants)

    def commit_one_phase(self, deadline_ms: int) -> Do:
        return self._do("commit_one_phase")

    def decide(self, gtid: bytes) -> Do:
        """Of a last resource: commit with the marker."""
        branch = cast(DecidingBranch, self.branch)
        return Do(lambda: branch.decide(gtid))

    def read_one_phase(self, outcome: Outcome) -> Ballot:
        if isinstance(outcome, Failure):
            # What is neither of the two is a bug of an adapter or a lost connection: nothing may be concluded.
            return Ballot(error=outcome.error, is_lost=not isinstance(outcome.error, BranchFailed))
        return Ballot()

    def finish(self, commit: bool, deadline_ms: int) -> Do:
        return self._do("commit" if commit else "rollback")

    def _do(self, what: str) -> Do:
        # Not by `isinstance`: with protocols that takes as long as some databases do.
        branch = self.branch
        return Do(
            getattr(branch, what), getattr(branch, f"a{what}", None), getattr(branch, f"polled_{what}", None)
        )

    def read_ending(self, commit: bool, outcome: Outcome) -> Ending:
        bqual = self.branch.bqual
        if not isinstance(outcome, Failure):
            return Ending(True, ended=(bqual,))
        error = outcome.error
        if isinstance(error, BranchHeuristic):
            return Ending(True, error, ((bqual, error.finish),))
        # One that was never asked for a promise has made none: with its connection the branch is gone, too.
        return Ending(not commit and not self._is_asked, error)
