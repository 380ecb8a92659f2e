"""Threads of simulated applications: real ones, of which exactly one runs at a time, in virtual time.

A thread runs until it waits; then the world goes on, and wakes it by an event like any other. Which of two
threads that could run goes first, and how late, is drawn from the seed. What is not here: which of the standard
library's functions wait (standard.py), and what runs in the threads (application.py).
"""

from __future__ import annotations

import _thread
import math
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from coordlib.testing.simulation.world import World

__all__ = ["Host", "Scheduler", "SimulatedLock", "SimulatedThread", "SimulationOver", "Stalled"]

# As they are before anybody puts something else in their place.
allocate_lock = _thread.allocate_lock
get_ident = _thread.get_ident
start_thread = threading.Thread.start
join_thread = threading.Thread.join

UNWIND_SECONDS: Final = 5.0  # real ones, for a thread to end when its simulation has
UNWINDINGS_MAX: Final = 1000  # exceptions thrown into a thread that catches them all, before it is left alone
# How late a thread that could run does: mostly at once, sometimes as on a busy machine.
LATE_CHANCE: Final = 0.1
LATE_MS_MAX: Final = 3
VERY_LATE_CHANCE: Final = 0.005
VERY_LATE_MS_MAX: Final = 50


class SimulationOver(BaseException):
    """Thrown into whatever still waits when a simulation ends. No `Exception`: it is nobody's to handle."""


class Stalled(RuntimeError):
    """Code of an application does not give way: it waits for something that the simulation does not know."""


class Host(Protocol):
    """The process that a thread belongs to, as it is at the moment: another one after a restart."""

    name: str

    @property
    def is_running(self) -> bool: ...

    @property
    def is_paused(self) -> bool: ...

    def clock(self) -> int: ...

    def wall_clock(self) -> int: ...

    def world_time(self, clock_ms: int) -> int: ...

    def reading_clock(self) -> AbstractContextManager[None]: ...

    def thread_failed(self, error: BaseException) -> BaseException | None: ...


class SimulatedThread:
    """One thread of a simulated process."""

    __slots__ = (
        "back",
        "go",
        "host",
        "ident",
        "is_finished",
        "is_waiting",
        "joiners",
        "name",
        "queue",
        "real",
        "run",
        "serial",
        "unwindings",
        "was_woken",
    )

    def __init__(self, host: Host, name: str, run: Callable[[], Any], real: threading.Thread) -> None:
        self.host = host
        self.name = name
        self.run = run
        self.real = real
        self.ident = 0
        self.go = allocate_lock()
        self.go.acquire()
        self.back = allocate_lock()  # its own: one that stalled and goes on later must not speak for another
        self.back.acquire()
        self.serial = 0  # of its waits: a timer that was set for an earlier one is void
        self.is_waiting = False
        self.was_woken = False
        self.is_finished = False
        self.joiners: dict[SimulatedThread, None] = {}
        self.queue: dict[SimulatedThread, None] | None = None  # where it waits, to leave it after a timeout
        self.unwindings = 0


