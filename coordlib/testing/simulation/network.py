"""The simulated network: a `Transport` on virtual wires.

Frames are delayed, and lost only with their connection, of which some may still arrive late, as what a busy
receiver reads from an old socket after a new one. What is not here: when anything happens (world.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coordlib.transport.base import (
    ConnectionDown,
    ConnectionUp,
    FrameReceived,
    Lane,
    TransportEvent,
)

if TYPE_CHECKING:
    from coordlib.testing.simulation.processes import SimulatedProcess
    from coordlib.testing.simulation.world import World

__all__ = ["SimulatedTransport"]


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

    def __init__(self, world: World, process: SimulatedProcess) -> None:
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
            world.after(world.network_chance.randint(30, 150), lambda: self._dial(link))
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
            self.world.after(self.world.network_chance.randint(20, 120), lambda: self._dial(link))

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
                if world.network_chance.random() < 0.3 and not world.is_cut(source, to):
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
