"""How operations are run: what they join, where they pause, and what goes on in the background."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, cast

import pytest

import coordlib
from coordlib.errors import ClusterClosed, CommitTimeout, NoQuorum
from coordlib.node import operations
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import (
    FOREVER_MS,
    Do,
    Engine,
    Failure,
    OpGen,
    Step,
    Success,
    Together,
    arun,
    run,
    start,
)
from coordlib.node.polling import READABLE, Polled, Wait
from coordlib.node.session import Call
from coordlib.node.waiting import LoopWatch, wake_all
from coordlib.wire.messages import RequestKind


class Scripted:
    """An engine that keeps what is submitted until the test answers it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.calls: list[Call] = []
        self.watched = LoopWatch()

    def submit(self, call: Call) -> None:
        self.calls.append(call)

    def watch(self, loop: asyncio.AbstractEventLoop) -> LoopWatch:
        return self.watched

    def answer(self, reply: bytes | coordlib.CoordError) -> Call:
        call = self.calls.pop(0)
        if isinstance(reply, bytes):
            call.reply = reply
        else:
            call.error = reply
        wake_all([call])
        return call


@pytest.fixture
def engine() -> Scripted:
    return Scripted()


def ask(body: bytes) -> Step:
    return Step(RequestKind.COMMAND, body, FOREVER_MS)


def test_an_operation_in_the_background_goes_on_where_its_calls_end(engine: Scripted) -> None:
    """Answers and errors come into it one after the other; `start` has returned meanwhile."""
    seen: list[Any] = []

    def operation() -> OpGen[None]:
        seen.append((yield ask(b"1")))
        try:
            yield ask(b"2")
        except CommitTimeout as error:
            seen.append(error)
        seen.append("end")

    start(cast(Engine, engine), operation())
    assert seen == []
    assert engine.calls[0].is_detached
    engine.answer(b"one")
    assert seen == [b"one"]
    error = CommitTimeout("too late")
    engine.answer(error)
    assert seen == [b"one", error, "end"]
    assert engine.calls == []


def test_an_operation_in_the_background_hears_of_the_end_of_its_node() -> None:
    """Also when it asks for the first time of a node that has stopped."""
    heard: list[BaseException] = []

    def operation() -> OpGen[None]:
        try:
            yield ask(b"")
        except ClusterClosed as error:
            heard.append(error)

    cluster = coordlib.local()
    cluster.start()
    engine = cluster._engine
    cluster.close()
    start(engine, operation())
    assert len(heard) == 1


def join(waiting: SimpleQueue[Call], deadline_ms: int) -> OpGen[str]:
    step = Step.join(waiting.put, deadline_ms)
    try:
        yield step
    except NoQuorum:
        return "no answer"
    return "answered"


def test_a_thread_waits_for_what_another_has_asked_for(engine: Scripted) -> None:
    """Nothing is sent; whoever was given the call ends it; the deadline ends it otherwise."""
    waiting: SimpleQueue[Call] = SimpleQueue()
    results: list[str] = []
    thread = threading.Thread(
        target=lambda: results.append(run(cast(Engine, engine), join(waiting, monotonic_ms() + 60_000)))
    )
    thread.start()
    call = waiting.get(timeout=30)
    call.reply = b""
    wake_all([call])
    thread.join()
    assert results == ["answered"]
    assert run(cast(Engine, engine), join(waiting, monotonic_ms())) == "no answer"
    assert engine.calls == []


def test_a_task_waits_for_what_another_has_asked_for(engine: Scripted) -> None:
    """The same, and the event loop goes on meanwhile."""

    async def check() -> None:
        waiting: SimpleQueue[Call] = SimpleQueue()
        task = asyncio.create_task(arun(cast(Engine, engine), join(waiting, monotonic_ms() + 60_000)))
        while waiting.empty():
            await asyncio.sleep(0)
        call = waiting.get()
        call.reply = b""
        wake_all([call])
        assert await task == "answered"
        assert await arun(cast(Engine, engine), join(waiting, monotonic_ms())) == "no answer"

    asyncio.run(check())
    assert engine.calls == []


