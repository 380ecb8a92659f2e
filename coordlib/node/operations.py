"""Operations as generators, and the two ways to run them: on a thread, and in a task.

An operation yields steps and receives their replies; it knows neither threads nor tasks nor what is below.
All clean-up is in the generator, once: when its caller gives up (a timeout, Ctrl-C, a cancelled task), the
exception is thrown into it, and what it still yields then must be `detached` steps, for which nobody waits; or,
where its own I/O must not be left half done, a `Do` or `Together` that ends by itself.
An operation that nobody waits for at all is started, and goes on where its calls end.
"""

from __future__ import annotations

import asyncio
import functools
import os
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any, ClassVar, Final, NamedTuple, Protocol, TypeAlias, TypeVar

from coordlib.errors import (
    CallTimeout,
    ClusterClosed,
    CommitTimeout,
    CoordError,
    ForkedError,
    NoQuorum,
    NotStarted,
)
from coordlib.node.clock import monotonic_ms
from coordlib.node.polling import Polled, poll_all
from coordlib.node.session import Call, SessionView
from coordlib.node.waiting import AsyncCall, BackgroundCall, LoopWatch, ThreadCall
from coordlib.wire.messages import RequestKind

__all__ = [
    "Do",
    "Engine",
    "Failure",
    "OpGen",
    "Outcome",
    "Step",
    "Success",
    "Together",
    "arun",
    "run",
    "start",
]

T = TypeVar("T")
GRACE_SECONDS: Final = 0.25
HELPER_IDLE_SECONDS: Final = 1.0
FOREVER_MS: Final = 1 << 62


class Step:
    """One request of an operation. After it, `sequence` and `view` tell under which identity it went."""

    __slots__ = (
        "body",
        "call",
        "deadline_ms",
        "is_detached",
        "joins",
        "kind",
        "pause_seconds",
        "sequence",
        "target",
        "view",
        "withdraws",
    )

    def __init__(
        self,
        kind: int,
        body: bytes,
        deadline_ms: int,
        *,
        sequence: int = 0,
        view: SessionView | None = None,
        is_detached: bool = False,
        withdraws: tuple[Call, Callable[[int], bytes]] | None = None,
        target: int = 0,
    ) -> None:
        self.kind = kind
        self.body = body
        self.deadline_ms = deadline_ms
        self.sequence = sequence
        self.view = view
        self.is_detached = is_detached
        self.withdraws = withdraws
        self.target = target  # of a CALL: the session of the application that is called
        self.call: Call | None = None
        self.joins: Callable[[Call], None] | None = None
        self.pause_seconds = 0.0

    @classmethod
    def join(cls, add: Callable[[Call], None], deadline_ms: int) -> Step:
        """
        No request: wait for what others have asked for. Whoever is given the call by `add` ends and wakes it.

        When the deadline has passed, NoQuorum is thrown in instead.
        """
        step = cls(RequestKind.QUERY, b"", deadline_ms)
        step.joins = add
        return step

    @classmethod
    def pause(cls, seconds: float) -> Step:
        """No request: go on after so many seconds, more than 0."""
        step = cls(RequestKind.QUERY, b"", FOREVER_MS)
        step.pause_seconds = seconds
        return step

    @classmethod
    def withdraw(cls, step: Step, build: Callable[[int], bytes]) -> Step:
        """Undo a command step that may or may not have been sent: `build` makes the command from its sequence."""
        assert step.call is not None
        return cls(RequestKind.COMMAND, b"", FOREVER_MS, is_detached=True, withdraws=(step.call, build))


class Do:
    """
    The application's own I/O, of a database for example. The operation receives what it returns.

    Args:
        call: Blocks, but not for ever: nobody who gives up leaves before it has ended.
        acall: The same as a coroutine, where that is how the I/O is done; cancelled when its task is.
        polled: The same as `call` without blocking: several are run at once on the thread that asks for them. None: it
            would block this time.
    """

    __slots__ = ("acall", "call", "polled")

    is_detached: ClassVar[bool] = False

    def __init__(
        self,
        call: Callable[[], Any],
        acall: Callable[[], Awaitable[Any]] | None = None,
        polled: Callable[[], Polled[Any] | None] | None = None,
    ) -> None:
        self.call = call
        self.acall = acall
        self.polled = polled


class Success(NamedTuple):
    """How one of several ended."""

    value: Any


class Failure(NamedTuple):
    """How one of several ended."""

    error: Exception


