"""The surface of the core: limits, refusals, windows, deadlines, and what peers get wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordlib.errors import ConfigError, InvariantViolation, NotLeader, Overloaded, UsageError
from coordlib.raft import ProgressState, RaftConfig, RawNode, Role
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
    SnapshotStatus,
    TimeoutNow,
    VoteReply,
)
from tests.raft.harness import Disk, drain, encode_configuration, log_of, make_node

ABC = ("a", "b", "c")


def lead(node: RawNode, *followers: str) -> RawNode:
    """Make `node` the leader of its next term, with its no-op committed by `followers`."""
    node.tick(node.deadline)
    drain(node)
    term = node.term + 1
    for name in followers:
        node.step(name, VoteReply(term, term, True, True))
    drain(node)
    for name in followers:
        node.step(name, VoteReply(term, term, True, False))
    drain(node)
    assert node.is_leader
    for name in followers:
        acknowledge(node, name, node.last_index)
    node.tick(node.now)
    drain(node)
    assert node.commit_index == node.last_index
    return node


def acknowledge(node: RawNode, follower: str, index: int, round_number: int = 0) -> None:
    node.step(
        follower, AppendReply(node.term, round_number, True, index, index, node.log.term_at(index), index)
    )


def appends(messages: list[tuple[str, RaftMessage]], receiver: str) -> list[AppendEntries]:
    return [m for to, m in messages if to == receiver and isinstance(m, AppendEntries)]


# -- settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("node_id", ""),
        ("heartbeat_ticks", 0),
        ("heartbeat_ticks", 101),
        ("election_ticks_max", 300),
        ("append_entries_max", 0),
        ("inflight_messages_max", 0),
        ("drift_percent", 51),
        ("commit_notice_ticks", -1),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: str, value: object) -> None:
    """Each is checked by itself and against the others, and the message names it."""
    values: dict[str, Any] = {"node_id": "a", setting: value}
    with pytest.raises(ConfigError, match=setting):
        RaftConfig(**values)


# -- proposals


def test_only_a_leader_takes_proposals_and_reads() -> None:
    """The refusal is definite, and names the leader if it is known."""
    node = make_node("a", ABC)
    node.step("b", Heartbeat(1, 0, 0))
    with pytest.raises(NotLeader) as refused:
        node.propose(b"x")
    assert refused.value.leader_hint == "b"
    with pytest.raises(NotLeader):
        node.request_read("r")


def test_uncommitted_bytes_are_bounded() -> None:
    """Beyond the limit nothing is appended; commits make room; one entry is always taken."""
    node = lead(make_node("a", ABC, uncommitted_size_bytes_max=300), "b")
    node.propose(b"x" * 1000)
    with pytest.raises(Overloaded):
        node.propose(b"")
    last = node.last_index
    drain(node)
    acknowledge(node, "b", last)
    assert node.propose(b"y").index == last + 1


def test_a_new_leader_counts_what_its_predecessors_left_uncommitted() -> None:
    """Or a change of leaders would lift the limit."""
    entries = [Entry(1, 1, 1, b"x" * 400)]
    node = make_node("a", ABC, term=1, entries=entries, uncommitted_size_bytes_max=300)
    node.tick(300)
    drain(node)
    node.step("b", VoteReply(2, 2, True, True))
    drain(node)
    node.step("b", VoteReply(2, 2, True, False))
    with pytest.raises(Overloaded):
        node.propose(b"")


def test_reads_are_bounded() -> None:
    """Beyond the limit a read is refused, not queued."""
    node = lead(make_node("a", ABC, reads_pending_max=2), "b")
    node.request_read(1)
    node.request_read(2)
    with pytest.raises(Overloaded):
        node.request_read(3)


def test_one_change_of_configuration_at_a_time() -> None:
    """Two in flight may have quorums that do not meet; a change needs a committed entry of the term first."""
    node = lead(make_node("a", ABC), "b")
    data = encode_configuration(Configuration(("a", "b")))
    node.propose(data, EntryKind.CONFIGURATION)
    assert node.configuration == Configuration(("a", "b"))
    assert set(node.progress) == {"a", "b"}
    with pytest.raises(Overloaded):
        node.propose(data, EntryKind.CONFIGURATION)


def test_without_a_decoder_configurations_are_refused() -> None:
    """A node must not take what it cannot read, from its user or from a peer."""
    configuration = Configuration(("a",))
    node = RawNode(
        RaftConfig(node_id="a"),
        hard_state=HardState(0, ""),
        snapshot=SnapshotMeta(0, 0, configuration),
        random_ticks=lambda low, high: low,
        now=0,
    )
    node.step("b", AppendEntries(1, 0, 0, 0, 0, (Entry(1, 1, EntryKind.CONFIGURATION, b""),)))
    assert (node.last_index, node.counters) == (0, {"malformed": 1})
    node.tick(0)
    drain(node)
    with pytest.raises(UsageError):
        node.propose(b"", EntryKind.CONFIGURATION)


# -- windows and sizes


def test_messages_are_bounded_in_entries_and_bytes() -> None:
    """A backlog leaves in several messages; an entry above the limit travels alone."""
    node = lead(make_node("a", ABC, append_size_bytes_max=200, append_entries_max=3), "b")
    for size in (10, 10, 10, 10, 500, 150, 150):
        node.propose(b"x" * size)
    sent = appends(drain(node), "b")
    assert [[len(entry.data) for entry in m.entries] for m in sent] == [
        [10, 10, 10],
        [10],
        [500],
        [150],
        [150],
    ]


def test_the_window_is_bounded_in_messages_and_bytes() -> None:
    """When it is full nothing is sent; an answer opens it."""
    node = lead(make_node("a", ABC, inflight_messages_max=3, append_entries_max=1), "b")
    first = node.last_index
    for _ in range(5):
        node.propose(b"x")
    assert len(appends(drain(node), "b")) == 3
    acknowledge(node, "b", first + 2)
    assert len(appends(drain(node), "b")) == 2

    node = lead(make_node("a", ABC, inflight_size_bytes_max=100, append_entries_max=1), "b")
    for _ in range(5):
        node.propose(b"x" * 40)
    assert len(appends(drain(node), "b")) == 2


def test_a_probe_is_small_and_alone() -> None:
    """A follower whose log is unknown gets one small message, not a megabyte that it may refuse."""
    entries = [Entry(1, index, 1, b"x" * 100) for index in range(1, 11)]
    node = make_node("a", ABC, term=1, entries=entries, probe_size_bytes_max=300)
    lead(node, "b")
    node.step("c", AppendReply(2, 0, False, 10, 0, 0, 0))
    (probe,) = appends(drain(node), "c")
    assert [entry.index for entry in probe.entries] == [1, 2]
    assert appends(drain(node), "c") == []
    acknowledge(node, "c", 2)
    (rest,) = appends(drain(node), "c")
    assert [entry.index for entry in rest.entries] == list(range(3, 12))


def test_a_follower_that_lost_what_it_acknowledged_is_found_again() -> None:
    """Its disk came back with less; believing less of it is safe, and it gets what it lost."""
    node = lead(make_node("a", ABC), "b")
    for _ in range(4):
        node.propose(b"x")
    drain(node)
    acknowledge(node, "b", 5)
    drain(node)
    node.report_reachable("b")
    (probe,) = appends(drain(node), "b")
    assert (probe.prev_index, probe.entries) == (5, ())
    node.step("b", AppendReply(1, 0, False, 5, 2, 1, 2))
    assert node.progress["b"].match == 0
    (resent,) = appends(drain(node), "b")
    assert [entry.index for entry in resent.entries] == [3, 4, 5]
    assert node.commit_index == 5


def test_a_search_for_agreement_ends_at_the_first_entry() -> None:
    """A follower that refuses everything costs a bounded number of messages, and never an index below 1."""
    node = lead(make_node("a", ABC, term=3, entries=log_of(1, 1, 2, 3)), "b")
    for _ in range(20):
        view = node.progress["c"]
        node.step("c", AppendReply(4, 0, False, view.next - 1, view.next + 5, 9, 0))
        drain(node)
    assert node.progress["c"].next == 1


# -- snapshots and compaction


def test_the_log_keeps_some_entries_behind_the_snapshot() -> None:
    """`retain` entries stay for followers that are a little behind; an older snapshot changes nothing."""
    node = lead(make_node("a", ("a",)))
    for _ in range(9):
        node.propose(b"x")
    drain(node)
    node.compact(8, 3)
    assert (node.log.start_index, node.log.snapshot.index) == (5, 8)
    node.compact(7, 0)
    assert (node.log.start_index, node.log.snapshot.index) == (5, 8)
    with pytest.raises(InvariantViolation):
        node.compact(11, 0)


def test_a_receiver_of_a_snapshot_finds_the_log_to_go_on_with() -> None:
    """While it is being sent, what comes after it is kept, within bounds (openraft #1706)."""
    node = lead(make_node("a", ABC), "b")
    for _ in range(40):
        node.propose(b"x")
    drain(node)
    acknowledge(node, "b", 41)
    node.compact(10, 0)
    node.step("c", HeartbeatReply(1, 0))
    node.step("c", AppendReply(1, 0, False, 0, 0, 0, 0))
    assert node.ready().snapshots_wanted == ["c"]
    node.compact(20, 2)
    assert node.log.start_index == 10
    node.compact(40, 2)
    assert node.log.start_index == 24
    node.report_snapshot("c", SnapshotStatus(10, True))
    assert node.ready().snapshots_wanted == ["c"], "too slow: the log has moved on, so there is another one"


def test_an_acknowledgement_ends_the_wait_for_a_snapshot() -> None:
    """The answer of the follower itself counts, whatever became of the report (etcd #10308)."""
    node = lead(make_node("a", ABC), "b")
    for _ in range(3):
        node.propose(b"x")
    drain(node)
    acknowledge(node, "b", 4)
    node.compact(3, 0)
    node.step("c", HeartbeatReply(1, 0))
    drain(node)
    states = [node.progress["c"].state]
    acknowledge(node, "c", 3)
    states.append(node.progress["c"].state)
    assert states == [ProgressState.SNAPSHOT, ProgressState.REPLICATE]
    (rest,) = appends(drain(node), "c")
    assert [entry.index for entry in rest.entries] == [4]


def test_no_snapshot_is_sent_to_a_follower_that_is_silent() -> None:
    """It waits for the answer to a heartbeat."""
    node = lead(make_node("a", ABC), "b")
    for _ in range(3):
        node.propose(b"x")
    drain(node)
    acknowledge(node, "b", 4)
    for _ in range(20):
        node.tick(node.now + 50)
        node.step("b", HeartbeatReply(1, 0))
        drain(node)
    node.compact(4, 0)
    node.report_reachable("c")
    assert node.ready().snapshots_wanted == ()
    node.step("c", HeartbeatReply(1, 0))
    assert node.ready().snapshots_wanted == ["c"]


def test_a_log_with_a_gap_is_refused_at_start() -> None:
    """The node must not run: something durable is missing."""
    with pytest.raises(InvariantViolation):
        make_node("a", ABC, term=1, entries=log_of(1, start=3))
    with pytest.raises(InvariantViolation):
        make_node("a", ABC, term=1, entries=[Entry(1, 1, 1, b""), Entry(1, 3, 1, b"")])
    with pytest.raises(InvariantViolation):
        make_node("a", ABC, term=1, entries=log_of(2))


# -- Readies


def test_readies_become_durable_in_order() -> None:
    """Several may be outstanding; the second's entries are not durable before the first's."""
    node = lead(make_node("a", ("a",)))
    node.propose(b"x")
    first = node.ready()
    node.propose(b"y")
    second = node.ready()
    with pytest.raises(InvariantViolation):
        node.persisted(second)
    node.persisted(first)
    assert node.commit_index == 2
    node.persisted(second)
    assert node.commit_index == 3


def test_an_entry_that_comes_again_is_durable_when_its_own_write_is() -> None:
    """
    The disk still has the first write of entry (1, term 1), then its replacement, then the second before it.

    Were the first to count for the second, a crash after the replacement would lose what was acknowledged.
    """
    node = make_node("b", ABC)
    outstanding = []
    for leader, term, entry_term in (("a", 1, 1), ("c", 2, 2), ("a", 3, 1)):
        node.step(leader, AppendEntries(term, 0, 0, 0, 0, tuple(log_of(entry_term))))
        outstanding.append(node.ready())
    stable = []
    for ready in outstanding:
        answers = node.persisted(ready)
        stable.append((node.log.stable_index, len(answers)))
    assert stable == [(0, 0), (0, 0), (1, 1)]


def test_promises_of_a_term_that_is_over_are_dropped() -> None:
    """An acknowledgement that waited for the disk while the term changed is of no use to anybody."""
    node = make_node("b", ABC, term=1)
    node.step("a", AppendEntries(1, 0, 0, 0, 0, tuple(log_of(1))))
    ready = node.ready()
    node.step("c", Heartbeat(2, 0, 0))
    assert node.persisted(ready) == []
    assert [type(message) for _, message in drain(node)] == [HeartbeatReply]


def test_what_was_replaced_in_the_same_round_is_not_acknowledged() -> None:
    """After a long sleep a follower hears two leaders at once: the disk never held what the first one sent."""
    node = make_node("b", ABC, term=1)
    node.step("a", AppendEntries(1, 0, 0, 0, 0, tuple(log_of(1, 1))))
    node.step("c", AppendEntries(3, 0, 0, 0, 0, tuple(log_of(3))))
    (answer,) = [(name, message) for name, message in drain(node) if isinstance(message, AppendReply)]
    assert answer == ("c", AppendReply(3, 0, True, 0, 1, 3, 1))


def test_several_messages_of_a_round_get_one_answer() -> None:
    """The last acknowledgement says what the earlier ones said."""
    node = make_node("b", ABC, term=1)
    node.step("a", AppendEntries(1, 0, 0, 0, 3, tuple(log_of(1))))
    node.step("a", AppendEntries(1, 1, 1, 0, 4, tuple(log_of(1, start=1))))
    (answer,) = [message for _, message in drain(node)]
    assert answer == AppendReply(1, 4, True, 1, 2, 1, 2)


def test_committed_entries_come_in_bounded_portions() -> None:
    """A long log does not stall the caller; has_ready says that there is more."""
    node = make_node("a", ("a",), term=1, entries=log_of(*[1] * 10), committed_entries_max=4)
    lead(node)
    assert node.commit_index == 11
    node = make_node("b", ABC, term=1, committed_entries_max=4)
    node.step("a", AppendEntries(1, 0, 0, 10, 0, tuple(log_of(*[1] * 10))))
    portions = []
    while node.has_ready():
        ready = node.ready()
        portions.append([entry.index for entry in ready.committed])
        node.persisted(ready)
    assert portions == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]


