"""Calls between applications: at most once, never "not delivered" of one that was, and an end for every one of them."""

from __future__ import annotations

import queue
import random
import time
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import pytest

import coordlib
from coordlib import cbor
from coordlib.errors import (
    CallLost,
    CallTimeout,
    ClusterClosed,
    CoordError,
    Overloaded,
    QuotaExceeded,
    ServiceUnreachable,
    UsageError,
)
from coordlib.machine import commands
from coordlib.node import calls as module
from coordlib.node.calls import Calls, check_answer
from coordlib.node.clock import monotonic_ms
from coordlib.node.effects import Effects, InboundCall
from coordlib.node.operations import Step, run
from coordlib.node.session import BODY_SIZE_BYTES_MAX, Call
from coordlib.testing import Simulation
from coordlib.testing.simulation.processes import ClientProcess, MemberProcess, Process
from coordlib.testing.simulation.surroundings import NetworkProfile
from coordlib.testing.simulation.world import World
from coordlib.wire.messages import CallStatus, RequestKind, ServiceCall, ServiceReply, Serving

ME, OTHER, NOBODY = 11, 22, 99
ROUTE, ANOTHER = b"route", b"another"
NEVER = 1 << 62


def new_call(target: int, body: bytes = b"body", deadline_ms: int = NEVER) -> Call:
    call = Call(RequestKind.CALL, body, deadline_ms)
    call.target = target
    return call


def definite(answer: bytes) -> CoordError | None:
    return commands.error_reply(answer)


class Bench:
    """One process's `Calls`, with the test all around it."""

    def __init__(self, *, is_member: bool = True, members: tuple[str, ...] = ("n2", "n3")) -> None:
        self.effects = Effects()
        self.members = list(members)
        self.routes = [ROUTE, ANOTHER] if is_member else []
        self.now = 1000
        self.calls = Calls(self, lambda: self.effects, lambda size: b"\1" * size, is_member=is_member)
        self.calls.session_changed(ME, self.now)

    def can_reach(self, source: str | bytes) -> bool:
        return source in self.members or source in self.routes

    def reachable_members(self) -> list[str]:
        return self.members

    def call(self, target: int, body: bytes = b"body", deadline_ms: int = NEVER) -> Call:
        call = new_call(target, body, deadline_ms)
        self.calls.submit(call, self.now)
        return call

    def hear(self, source: str | bytes, message: Serving | ServiceCall | ServiceReply) -> None:
        self.calls.receive(source, message, self.now)

    def sent(self) -> list[tuple[str | bytes, Any]]:
        """What was sent since it was last asked."""
        effects = self.effects
        both: list[tuple[str | bytes, list[tuple[int, Any]]]] = [
            *effects.sends.items(),
            *effects.client_sends.items(),
        ]
        effects.sends, effects.client_sends = {}, {}
        return [(receiver, message) for receiver, batch in both for _, message in batch]

    def sent_one(self) -> tuple[str | bytes, Any]:
        (one,) = self.sent()
        return one

    def arrived(self) -> list[InboundCall]:
        calls, self.effects.calls = self.effects.calls, None
        return calls or []

    def ended(self) -> list[Call]:
        completed, self.effects.completed = self.effects.completed, []
        return completed

    def pass_time(self, ms: int) -> None:
        self.now += ms
        if self.now >= self.calls.next_ms:
            self.calls.tick(self.now)


# -- one process ---------------------------------------------------------------------------------------------


def test_a_call_goes_the_way_that_was_told_and_its_answer_ends_it() -> None:
    """Over a member's connection or a client's, whichever told."""
    for host in ("n3", ROUTE):
        bench = Bench()
        bench.hear(host, Serving(OTHER))
        call = bench.call(OTHER, b"question", bench.now + 500)
        to, message = bench.sent_one()
        assert (to, message) == (host, ServiceCall(message.call_id, OTHER, ME, 500, b"question"))
        bench.hear(host, ServiceReply(message.call_id, CallStatus.OK, b"answer"))
        assert bench.ended() == [call]
        assert (call.reply, call.error) == (b"answer", None)


