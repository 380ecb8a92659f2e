"""Bad input at the connections: dropped, counted, told once in words, and nothing ends because of it."""

from __future__ import annotations

import os
from typing import Any, cast

import pytest

from coordlib.node.kernel import MemberKernel
from coordlib.node.links import Links
from coordlib.raft.messages import TimeoutNow
from coordlib.transport.base import (
    ConnectionDown,
    ConnectionUp,
    FrameReceived,
    HandshakeFailed,
    Lane,
    Transport,
)
from coordlib.wire.channel import ChannelIdentity, Established, HelloAccepted, Initiator, Opened, Responder
from coordlib.wire.keys import ClusterKeys
from coordlib.wire.messages import Requests, Serving, StatusQuery, StatusReply
from coordlib.wire.schema import BATCH_BYTES_MAX, decode_messages, encode_messages

KEYS = ClusterKeys.from_secrets(("a secret that is long enough for these tests",), "shop")
OTHER_KEYS = ClusterKeys.from_secrets(("another secret that is long enough as well",), "shop")


class Wires:
    """A transport that remembers what was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, bytes]] = []
        self.replied: list[tuple[bytes, bytes]] = []
        self.is_full = False

    def connect(self, endpoint: str, lane: str = Lane.CONTROL) -> int:
        return 1

    def send(self, connection: int, frame: bytes) -> bool:
        self.sent.append((connection, frame))
        return not self.is_full

    def reply(self, route: bytes, frame: bytes) -> bool:
        self.replied.append((route, frame))
        return not self.is_full

    def drop_route(self, route: bytes) -> None:
        """It comes again, or not."""


class Ears:
    """A kernel that hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, Any]] = []
        self.calls: list[tuple[str, Any]] = []
        self.unsent: list[tuple[int, Any]] = []

    def peer_messages(self, name: str, messages: Any, now: int) -> None:
        self.heard += [(name, message) for _, message in messages]

    def client_messages(self, route: bytes, messages: Any, now: int) -> None:
        self.heard += [(route, message) for _, message in messages]

    def peer_up(self, name: str, incarnation: int, now: int) -> None:
        self.calls.append(("up", name))

    def peer_down(self, name: str) -> None:
        self.calls.append(("down", name))

    def peer_incarnation(self, name: str, incarnation: int) -> None:
        self.calls.append(("incarnation", incarnation))

    def client_attached(self, route: bytes, name: str) -> None:
        self.calls.append(("attached", name))

    def client_gone(self, route: bytes, unsent: Any) -> None:
        self.unsent += unsent
        self.calls.append(("gone", route))


def identity(node: str, incarnation: int = 1, *, is_member: bool = True) -> ChannelIdentity:
    return ChannelIdentity("shop", node, incarnation, is_member, b"d" * 16 if is_member else b"")