def test_nothing_is_ready_after_all_was_taken() -> None:
    """An idle node does not make its driver spin."""
    node = lead(make_node("a", ABC), "b", "c")
    node.tick(node.now + 5)
    drain(node)
    assert not node.has_ready()
    assert node.deadline > node.now


def test_the_disk_of_the_tests_keeps_what_a_ready_says() -> None:
    """Later entries supersede earlier ones from their first index on."""
    disk = Disk(SnapshotMeta(0, 0, Configuration(ABC)))
    node = make_node("b", ABC, term=3)
    for message in (
        AppendEntries(3, 0, 0, 0, 0, tuple(log_of(1, 1, 1))),
        AppendEntries(3, 1, 1, 0, 0, tuple(log_of(2, start=1))),
    ):
        node.step("a", message)
        ready = node.ready()
        disk.write(ready)
        node.persisted(ready)
    assert [(entry.index, entry.term) for entry in disk.entries] == [(1, 1), (2, 2)]


# -- commit notices, heartbeats, deadlines


def test_a_commit_waits_a_little_for_an_entry_to_ride_on() -> None:
    """Under load no message is spent on commit news; when it is quiet, followers learn of it soon."""
    node = lead(make_node("a", ABC), "b", "c")
    for _ in range(3):
        node.propose(b"x")
        drain(node)
        for name in "bc":
            acknowledge(node, name, node.last_index)
        assert [m for _, m in drain(node) if isinstance(m, Heartbeat)] == []
    assert node.deadline == node.now + 5
    node.tick(node.now + 5)
    told = [(to, m.commit) for to, m in drain(node) if isinstance(m, Heartbeat)]
    node.tick(node.now + 5)
    told += [(to, m.commit) for to, m in drain(node) if isinstance(m, Heartbeat)]
    assert sorted(told) == [("b", 4), ("c", 4)]


