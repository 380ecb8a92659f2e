"""The application's side of a session: numbering, sending again, giving up, and what may be concluded then."""

from __future__ import annotations

from itertools import pairwise

import pytest

from coordlib.cbor import encode
from coordlib.config import Timing
from coordlib.errors import (
    ClusterClosed,
    CommitTimeout,
    ConditionFailed,
    CoordError,
    LeadershipLost,
    NoQuorum,
    Overloaded,
    QuotaExceeded,
    SessionExpired,
)
from coordlib.machine import commands
from coordlib.node import session as module
from coordlib.node.session import Call, SessionClient, SessionState
from coordlib.wire.messages import Reply, ReplyStatus, Request, RequestKind

TIMING = Timing(session_ttl_ms=8000)


def ok(*values: object) -> bytes:
    """A reply of the machine that says that it worked."""
    return encode([0, *values])


def body() -> bytes:
    return commands.map_put(b"m", b"k", b"v")


class Client:
    """A session client at a moment, with a leader that answers as it is told."""

    def __init__(self) -> None:
        self.session = SessionClient(TIMING, "me", lambda size: b"\1" * size)
        self.now = 1000
        self.session.open(self.now)

    def lead(self, leader: str = "n1") -> list[Request]:
        self.session.leader_changed(leader, self.now)
        return self.session.flush(self.now)

    def answer(self, request: Request, status: int = ReplyStatus.OK, body: bytes = b"") -> None:
        self.session.receive([Reply(request.request_id, status, body)], self.now)

    def refuse(self, request: Request, error: CoordError) -> None:
        self.answer(request, ReplyStatus.ERROR, commands.encode_error(error))

    def connect(self) -> None:
        (opening,) = self.lead()
        self.answer(opening, body=ok(77))

    def call(self, *, kind: int = RequestKind.COMMAND, timeout_ms: int = 5000) -> Call:
        call = Call(kind, body(), self.now + timeout_ms)
        self.session.submit(call, self.now)
        return call

    def flush(self) -> list[Request]:
        return self.session.flush(self.now)

    def tick(self, elapsed_ms: int) -> list[Request]:
        self.now += elapsed_ms
        self.session.tick(self.now)
        return self.flush() if self.session.has_outgoing else []


@pytest.fixture
def client() -> Client:
    client = Client()
    client.connect()
    return client


def test_commands_wait_for_the_session_and_reads_do_not() -> None:
    """A command needs its number."""
    client = Client()
    command, query = client.call(), client.call(kind=RequestKind.QUERY)
    sent = client.lead()
    assert [request.kind for request in sent] == [RequestKind.COMMAND, RequestKind.QUERY]
    assert sent[0].session == 0
    client.answer(sent[1], body=ok())
    assert query.reply is not None
    client.answer(sent[0], body=ok(77))
    (request,) = client.flush()
    assert (request.session, request.sequence) == (77, 1)
    client.answer(request, body=ok())
    assert command.reply == ok()


def test_a_retry_keeps_session_and_sequence(client: Client) -> None:
    """Only the machine can then tell that it is the same request."""
    client.call()
    (first,) = client.flush()
    (again,) = client.lead("n2")
    assert again == first
    client.answer(again, ReplyStatus.UNKNOWN)
    assert client.tick(module.BACK_OFF_MS) == [first]


def test_an_unanswered_request_is_sent_again_after_a_while(client: Client) -> None:
    """The answer may have been lost with a connection that nobody missed."""
    client.call()
    (first,) = client.flush()
    assert first not in client.tick(module.RESEND_MS - 1)
    found = []
    for _ in range(5):
        found += client.tick(module.RESEND_MS)
    assert first in found