class Bench:
    """One node's links, with the test at the other ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The links ask what kind of kernel they serve.
        monkeypatch.setattr("coordlib.node.links.MemberKernel", Ears)
        self.wires, self.ears, self.now = Wires(), Ears(), 1000
        self.links = Links(
            cast(Transport, self.wires),
            KEYS,
            identity("n1"),
            members=("n1", "n2", "n3"),
            random_bytes=os.urandom,
        )

    @property
    def kernel(self) -> MemberKernel:
        return cast(MemberKernel, self.ears)

    def receive(self, *events: Any) -> None:
        self.links.receive(events, self.kernel, self.now)

    def arrive(self, route: bytes, frame: bytes) -> bytes:
        """A frame on a route; what was answered, if anything."""
        before = len(self.wires.replied)
        self.receive(FrameReceived(0, route, frame))
        return self.wires.replied[-1][1] if len(self.wires.replied) > before else b""

    def greet(self, route: bytes, peer: ChannelIdentity, keys: ClusterKeys = KEYS) -> Initiator:
        """The other end of an inbound connection, established."""
        initiator = Initiator(keys, peer, expected_peer="n1", random_bytes=os.urandom)
        welcome = self.arrive(route, initiator.hello())
        assert isinstance(initiator.receive(welcome), Established)
        return initiator

    @property
    def warnings(self) -> list[str]:
        return [event.message for event in self.links.events]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


QUERY = encode_messages([(0, StatusQuery(1))])


def test_messages_of_members_and_clients_come_through(bench: Bench) -> None:
    """Each under the name that was authenticated."""
    bench.arrive(b"r1", bench.greet(b"r1", identity("n2")).seal(QUERY))
    bench.arrive(b"r2", bench.greet(b"r2", identity("c", is_member=False)).seal(QUERY))
    assert bench.ears.heard == [("n2", StatusQuery(1)), (b"r2", StatusQuery(1))]
    assert bench.ears.calls == [("incarnation", 1), ("attached", "c")]
    assert bench.warnings == []


def test_garbage_is_dropped_counted_and_said_once(bench: Bench) -> None:
    """A thousand bad frames are not a thousand lines; what is good still comes through."""
    good = bench.greet(b"r1", identity("n2"))
    frames = [b"", b"x", os.urandom(100), b"\xc1\x01\x83" + os.urandom(50), b"\xc1\x01\x84" + os.urandom(50)]
    for _ in range(200):
        for frame in frames:
            bench.arrive(b"bad", frame)
    assert len(bench.warnings) <= 10
    assert bench.links.counters["frames_received"] == 1001
    bench.arrive(b"r1", good.seal(QUERY))
    assert bench.ears.heard == [("n2", StatusQuery(1))]


def test_a_sealed_message_that_makes_no_sense_is_dropped(bench: Bench) -> None:
    """Also of an authenticated peer; the next one is heard."""
    peer = bench.greet(b"r1", identity("n2"))
    bench.arrive(b"r1", peer.seal(QUERY))
    for plaintext in (b"", b"\xff", b"\x81\x80", encode_messages([(0, Requests(()))])[:-1]):
        bench.arrive(b"r1", peer.seal(plaintext))
    bench.arrive(b"r1", peer.seal(QUERY))
    assert bench.ears.heard == [("n2", StatusQuery(1))] * 2
    assert len(bench.warnings) == 1


def test_a_replayed_frame_is_dropped(bench: Bench) -> None:
    """Once is once."""
    frame = bench.greet(b"r1", identity("n2")).seal(QUERY)
    bench.arrive(b"r1", frame)
    bench.arrive(b"r1", frame)
    bench.arrive(b"r2", frame)
    assert bench.ears.heard == [("n2", StatusQuery(1))]
    assert len(bench.warnings) >= 1


def test_another_secret_is_told_in_words(bench: Bench) -> None:
    """To us in our log, and to the other by an answer that it can log."""
    stranger = Initiator(OTHER_KEYS, identity("n2"), expected_peer="n1", random_bytes=os.urandom)
    answer = bench.arrive(b"r1", stranger.hello())
    assert "secret" in bench.warnings[0]
    assert "secret" in getattr(stranger.receive(answer), "message", "")
    assert bench.ears.heard == []


@pytest.mark.parametrize(
    ("name", "words"), [("n1", "this node's own name"), ("n9", "not in our members list")]
)
def test_a_member_that_is_none_of_ours_is_not_heard(bench: Bench, name: str, words: str) -> None:
    """A second node under our own name, or one that we were not given."""
    peer = bench.greet(b"r1", identity(name))
    for _ in range(50):
        bench.arrive(b"r1", peer.seal(QUERY))
    assert bench.ears.heard == []
    assert len(bench.warnings) == 1
    assert words in bench.warnings[0]
    assert bench.links.counters["not-a-member"] == 50


def test_what_an_earlier_run_sent_is_dropped(bench: Bench) -> None:
    """Late frames of a process that is gone."""
    old = bench.greet(b"r1", identity("n2", 1))
    late = [old.seal(QUERY) for _ in range(3)]
    bench.arrive(b"r1", late[0])
    bench.arrive(b"r2", bench.greet(b"r2", identity("n2", 2)).seal(QUERY))
    bench.ears.heard.clear()
    bench.arrive(b"r1", late[1])
    assert bench.ears.heard == []
    assert bench.links.counters["stale-incarnation"] == 1


def test_an_earlier_run_whose_first_message_comes_last_is_not_taken_for_the_newest(bench: Bench) -> None:
    """The order across connections is not the order in which processes lived; that of their greetings is."""
    old = bench.greet(b"r1", identity("n2", 1))
    new = bench.greet(b"r2", identity("n2", 2))
    bench.arrive(b"r2", new.seal(QUERY))
    bench.arrive(b"r1", old.seal(QUERY))
    bench.arrive(b"r2", new.seal(QUERY))
    bulk = bench.greet(b"r3", identity("n2", 2))
    bench.arrive(b"r3", bulk.seal(QUERY))
    assert bench.ears.heard == [("n2", StatusQuery(1))] * 3
    assert bench.ears.calls == [("incarnation", 2), ("incarnation", 2)]
    assert bench.links.counters["stale-incarnation"] == 1
    last = bench.greet(b"r4", identity("n2", 3))
    bench.arrive(b"r4", last.seal(QUERY))
    assert bench.ears.calls[-1] == ("incarnation", 3)


def test_a_client_that_does_not_read_is_forgotten(bench: Bench) -> None:
    """It greets again when it does."""
    client = bench.greet(b"r1", identity("c", is_member=False))
    bench.arrive(b"r1", client.seal(QUERY))
    bench.wires.is_full = True
    assert not bench.links.reply(b"r1", [(0, StatusQuery(1))], bench.kernel)
    assert bench.ears.calls[-1] == ("gone", b"r1")
    assert bench.ears.unsent == [(0, StatusQuery(1))]
    assert not bench.links.reply(b"never seen", [(0, StatusQuery(1))], bench.kernel)


def test_a_refused_handshake_is_a_problem_in_words(bench: Bench) -> None:
    """Kept for status and for the error of a start that fails, until the connection is made."""
    bench.links.connect("tcp://10.0.0.2:7400", "n2")
    for _ in range(100):
        bench.receive(HandshakeFailed(1, "", "wrong-key"), HandshakeFailed(0, "10.0.0.9", "wrong-key"))
    assert "COORDLIB_SECRET" in bench.links.problems["n2"]
    assert len(bench.warnings) == 2
    assert any("10.0.0.9" in text for text in bench.warnings)
    bench.receive(ConnectionUp(1))
    responder = Responder(KEYS, identity("n2"), random_bytes=os.urandom)
    accepted = responder.receive(b"us", bench.wires.sent[-1][1])
    assert isinstance(accepted, HelloAccepted)
    bench.receive(FrameReceived(1, b"", accepted.reply_frame))
    assert bench.links.problems == {}
    assert bench.ears.calls == [("up", "n2")]
    assert bench.links.send("n2", [(0, StatusQuery(1))])
    assert not bench.links.send("n3", [(0, StatusQuery(1))])


def test_an_unanswered_hello_is_repeated(bench: Bench) -> None:
    """About once a second."""
    bench.links.connect("tcp://10.0.0.2:7400", "n2")
    bench.receive(ConnectionUp(1))
    for _ in range(40):
        bench.now += 100
        bench.links.tick(bench.now)
    assert 3 <= len(bench.wires.sent) <= 5


def connected(bench: Bench) -> Responder:
    """A member that our connection was established to."""
    bench.links.connect("tcp://10.0.0.2:7400", "n2")
    bench.receive(ConnectionUp(1))
    responder = Responder(KEYS, identity("n2"), random_bytes=os.urandom)
    accepted = responder.receive(b"us", bench.wires.sent[-1][1])
    assert isinstance(accepted, HelloAccepted)
    bench.receive(FrameReceived(1, b"", accepted.reply_frame))
    bench.wires.sent.clear()
    return responder


def test_a_welcome_read_after_its_connection_was_lost_establishes_nothing(bench: Bench) -> None:
    """The transport tells of the loss before it has handed over the last frames; the next greeting is for the next."""
    bench.links.connect("tcp://10.0.0.2:7400", "n2")
    bench.receive(ConnectionUp(1))
    responder = Responder(KEYS, identity("n2"), random_bytes=os.urandom)
    accepted = responder.receive(b"us", bench.wires.sent[-1][1])
    assert isinstance(accepted, HelloAccepted)
    bench.receive(ConnectionDown(1), FrameReceived(1, b"", accepted.reply_frame))
    assert not bench.links.send("n2", [(0, StatusQuery(1))])
    bench.receive(ConnectionUp(1))
    assert not bench.links.send("n2", [(0, StatusQuery(1))])
    assert bench.ears.calls == []


def test_a_connection_that_comes_up_anew_without_a_word_of_its_loss_starts_over(bench: Bench) -> None:
    """Nothing is sent on the session that the new greeting has forgotten."""
    connected(bench)
    bench.receive(ConnectionUp(1))
    assert bench.ears.calls == [("up", "n2"), ("down", "n2")]
    assert not bench.links.send("n2", [(0, StatusQuery(1))])


def test_what_did_leave_before_a_client_was_given_up_is_not_called_unsent(bench: Bench) -> None:
    """Of messages that leave in several frames, those of the first may arrive."""
    bench.arrive(b"r1", bench.greet(b"r1", identity("c", is_member=False)).seal(QUERY))
    take = bench.wires.reply

    def reply(route: bytes, frame: bytes) -> bool:
        is_taken = take(route, frame)
        bench.wires.is_full = True
        return is_taken

    bench.wires.reply = reply  # type: ignore[method-assign]  # full after one more frame
    assert not bench.links.reply(b"r1", MANY, bench.kernel)
    assert 0 < len(bench.ears.unsent) < len(MANY)
    assert bench.ears.unsent == MANY[-len(bench.ears.unsent) :]


TOO_LARGE = StatusReply(1, bytes(BATCH_BYTES_MAX + 1))
MANY = [(0, StatusReply(number, bytes(BATCH_BYTES_MAX // 3))) for number in range(4)]


def test_a_message_that_no_frame_can_hold_stops_nobody(bench: Bench) -> None:
    """It is counted, and what comes after it goes out; a client that was to get one stays attached."""
    connected(bench)
    bench.arrive(b"r1", bench.greet(b"r1", identity("c", is_member=False)).seal(QUERY))
    bench.wires.replied.clear()
    assert not bench.links.send("n2", [(0, TOO_LARGE)])
    assert not bench.links.reply(b"r1", [(0, TOO_LARGE)], bench.kernel)
    assert (bench.wires.sent, bench.wires.replied) == ([], [])
    assert bench.links.counters["unsendable"] == 2
    assert ("gone", b"r1") not in bench.ears.calls
    assert bench.links.send("n2", [(0, StatusQuery(1))])
    assert bench.links.reply(b"r1", [(0, StatusQuery(1))], bench.kernel)


def test_messages_too_large_together_leave_in_several_frames(bench: Bench) -> None:
    """In their order, to members as to clients."""
    responder = connected(bench)
    client = bench.greet(b"r1", identity("c", is_member=False))
    bench.arrive(b"r1", client.seal(QUERY))
    bench.wires.replied.clear()
    assert bench.links.send("n2", MANY)
    assert bench.links.reply(b"r1", MANY, bench.kernel)
    received: list[Any] = []
    for _, frame in bench.wires.sent:
        opened = responder.receive(b"us", frame)
        assert isinstance(opened, Opened)
        received += decode_messages(opened.plaintext)
    assert received == MANY
    received.clear()
    for _, frame in bench.wires.replied:
        answer = client.receive(frame)
        assert isinstance(answer, Opened)
        received += decode_messages(answer.plaintext)
    assert received == MANY
    assert len(bench.wires.sent) == len(bench.wires.replied) > 1


def test_a_message_with_the_fields_of_the_last_one_is_not_taken_for_it(bench: Bench) -> None:
    """What was encoded last is kept for the next follower; another kind of message may have the same fields."""
    responder = connected(bench)
    sent = [Serving(7), TimeoutNow(7), Serving(7)]
    received: list[Any] = []
    for message in sent:
        assert bench.links.send("n2", [(0, message)])
    for _, frame in bench.wires.sent:
        opened = responder.receive(b"us", frame)
        assert isinstance(opened, Opened)
        received += decode_messages(opened.plaintext)
    assert [type(message) for _, message in received] == [Serving, TimeoutNow, Serving]