def test_an_entry_that_was_answered_stands_for_a_heartbeat() -> None:
    """Idle traffic is one heartbeat and one answer for each follower and interval, at most."""
    node = lead(make_node("a", ABC, commit_notice_ticks=0), "b", "c")
    start = node.now
    node.tick(start + 30)
    node.propose(b"x")
    drain(node)
    for name in "bc":
        acknowledge(node, name, 2)
    drain(node)
    node.tick(start + 50)
    assert drain(node) == []
    node.tick(start + 100)
    assert [type(message) for _, message in drain(node)] == [Heartbeat, Heartbeat]


def test_one_voter_leads_at_once() -> None:
    """There is nobody to wait for, and nobody to whom silence was promised."""
    node = make_node("a", ("a",), term=4, now=1000)
    assert node.deadline == 1000
    node.tick(1000)
    drain(node)
    assert (node.role, node.commit_index) == (Role.LEADER, 1)
    node.request_read("r")
    ready = node.ready()
    assert ready.reads == [("r", 1)]
    node.persisted(ready)
    assert not node.has_ready()


def test_time_does_not_go_back() -> None:
    """An earlier tick counts as the last one again."""
    node = make_node("a", ABC)
    node.tick(100)
    node.tick(50)
    assert node.now == 100


# -- transfer, campaign, bar