class Scheduler:
    """Lets one thread run at a time, and time pass between them."""

    def __init__(self, world: World, *, stall_seconds: float) -> None:
        self.world = world
        self.stall_seconds = stall_seconds
        self.unwind_seconds = UNWIND_SECONDS
        self.current: SimulatedThread | None = None
        self.is_over = False
        self.is_running = False  # whether the world does
        self.is_raw = False  # whether what is created now is real, whoever asks
        self.home = get_ident()
        self.visiting: Host | None = None  # the process whose callbacks run on the world's own thread
        self.threads: dict[SimulatedThread, None] = {}
        self.parked: dict[SimulatedThread, None] = {}  # could run, but their process is paused
        self.loops: list[tuple[Host, Any]] = []  # the event loops that were made
        self.random = world.choices.stream("application")
        self.failure: BaseException | None = (
            None  # what a thread's code raised, for the world's thread to raise
        )
        self._trace = blake2b(digest_size=16)
        self._counts: dict[str, int] = {}

    # -- who asks ------------------------------------------------------------------------------------------

    def host(self) -> Host | None:
        """The process whose code asks; None if it is nobody's."""
        current = self.current
        ident = get_ident()
        if current is not None:
            return current.host if current.ident == ident else None
        return self.visiting if ident == self.home else None

    def thread(self) -> SimulatedThread | None:
        current = self.current
        return current if current is not None and current.ident == get_ident() else None

    def makes_simulated(self) -> bool:
        """Whether a lock that is made now, here, is for simulated threads: in one, or in the test around them."""
        if self.is_raw:
            return False
        if self.host() is not None:
            return True
        return get_ident() == self.home and not self.is_running and not self.is_over

    def digest(self) -> bytes:
        """Of who ran when."""
        return self._trace.digest()

    # -- the life of a thread ------------------------------------------------------------------------------

    def spawn(
        self, host: Host, run: Callable[[], Any], real: threading.Thread | None = None
    ) -> SimulatedThread:
        """Start a thread of that process, as soon as it gets its turn. `real` has not been started yet."""
        count = self._counts[host.name] = self._counts.get(host.name, 0) + 1
        name = f"{host.name}/{count}"
        was_raw, self.is_raw = self.is_raw, True
        try:
            if real is None:
                real = threading.Thread(name=name)
            thread = SimulatedThread(host, name, run, real)
            self.threads[thread] = None
            real.run = lambda: self._body(thread)  # type: ignore[method-assign]  # whatever the subclass does, in its turn
            real._daemonic = True  # type: ignore[attr-defined]  # one that stalls keeps no interpreter alive
            real._started = threading.Event()  # type: ignore[attr-defined]  # a real one: the start itself takes no time
            start_thread(real)
        finally:
            self.is_raw = was_raw
        assert real.ident is not None
        thread.ident = real.ident
        self._make_runnable(thread)
        return thread

    def _body(self, thread: SimulatedThread) -> None:
        thread.go.acquire()
        try:
            if not self.is_over:
                thread.run()
        except (SimulationOver, SystemExit):
            pass
        except BaseException as error:
            if not self.is_over:
                self.failure = thread.host.thread_failed(error)
        thread.is_finished = True
        for joiner in list(thread.joiners):
            self.wake(joiner)
        thread.back.release()

    def join(self, thread: SimulatedThread, timeout_seconds: float | None) -> None:
        if not thread.is_finished:
            self.wait(timeout_seconds, thread.joiners)

    # -- waiting -------------------------------------------------------------------------------------------

    def wait(self, timeout_seconds: float | None, queue: dict[SimulatedThread, None] | None = None) -> bool:
        """Give way until somebody wakes this thread (True), or its process's clock has gone on by so much."""
        thread = self.thread()
        assert thread is not None, "only a simulated thread can wait"
        if self.is_over:
            self._throw(thread)
        thread.serial += 1
        thread.is_waiting, thread.was_woken = True, False
        thread.queue = queue
        if queue is not None:
            queue[thread] = None
        if timeout_seconds is not None:
            # At least a millisecond, which is the world's unit: a loop of empty waits must not stop the time.
            self._arm(thread, thread.host.clock() + max(1, math.ceil(round(timeout_seconds * 1000, 6))))
        thread.back.release()
        thread.go.acquire()
        if self.is_over:
            self._throw(thread)
        return thread.was_woken

    def _throw(self, thread: SimulatedThread) -> None:
        thread.unwindings += 1
        while thread.unwindings > UNWINDINGS_MAX:
            thread.go.acquire()  # it catches everything and tries again: let it stand
        raise SimulationOver

    def _arm(self, thread: SimulatedThread, deadline_ms: int) -> None:
        serial = thread.serial

        def look() -> None:
            if thread.serial != serial or not thread.is_waiting or not thread.host.is_running:
                return
            if thread.host.clock() < deadline_ms:  # the process's clock was slowed down meanwhile
                self.world.at(max(self.world.now + 1, thread.host.world_time(deadline_ms)), look)
                return
            self._leave(thread)
            self._make_runnable(thread)

        self.world.at(max(self.world.now + 1, thread.host.world_time(deadline_ms)), look)

    def _leave(self, thread: SimulatedThread) -> None:
        thread.is_waiting = False
        if thread.queue is not None:
            thread.queue.pop(thread, None)
            thread.queue = None

    def wake(self, thread: SimulatedThread) -> bool:
        """End its wait. False: it does not wait, or never will again."""
        if not thread.is_waiting or not thread.host.is_running:
            return False
        self._leave(thread)
        thread.was_woken = True
        self._make_runnable(thread)
        return True

    # -- running -------------------------------------------------------------------------------------------

    def _make_runnable(self, thread: SimulatedThread) -> None:
        drawn, late_ms = self.random.random(), 0
        if drawn < VERY_LATE_CHANCE:
            late_ms = round(drawn / VERY_LATE_CHANCE * VERY_LATE_MS_MAX)
        elif drawn < LATE_CHANCE:
            late_ms = round(drawn / LATE_CHANCE * LATE_MS_MAX)
        self.world.after(late_ms, self._resume, thread)

    def unpark(self, host: Host) -> None:
        """Its process goes on after a pause."""
        for thread in [thread for thread in self.parked if thread.host is host]:
            del self.parked[thread]
            self._make_runnable(thread)

    def _resume(self, thread: SimulatedThread) -> None:
        host = thread.host
        if not host.is_running:
            return  # its process has crashed: nothing of it ever runs again, no `finally` either
        if host.is_paused:
            self.parked[thread] = None
            return
        self._trace.update(b"%d %s %d;" % (self.world.now, thread.name.encode(), thread.serial))
        with host.reading_clock():
            self._hand_over(thread, self.stall_seconds)
        if thread.is_finished:
            del self.threads[thread]
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def _hand_over(self, thread: SimulatedThread, patience_seconds: float) -> None:
        self.current = thread
        thread.go.release()
        if not thread.back.acquire(timeout=patience_seconds):
            frame = sys._current_frames().get(thread.ident)
            where = "".join(traceback.format_stack(frame)[-4:]) if frame is not None else ""
            raise Stalled(
                f"{thread.name} did not give way within {patience_seconds:g} real seconds. It waits for something that "
                "the simulation does not know (a lock made before the simulation was entered, a real socket, a loop that "
                f"never sleeps), or computes for that long (then raise `stall_seconds`). It is here:\n{where}"
            )
        self.current = None

    def end(self) -> list[str]:
        """
        Unwind all threads, one after the other. Returns the names of those that could not be.

        What they still do then (a `finally`, an `except BaseException`) happens after the simulation.
        """
        self.is_over = True
        stalled = self.current
        left = []
        for thread in list(self.threads):
            if thread is stalled:
                left.append(thread.name)
                continue
            try:
                with thread.host.reading_clock():
                    self._hand_over(thread, self.unwind_seconds)
            except Stalled:
                left.append(thread.name)
        self.current = None
        for thread in self.threads:
            if thread.is_finished:
                join_thread(thread.real, UNWIND_SECONDS)
        self.threads.clear()
        return left


