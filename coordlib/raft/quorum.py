"""Quorum arithmetic: pure functions over a Configuration. Knows no roles, no logs, no messages.

In joint consensus (Thesis §4.3) both `voters` and `outgoing` must agree, each counted by itself, never
over their union. A configuration without voters has no quorum: nothing commits, nobody wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum

from coordlib.raft.messages import Configuration

__all__ = ["VoteResult", "is_voter", "members", "quorum_value", "value_reached", "vote_result"]


class VoteResult(Enum):
    PENDING = "pending"
    WON = "won"
    LOST = "lost"  # no answer still to come can change it


def value_reached(values: Sequence[int]) -> int:
    """The highest value that a majority of `values` has reached; 0 for none at all."""
    count = len(values)
    if not count:
        return 0
    # Ascending, the last `count // 2 + 1` are a majority; their least is what they all have reached.
    return sorted(values)[(count - 1) >> 1]


def quorum_value(configuration: Configuration, value_of: Callable[[str], int]) -> int:
    """The highest value that a quorum of the configuration (of both, if joint) has reached."""
    value = value_reached([value_of(name) for name in configuration.voters])
    if configuration.outgoing:
        value = min(value, value_reached([value_of(name) for name in configuration.outgoing]))
    return value


def _majority_result(names: Sequence[str], votes: Mapping[str, bool]) -> VoteResult:
    granted = refused = 0
    for name in names:
        vote = votes.get(name)
        if vote is True:
            granted += 1
        elif vote is False:
            refused += 1
    quorum = len(names) // 2 + 1
    if granted >= quorum:
        return VoteResult.WON
    if len(names) - refused < quorum:
        return VoteResult.LOST
    return VoteResult.PENDING


def vote_result(configuration: Configuration, votes: Mapping[str, bool]) -> VoteResult:
    """Count `votes` (True: granted). Votes of others than voters count for nothing."""
    result = _majority_result(configuration.voters, votes)
    if not configuration.outgoing or result is VoteResult.LOST:
        return result
    outgoing = _majority_result(configuration.outgoing, votes)
    if outgoing is VoteResult.LOST:
        return outgoing
    if result is outgoing:
        return result
    return VoteResult.PENDING


def is_voter(configuration: Configuration, node_id: str) -> bool:
    return node_id in configuration.voters or node_id in configuration.outgoing


def members(configuration: Configuration) -> list[str]:
    """Everybody who receives the log, sorted, once each."""
    return sorted({*configuration.voters, *configuration.learners, *configuration.outgoing})
