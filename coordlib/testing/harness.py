"""Whole clusters in one thread and in virtual time: production code on a simulated network, disk and clock.

Everything above the sockets is what runs in production: kernels, links, the message codec, the storage, the
operations of the API, and the order in which a driver carries out effects (`MemberDriver._carry_out` itself).
One seed decides everything that is not the caller's doing. What is here is a world and its faults; workloads
and what must hold of them are the tests' business.

Time is whole milliseconds of the world. Every process has its own clock, which began elsewhere and runs at
its own rate. Sealing costs more than all the rest, so that connections are plain unless asked otherwise.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any
from unittest.mock import patch

from coordlib.api.grants import Grants
from coordlib.config import Timing
from coordlib.errors import CoordError
from coordlib.machine.effects import Applied
from coordlib.node.client import ClientKernel
from coordlib.node.disk import DiskAgent
from coordlib.node.driver import ClientDriver, Driver, MemberDriver, SessionListener
from coordlib.node.effects import Effects, LogEvent
from coordlib.node.kernel import MemberKernel
from coordlib.node.links import Links
from coordlib.node.service import RequestService
from coordlib.node.session import Call
from coordlib.raft.messages import Entry
from coordlib.storage import SegmentStorage
from coordlib.storage.base import Persist
from coordlib.testing.disk import CrashNow, SimulatedFileSystem
from coordlib.testing.network import CLUSTER, PlainLinks, SimulatedTransport
from coordlib.transport.base import Lane
from coordlib.wire.channel import ChannelIdentity
from coordlib.wire.keys import ClusterKeys

__all__ = ["ClientProcess", "MemberProcess", "Operation", "Process", "World"]

WALL_MS = 1_700_000_000_000
KEEPALIVE_MS = 700  # how long a cut connection lives


@lru_cache(maxsize=1)
def _keys() -> ClusterKeys:
    return ClusterKeys.from_secrets(("a secret that is long enough for a simulation",), CLUSTER)


# -- processes ---------------------------------------------------------------------------------------------


class _SimulatedCall(Call):
    __slots__ = ("operation",)

    operation: Operation


class Operation:
    """An operation of the API under way in a simulated process. `result` or `error` is set at its end."""

    def __init__(
        self,
        process: SimulatedProcess,
        generator: Generator[Any, bytes, Any],
        done: Callable[[], None] | None,
    ):
        self.process = process
        self.result: Any = None
        self.error: CoordError | None = None
        self.is_done = False
        self._generator = generator
        self._done = done
        process.operations[self] = None
        self._advance(lambda: next(generator))

    def abandon(self) -> None:
        """Its process is gone. What it still wants done is not."""
        try:
            self._generator.throw(KeyboardInterrupt)
            while True:
                self._generator.send(b"")
        except (CoordError, KeyboardInterrupt, StopIteration):
            pass

    def resume(self, call: Call) -> None:
        error, reply = call.error, call.reply
        if error is not None:
            self._advance(lambda: self._generator.throw(error))
        else:
            self._advance(lambda: self._generator.send(reply or b""))

    def _advance(self, advance: Callable[[], Any]) -> None:
        # As `coordlib.api.engine.run` does, without a thread that waits.
        process = self.process
        with process.reading_clock():
            try:
                step = advance()
                while step.is_detached:
                    step.call = Call(
                        step.kind,
                        step.body,
                        step.deadline_ms,
                        view=step.view,
                        is_detached=True,
                        withdraws=step.withdraws,
                    )
                    process.submit(step.call)
                    step = self._generator.send(b"")
            except StopIteration as stop:
                self._end(stop.value, None)
                return
            except CoordError as error:
                self._end(None, error)
                return
        call = _SimulatedCall(step.kind, step.body, step.deadline_ms, sequence=step.sequence, view=step.view)
        call.operation = self
        step.call = call
        process.submit(call)

    def _end(self, result: Any, error: CoordError | None) -> None:
        self.result, self.error, self.is_done = result, error, True
        self.process.operations.pop(self, None)
        if self._done is not None:
            self._done()


class SimulatedProcess(Driver):
    """What runs: a node with its clock, its transport and its part of the driver's loop."""

    world: World
    name: str
    transport: SimulatedTransport
    _kernel: Any
    _links: Any

    def _begin(self, world: World, name: str) -> None:
        rng = world.rng
        self.world = world
        self.name = self._name = name
        self.is_up = True
        self.is_paused = False
        self.fatal: CoordError | None = None
        self.lag_ms = 0  # how much of this round has passed in system calls
        self.effects_left: int | None = None  # sends until the crash
        self.offset = rng.randint(0, 10_000_000)
        self.rate = rng.randint(996, 1004)  # per mille; the drift bound is 1 %
        self.wall_offset = rng.randint(-3000, 3000)
        self._submitted: deque[Call] = deque()
        self._listeners: list[SessionListener] = []
        self._next_run = -1
        self._busy_until = 0
        self.operations: dict[Operation, None] = {}
        # What handles of the API take from their cluster.
        self._request_timeout_ms = world.timing.request_timeout_ms
        self._grants = Grants()
        self._transport = self.transport = SimulatedTransport(world, self)
        self.incarnation = rng.getrandbits(62)
        self.events: list[LogEvent] = []

    def clock(self) -> int:
        """What this process's monotonic clock shows now."""
        return self.offset + (self.world.now + self.lag_ms) * self.rate // 1000

    @contextmanager
    def reading_clock(self) -> Iterator[None]:
        """What runs within reads this process's clock."""
        before, self.world.clock_process = self.world.clock_process, self
        try:
            yield
        finally:
            self.world.clock_process = before

    def _world_time(self, clock_ms: int) -> int:
        return -(-(clock_ms - self.offset) * 1000 // self.rate)

    def _make_links(self, is_member: bool, disk_id: bytes, members: Sequence[str]) -> Links:
        identity = ChannelIdentity(CLUSTER, self.name, self.incarnation, is_member, disk_id)
        make = Links if self.world.is_sealed else PlainLinks
        return make(self.transport, _keys(), identity, members=members, random_bytes=self.world.rng.randbytes)

    def count_effect(self) -> None:
        if self.effects_left is not None:
            self.effects_left -= 1
            if self.effects_left < 0:
                raise CrashNow(f"{self.name}: before a send")

    def wake(self) -> None:
        """Run a round as soon as the process can."""
        self._run_at(self.world.now)

    def _run_at(self, at: int) -> None:
        if not self.is_up or self.is_paused:
            return
        at = max(at, self._busy_until, self.world.now)
        if self._next_run < 0 or at < self._next_run:
            self._next_run = at
            self.world.at(at, lambda: self._run_if_due(at))

    def _run_if_due(self, at: int) -> None:
        if self.is_up and not self.is_paused and self._next_run == at:
            self._next_run = -1
            self._round()

    def submit(self, call: Call) -> None:
        self._submitted.append(call)
        self.wake()

    def start_operation(
        self, generator: Generator[Any, bytes, Any], done: Callable[[], None] | None = None
    ) -> Operation:
        return Operation(self, generator, done)

    def _round(self) -> None:
        """One turn of `Driver._loop`."""
        kernel, links = self._kernel, self._links
        self.lag_ms = 0
        now = self.clock()
        try:
            links.receive(self.transport.poll(0), kernel, now)
            for _ in range(len(self._submitted)):
                kernel.submit(self._submitted.popleft(), now)
            kernel.tick(now, WALL_MS + self.wall_offset + self.world.now)
            links.tick(now)
            self._carry_out(kernel, now)
            self.events += links.events
            links.events.clear()
        except CrashNow:
            self.crash()
            return
        except CoordError as error:
            self.fatal = error
            self.world.fatal.append((self.name, error))
            self.end()
            return
        self._busy_until = self.world.now + self.lag_ms
        self.lag_ms = 0
        self._run_at(self._world_time(min(kernel.deadline, links.deadline)))

    def _deliver(self, effects: Effects) -> None:
        self.events += effects.events
        for view, state in effects.changes:
            self._grants.session_changed(view, state)
        for call in effects.completed:
            if isinstance(call, _SimulatedCall):
                call.operation.resume(call)

    def pause(self) -> None:
        """As SIGSTOP: nothing runs, what arrives is kept."""
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False
        self._next_run = -1
        self.wake()

    def end(self) -> None:
        """End without a word."""
        self.is_up = False
        self.transport.close()
        with self.reading_clock():
            for operation in self.operations:
                operation.abandon()
        self.operations.clear()

    def crash(self) -> None:
        self.end()


class _Storage(SegmentStorage):
    """Writing takes time, of which the process knows nothing until it is over."""

    process: MemberProcess

    def write(self, batch: Sequence[Persist]) -> None:
        super().write(batch)
        self.process.lag_ms += self.process.world.disk_delay()


class MemberProcess(SimulatedProcess, MemberDriver):
    """A member, on a disk that outlives it. Its effects are carried out by the driver's own code."""

    def __init__(self, world: World, name: str, fs: SimulatedFileSystem, *, bootstrap: bool = False) -> None:
        self._begin(world, name)
        self.fs = fs
        rng = world.rng
        storage = _Storage(
            fs,
            "/data",
            node_id=name,
            cluster_name=CLUSTER,
            new_disk_id=rng.randbytes(16),
            segment_size_bytes=world.segment_size_bytes,
            fill_size_bytes=4096,
        )
        storage.process = self
        self._storage = storage
        recovered = storage.open()
        self._disk = DiskAgent(storage)
        self._kernel = MemberKernel(
            node_id=name,
            members=world.members,
            timing=world.timing,
            identity=recovered.identity,
            recovered=recovered.groups.get(0),
            snapshot=self._disk.read_snapshot(),
            random_bytes=rng.randbytes,
            random_ticks=rng.randint,
            now=self.clock(),
            reads_by_lease=world.reads_by_lease,
            wants_bootstrap=bootstrap,
        )
        self.kernel: MemberKernel = self._kernel
        self.transport.bind(world.members[name])
        self._links = self._make_links(True, recovered.identity.disk_id, list(world.members))
        for other, endpoint in sorted(world.members.items()):
            if other != name:
                self._links.connect(endpoint, other, (Lane.CONTROL, Lane.BULK))
        self._kernel.open_session(self.clock())
        self.wake()

    def crash_within(self, effects: int) -> None:
        """Crash before one of the next few effects, on the disk or on the wire."""
        self.effects_left = self.world.rng.randint(0, effects)
        self.fs.crash_at = self.fs.effects + self.world.rng.randint(0, effects)

    def crash(self) -> None:
        """The machine loses power: what was not synced is kept, lost or torn."""
        self.end()
        self.fs.crash(self.world.rng)

    def kill(self) -> None:
        """As kill -9: what was written stays."""
        self.end()
        self.fs.kill()


class ClientProcess(SimulatedProcess, ClientDriver):
    """A client that begins with some members' addresses."""

    def __init__(self, world: World, name: str, endpoints: Sequence[str]) -> None:
        self._begin(world, name)
        self._kernel = ClientKernel(
            name=name, timing=world.timing, random_bytes=world.rng.randbytes, now=self.clock()
        )
        self.kernel: ClientKernel = self._kernel
        self._links = self._make_links(False, b"", ())
        for endpoint in endpoints:
            self._links.connect(endpoint)
        self._kernel.open_session(self.clock())
        self.wake()


Process = MemberProcess | ClientProcess


class World:
    """A network of processes, and the one source of time and chance."""

    def __init__(
        self,
        seed: int,
        *,
        members: int = 3,
        timing: Timing | None = None,
        is_sealed: bool = False,
        reads_by_lease: bool = False,
        delay_ms_max: int = 3,
        disk_ms_max: int = 2,
        segment_size_bytes: int = 64 * 1024,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 0
        self.timing = timing or Timing()
        self.is_sealed = is_sealed
        self.reads_by_lease = reads_by_lease
        self.delay_ms_max = delay_ms_max
        self.disk_ms_max = disk_ms_max
        self.segment_size_bytes = segment_size_bytes
        self.members = {f"n{i}": f"memory://n{i}" for i in range(1, members + 1)}
        self.disks = {name: SimulatedFileSystem() for name in self.members}
        self.processes: dict[str, Process] = {}
        self.listeners: dict[str, SimulatedTransport] = {}
        self.cuts: set[tuple[str, str]] = set()
        self.fatal: list[tuple[str, CoordError]] = []
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._serial = 0
        self.clock_process: SimulatedProcess | None = None
        self.on_applied: Callable[[str, Entry, Applied], None] | None = None
        self._patches = ExitStack()

    # -- time

    def next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def at(self, time_ms: int, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(time_ms, self.now), self.next_serial(), action))

    def after(self, delay_ms: int, action: Callable[[], None]) -> None:
        self.at(self.now + delay_ms, action)

    def run(self, duration_ms: int, until: Callable[[], bool] | None = None) -> bool:
        """Let time pass; with `until`, only until it holds. Returns whether it does."""
        end = self.now + duration_ms
        heap = self._heap
        while heap and heap[0][0] <= end:
            if until is not None and until():
                return True
            self.now, _, action = heapq.heappop(heap)
            action()
        self.now = max(self.now, end)
        return until is None or until()

    def _read_clock(self) -> int:
        assert self.clock_process is not None, "a clock was read outside of any process"
        return self.clock_process.clock()

    def __enter__(self) -> World:
        """While the world is entered, operations and grants read the clock of the process they run in."""
        for module in ("locks", "maps"):
            self._patches.enter_context(patch(f"coordlib.api.{module}.monotonic_ms", self._read_clock))
        self._patches.enter_context(patch("coordlib.node.kernel.RequestService", self._make_service))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.end()
        self._patches.close()

    def _make_service(self, node_id: str, *arguments: Any) -> RequestService:
        service = RequestService(node_id, *arguments)
        go_on = service.applied

        def observed(entry: Entry, applied: Applied, now: int) -> None:
            if self.on_applied is not None:
                self.on_applied(node_id, entry, applied)
            go_on(entry, applied, now)

        service.applied = observed  # type: ignore[method-assign]  # looked at, not changed
        return service

    # -- chance

    def delay(self) -> int:
        rng = self.rng
        if rng.random() < 0.01:
            return rng.randint(0, 20 * self.delay_ms_max)
        return rng.randint(0, self.delay_ms_max)

    def disk_delay(self) -> int:
        rng = self.rng
        if rng.random() < 0.005:
            return rng.randint(0, 100 * self.disk_ms_max)
        return rng.randint(0, self.disk_ms_max)

    # -- processes and faults

    def start_member(self, name: str, *, bootstrap: bool = False) -> MemberProcess:
        """Start a member, or start it again, on its disk."""
        process = MemberProcess(self, name, self.disks[name], bootstrap=bootstrap)
        self.processes[name] = process
        return process

    def start_all(self) -> None:
        for name in self.members:
            self.start_member(name)

    def start_client(self, name: str, endpoints: Sequence[str] = ()) -> ClientProcess:
        process = ClientProcess(self, name, endpoints or list(self.members.values())[:2])
        self.processes[name] = process
        return process

    def member(self, name: str) -> MemberProcess:
        process = self.processes[name]
        assert isinstance(process, MemberProcess)
        return process

    @property
    def up_members(self) -> list[MemberProcess]:
        return [p for p in self.processes.values() if isinstance(p, MemberProcess) and p.is_up]

    @property
    def leader(self) -> MemberProcess | None:
        """The leader with the highest term, if there is one."""
        leaders = [p for p in self.up_members if p.kernel.is_leader]
        return max(leaders, key=lambda p: p.kernel.raft.term if p.kernel.raft else 0, default=None)

    def is_cut(self, source: SimulatedTransport, to: SimulatedTransport) -> bool:
        return (source.process.name, to.process.name) in self.cuts

    def cut(self, source: str, to: str) -> None:
        """Nothing goes from one process to the other; connections between them die after a while."""
        self.cuts.add((source, to))
        self.after(KEEPALIVE_MS, self._reset_cut_links)

    def isolate(self, name: str) -> None:
        for other in self.processes:
            if other != name:
                self.cut(name, other)
                self.cut(other, name)

    def heal(self) -> None:
        self.cuts.clear()

    def _reset_cut_links(self) -> None:
        for process in list(self.processes.values()):
            for link in list(process.transport.links.values()):
                listener = link.listener
                if listener is not None and (
                    self.is_cut(link.dialer, listener) or self.is_cut(listener, link.dialer)
                ):
                    link.dialer.reset(link)

    def reset_some_link(self) -> None:
        """Lose one connection, as when a router reboots."""
        links = [
            link
            for process in self.processes.values()
            if process.is_up
            for link in process.transport.links.values()
            if link.listener is not None
        ]
        if links:
            link = self.rng.choice(links)
            link.dialer.reset(link)
