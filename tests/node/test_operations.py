"""How operations are run: what they join, where they pause, and what goes on in the background."""

from __future__ import annotations

import asyncio
import os
import threading
from queue import SimpleQueue
from typing import Any, cast

import pytest

import coordlib
from coordlib.errors import ClusterClosed, CommitTimeout, NoQuorum
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import FOREVER_MS, Engine, OpGen, Step, arun, run, start
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
