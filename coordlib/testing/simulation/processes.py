"""The processes of a simulated cluster: members and clients, each a production kernel with its driver's code.

What a process takes from the world: its clock, its disk, its wires. What is not here: when anything happens.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from coordlib.api.grants import Grants
from coordlib.errors import CoordError
from coordlib.node.client import ClientKernel
from coordlib.node.disk import DiskAgent
from coordlib.node.driver import ClientDriver, Driver, MemberDriver, SessionListener
from coordlib.node.effects import Effects, LogEvent
from coordlib.node.kernel import MemberKernel
from coordlib.node.links import Links
from coordlib.node.session import Call
from coordlib.storage import SegmentStorage
from coordlib.storage.base import Persist
from coordlib.testing.disk import CrashNow, SimulatedFileSystem
from coordlib.testing.simulation.choices import Stream
from coordlib.testing.simulation.network import SimulatedTransport
from coordlib.testing.simulation.plain import CLUSTER, PlainLinks
from coordlib.transport.base import Lane
from coordlib.wire.channel import ChannelIdentity
from coordlib.wire.keys import ClusterKeys

if TYPE_CHECKING:
    from coordlib.testing.simulation.world import World

__all__ = ["WALL_MS", "ClientProcess", "Guest", "MemberProcess", "Operation", "Process", "SimulatedProcess"]

WALL_MS = 1_700_000_000_000


@lru_cache(maxsize=1)
def _keys() -> ClusterKeys:
    return ClusterKeys.from_secrets(("a secret that is long enough for a simulation",), CLUSTER)


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
        self.error: CoordError | CancelledError | None = None
        self.is_done = False
        self._call: Call | None = None  # for which it waits
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

    def cancel(self) -> None:
        """
        Do as `arun` does when its task is cancelled, or `run` at Ctrl-C; nothing if it has ended.

        It ends with a CancelledError, at once or after what its `with` blocks do at their exits; or as if
        nothing had happened, if it takes no notice.
        """
        if not self.is_done:
            self._call = None
            self._advance(lambda: self._generator.throw(CancelledError()))

    def resume(self, call: Call) -> None:
        if call is not self._call:
            return  # nobody waits for it any more
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
            except (CoordError, CancelledError) as error:
                self._end(None, error)
                return
        call = _SimulatedCall(step.kind, step.body, step.deadline_ms, sequence=step.sequence, view=step.view)
        call.operation = self
        step.call = self._call = call
        process.submit(call)

    def _end(self, result: Any, error: CoordError | CancelledError | None) -> None:
        self.result, self.error, self.is_done = result, error, True
        self.process.operations.pop(self, None)
        if self._done is not None:
            self._done()


class Guest(Protocol):
    """Code of an application that runs in a simulated process, in threads of its own (application.py)."""

    def deliver(self, effects: Effects) -> None:
        """Calls that ended, and changes of the session."""

    def resumed(self) -> None:
        """The process goes on after a pause."""


class SimulatedProcess(Driver):
    """What runs: a node with its clock, its transport and its part of the driver's loop."""

    world: World
    name: str
    transport: SimulatedTransport
    chance: Stream
    _kernel: Any
    _links: Any

    def _begin(self, world: World, name: str) -> None:
        self.chance = chance = world.process_chance(name)
        self.world = world
        self.name = self._name = name
        self.is_up = True
        self.is_paused = False
        self.fatal: CoordError | None = None
        self.lag_ms = 0  # how much of this round has passed in system calls
        self.effects_left: int | None = None  # sends until the crash
        self.offset = chance.randint(0, 10_000_000)
        self.rate = chance.randint(996, 1004)  # per mille; the drift bound is 1 %
        self.wall_offset = chance.randint(-3000, 3000)
        self._submitted: deque[Call] = deque()
        self._listeners: list[SessionListener] = []
        self._next_run = -1
        self._busy_until = 0
        self.operations: dict[Operation, None] = {}
        # What handles of the API take from their cluster.
        self._request_timeout_ms = world.timing.request_timeout_ms
        self._grants = Grants()
        self._transport = self.transport = SimulatedTransport(world, self)
        self.incarnation = chance.getrandbits(62)
        self.events: list[LogEvent] = []
        self.guest: Guest | None = None  # the application's code, where there is any

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
        links = make(self.transport, _keys(), identity, members=members, random_bytes=self.chance.randbytes)
        observer, send = self.world.observer, links.send
        if observer is not None and is_member:

            def watched(name: str, messages: Sequence[tuple[int, Any]], **more: Any) -> Any:
                observer.sending(self, name, messages)
                return send(name, messages, **more)

            links.send = watched  # type: ignore[method-assign]  # looked at, not changed
        return links

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
            self._observe_turn()
            self.crash()
            return
        except CoordError as error:
            self.fatal = error
            self.world.fatal.append((self.name, error))
            self.end()
            return
        self._observe_turn()
        self._busy_until = self.world.now + self.lag_ms
        self.lag_ms = 0
        self._run_at(self._world_time(min(kernel.deadline, links.deadline)))

    def _observe_turn(self) -> None:
        observer = self.world.observer
        if observer is not None:
            observer.turned(self, self.world.now)

    def _deliver(self, effects: Effects) -> None:
        self.events += effects.events
        for view, state in effects.changes:
            self._grants.session_changed(view, state)
        for call in effects.completed:
            if isinstance(call, _SimulatedCall):
                call.operation.resume(call)
        if self.guest is not None:
            self.guest.deliver(effects)

    def pause(self) -> None:
        """As SIGSTOP: nothing runs, what arrives is kept."""
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False
        self._next_run = -1
        self.wake()
        if self.guest is not None:
            self.guest.resumed()

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
        world = self.process.world
        observer = world.observer
        if observer is not None:
            for item in batch:
                observer.writing(self.process, item)
        super().write(batch)
        self.process.lag_ms += world.disk_delay()
        if observer is not None:
            for item in batch:
                observer.wrote(self.process, item)


