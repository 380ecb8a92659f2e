"""The processes of a simulated cluster: members and clients, each a production kernel with its driver's code.

What a process takes from the world: its clock, its disk, its wires. What is not here: when anything happens.
"""

from __future__ import annotations

import math
from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from coordlib.api.grants import Grants
from coordlib.errors import CoordError, NoQuorum
from coordlib.node.client import ClientKernel
from coordlib.node.disk import DiskAgent
from coordlib.node.driver import ClientDriver, Driver, MemberDriver, SessionListener
from coordlib.node.effects import Effects, LogEvent
from coordlib.node.kernel import MemberKernel
from coordlib.node.links import Links
from coordlib.node.operations import FOREVER_MS, Do, Failure, Outcome, Step, Success, Together
from coordlib.node.session import Call
from coordlib.raft.messages import SnapshotMeta
from coordlib.storage import SegmentStorage
from coordlib.storage.base import DiskIdentity, Persist, SnapshotWriter
from coordlib.testing.disk import CrashNow, SimulatedFileSystem
from coordlib.testing.simulation.choices import Stream
from coordlib.testing.simulation.invariants import Impostor
from coordlib.testing.simulation.network import SimulatedTransport
from coordlib.testing.simulation.plain import CLUSTER, PlainLinks
from coordlib.transport.base import Lane
from coordlib.wire.channel import ChannelIdentity
from coordlib.wire.keys import ClusterKeys

if TYPE_CHECKING:
    from coordlib.testing.simulation.world import World

__all__ = ["WALL_MS", "ClientProcess", "Guest", "MemberProcess", "Operation", "Process", "SimulatedProcess"]

WALL_MS = 1_800_000_000_000  # after every epoch that ids are counted from
PAUSED_LOOK_MS = 10


@lru_cache(maxsize=1)
def _keys() -> ClusterKeys:
    return ClusterKeys.from_secrets(("a secret that is long enough for a simulation",), CLUSTER)


class _SimulatedCall(Call):
    __slots__ = ("operation",)

    operation: Operation

    def wake(self) -> None:
        self.operation.resume(self)


class Operation:
    """An operation of the API under way in a simulated process. `result` or `error` is set at its end."""

    def __init__(
        self,
        process: SimulatedProcess,
        generator: Generator[Any, Any, Any],
        done: Callable[[], None] | None,
    ):
        self.process = process
        self.result: Any = None
        self.error: CoordError | CancelledError | None = None
        self.is_done = False
        self._call: Call | None = None  # for which it waits
        self._group: dict[_SimulatedCall, int] = {}  # or for which of several, and their places
        self._outcomes: list[Outcome] = []
        self._generator = generator
        self._done = done
        process.operations[self] = None
        self._advance(lambda: next(generator))

    def abandon(self) -> None:
        """Its process is gone. What it still wants done is not."""
        try:
            step = self._generator.throw(KeyboardInterrupt)
            while True:
                if isinstance(step, Step):
                    step = self._generator.send(b"")
                else:
                    step = self._generator.throw(KeyboardInterrupt)  # nobody is there any more to do it
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
            self._group = {}
            self._advance(lambda: self._generator.throw(CancelledError()))

    def resume(self, call: Call) -> None:
        if call in self._group:
            assert isinstance(call, _SimulatedCall)
            place = self._group.pop(call)
            self._outcomes[place] = Success(call.reply or b"") if call.error is None else Failure(call.error)
            if not self._group:
                outcomes = self._outcomes
                self._advance(lambda: self._generator.send(outcomes))
            return
        if call is not self._call:
            return  # nobody waits for it any more
        error, reply = call.error, call.reply
        if error is not None:
            self._advance(lambda: self._generator.throw(error))
        else:
            self._advance(lambda: self._generator.send(reply or b""))

    def _advance(self, advance: Callable[[], Any]) -> None:
        # As `coordlib.node.operations.run` does, without a thread that waits.
        process = self.process
        with process.reading_clock():
            try:
                step = advance()
                while True:
                    if isinstance(step, Together):
                        if self._begin_together(step):
                            return
                        step = self._generator.send(self._outcomes)
                    elif isinstance(step, Do):
                        step = self._do(step)
                    elif step.is_detached:
                        step.call = Call(
                            step.kind,
                            step.body,
                            step.deadline_ms,
                            view=step.view,
                            is_detached=True,
                            withdraws=step.withdraws,
                        )
                        step.call.target = step.target
                        process.submit(step.call)
                        step = self._generator.send(b"")
                    else:
                        break
            except StopIteration as stop:
                self._end(stop.value, None)
                return
            except (CoordError, CancelledError) as error:
                self._end(None, error)
                return
        call = self._call = self._make_call(step)
        if step.pause_seconds:
            self._look_again(call, process.clock() + max(1, math.ceil(round(step.pause_seconds * 1000, 6))))
        elif step.joins is not None:
            with process.reading_clock():
                step.joins(call)
            self._look_again(call, step.deadline_ms)
        else:
            process.submit(call)

    def _make_call(self, step: Step) -> _SimulatedCall:
        call = _SimulatedCall(step.kind, step.body, step.deadline_ms, sequence=step.sequence, view=step.view)
        call.operation = self
        call.target = step.target
        step.call = call
        return call

    def _do(self, operation: Do) -> Any:
        """The application's own I/O takes no time here: what is to take some has steps of its own."""
        try:
            result = operation.call()
        except Exception as error:
            return self._generator.throw(error)
        return self._generator.send(result)

    def _begin_together(self, together: Together) -> bool:
        """Whether there is something to wait for."""
        self._group, self._call = {}, None
        self._outcomes = [Failure(CoordError("not yet"))] * len(together.operations)
        for place, each in enumerate(together.operations):
            if isinstance(each, Do):
                try:
                    self._outcomes[place] = Success(each.call())
                except Exception as error:
                    self._outcomes[place] = Failure(error)
            else:
                self._group[self._make_call(each)] = place
        for call in list(self._group):
            self.process.submit(call)
        return bool(self._group)

    def _look_again(self, call: _SimulatedCall, at_ms: int) -> None:
        """Go on when the process's clock shows this, if nothing else has ended the call before."""
        process = self.process
        world = process.world

        def look() -> None:
            if call is not self._call or not process.is_up:
                return
            if process.is_paused or process.clock() < at_ms:
                self._look_again(call, at_ms)
                return
            if call.deadline_ms <= at_ms:
                call.error = NoQuorum("nobody answered in time; nothing was changed")
            self.resume(call)

        if at_ms < FOREVER_MS:
            soonest = world.now + (PAUSED_LOOK_MS if process.is_paused else 1)
            world.at(max(soonest, process._world_time(at_ms)), look)

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


