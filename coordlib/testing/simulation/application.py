"""Users' own code in the simulated cluster: the same handles, under faults, in virtual time, from one seed.

An application is a function that takes a started `Cluster` (`def`) or `AsyncCluster` (`async def`). It runs in a
process of the simulated world, on that process's clock, and dies with it. Only what is below the handles is
replaced: everything from `coordlib.api` up is what runs in production.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, Self, cast

from coordlib.api.cluster import AsyncCluster, Cluster
from coordlib.config import Timing
from coordlib.errors import ClusterClosed, ConfigError, UsageError
from coordlib.node.calls import CallHandler
from coordlib.node.driver import Driver, SessionListener
from coordlib.node.effects import Effects, InboundCall
from coordlib.node.session import Call, SessionView
from coordlib.node.waiting import LoopWatch, wake_all
from coordlib.testing.simulation.choices import Choices
from coordlib.testing.simulation.fault_kinds import FAULT_KINDS, draw_faults
from coordlib.testing.simulation.faults import FaultInjector
from coordlib.testing.simulation.loop import SimulatedEventLoop
from coordlib.testing.simulation.processes import Process
from coordlib.testing.simulation.standard import Standard
from coordlib.testing.simulation.surroundings import ClockProfile, DiskProfile, NetworkProfile
from coordlib.testing.simulation.threads import Scheduler, Stalled
from coordlib.testing.simulation.world import World

__all__ = ["Application", "Simulation", "SimulationFailed", "Summary", "simulate"]

log = logging.getLogger("coordlib")
POLL_SECONDS: Final = 0.005
BEGIN_MS: Final = 3000  # without faults: the cluster forms first
RESTART_MS: Final = 1000
RESTART_MS_MAX: Final = 4000


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _kinds(faults: str | Iterable[str]) -> list[str]:
    if isinstance(faults, str):
        if faults not in ("none", "all"):
            raise ConfigError(f"faults is 'none', 'all' or the kinds that may happen; got {faults!r}")
        return list(FAULT_KINDS) if faults == "all" else []
    wanted = set(faults)
    unknown = sorted(wanted - set(FAULT_KINDS))
    if unknown:
        raise ConfigError(f"there is no fault {unknown[0]!r}: the kinds are {', '.join(FAULT_KINDS)}")
    return [kind for kind in FAULT_KINDS if kind in wanted]


class SimulationFailed(AssertionError):
    """An application failed in a simulation, or the simulation itself. The message names the seed and the time."""


class Application:
    """An application's code in one simulated process, over all of its restarts."""

    def __init__(
        self,
        simulation: Simulation,
        name: str,
        main: Callable[..., Any],
        arguments: tuple[Any, ...],
        restart_on: tuple[type[BaseException], ...],
    ) -> None:
        self.name = name
        self.starts = 0  # how often its process began to run it
        self.is_done = False  # whether it returned
        self.result: Any = None
        self._simulation = simulation
        self._main = main
        self._arguments = arguments
        self._restart_on = restart_on
        self._life: _Life | None = None

    def __repr__(self) -> str:
        return f"<Application {self.name}, {'done' if self.is_done else f'started {self.starts} times'}>"

    def _begin(self, process: Process) -> None:
        self._life = life = _Life(self._simulation, self, process)
        process.guest = life
        self._simulation._scheduler.spawn(life, life.main)


