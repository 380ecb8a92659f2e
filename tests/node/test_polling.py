"""Several pieces of I/O on one thread: they wait for each other's files, and an interrupt leaves nothing half done."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from coordlib.node import polling
from coordlib.node.polling import READABLE, WRITABLE, Polled, Wait, poll, poll_all

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    for end in (left, right):
        end.setblocking(False)
    with left, right:
        yield left, right


@pytest.fixture(params=["poll", "select"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to wait."""
    if request.param == "select":
        monkeypatch.setattr(polling, "_HAS_POLL", False)


def receive(end: socket.socket) -> Polled[bytes]:
    yield Wait(end.fileno(), READABLE)
    return end.recv(100)


def send(end: socket.socket, data: bytes) -> Polled[None]:
    yield Wait(end.fileno(), WRITABLE)
    end.send(data)


@pytest.mark.usefixtures("how")
def test_they_go_on_when_their_files_are_ready(pair: Pair) -> None:
    """One waits for what the other sends: one after the other, they would wait for ever."""
    left, right = pair

    def answer() -> Polled[bytes]:
        question = yield from receive(right)
        yield from send(right, question.upper())
        return question

    def ask() -> Polled[bytes]:
        yield from send(left, b"a")
        return (yield from receive(left))

    assert poll_all([answer(), ask()]) == [(b"a", None), (b"A", None)]
    assert poll_all([]) == []


def test_each_has_its_own_outcome(pair: Pair) -> None:
    """What one raises is its outcome, before it has waited or after; the others go on."""
    left, right = pair

    def refuse() -> Polled[None]:
        raise ValueError("at once")
        yield

    def fail() -> Polled[None]:
        yield from receive(right)
        raise ValueError("later")

    outcomes = poll_all([refuse(), fail(), send(left, b"a")])
    assert [repr(error) for _, error in outcomes] == ["ValueError('at once')", "ValueError('later')", "None"]
    with pytest.raises(ValueError, match="at once"):
        poll(refuse())
    assert poll(send(left, b"b")) is None


def test_a_file_that_is_broken_is_ready(pair: Pair) -> None:
    """Whoever waits for it finds out by using it."""
    left, right = pair
    right.close()
    assert poll(receive(left)) == b""


def interrupted(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The next waits, so many, end by Ctrl-C."""
    ready, left = polling._ready, [times]

    def replaced(waits: Any, until: float | None) -> list[int]:
        if left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        return ready(waits, until)

    monkeypatch.setattr(polling, "_ready", replaced)


def test_an_interrupt_comes_out_when_all_have_ended(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is told, and may go on to leave its connection in a known state; those that do not mind, end there."""
    left, right = pair
    seen: list[Any] = []

    def careful() -> Polled[None]:
        try:
            yield Wait(right.fileno(), READABLE)
        except KeyboardInterrupt:
            left.send(b"end")
            seen.append((yield from receive(right)))

    interrupted(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        poll_all([careful(), receive(right)])
    assert seen == [b"end"]


def test_who_does_not_come_to_an_end_is_interrupted_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the user, or after some seconds."""
    _, right = pair
    seen: list[str] = []

    def stubborn() -> Polled[None]:
        for time in ("first", "second"):
            try:
                yield Wait(right.fileno(), READABLE)
            except KeyboardInterrupt:
                seen.append(time)

    interrupted(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        poll(stubborn())
    assert seen == ["first", "second"]
    interrupted(monkeypatch, 1)
    monkeypatch.setattr(polling, "INTERRUPTED_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        poll(stubborn())
    assert seen == ["first", "second"] * 2


def test_an_interrupt_while_one_runs_ends_that_one(pair: Pair) -> None:
    """The others come to their own end first."""
    left, right = pair
    seen: list[bytes] = []

    def runs() -> Polled[None]:
        left.send(b"a")
        raise KeyboardInterrupt
        yield

    def waits() -> Polled[None]:
        seen.append((yield from receive(right)))

    with pytest.raises(KeyboardInterrupt):
        poll_all([runs(), waits()])
    assert seen == [b"a"]
