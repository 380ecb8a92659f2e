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
from coordlib.transport.base import (
    ConnectionDown,
    ConnectionUp,
    FrameReceived,
    Lane,
    TransportEvent,
)
from coordlib.wire.channel import (
    ChannelIdentity,
    Established,
    HelloAccepted,
    Initiator,
    Opened,
    RehelloWanted,
    Rejected,
    RejectFrame,
    Responder,
)
from coordlib.wire.faults import UnknownSession
from coordlib.wire.keys import ClusterKeys

__all__ = ["ClientProcess", "MemberProcess", "Operation", "Process", "World"]

CLUSTER = "simulated"
WALL_MS = 1_700_000_000_000
KEEPALIVE_MS = 700  # how long a cut connection lives
QUEUE_FRAMES_MAX = 1000


@lru_cache(maxsize=1)
def _keys() -> ClusterKeys:
    return ClusterKeys.from_secrets(("a secret that is long enough for a simulation",), CLUSTER)


# -- the network -------------------------------------------------------------------------------------------


class _Link:
    """A connection that a transport keeps up: its frames arrive in order while it lives."""

    __slots__ = ("arrivals", "dialer", "endpoint", "epoch", "id", "lane", "listener", "route")

    def __init__(self, dialer: SimulatedTransport, id: int, endpoint: str, lane: str) -> None:
        self.dialer = dialer
        self.id = id
        self.endpoint = endpoint
        self.lane = lane
        self.listener: SimulatedTransport | None = None  # while it is up
        self.route = b""
        self.epoch = 0
        self.arrivals = [0, 0]  # when the last frame of each direction arrives


class SimulatedTransport:
    """A `Transport` whose wires are the world's. Frames are lost only with their connection."""

    def __init__(self, world: World, process: _Process) -> None:
        self.world = world
        self.process = process
        self.inbox: list[TransportEvent] = []
        self.links: dict[int, _Link] = {}
        self.routes: dict[bytes, _Link] = {}

    def bind(self, endpoint: str) -> str:
        self.world.listeners[endpoint] = self
        return endpoint

    def connect(self, endpoint: str, lane: str = Lane.CONTROL) -> int:
        id = len(self.links) + 1
        self.links[id] = link = _Link(self, id, endpoint, lane)
        self.world.after(self.world.delay(), lambda: self._dial(link))
        return id

    def _dial(self, link: _Link) -> None:
        world = self.world
        if not self.process.is_up:
            return
        listener = world.listeners.get(link.endpoint)
        if listener is None or world.is_cut(self, listener) or world.is_cut(listener, self):
            world.after(world.rng.randint(30, 150), lambda: self._dial(link))
            return
        link.listener = listener
        link.epoch += 1
        link.route = b"route-%d" % world.next_serial()
        listener.routes[link.route] = link
        self._receive(ConnectionUp(link.id))

    def reset(self, link: _Link) -> None:
        """Lose a connection, with some of what is under way on it; it is dialled again."""
        if link.listener is None:
            return
        link.listener.routes.pop(link.route, None)
        link.listener = None
        link.epoch += 1
        if self.process.is_up:
            self._receive(ConnectionDown(link.id))
            self.world.after(self.world.rng.randint(20, 120), lambda: self._dial(link))

    def _receive(self, event: TransportEvent) -> None:
        if self.process.is_up:
            self.inbox.append(event)
            self.process.wake()

    def disconnect(self, connection: int) -> None:
        link = self.links.pop(connection, None)
        if link is not None and link.listener is not None:
            link.listener.routes.pop(link.route, None)
            link.listener = None
            link.epoch += 1

    def send(self, connection: int, frame: bytes) -> bool:
        self.process.count_effect()
        link = self.links.get(connection)
        if link is None or link.listener is None:
            return False
        event = FrameReceived(0, link.route, frame)
        self._carry(link, 0, self, link.listener, event)
        return True

    def reply(self, route: bytes, frame: bytes) -> bool:
        self.process.count_effect()
        link = self.routes.get(route)
        if link is None:
            return False
        self._carry(link, 1, self, link.dialer, FrameReceived(link.id, b"", frame))
        return True

    def _carry(
        self, link: _Link, direction: int, source: SimulatedTransport, to: SimulatedTransport, event: Any
    ) -> None:
        world = self.world
        at = max(world.now + self.process.lag_ms + world.delay(), link.arrivals[direction])
        link.arrivals[direction] = at
        epoch = link.epoch

        def arrive() -> None:
            if not to.process.is_up:
                return
            if link.epoch != epoch:
                # Of a connection that is gone: lost, or it was read already and is only late.
                if world.rng.random() < 0.3 and not world.is_cut(source, to):
                    to._receive(event)
                return
            if world.is_cut(source, to):
                link.arrivals[direction] = max(link.arrivals[direction], world.now + 20)
                world.at(world.now + 20, arrive)
                return
            to._receive(event)

        world.at(at, arrive)

    def drop_route(self, route: bytes) -> None:
        link = self.routes.get(route)
        if link is not None:
            link.dialer.reset(link)

    def poll(self, timeout_seconds: float) -> list[TransportEvent]:
        events, self.inbox = self.inbox, []
        return events

    def wake(self) -> None:
        self.process.wake()

    def close(self) -> None:
        """The process ended: everybody who was connected notices."""
        world = self.world
        for endpoint in [e for e, transport in world.listeners.items() if transport is self]:
            del world.listeners[endpoint]
        for link in list(self.routes.values()):
            world.after(world.delay(), lambda link=link: link.dialer.reset(link))  # type: ignore[misc]  # bound now
        for link in self.links.values():
            if link.listener is not None:
                link.listener.routes.pop(link.route, None)
                link.listener = None
        self.routes.clear()

    def after_fork_in_child(self) -> None:
        """Simulated processes do not fork."""

    def counters(self) -> dict[str, int]:
        return {}


