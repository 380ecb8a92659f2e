"""One test for each rule of the paper and the thesis that the core must keep; each quotes its rule."""

from __future__ import annotations

import pytest

from coordlib.errors import NotLeader
from coordlib.raft import RawNode, Role
from coordlib.raft.messages import (
    AppendEntries,
    AppendReply,
    Configuration,
    Entry,
    EntryKind,
    HardState,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    RaftMessage,
    RequestVote,
    SnapshotMeta,
    TimeoutNow,
    VoteReply,
)
from tests.raft.harness import drain, log_of, make_node

ABC = ("a", "b", "c")
VOTERS = Configuration(ABC)


def candidate(node_id: str = "a", *, term: int = 1, entries: list[Entry] | None = None) -> RawNode:
    """A node of three that asks for votes in `term`."""
    node = make_node(node_id, ABC, term=term - 1, entries=entries or [])
    node.tick(300)
    drain(node)
    other = "b" if node_id != "b" else "c"
    node.step(other, VoteReply(term, term, True, True))
    drain(node)
    assert node.role is Role.CANDIDATE
    assert node.term == term
    return node


def leader(*, term: int = 1, entries: list[Entry] | None = None) -> RawNode:
    """Node a, elected in `term` with b's vote; its no-op is appended and on its own disk only."""
    node = make_node("a", ABC, term=term - 1, entries=entries or [])
    node.tick(300)
    drain(node)
    node.step("b", VoteReply(term, term, True, True))
    drain(node)
    node.step("b", VoteReply(term, term, True, False))
    assert node.role is Role.LEADER
    return node


def acknowledge(node: RawNode, follower: str, index: int) -> None:
    """`follower` has everything up to `index` on its disk."""
    term = node.log.term_at(index)
    node.step(follower, AppendReply(node.term, 0, True, index, index, term, index))


def only(messages: list[tuple[str, RaftMessage]], kind: type) -> list[tuple[str, RaftMessage]]:
    return [item for item in messages if isinstance(item[1], kind)]


# -- §5.1: terms


@pytest.mark.parametrize(
    "message",
    [
        AppendEntries(5, 0, 0, 0, 0, ()),
        Heartbeat(5, 0, 0),
        RequestVote(5, 9, 4, False, True),
        AppendReply(5, 0, False, 0, 0, 0, 0),
        HeartbeatReply(5, 0),
        VoteReply(5, 3, False, False),
    ],
)
@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.CANDIDATE, Role.LEADER])
def test_any_role_follows_a_higher_term(role: Role, message: RaftMessage) -> None:
    """§5.1: "if one server's current term is smaller than the other's, then it updates its current term"."""
    if role is Role.LEADER:
        node = leader(term=2)
    elif role is Role.CANDIDATE:
        node = candidate(term=2)
    else:
        node = make_node("a", ABC, term=2)
    node.step("b", message)
    assert node.term == 5
    assert Role.FOLLOWER is node.role
    drain(node)


def test_a_leader_of_an_old_term_is_refused_and_told_the_new_one() -> None:
    """§5.1: "If a server receives a request with a stale term number, it rejects the request"."""
    node = make_node("a", ABC, term=3)
    node.step("b", AppendEntries(2, 0, 0, 0, 0, (Entry(2, 1, 1, b""),)))
    node.step("b", Heartbeat(2, 0, 0))
    replies = [message for _, message in drain(node)]
    assert [(m.term, m.is_success) for m in replies if isinstance(m, AppendReply)] == [(3, False), (3, False)]
    assert node.last_index == 0
    assert node.leader == ""


# -- §5.2: elections


def test_a_node_starts_as_follower() -> None:
    """§5.2: "When servers start up, they begin as followers"."""
    assert Role.FOLLOWER is make_node("a", ABC).role


def test_a_leader_sends_heartbeats_to_all_followers() -> None:
    """§5.2: "Leaders send periodic heartbeats to all followers in order to maintain their authority"."""
    node = leader()
    drain(node)
    node.tick(350)
    heartbeats = only(drain(node), Heartbeat)
    assert [receiver for receiver, _ in heartbeats] == ["b", "c"]
    node.tick(399)
    assert only(drain(node), Heartbeat) == []


