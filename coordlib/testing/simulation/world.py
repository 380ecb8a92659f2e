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
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from coordlib.config import Timing
from coordlib.errors import CoordError
from coordlib.machine.effects import Applied
from coordlib.node.service import RequestService
from coordlib.raft.messages import Entry
from coordlib.testing.disk import SimulatedFileSystem
from coordlib.testing.simulation.choices import Choices, Stream
from coordlib.testing.simulation.network import SimulatedTransport
from coordlib.testing.simulation.processes import ClientProcess, MemberProcess, Process, SimulatedProcess

if TYPE_CHECKING:
    from coordlib.testing.simulation.invariants import Invariants

__all__ = ["World"]

KEEPALIVE_MS = 700  # how long a cut connection lives


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
        self.choices = Choices(seed)
        self.network_chance = self.choices.stream("network")
        self.disk_chance = self.choices.stream("disk")
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
        self._starts: Counter[str] = Counter()
        self.listeners: dict[str, SimulatedTransport] = {}
        self.cuts: set[tuple[str, str]] = set()
        self.fatal: list[tuple[str, CoordError]] = []
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._serial = 0
        self.clock_process: SimulatedProcess | None = None
        self.observer: Invariants | None = None  # set before the first start
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
            if self.observer is not None:
                self.observer.applied(self.member(node_id), entry, applied)
            go_on(entry, applied, now)

        service.applied = observed  # type: ignore[method-assign]  # looked at, not changed
        return service

    # -- chance

    def process_chance(self, name: str) -> Stream:
        """The stream of the next process of that name."""
        self._starts[name] += 1
        return self.choices.stream(f"process:{name}:{self._starts[name]}")

    def delay(self) -> int:
        chance = self.network_chance
        if chance.random() < 0.01:
            return chance.randint(0, 20 * self.delay_ms_max)
        return chance.randint(0, self.delay_ms_max)

    def disk_delay(self) -> int:
        chance = self.disk_chance
        if chance.random() < 0.005:
            return chance.randint(0, 100 * self.disk_ms_max)
        return chance.randint(0, self.disk_ms_max)

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
            link = self.choices.stream("faults").choice(links)
            link.dialer.reset(link)
