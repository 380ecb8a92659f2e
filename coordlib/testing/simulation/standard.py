"""What the standard library does in a simulated application: clocks, sleeps, locks, threads and chance.

While a simulation is entered, some functions of the standard library are replaced, in every module that has
them under any name. The replacements ask who calls: code of a simulated process gets virtual time, simulated
locks and the seed's chance; everybody else gets what they would have got without them. `threading.Condition`,
`Event`, `Semaphore`, `Barrier`, `queue.Queue` and `concurrent.futures` are built upon these, and follow.
Sockets, child processes and forks are refused, instead of being let out of the simulation.
"""

from __future__ import annotations

import asyncio
import os
import queue
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

from coordlib.errors import UsageError
from coordlib.node.driver import Driver
from coordlib.testing.simulation.threads import (
    Host,
    Scheduler,
    SimulatedLock,
    allocate_lock,
    join_thread,
    start_thread,
)

__all__ = ["NotSimulated", "Standard", "active"]


class NotSimulated(UsageError, NotImplementedError):
    """Something that a simulated application cannot do, because it would leave the simulation."""

    code = "not-simulated"


_active: Scheduler | None = None


def active() -> Scheduler | None:
    """The scheduler of the simulation that is entered, if one is."""
    return _active


def _host() -> Host | None:
    scheduler = _active
    return None if scheduler is None else scheduler.host()


def _refuse(what: str, instead: str) -> NoReturn:
    raise NotSimulated(
        f"{what}: this would leave the simulation, and depend on more than the seed. {instead}"
    )


# -- clocks ----------------------------------------------------------------------------------------------------

_time, _time_ns = time.time, time.time_ns
_monotonic, _monotonic_ns = time.monotonic, time.monotonic_ns
_perf_counter, _perf_counter_ns = time.perf_counter, time.perf_counter_ns
_clock_gettime, _clock_gettime_ns = time.clock_gettime, time.clock_gettime_ns
_sleep = time.sleep
WALL_CLOCKS: Final = {time.CLOCK_REALTIME}
OWN_CLOCKS: Final = {
    getattr(time, name)
    for name in ("CLOCK_MONOTONIC", "CLOCK_MONOTONIC_RAW", "CLOCK_BOOTTIME")
    if hasattr(time, name)
}


def simulated_time() -> float:
    host = _host()
    return _time() if host is None else host.wall_clock() / 1000


def simulated_time_ns() -> int:
    host = _host()
    return _time_ns() if host is None else host.wall_clock() * 1_000_000


def simulated_monotonic() -> float:
    host = _host()
    return _monotonic() if host is None else host.clock() / 1000


def simulated_monotonic_ns() -> int:
    host = _host()
    return _monotonic_ns() if host is None else host.clock() * 1_000_000


def simulated_perf_counter() -> float:
    host = _host()
    return _perf_counter() if host is None else host.clock() / 1000


def simulated_perf_counter_ns() -> int:
    host = _host()
    return _perf_counter_ns() if host is None else host.clock() * 1_000_000


def simulated_clock_gettime_ns(clock: int) -> int:
    host = _host()
    if host is not None and clock in OWN_CLOCKS:
        return host.clock() * 1_000_000
    if host is not None and clock in WALL_CLOCKS:
        return host.wall_clock() * 1_000_000
    return _clock_gettime_ns(clock)


def simulated_clock_gettime(clock: int) -> float:
    return simulated_clock_gettime_ns(clock) / 1e9 if _host() is not None else _clock_gettime(clock)


def simulated_sleep(seconds: float) -> None:
    scheduler = _active
    if scheduler is None or scheduler.host() is None:
        _sleep(seconds)
        return
    if seconds < 0:
        raise ValueError("sleep length must be non-negative")
    if scheduler.thread() is None:
        _refuse("time.sleep() in a callback of coordlib's", "Hand the work to a thread of the application.")
    scheduler.wait(seconds)


# -- locks and threads -----------------------------------------------------------------------------------------


class _Lock:
    """`threading.Lock`, wherever it is made: a class as in new Pythons, that makes objects of another."""

    def __new__(cls) -> Any:
        scheduler = _active
        if scheduler is None or not scheduler.makes_simulated():
            return allocate_lock()
        return SimulatedLock(scheduler)


_RLock = threading.RLock
_portable_rlock: Any = threading._PyRLock  # type: ignore[attr-defined]  # in Python, upon a Lock


def simulated_rlock(*arguments: Any, **more: Any) -> Any:
    scheduler = _active
    if scheduler is None or not scheduler.makes_simulated():
        return _RLock(*arguments, **more)
    return _portable_rlock()


class _SimpleQueue:
    """`queue.SimpleQueue`: the one in C waits on no lock that could be replaced."""

    original: Any = queue.SimpleQueue
    portable: Any = queue._PySimpleQueue  # type: ignore[attr-defined]  # the same, in Python, upon a Semaphore

    def __new__(cls) -> Any:
        scheduler = _active
        is_simulated = scheduler is not None and scheduler.makes_simulated()
        return cls.portable() if is_simulated else cls.original()

    def __class_getitem__(cls, item: Any) -> Any:
        return cls.original[item]


_SIMULATED: Final = "_coordlib_simulated"
_is_alive = threading.Thread.is_alive


def _thread_start(self: threading.Thread) -> None:
    scheduler = _active
    if scheduler is None or scheduler.is_over:
        start_thread(self)
        return
    host = scheduler.host()
    if host is None:
        was_raw, scheduler.is_raw = scheduler.is_raw, True
        try:
            self._started = threading.Event()  # type: ignore[attr-defined]  # a real thread, begun in a real way
        finally:
            scheduler.is_raw = was_raw
        start_thread(self)
        return
    if getattr(self, _SIMULATED, None) is not None:
        raise RuntimeError("threads can only be started once")
    setattr(self, _SIMULATED, scheduler.spawn(host, self.run, self))


