"""An asyncio event loop in virtual time: asyncio's own, on a simulated thread, without sockets.

Tasks, timers, timeouts, task groups, `to_thread` and `call_soon_threadsafe` are the real ones. Only waiting for
the next thing to do is simulated, and what would leave the simulation is refused.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import itertools
import threading
import warnings
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final, NoReturn, ParamSpec, TypeVar

from coordlib.testing.simulation.standard import NotSimulated
from coordlib.testing.simulation.threads import Scheduler, SimulatedThread, SimulationOver

__all__ = ["SimulatedEventLoop"]

P = ParamSpec("P")
T = TypeVar("T")
TURNS_MAX: Final = (
    200  # without waiting, before a millisecond passes: `sleep(0)` in a loop must not stop the time
)
FORGOTTEN_MS: Final = 1000  # an exception that nobody asked for within this is nobody's


class _Task(asyncio.Task[T]):
    """A task whose place in a set depends on when it was made, not on where in memory."""

    def __init__(self, *arguments: Any, hash_value: int, **more: Any) -> None:
        self._hash_value = hash_value
        super().__init__(*arguments, **more)

    def __hash__(self) -> int:
        return self._hash_value


class _Future(asyncio.Future[T]):
    def __init__(self, *, hash_value: int, loop: asyncio.AbstractEventLoop) -> None:
        self._hash_value = hash_value
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._hash_value


class _ThreadEach(concurrent.futures.Executor):
    """A thread for every call: how many there are does not depend on the machine."""

    def submit(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)
                if not isinstance(error, Exception):
                    raise

        threading.Thread(target=run).start()
        return future


class _Selector:
    """What the loop waits on: nothing but being woken, and the time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._waiter: SimulatedThread | None = None
        self._is_woken = False
        self._turns = 0

    def select(self, timeout: float | None) -> tuple[()]:
        self._turns += 1
        is_due = self._is_woken or (timeout is not None and timeout <= 0)
        if self._turns >= TURNS_MAX and is_due:
            is_due, timeout = False, 0.001
        if not is_due:
            self._turns = 0
            self._waiter = self._scheduler.thread()
            try:
                self._scheduler.wait(timeout)
            finally:
                self._waiter = None
        self._is_woken = False
        return ()

    def wake(self) -> None:
        self._is_woken = True
        if self._waiter is not None:
            self._scheduler.wake(self._waiter)

    def close(self) -> None:
        """Nothing is open."""


class SimulatedEventLoop(asyncio.BaseEventLoop):
    """Runs on the simulated thread that calls `run_until_complete`. `time()` is its process's clock."""

    _clock_resolution: float

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._selector = _Selector(scheduler)
        self._clock_resolution = 1e-6
        self._default_executor: concurrent.futures.Executor | None = _ThreadEach()
        self._serials = itertools.count()
        self._unfinished: dict[asyncio.Task[Any], None] = {}
        self._failed: list[tuple[int, asyncio.Task[Any]]] = []
        self.set_task_factory(self._make_task)
        host = scheduler.host()
        assert host is not None, "a simulated loop is made in the process that it belongs to"
        scheduler.loops.append((host, self))

    # -- what the base class asks for

    def _process_events(self, events: tuple[()]) -> None:
        """There are none: whoever has something for this loop calls `call_soon_threadsafe`."""

    def _write_to_self(self) -> None:
        self._selector.wake()

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(hash_value=next(self._serials), loop=self)

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T],
        context: contextvars.Context | None = None,
        **more: Any,
    ) -> asyncio.Task[T]:
        if context is not None:
            more["context"] = context
        task: asyncio.Task[T] = _Task(coroutine, hash_value=next(self._serials), loop=loop, **more)
        self._unfinished[task] = None
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._unfinished.pop(task, None)
        if task._log_traceback:
            self._failed.append((self._scheduler.world.now, task))

    def forgotten_failure(self) -> BaseException | None:
        """What a task raised and nobody ever asked for."""
        now = self._scheduler.world.now
        for at, task in self._failed:
            if task._log_traceback and (now - at >= FORGOTTEN_MS or self.is_closed()):
                return task.exception()
        return None

    def run_until_complete(self, future: Any) -> Any:
        if self._scheduler.is_over:
            if asyncio.iscoroutine(future):
                future.close()
            raise SimulationOver
        try:
            return super().run_until_complete(future)
        except SimulationOver:
            self._drop_tasks()
            raise

    def _drop_tasks(self) -> None:
        """The simulation is over: tasks end where they stand, as with a process that is killed."""
        with warnings.catch_warnings():
            # What they wanted to await yet, and cannot any more.
            warnings.filterwarnings(
                "ignore", message="coroutine .* was never awaited", category=RuntimeWarning
            )
            for task in list(self._unfinished):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                coroutine = task.get_coro()
                try:
                    if coroutine is not None:
                        coroutine.close()
                except BaseException:
                    pass  # it wanted to go on waiting
        for _, task in self._failed:
            task._log_traceback = False
        self._unfinished.clear()

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Every call has a thread of its own, which ends with it."""

    def close(self) -> None:
        self._default_executor = None
        super().close()

    # -- what would leave the simulation


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: SimulatedEventLoop, *_: Any, **__: Any) -> NoReturn:
        raise NotSimulated(
            f"{name}() in a simulated application: this would leave the simulation. Put something in its place that takes "
            "simulated time: `await asyncio.sleep()`"
        )

    refuse.__name__ = name
    return refuse


for _name in (
    *("add_reader", "remove_reader", "add_writer", "remove_writer", "getaddrinfo", "getnameinfo"),
    *("create_connection", "create_server", "create_datagram_endpoint", "create_unix_connection"),
    *("create_unix_server", "connect_accepted_socket", "start_tls", "sendfile"),
    *("sock_connect", "sock_accept", "sock_recv", "sock_recv_into", "sock_recvfrom", "sock_recvfrom_into"),
    *("sock_sendall", "sock_sendto", "sock_sendfile"),
    *("connect_read_pipe", "connect_write_pipe", "subprocess_shell", "subprocess_exec"),
):
    setattr(SimulatedEventLoop, _name, _refusal(_name))