def test_a_candidate_votes_for_itself_and_asks_all_others() -> None:
    """§5.2: "To begin an election, a follower increments its current term ... votes for itself"."""
    node = make_node("a", ABC, term=1)
    node.tick(300)
    requests = drain(node)
    assert [(to, m.is_pre_vote) for to, m in requests if isinstance(m, RequestVote)] == [
        ("b", True),
        ("c", True),
    ]
    assert node.term == 1
    node.step("c", VoteReply(2, 2, True, True))
    requests = drain(node)
    assert [(to, m.is_pre_vote) for to, m in requests if isinstance(m, RequestVote)] == [
        ("b", False),
        ("c", False),
    ]
    assert (node.term, node.vote) == (2, "a")


def test_a_request_for_votes_leaves_after_the_own_vote_is_durable() -> None:
    """Fig. 2: term and vote are "updated on stable storage before responding to RPCs"."""
    node = make_node("a", ABC)
    node.tick(300)
    drain(node)
    node.step("b", VoteReply(1, 1, True, True))
    ready = node.ready()
    assert HardState(1, "a") == ready.hard_state
    assert ready.messages == []
    node.step("b", VoteReply(1, 1, True, False))
    assert not node.is_leader, "the own vote is not durable, and one other is no quorum"
    assert {"b", "c"} == {receiver for receiver, _ in node.persisted(ready)}
    assert node.is_leader


@pytest.mark.parametrize(
    ("size", "votes", "expected"),
    [
        (1, {}, Role.LEADER),
        (3, {"b": True}, Role.LEADER),
        (3, {"b": False}, Role.CANDIDATE),
        (3, {"b": False, "c": False}, Role.FOLLOWER),
        (5, {"b": True}, Role.CANDIDATE),
        (5, {"b": True, "c": True}, Role.LEADER),
        (5, {"b": True, "c": False, "d": False, "e": False}, Role.FOLLOWER),
        (4, {"b": True}, Role.CANDIDATE),
    ],
)
def test_a_candidate_needs_a_majority_of_all_voters(
    size: int, votes: dict[str, bool], expected: Role
) -> None:
    """§5.2: "A candidate wins an election if it receives votes from a majority of the servers"."""
    names = "abcde"[:size]
    node = make_node("a", names)
    node.tick(300)
    drain(node)
    for name in names[1:]:
        node.step(name, VoteReply(1, 1, True, True))
    drain(node)
    for name, is_granted in votes.items():
        node.step(name, VoteReply(1, 1, is_granted, False))
        node.step(name, VoteReply(1, 1, True, False))  # the second answer of a voter changes nothing
    assert expected is node.role


@pytest.mark.parametrize(
    ("vote", "asking", "is_granted"), [("", "b", True), ("b", "b", True), ("c", "b", False), ("c", "c", True)]
)
def test_a_voter_votes_once_in_a_term(vote: str, asking: str, is_granted: bool) -> None:
    """§5.2: "Each server will vote for at most one candidate in a given term, first-come-first-served"."""
    node = make_node("a", ABC, term=1, vote=vote)
    node.tick(299)
    node.step(asking, RequestVote(1, 0, 0, False, True))
    replies = [message for _, message in drain(node) if isinstance(message, VoteReply)]
    assert [is_granted] == [reply.is_granted for reply in replies]


def test_stepping_down_within_a_term_keeps_the_vote() -> None:
    """§5.2, one vote in a term: a former candidate must not vote again (CCF #5891)."""
    node = candidate(term=2)
    node.step("b", AppendEntries(2, 7, 1, 0, 0, ()))
    assert (node.role, node.vote) == (Role.FOLLOWER, "a")
    node.step("c", RequestVote(2, 9, 1, False, True))
    refused = [m for _, m in drain(node) if isinstance(m, VoteReply)]
    assert [reply.is_granted for reply in refused] == [False]


def test_a_candidate_returns_to_follower_when_it_hears_a_leader_of_its_term() -> None:
    """§5.2: "If the leader's term ... is at least as large as the candidate's current term"."""
    node = candidate(term=2)
    node.step("c", AppendEntries(2, 0, 0, 0, 0, (Entry(2, 1, 0, b""),)))
    assert (node.role, node.leader, node.last_index) == (Role.FOLLOWER, "c", 1)


