"""The leader's side of requests: held, answered once, kept alive, expired."""

from __future__ import annotations

import pytest

from coordlib.api.locks import _LockBase
from coordlib.cbor import encode
from coordlib.config import Timing
from coordlib.errors import CoordError, LockTimeout, Overloaded, SessionExpired, UsageError
from coordlib.machine import Machine, commands
from coordlib.machine.limits import Limits
from coordlib.node import service as module
from coordlib.node.service import RequestService, Source
from coordlib.raft import RaftConfig, RawNode
from coordlib.raft.messages import AppendEntries, Configuration, Entry, EntryKind, HardState, SnapshotMeta
from coordlib.testing.simulation.processes import MemberProcess, Operation
from coordlib.testing.simulation.world import World
from coordlib.wire.messages import Reply, ReplyStatus, Request, RequestKind

TTL_MS = 4000
TIMING = Timing(session_ttl_ms=TTL_MS)


class Leader:
    """A cluster of one, whose log is applied when the test says so."""

    def __init__(self) -> None:
        self.now = 1000
        self.raft = RawNode(
            RaftConfig(node_id="n1", heartbeat_ticks=50, election_ticks_min=300, election_ticks_max=600),
            hard_state=HardState(0, ""),
            snapshot=SnapshotMeta(0, 0, Configuration(("n1",))),
            entries=(),
            random_ticks=lambda low, high: low,
            now=self.now,
        )
        self.machine = Machine(Limits())
        self.service = RequestService("n1", TIMING, self.raft, self.machine)
        self.committed: list[Entry] = []
        self.request_id = 0
        while not self.raft.is_leader:
            self.now += 700
            self.raft.tick(self.now)
            self.commit()
        self.become_leader()

    def become_leader(self, *, knows_time: bool = True) -> None:
        self.service.become_leader(self.now, self.raft.last_index, 1)
        if knows_time:
            self.service.observe_clock("n1", self.now, self.now)

    def commit(self) -> None:
        """What is in the log becomes durable and committed, but is not applied."""
        while self.raft.has_ready():
            ready = self.raft.ready()
            self.service_reads(ready)
            self.raft.persisted(ready)
            self.committed += ready.committed

    def service_reads(self, ready: object) -> None:
        if getattr(ready, "reads", None):
            self.service.reads_confirmed(ready.reads)  # type: ignore[attr-defined]  # just looked at

    def apply(self) -> None:
        """Everything: commit, apply, answer."""
        for _ in range(3):
            self.commit()
            for entry in self.committed:
                if entry.kind == EntryKind.COMMAND:
                    applied = self.machine.apply(entry.index, entry.term, entry.data)
                    self.service.applied(entry, applied, self.now)
                else:
                    self.machine.skip(entry.index)
                self.raft.applied_to(entry.index)
            self.committed.clear()
            self.service.settled(self.now)
            self.service.serve_reads(self.now)

    def ask(
        self,
        kind: int,
        body: bytes = b"",
        *,
        source: Source = "n2",
        session: int = 0,
        sequence: int = 0,
        acknowledged: int = 0,
    ) -> int:
        self.request_id += 1
        request = Request(self.request_id, kind, session, sequence, acknowledged, body)
        self.service.handle(source, [request], self.now)
        return self.request_id

    def replies(self) -> dict[int, Reply]:
        replies, self.service.replies = self.service.replies, []
        return {reply.request_id: reply for _, reply in replies}

    def open(self) -> int:
        """A session, opened by the cluster."""
        nonce = b"%016d" % self.request_id
        asked = self.ask(RequestKind.COMMAND, commands.open_session(nonce, TTL_MS, "worker"))
        self.apply()
        session = commands.decode_reply(self.replies()[asked].body)[0]
        assert isinstance(session, int)
        return session

    def keep_alive(self, session: int) -> int:
        return self.ask(RequestKind.KEEP_ALIVE, session=session)

    def pass_time(self, elapsed_ms: int) -> None:
        """In steps, as on a node that runs."""
        end = self.now + elapsed_ms
        while self.now < end:
            self.now = min(end, self.now + 100)
            self.raft.tick(self.now)
            self.service.tick(self.now)


def ready_leader() -> Leader:
    leader = Leader()
    leader.apply()
    assert leader.service.is_ready
    return leader


def error_of(reply: Reply) -> CoordError:
    assert reply.status == ReplyStatus.ERROR
    error = commands.error_reply(reply.body)
    assert error is not None
    return error


def put(value: bytes = b"v") -> bytes:
    return commands.map_put(b"m", b"k", value)


def test_requests_are_held_until_the_leader_is_ready() -> None:
    """Before its no-op is applied it does not know what its predecessors decided."""
    leader = Leader()
    asked = leader.ask(RequestKind.QUERY, commands.query_len(b"m"))
    assert leader.replies() == {}
    leader.apply()
    assert leader.replies()[asked].status == ReplyStatus.OK


