"""Whole clusters in one thread and in virtual time: production code on a simulated network, disk and clock.

Everything above the sockets is what runs in production: kernels, links, the message codec, the storage, the
operations of the API, and the order in which a driver does things (`Driver._turn`, `MemberDriver._carry_out`).
One seed decides everything that is not the caller's doing. What is here is a world and what can be done to it, one
mechanism at a time; which faults befall it when is in faults.py, what must hold in invariants.py.

Time is whole milliseconds of the world. Every process has its own clock, which began elsewhere and runs at its own
rate. At every moment everything that happens comes first; then each process that was woken by it has one turn. Ciphers
are replaced by checksums unless asked otherwise (plain.py).
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from coordlib.config import Timing
from coordlib.errors import CoordError
from coordlib.machine import commands
from coordlib.machine.effects import Applied
from coordlib.node.service import RequestService
from coordlib.raft.messages import Entry
from coordlib.testing.disk import CrashNow, SimulatedFileSystem
from coordlib.testing.simulation.choices import Choices, Stream
from coordlib.testing.simulation.model import Violation
from coordlib.testing.simulation.network import KEEPALIVE_MS, Link, SimulatedTransport, Wire
from coordlib.testing.simulation.processes import ClientProcess, MemberProcess, Process, SimulatedProcess
from coordlib.testing.simulation.surroundings import ClockProfile, DiskProfile, NetworkProfile, quantiles
from coordlib.wire.schema import decode_messages

if TYPE_CHECKING:
    from coordlib.testing.simulation.invariants import Invariants

__all__ = ["ClockProfile", "DiskProfile", "NetworkProfile", "World"]

AT_ONCE_MAX = 20_000
"""More things than this do not happen at one moment: a process goes round in a circle."""
NAMED_LAST = 10

DECODED_MAX = 64
"""Of so many of the latest frames it is remembered what they say."""
OPERATIONS_DECODED_MAX = 256

Pair = tuple[str, str]
"""Names of two processes: from, to."""


class World:
    """
    A network of processes, and the one source of time and chance.

    Attributes:
        fatal: Members that an error ended which nobody expected.
        stopped: Members that an expected one ended, and when: `expect` says what a fault may lead to.
        blocked: Through which pairs nothing gets, because of a cut or a hold.
        counts: What the network did to frames.
        trace: Checksum over all frames sent: equal for equal runs.
    """

    def __init__(
        self,
        seed: int,
        *,
        members: int = 3,
        timing: Timing | None = None,
        network: NetworkProfile | None = None,
        disk: DiskProfile | None = None,
        clock: ClockProfile | None = None,
        is_sealed: bool = False,
        reads_by_lease: bool = False,
        segment_size_bytes: int = 64 * 1024,
    ) -> None:
        self.seed = seed
        self.choices = Choices(seed)
        self.network_chance = self.choices.stream("network")
        self.disk_chance = self.choices.stream("disk")
        self.now = 0
        self.timing = timing or Timing()
        self.network = network = network or NetworkProfile()
        self.disk = disk = disk or DiskProfile()
        self.clock = clock or ClockProfile()
        self.delays = quantiles(
            network.delay_ms_min,
            network.delay_ms_mean,
            network.delay_ms_max,
            network.slow_chance,
            network.slow_ms_max,
        )
        self.write_delays = quantiles(
            disk.write_ms_min, disk.write_ms_mean, disk.write_ms_max, disk.slow_chance, disk.slow_ms_max
        )
        self.rare_chance = network.duplicate_chance + network.replay_chance + network.corrupt_chance
        self.records: dict[Pair, list[bytes]] | None = {} if network.replay_chance else None
        self.is_sealed = is_sealed
        self.reads_by_lease = reads_by_lease
        self.segment_size_bytes = segment_size_bytes
        self.members = {f"n{i}": f"memory://n{i}" for i in range(1, members + 1)}
        self.disks = {name: SimulatedFileSystem() for name in self.members}
        self.processes: dict[str, Process] = {}
        self._starts: Counter[str] = Counter()
        self.listeners: dict[str, SimulatedTransport] = {}
        self.cuts: Counter[Pair] = Counter()
        self.holds: Counter[Pair] = Counter()
        self.blocked: set[Pair] = set()
        self.held: dict[Wire, None] = {}  # wires on which something waits to be let through
        self.counts: Counter[str] = Counter()
        self.trace = 0
        self.fatal: list[tuple[str, CoordError]] = []
        self.stopped: list[tuple[int, str, CoordError]] = []
        self._expected: dict[str, tuple[type[CoordError], ...]] = {}
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0
        self.ready: deque[SimulatedProcess] = deque()  # whose turn it is at this moment
        self.clock_process: SimulatedProcess | None = None
        self.observer: Invariants | None = None  # set before the first start
        self.on_applied: Callable[[str, Entry, Applied], None] | None = None
        self.on_end: Callable[[Process], None] | None = None
        self._patches = ExitStack()

    # -- time

    def next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def at(self, time_ms: int, action: Callable[..., None], *arguments: Any) -> None:
        self._serial += 1
        now = self.now
        heapq.heappush(self._heap, (time_ms if time_ms > now else now, self._serial, action, arguments))

    def after(self, delay_ms: int, action: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now + delay_ms, action, *arguments)

    def run(self, duration_ms: int, until: Callable[[], bool] | None = None) -> bool:
        """
        Let time pass; with `until`, only until it holds. Returns whether it does.

        Raises:
            Violation: One moment has no end: something always leads to something else at once.
        """
        end = self.now + duration_ms
        heap, ready, pop = self._heap, self.ready, heapq.heappop
        left = AT_ONCE_MAX
        last: list[str] = []
        while True:
            if until is not None and until():
                return True
            left -= 1
            if heap and heap[0][0] <= self.now:
                _, _, action, arguments = pop(heap)
                if left < NAMED_LAST:
                    last.append(getattr(action, "__qualname__", repr(action)))
                action(*arguments)
            elif ready:
                process = ready.popleft()
                if left < NAMED_LAST:
                    last.append(f"a turn of {process.name}")
                process.take_turn()
            elif heap and heap[0][0] <= end:
                self.now = heap[0][0]
                left = AT_ONCE_MAX
                last.clear()
            else:
                break
            if left <= 0:
                raise Violation(
                    "no progress", f"{AT_ONCE_MAX} things happened at one moment, the last: {', '.join(last)}"
                )
        self.now = max(self.now, end)
        return until is None or until()

    def _read_clock(self) -> int:
        assert self.clock_process is not None, "a clock was read outside of any process"
        return self.clock_process.clock()

    def __enter__(self) -> World:
        """While the world is entered, operations and grants read the clock of the process they run in."""
        for module in ("locks", "maps", "ids"):
            self._patches.enter_context(patch(f"coordlib.api.{module}.monotonic_ms", self._read_clock))
        self._patches.enter_context(patch("coordlib.node.kernel.RequestService", self._make_service))
        # What a leader tells its followers comes to each of them, and they answer alike: bytes that were read once are
        # not read again. What is read cannot be changed, so nobody can tell.
        decode = lru_cache(maxsize=DECODED_MAX)(decode_messages)
        self._patches.enter_context(patch("coordlib.node.links.decode_messages", decode))
        # And every member applies the same commands.
        decode_operation = lru_cache(maxsize=OPERATIONS_DECODED_MAX)(commands.decode_operation)
        self._patches.enter_context(patch("coordlib.machine.decode_operation", decode_operation))
        return self

    def __exit__(self, *_: object) -> None:
        self.on_end = None
        for process in self.processes.values():
            process.end()
        self._patches.close()

    def _make_service(self, node_id: str, *arguments: Any) -> RequestService:
        service = RequestService(node_id, *arguments)
        go_on = service.applied

        def observed(entry: Entry, applied: Applied, now: int) -> None:
            if self.on_applied is not None:
                self.on_applied(node_id, entry, applied)
            process = self.member(node_id)
            if process.observer is not None:
                process.observer.applied(process, entry, applied)
            go_on(entry, applied, now)

        service.applied = observed  # type: ignore[method-assign]  # looked at, not changed
        return service

    # -- chance

    def number_start(self, name: str) -> int:
        """Which start of a process of that name this is, from 1 on."""
        self._starts[name] += 1
        return self._starts[name]

    def delay(self) -> int:
        """Of a packet."""
        return self.delays[int(self.network_chance.random() * len(self.delays))]

    def write_delay(self) -> int:
        return self.write_delays[int(self.disk_chance.random() * len(self.write_delays))]

    # -- processes

    def start_member(
        self, name: str, *, bootstrap: bool = False, is_damaged: bool = False, is_impostor: bool = False
    ) -> MemberProcess:
        """
        Start a member, or start it again, on its disk.

        Args:
            is_damaged: The disk lost or changed what had been durable, so that observers expect less of it.
            is_impostor: It is not this member's disk at all. Observers do not see this process: it must come to nothing.

        Raises:
            CoordError: What production raises; the disk is let go of.
            CrashNow: The disk was to crash before this was over, and has.
        """
        disk = self.disks[name]
        try:
            process = MemberProcess(
                self, name, disk, bootstrap=bootstrap, is_damaged=is_damaged, is_impostor=is_impostor
            )
        except CrashNow:
            disk.crash(self.choices.stream(f"crash:{name}:{self._starts[name]}"))
            raise
        except CoordError:
            disk.kill()
            raise
        self.processes[name] = process
        return process

    def try_start_member(
        self, name: str, *, is_damaged: bool = False, is_impostor: bool = False
    ) -> MemberProcess | None:
        """Start a member; None if it does not start, which is noted in `stopped` or `fatal`, or crashes on the way."""
        try:
            return self.start_member(name, is_damaged=is_damaged, is_impostor=is_impostor)
        except CrashNow:
            self.counts["crashes_at_start"] += 1
        except CoordError as error:
            self.note_error(name, error)
        return None

    def expect(self, name: str, *kinds: type[CoordError]) -> None:
        """These errors too may end the member: what was done to it leads to them. Without any: none from now on."""
        self._expected[name] = (*self._expected.get(name, ()), *kinds) if kinds else ()

    def note_error(self, name: str, error: CoordError) -> None:
        if isinstance(error, self._expected.get(name, ())):
            self.stopped.append((self.now, name, error))
        else:
            self.fatal.append((name, error))

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

    @property
    def up_clients(self) -> list[ClientProcess]:
        return [p for p in self.processes.values() if isinstance(p, ClientProcess) and p.is_up]

    # -- the network: who is cut off from whom

    def is_apart(self, one: str, other: str) -> bool:
        """No connection can be made between the two."""
        return (one, other) in self.blocked or (other, one) in self.blocked

    def cut(self, source: str, to: str) -> None:
        """Nothing goes from one process to the other; connections between them die after a while."""
        self.cut_all([(source, to)])

    def cut_all(self, pairs: Iterable[Pair]) -> None:
        """As `cut`. A pair that is cut twice must be mended twice."""
        self.cuts.update(pairs)
        self.blocked.update(self.cuts)
        self.after(KEEPALIVE_MS, self._reset_cut_links)

    def mend_all(self, pairs: Iterable[Pair]) -> None:
        """Take back one cut of each of the pairs, as far as they are still cut."""
        self._take_back(self.cuts, pairs)

    def hold_all(self, pairs: Iterable[Pair]) -> None:
        """Keep back what goes from one to the other. Nothing is lost, and connections live on."""
        self.holds.update(pairs)
        self.blocked.update(self.holds)

    def release_all(self, pairs: Iterable[Pair]) -> None:
        """Take back one hold of each of the pairs; what was held arrives at once."""
        self._take_back(self.holds, pairs)

    def isolate(self, name: str) -> None:
        self.cut_all(self.pairs_around(name))

    def pairs_around(self, name: str) -> list[Pair]:
        """From one process to all others, and back."""
        others = [other for other in self.processes if other != name]
        return [(name, other) for other in others] + [(other, name) for other in others]

    def heal(self) -> None:
        """End all cuts and holds."""
        self.cuts.clear()
        self.holds.clear()
        self.blocked.clear()
        self.let_through()

    def _take_back(self, counts: Counter[Pair], pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            if counts[pair] > 1:
                counts[pair] -= 1
            else:
                del counts[pair]
        self.blocked = {*self.cuts, *self.holds}
        self.let_through()

    def let_through(self) -> None:
        """Whatever is held and need not be any more arrives, in the order in which it was sent."""
        for wire in list(self.held):
            is_left = False
            for direction, receiver in enumerate((wire.listener, wire.link.dialer)):
                if not wire.held[direction] or not receiver.process.is_up:
                    continue
                if wire.pairs[direction] in self.blocked or receiver.is_full:
                    is_left = True
                else:
                    receiver.let_through(wire, direction)
            if not is_left:
                del self.held[wire]

    def _reset_cut_links(self) -> None:
        for link in self.links():
            wire = link.wire
            assert wire is not None
            if wire.pairs[0] in self.cuts or wire.pairs[1] in self.cuts:
                link.dialer.reset(link)

    def links(self) -> list[Link]:
        """Those that are up."""
        return [
            link
            for process in self.processes.values()
            for link in process.transport.links.values()
            if link.wire is not None
        ]

    def reset_some_link(self, chance: Stream | None = None) -> None:
        """Lose one connection, as when a router reboots."""
        links = [link for link in self.links() if link.dialer.process.is_up]
        if links:
            link = (chance or self.choices.stream("faults")).choice(links)
            link.dialer.reset(link)

    def reset_links_of(self, name: str) -> int:
        """Lose all connections of a process; returns how many there were."""
        links = [link for link in self.links() if link.wire is not None and name in link.wire.pairs[0]]
        for link in links:
            link.dialer.reset(link)
        return len(links)