# -- connections without sealing ---------------------------------------------------------------------------


class _PlainInitiator(Initiator):
    """The handshake and its outcomes, without the cryptography: the identity is sent as it is."""

    __slots__ = ("_peer", "_token")

    def hello(self, *, is_rekey: bool = False) -> bytes:
        self._peer: ChannelIdentity | None = None
        self._token = self._random_bytes(8)
        identity = self._identity
        numbers = identity.incarnation.to_bytes(8, "big") + bytes([identity.is_member])
        return b"H" + self._token + numbers + identity.disk_id.ljust(16, b"\0") + identity.node.encode()

    def seal(self, plaintext: bytes) -> bytes:
        return b"D" + self._token + plaintext

    def needs_rekey(self, age_seconds: float = 0.0) -> bool:
        return False

    def receive(self, frame: bytes) -> Established | Opened | Rejected | RehelloWanted:
        if frame[1:9] != self._token:
            raise UnknownSession("of a connection that is over")
        if frame[:1] == b"W":
            self._peer = _identity_of(frame)
            return Established(self._peer)
        if frame[:1] == b"R":
            return RehelloWanted()
        if self._peer is None:
            raise UnknownSession("before the welcome")
        return Opened(self._peer, frame[9:], False)


class _PlainResponder(Responder):
    __slots__ = ("_tokens",)

    def __init__(self, identity: ChannelIdentity) -> None:
        self._identity = identity
        self._tokens: dict[bytes, list[Any]] = {}  # route -> [token, peer, is live]

    def seal(self, route: bytes, plaintext: bytes) -> bytes:
        session = self._tokens.get(route)
        if session is None:
            raise UnknownSession("no session on this route")
        return b"D" + bytes(session[0]) + plaintext

    def drop(self, route: bytes) -> None:
        self._tokens.pop(route, None)

    def wipe(self) -> None:
        self._tokens.clear()

    def receive(self, route: bytes, frame: bytes) -> HelloAccepted | Opened | RejectFrame:
        if frame[:1] == b"H":
            peer = _identity_of(frame)
            self._tokens[route] = [frame[1:9], peer, False]
            ours = self._identity
            numbers = ours.incarnation.to_bytes(8, "big") + bytes([ours.is_member])
            welcome = b"W" + frame[1:9] + numbers + ours.disk_id.ljust(16, b"\0") + ours.node.encode()
            return HelloAccepted(welcome, peer)
        session = self._tokens.get(route)
        if session is None or session[0] != frame[1:9]:
            return RejectFrame(b"R" + frame[1:9], "unknown-session", "a session that this node does not have")
        is_first = not session[2]
        session[2] = True
        return Opened(session[1], frame[9:], is_first)


def _identity_of(frame: bytes) -> ChannelIdentity:
    incarnation = int.from_bytes(frame[9:17], "big")
    disk_id = frame[18:34].rstrip(b"\0")
    return ChannelIdentity(CLUSTER, frame[34:].decode(), incarnation, bool(frame[17]), disk_id)


class _PlainLinks(Links):
    """Production links over connections that are not sealed."""

    def __init__(
        self, transport: SimulatedTransport, keys: ClusterKeys, identity: ChannelIdentity, **more: Any
    ):
        super().__init__(transport, keys, identity, **more)
        self._responder = _PlainResponder(identity)

    def connect(self, endpoint: str, name: str = "", lanes: Sequence[str] = (Lane.CONTROL,)) -> None:
        super().connect(endpoint, name, lanes)
        for connection in self._connections.values():
            if not isinstance(connection.initiator, _PlainInitiator):
                connection.initiator = _PlainInitiator(
                    self._keys, self._identity, expected_peer=None, random_bytes=self._random_bytes
                )


# -- processes ---------------------------------------------------------------------------------------------


class _SimulatedCall(Call):
    __slots__ = ("operation",)

    operation: Operation


class Operation:
    """An operation of the API under way in a simulated process. `result` or `error` is set at its end."""

    def __init__(
        self, process: _Process, generator: Generator[Any, bytes, Any], done: Callable[[], None] | None
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


class _Process(Driver):
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
        make = Links if self.world.is_sealed else _PlainLinks
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


class MemberProcess(_Process, MemberDriver):
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


class ClientProcess(_Process, ClientDriver):
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
        self.clock_process: _Process | None = None
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