def test_a_transfer_ends_with_leadership() -> None:
    """Re-elected, the node serves again (hashicorp #696)."""
    node = lead(make_node("a", ABC), "b")
    assert node.transfer_leadership("c")
    assert node.is_transferring
    node.step("c", Heartbeat(2, 0, 0))
    assert not node.is_transferring
    node.tick(node.now + 1000)
    node.tick(node.deadline)
    lead(node, "b")
    node.propose(b"x")


def test_no_lease_in_a_term_in_which_another_was_told_to_campaign() -> None:
    """TimeoutNow may arrive long after the transfer was given up, and skips the silence that leases need."""
    node = lead(make_node("a", ABC, reads_by_lease=True), "b")

    def read_by_lease() -> bool:
        node.tick(node.now + 50)
        beats = [m.round for to, m in drain(node) if to == "b" and isinstance(m, Heartbeat)]
        node.step("b", HeartbeatReply(node.term, beats[-1]))
        drain(node)
        node.request_read("r")
        node.tick(node.now)
        ready = node.ready()
        node.persisted(ready)
        return bool(ready.reads)

    assert read_by_lease()
    assert node.transfer_leadership("b")
    for _ in range(10):
        assert not read_by_lease()
    assert not node.is_transferring
    assert not read_by_lease()