def test_the_lowest_unanswered_sequence_is_told(client: Client) -> None:
    """Answered ones below it are forgotten by the machine, also those answered out of order or given up."""
    calls = [client.call() for _ in range(3)]
    first, second, third = client.flush()
    client.answer(second, body=ok())
    client.call()
    assert client.flush()[0].acknowledged == first.sequence
    client.answer(first, body=ok())
    client.call()
    assert client.flush()[0].acknowledged == third.sequence
    client.session.cancel(calls[2])
    client.call()
    assert client.flush()[0].acknowledged == third.sequence + 1


def test_the_window_is_bounded(client: Client) -> None:
    """No more commands are on their way than replies are kept for a session."""
    for _ in range(module.WINDOW_MAX + 100):
        client.call()
    sent: list[Request] = []
    for _ in range(10):
        sent += client.flush()
    assert len(sent) == module.WINDOW_MAX
    client.answer(sent[0], body=ok())
    assert len(client.flush()) == 1


def test_too_many_calls_are_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and nothing of them was sent."""
    monkeypatch.setattr(module, "PENDING_MAX", 3)
    calls = [client.call() for _ in range(4)]
    assert isinstance(calls[3].error, Overloaded)
    assert client.session.completed == [calls[3]]


def test_a_command_never_sent_times_out_definitely() -> None:
    """Nothing can have happened."""
    client = Client()
    call = client.call(timeout_ms=100)
    client.tick(100)
    assert isinstance(call.error, NoQuorum)


def test_a_command_that_was_sent_times_out_indefinitely(client: Client) -> None:
    """It may have taken effect, or may yet."""
    call = client.call(timeout_ms=100)
    client.flush()
    client.tick(100)
    assert isinstance(call.error, CommitTimeout)
    assert client.session.completed == [call]


def test_a_read_times_out_definitely(client: Client) -> None:
    """Asking changes nothing."""
    call = client.call(kind=RequestKind.QUERY, timeout_ms=100)
    client.flush()
    client.tick(100)
    assert isinstance(call.error, NoQuorum)


def test_a_refusal_by_the_state_is_definite_even_after_a_retry(client: Client) -> None:
    """The machine answered this very sequence: it is its one outcome."""
    call = client.call()
    client.flush()
    (again,) = client.lead("n2")
    client.answer(again, body=commands.encode_error(ConditionFailed("no")))
    assert isinstance(call.error, ConditionFailed)


def test_a_late_answer_to_a_call_that_was_given_up_is_ignored(client: Client) -> None:
    """Its caller was told already."""
    call = client.call(timeout_ms=100)
    (request,) = client.flush()
    client.tick(100)
    client.answer(request, body=ok())
    assert call.reply is None


def test_the_first_attempts_expiry_is_definite_and_a_later_ones_is_not(client: Client) -> None:
    """An earlier attempt may have been applied before the session ended."""
    once = client.call()
    (request,) = client.flush()
    client.refuse(request, SessionExpired("gone"))
    assert isinstance(once.error, SessionExpired)
    assert client.session.view.state is SessionState.OPENING
    again = Client()
    again.connect()
    twice = again.call()
    again.flush()
    (request,) = again.lead("n2")
    again.refuse(request, SessionExpired("gone"))
    assert isinstance(twice.error, LeadershipLost)


def test_a_lost_session_ends_what_was_bound_to_it(client: Client) -> None:
    """Sent commands indeterminately, waits definitely; what was not sent goes on in the next session."""
    sent = client.call(timeout_ms=100_000)
    waiting = client.call(kind=RequestKind.WAIT, timeout_ms=100_000)
    client.flush()
    unsent = client.call(timeout_ms=100_000)
    lost = client.session.view
    client.tick(TIMING.session_ttl_ms)
    assert isinstance(sent.error, LeadershipLost)
    assert isinstance(waiting.error, SessionExpired)
    assert unsent.error is None
    assert lost.state is SessionState.LOST
    assert client.session.view is not lost
    opening = client.lead("n1")[0]
    client.answer(opening, body=ok(78))
    assert [(r.session, r.sequence) for r in client.flush()] == [(78, 1)]


def test_a_call_bound_to_a_lost_session_is_refused(client: Client) -> None:
    """A release of what is gone is not sent to the next session."""
    view = client.session.view
    client.tick(TIMING.session_ttl_ms)
    call = Call(RequestKind.COMMAND, body(), client.now + 1000, view=view)
    client.session.submit(call, client.now)
    assert isinstance(call.error, SessionExpired)


def keep_alive(client: Client) -> Request:
    (request,) = [r for r in client.tick(TIMING.keep_alive_ms) if r.kind == RequestKind.KEEP_ALIVE]
    return request


def test_a_keep_alive_counts_from_when_it_was_sent(client: Client) -> None:
    """However late its answer comes; less the drift of two clocks."""
    request = keep_alive(client)
    sent = client.now
    client.now += 500
    client.answer(request)
    assert client.session.view.valid_until_ms == sent + 8000 - 80


def test_a_keep_alive_of_before_a_change_of_leader_is_not_believed(client: Client) -> None:
    """What the old leader promised is not the new one's promise; a new one is sent at once."""
    request = keep_alive(client)
    before = client.session.view.valid_until_ms
    assert [r.kind for r in client.lead("n2")] == [RequestKind.KEEP_ALIVE]
    client.answer(request)
    assert client.session.view.valid_until_ms == before