class _Life:
    """An application in one process from its start to its end: what its threads and its handle need of it."""

    def __init__(self, simulation: Simulation, application: Application, process: Process) -> None:
        self.pid = os.getpid()
        self.name = process.name
        self._simulation = simulation
        self._scheduler = simulation._scheduler
        self._application = application
        self._process = process
        self._listeners: list[SessionListener] = []
        self._watches: dict[asyncio.AbstractEventLoop, LoopWatch] = {}
        self.has_left = False  # the node was closed by the code, which goes on without it
        self._is_ending = False

    # -- for its threads

    @property
    def is_running(self) -> bool:
        return self._process.is_up or self.has_left

    @property
    def is_paused(self) -> bool:
        return self._process.is_paused

    def clock(self) -> int:
        return self._process.clock()

    def wall_clock(self) -> int:
        return self._process.wall_clock()

    def world_time(self, clock_ms: int) -> int:
        return self._process._world_time(clock_ms)

    def reading_clock(self) -> AbstractContextManager[None]:
        return self._process.reading_clock()

    def thread_failed(self, error: BaseException) -> BaseException | None:
        if isinstance(error, self._application._restart_on):
            # As a supervisor does: this process ends with it, another one begins.
            self._simulation._restart_soon(self._process)
            return None
        failure = self._simulation._failure(f"{type(error).__name__} in {self.name}: {error}")
        failure.__cause__ = error
        return failure

    # -- for its process

    def deliver(self, effects: Effects) -> None:
        scheduler = self._scheduler
        before, scheduler.visiting = scheduler.visiting, self
        try:
            with self.reading_clock():
                for view, state in effects.changes:
                    for listener in self._listeners:
                        listener(view, state)
                # Within, since operations in the background go on here.
                wake_all(effects.completed)
        finally:
            scheduler.visiting = before

    def resumed(self) -> None:
        self._scheduler.unpark(self)

    # -- for its handle: what of a Driver is called from there

    def start(self) -> None:
        # However long it takes: whether a cluster forms in time is not what an application is tested for.
        while not self._process.kernel.has_usable_leader:
            self._scheduler.wait(POLL_SECONDS)

    def stop(self, timeout_seconds: float) -> None:
        if self._is_ending or not self._process.is_up or self._scheduler.thread() is None:
            return
        self._is_ending = True
        process, kernel = self._process, self._process.kernel
        now = process.clock()
        kernel.begin_close(now, now + max(0, round(timeout_seconds * 1000)))
        process.wake()
        while process.is_up and not kernel.has_left(process.clock()):
            self._scheduler.wait(POLL_SECONDS)
            process.wake()
        self.has_left = True
        effects = kernel.fail(ClusterClosed("the node has closed"))
        if effects is not None:
            self.deliver(effects)
        process.end()

    def add_listener(self, listener: SessionListener) -> None:
        self._listeners.append(listener)

    @property
    def view(self) -> SessionView:
        return self._process.view

    def submit(self, call: Call) -> None:
        if self._process.is_up:
            self._process.submit(call)
            return
        call.error = ClusterClosed("the node has stopped; nothing was sent")
        wake_all([call])

    def set_call_handler(self, handler: CallHandler | None) -> None:
        if handler is None:
            self._process.set_call_handler(None)
            return
        scheduler = self._scheduler

        def visited(inbound: InboundCall) -> None:
            before, scheduler.visiting = scheduler.visiting, self
            try:
                handler(inbound)
            finally:
                scheduler.visiting = before

        self._process.set_call_handler(visited)

    def answer(self, inbound: InboundCall, status: int, body: bytes) -> None:
        self._process.answer(inbound, status, body)

    def watch(self, loop: asyncio.AbstractEventLoop) -> LoopWatch:
        watch = self._watches.get(loop)
        if watch is None:
            watch = self._watches[loop] = LoopWatch()
        return watch

    @property
    def cluster_uuid(self) -> bytes:
        return self._process.kernel.cluster_uuid

    def stats(self) -> dict[str, Any]:
        process = self._process
        return {**process.kernel.status(process.clock()), "wire": dict(process._links.counters)}

    # -- the code

    def main(self) -> None:
        application = self._application
        application.starts += 1
        timing = self._process.world.timing
        if inspect.iscoroutinefunction(application._main):
            loop = SimulatedEventLoop(self._scheduler)
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                result = runner.run(self._amain(AsyncCluster._of(self._driver, timing, is_local=True)))
            forgotten = loop.forgotten_failure()
            if forgotten is not None:
                raise forgotten
        else:
            cluster = Cluster._of(self._driver, timing, is_local=True)
            cluster.start()
            result = application._main(cluster, *application._arguments)
        application.result, application.is_done = result, True

    async def _amain(self, cluster: AsyncCluster) -> Any:
        await cluster.start()
        return await self._application._main(cluster, *self._application._arguments)

    def _driver(self) -> Driver:
        return cast(Driver, self)