def test_a_process_calls_itself_without_a_connection() -> None:
    """The same rules hold: it must take calls, and there is a deadline."""
    bench = Bench(members=())
    call = bench.call(ME)
    assert isinstance(call.error, ServiceUnreachable)
    bench.calls.serve(True, bench.now)
    call = bench.call(ME, b"question", bench.now + 500)
    (inbound,) = bench.arrived()
    assert (inbound.source, inbound.caller, inbound.body) == ("", ME, b"question")
    assert (inbound.budget_ms, inbound.deadline_ms) == (500, bench.now + 500)
    bench.calls.answer(inbound.number, CallStatus.OK, b"answer", bench.now)
    assert call.reply == b"answer"
    assert bench.sent() == []


def test_what_was_not_delivered_is_tried_on_every_way_and_then_unreachable() -> None:
    """First the way that is known, then the members in their order, each once; every try has a number of its own."""
    bench = Bench()
    bench.hear(ROUTE, Serving(OTHER))
    call = bench.call(OTHER)
    tried, numbers = [], []
    for _ in range(3):
        to, message = bench.sent_one()
        tried.append(to)
        numbers.append(message.call_id)
        assert call.error is None
        bench.hear(to, ServiceReply(message.call_id, CallStatus.UNREACHABLE, b""))
    assert tried == [ROUTE, "n2", "n3"]
    assert numbers == sorted(set(numbers))
    assert isinstance(call.error, ServiceUnreachable)
    assert call.error.target == OTHER
    assert bench.ended() == [call]


def test_without_any_way_a_call_ends_at_once() -> None:
    """Nothing is kept for a connection that may come: the caller knows best whether to wait."""
    bench = Bench(is_member=False, members=())
    call = bench.call(OTHER)
    assert isinstance(call.error, ServiceUnreachable)
    assert call.error.retryable
    call = bench.call(OTHER, deadline_ms=bench.now)
    assert isinstance(call.error, ServiceUnreachable)
    assert bench.sent() == []


def test_nothing_is_sent_again_that_may_have_been_delivered() -> None:
    """A connection that is lost, and a member that lost its own: both end the call, and other ways are left alone."""
    bench = Bench()
    first = bench.call(OTHER)
    ((to, _),) = bench.sent()
    assert isinstance(to, str)
    bench.members.remove(to)
    bench.calls.link_down(to)
    assert isinstance(first.error, CallLost)
    second = bench.call(OTHER)
    to, message = bench.sent_one()
    bench.hear(to, ServiceReply(message.call_id, CallStatus.UNKNOWN, b""))
    assert isinstance(second.error, CallLost)
    third = bench.call(OTHER)
    to, message = bench.sent_one()
    bench.hear(to, ServiceReply(message.call_id, 200, b"of a newer version"))
    assert isinstance(third.error, CallLost)
    assert bench.sent() == []


def test_an_error_is_raised_as_what_it_is() -> None:
    """By its code; rubbish is an error too."""
    bench = Bench()
    call = bench.call(OTHER)
    to, message = bench.sent_one()
    bench.hear(
        to, ServiceReply(message.call_id, CallStatus.ERROR, commands.encode_error(Overloaded("later")))
    )
    assert isinstance(call.error, Overloaded)
    call = bench.call(OTHER)
    to, message = bench.sent_one()
    bench.hear(to, ServiceReply(message.call_id, CallStatus.ERROR, cbor.encode([0, "all is well"])))
    assert call.error is not None and call.error.code == "remote-protocol"


def test_a_call_ends_at_its_deadline_and_the_answer_after_it_is_dropped() -> None:
    """Not before; it may have been delivered."""
    bench = Bench()
    call = bench.call(OTHER, deadline_ms=bench.now + 100)
    to, message = bench.sent_one()
    bench.pass_time(99)
    assert call.error is None
    bench.pass_time(1)
    assert isinstance(call.error, CallTimeout)
    bench.hear(to, ServiceReply(message.call_id, CallStatus.OK, b"late"))
    assert call.reply is None
    assert bench.calls.counters["replies_unknown"] == 1
    assert bench.ended() == [call]
    assert bench.calls.next_ms == NEVER


def test_a_call_without_a_deadline_ends_some_time() -> None:
    """What is kept of one is not kept for ever."""
    bench = Bench()
    call = bench.call(OTHER)
    bench.pass_time(module.BUDGET_MS_MAX)
    assert isinstance(call.error, CallTimeout)


def test_only_who_was_asked_can_answer() -> None:
    """Another's reply under the same number is nobody's."""
    bench = Bench()
    call = bench.call(OTHER)
    to, message = bench.sent_one()
    assert to == "n2"
    for stranger in ("n3", ROUTE):
        bench.hear(stranger, ServiceReply(message.call_id, CallStatus.OK, b"mine"))
    assert call.reply is None
    assert bench.calls.counters["replies_unknown"] == 2