def test_silence_suspends_and_an_answer_resumes(client: Client) -> None:
    """Half the TTL without an answer is told to the holders, and so is the next answer."""
    client.session.changes.clear()
    request = keep_alive(client)
    client.tick(TIMING.session_ttl_ms // 2)
    assert [state for _, state in client.session.changes] == [SessionState.SUSPENDED]
    client.answer(request)
    assert [state for _, state in client.session.changes][-1] is SessionState.CONNECTED


def test_a_deadline_is_never_missed(client: Client) -> None:
    """Waiting for `deadline` each time, every call ends at its own and the session at its end."""
    calls = [client.call(timeout_ms=timeout) for timeout in (50, 700, 3000)]
    ends = [call.deadline_ms for call in calls]
    found: dict[int, int] = {}
    while len(found) < 3:
        assert client.session.deadline > client.now
        client.tick(client.session.deadline - client.now)
        for number, call in enumerate(calls):
            if call.error is not None:
                found.setdefault(number, client.now)
    assert [found[number] for number in range(3)] == ends


def test_withdrawing_what_was_never_sent_sends_nothing(client: Client) -> None:
    """And withdrawing what was sent sends the command made from its sequence."""
    for is_sent in (False, True):
        ask = client.call()
        sent = client.flush() if is_sent else []
        undo = Call(
            RequestKind.COMMAND,
            b"",
            is_detached=True,
            withdraws=(ask, lambda sequence: commands.release(b"a", sequence)),
        )
        client.session.submit(undo, client.now)
        requests = client.flush()
        assert [r.body for r in requests] == [commands.release(b"a", r.sequence) for r in sent]
        assert client.session.completed == []


def test_closing_ends_the_session_by_a_command(client: Client) -> None:
    """Without a session there is nothing to close."""
    call = client.session.close(client.now, client.now + 1000)
    assert call is not None
    (request,) = client.flush()
    assert request.body == commands.close_session()
    client.answer(request, body=ok())
    assert call.reply is not None
    client.session.closed()
    assert client.session.view.state is SessionState.CLOSED
    assert Client().session.close(0, 0) is None


def test_when_the_node_stops_every_call_ends(client: Client) -> None:
    """By what may be concluded of each."""
    sent, unsent = client.call(), None
    client.flush()
    unsent = client.call()
    error = NoQuorum("stopping")
    client.session.fail_all(error)
    assert isinstance(sent.error, LeadershipLost)
    assert unsent.error is error
    assert client.session.pending_count == 0
    assert client.session.deadline > client.now + 10_000_000


def test_answers_to_nobody_are_ignored(client: Client) -> None:
    """Twice the same, or of an id that was never given."""
    call = client.call()
    (request,) = client.flush()
    for _ in range(2):
        client.answer(request, body=ok())
    client.session.receive([Reply(5, ReplyStatus.OK, b"nonsense")], client.now)
    assert client.session.completed == [call]


@pytest.mark.parametrize("is_detached", [False, True])
def test_a_release_that_was_queued_when_its_session_was_lost_is_never_sent(
    client: Client, is_detached: bool
) -> None:
    """In the next session the same sequence is another acquisition: it would free that one."""
    release = Call(
        RequestKind.COMMAND,
        commands.release(b"a", 1),
        client.now + 100_000,
        view=client.session.view,
        is_detached=is_detached,
    )
    client.session.submit(release, client.now)
    client.tick(TIMING.session_ttl_ms)
    assert isinstance(release.error, SessionExpired)
    assert client.session.completed == ([] if is_detached else [release])
    (opening,) = client.lead()
    client.answer(opening, body=ok(78))
    assert client.flush() == []


def test_a_withdrawal_that_was_queued_when_its_session_was_lost_is_never_sent(client: Client) -> None:
    """It was made from a sequence of the session that is gone."""
    ask = client.call()
    client.flush()
    undo = Call(
        RequestKind.COMMAND,
        b"",
        is_detached=True,
        withdraws=(ask, lambda sequence: commands.release(b"a", sequence)),
    )
    client.session.submit(undo, client.now)
    client.tick(TIMING.session_ttl_ms)
    assert isinstance(undo.error, SessionExpired)
    (opening,) = client.lead()
    client.answer(opening, body=ok(78))
    assert client.flush() == []


def test_closing_ends_the_grants_at_once(client: Client) -> None:
    """From when the command leaves, the locks may be others'; the command itself still goes out, and is retried."""
    view = client.session.view
    client.session.changes.clear()
    assert client.session.close(client.now, client.now + 1000) is not None
    assert client.session.changes == [(view, SessionState.CLOSED)]
    assert not view.is_valid(client.now)
    (request,) = client.flush()
    assert (request.session, request.body) == (77, commands.close_session())
    assert client.lead("n2") == [request]
    assert client.tick(TIMING.keep_alive_ms // 2) == []


def test_a_keep_alive_that_is_refused_after_closing_leaves_nothing_to_do(client: Client) -> None:
    """What is due and never done would keep the node thread running in circles until it has left."""
    (keep_alive,) = client.tick(TIMING.keep_alive_ms)
    assert keep_alive.kind == RequestKind.KEEP_ALIVE
    client.session.close(client.now, client.now + 100_000)
    client.flush()
    client.answer(keep_alive, ReplyStatus.NOT_LEADER)
    client.tick(500)
    assert client.session.deadline > client.now


@pytest.mark.parametrize("is_detached", [False, True])
def test_nothing_is_taken_behind_a_close(client: Client, is_detached: bool) -> None:
    """It would open another session, which nobody closes."""
    client.session.close(client.now, client.now + 100_000)
    late = Call(RequestKind.COMMAND, body(), client.now + 1000, is_detached=is_detached)
    client.session.submit(late, client.now)
    assert isinstance(late.error, ClusterClosed)
    assert [request.body for request in client.flush()] == [commands.close_session()]
    assert client.session.view.state is SessionState.CLOSED


def test_a_request_that_no_entry_can_hold_is_refused_before_it_is_sent(client: Client) -> None:
    """By the name of the limit; one that just fits is sent."""
    fits = Call(RequestKind.COMMAND, b"x" * module.BODY_SIZE_BYTES_MAX, client.now + 1000)
    large = Call(RequestKind.COMMAND, b"x" * (module.BODY_SIZE_BYTES_MAX + 1), client.now + 1000)
    for call in (fits, large):
        client.session.submit(call, client.now)
    assert isinstance(large.error, QuotaExceeded)
    assert "entry_size_bytes_max" in str(large.error)
    assert client.session.completed == [large]
    assert [len(request.body) for request in client.flush()] == [module.BODY_SIZE_BYTES_MAX]


def test_large_requests_leave_in_frames_of_their_own(client: Client) -> None:
    """What two of them need together is more than one flush holds; the order stays."""
    sizes = [1000, module.BODY_SIZE_BYTES_MAX, 2000]
    for size in sizes:
        client.session.submit(Call(RequestKind.COMMAND, b"x" * size, client.now + 1000), client.now)
    flushes = [[len(request.body) for request in client.flush()] for _ in range(4)]
    assert flushes == [[1000], [module.BODY_SIZE_BYTES_MAX], [2000], []]


def test_a_detached_call_outlasts_an_overload(client: Client) -> None:
    """Nobody is there to try again; whoever waits is told at once."""
    detached = Call(RequestKind.COMMAND, body(), is_detached=True)
    client.session.submit(detached, client.now)
    awaited = client.call()
    first, second = client.flush()
    client.refuse(first, Overloaded("later"))
    client.refuse(second, Overloaded("later"))
    assert isinstance(awaited.error, Overloaded)
    assert client.flush() == []
    again = client.tick(module.BACK_OFF_MS)
    assert [(r.request_id, r.sequence, r.body) for r in again] == [
        (first.request_id, first.sequence, first.body)
    ]
    client.answer(again[0], body=ok())
    assert detached.reply == ok()
    assert client.session.pending_count == 0


@pytest.mark.parametrize("kind", [RequestKind.COMMAND, RequestKind.QUERY])
def test_a_retry_outlasts_an_overload(client: Client, kind: int) -> None:
    """A first attempt may have been appended by another leader: a refusal now would say nothing definite."""
    call = client.call(kind=kind)
    client.flush()
    (again,) = client.lead("n2")
    client.refuse(again, Overloaded("later"))
    assert call.error is None
    (third,) = client.tick(module.BACK_OFF_MS)
    assert third == again


def test_a_detached_call_is_taken_however_many_wait(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A withdrawal makes room, and nobody would repeat it."""
    monkeypatch.setattr(module, "PENDING_MAX", 1)
    client.call()
    detached = Call(RequestKind.COMMAND, body(), is_detached=True)
    client.session.submit(detached, client.now)
    assert detached.error is None
    assert len(client.flush()) == 2


def test_a_call_is_never_queued_twice(client: Client) -> None:
    """However often it is found unanswered before it can be sent, and by whomever."""
    client.call(timeout_ms=100_000)
    (first,) = client.flush()
    for _ in range(3):
        client.now += module.RESEND_MS
        client.session.tick(client.now)
    client.answer(first, ReplyStatus.UNKNOWN)
    client.now += module.BACK_OFF_MS
    assert [r for r in client.flush() if r.kind == RequestKind.COMMAND] == [first]
    client.lead("n2")
    client.answer(first, ReplyStatus.UNKNOWN)
    client.answer(first, ReplyStatus.UNKNOWN)
    client.now += module.BACK_OFF_MS
    assert [r for r in client.flush() if r.kind == RequestKind.COMMAND] == [first]


def test_an_unanswered_request_is_sent_again_ever_more_rarely(client: Client) -> None:
    """A leader that is slow is not helped by copies."""
    client.call(timeout_ms=100_000)
    (first,) = client.flush()
    sent_at = [client.now]
    while len(sent_at) < 8:
        for request in client.tick(100):
            if request == first:
                sent_at.append(client.now)
            elif request.kind == RequestKind.KEEP_ALIVE:
                client.answer(request)
    gaps = [after - before for before, after in pairwise(sent_at)]
    assert gaps == sorted(gaps)
    assert module.RESEND_MS <= gaps[0] < 2 * module.RESEND_MS
    assert module.RESEND_MS_MAX <= gaps[-1] <= module.RESEND_MS_MAX + module.RESEND_MS