Outcome: TypeAlias = "Success | Failure"


class Together:
    """
    Several at once: the operation receives a list of their outcomes, in the order given, when all have ended.

    What fails is an outcome, too. Detached steps, pauses and what is nested cannot be among them.
    """

    __slots__ = ("operations",)

    is_detached: ClassVar[bool] = False

    def __init__(self, operations: Sequence[Step | Do]) -> None:
        self.operations = operations


OpGen: TypeAlias = Generator["Step | Do | Together", Any, T]


class Engine(Protocol):
    """What runs below the API: an embedded member or a client; later, other systems."""

    pid: int

    def submit(self, call: Call) -> None: ...

    def watch(self, loop: asyncio.AbstractEventLoop) -> LoopWatch: ...

    @property
    def view(self) -> SessionView: ...


def check_usable(engine: Engine | None, is_closed: bool) -> Engine:
    """
    Raises:
        ForkedError, ClusterClosed, NotStarted: In this order, before anything else is touched.
    """
    if engine is None:
        if is_closed:
            raise ClusterClosed("this handle was closed; make a new one")
        raise NotStarted("this handle was not started: call start(), or use it in a `with` block")
    if engine.pid != os.getpid():
        raise ForkedError(
            "this handle belongs to the parent process. In a worker, attach by coordlib.connect(...) after the fork"
        )
    if is_closed:
        raise ClusterClosed("this handle was closed; make a new one")
    return engine


def _given_up(step: Step, call: Call) -> CoordError:
    # The node thread is stalled and may send it as soon as it runs again: nothing definite can be said.
    if step.kind == RequestKind.COMMAND:
        return CommitTimeout(
            "the node did not answer in time: the request may have taken effect", request_id=call.request_id
        )
    if step.kind == RequestKind.CALL:
        return CallTimeout(
            "the node did not answer in time: the call may have been delivered", request_id=call.request_id
        )
    return NoQuorum("the node did not answer in time; nothing was changed")


def _detach(engine: Engine, step: Step) -> None:
    call = Call(step.kind, step.body, FOREVER_MS, view=step.view, is_detached=True, withdraws=step.withdraws)
    call.target = step.target
    step.call = call
    engine.submit(call)


def run(engine: Engine, operation: OpGen[T]) -> T:
    """Run an operation on this thread."""
    try:
        step = next(operation)
        while True:
            if step.is_detached:
                assert isinstance(step, Step)
                _detach(engine, step)
                step = operation.send(b"")
                continue
            if not isinstance(step, Step):
                try:
                    result = _run_own(engine, step)
                except BaseException as failure:
                    step = operation.throw(failure)
                    continue
                step = operation.send(result)
                continue
            if step.pause_seconds:
                try:
                    time.sleep(step.pause_seconds)
                except BaseException as interrupt:
                    step = operation.throw(interrupt)
                    continue
                step = operation.send(b"")
                continue
            call = ThreadCall(step.kind, step.body, step.deadline_ms, sequence=step.sequence, view=step.view)
            call.target = step.target
            step.call = call
            try:
                (step.joins or engine.submit)(call)
                wait_ms = step.deadline_ms - monotonic_ms()
                if call.wait(max(0, wait_ms) / 1000 + GRACE_SECONDS):
                    error = call.error
                else:
                    # The node thread is stalled (a hanging disk, a stopped process): do not hang with it.
                    error = _given_up(step, call)
            except BaseException as interrupt:
                # Ctrl-C in the middle of a wait: let the operation clean up behind itself, then go on raising.
                step = operation.throw(interrupt)
                continue
            step = operation.throw(error) if error is not None else operation.send(call.reply or b"")
    except StopIteration as stop:
        returned: T = stop.value
        return returned