class SimulatedLock:
    """
    A `threading.Lock` for whose release simulated threads wait in virtual time.

    First come, first served: a release hands it to the thread that waits longest. Outside of a simulation, and
    after it, it is the real lock that is inside.
    """

    __slots__ = ("__weakref__", "_real", "_scheduler", "_waiters")

    def __init__(self, scheduler: Scheduler) -> None:
        self._real = allocate_lock()
        self._scheduler = scheduler
        self._waiters: dict[SimulatedThread, None] = {}

    def __repr__(self) -> str:
        return f"<{'locked' if self._real.locked() else 'unlocked'} SimulatedLock>"

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._real.acquire(False):
            return True
        if not blocking:
            return False
        scheduler = self._scheduler
        if scheduler.thread() is not None:
            return scheduler.wait(None if timeout < 0 else timeout, self._waiters)
        if get_ident() == scheduler.home and not scheduler.is_over:
            raise RuntimeError(
                "the test itself would wait for ever here, because simulated time stands still meanwhile: let it pass "
                "with sim.run() or sim.run_until(), or wait in an application"
            )
        return self._real.acquire(True, timeout)

    def release(self) -> None:
        if not self._real.locked():
            raise RuntimeError("release unlocked lock")
        while self._waiters:
            thread = next(iter(self._waiters))
            del self._waiters[thread]
            if self._scheduler.wake(thread):
                return  # it is locked still, by the other
        self._real.release()

    def locked(self) -> bool:
        return self._real.locked()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _at_fork_reinit(self) -> None:
        self._real = allocate_lock()
        self._waiters.clear()