def test_a_learner_is_no_target_of_a_transfer() -> None:
    """It could not win (tikv #4045)."""
    node = lead(make_node("a", ("a", "b"), learners=("d",)), "b")
    assert not node.transfer_leadership("d")


def test_a_learner_votes_and_does_not_campaign() -> None:
    """Its configuration may be old: the candidate may know it as a voter (etcd #10998)."""
    node = make_node("d", ABC, learners=("d",))
    node.tick(5000)
    assert node.role is Role.FOLLOWER
    node.step("a", RequestVote(1, 0, 0, False, False))
    (answer,) = [message for _, message in drain(node)]
    assert answer == VoteReply(1, 1, True, False)


def test_campaigning_breaks_no_promise() -> None:
    """`campaign` does nothing while a leader was heard, nor right after a start that may hide a promise."""
    node = make_node("a", ABC, term=1)
    node.campaign()
    assert node.role is Role.FOLLOWER
    node.tick(299)
    node.step("b", Heartbeat(1, 0, 0))
    node.tick(500)
    node.campaign()
    assert node.role is Role.FOLLOWER
    fresh = make_node("a", ABC)
    fresh.campaign()
    assert fresh.role is Role.PRE_CANDIDATE


def test_a_leader_that_turns_out_to_have_lost_entries_steps_down() -> None:
    """It may lack what is committed: peers remember more of its disk than it has."""
    node = lead(make_node("a", ABC), "b")
    node.bar_until(1, 1)
    assert (node.is_leader, node.is_barred) == (True, False)
    node.bar_until(1, 7)
    assert (node.is_leader, node.is_barred) == (False, True)