def pausing(seen: list[str]) -> OpGen[str]:
    try:
        yield Step.pause(0.001)
    except BaseException as error:
        seen.append(type(error).__name__)
        yield Step(RequestKind.COMMAND, b"", FOREVER_MS, is_detached=True)
        raise
    return "went on"


def test_a_pause_ends_by_itself(engine: Scripted) -> None:
    """On a thread and in a task; nothing is sent."""
    assert run(cast(Engine, engine), pausing([])) == "went on"
    assert asyncio.run(arun(cast(Engine, engine), pausing([]))) == "went on"
    assert engine.calls == []


def test_whoever_is_interrupted_in_a_pause_cleans_up(
    engine: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C on a thread, cancellation in a task: the exception comes out, after what was left to do."""
    seen: list[str] = []

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coordlib.node.operations.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(cast(Engine, engine), pausing(seen))

    async def cancelled() -> None:
        task = asyncio.create_task(arun(cast(Engine, engine), pausing(seen)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert seen == ["KeyboardInterrupt", "CancelledError"]
    assert [call.is_detached for call in engine.calls] == [True, True]


class Answering(Scripted):
    """Answers as soon as it is asked, with what was asked in capitals; "bad" is refused."""

    def submit(self, call: Call) -> None:
        super().submit(call)
        if not call.is_detached:
            self.answer(NoQuorum("no") if call.body == b"bad" else call.body.upper())


def several(operations: list[Any]) -> OpGen[list[Any]]:
    outcomes: list[Any] = yield Together(operations)
    return outcomes


def boom() -> None:
    raise ValueError("boom")


def on(engine: Scripted, how: str, operation: OpGen[Any]) -> Any:
    if how == "thread":
        return run(cast(Engine, engine), operation)
    return asyncio.run(arun(cast(Engine, engine), operation))


HOWS = pytest.mark.parametrize("how", ["thread", "task"])


@HOWS
def test_several_end_together_each_with_its_own_outcome(how: str) -> None:
    """Requests and the application's own I/O, in the order given; a failure is an outcome like others."""
    outcomes = on(
        Answering(), how, several([ask(b"a"), Do(lambda: 7), ask(b"bad"), Do(boom), Do(threading.get_ident)])
    )
    assert [outcomes[0], outcomes[1]] == [Success(b"A"), Success(7)]
    assert isinstance(outcomes[2], Failure)
    assert isinstance(outcomes[2].error, NoQuorum)
    assert isinstance(outcomes[3], Failure)
    assert isinstance(outcomes[3].error, ValueError)
    assert outcomes[4].value != threading.get_ident()
    assert on(Answering(), how, several([])) == []


@HOWS
def test_several_run_at_the_same_time(how: str) -> None:
    """Each waits for the others: one after the other they would wait for ever."""
    barrier = threading.Barrier(3)
    outcomes = on(Answering(), how, several([Do(lambda: barrier.wait(30)) for _ in range(3)]))
    assert sorted(outcome.value for outcome in outcomes) == [0, 1, 2]


@HOWS
def test_one_alone_returns_or_raises(how: str) -> None:
    """What it returns is sent into the operation, what it raises is thrown into it."""

    def operation() -> OpGen[list[Any]]:
        seen: list[Any] = [(yield Do(lambda: 5))]
        try:
            yield Do(boom)
        except ValueError as error:
            seen.append(str(error))
        return seen

    assert on(Answering(), how, operation()) == [5, "boom"]


def test_in_a_task_a_coroutine_is_preferred() -> None:
    """It runs in the loop; without one, the call has a thread of its own."""

    async def here() -> str:
        return "coroutine"

    do = Do(lambda: "thread", here)
    assert on(Answering(), "task", several([do])) == [Success("coroutine")]
    assert on(Answering(), "thread", several([do])) == [Success("thread")]


def test_what_can_be_polled_shares_the_callers_thread(engine: Scripted) -> None:
    """What blocks beside it has a thread of its own; one alone blocks where it is asked for."""
    here = threading.get_ident()
    left, right = socket.socketpair()

    def polled() -> Polled[int]:
        yield Wait(left.fileno(), READABLE)
        left.recv(1)
        return threading.get_ident()

    def fails() -> Polled[None]:
        raise ValueError("boom")
        yield

    def wakes() -> int:
        right.send(b"ab")
        return threading.get_ident()

    with left, right:
        kinds = [Do(boom, polled=polled), Do(wakes), Do(boom, polled=fails), Do(boom, polled=polled)]
        would_block = Do(threading.get_ident, polled=lambda: None)
        first, other, failed, last, blocked = run(cast(Engine, engine), several([*kinds, would_block]))
    assert first.value == last.value == here
    assert here not in (other.value, blocked.value)
    assert isinstance(failed, Failure)
    alone = Do(threading.get_ident, polled=fails)
    assert run(cast(Engine, engine), several([alone])) == [Success(here)]


def test_an_interrupt_waits_for_what_is_under_way(engine: Scripted) -> None:
    """Whoever cleans up meets no connection in use; then the interrupt comes out."""
    seen: list[str] = []
    has_begun, may_end = threading.Event(), threading.Event()

    def other() -> None:
        has_begun.set()
        may_end.wait(30)
        seen.append("ended")

    def interrupted() -> None:
        has_begun.wait(30)
        may_end.set()
        raise KeyboardInterrupt

    def operation() -> OpGen[None]:
        try:
            yield Together([Do(interrupted), Do(other)])
        except KeyboardInterrupt:
            seen.append((yield Do(lambda: "cleaned")))
            raise

    with pytest.raises(KeyboardInterrupt):
        run(cast(Engine, engine), operation())
    assert seen == ["ended", "cleaned"]


def test_an_interrupt_while_several_are_begun_waits_for_those_that_were(
    engine: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is done next would overtake them: a rollback the vote that it is for."""
    begin, interrupted, ended = operations._helpers.submit, threading.Event(), []

    def work() -> None:
        interrupted.wait(30)
        ended.append(1)

    def submit(work: Callable[[], None]) -> threading.Lock:
        if submitted:
            interrupted.set()
            raise KeyboardInterrupt
        submitted.append(work)
        return begin(work)

    submitted: list[Callable[[], None]] = []
    monkeypatch.setattr(operations._helpers, "submit", submit)

    def operation() -> OpGen[Any]:
        return (yield Together([Do(lambda: None), Do(work), Do(work)]))

    with pytest.raises(KeyboardInterrupt):
        run(cast(Engine, engine), operation())
    assert ended == [1]


def test_a_cancelled_task_waits_for_threads_and_cancels_coroutines(engine: Scripted) -> None:
    """Both have ended when the operation hears of it."""
    seen: list[str] = []
    has_begun, may_end = threading.Event(), threading.Event()

    def thread() -> None:
        has_begun.set()
        may_end.wait(30)
        seen.append("thread")

    async def coroutine() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("coroutine")
            may_end.set()

    def operation() -> OpGen[None]:
        try:
            yield Together([Do(thread), Do(boom, coroutine), ask(b"")])
        except asyncio.CancelledError:
            seen.append((yield Do(lambda: "cleaned")))
            raise

    async def check() -> None:
        task = asyncio.create_task(arun(cast(Engine, engine), operation()))
        while not has_begun.is_set():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(check())
    assert seen == ["coroutine", "thread", "cleaned"]


def test_a_request_among_several_whose_node_is_stalled_is_given_up(engine: Scripted) -> None:
    """A command may have taken effect, and its outcome says so; nobody waits for ever."""
    late = Step(RequestKind.COMMAND, b"", monotonic_ms())
    (outcome,) = run(cast(Engine, engine), several([late]))
    assert isinstance(outcome.error, CommitTimeout)
    (outcome,) = asyncio.run(
        arun(cast(Engine, engine), several([Step(RequestKind.QUERY, b"", monotonic_ms())]))
    )
    assert isinstance(outcome.error, NoQuorum)
