"""The stage of a scenario: whole production processes that do nothing unless they are told to.

Every process has its own clock, which only `advance` moves, and its own disk. Election patience is what the scenario
says, so that nothing depends on chance. What must hold is checked after every turn of every process, by the same
invariants that watch the random simulations.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final
from unittest.mock import patch

from coordlib.config import Timing
from coordlib.errors import CoordError
from coordlib.node.client import ClientKernel
from coordlib.node.disk import DiskAgent
from coordlib.node.kernel import MemberKernel
from coordlib.storage import SegmentStorage
from coordlib.storage.base import Persist
from coordlib.testing.disk import CrashNow, PendingChange, SimulatedFileSystem
from coordlib.testing.scenarios.wires import (
    AUTOMATIC,
    Letter,
    PlainLinks,
    SealedLinks,
    StageTransport,
)
from coordlib.testing.simulation.invariants import Invariants, Violation
from coordlib.testing.simulation.marks import Marks
from coordlib.testing.simulation.plain import CLUSTER
from coordlib.testing.simulation.processes import ClientProcess, MemberProcess, SimulatedProcess
from coordlib.testing.simulation.world import World
from coordlib.transport.base import Lane
from coordlib.wire.channel import ChannelIdentity
from coordlib.wire.keys import ClusterKeys

__all__ = ["Actor", "Stage", "StageClient", "StageDisk", "StageMember"]

TURNS_MAX: Final = 60
ROUNDS_MAX: Final = 400
STEP_MS_MAX: Final = 10
PATIENCE_MS: Final = (320, 360, 400, 440, 480, 520, 560)
_WALL_MS: Final = 1_700_000_000_000
_OPERATIONS: Final = {
    "write": ("pwrite",),
    "fsync": ("datasync",),
    "rename": ("rename",),
    "unlink": ("unlink",),
    "create": ("create",),
    "directory-sync": ("sync_directory",),
}
FORBIDDEN: Final = ("conflicts_with_committed", "two_leaders", "malformed", "acknowledged_entries_lost")
"""What the core counts and lives with, although it can only come of a defect, or of a disk that lost what it had."""


@lru_cache(maxsize=8)
def _keys(secret: str) -> ClusterKeys:
    return ClusterKeys.from_secrets((secret,), CLUSTER)


class StageDisk(SimulatedFileSystem):
    """A disk that stops its machine just before, or just after, the next operation of a kind."""

    _stop_before = ""
    _stop_after = ""
    is_stopping = False

    def stop_at(self, when: str, operation: str) -> None:
        self._stop_before = operation if when == "before" else ""
        self._stop_after = operation if when == "after" else ""
        self.is_stopping = False

    def pass_by(self, operation: str) -> None:
        """The machine is about to do this; after `is_stopping` it does nothing more."""
        if self.is_stopping or operation == self._stop_before:
            self.stop_at("", "")
            raise CrashNow(f"before {operation}")
        if operation == self._stop_after:
            self.is_stopping = True

    def _effect(self, operation: str, path: str) -> None:
        if self._stop_before or self._stop_after or self.is_stopping:
            name = next((word for word, names in _OPERATIONS.items() if operation in names), operation)
            if name != "pread":
                self.pass_by(name)
        super()._effect(operation, path)


class _Storage(SegmentStorage):
    process: StageMember

    def write(self, batch: Sequence[Persist]) -> None:
        observer = self.process.stage.watch
        for item in batch:
            observer.writing(self.process, item)
        super().write(batch)
        for item in batch:
            observer.wrote(self.process, item)


class _Staged(SimulatedProcess):
    """What members and clients on a stage have in common."""

    stage: Stage

    def _begin(self, world: World, name: str) -> None:
        assert isinstance(world, Stage)
        self.stage = world
        super()._begin(world, name)
        self._transport = self.transport = StageTransport(world, self)

    def clock(self) -> int:
        return self.stage.clocks[self.name]

    def _read_clock(self) -> int:
        return self.clock()

    def _read_wall_clock(self) -> int:
        return _WALL_MS + self.clock()

    def wake(self) -> None:
        """Turns are taken when the scenario says so."""

    def count_effect(self) -> None:
        """Sending may be what the process is to die at."""

    def turn(self, late_ms: int = 0) -> None:
        """Go round as often as there is something to do at this moment of its clock."""
        if not self.is_up or self.is_paused:
            return
        for _ in range(TURNS_MAX):
            self._turn_once(late_ms)
            late_ms = 0
            if not self.is_up:
                return
            now = self.clock()
            if not self._submitted and not self.transport_events and self._kernel.deadline > now:
                return

    @property
    def transport_events(self) -> list[Any]:
        transport = self.transport
        assert isinstance(transport, StageTransport)
        return transport.events

    def _turn_once(self, late_ms: int) -> None:
        kernel, links, stage = self._kernel, self._links, self.stage
        now = self.clock()
        try:
            with self.reading_clock():
                self._turn(kernel, links, self.transport.poll(0), now, late_ms)
        except CrashNow:
            stage.watch.turned(self, stage.now)
            self.crash()
            return
        except CoordError as error:
            self.fatal = error
            stage.unexplained[self.name] = error
            self.end()
            return
        stage.watch.turned(self, stage.now)
        self._check_after_turn()

    def _check_after_turn(self) -> None:
        """What this process must be like between two turns."""


class StageMember(_Staged, MemberProcess):
    """A member: the production kernel, driver, storage and links."""

    def __init__(self, stage: Stage, name: str, disk: StageDisk, *, bootstrap: bool = False) -> None:
        self._begin(stage, name)
        self.fs = disk
        chance = self.chance
        storage = _Storage(
            disk,
            "/data",
            node_id=name,
            cluster_name=CLUSTER,
            new_disk_id=chance.randbytes(16),
            segment_size_bytes=stage.segment_size_bytes,
            fill_size_bytes=1024,
        )
        storage.process = self
        self._storage = storage
        recovered = storage.open()
        self._disk = DiskAgent(storage)
        usual = PATIENCE_MS[list(stage.members).index(name)]

        def patience(low: int, high: int) -> int:
            draws = stage.patience.get(name)
            return usual if not draws else draws.pop(0) if len(draws) > 1 else draws[0]

        self._kernel = MemberKernel(
            node_id=name,
            members=stage.members,
            timing=stage.timing,
            identity=recovered.identity,
            recovered=recovered.groups.get(0),
            snapshot=self._disk.read_snapshot(),
            random_bytes=chance.randbytes,
            random_ticks=patience,
            now=self.clock(),
            reads_by_lease=stage.reads_by_lease,
            wants_bootstrap=bootstrap,
        )
        self.kernel = self._kernel
        self.transport.bind(stage.members[name])
        self._links = _links(self, True, recovered.identity.disk_id, list(stage.members))
        for other, endpoint in sorted(stage.members.items()):
            if other != name:
                self._links.connect(endpoint, other, (Lane.CONTROL, Lane.BULK))
        stage.watch.started(self, recovered.groups.get(0), is_damaged=name in stage.damaged)
        stage.damaged.discard(name)
        if stage.has_sessions:
            self._kernel.open_session(self.clock())

    def count_effect(self) -> None:
        disk = self.fs
        assert isinstance(disk, StageDisk)
        disk.pass_by("send")

    def _turn_once(self, late_ms: int) -> None:
        disk = self.fs
        assert isinstance(disk, StageDisk)
        super()._turn_once(late_ms)
        if disk.is_stopping and self.is_up:
            self.crash()  # it was to stop after the last thing that it did

    def _check_after_turn(self) -> None:
        raft = self._kernel.raft
        if raft is None:
            return
        raft.check_invariants()
        for name in FORBIDDEN:
            if raft.counters.get(name) and name not in self.stage.allowed:
                raise Violation(name, f"{self.name} counted it {raft.counters[name]} times")

    def crash(self) -> None:
        """The machine loses power; the stage says what becomes of what was not synced."""
        self.end()
        self.stage.lose_power(self)

    def kill(self) -> None:
        self.end()
        self.fs.kill()


class StageClient(_Staged, ClientProcess):
    """A client without a vote."""

    def __init__(self, stage: Stage, name: str, endpoints: Sequence[str]) -> None:
        self._begin(stage, name)
        self._kernel = ClientKernel(
            name=name, timing=stage.timing, random_bytes=self.chance.randbytes, now=self.clock()
        )
        self.kernel = self._kernel
        self._links = _links(self, False, b"", ())
        for endpoint in endpoints:
            self._links.connect(endpoint)
        self._kernel.open_session(self.clock())


Actor = StageMember | StageClient


def _links(process: Actor, is_member: bool, disk_id: bytes, members: Sequence[str]) -> Any:
    stage = process.stage
    identity = ChannelIdentity(CLUSTER, process.name, process.incarnation, is_member, disk_id)
    make = SealedLinks if stage.is_sealed else PlainLinks
    transport = process.transport
    assert isinstance(transport, StageTransport)
    secret = stage.secrets.get(process.name, "the secret of all members of this stage")
    links = make(transport, _keys(secret), identity, members=members, random_bytes=process.chance.randbytes)
    if is_member:
        send = links.send

        def watched(name: str, messages: Sequence[tuple[int, Any]], **more: Any) -> Any:
            stage.watch.sending(process, name, messages)
            return send(name, messages, **more)

        links.send = watched  # type: ignore[method-assign]  # looked at, not changed
    return links


class Stage(World):
    """The processes of a scenario, their clocks, and what is under way between them."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        timing: Timing,
        is_sealed: bool = False,
        reads_by_lease: bool = False,
        segment_size_bytes: int = 64 * 1024,
        chunk_size_bytes: int = 256 * 1024,
        has_sessions: bool = False,
    ) -> None:
        super().__init__(
            1, members=len(names), timing=timing, is_sealed=is_sealed, reads_by_lease=reads_by_lease
        )
        self.segment_size_bytes = segment_size_bytes
        self.members = {name: f"memory://{name}" for name in names}
        self.disks = {name: StageDisk() for name in names}
        self.clocks: dict[str, int] = dict.fromkeys(names, 1000)
        self.watch = self.observer = Invariants(list(names), Marks())
        self.severed: set[tuple[str, str]] = set()  # from whom to whom nothing passes
        self.under_way: list[Letter] = []
        self.automatic = set(AUTOMATIC)
        self.patience: dict[str, list[int]] = {}
        self.secrets: dict[str, str] = {}
        self.unexplained: dict[str, CoordError] = {}  # by themselves, and nobody has said that they should
        self.damaged: set[str] = set()  # disks of which less is expected at the next start
        self.allowed: set[str] = set()  # of what is forbidden otherwise
        self.fate = "lose"  # of what was not synced when power goes
        self.has_sessions = has_sessions
        self._chunk_size_bytes = chunk_size_bytes

    def __enter__(self) -> Stage:
        super().__enter__()
        enter = self._patches.enter_context
        # Snapshots are taken when the scenario says so, and nothing is kept behind them but what it says.
        enter(patch("coordlib.node.transfer.LOG_ENTRIES_MAX", 1 << 40))
        enter(patch("coordlib.node.kernel.ENTRIES_RETAINED", 0))
        enter(patch("coordlib.node.transfer.CHUNK_SIZE_BYTES", self._chunk_size_bytes))
        logger = logging.getLogger("coordlib")
        was_disabled, logger.disabled = logger.disabled, True
        self._patches.callback(setattr, logger, "disabled", was_disabled)
        return self

    # -- processes

    def start_member(
        self, name: str, *, bootstrap: bool = False, is_damaged: bool = False, is_impostor: bool = False
    ) -> StageMember:
        assert not is_impostor, "a scenario's invariants see every process"
        if is_damaged:
            self.damaged.add(name)
        disk = self.disks[name]
        assert isinstance(disk, StageDisk)
        if name in self.processes:
            disk.kill()  # whatever the last process left behind of locks and handles
        process = StageMember(self, name, disk, bootstrap=bootstrap)
        self.processes[name] = process
        process.turn()
        return process

    def start_client(self, name: str, endpoints: Sequence[str] = ()) -> StageClient:
        self.clocks.setdefault(name, max(self.clocks.values()))
        process = StageClient(self, name, list(endpoints) or list(self.members.values()))
        self.processes[name] = process
        process.turn()
        return process

    @property
    def actors(self) -> list[Actor]:
        return [p for p in self.processes.values() if isinstance(p, StageMember | StageClient) and p.is_up]

    @property
    def staged_members(self) -> list[StageMember]:
        return [p for p in self.processes.values() if isinstance(p, StageMember) and p.is_up]

    def lose_power(self, member: StageMember) -> None:
        """Decide what becomes of the changes that were not synced, as the scenario says."""

        def keep(change: PendingChange) -> list[PendingChange]:
            if self.fate == "lose":
                return []
            if self.fate == "keep" or change.data is None:
                return [change]
            return [PendingChange(change.offset, change.data[: len(change.data) // 2])]

        member.fs.crash_with(keep, lambda: self.fate != "lose")

    def lose_letters_to(self, transport: StageTransport) -> None:
        self.under_way = [letter for letter in self.under_way if letter.to is not transport]

    # -- the network

    def is_cut_off(self, one: str, other: str) -> bool:
        """Whether no connection can be made: that needs both directions."""
        return (one, other) in self.severed or (other, one) in self.severed

    def can_pass(self, letter: Letter) -> bool:
        process = letter.to.process
        is_open = (letter.sender, letter.receiver) not in self.severed
        return is_open and process.is_up and not process.is_paused

    def hand_over(self, letter: Letter) -> None:
        """Give a frame to its receiver, without letting it go round."""
        letter.to.events.append(letter.event)

    def deliver(self, letters: Sequence[Letter], *, is_together: bool = False) -> None:
        """Deliver in this order, each in a turn of its own, or what one receiver gets in one."""
        receivers: dict[str, Actor] = {}
        for letter in letters:
            if letter in self.under_way:
                self.under_way.remove(letter)
            process = letter.to.process
            assert isinstance(process, StageMember | StageClient)
            self.hand_over(letter)
            if is_together:
                receivers[process.name] = process
            else:
                process.turn()
        for process in receivers.values():
            process.turn()
        self.plumb()

    def plumb(self) -> None:
        """Let connections be made, and what is automatic arrive, until nothing of it is left."""
        for _ in range(ROUNDS_MAX):
            is_busy = False
            for actor in self.actors:
                transport = actor.transport
                assert isinstance(transport, StageTransport)
                is_dialling = "handshake" in self.automatic and not actor.is_paused and transport.dial()
                if (is_dialling or transport.events) and not actor.is_paused:
                    is_busy = True
                    actor.turn()
            letters = [x for x in self.under_way if x.kind in self.automatic and self.can_pass(x)]
            if letters:
                is_busy = True
                self.under_way = [letter for letter in self.under_way if letter not in letters]
                for letter in letters:
                    self.hand_over(letter)
            if not is_busy:
                return
        raise AssertionError("connections are being made without end")

    def deliver_all(self) -> None:
        """Until nothing that can move is under way."""
        for _ in range(ROUNDS_MAX):
            letters = [letter for letter in self.under_way if self.can_pass(letter)]
            if not letters:
                return
            self.deliver(letters, is_together=True)
        raise AssertionError(f"messages without end: {self.under_way[0]}")

    # -- time

    def advance(self, name: str, duration_ms: int, *, is_asleep: bool = False) -> None:
        """Move one clock, and let what is due happen at its time; or all of it late, if it was asleep."""
        process = self.processes.get(name)
        end = self.clocks[name] + duration_ms
        if is_asleep or not isinstance(process, StageMember | StageClient):
            self.clocks[name] = end
            return
        while self.clocks[name] < end:
            due = process._kernel.deadline if process.is_up and not process.is_paused else end
            self.clocks[name] = min(end, max(due, self.clocks[name] + 1))
            process.turn()
        self.plumb()

    def run_until(self, duration_ms: int, until: Callable[[], bool] | None = None) -> bool:
        """Time passes for all, and everything that can move does."""
        left = duration_ms
        while True:
            self.deliver_all()
            if until is not None and until():
                return True
            if left <= 0:
                return until is None
            step = min(STEP_MS_MAX, left)
            for actor in self.actors:
                if not actor.is_paused:
                    step = min(step, max(1, actor._kernel.deadline - actor.clock()))
            left -= step
            self.now += step
            for name in self.clocks:
                self.clocks[name] += step
            for actor in self.actors:
                actor.turn()
            self.plumb()

    # -- faults

    def fail_disk(self, name: str, operation: str, *, is_sticky: bool) -> None:
        if operation == "full":
            self.disks[name].capacity = self.disks[name].used() if is_sticky else None
            return
        for real in _OPERATIONS[operation]:
            self.disks[name].fail(real, error=errno.EIO, is_sticky=is_sticky)

    def heal(self) -> None:
        self.severed.clear()
        self.automatic = set(AUTOMATIC)
        self.fate = "lose"
        for disk in self.disks.values():
            disk.heal()
            disk.capacity = None
