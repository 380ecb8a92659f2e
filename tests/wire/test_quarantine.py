"""Counting what peers do wrong, holding off who keeps failing, and saying it once."""

from __future__ import annotations

from coordlib.wire.quarantine import Misbehaviour, SayOnce


def test_ten_failed_authentications_in_ten_seconds_begin_a_quarantine_of_thirty() -> None:
    """The tenth begins it; it ends by itself."""
    tracker = Misbehaviour()
    started = [tracker.record("a", "auth-failed", 1000 * n) for n in range(10)]
    assert started == [False] * 9 + [True]
    assert tracker.is_quarantined("a", 9_000)
    assert tracker.is_quarantined("a", 38_999)
    assert not tracker.is_quarantined("a", 39_000)
    assert not tracker.is_quarantined("b", 9_000)


def test_ten_failures_in_more_than_ten_seconds_do_not() -> None:
    """The window slides."""
    tracker = Misbehaviour()
    assert not any(tracker.record("a", "auth-failed", 1112 * n) for n in range(100))


def test_failures_of_different_peers_are_not_added_up() -> None:
    """One bad peer does not silence the others."""
    tracker = Misbehaviour()
    assert not any(tracker.record(f"peer-{n}", "auth-failed", 0) for n in range(50))


def test_other_faults_are_counted_but_begin_no_quarantine() -> None:
    """A replay or a malformed frame can come from the network; a wrong secret has its own answer."""
    tracker = Misbehaviour()
    for code in ("replayed", "malformed", "wrong-secret", "malformed-authenticated"):
        assert not any(tracker.record("a", code, 0) for _ in range(20))
    assert tracker.totals["replayed"] == 20
    assert tracker.by_peer["a"]["malformed"] == 20


def test_a_second_quarantine_needs_ten_new_failures() -> None:
    """What led to the first is not counted again, nor what comes during it."""
    tracker = Misbehaviour()
    for _ in range(15):
        tracker.record("a", "auth-failed", 0)
    assert tracker.totals["auth-failed"] == 15
    started = [tracker.record("a", "auth-failed", 30_000) for _ in range(10)]
    assert started == [False] * 9 + [True]


def test_a_peer_that_proves_itself_is_forgiven() -> None:
    """Failures before a good handshake no longer count."""
    tracker = Misbehaviour()
    for _ in range(9):
        tracker.record("a", "auth-failed", 0)
    tracker.forgive("a")
    assert not tracker.record("a", "auth-failed", 0)
    for _ in range(10):
        tracker.record("a", "auth-failed", 0)
    tracker.forgive("a")
    assert not tracker.is_quarantined("a", 0)
    tracker.forgive("never heard of")


def test_the_tracker_does_not_grow_with_the_number_of_peers_or_codes() -> None:
    """The peer heard of least recently goes, with everything about it."""
    tracker = Misbehaviour(peers_max=3)
    for _ in range(10):
        tracker.record("first", "auth-failed", 0)
    for n in range(1000):
        tracker.record("kept", "malformed", 0)
        tracker.record(f"peer-{n}", f"code-{n}", 0)
    assert len(tracker.by_peer) == 3
    assert tracker.by_peer["kept"]["malformed"] == 1000
    assert not tracker.is_quarantined("first", 0)
    assert len(tracker.totals) <= 257
    assert tracker.totals.total() == 2010


def test_a_thing_is_said_at_once_and_then_once_a_minute_with_its_number() -> None:
    """The first occurrence is never delayed."""
    once = SayOnce()
    assert once.say("k", "bad frame from 10.0.0.1", 5_000) == "bad frame from 10.0.0.1"
    assert [once.say("k", "bad frame from 10.0.0.1", 5_000 + n) for n in range(1, 1000)] == [None] * 999
    assert once.say("k", "bad frame from 10.0.0.1", 65_000) == "bad frame from 10.0.0.1 (1000 times in 60 s)"
    assert once.say("k", "bad frame from 10.0.0.1", 65_001) is None
    assert once.say("other", "another thing", 65_001) == "another thing"


def test_what_happens_once_a_minute_is_said_without_a_number() -> None:
    """Nothing was left unsaid."""
    once = SayOnce()
    assert [once.say("k", "text", 60_000 * n) for n in range(3)] == ["text"] * 3


def test_the_memory_of_what_was_said_is_bounded() -> None:
    """The key said least recently is forgotten."""
    once = SayOnce(keys_max=2)
    for key in ("a", "b", "c"):
        assert once.say(key, key, 0) == key
    assert once.say("c", "c", 0) is None
    assert once.say("a", "a", 0) == "a"
