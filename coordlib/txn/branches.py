"""What takes part in a transaction: the contract between what decides and what stores.

A *resource* is a database (or anything else that stores) and outlives transactions; a *branch* is one
transaction's work in it. Adapters for databases are in `coordlib.txn.resources`; anybody may write another.

States of a branch; only what is drawn is ever asked of it::

    active ──prepare──▶ YES: prepared ──commit──▶ committed
       │        ├─────▶ READ_ONLY: ended           (idempotent)
       │        └─────▶ BranchFailed: rolled back
       │                     prepared ──rollback──▶ rolled back
       ├──commit_one_phase──▶ committed, or BranchFailed: rolled back, or BranchUnknown
       └──rollback──▶ rolled back                  (idempotent)
"""

from __future__ import annotations

from collections.abc import Awaitable
from enum import Enum
from typing import NamedTuple, Protocol, runtime_checkable

from coordlib.node.polling import Polled

__all__ = [
    "AsyncBranch",
    "Branch",
    "BranchFailed",
    "BranchHeuristic",
    "BranchUnknown",
    "DecidingBranch",
    "DecidingResource",
    "Finish",
    "PolledBranch",
    "PreparedBranch",
    "Resource",
    "Vote",
]


class Vote(Enum):
    """What a branch promises. A NO is an exception: `BranchFailed`."""

    YES = "yes"  # whatever happens, it can be committed and rolled back; durable
    READ_ONLY = "read-only"  # it wrote nothing, and has ended


class Finish(Enum):
    """What became of a prepared branch that recovery was to finish."""

    DONE = "done"
    ALREADY = "already"  # it had been finished before, the same way
    HEURISTIC_ROLLBACK = "heuristic-rollback"  # it was to be committed and somebody has rolled it back
    HEURISTIC_COMMIT = "heuristic-commit"  # it was to be rolled back and somebody has committed it
    HAZARD = "hazard"  # it is gone, and nobody can say how it ended


class BranchFailed(Exception):
    """The branch has rolled back, or will when its connection closes: certainly not committed. A vote of NO."""


class BranchUnknown(Exception):
    """One-phase commit was asked for, and whether it happened cannot be found out."""


class BranchHeuristic(Exception):
    """A prepared branch was ended by somebody else, otherwise than decided; `finish` says how."""

    def __init__(self, finish: Finish, message: str) -> None:
        super().__init__(message)
        self.finish = finish


class PreparedBranch(NamedTuple):
    """A branch that a resource holds prepared, as found in it."""

    gtid: bytes
    bqual: bytes  # as `BranchName.pack` made it
    detail: str  # for people: the database's own name for it


class Resource(Protocol):
    """
    Outlives transactions: what recovery needs. All methods block; they are called on any thread, one at a time.

    Attributes:
        name: As in the list of participants of the decision; the same on every node that reaches the same store.
        tag: `gtid.resource_tag(name)`.
    """

    @property
    def name(self) -> str: ...

    @property
    def tag(self) -> bytes: ...

    def prepared(self) -> list[PreparedBranch]:
        """
        Branches that are prepared there and ours: our format id, our cluster's tag, this very database.

        Raises:
            Exception: It cannot be reached now; recovery asks again later.
        """

    def finish(self, branch: PreparedBranch, commit: bool) -> Finish:
        """
        End a prepared branch as decided; idempotent.

        Raises:
            Exception: It cannot be reached now: the branch is as it was, or ended as asked.
        """


@runtime_checkable
class DecidingResource(Resource, Protocol):
    """
    One that cannot prepare (SQLite) and so decides itself, by a marker in the very transaction: the logging last
    resource. Its `prepared()` is empty.
    """

    def outcome(self, gtid: bytes) -> bool:
        """
        Whether this resource committed the transaction. If not, it leaves a mark (a fence) by which it never will.

        Raises:
            Exception: It cannot be reached now; nobody may conclude anything.
        """

    def forget(self, gtid: bytes) -> None:
        """Remove the marker: every other branch has ended, nobody will ask again."""


class Branch(Protocol):
    """
    One transaction's work in one resource, in this process. All methods block, within the remaining budget.

    They are called one at a time, not always on the same thread. `commit` is called after a vote of YES only.

    Attributes:
        bqual: `BranchName.pack` of this branch; distinct among the transaction's branches. `prepare` may append
            evidence to it: what the decision's list of participants holds is read after the vote.
        is_last_resource: It cannot prepare: at most one of a transaction. `prepare` is never called.

    One that can guess at no cost has `seems_read_only: bool`, too, read before the vote. Where only one branch of a
    transaction does not seem so, the others vote first; a wrong guess costs one round more and nothing else.
    """

    @property
    def resource(self) -> Resource: ...

    @property
    def bqual(self) -> bytes: ...

    @property
    def is_last_resource(self) -> bool: ...

    def prepare(self) -> Vote:
        """
        Promise to obey. YES leaves only after everything that commit needs is durable.

        Raises:
            BranchFailed: It has rolled back.
            Exception: As BranchFailed, but whether it is prepared is not known: it is rolled back next.
        """

    def commit_one_phase(self) -> None:
        """
        Commit without having prepared.

        Raises:
            BranchFailed: It has rolled back.
            BranchUnknown: The connection was lost and the resource could not tell.
        """

    def commit(self) -> None:
        """
        Commit what is prepared; idempotent.

        Raises:
            BranchHeuristic: Somebody else ended it otherwise.
            Exception: It could not be reached: recovery goes on with it.
        """

    def rollback(self) -> None:
        """Roll back, prepared or not; idempotent. Raises as `commit` does."""


@runtime_checkable
class DecidingBranch(Branch, Protocol):
    """A branch of a `DecidingResource`."""

    def decide(self, gtid: bytes) -> None:
        """
        Commit, and in the same local transaction leave the marker that says so: this is the decision.

        Raises:
            BranchFailed: It has rolled back, or found a fence.
            BranchUnknown: The resource must be asked (`DecidingResource.outcome`).
        """


@runtime_checkable
class AsyncBranch(Branch, Protocol):
    """A branch on an asynchronous connection: the same as coroutines, run in the task that owns the connection."""

    def aprepare(self) -> Awaitable[Vote]: ...

    def acommit_one_phase(self) -> Awaitable[None]: ...

    def acommit(self) -> Awaitable[None]: ...

    def arollback(self) -> Awaitable[None]: ...


@runtime_checkable
class PolledBranch(Branch, Protocol):
    """
    A branch whose I/O can be polled: the branches of a transaction share one thread then, and all databases are at work
    at once. The methods without the prefix do the same and block; None: only those can do it this time.
    """

    def polled_prepare(self) -> Polled[Vote] | None: ...

    def polled_commit(self) -> Polled[None] | None: ...

    def polled_rollback(self) -> Polled[None] | None: ...