class _ReadingClock:
    __slots__ = ("_before", "_process")

    def __init__(self, process: SimulatedProcess) -> None:
        self._process = process

    def __enter__(self) -> None:
        world = self._process.world
        self._before, world.clock_process = world.clock_process, self._process

    def __exit__(self, *_: object) -> None:
        self._process.world.clock_process = self._before


class SimulatedProcess(Driver):
    """What runs: a node with its clock, its transport and its part of the driver's loop."""

    world: World
    name: str
    transport: SimulatedTransport
    chance: Stream
    _kernel: Any
    _links: Any

    def _begin(self, world: World, name: str) -> None:
        self.start_number = world.number_start(name)
        self.chance = chance = world.choices.stream(f"process:{name}:{self.start_number}")
        self.world = world
        self.observer = world.observer
        self.name = self._name = name
        self.is_up = True
        self.is_paused = False
        self.is_crashed_within = False  # it ended between two effects of a turn
        self.fatal: CoordError | None = None
        self._is_closing = False
        self.lag_ms = 0  # how much of this round has passed in system calls
        self.effects_left: int | None = None  # sends until the crash
        self.offset = chance.randint(0, 10_000_000)
        error, wall_error = world.clock.rate_error_permille_max, world.clock.wall_offset_ms_max
        drawn = chance.randint(-error, error)
        # Often at an edge: a promise that lacks a margin breaks between a clock as fast and one as slow as may be.
        self.rate = 1000 + (drawn if 2 * abs(drawn) <= error else error if drawn > 0 else -error)
        self.wall_offset = chance.randint(-wall_error, wall_error)
        self.wall_rate = 1000
        self.slow_ms_max = 0  # how long a turn may take besides its system calls
        self.write_slow_ms = 0  # how much longer than usual a durable write takes
        self._submitted: deque[Call] = deque()
        self._questions: deque[Callable[[], None]] = deque()
        self._listeners: list[SessionListener] = []
        self._is_ready = False  # its turn comes at this moment
        self._due = 0  # when its turn comes at the latest
        self._timer_at = -1  # when the world looks whether it is due; -1: never
        self._busy_until = 0
        self._stopped_at = 0  # since when it has been paused
        self._late_ms = 0  # how long it was kept from running
        self.turned_at_ms = self.told_ms = 0  # when its last turn came, in the world's time and by its clock
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

    def wall_clock(self) -> int:
        """What this machine's wall clock shows now."""
        return WALL_MS + self.wall_offset + (self.world.now + self.lag_ms) * self.wall_rate // 1000

    _read_clock = clock
    _read_wall_clock = wall_clock

    def set_rate(self, rate: int) -> None:
        """Let the monotonic clock run at another rate (per mille) from now on."""
        now = self.world.now
        self.offset += now * self.rate // 1000 - now * rate // 1000
        self.rate = rate
        self.wake()  # its deadline is at another moment now

    def set_wall_rate(self, rate: int) -> None:
        """Let the wall clock run at another rate (per mille) from now on."""
        now = self.world.now
        self.wall_offset += now * self.wall_rate // 1000 - now * rate // 1000
        self.wall_rate = rate

    def reading_clock(self) -> _ReadingClock:
        """What runs within reads this process's clock."""
        return _ReadingClock(self)

    def _world_time(self, clock_ms: int) -> int:
        return -(-(clock_ms - self.offset) * 1000 // self.rate)

    def _make_links(self, is_member: bool, disk_id: bytes, members: Sequence[str]) -> Links:
        identity = ChannelIdentity(CLUSTER, self.name, self.incarnation, is_member, disk_id)
        make = Links if self.world.is_sealed else PlainLinks
        links = make(self.transport, _keys(), identity, members=members, random_bytes=self.chance.randbytes)
        observer, send = self.observer, links.send
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
        """Have a turn as soon as the process can."""
        if self._is_ready or self.is_paused or not self.is_up:
            return
        if self._busy_until > self.world.now:
            self._set_due(
                min(self._due, self._busy_until) if self._due > self.world.now else self._busy_until
            )
        else:
            self._is_ready = True
            self.world.ready.append(self)

    def _set_due(self, at: int) -> None:
        self._due = at
        if self._timer_at < 0 or at < self._timer_at:
            self._timer_at = at
            self.world.at(at, self._on_timer, at)

    def _on_timer(self, at: int) -> None:
        # Deadlines mostly move on: one look ahead is kept in the world's queue, and moved on when it comes up.
        if at != self._timer_at:
            return
        self._timer_at = -1
        if self.is_paused or self._is_ready or not self.is_up:
            return
        if self._due > at:
            self._set_due(self._due)
        else:
            self.wake()

    def leave(self, patience_ms: int = 3000) -> None:
        """Leave in good order, as `close()` of the cluster does: the session ends, the leadership is handed over."""
        if self.is_up and not self._is_closing:
            self._is_closing = True
            now = self.clock()
            self._kernel.begin_close(now, now + patience_ms)
            self.wake()

    def submit(self, call: Call) -> None:
        self._submitted.append(call)
        self.wake()

    def start_operation(
        self, generator: Generator[Any, Any, Any], done: Callable[[], None] | None = None
    ) -> Operation:
        return Operation(self, generator, done)

    def take_turn(self) -> None:
        """One turn of `Driver._loop`."""
        self._is_ready = False
        if self.is_paused or not self.is_up:
            return
        kernel, links, world = self._kernel, self._links, self.world
        now = self.clock()
        self.turned_at_ms, self.told_ms = world.now, now
        events = self.transport.poll(0)
        if self.slow_ms_max:
            self.lag_ms = world.choices.stream("slow").randint(1, self.slow_ms_max)
        late_ms, self._late_ms = self._late_ms, 0
        observer = self.observer
        try:
            self._turn(kernel, links, events, now, late_ms)
            if self._is_closing and kernel.has_left(now):
                self._carry_out(kernel, now)
                self._observe_turn()
                self.kill()
                return
        except CrashNow:
            self._observe_turn()
            self.is_crashed_within = True
            self.crash()
            return
        except CoordError as error:
            self._failed(error)
            return
        if observer is not None:
            observer.turned(self, world.now)
        busy_until = self._busy_until = world.now + self.lag_ms
        self.lag_ms = 0
        due, check = kernel.deadline, links.deadline
        due = -(-((check if check < due else due) - self.offset) * 1000 // self.rate)  # as `_world_time`
        self._set_due(due if due > busy_until else busy_until)

    def _failed(self, error: CoordError) -> None:
        self.fatal = error
        self.world.note_error(self.name, error)
        last = self._kernel.fail(error)
        if last is not None:
            self._deliver(last)
        self.kill()

    def _observe_turn(self) -> None:
        observer = self.observer
        if observer is not None:
            observer.turned(self, self.world.now)

    def _log(self, events: list[LogEvent]) -> None:
        self.events += events

    def _deliver(self, effects: Effects) -> None:
        self.events += effects.events
        for view, state in effects.changes:
            self._grants.session_changed(view, state)
        for call in effects.completed:
            if isinstance(call, _SimulatedCall):
                call.operation.resume(call)
        if self.guest is not None:
            self.guest.deliver(effects)
        if effects.calls:
            with self.reading_clock():
                self._hand_over(effects.calls)

    def pause(self) -> None:
        """As SIGSTOP: nothing runs, what arrives is kept."""
        if not self.is_paused:
            self.is_paused = True
            self._stopped_at = self.world.now

    def resume(self) -> None:
        """Go on, late: what arrived meanwhile is heard before any timer."""
        if not self.is_paused or not self.is_up:
            return
        self.is_paused = False
        self._late_ms = self.world.now - self._stopped_at
        self.wake()
        self.world.let_through()
        if self.guest is not None:
            self.guest.resumed()

    def end(self, *, is_silent: bool = False) -> None:
        """End without a word; `is_silent`: nor does anything else tell the others."""
        if not self.is_up:
            return
        self.is_up = False
        self.transport.close(is_silent=is_silent)
        with self.reading_clock():
            for operation in list(self.operations):
                operation.abandon()
        self.operations.clear()
        if self.world.on_end is not None:
            self.world.on_end(self)  # type: ignore[arg-type]  # a member or a client

    def crash(self) -> None:
        self.end(is_silent=True)

    def kill(self) -> None:
        self.end()


class _Storage(SegmentStorage):
    """Writing takes time, of which the process knows nothing until it is over."""

    process: MemberProcess

    def write(self, batch: Sequence[Persist]) -> None:
        world = self.process.world
        observer = self.process.observer
        if observer is not None:
            for item in batch:
                observer.writing(self.process, item)
        super().write(batch)
        self.process.lag_ms += world.write_delay() + self.process.write_slow_ms
        if observer is not None:
            for item in batch:
                observer.wrote(self.process, item)

    def set_identity(self, identity: DiskIdentity) -> None:
        super().set_identity(identity)
        if self.process.observer is not None:
            self.process.observer.identified(self.process, identity)

    def create_snapshot(self, group: int, meta: SnapshotMeta) -> _SlowWriter:  # type: ignore[override]  # same contract
        if self.process.observer is not None:
            self.process.observer.snapshotting(self.process, meta.index)
        return _SlowWriter(super().create_snapshot(group, meta), self.process)


class _SlowWriter:
    """A snapshot's pieces take time too, in which the world goes on."""

    def __init__(self, writer: SnapshotWriter, process: MemberProcess) -> None:
        self._writer = writer
        self._process = process
        self.abort = writer.abort

    def write(self, data: bytes) -> None:
        self._writer.write(data)
        self._process.lag_ms += self._process.world.write_delay() // 2

    def finish(self) -> None:
        self._writer.finish()
        self._process.lag_ms += self._process.world.write_delay() + self._process.write_slow_ms


class MemberProcess(SimulatedProcess, MemberDriver):
    """A member, on a disk that outlives it. Its effects are carried out by the driver's own code."""

    def __init__(
        self,
        world: World,
        name: str,
        fs: SimulatedFileSystem,
        *,
        bootstrap: bool = False,
        is_damaged: bool = False,
        is_impostor: bool = False,
    ) -> None:
        self._begin(world, name)
        if is_impostor:
            self.observer = Impostor()
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
        if self.observer is not None:
            self.observer.started(self, recovered.groups.get(0), is_damaged=is_damaged)
            if not is_impostor:
                self.observer.identified(self, recovered.identity)
        self._kernel.open_session(self.clock())
        self.wake()

    def crash_within(self, effects: int, chance: Stream | None = None) -> None:
        """Crash before one of the next few effects, on the disk or on the wire."""
        chance = chance or self.world.choices.stream("faults")
        self.effects_left = chance.randint(0, effects)
        self.fs.crash_at = self.fs.effects + chance.randint(0, effects)

    def crash(self) -> None:
        """The machine loses power: what was not synced is kept, lost or torn."""
        if self.is_up:
            # The disk first: what hears of the end may look at it.
            self.fs.crash(self.world.choices.stream(f"crash:{self.name}:{self.start_number}"))
            super().crash()

    def kill(self) -> None:
        """As kill -9: what was written stays."""
        if self.is_up:
            self.fs.kill()
            super().kill()


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