def _thread_join(self: threading.Thread, timeout: float | None = None) -> None:
    simulated = getattr(self, _SIMULATED, None)
    scheduler = _active
    if simulated is None or scheduler is None or scheduler.thread() is None:
        join_thread(self, timeout)
        return
    if scheduler.thread() is simulated:
        raise RuntimeError("cannot join current thread")
    scheduler.join(simulated, None if timeout is None else max(0.0, timeout))


def _thread_is_alive(self: threading.Thread) -> bool:
    simulated = getattr(self, _SIMULATED, None)
    # Not the real thread's life, which ends a little later than its code.
    return _is_alive(self) if simulated is None else not simulated.is_finished


# -- the rest --------------------------------------------------------------------------------------------------

_urandom = os.urandom
_new_event_loop = asyncio.new_event_loop
_socket_init = socket.socket.__init__
_popen_init = subprocess.Popen.__init__


def simulated_urandom(size: int) -> bytes:
    scheduler = _active
    if scheduler is None or scheduler.host() is None:
        return _urandom(size)
    return scheduler.world.choices.stream("application's own").randbytes(size)


def simulated_event_loop() -> asyncio.AbstractEventLoop:
    scheduler = _active
    if scheduler is None or scheduler.thread() is None:
        return _new_event_loop()
    from coordlib.testing.simulation.loop import SimulatedEventLoop  # which needs this module

    return SimulatedEventLoop(scheduler)


def _refused_socket(self: socket.socket, *arguments: Any, **more: Any) -> None:
    if _host() is not None:
        _refuse(
            "a socket in a simulated application",
            "Put something in its place that takes simulated time: time.sleep().",
        )
    _socket_init(self, *arguments, **more)


def _refused_popen(self: Any, *arguments: Any, **more: Any) -> None:
    if _host() is not None:
        _refuse(
            "a child process in a simulated application", "Call what it does, or put something in its place."
        )
    _popen_init(self, *arguments, **more)


_driver_start = Driver.start


def _refused_driver(self: Driver) -> None:
    if _host() is not None:
        _refuse(
            "a real node in a simulated application",
            "Use the cluster that the application was called with; for another process, sim.start() another application.",
        )
    _driver_start(self)


_fork = os.fork


def _refused_fork() -> int:
    if _host() is not None:
        _refuse("fork() in a simulated application", "Start a client for each worker instead.")
    return _fork()


FUNCTIONS: Final[list[tuple[Any, Any]]] = [
    (_time, simulated_time),
    (_time_ns, simulated_time_ns),
    (_monotonic, simulated_monotonic),
    (_monotonic_ns, simulated_monotonic_ns),
    (_perf_counter, simulated_perf_counter),
    (_perf_counter_ns, simulated_perf_counter_ns),
    (_clock_gettime, simulated_clock_gettime),
    (_clock_gettime_ns, simulated_clock_gettime_ns),
    (_sleep, simulated_sleep),
    (allocate_lock, _Lock),
    (threading.Lock, _Lock),
    (_RLock, simulated_rlock),
    (_SimpleQueue.original, _SimpleQueue),
    (_urandom, simulated_urandom),
    (_new_event_loop, simulated_event_loop),
    (_fork, _refused_fork),
]
METHODS: Final[list[tuple[Any, str, Callable[..., Any]]]] = [
    (threading.Thread, "start", _thread_start),
    (threading.Thread, "join", _thread_join),
    (threading.Thread, "is_alive", _thread_is_alive),
    (socket.socket, "__init__", _refused_socket),
    (subprocess.Popen, "__init__", _refused_popen),
    (Driver, "start", _refused_driver),
]
# What the interpreter itself runs on, and what has to know both.
UNTOUCHED: Final = frozenset(
    {
        "_thread",
        "_queue",
        "_frozen_importlib",
        "_frozen_importlib_external",
        "importlib._bootstrap",
        "importlib._bootstrap_external",
        __name__,
        "coordlib.testing.simulation.threads",
    }
)


class Standard:
    """The replacements, in place between `enter` and `leave`. One simulation at a time in a process."""

    def __init__(self) -> None:
        self._undo: list[tuple[dict[str, Any], str, Any, Any]] = []
        self._methods: list[tuple[Any, str, Any]] = []
        self._random: Any = None

    def enter(self, scheduler: Scheduler) -> None:
        """
        Raises:
            UsageError: Another simulation is entered.
        """
        global _active
        if _active is not None:
            raise UsageError("a simulation is entered already: leave it first, they cannot be nested")
        replacements = {id(original): (original, stand_in) for original, stand_in in FUNCTIONS}
        for module_name, module in list(sys.modules.items()):
            names = getattr(module, "__dict__", None)
            if names is None or module_name in UNTOUCHED:
                continue
            for name, value in list(names.items()):
                found = replacements.get(id(value))
                if found is not None:
                    names[name] = found[1]
                    self._undo.append((names, name, *found))
        for owner, name, stand_in in METHODS:
            self._methods.append((owner, name, owner.__dict__[name]))
            setattr(owner, name, stand_in)
        # The functions of the module `random` share one state: the application's draws come from the seed.
        self._random = random.getstate()
        random.seed(scheduler.world.seed)
        _active = scheduler

    def leave(self) -> None:
        global _active
        _active = None
        random.setstate(self._random)
        for owner, name, original in reversed(self._methods):
            setattr(owner, name, original)
        for names, name, original, stand_in in reversed(self._undo):
            if names.get(name) is stand_in:
                names[name] = original
        self._methods.clear()
        self._undo.clear()
