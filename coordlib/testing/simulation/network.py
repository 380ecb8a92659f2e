"""The simulated network: a `Transport` on virtual wires.

A link is what a transport keeps up; each life of it is a wire. Frames of one wire arrive in order, and are lost
only with it, of which some may still arrive late, as what a busy receiver reads from an old socket after a new
one. What an attacker or bad hardware does (copies, replays, damage) happens below the seals, which must stop it.

When anything happens is not here (world.py), nor who is cut off from whom (`World.blocked`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final
from zlib import crc32

from coordlib.testing.simulation.surroundings import QUANTILES
from coordlib.transport.base import ConnectionDown, ConnectionUp, FrameReceived, Lane, TransportEvent
from coordlib.wire.channel import ChannelIdentity, Initiator
from coordlib.wire.keys import ClusterKeys

if TYPE_CHECKING:
    from coordlib.testing.simulation.processes import SimulatedProcess
    from coordlib.testing.simulation.world import World

__all__ = ["SimulatedTransport", "Wire"]

RECORDED_MAX: Final = 256
"""Frames that are kept to be replayed, of each pair of processes in each direction."""

INBOX_MAX: Final = 3000
"""What a process that stands still takes in before its peers' queues fill up."""

KEEPALIVE_MS: Final = 700
"""How long a connection lives whose other end is silent."""

_frame_received = tuple.__new__  # as `FrameReceived(...)` does, once for every frame, without its wrapper


class Link:
    """A connection that a transport keeps up."""

    __slots__ = ("dialer", "endpoint", "id", "is_wanted", "lane", "wire")

    def __init__(self, dialer: SimulatedTransport, id: int, endpoint: str, lane: str) -> None:
        self.dialer = dialer
        self.id = id
        self.endpoint = endpoint
        self.lane = lane
        self.is_wanted = True
        self.wire: Wire | None = None  # while it is up


class Wire:
    """One life of a link. Direction 0 is from the dialer to the listener, 1 the other."""

    __slots__ = ("arrivals", "held", "is_up", "link", "listener", "pairs", "queue_max", "route", "under_way")

    def __init__(self, link: Link, listener: SimulatedTransport, route: bytes, queue_max: int) -> None:
        self.link = link
        self.listener = listener
        self.route = route
        self.queue_max = queue_max
        self.is_up = True
        one, other = link.dialer.process.name, listener.process.name
        self.pairs = ((one, other), (other, one))
        self.arrivals = [0, 0]  # when the last frame of each direction arrives
        self.under_way = [0, 0]  # frames sent and not yet received
        self.held: tuple[list[FrameReceived], list[FrameReceived]] = ([], [])  # arrived, but not let through