def _run_own(engine: Engine, operation: Do | Together) -> Any:
    """
    Raises:
        BaseException: What a single Do raised; or of several, what interrupted their caller.
    """
    if isinstance(operation, Do):
        return operation.call()
    calls: list[tuple[int, Step, ThreadCall]] = []
    own: list[tuple[int, Do]] = []
    outcomes: list[Outcome] = [_UNENDED] * len(operation.operations)
    for place, each in enumerate(operation.operations):
        if isinstance(each, Do):
            own.append((place, each))
            continue
        call = ThreadCall(each.kind, each.body, each.deadline_ms, sequence=each.sequence, view=each.view)
        call.target = each.target
        each.call = call
        engine.submit(call)
        calls.append((place, each, call))
    # What is polled shares this thread; of the rest one has it, if there is nothing to be polled.
    polled: dict[int, Polled[Any]] = {}
    helped: list[threading.Lock] = []
    interrupt: BaseException | None = None
    try:
        for place, do in own if len(own) > 1 else ():
            if do.polled is not None and (begun := do.polled()) is not None:
                polled[place] = begun
        blocking = [(place, do) for place, do in own if place not in polled]
        here = [] if polled else blocking[:1]
        for place, do in blocking[len(here) :]:
            helped.append(_helpers.submit(functools.partial(_do, do, place, outcomes)))
        for place, do in here:
            _do(do, place, outcomes)
        if polled:
            for place, (value, error) in zip(polled, poll_all(polled.values()), strict=True):
                outcomes[place] = Success(value) if error is None else Failure(error)
    except BaseException as error:
        interrupt = error
    for ended in helped:
        while True:
            # Ctrl-C in the middle: what uses the same connections next must not meet them in use.
            try:
                ended.acquire()
                break
            except BaseException as error:
                interrupt = error
    if interrupt is not None:
        raise interrupt
    for place, each, call in calls:
        wait_ms = each.deadline_ms - monotonic_ms()
        if call.wait(max(0, wait_ms) / 1000 + GRACE_SECONDS):
            outcomes[place] = _outcome_of(call)
        else:
            outcomes[place] = Failure(_given_up(each, call))
    return outcomes


_UNENDED: Final = Failure(CoordError("it was interrupted before it ended"))