class MemberProcess(SimulatedProcess, MemberDriver):
    """A member, on a disk that outlives it. Its effects are carried out by the driver's own code."""

    def __init__(self, world: World, name: str, fs: SimulatedFileSystem, *, bootstrap: bool = False) -> None:
        self._begin(world, name)
        self.fs = fs
        chance = self.chance
        storage = _Storage(
            fs,
            "/data",
            node_id=name,
            cluster_name=CLUSTER,
            new_disk_id=chance.randbytes(16),
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
            random_bytes=chance.randbytes,
            random_ticks=chance.randint,
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
        if world.observer is not None:
            world.observer.started(self, recovered.groups.get(0))
        self._kernel.open_session(self.clock())
        self.wake()

    def crash_within(self, effects: int) -> None:
        """Crash before one of the next few effects, on the disk or on the wire."""
        chance = self.world.choices.stream("faults")
        self.effects_left = chance.randint(0, effects)
        self.fs.crash_at = self.fs.effects + chance.randint(0, effects)

    def crash(self) -> None:
        """The machine loses power: what was not synced is kept, lost or torn."""
        self.end()
        self.fs.crash(self.world.disk_chance)

    def kill(self) -> None:
        """As kill -9: what was written stays."""
        self.end()
        self.fs.kill()


class ClientProcess(SimulatedProcess, ClientDriver):
    """A client that begins with some members' addresses."""

    def __init__(self, world: World, name: str, endpoints: Sequence[str]) -> None:
        self._begin(world, name)
        self._kernel = ClientKernel(
            name=name, timing=world.timing, random_bytes=self.chance.randbytes, now=self.clock()
        )
        self.kernel: ClientKernel = self._kernel
        self._links = self._make_links(False, b"", ())
        for endpoint in endpoints:
            self._links.connect(endpoint)
        self._kernel.open_session(self.clock())
        self.wake()


Process = MemberProcess | ClientProcess