def test_a_call_is_delivered_once_and_only_to_the_session_that_it_is_for() -> None:
    """Not to the one after it, not while calls are not taken; a second copy is dropped without an answer."""
    bench = Bench()
    bench.hear("n2", ServiceCall(5, ME, OTHER, 500, b"too early"))
    assert bench.sent_one() == ("n2", ServiceReply(5, CallStatus.UNREACHABLE, b""))
    bench.calls.serve(True, bench.now)
    bench.sent()
    bench.hear("n2", ServiceCall(7, ME, OTHER, 500, b"question"))
    bench.hear("n2", ServiceCall(7, ME, OTHER, 500, b"question"))
    bench.hear("n2", ServiceCall(6, ME, OTHER, 500, b"overtaken"))
    (inbound,) = bench.arrived()
    assert (inbound.source, inbound.caller, inbound.body) == ("n2", OTHER, b"question")
    assert bench.calls.counters["calls_repeated"] == 2
    bench.calls.answer(inbound.number, CallStatus.OK, b"answer", bench.now)
    bench.hear("n2", ServiceCall(7, ME, OTHER, 500, b"question"))
    assert bench.sent_one() == ("n2", ServiceReply(7, CallStatus.OK, b"answer"))
    bench.calls.answer(inbound.number, CallStatus.OK, b"again", bench.now)
    assert bench.sent() == []
    bench.calls.session_changed(ME + 1, bench.now)
    bench.sent()
    bench.hear("n2", ServiceCall(8, ME, OTHER, 500, b"for whom it was"))
    assert bench.sent_one() == ("n2", ServiceReply(8, CallStatus.UNREACHABLE, b""))
    bench.calls.session_changed(0, bench.now)
    bench.sent()
    bench.hear("n2", ServiceCall(9, 0, OTHER, 500, b"for nobody"))
    assert bench.sent_one() == ("n2", ServiceReply(9, CallStatus.UNREACHABLE, b""))
    assert bench.arrived() == []


def test_an_answer_is_dropped_when_nobody_waits_for_it() -> None:
    """After the deadline, and when the asker's process is another one."""
    bench = Bench()
    bench.calls.serve(True, bench.now)
    bench.sent()
    bench.hear("n2", ServiceCall(5, ME, OTHER, 100, b""))
    bench.hear("n3", ServiceCall(5, ME, OTHER, 900, b""))
    late, gone = bench.arrived()
    bench.pass_time(100)
    bench.calls.answer(late.number, CallStatus.OK, b"", bench.now)
    bench.calls.source_gone("n3")
    bench.calls.answer(gone.number, CallStatus.OK, b"", bench.now)
    assert bench.sent() == []
    assert bench.calls.counters["answers_late"] == 2
    # The next run of that process numbers anew.
    bench.hear("n3", ServiceCall(1, ME, OTHER, 900, b""))
    assert len(bench.arrived()) == 1


def test_a_member_passes_on_one_hop_and_no_further() -> None:
    """From a client to anybody, from a member to a client, and never from a member to a member."""
    bench = Bench()
    bench.hear("n2", Serving(OTHER))
    bench.hear(ANOTHER, Serving(33))
    bench.hear(ROUTE, ServiceCall(5, OTHER, 44, 700, b"question"))
    to, message = bench.sent_one()
    assert (to, message) == ("n2", ServiceCall(message.call_id, OTHER, 44, 700, b"question"))
    bench.hear("n2", ServiceReply(message.call_id, CallStatus.OK, b"answer"))
    assert bench.sent_one() == (ROUTE, ServiceReply(5, CallStatus.OK, b"answer"))
    bench.hear("n3", ServiceCall(5, 33, 44, 700, b"question"))
    to, message = bench.sent_one()
    assert to == ANOTHER
    bench.hear("n3", ServiceCall(6, OTHER, 44, 700, b"question"))
    assert bench.sent_one() == ("n3", ServiceReply(6, CallStatus.UNREACHABLE, b""))
    # Nor back to where it came from.
    bench.hear(ANOTHER, ServiceCall(7, 33, 44, 700, b"question"))
    assert bench.sent_one() == (ANOTHER, ServiceReply(7, CallStatus.UNREACHABLE, b""))