def test_requests_are_held_until_the_time_is_known() -> None:
    """What the first leader of a cluster logs before it has heard a quorum's clocks would be dated to 1970, ids among it."""
    leader = Leader()
    leader.become_leader(knows_time=False)
    asked = leader.ask(RequestKind.QUERY, commands.query_len(b"m"))
    leader.apply()
    leader.service.settled(leader.now)
    assert not leader.service.is_ready
    assert leader.replies() == {}
    leader.service.observe_clock("n1", 1_700_000_000_000, leader.now)
    leader.commit()
    leader.apply()
    assert leader.replies()[asked].status == ReplyStatus.OK


def test_too_many_held_requests_are_refused(monkeypatch: object) -> None:
    """Nothing grows without a bound."""
    leader = Leader()
    room = module.HELD_MAX
    leader.service.handle("n2", [Request(i, RequestKind.COMMAND, 0, 0, 0, b"") for i in range(room)], 0)
    asked = leader.ask(RequestKind.QUERY, commands.query_len(b"m"))
    assert isinstance(error_of(leader.replies()[asked]), Overloaded)


def test_a_leader_tells_what_time_it_would_log_now() -> None:
    """However long ago the last entry was; whoever mints by it would be late by all of that."""
    leader = ready_leader()
    leader.open()
    logged = leader.machine.log_time_ms
    leader.pass_time(TTL_MS // 4)
    leader.apply()
    asked = leader.ask(RequestKind.QUERY, commands.query_time())
    leader.apply()
    assert commands.decode_reply(leader.replies()[asked].body) == [logged + TTL_MS // 4]
    assert leader.machine.log_time_ms == logged
    assert commands.decode_reply(leader.machine.query(commands.query_time())) == [logged]


def test_a_copy_of_a_request_is_attached_to_the_first() -> None:
    """One entry in the log, an answer to each asker."""
    leader = ready_leader()
    session = leader.open()
    before = leader.raft.last_index
    first = leader.ask(RequestKind.COMMAND, put(), session=session, sequence=1, source="n2")
    second = leader.ask(RequestKind.COMMAND, put(), session=session, sequence=1, source=b"route")
    assert leader.raft.last_index == before + 1
    leader.apply()
    replies = leader.replies()
    assert replies[first].body == replies[second].body
    third = leader.ask(RequestKind.COMMAND, put(), session=session, sequence=1)
    assert leader.raft.last_index == before + 1
    assert leader.replies()[third].body == replies[first].body


def test_an_unknown_session_is_refused_and_not_appended() -> None:
    """As is a command of the cluster's own, from whomever."""
    leader = ready_leader()
    before = leader.raft.last_index
    asked = leader.ask(RequestKind.COMMAND, put(), session=999, sequence=1)
    assert leader.replies() == {}  # not before it is sure to lead: see below
    leader.apply()
    assert isinstance(error_of(leader.replies()[asked]), SessionExpired)
    asked = leader.ask(RequestKind.COMMAND, commands.expire_sessions([1]))
    assert isinstance(error_of(leader.replies()[asked]), UsageError)
    asked = leader.ask(99)
    assert isinstance(error_of(leader.replies()[asked]), UsageError)
    assert leader.raft.last_index == before


@pytest.mark.parametrize("kind", [RequestKind.COMMAND, RequestKind.KEEP_ALIVE])
def test_a_leader_that_was_deposed_unawares_calls_no_session_ended(kind: int) -> None:
    """
    It does not know the sessions that were opened while it stood still, and must not speak about them.

    Found by seed 276: a member that woke from a suspension of ten seconds ended the session of whoever asked it first.
    """
    leader = ready_leader()
    before = leader.raft.last_index
    asked = leader.ask(kind, put() if kind == RequestKind.COMMAND else b"", session=999, sequence=1)
    assert leader.replies() == {}
    leader.raft.step("n2", AppendEntries(leader.raft.term + 1, before, leader.raft.term, before, 0, ()))
    ready = leader.raft.ready()
    assert len(ready.failed_reads) == 1
    leader.service.reads_failed(ready.failed_reads)
    assert leader.replies()[asked].status == ReplyStatus.NOT_LEADER
    assert leader.raft.last_index == before


def test_a_session_that_came_while_it_was_asked_for_is_served() -> None:
    """The command was only early."""
    leader = ready_leader()
    before = leader.raft.last_index
    leader.ask(RequestKind.COMMAND, commands.open_session(b"%016d" % 7, TTL_MS, "worker"))
    asked = leader.ask(RequestKind.COMMAND, put(), session=before + 1, sequence=1)
    leader.apply()
    assert commands.is_success(leader.replies()[asked].body)


def test_a_follower_points_to_the_leader() -> None:
    """And answers what may be stale from what it has applied."""
    leader = ready_leader()
    follower = RequestService("n9", TIMING, Leader().raft, Machine(Limits()))
    follower._raft.role = type(leader.raft.role)(0)
    follower.handle("", [Request(1, RequestKind.QUERY, 0, 0, 0, b"")], 0)
    ((_, reply),) = follower.replies
    assert reply.status == ReplyStatus.NOT_LEADER


def test_a_silent_session_expires_and_its_lock_passes_on() -> None:
    """Not before its TTL, and soon after."""
    leader = ready_leader()
    dead, waiting = leader.open(), leader.open()
    leader.ask(RequestKind.COMMAND, commands.acquire(b"a"), session=dead, sequence=1)
    leader.ask(RequestKind.COMMAND, commands.acquire(b"a"), session=waiting, sequence=1)
    leader.apply()
    wait = leader.ask(
        RequestKind.WAIT, commands.query_acquisition(b"a", waiting, 1), session=waiting, sequence=1
    )
    leader.apply()
    assert wait not in leader.replies()
    for _ in range(3):
        leader.pass_time(TTL_MS // 3 - 100)
        leader.keep_alive(waiting)
        leader.apply()
        assert leader.machine.sessions.is_alive(dead)
    leader.pass_time(400)
    leader.apply()
    assert not leader.machine.sessions.is_alive(dead)
    assert leader.machine.sessions.is_alive(waiting)
    assert commands.decode_reply(leader.replies()[wait].body)[0] == "held"


def test_a_keep_alive_behind_an_expire_waits_for_its_fate() -> None:
    """To acknowledge it would promise what the log has already taken back."""
    leader = ready_leader()
    session = leader.open()
    leader.pass_time(TTL_MS + 100)  # EXPIRE is in the log, and not applied
    leader.replies()
    asked = leader.keep_alive(session)
    leader.service.settled(leader.now)
    leader.service.serve_reads(leader.now)
    assert leader.replies() == {}
    leader.apply()
    assert isinstance(error_of(leader.replies()[asked]), SessionExpired)


def test_half_the_ttl_of_silence_is_logged_and_cleared_by_a_keep_alive() -> None:
    """So that many changes of leader do not keep the dead alive, nor shorten the life of the living."""
    leader = ready_leader()
    session = leader.open()
    leader.pass_time(TTL_MS // 2 + 100)
    leader.apply()
    remaining = leader.machine.sessions.remaining_ms(session)
    assert remaining is not None
    assert remaining <= TTL_MS // 2
    asked = leader.keep_alive(session)
    assert leader.replies() == {}
    leader.apply()
    assert leader.machine.sessions.remaining_ms(session) is None
    assert leader.replies()[asked].status == ReplyStatus.OK


def test_a_keep_alive_between_a_checkpoint_and_its_application_waits_for_the_clearing() -> None:
    """
    Else it is promised a whole TTL, while the log says half of it to the next leader.

    The checkpoint is committed and not yet applied when the keep-alive comes.
    """
    leader = ready_leader()
    session = leader.open()
    leader.pass_time(TTL_MS // 2 + 100)
    asked = leader.keep_alive(session)
    leader.service.settled(leader.now)
    leader.commit()
    leader.service.serve_reads(leader.now)
    assert leader.replies() == {}
    leader.apply()
    assert leader.machine.sessions.remaining_ms(session) is None
    assert leader.replies()[asked].status == ReplyStatus.OK


def test_a_new_leader_counts_the_whole_ttl_or_what_was_logged() -> None:
    """A session's life is a lower bound, counted anew by each leader."""
    leader = ready_leader()
    quiet, lively = leader.open(), leader.open()
    leader.pass_time(TTL_MS // 4)
    leader.keep_alive(lively)
    leader.pass_time(TTL_MS // 4 + 200)
    leader.apply()
    leader.service.lose_leadership("")
    leader.become_leader()
    leader.service.settled(leader.now)
    leader.pass_time(TTL_MS // 2 + 100)
    leader.apply()
    assert not leader.machine.sessions.is_alive(quiet)
    assert leader.machine.sessions.is_alive(lively)


def test_a_leader_that_was_stalled_expires_nobody_at_once() -> None:
    """Keep-alives may have waited in front of it meanwhile."""
    leader = ready_leader()
    session = leader.open()
    leader.now += 10 * TTL_MS
    leader.service.tick(leader.now)
    leader.apply()
    assert leader.machine.sessions.is_alive(session)
    leader.pass_time(TTL_MS + 200)
    leader.apply()
    assert not leader.machine.sessions.is_alive(session)


def test_losing_the_leadership_answers_everybody() -> None:
    """What was proposed may yet commit; whatever else was asked, was not done."""
    leader = ready_leader()
    session = leader.open()
    proposed = leader.ask(RequestKind.COMMAND, put(), session=session, sequence=1)
    wait = leader.ask(RequestKind.WAIT, commands.query_acquisition(b"a", session, 9), session=session)
    leader.commit()
    leader.service.lose_leadership("n3")
    replies = leader.replies()
    assert (replies[proposed].status, replies[proposed].body) == (ReplyStatus.UNKNOWN, b"n3")
    assert replies[wait].status == ReplyStatus.NOT_LEADER
    assert not leader.service.is_ready


def test_a_source_that_is_gone_gets_no_answer() -> None:
    """Its waits are forgotten; it asks again over a new connection."""
    leader = ready_leader()
    session = leader.open()
    leader.ask(RequestKind.COMMAND, commands.acquire(b"a"), session=session, sequence=1)
    leader.ask(RequestKind.COMMAND, commands.acquire(b"a"), session=session, sequence=2)
    leader.apply()
    query = commands.query_acquisition(b"a", session, 2)
    gone = leader.ask(RequestKind.WAIT, query, session=session, sequence=2, source=b"gone")
    there = leader.ask(RequestKind.WAIT, query, session=session, sequence=2, source=b"there")
    leader.apply()
    leader.replies()
    leader.service.source_gone(b"gone")
    leader.ask(RequestKind.COMMAND, commands.release(b"a", 1), session=session, sequence=3)
    leader.apply()
    replies = leader.replies()
    assert there in replies
    assert gone not in replies


def test_garbage_is_an_answer_and_not_an_exception() -> None:
    """Of every kind of request."""
    leader = ready_leader()
    session = leader.open()
    for kind in (RequestKind.COMMAND, RequestKind.QUERY, RequestKind.WAIT, RequestKind.STALE_QUERY):
        for body in (b"", b"\xff", encode([]), encode([1, 2, 3]), encode({}), encode(["x"])):
            leader.ask(kind, body, session=session, sequence=1)
    leader.apply()
    assert len(leader.replies()) == 24


def test_what_comes_during_a_hand_over_goes_to_the_next_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is appended here, and nobody is given an error of his own."""
    leader = ready_leader()
    session = leader.open()
    before = leader.raft.last_index
    monkeypatch.setattr(RawNode, "is_transferring", True)
    asked = [
        leader.ask(RequestKind.COMMAND, put(), session=session, sequence=1),
        leader.ask(RequestKind.QUERY, commands.query_len(b"m")),
        leader.keep_alive(session),
    ]
    replies = leader.replies()
    assert [replies[number].status for number in asked] == [ReplyStatus.NOT_LEADER] * 3
    assert leader.raft.last_index == before
    monkeypatch.undo()  # it came to nothing: the same leader takes them
    again = leader.ask(RequestKind.COMMAND, put(), session=session, sequence=1)
    leader.apply()
    assert leader.replies()[again].status == ReplyStatus.OK


def test_an_expiry_of_many_that_is_refused_is_tried_again_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one batch of them is no reason to spin."""
    monkeypatch.setattr(module, "EXPIRE_BATCH_MAX", 4)
    leader = ready_leader()
    sessions = [leader.open() for _ in range(6)]
    leader.pass_time(TTL_MS - 200)
    leader.apply()

    def refuse(raft: RawNode, data: bytes) -> Entry:
        raise Overloaded("the log is full")

    with monkeypatch.context() as patch:
        patch.setattr(RawNode, "propose", refuse)
        leader.pass_time(400)
        assert leader.service.deadline > leader.now
    assert leader.service.counters["expired"] > 0
    leader.pass_time(200)
    leader.apply()
    assert not any(leader.machine.sessions.is_alive(session) for session in sessions)


def test_a_wait_ends_with_the_acquisition_that_is_withdrawn() -> None:
    """
    Else a leader would keep every acquisition that timed out until its session ends, and at last refuse all.

    Found by seed 0, once it was asked what is left behind.
    """
    with World(1) as world:
        world.start_all()
        assert world.run(15_000, lambda: all(p.kernel.has_usable_leader for p in world.up_members))
        leader = world.leader
        assert leader is not None
        other = next(process for process in world.up_members if process is not leader)

        def acquire(process: MemberProcess, timeout: float | None) -> Operation:
            lock = _LockBase(process, "door", None, None, None)  # type: ignore[arg-type]  # stands for its cluster
            operation = process.start_operation(lock._acquire_gen(timeout))
            assert world.run(5000, lambda: operation.is_done)
            return operation

        assert acquire(other, None).error is None
        for process in (leader, other):
            assert isinstance(acquire(process, 0.05).error, LockTimeout)
        world.run(1000)
        service = leader.kernel.service
        assert service is not None
        assert (service._waits, service._waits_count) == ({}, 0)
