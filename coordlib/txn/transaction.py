"""One transaction as its initiator knows it: what it will ask for, who takes part, and how far it has come.

::

    ACTIVE ──commit──▶ PREPARING ──all YES──▶ DECIDING ──COMMITTED──▶ COMMITTED ──all obeyed──▶ ENDED
      │                  │    │                 │  │
      │                  │    └─all READ_ONLY───┼──┼────────────────▶ COMMITTED
      │ rollback         │ a NO, a timeout      │  └─no answer──▶ UNKNOWN ──asked again──▶ COMMITTED or ABORTED
      ▼                  ▼                      ▼ ABORTED
    ABORTED ◀────────────┴──────────────────────┘
      │
      └──all rolled back──▶ ENDED
    ACTIVE ──commit, one branch and nothing else──▶ ONE_PHASE ──▶ COMMITTED, ABORTED or UNKNOWN

Invariants, by the numbers that docs/transactions.md gives them:

T1. A gtid has one outcome for ever: that of the first DECIDE or RESOLVE that is applied.
T2. A participant that voted YES neither commits nor aborts by itself.
T3. A vote of YES leaves only after everything that commit needs is durable.
T4. No participant hears "commit" before the decision is made: applied in the log, or in the last resource's own commit.
T5. Nothing is decided later than its deadline, nor than the longest life of a transaction after it was minted.
T6. No record means "never committed", for what was minted at the horizon or after it; before it nobody presumes.
T7. Participants remember what has ended until no message of it can count.
T8. None of these rests on any machine's clock.

What must not live here: how any of it is done (`commit`, `participant`, `recovery`).
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final, NamedTuple

from coordlib.errors import TooManyLastResources, UsageError, invariant
from coordlib.txn.branches import Branch
from coordlib.txn.gtid import BranchName, text_of
from coordlib.txn.members import LocalMember, Member

__all__ = ["BRANCHES_MAX", "Decided", "State", "StateChange", "Transaction"]

BRANCHES_MAX: Final = 64
"""Below the replicated limit of participants, and what the one byte of a branch's number has room for."""


class State(Enum):
    """What a transaction can be, as its initiator may know it."""

    ACTIVE = "active"
    PREPARING = "preparing"
    ONE_PHASE = "one-phase"
    DECIDING = "deciding"
    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"
    ENDED = "ended"


_NEXT: Final[dict[State, frozenset[State]]] = {
    State.ACTIVE: frozenset(
        (State.PREPARING, State.ONE_PHASE, State.DECIDING, State.COMMITTED, State.ABORTED)
    ),
    State.PREPARING: frozenset((State.ONE_PHASE, State.DECIDING, State.COMMITTED, State.ABORTED)),
    State.ONE_PHASE: frozenset((State.DECIDING, State.COMMITTED, State.ABORTED, State.UNKNOWN)),
    State.DECIDING: frozenset((State.COMMITTED, State.ABORTED, State.UNKNOWN)),
    State.UNKNOWN: frozenset((State.COMMITTED, State.ABORTED)),
    State.COMMITTED: frozenset((State.ENDED,)),
    State.ABORTED: frozenset((State.ENDED,)),
    State.ENDED: frozenset(),
}


class Decided(NamedTuple):
    """That, and how, a transaction was committed."""

    revision: int = 0  # of the replicated changes; 0: there were none
    branch: int = 0  # 0: the writes; 1: those for when a condition fails
    failed: int = -1  # number of that condition


class StateChange(NamedTuple):
    """What the decision carries besides the outcome. Arguments of `commands.tx_decide`."""

    guards: tuple[tuple[bytes, int], ...] = ()
    conditions: tuple[Any, ...] = ()
    writes: tuple[Any, ...] = ()
    releases: tuple[tuple[bytes, int], ...] = ()
    otherwise: tuple[Any, ...] | None = None

    @property
    def is_needed(self) -> bool:
        """Whether any of it changes or asks something: then the log has to decide, if anybody else takes part."""
        return bool(
            self.guards or self.conditions or self.writes or self.releases or self.otherwise is not None
        )

    @property
    def has_effect(self) -> bool:
        """Whether it is more than what was read: with nobody who wrote, that was true at one moment, and is enough."""
        return bool(self.guards or self.writes or self.releases or self.otherwise is not None)


class Transaction:
    """
    A transaction that was begun in this process. Not thread-safe.

    Attributes:
        gtid: Its name.
        deadline_ms: In log time: after it nothing is decided. An estimate was added to it when it was minted.
        expires_ms: The same moment by this process's clock: nobody waits longer for a vote.
        session: Of this process; the decision is asked for in it.
        change: What the decision carries; set before commit.
        outcome: COMMITTED or ABORTED, once it is one of them for certain.
    """

    __slots__ = (
        "_numbers",
        "change",
        "deadline_ms",
        "decider_tag",
        "doomed",
        "expires_ms",
        "gtid",
        "members",
        "node",
        "node_tag",
        "outcome",
        "state",
    )

    def __init__(self, gtid: bytes, node: str, node_tag: bytes, deadline_ms: int, expires_ms: int) -> None:
        self.gtid = gtid
        self.node = node
        self.node_tag = node_tag
        self.deadline_ms = deadline_ms
        self.expires_ms = expires_ms
        self.members: list[Member] = []
        self.change = StateChange()
        self.state = State.ACTIVE
        self.outcome: State | None = None
        self.doomed = ""  # why it must not commit
        self.decider_tag = b""  # of the last resource, where there is one
        self._numbers = 0

    def __repr__(self) -> str:
        return f"<transaction {text_of(self.gtid)}, {self.state.value}, {len(self.members)} branches>"

    def become(self, state: State) -> None:
        invariant(state in _NEXT[self.state], "a transaction that is %s became %s", self.state, state)
        self.state = state
        if state in (State.COMMITTED, State.ABORTED):
            self.outcome = state

    def name_branch(self, resource_tag: bytes) -> bytes:
        """
        The bqual for one branch more.

        Raises:
            UsageError: There are too many.
        """
        if self._numbers >= BRANCHES_MAX:
            raise UsageError(f"a transaction has at most {BRANCHES_MAX} branches")
        self._numbers += 1
        return BranchName(resource_tag, self.node_tag, self._numbers, self.decider_tag).pack()

    def set_decider(self, resource_tag: bytes) -> None:
        """
        A last resource takes part: branches are named by it from now on, so that nobody asks the log for its decision.

        Raises:
            UsageError: Others have been named before.
            TooManyLastResources: One of them decides already.
        """
        if self.decider_tag:
            raise TooManyLastResources(
                "two resources of this transaction cannot prepare (SQLite cannot), and only one can decide: give one of "
                "them a transaction of its own"
            )
        if self._numbers:
            raise UsageError(
                "a last resource decides for all branches, and must be the first to be enlisted: enlist it "
                "before the other resources, and before services are called"
            )
        self.decider_tag = resource_tag

    def enlist(self, branch: Branch, *, expects_read_only: bool = False) -> LocalMember:
        """
        Have a branch of this process take part.

        Raises:
            UsageError: There are too many.
        """
        invariant(self.state is State.ACTIVE, "a branch joined a transaction that is %s", self.state)
        if len(self.members) >= BRANCHES_MAX:
            raise UsageError(f"a transaction has at most {BRANCHES_MAX} branches")
        member = LocalMember(branch, self.node, expects_read_only=expects_read_only)
        self.members.append(member)
        return member
