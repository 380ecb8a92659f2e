"""What Raft nodes say to each other, and what a log holds. Data only: no behaviour, no encoding.

NamedTuples, because they are immutable, cheap to make, compare by value, and turn into a CBOR array
as they are. The receiver learns who sent a message from the authenticated connection it came over,
so no message carries its sender.

Wire: the order and meaning of fields is part of the wire format; see docs/formats.md.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple, TypeAlias

__all__ = [
    "AppendEntries",
    "AppendReply",
    "Configuration",
    "Entry",
    "EntryKind",
    "HardState",
    "Heartbeat",
    "HeartbeatReply",
    "InstallSnapshot",
    "RaftMessage",
    "RequestVote",
    "SnapshotMeta",
    "SnapshotStatus",
    "TimeoutNow",
    "VoteReply",
]


class EntryKind(IntEnum):
    NOOP = 0  # opens a leader's term (Raft §8)
    COMMAND = 1
    CONFIGURATION = 2


class Entry(NamedTuple):
    """One slot of the replicated log."""

    term: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    kind: int
    data: bytes


class HardState(NamedTuple):
    """What must be durable before any message that depends on it leaves (Raft Fig. 2, persistent state)."""

    term: int
    vote: str  # "" = none


class Configuration(NamedTuple):
    """Who counts. `outgoing`: only in joint consensus (Thesis §4.3). Names sorted, no duplicates."""

    voters: tuple[str, ...]
    learners: tuple[str, ...] = ()
    outgoing: tuple[str, ...] = ()


class SnapshotMeta(NamedTuple):
    """The log position a snapshot stands for, and the configuration in force there."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    term: int
    configuration: Configuration


class RequestVote(NamedTuple):
    term: int  # for a pre-vote: the term it would campaign in
    last_index: int
    last_term: int
    is_pre_vote: bool
    is_transfer: (
        bool  # the leader asked for it: voters need not wait for the leader's silence (Thesis §4.2.3)
    )


class VoteReply(NamedTuple):
    term: int  # granted pre-vote: the requested term; otherwise the voter's term
    request_term: int  # the term of the request answered, so that late answers are told apart
    is_granted: bool
    is_pre_vote: bool


class AppendEntries(NamedTuple):
    term: int
    prev_index: int
    prev_term: int
    commit: int  # the leader's commit index
    round: int  # newest read-confirmation round at sending; echoed in the reply
    entries: tuple[Entry, ...]  # consecutive from prev_index + 1; may be empty (a probe)


class AppendReply(NamedTuple):
    term: int
    round: int
    is_success: bool
    prev_index: int  # of the request answered: tells a fresh rejection from a stale one
    match_index: int  # success: prev_index + len(entries), durable; rejection: hint, see core
    match_term: int  # success: term of match_index; rejection: the follower's term at the hint
    last_index: int  # the follower's last durable index


class Heartbeat(NamedTuple):
    term: int
    commit: int  # min(leader's commit, what the follower is known to match)
    round: int  # read-confirmation round


class HeartbeatReply(NamedTuple):
    term: int
    round: int


class InstallSnapshot(NamedTuple):
    """
    Given to the follower's core when all chunks of a snapshot have arrived and are durable.

    The chunks themselves travel outside of the core (bulk lane).
    """

    term: int
    meta: SnapshotMeta


class SnapshotStatus(NamedTuple):
    """Given to the leader's core by its own node: the transfer to `follower` ended."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    is_success: bool


class TimeoutNow(NamedTuple):
    """Leadership transfer (Thesis §3.10): campaign at once."""

    term: int


RaftMessage: TypeAlias = (
    RequestVote
    | VoteReply
    | AppendEntries
    | AppendReply
    | Heartbeat
    | HeartbeatReply
    | InstallSnapshot
    | TimeoutNow
)