class SimulatedTransport:
    """A `Transport` whose wires are the world's."""

    def __init__(self, world: World, process: SimulatedProcess) -> None:
        self.world = world
        self.process = process
        self.inbox: list[TransportEvent] = []
        self.links: dict[int, Link] = {}
        self.routes: dict[bytes, Wire] = {}
        self._link_count = 0

    # -- connections

    def bind(self, endpoint: str) -> str:
        self.world.listeners[endpoint] = self
        return endpoint

    def connect(self, endpoint: str, lane: str = Lane.CONTROL) -> int:
        self._link_count += 1
        link = self.links[self._link_count] = Link(self, self._link_count, endpoint, lane)
        self.world.after(self.world.delay(), self._dial, link)
        return link.id

    def _dial(self, link: Link) -> None:
        world, process = self.world, self.process
        if not process.is_up or not link.is_wanted or link.wire is not None:
            return
        listener = world.listeners.get(link.endpoint)
        if listener is None or world.is_apart(process.name, listener.process.name):
            world.after(world.network_chance.randint(30, 150), self._dial, link)
            return
        route = b"route-%d" % world.next_serial()
        network = world.network
        queue_max = network.bulk_queue_frames_max if link.lane == Lane.BULK else network.queue_frames_max
        link.wire = listener.routes[route] = Wire(link, listener, route, queue_max)
        self._receive(ConnectionUp(link.id))

    def reset(self, link: Link) -> None:
        """Lose a connection, with some of what is under way on it; it is dialled again."""
        if link.wire is None:
            return
        self._cut_off(link)
        if self.process.is_up:
            self._receive(ConnectionDown(link.id))
            self.world.after(self.world.network_chance.randint(20, 120), self._dial, link)

    def _cut_off(self, link: Link) -> None:
        wire, link.wire = link.wire, None
        if wire is not None:
            wire.is_up = False
            wire.listener.routes.pop(wire.route, None)
            self.world.held.pop(wire, None)

    def disconnect(self, connection: int) -> None:
        link = self.links.pop(connection, None)
        if link is not None:
            link.is_wanted = False
            self._cut_off(link)

    def drop_route(self, route: bytes) -> None:
        wire = self.routes.get(route)
        if wire is not None:
            wire.link.dialer.reset(wire.link)

    def close(self, *, is_silent: bool = False) -> None:
        """The process ended: whoever was connected notices, at once or (`is_silent`) by its not answering."""
        world = self.world
        for endpoint in [e for e, transport in world.listeners.items() if transport is self]:
            del world.listeners[endpoint]
        for wire in list(self.routes.values()):
            delay = world.network_chance.randint(20, KEEPALIVE_MS) if is_silent else world.delay()
            world.after(delay, self._notice, wire)
        for link in self.links.values():
            self._cut_off(link)
        self.routes.clear()
        self.inbox.clear()

    @staticmethod
    def _notice(wire: Wire) -> None:
        if wire.link.wire is wire:
            wire.link.dialer.reset(wire.link)

    # -- frames

    def send(self, connection: int, frame: bytes) -> bool:
        if self.process.effects_left is not None:
            self.process.count_effect()
        link = self.links.get(connection)
        if link is None:
            return False
        wire = link.wire
        if wire is None:
            return False
        return self._carry(wire, 0, wire.listener, _frame_received(FrameReceived, (0, wire.route, frame)))

    def reply(self, route: bytes, frame: bytes) -> bool:
        if self.process.effects_left is not None:
            self.process.count_effect()
        wire = self.routes.get(route)
        if wire is None:
            return False
        link = wire.link
        return self._carry(wire, 1, link.dialer, _frame_received(FrameReceived, (link.id, b"", frame)))

    def _carry(self, wire: Wire, direction: int, to: SimulatedTransport, event: FrameReceived) -> bool:
        world = self.world
        under_way, arrivals = wire.under_way, wire.arrivals
        if under_way[direction] >= wire.queue_max:
            world.counts["frames_refused"] += 1
            return False
        under_way[direction] += 1
        world.trace = crc32(event.frame, world.trace)
        draw = world.network_chance.random()
        # One draw decides: the least of it whether anything rare happens, all of it how long it takes.
        at = world.now + self.process.lag_ms + world.delays[int(draw * QUANTILES)]
        if at < arrivals[direction]:
            at = arrivals[direction]
        else:
            arrivals[direction] = at
        if world.records is not None:
            _record(world.records, wire.pairs[direction], event.frame)
        if draw < world.rare_chance:
            event = self._interfere(wire, direction, to, event, at)
        world.at(at, to._arrive, wire, direction, event)
        return True

    def _arrive(self, wire: Wire, direction: int, event: FrameReceived) -> None:
        process, world = self.process, self.world
        if not process.is_up:
            return
        if not wire.is_up:
            # Of a connection that is gone: lost, or it was read already and is only late.
            if world.network_chance.random() < world.network.late_chance and (
                wire.pairs[direction] not in world.blocked
            ):
                world.counts["frames_late"] += 1
                self._receive(event)
            return
        if (
            (world.blocked and wire.pairs[direction] in world.blocked)
            or wire.held[direction]  # behind those that came before
            or (process.is_paused and self.is_full)
        ):
            wire.held[direction].append(event)
            world.held[wire] = None
            world.counts["frames_held"] += 1
            return
        wire.under_way[direction] -= 1
        self.inbox.append(event)
        process.wake()

    @property
    def is_full(self) -> bool:
        """Its process stands still, and takes in no more."""
        return self.process.is_paused and len(self.inbox) >= INBOX_MAX

    def let_through(self, wire: Wire, direction: int) -> None:
        """What was held arrives at once, in order."""
        events = wire.held[direction]
        wire.under_way[direction] -= len(events)
        self.inbox.extend(events)
        events.clear()
        self.process.wake()

    def _receive(self, event: TransportEvent) -> None:
        if self.process.is_up:
            self.inbox.append(event)
            self.process.wake()

    def poll(self, timeout_seconds: float) -> list[TransportEvent]:
        events, self.inbox = self.inbox, []
        return events

    def wake(self) -> None:
        self.process.wake()

    # -- what must be stopped by the seals

    def _interfere(
        self, wire: Wire, direction: int, to: SimulatedTransport, event: FrameReceived, at: int
    ) -> FrameReceived:
        """Let something rare befall a frame; returns what arrives in its place."""
        world = self.world
        chance, network, counts = world.network_chance, world.network, world.counts
        draw = chance.random() * world.rare_chance
        extra: bytes | None = None
        if draw < network.duplicate_chance:
            counts["frames_duplicated"] += 1
            extra = event.frame
        elif draw < network.duplicate_chance + network.replay_chance:
            assert world.records is not None
            counts["frames_replayed"] += 1
            extra = chance.choice(world.records[wire.pairs[direction]])
        else:
            counts["frames_corrupted"] += 1
            kind = chance.randrange(4)
            frame = event.frame
            if kind == 0:
                damaged = bytearray(frame)
                damaged[chance.randrange(len(frame))] ^= chance.randint(1, 255)
                return event._replace(frame=bytes(damaged))
            if kind == 1:
                return event._replace(frame=frame[: chance.randrange(len(frame))])
            extra = chance.randbytes(chance.randint(1, 200)) if kind == 2 else _alien_frame()
        wire.under_way[direction] += 1
        world.at(at + chance.randint(0, 50), to._arrive, wire, direction, event._replace(frame=extra))
        return event

    # -- the rest of the contract

    def after_fork_in_child(self) -> None:
        """Simulated processes do not fork."""

    def counters(self) -> dict[str, int]:
        return {}


def _record(records: dict[tuple[str, str], list[bytes]], pair: tuple[str, str], frame: bytes) -> None:
    frames = records.get(pair)
    if frames is None:
        records[pair] = [frame]
    elif len(frames) < RECORDED_MAX:
        frames.append(frame)
    else:
        frames[crc32(frame) % RECORDED_MAX] = frame


@lru_cache(maxsize=1)
def _alien_frame() -> bytes:
    """The greeting of a member of another cluster, with another secret."""
    keys = ClusterKeys.from_secrets(("the secret of quite another cluster, as long",), "elsewhere")
    identity = ChannelIdentity("elsewhere", "n1", 1, True, bytes(16))
    return Initiator(keys, identity, expected_peer="n2", random_bytes=bytes).hello()