def test_election_timeouts_are_drawn_from_the_whole_interval_each_time() -> None:
    """§5.2: "election timeouts are chosen randomly from a fixed interval"."""
    drawn: list[tuple[int, int]] = []
    values = iter([310, 450, 600, 333, 350])

    def random_ticks(low: int, high: int) -> int:
        drawn.append((low, high))
        return next(values)

    node = make_node("a", ABC, random_ticks=random_ticks)
    assert node.deadline == 310
    node.tick(310)
    assert node.deadline == 310 + 450
    node.tick(760)
    assert node.deadline == 760 + 600
    assert {(300, 600)} == set(drawn)


def test_a_node_that_hears_its_leader_stays_a_follower() -> None:
    """§5.2: "A server remains in follower state as long as it receives valid RPCs from a leader"."""
    node = make_node("a", ABC, term=1)
    for now in range(100, 3000, 100):
        node.step("b", Heartbeat(1, 0, 0))
        node.tick(now)
        drain(node)
    assert (node.role, node.term) == (Role.FOLLOWER, 1)


def test_after_a_stall_input_is_heard_before_patience_ends() -> None:
    """A host that slept must not depose a leader whose messages are already there."""
    node = make_node("a", ABC, term=1)
    node.step("b", Heartbeat(1, 0, 0))
    node.tick(10_000)
    assert Role.FOLLOWER is node.role
    assert node.deadline == 10_300


# -- §5.3: replication


def test_a_proposal_is_appended_and_sent_before_the_own_disk_has_it() -> None:
    """§5.3: "The leader appends the command to its log as a new entry"; Thesis §10.2.1: in parallel."""
    node = leader()
    drain(node)
    acknowledge(node, "b", 1)
    acknowledge(node, "c", 1)
    drain(node)
    entries = [node.propose(b"x%d" % i) for i in range(64)]
    ready = node.ready()
    appends = [(to, m) for to, m in ready.messages if isinstance(m, AppendEntries)]
    assert [receiver for receiver, _ in appends] == ["b", "c"]
    assert [tuple(entries)] * 2 == [message.entries for _, message in appends]
    assert appends[0][1] is appends[1][1], "equal messages are one object: the caller encodes it once"
    assert entries == list(ready.entries)
    node.persisted(ready)


def test_an_entry_is_committed_when_a_majority_has_it_durably() -> None:
    """§5.3: "A log entry is committed once the leader ... has replicated it on a majority of the servers"."""
    node = leader()
    ready = node.ready()
    acknowledge(node, "b", 1)
    assert node.commit_index == 0, "the own disk does not have it, and b alone is no majority"
    node.persisted(ready)
    assert node.commit_index == 1


def test_two_followers_commit_without_the_leaders_disk() -> None:
    """Thesis §10.2.1: "the leader may even commit an entry before it has been written to its own disk"."""
    node = leader()
    ready = node.ready()
    acknowledge(node, "b", 1)
    acknowledge(node, "c", 1)
    assert node.commit_index == 1
    node.persisted(ready)


def test_earlier_entries_are_committed_with_the_first_of_the_own_term() -> None:
    """§5.3: "This also commits all preceding entries in the leader's log"."""
    node = leader(term=3, entries=log_of(1, 2))
    drain(node)
    acknowledge(node, "b", 3)
    ready = node.ready()
    assert [entry.index for entry in ready.committed] == [1, 2, 3]
    node.persisted(ready)


def test_a_follower_applies_what_the_leader_has_committed() -> None:
    """§5.3: "Once a follower learns that a log entry is committed, it applies the entry"."""
    node = make_node("b", ABC, term=1)
    entries = tuple(log_of(1, 1, 1))
    node.step("a", AppendEntries(1, 0, 0, 2, 0, entries))
    assert [entry.index for entry in node.ready().committed] == [1, 2]


@pytest.mark.parametrize(
    ("terms", "prev", "is_success", "hint"),
    [
        ((1, 2), (2, 2), True, None),
        ((1, 2), (0, 0), True, None),
        ((1, 2), (3, 3), False, (2, 2)),
        ((1, 2), (2, 1), False, (1, 1)),
        ((1, 1, 2, 2, 2), (5, 1), False, (2, 1)),
    ],
)
def test_a_follower_checks_the_entry_before_the_new_ones(
    terms: tuple[int, ...], prev: tuple[int, int], is_success: bool, hint: tuple[int, int] | None
) -> None:
    """§5.3: "If the follower does not find an entry in its log with the same index and term"; it refuses."""
    node = make_node("b", ABC, term=3, entries=log_of(*terms))
    node.step("a", AppendEntries(3, *prev, 0, 0, ()))
    (reply,) = [message for _, message in drain(node) if isinstance(message, AppendReply)]
    assert is_success is reply.is_success
    if hint:
        assert hint == (reply.match_index, reply.match_term)