def test_refused_answers_of_strangers_do_not_depose_a_leader() -> None:
    """A removed node may be in a high term; who is not a member says nothing by answering."""
    node = lead(make_node("a", ABC), "b")
    node.step("z", AppendReply(9, 0, False, 0, 0, 0, 0))
    node.step("z", HeartbeatReply(9, 0))
    node.step("z", VoteReply(9, 9, False, False))
    assert (node.is_leader, node.term) == (True, 1)
    assert node.counters["not_a_member"] == 3


# -- what peers get wrong

numbers = st.integers(-2, 6)
booleans = st.booleans()
entries = st.lists(
    st.builds(Entry, numbers, numbers, st.integers(0, 4), st.sampled_from([b"", b"x"])), max_size=3
)
metas = st.builds(SnapshotMeta, numbers, numbers, st.just(Configuration(ABC)))
any_message = st.one_of(
    st.builds(RequestVote, numbers, numbers, numbers, booleans, booleans),
    st.builds(VoteReply, numbers, numbers, booleans, booleans),
    st.builds(AppendEntries, numbers, numbers, numbers, numbers, numbers, entries.map(tuple)),
    st.builds(AppendReply, numbers, numbers, booleans, numbers, numbers, numbers, numbers),
    st.builds(Heartbeat, numbers, numbers, numbers),
    st.builds(HeartbeatReply, numbers, numbers),
    st.builds(InstallSnapshot, numbers, metas),
    st.builds(TimeoutNow, numbers),
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(booleans, st.lists(st.tuples(st.sampled_from(["a", "b", "c", "z", ""]), any_message), max_size=12))
def test_no_message_makes_a_node_raise(is_leading: bool, messages: list[tuple[str, RaftMessage]]) -> None:
    """Whatever arrives, invariants hold and the node goes on."""
    node = make_node("a", ABC, term=2, entries=log_of(1, 2))
    if is_leading:
        lead(node, "b")
    for sender, message in messages:
        node.step(sender, message)
        node.check_invariants()
        node.tick(node.now + 40)
        drain(node)


def test_what_is_no_message_is_counted() -> None:
    """The core does not know it, and nothing happens."""
    node = make_node("a", ABC)
    node.step("b", SnapshotStatus(1, True))  # type: ignore[arg-type]
    node.step("a", Heartbeat(1, 0, 0))
    assert node.counters == {"malformed": 2}


def test_what_a_follower_has_lost_is_not_counted_and_is_sent_again() -> None:
    """It came back with one entry of the two that it had acknowledged: another's word for the second is no quorum."""
    node = make_node("a", ("a", "b", "c", "d", "e"), term=1)
    lead(node, "b", "c")
    first = node.log.last_index
    node.propose(b"second")
    drain(node)
    acknowledged = AppendReply(node.term, 0, True, first, first + 1, node.term, first + 1)
    node.step("b", acknowledged)
    drain(node)
    assert node.progress["b"].match == first + 1
    node.report_reachable("b")
    node.report_lost("b", first)
    assert node.progress["b"].match == 0
    assert node.progress["b"].next == first + 1
    assert node.counters["matches_taken_back"] == 1
    node.step("c", acknowledged)
    sent = drain(node)
    assert node.commit_index < first + 1
    assert [
        message.prev_index for to, message in sent if to == "b" and isinstance(message, AppendEntries)
    ] == [first]
    node.step("b", acknowledged)
    drain(node)
    assert node.commit_index == first + 1


def test_a_loss_that_nobody_can_have_told_of_changes_nothing() -> None:
    """Of a stranger, and of the leader itself, whose disk it knows."""
    node = make_node("a", ABC, term=1)
    lead(node, "b")
    before = node.progress
    node.report_lost("z", 0)
    node.report_lost("a", 0)
    assert node.progress == before