class _Helpers:
    """
    Threads for what an operation does besides its own: kept for a moment, because starting one costs as much as what it
    is for. As many as are asked for at once; none of them keeps the process alive.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[Callable[[], None]]] = []

    def submit(self, work: Callable[[], None]) -> threading.Lock:
        """Begin it on another thread; the lock is released when it has ended. `work` does not raise."""
        ended = threading.Lock()
        ended.acquire()

        def whole() -> None:
            try:
                work()
            finally:
                ended.release()

        if self._pid != os.getpid():
            # The parent's threads are not here, and its lock may be held by one of them.
            self._pid, self._lock, self._idle = os.getpid(), threading.Lock(), []
        with self._lock:
            given = self._idle.pop() if self._idle else None
        if given is not None:
            given.put(whole)
        else:
            threading.Thread(target=self._work, args=(whole,), name="coordlib-io", daemon=True).start()
        return ended

    def _work(self, work: Callable[[], None]) -> None:
        mine: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        while True:
            work()
            with self._lock:
                self._idle.append(mine)
            try:
                work = mine.get(timeout=HELPER_IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    if mine in self._idle:
                        self._idle.remove(mine)
                        return
                work = mine.get()  # it was given something in this very moment


_helpers: Final = _Helpers()


def _do(operation: Do, place: int, outcomes: list[Outcome]) -> None:
    try:
        outcomes[place] = Success(operation.call())
    except Exception as error:
        outcomes[place] = Failure(error)


def _outcome_of(call: Call) -> Outcome:
    return Success(call.reply or b"") if call.error is None else Failure(call.error)


async def arun(engine: Engine, operation: OpGen[T]) -> T:
    """Run an operation in this task. Cancelling it raises CancelledError; the operation withdraws behind it."""
    try:
        step = next(operation)
        while True:
            if step.is_detached:
                assert isinstance(step, Step)
                _detach(engine, step)
                step = operation.send(b"")
                continue
            if not isinstance(step, Step):
                try:
                    result = await _arun_own(engine, step)
                except GeneratorExit:
                    _abandon(engine, operation)
                    raise
                except BaseException as failure:
                    step = operation.throw(failure)
                    continue
                step = operation.send(result)
                continue
            if step.pause_seconds:
                try:
                    await asyncio.sleep(step.pause_seconds)
                except GeneratorExit:
                    _abandon(engine, operation)
                    raise
                except BaseException as interrupt:
                    step = operation.throw(interrupt)
                    continue
                step = operation.send(b"")
                continue
            call = AsyncCall(step.kind, step.body, step.deadline_ms, sequence=step.sequence, view=step.view)
            call.target = step.target
            step.call = call
            watch = engine.watch(call.loop)
            watch.add(call)
            try:
                (step.joins or engine.submit)(call)
                await call.future
                error = call.error
                if error is None and call.reply is None:
                    error = _given_up(step, call)
            except GeneratorExit:
                # The task itself is being destroyed (its loop was closed): only what needs no waiting can be done.
                _abandon(engine, operation)
                raise
            except BaseException as interrupt:
                step = operation.throw(interrupt)
                continue
            finally:
                watch.discard(call)
            step = operation.throw(error) if error is not None else operation.send(call.reply or b"")
    except StopIteration as stop:
        returned: T = stop.value
        return returned


async def _arun_own(engine: Engine, operation: Do | Together) -> Any:
    """Raises as `_run_own` does."""
    if isinstance(operation, Do):
        (outcome,) = await _arun_together(engine, (operation,))
        if isinstance(outcome, Failure):
            raise outcome.error
        return outcome.value
    return await _arun_together(engine, operation.operations)


async def _arun_together(engine: Engine, operations: Sequence[Step | Do]) -> list[Outcome]:
    loop = asyncio.get_running_loop()
    watch = engine.watch(loop)
    calls: dict[int, tuple[Step, AsyncCall]] = {}
    tasks: dict[int, asyncio.Future[Any]] = {}
    try:
        for place, each in enumerate(operations):
            if not isinstance(each, Do):
                call = AsyncCall(
                    each.kind, each.body, each.deadline_ms, sequence=each.sequence, view=each.view
                )
                call.target = each.target
                each.call = call
                watch.add(call)
                calls[place] = each, call
                engine.submit(call)
            elif each.acall is not None:
                tasks[place] = asyncio.ensure_future(each.acall())
            else:
                tasks[place] = asyncio.ensure_future(asyncio.to_thread(each.call))
        interrupt = await _wait_own(operations, tasks)
        if interrupt is not None:
            raise interrupt
        outcomes: list[Outcome] = []
        for place, _ in enumerate(operations):
            if place in tasks:
                error = tasks[place].exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                outcomes.append(Success(tasks[place].result()) if error is None else Failure(error))
                continue
            step, call = calls[place]
            await call.future
            outcomes.append(
                Failure(_given_up(step, call))
                if call.error is None and call.reply is None
                else _outcome_of(call)
            )
        return outcomes
    finally:
        for _, call in calls.values():
            watch.discard(call)


async def _wait_own(
    operations: Sequence[Step | Do], tasks: dict[int, asyncio.Future[Any]]
) -> BaseException | None:
    """Until all have ended, cancelled or not; returns what cancelled the waiting."""
    interrupt: BaseException | None = None
    pending = set(tasks.values())
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            interrupt = error
            for place, task in tasks.items():
                each = operations[place]
                if isinstance(each, Do) and each.acall is not None:
                    task.cancel()
            pending = {task for task in pending if not task.done()}
    if interrupt is None:
        interrupt = next((asyncio.CancelledError() for task in tasks.values() if task.cancelled()), None)
    else:
        for task in tasks.values():
            if not task.cancelled():
                task.exception()  # looked at, so that nobody is warned of it
    return interrupt


def _abandon(engine: Engine, operation: OpGen[T]) -> None:
    try:
        step = operation.throw(asyncio.CancelledError())
        while isinstance(step, Step) and step.is_detached:
            _detach(engine, step)
            step = operation.send(b"")
        operation.close()
    except (StopIteration, asyncio.CancelledError):
        pass


def start(engine: Engine, operation: OpGen[None]) -> None:
    """
    Run an operation in the background: this returns as soon as its first request is under way.

    It goes on where its calls end, mostly on the node thread, and so must not block, and must not raise: what it
    raises is a bug, and stops the node. Its requests are sent again until they are answered or their session
    ends; it yields nothing but requests.
    """
    _Background(engine, operation).go_on(None)


class _Background:
    __slots__ = ("_engine", "_operation")

    def __init__(self, engine: Engine, operation: OpGen[None]) -> None:
        self._engine = engine
        self._operation = operation

    def go_on(self, ended: Call | None) -> None:
        operation = self._operation
        try:
            if ended is None:
                step = next(operation)
            elif ended.error is not None:
                step = operation.throw(ended.error)
            else:
                step = operation.send(ended.reply or b"")
        except StopIteration:
            return
        assert isinstance(step, Step)
        call = BackgroundCall(
            step.kind, step.body, step.deadline_ms, self.go_on, sequence=step.sequence, view=step.view
        )
        call.target = step.target
        step.call = call
        self._engine.submit(call)