def test_a_client_passes_nothing_on() -> None:
    """It is asked only for itself."""
    bench = Bench(is_member=False)
    bench.hear("n2", Serving(OTHER))
    bench.hear("n3", ServiceCall(5, OTHER, 44, 700, b"question"))
    assert bench.sent_one() == ("n3", ServiceReply(5, CallStatus.UNREACHABLE, b""))


def test_who_passed_a_call_on_says_so_when_the_way_breaks() -> None:
    """At once, where the connection is seen to break; and when the called process comes over another one."""
    bench = Bench()
    bench.hear("n2", Serving(OTHER))
    bench.hear(ROUTE, ServiceCall(5, OTHER, 44, 700, b""))
    bench.sent()
    bench.members.remove("n2")
    bench.calls.link_down("n2")
    assert bench.sent_one() == (ROUTE, ServiceReply(5, CallStatus.UNKNOWN, b""))
    bench.hear(ROUTE, ServiceCall(6, OTHER, 44, 700, b""))
    assert bench.sent_one() == (ROUTE, ServiceReply(6, CallStatus.UNREACHABLE, b""))
    bench.members.append("n2")
    bench.hear(ROUTE, ServiceCall(7, OTHER, 44, 700, b""))
    assert bench.sent_one()[0] == "n2"  # what it said holds while it is the same process

    bench.hear(ANOTHER, Serving(33))
    bench.hear(ROUTE, ServiceCall(8, 33, 44, 700, b""))
    bench.sent()
    bench.routes.append(b"new")
    bench.hear(b"new", Serving(33))
    assert bench.sent_one() == (ROUTE, ServiceReply(8, CallStatus.UNKNOWN, b""))
    bench.hear(ROUTE, ServiceCall(9, 33, 44, 700, b""))
    assert bench.sent_one()[0] == b"new"


def test_what_never_left_is_as_good_as_refused() -> None:
    """A client's connection turns out to be gone as the call is sent: another way is tried, or its asker is told."""
    bench = Bench()
    bench.hear(ROUTE, Serving(OTHER))
    bench.hear("n3", ServiceCall(5, OTHER, 44, 700, b""))
    call = bench.call(OTHER)
    (to, passed_on), (also_to, own) = bench.sent()
    assert (to, also_to) == (ROUTE, ROUTE)
    bench.calls.not_sent(ROUTE, passed_on.call_id, bench.now)
    assert bench.sent_one() == ("n3", ServiceReply(5, CallStatus.UNREACHABLE, b""))
    bench.calls.not_sent(ROUTE, own.call_id, bench.now)
    bench.calls.source_gone(ROUTE)
    to, message = bench.sent_one()
    assert (to, message.target) == ("n2", OTHER)
    assert call.error is None


def test_what_is_passed_on_for_one_that_is_gone_is_forgotten() -> None:
    """And after the budget, when its asker has given up."""
    bench = Bench()
    bench.hear("n2", Serving(OTHER))
    bench.hear(ROUTE, ServiceCall(5, OTHER, 44, 700, b""))
    bench.hear(ANOTHER, ServiceCall(5, OTHER, 44, 300, b""))
    (_, for_route), (_, for_another) = bench.sent()
    bench.calls.source_gone(ROUTE)
    bench.pass_time(300)
    assert bench.calls.sizes == {"pending": 0, "forwards": 0, "inbound": 0, "ways": 1}
    for message in (for_route, for_another):
        bench.hear("n2", ServiceReply(message.call_id, CallStatus.OK, b""))
    assert bench.sent() == []


def test_who_takes_calls_says_so_to_every_member_and_says_it_again() -> None:
    """When it begins, when its session changes, when a member is connected, every few seconds; and when it ends."""
    bench = Bench()
    assert bench.sent() == []
    assert bench.calls.next_ms == NEVER
    bench.calls.link_up("n2")
    assert bench.sent() == []
    everybody = ["n2", "n3"]
    bench.calls.serve(True, bench.now)
    assert bench.sent() == [(name, Serving(ME)) for name in everybody]
    bench.calls.serve(True, bench.now)
    bench.calls.session_changed(ME, bench.now)
    assert bench.sent() == []
    bench.calls.session_changed(0, bench.now)
    assert bench.sent() == [(name, Serving(0)) for name in everybody]
    bench.pass_time(module.SERVING_EVERY_MS)
    assert bench.sent() == []
    bench.calls.session_changed(ME + 1, bench.now)
    assert bench.sent() == [(name, Serving(ME + 1)) for name in everybody]
    for _ in range(3):
        bench.pass_time(module.SERVING_EVERY_MS - 1)
        assert bench.sent() == []
        bench.pass_time(1)
        assert bench.sent() == [(name, Serving(ME + 1)) for name in everybody]
    bench.calls.link_up("n2")
    assert bench.sent() == [("n2", Serving(ME + 1))]
    bench.calls.serve(False, bench.now)
    assert bench.sent() == [(name, Serving(0)) for name in everybody]
    bench.pass_time(module.SERVING_EVERY_MS)
    assert bench.sent() == []