@pytest.mark.parametrize(
    ("prev", "terms", "expected"),
    [
        ((2, 2), (3,), (1, 2, 3)),
        ((1, 1), (3, 4), (1, 3, 4)),
        ((0, 0), (1,), (1, 2, 2)),
        ((0, 0), (1, 2), (1, 2, 2)),
        ((0, 0), (3,), (3,)),
        ((1, 1), (), (1, 2, 2)),
    ],
)
def test_a_follower_truncates_at_a_conflict_and_only_there(
    prev: tuple[int, int], terms: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Fig. 2: "If an existing entry conflicts with a new one ... delete it and all that follow it"."""
    node = make_node("b", ABC, term=4, entries=log_of(1, 2, 2))
    node.step("a", AppendEntries(4, *prev, 0, 0, tuple(log_of(*terms, start=prev[0]))))
    assert expected == tuple(entry.term for entry in node.log.slice(0, node.last_index))
    (reply,) = [message for _, message in drain(node) if isinstance(message, AppendReply)]
    assert prev[0] + len(terms) == reply.match_index, "acknowledged is what the message has shown to match"


def test_committed_entries_are_never_in_conflict() -> None:
    """§5.4: what is committed is in every later leader's log; a message that denies it is not believed."""
    node = make_node("b", ABC, term=1)
    node.step("a", AppendEntries(1, 0, 0, 2, 0, tuple(log_of(1, 1, 1))))
    drain(node)
    node.step("c", AppendEntries(3, 0, 0, 0, 0, tuple(log_of(2, 2))))
    assert only(drain(node), AppendReply) == []
    assert (node.last_index, node.log.term_at(2)) == (3, 1)
    assert node.counters["conflicts_with_committed"] == 1
    # A message from below the commit index is answered with it: the search goes no further down.
    node.step("c", AppendEntries(3, 1, 1, 0, 0, ()))
    (reply,) = [message for _, message in drain(node) if isinstance(message, AppendReply)]
    assert (reply.is_success, reply.match_index) == (True, 2)


def test_a_follower_commits_only_what_the_message_has_shown_to_match() -> None:
    """Fig. 2: "set commitIndex = min(leaderCommit, index of last new entry)", not of the last entry held."""
    node = make_node("b", ABC, term=3, entries=log_of(1, 2, 2))
    node.step("a", AppendEntries(3, 1, 1, 3, 0, ()))
    assert (node.commit_index, node.last_index) == (1, 3)


def test_an_answer_leaves_after_the_entries_are_durable() -> None:
    """Fig. 2: "log[]" is persistent state, "updated on stable storage before responding to RPCs"."""
    node = make_node("b", ABC, term=1)
    node.step("a", AppendEntries(1, 0, 0, 0, 0, tuple(log_of(1))))
    ready = node.ready()
    assert (ready.messages, len(ready.entries)) == ([], 1)
    assert [(to, m.match_index) for to, m in node.persisted(ready) if isinstance(m, AppendReply)] == [
        ("a", 1)
    ]


def test_a_heartbeat_commits_only_what_the_follower_is_known_to_match() -> None:
    """Fig. 2: min(leaderCommit, index of last new entry); etcd: min(committed, match)."""
    node = leader()
    drain(node)
    acknowledge(node, "b", 1)
    drain(node)
    node.tick(400)
    commits = {to: m.commit for to, m in drain(node) if isinstance(m, Heartbeat)}
    assert commits == {"b": 1, "c": 0}


def test_a_heartbeat_beyond_the_log_commits_nothing() -> None:
    """A follower that lost what it had acknowledged must not take its other entries for committed."""
    node = make_node("b", ABC, term=2, entries=log_of(1))
    node.step("a", Heartbeat(2, 5, 0))
    assert node.commit_index == 0
    assert node.counters["acknowledged_entries_lost"] == 1


def test_a_heartbeat_commits_nothing_that_was_not_shown_to_match_since_the_start() -> None:
    """What an earlier run acknowledged may be lost, and something else be there (Raft figure 7)."""
    node = make_node("b", ABC, term=2, entries=log_of(1, 1))
    node.step("a", Heartbeat(2, 2, 0))
    assert node.commit_index == 0
    node.step("a", AppendEntries(2, 1, 1, 0, 0, ()))
    node.step("a", Heartbeat(2, 2, 0))
    assert node.commit_index == 1
    node.step("c", AppendEntries(3, 2, 1, 0, 0, ()))
    node.step("c", Heartbeat(3, 2, 0))
    assert node.commit_index == 2


@pytest.mark.parametrize("cut", ["append", "snapshot"])
def test_what_a_leader_takes_back_is_not_shown_any_more(cut: str) -> None:
    """No leader contradicts itself; two of one term, as after a vote that was lost, may, and nothing must raise."""
    node = make_node("a", ABC, term=2)
    node.step("b", AppendEntries(2, 0, 0, 0, 0, tuple(log_of(1, 1, 1))))
    if cut == "append":
        node.step("b", AppendEntries(2, 1, 1, 0, 0, (Entry(2, 2, EntryKind.NOOP, b""),)))
    else:
        node.step("b", InstallSnapshot(2, SnapshotMeta(2, 2, Configuration(ABC))))
    node.check_invariants()
    node.step("b", Heartbeat(2, 3, 0))
    assert node.commit_index == 2
    assert node.counters["acknowledged_entries_lost"] == 1


def test_a_rejection_that_is_old_changes_nothing() -> None:
    """A late refusal must not move `next` back below what is known to match (CCF #5927)."""
    node = leader()
    drain(node)
    acknowledge(node, "b", 1)
    for _ in range(3):
        node.propose(b"x")
    drain(node)
    acknowledge(node, "b", 4)
    before = node.progress["b"]
    node.step("b", AppendReply(1, 0, False, 1, 0, 0, 0))
    node.step("b", AppendReply(1, 0, False, 9, 0, 0, 0))
    assert before == node.progress["b"]


def test_an_acknowledgement_of_another_history_is_not_counted() -> None:
    """Acknowledgements carry (index, term): the same index of another term is another entry."""
    node = leader()
    drain(node)
    node.step("b", AppendReply(1, 0, True, 1, 1, 7, 1))
    node.step("c", AppendReply(1, 0, True, 9, 9, 1, 9))
    assert node.commit_index == 0
    assert node.counters["malformed"] == 2


# -- §5.4: safety


@pytest.mark.parametrize(
    ("terms", "last", "is_granted"),
    [
        ((1,), (1, 1), True),
        ((1,), (2, 1), True),
        ((1, 1), (1, 1), False),
        ((1,), (1, 2), True),
        ((1, 1), (1, 2), True),
        ((2,), (9, 1), False),
    ],
)
@pytest.mark.parametrize("is_pre_vote", [False, True])
def test_a_voter_refuses_a_log_that_is_behind_its_own(
    terms: tuple[int, ...], last: tuple[int, int], is_granted: bool, is_pre_vote: bool
) -> None:
    """§5.4.1: "If the logs have last entries with different terms, then the log with the later term"."""
    node = make_node("a", ABC, term=2, entries=log_of(*terms))
    node.step("b", RequestVote(3, last[0], last[1], is_pre_vote, True))
    (reply,) = [message for _, message in drain(node) if isinstance(message, VoteReply)]
    assert is_granted is reply.is_granted


def test_only_entries_of_the_own_term_are_committed_by_counting() -> None:
    """§5.4.2: "Raft never commits log entries from previous terms by counting replicas"."""
    node = leader(term=3, entries=log_of(1, 2))
    drain(node)
    acknowledge(node, "b", 2)
    acknowledge(node, "c", 2)
    assert node.commit_index == 0
    acknowledge(node, "c", 3)
    assert node.commit_index == 3


def test_a_new_leader_opens_its_term_with_an_entry_that_does_nothing() -> None:
    """§8: "each leader commit a blank no-op entry into the log at the start of its term"."""
    node = leader(term=3, entries=log_of(1, 2))
    assert Entry(3, 3, EntryKind.NOOP, b"") == node.log.slice(2, 3)[0]


# -- §7: snapshots


def test_a_snapshot_replaces_a_log_that_does_not_reach_it() -> None:
    """§7: "the follower discards its entire log; it is all superseded by the snapshot"."""
    node = make_node("b", ABC, term=2, entries=log_of(1, 1))
    meta = SnapshotMeta(5, 2, VOTERS)
    node.step("a", InstallSnapshot(2, meta))
    ready = node.ready()
    assert (meta, 5, 5) == (ready.snapshot, node.last_index, node.commit_index)
    (message,) = node.persisted(ready)
    assert ("a", AppendReply(2, 0, True, 5, 5, 2, 5)) == message


def test_a_snapshot_of_a_prefix_keeps_the_suffix() -> None:
    """§7: "log entries covered by the snapshot are deleted but entries following ... are still valid"."""
    node = make_node("b", ABC, term=2, entries=log_of(1, 1, 2, 2))
    node.step("a", InstallSnapshot(2, SnapshotMeta(3, 2, VOTERS)))
    ready = node.ready()
    assert (ready.snapshot, node.last_index, node.commit_index) == (None, 4, 3)
    assert len(ready.committed) == 3


def test_a_snapshot_that_contradicts_the_log_replaces_it() -> None:
    """§7 and openraft #753: entries after a conflicting one are no valid suffix."""
    node = make_node("b", ABC, term=3, entries=log_of(1, 1, 1, 1))
    node.step("a", InstallSnapshot(3, SnapshotMeta(3, 2, VOTERS)))
    assert (node.last_index, node.log.last_term) == (3, 2)


def test_an_old_snapshot_is_ignored() -> None:
    """A snapshot at or below the commit index must not take anything back (etcd #18055)."""
    node = make_node("b", ABC, term=1, snapshot=SnapshotMeta(9, 1, VOTERS))
    node.step("a", InstallSnapshot(1, SnapshotMeta(4, 1, VOTERS)))
    ready = node.ready()
    assert (ready.snapshot, node.last_index) == (None, 9)
    assert next(m.match_index for _, m in node.persisted(ready) if isinstance(m, AppendReply)) == 9


def test_a_snapshot_brings_its_configuration() -> None:
    """§6, §7: "The snapshot also includes the latest configuration"; an older one must not remain in force."""
    node = make_node("b", ABC, term=2, entries=log_of(1))
    configuration = Configuration(("a", "b"), ("d",))
    node.step("a", InstallSnapshot(2, SnapshotMeta(5, 2, configuration)))
    assert configuration == node.configuration


@pytest.mark.parametrize(
    ("snapshot", "terms", "start", "expected"),
    [
        ((0, 0), (1, 1, 2), 0, (0, 3, 2)),
        ((2, 1), (2, 2), 2, (2, 4, 2)),
        ((3, 2), (1, 1, 2, 2), 0, (1, 4, 2)),
        ((3, 2), (1, 1), 0, (3, 3, 2)),
        ((3, 3), (1, 1, 2, 2), 0, (3, 3, 3)),
        ((3, 2), (), 0, (3, 3, 2)),
    ],
)
def test_a_node_starts_with_whatever_a_crash_has_left(
    snapshot: tuple[int, int], terms: tuple[int, ...], start: int, expected: tuple[int, int, int]
) -> None:
    """A crash may come between the snapshot and the log that restarts after it (RedisRaft #43)."""
    meta = SnapshotMeta(*snapshot, VOTERS)
    node = make_node("a", ABC, term=5, snapshot=meta, entries=log_of(*terms, start=start))
    assert expected == (node.log.start_index, node.last_index, node.log.last_term)
    node.check_invariants()


# -- Thesis §3.10, §4.2.3, §6.4, §9.6


def test_a_leader_without_a_quorum_steps_down() -> None:
    """Thesis §6.2: "a leader ... steps down if an election timeout elapses without a successful round"."""
    node = leader()
    node.tick(300)
    drain(node)
    for now in (500, 700, 880):
        node.tick(now)
        node.step("b", HeartbeatReply(1, 0))
    node.tick(899)
    node.tick(1498)
    assert Role.LEADER is node.role
    node.tick(1499)
    assert (node.role, node.term) == (Role.FOLLOWER, 1)


def test_a_leader_whose_disk_is_stuck_steps_down() -> None:
    """Its heartbeats would keep others from leading, while nothing can be committed by it."""
    node = leader()
    drain(node)
    acknowledge(node, "b", 1)
    node.tick(301)
    drain(node)
    node.propose(b"x")
    ready = node.ready()
    for now in range(350, 901, 50):
        node.step("b", HeartbeatReply(1, 0))
        node.step("c", HeartbeatReply(1, 0))
        node.tick(now)
        assert Role.LEADER is node.role
    assert node.deadline == 901
    node.tick(901)
    assert (node.role, node.counters["disk_stuck"]) == (Role.FOLLOWER, 1)
    node.persisted(ready)


def test_votes_are_refused_while_a_leader_is_heard() -> None:
    """Thesis §4.2.3: "if a server receives a RequestVote request within the minimum election timeout"."""
    node = make_node("b", ABC, term=1)
    node.tick(1000)
    node.step("a", Heartbeat(1, 0, 0))
    node.tick(1000)
    drain(node)
    for now, is_granted in ((1299, False), (1300, True)):
        node.step("c", RequestVote(2, 0, 0, False, False))
        assert drain(node) == [], "whether the silence is over, the next tick knows"
        node.tick(now)
        (reply,) = [message for _, message in drain(node) if isinstance(message, VoteReply)]
        assert (is_granted, 2 if is_granted else 1) == (reply.is_granted, node.term)


def test_a_node_that_starts_may_have_promised_silence() -> None:
    """Thesis §6.4.1: leases rest on promises, and those are not on the disk."""
    node = make_node("b", ABC, term=1, now=5000)
    node.step("c", RequestVote(2, 0, 0, True, False))
    node.tick(5299)
    node.step("a", RequestVote(2, 0, 0, True, False))
    node.tick(5300)
    granted = [(to, m.is_granted) for to, m in drain(node) if isinstance(m, VoteReply)]
    assert granted == [("c", False), ("a", True)]


def test_a_pre_vote_changes_no_term_and_no_vote() -> None:
    """Thesis §9.6: "a candidate would only increment its term if it first learned ... it could be elected"."""
    node = make_node("b", ABC, term=1)
    node.step("c", RequestVote(9, 0, 0, True, True))
    assert (node.term, node.vote, node.ready().hard_state) == (1, "", None)


def test_a_pre_vote_is_not_counted_as_a_vote() -> None:
    """A late answer to the pre-vote must not elect anybody."""
    node = candidate(term=2)
    node.step("c", VoteReply(2, 2, True, True))
    node.step("b", VoteReply(1, 1, True, False))
    assert Role.CANDIDATE is node.role


def test_the_target_of_a_transfer_campaigns_at_once() -> None:
    """Thesis §3.10: "the prior leader sends a TimeoutNow request to the target server"."""
    node = make_node("b", ABC, term=1)
    node.step("a", Heartbeat(1, 0, 0))
    node.step("c", TimeoutNow(1))
    assert Role.FOLLOWER is node.role, "only the leader may say so"
    node.step("a", TimeoutNow(1))
    requests = [message for _, message in drain(node) if isinstance(message, RequestVote)]
    assert [(m.term, m.is_pre_vote, m.is_transfer) for m in requests] == [(2, False, True)] * 2


def test_a_read_is_confirmed_by_a_round_that_began_after_it() -> None:
    """Thesis §6.4: "the leader issues a new round of heartbeats and waits for their acknowledgments"."""
    node = leader()
    drain(node)
    acknowledge(node, "b", 1)
    drain(node)
    node.tick(400)
    drain(node)
    node.request_read("r")
    ready = node.ready()
    (first, _) = [message for _, message in ready.messages if isinstance(message, Heartbeat)]
    node.persisted(ready)
    node.step("b", HeartbeatReply(1, first.round - 1))
    assert not node.has_ready()
    node.step("b", HeartbeatReply(1, first.round))
    ready = node.ready()
    assert ready.reads == [("r", 1)]
    node.persisted(ready)


def test_reads_fail_when_leadership_is_lost() -> None:
    """A read that was not confirmed must not be answered from the old leader's state."""
    node = leader()
    drain(node)
    node.request_read("r")
    node.step("b", HeartbeatReply(2, 0))
    assert node.ready().failed_reads == ["r"]
    with pytest.raises(NotLeader):
        node.request_read("s")
