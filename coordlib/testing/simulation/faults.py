"""What faults do to a simulated cluster, and that they end.

A plan's faults are plain values, drawn before the run (fault_kinds.py). Whom a fault hits is decided when it comes, by
its `pick` alone, so that a plan from which some are left out does the rest as before (`FaultInjector`).

What may be destroyed has a limit: the data of a disk is only lost or damaged while a minority is in that state, and is
only lost *silently* (an old copy, damage that looks like a torn tail) while every other member has all of it on its
own disk: more than that is what README.md says cannot be survived. The operator's remedies are those of
docs/recovery.md: a directory that was wiped or swapped is given back, a damaged one read again from a mirror, space is
freed, and a process that stopped is started anew.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, NamedTuple, Protocol

from coordlib.errors import CoordError, StartError, StorageCorrupt, StorageFailed
from coordlib.raft.state import Role
from coordlib.testing.disk import SimulatedFileSystem
from coordlib.testing.simulation.choices import Stream
from coordlib.testing.simulation.fault_kinds import LEADER_KINDS, Fault
from coordlib.testing.simulation.network import KEEPALIVE_MS
from coordlib.testing.simulation.processes import MemberProcess, Process
from coordlib.testing.simulation.world import Pair, World

__all__ = ["FaultInjector"]

RESTART_MS_MAX: Final = 4000
LEADER_ATTEMPTS: Final = 40
LEADER_ATTEMPT_MS: Final = 100
COPY_ATTEMPTS: Final = 80
ATTEMPT_MS: Final = 25
YEAR_MS: Final = 365 * 86_400_000
LOOK_MS: Final = 1500
LOOKS: Final = 4
WALL_STEP_MS_MIN: Final = 10_000
"""By how much a wall clock must be off at least for what is told of it to be told from what is on its way."""
BURST_FRAMES_MIN: Final = 2


class Marks(Protocol):
    """Where it is noted that a situation occurred (marks.py)."""

    def hit(self, name: str) -> None: ...


class _MutedLeader(NamedTuple):
    since_ms: int
    term: int
    pairs: list[Pair]


class FaultInjector:
    """
    Lets a world suffer its faults, and brings back what they ended.

    Args:
        on_restart: Told of every process that takes the place of one that ended.
        on_end: Told of every process that ended, of whatever.
        hits_unformed: Whether members are hit, too, that do not belong to a cluster yet.

    Attributes:
        applied: How often each kind had an effect. One that was planned and met nobody to hit does not count.
        gone: The members that are dead or cut off for good.
    """

    def __init__(
        self,
        world: World,
        faults: Sequence[Fault],
        on_restart: Callable[[Process], None] = lambda process: None,
        on_end: Callable[[Process], None] = lambda process: None,
        *,
        marks: Marks | None = None,
        hits_unformed: bool = False,
    ) -> None:
        self.world = world
        self._hits_unformed = hits_unformed
        self.faults = tuple(faults)
        self.applied: Counter[str] = Counter()
        self.gone: frozenset[str] = frozenset()
        self._on_restart = on_restart
        self._on_end = on_end
        self._marks = marks
        self._chance = world.choices.stream("restarts")
        self._epoch = 0  # of what is still to come; healing forgets it
        self._client_serial = 0
        self._clients_gone = 0
        self._back_ms: dict[str, int] = {}  # how long a process that is about to end stays away
        self._absent: set[str] = set()  # members that somebody else will bring back, or nobody
        self._armed: dict[str, str] = {}  # member -> the kind of what will stop it
        self._preparations: dict[str, Callable[[SimulatedFileSystem], None]] = {}  # before its next start
        self._rotten: dict[str, str] = {}  # member -> the kind of the damage its disk has
        self._own_disks: dict[str, SimulatedFileSystem] = {}  # of members that run on another one
        self._is_changed: set[str] = set()  # members whose disk is not what they knew
        world.on_end = self.ended

    # -- the plan ------------------------------------------------------------------------------------------

    def schedule(self) -> None:
        """Let the faults come at their times, those that are past at once."""
        for fault in self.faults:
            self._at(fault.at_ms, self._begin, fault)

    def apply(self, fault: Fault) -> bool:
        """Let a fault begin now, whatever its time; returns whether there was anybody to hit."""
        chance = Stream(fault.pick, fault.kind)
        kind = fault.kind
        begin: Callable[..., bool] = getattr(self, f"_{kind.removesuffix('_leader')}")
        if kind.endswith("_leader"):
            leader = self.world.leader
            return begin(fault, chance, leader) if leader is not None and not leader.is_paused else False
        return begin(fault, chance)

    def _begin(self, fault: Fault, attempts: int = LEADER_ATTEMPTS) -> None:
        if self.apply(fault):
            self.applied[fault.kind] += 1
        elif fault.kind in LEADER_KINDS and attempts:
            # Between two leaders there is nobody to hit, and after many faults that is often so.
            self._later(LEADER_ATTEMPT_MS, self._begin, fault, attempts - 1)

    def _at(self, time_ms: int, action: Callable[..., Any], *arguments: Any) -> None:
        self.world.at(time_ms, self._unless_healed, self._epoch, action, arguments)

    def _later(self, delay_ms: int, action: Callable[..., Any], *arguments: Any) -> None:
        self._at(self.world.now + delay_ms, action, *arguments)

    def _unless_healed(self, epoch: int, action: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if epoch == self._epoch:
            action(*arguments)

    # -- ends and restarts ---------------------------------------------------------------------------------

    def ended(self, process: Process) -> None:
        """A process ended, of whatever; to be told by the world."""
        world, name = self.world, process.name
        self._on_end(process)
        back_ms = self._back_ms.pop(name, None)
        if back_ms is None:
            back_ms = self._chance.randint(50, RESTART_MS_MAX)
        if not isinstance(process, MemberProcess):
            self._clients_gone += 1
            self._later(back_ms, self._replace_client)
            return
        kind = self._armed.pop(name, "")
        if process.fatal is not None and kind:
            self.applied[kind] += 1
        if isinstance(process.fatal, StorageFailed):
            self._hit("storage_failed")
        self._note_rot(name, process.fatal)
        if process.is_crashed_within:
            self.applied["crash_within"] += 1
            self._hit("crash_within_round")
        if not world.up_members:
            self._hit("all_members_down")
        if name not in self._absent:
            self._later(back_ms, self._restart, name)

    def _hit(self, mark: str) -> None:
        if self._marks is not None:
            self._marks.hit(mark)

    def _replace_client(self) -> None:
        """A client that died is another one when it comes back."""
        world = self.world
        self._clients_gone -= 1
        name = ""
        while not name or name in world.processes:
            self._client_serial += 1
            name = f"c{self._client_serial}"
        self._on_restart(world.start_client(name, list(world.members.values())))

    def _restart(self, name: str) -> None:
        world = self.world
        before = world.processes.get(name)
        if name in self._absent or (before is not None and before.is_up):
            return
        disk = world.disks[name]
        prepare = self._preparations.pop(name, None)
        if prepare is not None:
            prepare(disk)
        elif name in self._rotten:
            world.expect(name, StorageCorrupt)
        else:
            self._expect_as_its_disk_is(name)
        fatal_count = len(world.fatal)
        is_damaged = name in self._is_changed or self._rotten.get(name) == "bit_rot"
        process = world.try_start_member(name, is_damaged=is_damaged)
        if process is not None:
            self._is_changed.discard(name)
            if self._rotten.pop(name, None):
                disk.accept_damage()  # in what is no longer needed, or looked like the end of a torn write
            self._on_restart(process)
            return
        if len(world.fatal) > fatal_count:
            return  # it will not start: whoever looks at `fatal` has to know
        kind = self._armed.pop(name, "")
        if kind:
            self.applied[kind] += 1
        if world.stopped and world.stopped[-1][:2] == (world.now, name):
            self._note_rot(name, world.stopped[-1][2])
        self._mend_rot(name)
        self._later(self._chance.randint(50, RESTART_MS_MAX), self._restart, name)

    def _expect_as_its_disk_is(self, name: str) -> None:
        # A full disk stays full whoever had it in between.
        is_full = self.world.disks[name].capacity is not None
        self.world.expect(name, *((StorageFailed, StartError) if is_full else ()))

    def _note_rot(self, name: str, error: CoordError | None) -> None:
        if isinstance(error, StorageCorrupt) and self._rotten.get(name) == "latent_rot":
            self._hit("latent_rot_found")

    def _mend_rot(self, name: str) -> None:
        if self._rotten.pop(name, None) is not None:
            self.world.disks[name].repair()

    def is_changed(self, name: str) -> bool:
        """Whether the member has another content on its disk than it had left there, and has not started on it yet."""
        return name in self._is_changed

    # -- healing -------------------------------------------------------------------------------------------

    def heal(self, keep_dead: Collection[str] = frozenset()) -> None:
        """
        End all faults, those to come too, and start what is down.

        The members in `keep_dead` are gone for good, until the next `heal`: every other one is cut off, the rest is down.
        """
        world = self.world
        self._epoch += 1
        self._preparations.clear()
        self._armed.clear()
        self._back_ms.clear()
        world.heal()
        for name, disk in self._own_disks.items():
            self._end_quietly(name)
            self._give_back(name, disk)
        self._own_disks.clear()
        for process in list(world.processes.values()):
            process.slow_ms_max = process.write_slow_ms = 0
            process.effects_left = None
            process.resume()
        for name in list(self._rotten):
            self._mend_rot(name)
        for disk in world.disks.values():
            disk.heal()
            disk.capacity = disk.crash_at = None
        self._absent = set(keep_dead)
        self.gone = frozenset(keep_dead)
        for place, name in enumerate(sorted(keep_dead)):
            process = world.processes[name]
            if process.is_up and place % 2:
                world.isolate(name)
            elif process.is_up:
                process.crash()
        for name in world.members:
            world.expect(name)
            self._restart(name)
        for _ in range(self._clients_gone):
            self._replace_client()

    def _end_quietly(self, name: str) -> None:
        """End a member that runs, and do not start it again by itself."""
        self._absent.add(name)
        process = self.world.processes[name]
        if process.is_up:
            process.kill()

    def _give_back(self, name: str, disk: SimulatedFileSystem) -> None:
        disk.kill()
        self.world.disks[name] = disk
        self._absent.discard(name)

    # -- who -----------------------------------------------------------------------------------------------

    def _some_member(self, chance: Stream, *, may_stand_still: bool = False) -> MemberProcess | None:
        """One that runs, and whose disk nobody has tampered with."""
        members = [
            p
            for p in self.world.up_members
            if p.name not in self._own_disks
            and (may_stand_still or not p.is_paused)
            and (p.kernel.is_formed or self._hits_unformed)
        ]
        return chance.choice(members) if members else None

    def _some_pair(self, chance: Stream) -> tuple[str, str]:
        one, other = chance.sample(list(self.world.members), 2)
        return one, other

    @property
    def _spoiled_max(self) -> int:
        return (len(self.world.members) - 1) // 2

    def _may_spoil(self, name: str) -> bool:
        return len({*self._rotten, *self._own_disks, name}) <= self._spoiled_max

    def _is_everywhere(self, member: MemberProcess) -> bool:
        """
        Every other member has all that this one's disk could lose.

        So has any majority then: nothing is lost with it. Nor is its vote: all others are in a term in which this one
        has entries of the leader, so that nobody will ever be elected in it again, nor in an earlier one.
        """
        raft = member.kernel.raft
        if raft is None or raft.log.last_term != raft.term:
            return False
        others = [p for p in self.world.up_members if p is not member]
        if len(others) + 1 < len(self.world.members):
            return False
        for other in others:
            theirs = other.kernel.raft
            if theirs is None or theirs.term < raft.term or theirs.role == Role.CANDIDATE:
                return False
            if theirs.log.term_at(raft.last_index) != raft.log.last_term:
                return False
        return True

    # -- the network ---------------------------------------------------------------------------------------

    def _cut(self, fault: Fault, pairs: Sequence[Pair]) -> bool:
        processes = self.world.processes
        if not any(processes[one].is_up and processes[other].is_up for one, other in pairs):
            return False
        self.world.cut_all(pairs)
        self._later(fault.duration_ms, self.world.mend_all, pairs)
        return True

    def _isolate(self, fault: Fault, chance: Stream, target: MemberProcess) -> bool:
        return self._cut(fault, self.world.pairs_around(target.name))

    def _isolate_member(self, fault: Fault, chance: Stream) -> bool:
        member = self._some_member(chance)
        return member is not None and self._isolate(fault, chance, member)

    def _mute(self, fault: Fault, chance: Stream, target: MemberProcess) -> bool:
        return self._cut(fault, [(target.name, name) for name in self.world.members if name != target.name])

    def _mute_leaders(self, fault: Fault, chance: Stream) -> bool:
        """What each adds to its log stays with it: so two logs grow apart over several terms (Raft figure 7)."""
        self._mute_next_leader(fault, self.world.now + fault.duration_ms, [])
        return False  # it counts when it befalls a second one

    def _mute_next_leader(self, fault: Fault, until_ms: int, muted: list[_MutedLeader]) -> None:
        world = self.world
        if world.now >= until_ms:
            if muted:
                world.mend_all(muted[-1].pairs)
            return
        leader = world.leader
        raft = leader.kernel.raft if leader is not None else None
        if leader is not None and raft is not None and (not muted or raft.term > muted[-1].term):
            pairs = [(leader.name, name) for name in world.members if name != leader.name]
            world.cut_all(pairs)
            if muted:
                # Not before what it had sent is lost with its connections.
                self._at(muted[-1].since_ms + KEEPALIVE_MS + 1, world.mend_all, muted[-1].pairs)
            if len(muted) == 1:
                self.applied[fault.kind] += 1
            muted.append(_MutedLeader(world.now, raft.term, pairs))
        # Looked for all the time: the others learn of a leader as soon as it has begun its term.
        self._later(1, self._mute_next_leader, fault, until_ms, muted)

    def _deafen(self, fault: Fault, chance: Stream, target: MemberProcess) -> bool:
        return self._cut(fault, [(name, target.name) for name in self.world.members if name != target.name])

    def _cut_pair(self, fault: Fault, chance: Stream) -> bool:
        one, other = self._some_pair(chance)
        return self._cut(fault, [(one, other), (other, one)])

    def _cut_one_way(self, fault: Fault, chance: Stream) -> bool:
        return self._cut(fault, [self._some_pair(chance)])

    def _halves(self, fault: Fault, chance: Stream) -> bool:
        names = list(self.world.members)
        side = set(chance.sample(names, chance.randint(1, len(names) - 1)))
        side |= {client.name for client in self.world.up_clients if chance.random() < 0.5}
        names += [client.name for client in self.world.up_clients]
        return self._cut(fault, [(a, b) for a in names for b in names if (a in side) != (b in side)])

    def _ring(self, fault: Fault, chance: Stream) -> bool:
        names = chance.sample(list(self.world.members), len(self.world.members))
        count = len(names)
        # Each keeps so many neighbours on either side that with itself it is a majority; of three, a line is left.
        reach = max(1, (count // 2 + 1) // 2)
        pairs = [
            (names[i], names[j])
            for i in range(count)
            for j in range(count)
            if i != j and min((i - j) % count, (j - i) % count) > reach
        ]
        return self._cut(fault, pairs or [(names[0], names[1]), (names[1], names[0])])

    def _bridge(self, fault: Fault, chance: Stream) -> bool:
        names = chance.sample(list(self.world.members), len(self.world.members))
        middle = len(names) // 2
        left, right = names[:middle], names[middle + 1 :]
        return self._cut(fault, [pair for a in left for b in right for pair in ((a, b), (b, a))])

    def _random_graph(self, fault: Fault, chance: Stream) -> bool:
        names = list(self.world.members)
        pairs = [
            (a, b) for a in names for b in names if a != b and chance.random() < 0.1 + fault.strength / 2
        ]
        return self._cut(fault, pairs)

    def _cut_client(self, fault: Fault, chance: Stream) -> bool:
        clients = self.world.up_clients
        if not clients:
            return False
        client = chance.choice(clients).name
        names = chance.sample(list(self.world.members), chance.randint(1, len(self.world.members)))
        way = chance.randrange(3)
        pairs = [(client, name) for name in names if way != 1] + [
            (name, client) for name in names if way != 0
        ]
        return self._cut(fault, pairs)

    def _flapping(self, fault: Fault, chance: Stream) -> bool:
        one, other = self._some_pair(chance)
        pairs = [(one, other), (other, one)] if chance.random() < 0.5 else [(one, other)]
        at = 0
        while at < fault.duration_ms:
            length = chance.randint(30, 900)
            self._later(at, self.world.cut_all, pairs)
            self._later(at + length, self._let_through, self.world.mend_all, pairs, "flapping_mended", 1)
            at += length + chance.randint(30, 900)
        return True

    def _hold_pairs(self, fault: Fault, pairs: list[Pair]) -> bool:
        world = self.world
        world.hold_all(pairs)
        mark = f"{fault.kind}_burst"
        self._later(fault.duration_ms, self._let_through, world.release_all, pairs, mark, BURST_FRAMES_MIN)
        return True

    def _let_through(
        self, take_back: Callable[[Sequence[Pair]], None], pairs: Sequence[Pair], mark: str, frames_min: int
    ) -> None:
        """End a cut or a hold; what was seen of it is that so many frames had waited for this and arrive now."""
        before = self._frames_held(pairs)
        take_back(pairs)
        if before - self._frames_held(pairs) >= frames_min:
            self._hit(mark)

    def _frames_held(self, pairs: Sequence[Pair]) -> int:
        return sum(
            len(wire.held[direction])
            for wire in self.world.held
            for direction in (0, 1)
            if wire.pairs[direction] in pairs
        )

    def _hold(self, fault: Fault, chance: Stream, target: MemberProcess | None = None) -> bool:
        if target is None:
            one, other = self._some_pair(chance)
            return self._hold_pairs(fault, [(one, other)])
        return self._hold_pairs(fault, [(target.name, o) for o in self.world.processes if o != target.name])

    def _reset(self, fault: Fault, chance: Stream) -> bool:
        has_any = bool(self.world.links())
        self.world.reset_some_link(chance)
        return has_any

    def _reset_all(self, fault: Fault, chance: Stream) -> bool:
        names = [name for name, process in self.world.processes.items() if process.is_up]
        return bool(names) and self.world.reset_links_of(chance.choice(names)) > 0

    # -- processes -----------------------------------------------------------------------------------------

    def _crash(self, fault: Fault, chance: Stream, target: MemberProcess | None = None) -> bool:
        member = target or self._some_member(chance, may_stand_still=True)
        if member is None:
            return False
        self._back_ms[member.name] = fault.duration_ms
        member.crash()
        return True

    def _kill(self, fault: Fault, chance: Stream, target: MemberProcess | None = None) -> bool:
        member = target or self._some_member(chance, may_stand_still=True)
        if member is None:
            return False
        self._back_ms[member.name] = fault.duration_ms
        member.kill()
        return True

    def _crash_within(self, fault: Fault, chance: Stream) -> bool:
        member = self._some_member(chance)
        if member is not None:
            self._back_ms[member.name] = fault.duration_ms
            member.crash_within(round(5 * 100**fault.strength), chance)
        return False  # not yet: it counts when it comes

    def _crash_at_start(self, fault: Fault, chance: Stream) -> bool:
        effects = chance.randint(0, 8)

        def prepare(disk: SimulatedFileSystem) -> None:
            disk.crash_at = disk.effects + effects

        return self._kill_and_prepare(fault, chance, prepare) is not None

    def _kill_and_prepare(
        self, fault: Fault, chance: Stream, prepare: Callable[[SimulatedFileSystem], None]
    ) -> MemberProcess | None:
        member = self._some_member(chance)
        if member is not None:
            self._back_ms[member.name] = fault.duration_ms
            if chance.random() < 0.5:
                member.crash()
            else:
                member.kill()
            self._preparations[member.name] = prepare
        return member

    def _end_all(self, fault: Fault, chance: Stream, *, is_crash: bool) -> bool:
        members = self.world.up_members
        for member in members:
            self._back_ms[member.name] = chance.randint(min(50, fault.duration_ms), fault.duration_ms)
        for member in members:
            if is_crash:
                member.crash()
            else:
                member.kill()
        return bool(members)

    def _crash_all(self, fault: Fault, chance: Stream) -> bool:
        return self._end_all(fault, chance, is_crash=True)

    def _kill_all(self, fault: Fault, chance: Stream) -> bool:
        return self._end_all(fault, chance, is_crash=False)

    def _leave(self, fault: Fault, chance: Stream) -> bool:
        member = self._some_member(chance)
        if member is None:
            return False
        self._back_ms[member.name] = fault.duration_ms
        member.leave()
        return True

    def _hand_over(self, fault: Fault, chance: Stream, target: MemberProcess) -> bool:
        raft = target.kernel.raft
        if raft is None or not raft.transfer_leadership():
            return False
        target.wake()
        return True

    def _restart_storm(self, fault: Fault, chance: Stream) -> bool:
        member = self._some_member(chance)
        if member is None:
            return False
        at = 0
        while at < fault.duration_ms:
            away = chance.randint(10, 100)
            self._later(at, self._kill_by_name, member.name, away)
            at += away + chance.randint(10, 500)
        return True

    def _kill_by_name(self, name: str, back_ms: int) -> None:
        process = self.world.processes[name]
        if process.is_up:
            self._back_ms[name] = back_ms
            process.kill()

    def _pause(self, fault: Fault, chance: Stream, target: Process | None = None) -> bool:
        if target is None:
            standing = [p for p in self.world.processes.values() if p.is_up and not p.is_paused]
            if not standing:
                return False
            target = chance.choice(standing)
        target.pause()
        self._later(fault.duration_ms, target.resume)
        return True

    def _suspend(self, fault: Fault, chance: Stream) -> bool:
        member = self._some_member(chance)
        if member is None:
            return False
        pairs = self.world.pairs_around(member.name)
        self.world.cut_all(pairs)
        member.pause()
        self._later(fault.duration_ms, self._wake_up, member, pairs, chance.randint(-500, 500))
        return True

    def _wake_up(self, member: MemberProcess, pairs: list[Pair], wall_step_ms: int) -> None:
        # Its monotonic clock counted on; its wall clock was set from one that is never quite right.
        member.wall_offset += wall_step_ms
        self.world.mend_all(pairs)
        member.resume()

    def _slow(self, fault: Fault, chance: Stream) -> bool:
        running = [p for p in self.world.processes.values() if p.is_up]
        if not running:
            return False
        process = chance.choice(running)
        process.slow_ms_max = round(100**fault.strength)
        self._later(fault.duration_ms, self._make_quick, process)
        return True

    @staticmethod
    def _make_quick(process: Process) -> None:
        process.slow_ms_max = process.write_slow_ms = 0

    # -- clocks --------------------------------------------------------------------------------------------

    def _some_process(self, chance: Stream) -> Process | None:
        running = [p for p in self.world.processes.values() if p.is_up]
        return chance.choice(running) if running else None

    def _step_wall(self, fault: Fault, chance: Stream) -> bool:
        process = self._some_process(chance)
        if process is None:
            return False
        step_ms = round(YEAR_MS**fault.strength)
        process.wall_offset += chance.choice((-1, 1)) * step_ms
        if step_ms >= WALL_STEP_MS_MIN:
            self._later(LOOK_MS, self._look_at_wall, process, LOOKS)
        return True

    def _look_at_wall(self, process: Process, looks: int) -> None:
        """What is seen of a wall clock that jumped is that a leader counts with what it shows now."""
        leader = self.world.leader
        service = leader.kernel.service if leader is not None else None
        if leader is not None and service is not None and service.log_clock is not None and process.is_up:
            told = service.log_clock._offsets.get(process.name)
            shown = process.wall_clock() - leader.clock()
            if told is not None and abs(told - shown) < WALL_STEP_MS_MIN // 2:
                self._hit("step_wall_told")
                return
        if looks:
            self._later(LOOK_MS, self._look_at_wall, process, looks - 1)

    def _drift_wall(self, fault: Fault, chance: Stream) -> bool:
        process = self._some_process(chance)
        if process is None:
            return False
        process.set_wall_rate(chance.choice((900, 990, 999, 1001, 1010, 1100)))
        self._later(fault.duration_ms, process.set_wall_rate, 1000)
        return True

    def _drift(self, fault: Fault, chance: Stream) -> bool:
        process, error = self._some_process(chance), self.world.clock.rate_error_permille_max
        if process is None or not error:
            return False
        process.set_rate(1000 + chance.choice((-error, error, chance.randint(-error, error))))
        self._later(LOOK_MS, self._look_at_drift, process, self.world.now, process.clock(), LOOKS)
        return True

    def _look_at_drift(self, process: Process, since_ms: int, shown_ms: int, looks: int) -> None:
        """What is seen of a clock that drifts is that its process was told of less or more time than has passed."""
        passed, told = process.turned_at_ms - since_ms, process.told_ms - shown_ms
        if passed > 0 and abs(told - passed) > 1:  # 1: both are whole milliseconds
            self._hit("drift_felt")
        elif looks and process.is_up:
            self._later(LOOK_MS, self._look_at_drift, process, since_ms, shown_ms, looks - 1)

    # -- disks ---------------------------------------------------------------------------------------------

    def _arm(self, fault: Fault, member: MemberProcess, *more: type[StartError]) -> None:
        self._armed[member.name] = fault.kind
        self._back_ms[member.name] = fault.duration_ms
        self.world.expect(member.name, StorageFailed, *more)

    def _fails(self, fault: Fault, chance: Stream, operation: str) -> bool:
        member = self._some_member(chance)
        if member is not None and member.name not in self._rotten:
            self._arm(fault, member)
            code = errno.ENOSPC if operation == "pwrite" and fault.strength < 0.3 else errno.EIO
            member.fs.fail(operation, error=code, skip=chance.randint(0, 20))
        return False  # not yet: it counts when it stops the member

    def _fsync_fails(self, fault: Fault, chance: Stream) -> bool:
        return self._fails(fault, chance, "datasync")

    def _write_fails(self, fault: Fault, chance: Stream) -> bool:
        return self._fails(fault, chance, "pwrite")

    def _read_fails(self, fault: Fault, chance: Stream) -> bool:
        skip = chance.randint(0, 4)

        def prepare(disk: SimulatedFileSystem) -> None:
            disk.fail("pread", skip=skip)

        member = self._kill_and_prepare(fault, chance, prepare)
        if member is not None:
            self._arm(fault, member)
        return False

    def _disk_full(self, fault: Fault, chance: Stream) -> bool:
        member = self._some_member(chance)
        if member is None or member.name in self._rotten:
            return False
        disk = member.fs
        disk.capacity = disk.used() + chance.choice((0, 0, 0, 500, 5000))
        self._arm(fault, member, StartError)
        self._later(fault.duration_ms, self._free_space, disk)
        return False

    @staticmethod
    def _free_space(disk: SimulatedFileSystem) -> None:
        disk.capacity = None

    def _slow_disk(self, fault: Fault, chance: Stream) -> bool:
        member = self._some_member(chance)
        if member is None:
            return False
        member.write_slow_ms = round(1000**fault.strength)
        self._later(fault.duration_ms, self._make_quick, member)
        return True

    def _damage(self, fault: Fault, chance: Stream, disk: SimulatedFileSystem, paths: Sequence[str]) -> None:
        path = chance.choice(paths)
        content = bytearray(disk.content(path))
        used = len(content.rstrip(b"\0")) or len(content)
        place = chance.randrange(used)
        how = chance.randrange(4)
        if how == 0:
            content[place] ^= 1 << chance.randrange(8)
        elif how == 1:  # a sector that was never written
            content[place : place + 512] = bytes(len(content[place : place + 512]))
        elif how == 2:  # a write that went to the wrong place
            source = chance.randrange(used)
            length = min(512, used - place, used - source)
            content[place : place + length] = content[source : source + length]
        else:
            del content[place:]
        disk.damage(path, bytes(content))

    def _bit_rot(self, fault: Fault, chance: Stream) -> bool:
        member = self._some_member(chance)
        if member is not None:
            self._attempt_rot(fault, chance, member, COPY_ATTEMPTS)
        return False  # it counts when it is done

    def _attempt_rot(self, fault: Fault, chance: Stream, member: MemberProcess, attempts: int) -> None:
        if not member.is_up or member.name in self._rotten or not self._may_spoil(member.name):
            return
        if member.is_paused or not self._is_everywhere(member):
            if attempts:
                self._later(ATTEMPT_MS, self._attempt_rot, fault, chance, member, attempts - 1)
            return
        self.applied[fault.kind] += 1
        name, disk = member.name, member.fs
        self._back_ms[name] = fault.duration_ms
        self._rotten[name] = fault.kind
        member.kill()
        paths = [path for path in disk.paths() if not path.endswith("/lock") and disk.content(path)]
        self._damage(fault, chance, disk, paths)

    def _latent_rot(self, fault: Fault, chance: Stream) -> bool:
        member = self._some_member(chance)
        if member is None or member.name in self._rotten or not self._may_spoil(member.name):
            return False
        disk = member.fs
        segments = [path for path in disk.paths() if path.endswith(".log")]
        paths = [path for path in disk.paths() if path.endswith(".snap") and disk.content(path)] + segments[
            :-1
        ]
        if not paths:
            return False
        self._rotten[member.name] = fault.kind
        self._back_ms[member.name] = fault.duration_ms
        self.world.expect(member.name, StorageCorrupt)
        self._damage(fault, chance, disk, paths)
        if fault.strength < 0.5:  # before what has changed is replaced or removed, as most of it is soon
            self._later(fault.duration_ms, self._kill_rotten, member)
        return True

    def _kill_rotten(self, member: MemberProcess) -> None:
        if member.is_up and member.name in self._rotten:
            member.kill()

    def _wipe(self, fault: Fault, chance: Stream) -> bool:
        world, member = self.world, self._some_member(chance)
        if member is None or member.name in self._rotten or not self._may_spoil(member.name):
            return False
        name = member.name
        if not all(p.name == name or p.kernel.peers.disks.get(name) for p in world.up_members):
            return False  # formed without it, and not yet recorded: it may come with any disk
        self._take_disk(member, SimulatedFileSystem())
        world.expect(name, StartError)
        process = world.try_start_member(name, is_impostor=True)
        if process is not None:
            self._on_restart(process)
        self._later(fault.duration_ms, self._return_disks, [name])
        return True

    def _take_disk(self, member: MemberProcess, other: SimulatedFileSystem) -> None:
        name = member.name
        self._end_quietly(name)
        self._own_disks[name] = member.fs
        self.world.disks[name] = other

    def _return_disks(self, names: Sequence[str]) -> None:
        """The operator understood what the error said, and gives every member its own directory back."""
        for name in names:
            self._end_quietly(name)
        for name in names:
            self._give_back(name, self._own_disks.pop(name))
            self._expect_as_its_disk_is(name)
            self._restart(name)

    def _swap(self, fault: Fault, chance: Stream) -> bool:
        world = self.world
        members = [
            p
            for p in world.up_members
            if p.name not in self._own_disks and p.name not in self._rotten and not p.is_paused
        ]
        if len(members) < 2:
            return False
        one, other = chance.sample(members, 2)
        self._take_disk(one, other.fs)
        self._take_disk(other, one.fs)
        for member in (one, other):
            world.expect(member.name, StartError)
            process = world.try_start_member(member.name, is_impostor=True)
            assert process is None, "a member started on another's directory"
        self._later(fault.duration_ms, self._return_disks, [one.name, other.name])
        return True

    def _old_copy(self, fault: Fault, chance: Stream) -> bool:
        member = self._some_member(chance)
        if member is not None and member.name not in self._rotten:
            copy = member.fs.clone()
            copy.capacity = None
            self._later(fault.duration_ms, self._attempt_copy, fault, member, copy, COPY_ATTEMPTS)
        return False

    def _attempt_copy(
        self, fault: Fault, member: MemberProcess, copy: SimulatedFileSystem, attempts: int
    ) -> None:
        name = member.name
        if not member.is_up or name in self._rotten or name in self._own_disks:
            return
        if member.is_paused or not self._is_everywhere(member):
            if attempts:
                self._later(ATTEMPT_MS, self._attempt_copy, fault, member, copy, attempts - 1)
            return
        self.applied[fault.kind] += 1
        self._back_ms[name] = 0
        member.kill()
        self.world.disks[name] = copy
        self._is_changed.add(name)

    # -- clients -------------------------------------------------------------------------------------------

    def _crash_client(self, fault: Fault, chance: Stream) -> bool:
        clients = self.world.up_clients
        if not clients:
            return False
        client = chance.choice(clients)
        self._back_ms[client.name] = fault.duration_ms
        client.crash()
        return True

    def _pause_client(self, fault: Fault, chance: Stream) -> bool:
        clients = [client for client in self.world.up_clients if not client.is_paused]
        return bool(clients) and self._pause(fault, chance, chance.choice(clients))