def test_a_way_ends_with_what_told_it() -> None:
    """By word, or because its process is another one."""
    bench = Bench(members=("n2",))
    bench.hear("n2", Serving(OTHER))
    bench.hear("n2", Serving(OTHER + 1))
    bench.hear(ROUTE, Serving(33))
    assert bench.calls.sizes["ways"] == 2
    bench.hear("n2", Serving(0))
    bench.calls.source_gone(ROUTE)
    assert bench.calls.sizes["ways"] == 0


def test_every_queue_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with what was not done: nothing was sent, delivered or passed on."""
    for limit in ("PENDING_MAX", "FORWARDS_MAX", "INBOUND_MAX"):
        monkeypatch.setattr(module, limit, 2)
    bench = Bench()
    bench.hear("n2", Serving(OTHER))
    refused = [bench.call(OTHER).error for _ in range(3)]
    assert [type(error) for error in refused] == [type(None), type(None), Overloaded]
    assert len(bench.sent()) == 2
    for id in range(1, 4):
        bench.hear(ROUTE, ServiceCall(id, OTHER, 44, 500, b""))
    *passed_on, (to, reply) = bench.sent()
    assert [name for name, _ in passed_on] == ["n2", "n2"]
    assert (to, reply.call_id, reply.status) == (ROUTE, 3, CallStatus.ERROR)
    assert isinstance(definite(reply.body), Overloaded)
    bench.calls.serve(True, bench.now)
    bench.sent()
    for id in range(1, 4):
        bench.hear("n3", ServiceCall(id, ME, 44, 500, b""))
    assert len(bench.arrived()) == 2
    to, reply = bench.sent_one()
    assert (to, reply.call_id, reply.status) == ("n3", 3, CallStatus.ERROR)
    assert isinstance(definite(reply.body), Overloaded)
    bench.pass_time(500)  # what is not answered makes room at its deadline
    bench.hear("n3", ServiceCall(4, ME, 44, 500, b""))
    assert len(bench.arrived()) == 1
    for too_long in (bench.call(OTHER, bytes(BODY_SIZE_BYTES_MAX + 1)),):
        assert isinstance(too_long.error, QuotaExceeded)


def test_deadlines_that_no_longer_count_take_no_room() -> None:
    """A thousand quick calls with a distant deadline leave nothing behind."""
    bench = Bench()
    for _ in range(1000):
        bench.call(OTHER, deadline_ms=bench.now + 600_000)
        to, message = bench.sent_one()
        bench.hear(to, ServiceReply(message.call_id, CallStatus.OK, b""))
    assert len(bench.calls._deadlines) < 100
    live = bench.call(OTHER, deadline_ms=bench.now + 600_000)
    for _ in range(1000):
        bench.call(OTHER, deadline_ms=bench.now + 5)
    bench.pass_time(5)
    assert bench.calls.sizes["pending"] == 1
    bench.pass_time(599_995)
    assert isinstance(live.error, CallTimeout)


def test_when_the_node_stops_every_call_ends() -> None:
    """As one that may have been delivered."""
    bench = Bench()
    bench.calls.serve(True, bench.now)
    calls = [bench.call(OTHER), bench.call(ME)]
    bench.calls.fail_all(ClusterClosed("the node has closed"))
    assert bench.ended() == calls
    assert [type(call.error) for call in calls] == [CallLost, CallLost]
    assert bench.calls.next_ms == NEVER


def test_a_call_that_nobody_waits_for_is_not_told_of() -> None:
    """It is sent all the same."""
    bench = Bench()
    call = Call(RequestKind.CALL, b"", is_detached=True)
    call.target = OTHER
    bench.calls.submit(call, bench.now)
    to, message = bench.sent_one()
    bench.hear(to, ServiceReply(message.call_id, CallStatus.OK, b"answer"))
    assert bench.ended() == []
    assert call.reply == b"answer"


def test_what_cannot_be_an_answer_is_refused() -> None:
    """At the answering end, where it can be put right."""
    check_answer(CallStatus.OK, bytes(BODY_SIZE_BYTES_MAX))
    with pytest.raises(UsageError, match="at most"):
        check_answer(CallStatus.OK, bytes(BODY_SIZE_BYTES_MAX + 1))
    with pytest.raises(UsageError, match="statuses"):
        check_answer(7, b"")


# -- whole clusters in virtual time --------------------------------------------------------------------------


class Village:
    """Members and clients whose applications call each other. Every call and every delivery is written down."""

    def __init__(self, world: World, *, clients: int = 2) -> None:
        self.world = world
        self.delivered: Counter[bytes] = Counter()
        self.delivered_to: dict[bytes, int] = {}
        self.made: dict[bytes, Call] = {}
        self.stalls: set[str] = set()  # who does not answer
        self.answer_after_ms = 0
        world.start_all()
        assert world.run(15_000, lambda: all(p.kernel.has_usable_leader for p in world.up_members))
        for n in range(1, clients + 1):
            world.start_client(f"c{n}")
        for process in list(world.processes.values()):
            self.serve(process)
        assert self.settle()

    def serve(self, process: Process) -> None:
        def handle(inbound: InboundCall) -> None:
            self.delivered[inbound.body] += 1
            self.delivered_to[inbound.body] = process.kernel.session.id
            if process.name in self.stalls:
                return
            if self.answer_after_ms:
                self.world.after(self.answer_after_ms, self.answer, process, inbound)
            else:
                self.answer(process, inbound)

        process.set_call_handler(handle)

    def answer(self, process: Process, inbound: InboundCall) -> None:
        if process.is_up:
            process.answer(inbound, CallStatus.OK, b"to " + inbound.body)

    def session(self, name: str) -> int:
        return self.world.processes[name].kernel.session.id

    def settle(self) -> bool:
        """Everybody has a session, members are connected to each other and know the way to all that are connected to them."""
        processes = [p for p in self.world.processes.values() if p.is_up]
        members = {p.name: p for p in processes if isinstance(p, MemberProcess)}

        def is_known(process: Process) -> bool:
            session, near = process.kernel.session.id, process.kernel.reachable_members()
            return session > 0 and all(session in members[name].kernel.calls._way_to for name in near)

        def is_settled() -> bool:
            return all(p.kernel.reachable_members() and is_known(p) for p in processes) and all(
                len(p.kernel.reachable_members()) == len(members) - 1 for p in members.values()
            )

        return self.world.run(30_000, is_settled)

    def call(self, source: str, target: int, patience_ms: int = 2000) -> Call:
        process = self.world.processes[source]
        body = b"call %d" % len(self.made)
        call = self.made[body] = new_call(target, body, process.clock() + patience_ms)
        process.submit(call)
        return call

    def finish(self, call: Call, within_ms: int = 5000) -> None:
        assert self.world.run(within_ms, lambda: call.reply is not None or call.error is not None)

    def ask(self, source: str, target: int, patience_ms: int = 2000) -> Call:
        call = self.call(source, target, patience_ms)
        self.finish(call)
        return call

    def check(self) -> Counter[str]:
        """No call was delivered twice or to another session, and none that is said not to have been."""
        outcomes: Counter[str] = Counter()
        for body, call in self.made.items():
            count = self.delivered[body]
            assert count <= 1
            if count:
                assert self.delivered_to[body] == call.target
            if call.error is not None:
                outcomes[type(call.error).__name__] += 1
                if not isinstance(call.error, CallLost | CallTimeout):
                    assert count == 0
            elif call.reply is not None:
                outcomes["answered"] += 1
                assert count == 1
                assert call.reply == b"to " + body
            else:
                outcomes["open"] += 1
        return outcomes


@pytest.fixture
def village() -> Iterator[Village]:
    with World(7) as world:
        yield Village(world)


def test_everybody_can_call_everybody(village: Village) -> None:
    """Members and clients, and themselves; each call is delivered once."""
    names = list(village.world.processes)
    calls = [village.ask(one, village.session(other)) for one in names for other in names]
    assert all(call.error is None for call in calls)
    assert village.check() == {"answered": len(names) ** 2}


def test_a_client_calls_through_one_member_and_a_member_calls_directly(village: Village) -> None:
    """The figures of whoever passes on show it."""
    world = village.world
    leader = world.leader
    assert leader is not None
    others = [member for member in world.up_members if member is not leader]
    village.ask("c1", village.session("c2"))
    assert leader.kernel.calls.counters["calls_forwarded"] == 1
    village.ask("c1", leader.kernel.session.id)
    village.ask(others[0].name, others[1].kernel.session.id)
    village.ask(others[0].name, village.session("c1"))
    assert [m.kernel.calls.counters["calls_forwarded"] for m in world.up_members].count(0) == 2
    assert leader.kernel.calls.counters["calls_forwarded"] == 1


def test_a_client_that_only_another_member_reaches_is_called_through_that_one(village: Village) -> None:
    """From a member and from a client: one way that does not lead there is not the end."""
    world = village.world
    leader = world.leader
    assert leader is not None
    caller, other = (member for member in world.up_members if member is not leader)
    world.cut_all(
        [(m.name, "c1") for m in (leader, caller)] + [("c1", m.name) for m in (leader, caller)],
    )
    world.run(2000)
    for source in (caller.name, "c2"):
        call = village.ask(source, village.session("c1"))
        assert call.error is None
    assert other.kernel.calls.counters["calls_forwarded"] >= 2
    village.check()


def test_calls_under_way_end_when_the_connection_is_lost(village: Village) -> None:
    """They may have been delivered, and the answers come too late."""
    world = village.world
    one, other = world.up_members[:2]
    village.answer_after_ms = 500
    call = village.call(one.name, other.kernel.session.id)
    assert world.run(1000, lambda: bool(village.delivered))
    world.reset_links_of(one.name)
    village.finish(call, within_ms=300)
    assert isinstance(call.error, CallLost)
    world.run(1000)
    village.answer_after_ms = 0
    assert village.settle()
    assert village.ask(one.name, other.kernel.session.id).error is None
    village.check()


def test_an_application_that_does_not_answer_costs_its_caller_the_time_and_nobody_else(
    village: Village,
) -> None:
    """The call times out; nothing of it is left anywhere."""
    village.stalls.add("c2")
    call = village.ask("c1", village.session("c2"), patience_ms=700)
    assert isinstance(call.error, CallTimeout)
    assert village.ask("c1", village.session("n1")).error is None
    village.world.run(100)
    for process in village.world.processes.values():
        sizes = process.kernel.calls.sizes
        assert (sizes["pending"], sizes["forwards"], sizes["inbound"]) == (0, 0, 0)


def test_a_session_that_has_ended_is_called_in_vain(village: Village) -> None:
    """After a restart the process has another one; what was meant for the last is never delivered to it."""
    world = village.world
    before = {name: village.session(name) for name in ("n1", "c1")}
    world.processes["n1"].kill()
    world.processes["c1"].kill()
    world.run(500)
    village.serve(world.start_member("n1"))
    village.serve(world.start_client("c1"))
    assert village.settle()
    for name, session in before.items():
        for source in ("n2", "c2", name):
            call = village.ask(source, session)
            assert isinstance(call.error, ServiceUnreachable)
            assert village.ask(source, village.session(name)).error is None
    assert village.check()["answered"] == 6


def test_a_handler_may_come_and_go(village: Village) -> None:
    """Without one, callers are told so; the session need not end for it."""
    session = village.session("n2")
    village.world.processes["n2"].set_call_handler(None)
    village.world.run(100)
    for source in ("n1", "n2", "c1"):
        assert isinstance(village.ask(source, session).error, ServiceUnreachable)
    village.serve(village.world.processes["n2"])
    village.world.run(100)
    for source in ("n1", "n2", "c1"):
        assert village.ask(source, session).error is None


def test_a_process_that_leaves_takes_no_more_calls_and_its_own_end(village: Village) -> None:
    """New ones are refused with what was not done; what was sent may have been delivered."""
    world = village.world
    leaving = world.processes["c1"]
    session = village.session("c1")
    village.stalls.add("n1")
    under_way = village.call("c1", village.session("n1"), 60_000)
    world.run(50)
    leaving.leave()
    refused = village.call("c1", village.session("n1"))
    assert world.run(5000, lambda: not leaving.is_up)
    assert isinstance(refused.error, ClusterClosed)
    assert under_way.error is None  # its thread is woken by the driver's end: here the process just ended
    call = village.ask("n2", session)
    assert isinstance(call.error, ServiceUnreachable)
    village.check()


def test_who_takes_no_calls_sends_no_word_of_it() -> None:
    """A cluster without calls carries none of their messages, and wakes nobody for them."""
    with World(3) as world:
        world.start_all()
        world.start_client("c1")
        world.run(8000)
        for process in world.processes.values():
            calls = process.kernel.calls
            assert calls.next_ms == NEVER
            assert calls.sizes["ways"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_no_call_is_delivered_twice_or_denied_whatever_happens(seed: int) -> None:
    """Lost and late connections, damaged and repeated frames, crashes, pauses, cuts; when all is well, all is answered."""
    chance = random.Random(seed)
    network = NetworkProfile(
        duplicate_chance=0.01, replay_chance=0.01, corrupt_chance=0.01, slow_chance=0.05, slow_ms_max=200
    )
    with World(seed, network=network) as world:
        village = Village(world, clients=3)
        village.answer_after_ms = 20
        known = [village.session(name) for name in world.processes]
        clients = 3
        for _ in range(250):
            draw = chance.random()
            up = [p for p in world.processes.values() if p.is_up and not p.is_paused]
            if draw < 0.05:
                world.reset_some_link()
            elif draw < 0.07:
                victim = chance.choice(up)
                if isinstance(victim, ClientProcess) or len(world.up_members) == 3:
                    chance.choice([victim.kill, victim.crash])()
                    if isinstance(victim, ClientProcess):
                        clients += 1
                        village.serve(world.start_client(f"c{clients}"))
            elif draw < 0.10:
                for name in world.members:
                    if not world.processes[name].is_up:
                        member = world.try_start_member(name)
                        assert member is not None
                        village.serve(member)
            elif draw < 0.12:
                paused = chance.choice(up)
                paused.pause()
                world.after(chance.randint(50, 3000), paused.resume)
            elif draw < 0.14 and len(up) > 1:
                one, other = chance.sample([p.name for p in up], 2)
                world.cut(one, other)
                world.after(chance.randint(100, 3000), world.mend_all, [(one, other)])
            known += [p.kernel.session.id for p in up if p.kernel.session.id not in (0, *known)]
            for _ in range(3):
                village.call(chance.choice(up).name, chance.choice(known[-12:]), chance.randint(5, 3000))
            world.run(chance.randint(1, 150))
        for process in world.processes.values():
            process.resume()
        world.heal()
        for name in world.members:
            if not world.processes[name].is_up:
                village.serve(world.start_member(name))
        world.run(15_000)
        outcomes = village.check()
        assert outcomes["answered"] > 100
        assert outcomes["ServiceUnreachable"] > 10
        assert outcomes["CallLost"] > 0
        # Of the callers that are still there nobody waits, and nothing is kept for anybody.
        for process in world.processes.values():
            if process.is_up:
                sizes = process.kernel.calls.sizes
                assert (sizes["pending"], sizes["forwards"], sizes["inbound"]) == (0, 0, 0)
        assert village.settle()
        up = [p for p in world.processes.values() if p.is_up]
        for caller in up:
            for called in up:
                answered = False
                for _ in range(4):  # frames are still damaged: a call may be lost, and be made anew
                    answered = answered or village.ask(caller.name, called.kernel.session.id).error is None
                assert answered
        village.check()


def test_code_in_a_simulation_takes_calls_and_answers_from_its_own_threads() -> None:
    """The handler runs in the node's turn, what it hands on in the application's time."""
    sessions: list[int] = []

    def serve(cluster: coordlib.Cluster) -> None:
        driver = cluster._driver
        assert driver is not None
        inbox: queue.SimpleQueue[InboundCall] = queue.SimpleQueue()
        driver.set_call_handler(inbox.put)
        sessions.append(driver.view.session_id)
        while True:
            inbound = inbox.get()
            time.sleep(1)
            driver.answer(inbound, CallStatus.OK, b"to " + inbound.body)

    def ask(cluster: coordlib.Cluster) -> list[bytes]:
        answers: list[bytes] = []
        while len(answers) < 3:
            try:
                step = Step(
                    RequestKind.CALL, b"you", monotonic_ms() + 5000, target=sessions[0] if sessions else 1
                )
                answers.append(run(cluster._engine, yield_one(step)))
            except ServiceUnreachable:
                time.sleep(0.1)
        return answers

    def yield_one(step: Step) -> Generator[Step, bytes, bytes]:
        return (yield step)

    with Simulation(3) as sim:
        sim.start("n1", serve)
        asking = sim.start("n2", ask)
        sim.run_until(lambda: asking.is_done, seconds=60)
    assert asking.result == [b"to you"] * 3