class Simulation:
    """
    A cluster of simulated members, with applications on them, in virtual time. A context manager.

    Everything that chance decides comes from the seed: the same seed, the same code and the same Python give
    the same run, down to the order in which threads and tasks go on. Time passes only in `run` and
    `run_until`; meanwhile, and in them, one thing runs at a time. Members are called n1, n2, ...

    While it is entered, the standard library's clocks, sleeps, locks and threads work in simulated time for
    the applications' code (`coordlib.testing.simulation.standard`), and as ever for everybody else.

    .. versionadded:: 0.1
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        members: int = 3,
        faults: str | Iterable[str] = "none",
        fault_seconds: float = 60.0,
        session_ttl: float = 10.0,
        request_timeout: float = 10.0,
        heartbeat: float = 0.05,
        election_timeout: tuple[float, float] = (0.3, 0.6),
        reads: str = "lease",
        stall_seconds: float = 20.0,
    ) -> None:
        """
        Describe a simulation. Nothing runs before it is entered.

        Args:
            seed: Decides everything that is left to chance.
            members: From 1 to 7.
            faults: "none"; "all", with a network and disks that misbehave as well; or the kinds that may happen
                (`coordlib.testing.FAULT_KINDS`). Which of them, when and how badly is drawn from the seed. What a fault
                ends is restarted after a while.
            fault_seconds: Until when, in simulated seconds from the start, faults begin. `heal` ends them.
            session_ttl, request_timeout, heartbeat, election_timeout, reads: As for `coordlib.Cluster`.
            stall_seconds: Real seconds after which an application's code that does not give way is an error.

        Raises:
            ConfigError: A setting is wrong.
        """
        if not 1 <= members <= 7:
            raise ConfigError(f"members must be from 1 to 7; got {members}")
        if reads not in ("lease", "quorum"):
            raise ConfigError(f"reads is 'lease' or 'quorum'; got {reads!r}")
        timing = Timing.from_seconds(
            heartbeat=heartbeat,
            election_timeout=election_timeout,
            session_ttl=session_ttl,
            drift_bound=0.01,
            request_timeout=request_timeout,
            start_timeout=30.0,
        )
        kinds = _kinds(faults)
        self.seed = seed
        self.repeat_with = f"Simulation(seed={seed}, ...)"  # how a failure is repeated, for its message
        chance = Choices(seed).stream("surroundings") if faults == "all" else None
        self.world = world = World(
            seed,
            members=members,
            timing=timing,
            network=NetworkProfile.draw(chance) if chance else None,
            disk=DiskProfile.draw(chance) if chance else None,
            clock=ClockProfile.draw(chance) if chance else None,
            reads_by_lease=reads == "lease",
        )
        self.applications: dict[str, Application] = {}
        self._scheduler = Scheduler(world, stall_seconds=stall_seconds)
        drawn = draw_faults(
            world.choices.stream("faults"),
            members=members,
            clients=1,  # if there are any
            from_ms=BEGIN_MS,
            to_ms=round(fault_seconds * 1000),
            kinds=kinds,
        )
        self._injector = FaultInjector(world, drawn if kinds else (), self._restarted)
        self._injector_ended = world.on_end
        world.on_end = self._ended
        self._ended_by_hand: set[str] = set()
        self._standard = Standard()
        self._surroundings = ExitStack()
        self._is_entered = False

    # -- life

    def __enter__(self) -> Self:
        """
        Raises:
            UsageError: Another simulation is entered.
        """
        scheduler = self._scheduler
        with ExitStack() as stack:
            self._standard.enter(scheduler)
            stack.callback(self._standard.leave)
            stack.enter_context(self.world)
            scheduler.is_running = True
            self.world.start_all()
            self._injector.schedule()
            scheduler.is_running = False
            self._surroundings = stack.pop_all()
        self._is_entered = True
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """What still runs is unwound: all application code has ended when this returns."""
        self._is_entered = False
        failure: BaseException | None = None
        if error is None:
            failure = self._forgotten_failure()
        elif not isinstance(error, SimulationFailed):
            error.add_note(self._where())
        log.addFilter(_nothing)  # what code says while it is unwound did not happen in the simulation
        left = self._scheduler.end()
        log.removeFilter(_nothing)
        self._surroundings.close()
        if failure is None and left and error is None:
            failure = self._failure(f"code that catches everything could not be ended: {', '.join(left)}")
        if failure is not None:
            raise failure

    def _forgotten_failure(self) -> BaseException | None:
        for life, loop in self._scheduler.loops:
            error = loop.forgotten_failure() if life.is_running else None
            if error is not None:
                failure = self._failure(
                    f"{type(error).__name__} in a task of {life.name}, which nobody awaited: {error}"
                )
                failure.__cause__ = error
                return failure
        return None

    def _where(self) -> str:
        return f"simulated with seed {self.seed}, at {self.now:.3f} s. Repeat it: {self.repeat_with}"

    def _failure(self, what: str) -> SimulationFailed:
        return SimulationFailed(f"{what}\n  {self._where()}")

    # -- applications

    def start(
        self,
        name: str,
        main: Callable[..., Any],
        *arguments: Any,
        restart_on: tuple[type[BaseException], ...] = (),
    ) -> Application:
        """
        Run `main(cluster, *arguments)` in a process: that of a member (n1, ...), or a client's of any other name.

        The cluster is a started `AsyncCluster` for an `async def`, else a started `Cluster`. When the process
        has crashed and is restarted, `main` is called anew, with a new cluster, unless it had returned. What is
        shared with other processes through globals or arguments stands for the world outside of the cluster.

        Args:
            restart_on: Exceptions of `main` that end the process and have it restarted a second later, as a
                supervisor would do. Any other exception fails the simulation.

        Raises:
            UsageError: That process runs an application already, or is down, or no simulation is entered.
        """
        self._check_entered()
        if name in self.applications:
            raise UsageError(
                f"{name!r} runs an application already: an application may have threads or tasks"
            )
        if name not in self.world.processes:
            self._start_client(name)
        process = self.world.processes[name]
        if not process.is_up:
            raise UsageError(f"{name!r} is down: restart it first")
        application = self.applications[name] = Application(self, name, main, arguments, tuple(restart_on))
        application._begin(process)
        return application

    def _start_client(self, name: str) -> Process:
        return self.world.start_client(name)

    # -- time

    @property
    def now(self) -> float:
        """Simulated seconds since the start."""
        return self.world.now / 1000

    def run(self, seconds: float) -> None:
        """
        Let time pass.

        Raises:
            SimulationFailed: An application raised an exception, or a node stopped that should not have.
        """
        self._run(seconds, None)

    def run_until(self, condition: Callable[[], bool], *, seconds: float) -> None:
        """
        Let time pass until the condition holds, which is looked at before every event.

        Raises:
            SimulationFailed: As `run`; or the condition does not hold within that time.
        """
        if not self._run(seconds, condition):
            what = getattr(condition, "__name__", "") or repr(condition)
            raise self._failure(
                f"the condition ({what}) did not come true within {seconds:g} simulated seconds"
            )

    def after(self, seconds: float, action: Callable[[], Any]) -> None:
        """Have something done later, for example a fault: between two events of the simulation, while time passes."""
        self.world.after(round(seconds * 1000), action)

    def _run(self, seconds: float, condition: Callable[[], bool] | None) -> bool:
        self._check_entered()
        scheduler = self._scheduler
        if scheduler.is_running or scheduler.thread() is not None:
            raise UsageError("time passes already: an application waits by time.sleep() or asyncio.sleep()")
        fatal = self.world.fatal
        scheduler.is_running = True
        try:
            holds = self.world.run(
                round(seconds * 1000),
                (lambda: bool(fatal)) if condition is None else (lambda: bool(fatal) or condition()),
            )
        except Stalled as error:
            raise self._failure(str(error)) from None
        finally:
            scheduler.is_running = False
        if fatal:
            name, why = fatal[0]
            raise self._failure(f"node {name} stopped: {why!r}") from why
        return holds

    def _check_entered(self) -> None:
        if not self._is_entered:
            raise UsageError("the simulation is not entered: use it in a `with` block")

    # -- faults

    @property
    def leader(self) -> str | None:
        """The name of the member that leads, if one does."""
        leader = self.world.leader
        return None if leader is None else leader.name

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self.world.members)

    def is_up(self, name: str) -> bool:
        return self._process(name).is_up

    def _process(self, name: str) -> Process:
        process = self.world.processes.get(name)
        if process is None:
            raise UsageError(f"there is no process {name!r}: there are {', '.join(self.world.processes)}")
        return process

    def crash(self, name: str) -> None:
        """
        End a process as a power failure does: what a disk had not been asked to keep is kept, lost or torn.

        Its application's code goes no step further: no `finally` and no `except` sees the end. It stays down
        until `restart` or `heal`.
        """
        self._end_by_hand(name, lambda process: process.crash())

    def kill(self, name: str) -> None:
        """End a process as `kill -9` does: what was written stays. Else as `crash`."""
        self._end_by_hand(name, lambda process: process.kill())

    def _end_by_hand(self, name: str, end: Callable[[Process], None]) -> None:
        process = self._process(name)
        self._ended_by_hand.add(name)
        try:
            end(process)
        finally:
            self._ended_by_hand.discard(name)

    def restart(self, name: str) -> None:
        """
        Start a process that is down, and its application from its beginning. A member whose disk does not let it
        start stays down.

        Raises:
            UsageError: It is up.
        """
        if self._process(name).is_up:
            raise UsageError(f"{name!r} is up: crash it first")
        application = self.applications.get(name)
        if application is not None and application._life is not None:
            application._life.has_left = False
        self._start_again(name)

    def _start_again(self, name: str) -> None:
        if self._process(name).is_up:
            return
        world = self.world
        process = world.try_start_member(name) if name in world.members else self._start_client(name)
        if process is not None:
            self._restarted(process)

    def _restarted(self, process: Process) -> None:
        application = self.applications.get(process.name)
        if application is None or application.is_done:
            return
        if application._life is None or not application._life.has_left:
            application._begin(process)

    def _ended(self, process: Process) -> None:
        """Of whatever: what a fault ended comes back by itself, and a client under its own name."""
        name = process.name
        application = self.applications.get(name)
        life = application._life if application is not None else None
        if name in self._ended_by_hand or (life is not None and life.has_left):
            return
        if name not in self.world.members:
            back_ms = self.world.choices.stream("clients' restarts").randint(50, RESTART_MS_MAX)
            self.world.after(back_ms, self._start_again, name)
        elif self._injector_ended is not None:
            self._injector_ended(process)

    def _restart_soon(self, process: Process) -> None:
        self.kill(process.name)
        self.world.after(RESTART_MS, self._start_again, process.name)

    def pause(self, name: str) -> None:
        """Stop a process as SIGSTOP does: the node and the application's code alike. Clocks go on."""
        self._process(name).pause()

    def resume(self, name: str) -> None:
        """Let a paused process go on."""
        self._process(name).resume()

    def cut(self, source: str, to: str, *, one_way: bool = False) -> None:
        """Let nothing get from one process to another, and back neither unless `one_way`."""
        self._process(source), self._process(to)
        self.world.cut(source, to)
        if not one_way:
            self.world.cut(to, source)

    def isolate(self, name: str) -> None:
        """Cut a process off from all others."""
        self._process(name)
        self.world.isolate(name)

    def heal(self) -> None:
        """End all faults, those that were still to come too; restart what is down, except what has left by itself."""
        self._check_entered()
        self._injector.heal()
        for name, process in list(self.world.processes.items()):
            application = self.applications.get(name)
            if not process.is_up and application is not None and not application.is_done:
                life = application._life
                if life is None or not life.has_left:
                    self._start_again(name)

    @property
    def faults(self) -> Counter[str]:
        """How often each kind of fault that was drawn has had an effect up to now."""
        return Counter(self._injector.applied)

    def digest(self) -> str:
        """Of everything that was drawn and of who ran when: equal for equal runs."""
        hash = blake2b(self._scheduler.digest() + self.world.choices.digest(), digest_size=16)
        hash.update(b"%d" % self.world.now)
        return hash.hexdigest()


@dataclass(frozen=True)
class Summary:
    """What `simulate` ran."""

    seeds: int
    seconds: float  # simulated, in all
    faults: Counter[str] = field(default_factory=Counter)


def simulate(
    scenario: Callable[[Simulation], Any], *, seeds: Iterable[int] = range(50), **options: Any
) -> Summary:
    """
    Run a scenario once for each seed, each in a simulation of its own, and stop at the first that fails.

    Args:
        scenario: Takes the simulation, entered; starts applications, lets time pass, and asserts. It makes anew
            whatever it needs: what it leaves behind would make a run depend on those before it.
        options: As for `Simulation`.

    Raises:
        Exception: Whatever the scenario raised, with a note that names the seed.
    """
    count, seconds, faults = 0, 0.0, Counter[str]()
    for seed in seeds:
        simulation = Simulation(seed, **options)
        with simulation:
            scenario(simulation)
        count += 1
        seconds += simulation.now
        faults += simulation.faults
    if not count:
        raise UsageError("no seeds: nothing would be simulated")
    return Summary(count, seconds, faults)
