"""Quorum arithmetic against dumb models that enumerate."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordlib.raft.messages import Configuration
from coordlib.raft.quorum import VoteResult, is_voter, members, quorum_value, value_reached, vote_result

NAMES = tuple("abcdefg")
names = st.lists(st.sampled_from(NAMES), max_size=7, unique=True).map(lambda item: tuple(sorted(item)))
configurations = st.builds(Configuration, voters=names, learners=st.just(()), outgoing=names)
deterministic = settings(derandomize=True, deadline=None, max_examples=100)


def majorities(voters: tuple[str, ...]) -> list[set[str]]:
    """All smallest sets of voters with more than half of them; none when there are no voters."""
    if not voters:
        return []
    return [set(chosen) for chosen in combinations(voters, len(voters) // 2 + 1)]


def quorums(configuration: Configuration) -> list[set[str]]:
    """All unions of a majority of the voters and, in joint consensus, one of the outgoing."""
    first = majorities(configuration.voters)
    if not configuration.outgoing:
        return first
    return [one | other for one in first for other in majorities(configuration.outgoing)]


@deterministic
@given(configurations, st.dictionaries(st.sampled_from(NAMES), st.integers(0, 9)))
def test_a_value_is_reached_when_some_quorum_has_it(
    configuration: Configuration, values: dict[str, int]
) -> None:
    """quorum_value is the best minimum over all quorums."""
    expected = max([min(values.get(n, 0) for n in quorum) for quorum in quorums(configuration)], default=0)
    assert expected == quorum_value(configuration, lambda name: values.get(name, 0))


@deterministic
@given(configurations, st.dictionaries(st.sampled_from(NAMES), st.booleans()))
def test_a_vote_is_won_or_lost_when_nothing_to_come_can_change_it(
    configuration: Configuration, votes: dict[str, bool]
) -> None:
    """WON: some quorum has granted. LOST: every quorum has somebody who refused."""
    expected = VoteResult.PENDING
    if any(all(votes.get(name) is True for name in quorum) for quorum in quorums(configuration)):
        expected = VoteResult.WON
    elif all(any(votes.get(name) is False for name in quorum) for quorum in quorums(configuration)):
        expected = VoteResult.LOST
    assert expected == vote_result(configuration, votes)


@deterministic
@given(configurations, names)
def test_two_quorums_of_neighbouring_configurations_meet(
    configuration: Configuration, new: tuple[str, ...]
) -> None:
    """Old, joint and new: any quorum of one shares a member with any quorum of the next (Thesis §4.3)."""
    old = Configuration(configuration.voters)
    joint = Configuration(new, (), configuration.voters)
    for one, other in ((old, joint), (joint, Configuration(new))):
        if one.voters and other.voters:
            assert all(a & b for a in quorums(one)[:200] for b in quorums(other)[:200])


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], 0), ([4], 4), ([4, 6], 4), ([2, 4, 6], 4), ([1, 2, 3, 4], 2), ([5, 0, 0, 7, 6], 5)],
)
def test_the_value_that_a_majority_has_reached(values: list[int], expected: int) -> None:
    """Half of an even number is no majority."""
    assert expected == value_reached(values)


def test_joint_votes_are_not_counted_over_the_union() -> None:
    """Three of five names are a majority of the union, and of neither half (CCF, NSDI'25)."""
    joint = Configuration(("a", "b", "c"), (), ("c", "d", "e"))
    assert vote_result(joint, {"a": True, "b": True, "d": True}) == VoteResult.PENDING
    assert vote_result(joint, {"a": True, "b": True, "d": True, "c": True}) == VoteResult.WON
    assert vote_result(joint, {"d": False, "e": False}) == VoteResult.LOST


def test_learners_are_members_without_a_vote() -> None:
    """They receive the log and count for nothing."""
    configuration = Configuration(("a", "b"), ("d",), ("c",))
    assert members(configuration) == ["a", "b", "c", "d"]
    assert [is_voter(configuration, name) for name in "acd"] == [True, True, False]
    assert vote_result(Configuration(("a", "b"), ("d",)), {"a": True, "d": True}) == VoteResult.PENDING
