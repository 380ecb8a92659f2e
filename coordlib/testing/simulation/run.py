"""One seed's run: a safety phase with faults, a liveness phase in which only a core is left, healing, and the reckoning.

1. The cluster forms, applications begin, faults come as planned. Promises must hold, nothing need work.
2. Liveness: a majority is healed, the rest is gone for good. It must work again, for every application in it, soon
   (TigerBeetle's VOPR: a uniform mix of faults hides what only goes on because every fault ends).
3. Everything is healed and started again. All is read back, all states are equal, and the history has an order.
"""

from __future__ import annotations

import traceback
import zlib
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from coordlib.api.locks import _LockBase
from coordlib.api.maps import _MapBase
from coordlib.errors import InvariantViolation, StorageCorrupt
from coordlib.machine.limits import Limits
from coordlib.raft import RaftConfig
from coordlib.testing.history import HistoryWriter
from coordlib.testing.simulation import marks, workload
from coordlib.testing.simulation.choices import Choices
from coordlib.testing.simulation.fault_kinds import SPOILING_KINDS, Fault
from coordlib.testing.simulation.faults import FaultInjector
from coordlib.testing.simulation.invariants import Invariants, Violation, watched_reads
from coordlib.testing.simulation.marks import Marks
from coordlib.testing.simulation.plan import FORMING_MS, Plan, draw_plan
from coordlib.testing.simulation.processes import MemberProcess, Process
from coordlib.testing.simulation.workload import PromiseBroken, Workload
from coordlib.testing.simulation.world import World

__all__ = ["MARKS", "Report", "simulate"]

MARKS = {**marks.SOMETIMES, **workload.SOMETIMES}
"""Every situation that a campaign must have met, in words."""

FORM_MS_MAX = 20_000
CHECK_EVERY_MS = 50
RECOVERY_MS_MAX = 15_000
"""Within this time after healing everybody gets an answer: ten of the longest election timeouts, and a session's TTL."""
QUIET_MS_MAX = 20_000
PROBE_SECONDS_MAX = 5.0

# What a run must have seen to be worth its time.
SIMULATED_MS_MIN = 60_000
OPERATIONS_MIN = 100
FAULTS_MIN = 10
LEADER_CHANGES_MIN = 2
STIRS_MAX = 8
STIR_MS = 2500


@dataclass
class Report:
    """What a run did. Equal for equal plans, whatever the process and its hash seed."""

    seed: int
    operations: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    leader_changes: int = 0
    simulated_ms: int = 0
    marks: Counter[str] = field(default_factory=Counter)
    unknown_keys: int = 0
    checked_keys: int = 0
    trace: str = ""  # hash over everything that was drawn, sent, applied and answered

    @property
    def shortfall(self) -> str:
        """In what the run was too quiet to prove anything; empty if it was not."""
        for value, least, what in (
            (self.simulated_ms, SIMULATED_MS_MIN, "simulated ms"),
            (self.operations, OPERATIONS_MIN, "operations"),
            (self.faults.total(), FAULTS_MIN, "faults"),
            (self.leader_changes, LEADER_CHANGES_MIN, "changes of leader"),
        ):
            if value < least:
                return f"{value} {what}, {least} wanted"
        return ""


def simulate(seed: int, plan: Plan | None = None, *, history: HistoryWriter | None = None) -> Report:
    """
    Run a seed's plan, or the one given.

    Args:
        history: Gets what applications asked and were answered, whatever comes of the run.

    Raises:
        Violation: A promise was broken; `check` names it, `at_ms` says when.
    """
    run = _Run(plan or draw_plan(seed), history or HistoryWriter())
    try:
        return run.go()
    except Violation as violation:
        violation.at_ms = run.world.now
        raise
    except PromiseBroken as broken:
        raise _violation(run, broken.check, str(broken)) from broken
    except InvariantViolation as broken:
        raise _violation(run, "invariant()", str(broken)) from broken
    except Exception as error:
        # Whatever else leaves production code is an application's thread or a member that died of it.
        trace = "".join(traceback.format_exception(error)[-3:])
        raise _violation(run, "crash", f"{error!r}\n{trace}") from error


def _violation(run: _Run, check: str, message: str) -> Violation:
    violation = Violation(check, message)
    violation.at_ms = run.world.now
    return violation


class _Run:
    def __init__(self, plan: Plan, history: HistoryWriter) -> None:
        self.plan = plan
        self.marks = Marks(MARKS)
        self.world = World(
            plan.seed,
            members=plan.members,
            timing=plan.timing,
            network=plan.network,
            disk=plan.disk,
            clock=plan.clock,
            is_sealed=plan.is_sealed,
            reads_by_lease=plan.reads_by_lease,
            segment_size_bytes=plan.segment_size_bytes,
        )
        self.limits = Limits(
            tx_lifetime_ms=plan.tx_lifetime_ms,
            tx_retention_ms=plan.tx_retention_ms,
            tx_outcomes_max=plan.tx_outcomes_max,
            tx_finished_max=plan.tx_finished_max,
        )
        self.are_clocks_bounded = plan.clock.is_bounded(plan.timing.drift_percent)
        self.invariants = Invariants(
            list(self.world.members),
            self.marks,
            are_clocks_bounded=self.are_clocks_bounded,
            limits=self.limits,
        )
        self.world.observer = self.invariants
        self.history = history
        self.workload = Workload(self.world, plan.load, history=self.history, marks=self.marks)
        self.injector = FaultInjector(
            self.world,
            plan.faults,
            on_restart=self.workload.start,
            on_end=self._ended,
            marks=self.marks,
        )
        self._probes = 0

    def go(self) -> Report:
        plan = self.plan
        with ExitStack() as stack:
            stack.enter_context(self.world)
            stack.enter_context(patch("coordlib.node.transfer.LOG_ENTRIES_MAX", plan.snapshot_entries))
            stack.enter_context(patch("coordlib.node.kernel.ENTRIES_RETAINED", plan.entries_retained))
            stack.enter_context(patch("coordlib.node.transfer.CHUNK_SIZE_BYTES", plan.chunk_size_bytes))
            stack.enter_context(patch("coordlib.node.kernel.RaftConfig", self._raft_config))
            stack.enter_context(patch("coordlib.node.kernel.Limits", lambda: self.limits))
            stack.enter_context(watched_reads(self.invariants, is_lease_trusted=self.are_clocks_bounded))
            self._boot()
            self.injector.schedule()
            self._go_on_until(plan.safety_ms)
            self._stir()
            self._live_on()
            self._heal()
            return self._report()

    def _raft_config(self, **settings: Any) -> RaftConfig:
        plan = self.plan
        return RaftConfig(
            **settings,
            append_entries_max=plan.append_entries_max,
            probe_size_bytes_max=plan.probe_size_bytes_max,
            inflight_messages_max=plan.inflight_messages_max,
        )

    def _ended(self, process: Process) -> None:
        self.workload.process_ended(process)
        self._look_at_events(process)

    def _look_at_events(self, process: Process) -> None:
        spoiling = self.injector.applied.keys() & SPOILING_KINDS
        self.invariants.events(process, is_any_disk_spoiled=bool(spoiling))

    # -- phases --------------------------------------------------------------------------------------------

    def _boot(self) -> None:
        world = self.world
        for name in world.members:
            world.start_member(name, bootstrap=name in self.plan.bootstrap)
        if self.plan.forming_faults:
            early = FaultInjector(world, self.plan.forming_faults, marks=self.marks, hits_unformed=True)
            early.schedule()
            world.run(FORMING_MS)
            early.heal()
            self.marks.hit("formed_under_faults")
            world.on_end = self.injector.ended
        self._await(FORM_MS_MAX, "the cluster does not form", self._has_formed)
        for number in range(self.plan.clients):
            world.start_client(f"c{number + 1}")
        for process in list(world.processes.values()):
            self.workload.start(process)

    def _has_formed(self) -> bool:
        return all(process.kernel.has_usable_leader for process in self.world.up_members)

    def _stir(self) -> bool:
        """Chance may have spared a cluster; a run in which little happened proves little. Whether that was so."""
        chance = Choices(self.plan.seed).stream("stir")
        injector = self.injector
        for number in range(STIRS_MAX if self.plan.faults else 0):
            if injector.applied.total() >= FAULTS_MIN and self._leader_changes >= LEADER_CHANGES_MIN:
                return number > 0
            fault = Fault(self.world.now, "kill_leader", chance.randrange(1 << 30), 300, 0.5)
            if injector.apply(fault):
                injector.applied["kill_leader"] += 1
            self._go_on_until(self.world.now + STIR_MS)
        return True

    @property
    def _leader_changes(self) -> int:
        return max(0, len(self.invariants.leaders) - 1)

    def _live_on(self) -> None:
        """Only a core majority is left, healed; the rest is gone for good."""
        world, names = self.world, list(self.world.members)
        chance = Choices(self.plan.seed).stream("core")
        core = self._sound(chance.sample(names, len(names) // 2 + 1))
        self.injector.heal(keep_dead=frozenset(name for name in names if name not in core))
        end = world.now + self.plan.liveness_ms
        self._probe_all()
        self._go_on_until(end)

    def _sound(self, drawn: list[str]) -> set[str]:
        """
        A core of as many, without those that came back with less than they had acknowledged.

        They must not vote before they have it again, and whoever could give it to them may be gone for good.
        """
        behind = {name for name in self.world.members if self._is_behind(name)}
        others = [name for name in self.world.members if name not in drawn]
        core = [name for name in (*drawn, *others) if name not in behind][: len(drawn)]
        if len(core) == len(drawn):
            return set(core)
        self.injector.heal()
        self._await(
            QUIET_MS_MAX,
            "who came back with less does not get it again",
            lambda: not any(map(self._is_behind, behind)),
        )
        return set(drawn)

    def _is_behind(self, name: str) -> bool:
        raft = self.world.member(name).kernel.raft
        is_barred = raft is not None and raft.is_barred
        return is_barred or self.injector.is_changed(name) or self.invariants.is_behind(name)

    def _heal(self) -> None:
        world, workload = self.world, self.workload
        self.injector.heal()
        self._probe_all()
        if self._stir():
            self.injector.heal()
            self._probe_all()
        workload.stop()
        self._await(QUIET_MS_MAX, "applications wait for ever", lambda: workload.is_quiet)
        self._await(QUIET_MS_MAX, "the members do not become equal", self._is_settled)
        self._check()
        self.invariants.finish(world.up_members)
        for process in world.processes.values():
            self._look_at_events(process)
        reader = world.up_members[Choices(self.plan.seed).stream("reader").randrange(len(world.up_members))]
        self._carry_through(reader, workload.finish(reader))
        self._check()
        if world.now < self.plan.total_ms:
            self._go_on_until(self.plan.total_ms)
        self.verdict = workload.judge()

    def _is_settled(self) -> bool:
        world = self.world
        members = world.up_members
        return (
            len(members) == len(world.members)
            and len({process.kernel.machine.applied_index for process in members}) == 1
            and members[0].kernel.machine.applied_index >= self.invariants.committed_max
            # A request whose caller has given it up may come late, and is proposed all the same.
            and not any(
                p.kernel.raft and p.kernel.raft.last_index > p.kernel.raft.applied_index for p in members
            )
            # The sessions of the dead have ended, and with them all that they held and waited for.
            and len(members[0].kernel.machine.sessions) <= sum(p.is_up for p in world.processes.values())
            # What goes on behind its caller's back (a release that was given up) ends too.
            and not any(p._kernel.session.pending_count for p in world.processes.values() if p.is_up)
            # The last word on a snapshot may be lost, although it is installed: it is asked for again after a while.
            and not any(process.kernel._senders and process.kernel._senders.followers for process in members)
        )

    # -- steps ---------------------------------------------------------------------------------------------

    def _go_on_until(self, end_ms: int) -> None:
        world = self.world
        while world.now < end_ms:
            world.run(min(CHECK_EVERY_MS, end_ms - world.now))
            self._check()

    def _await(self, limit_ms: int, failure: str, condition: Any) -> None:
        world = self.world
        end = world.now + limit_ms
        while not condition():
            if world.now >= end:
                raise Violation("liveness", f"{failure} within {limit_ms} ms: {self._describe()}")
            world.run(CHECK_EVERY_MS, condition)
            self._check()

    def _check(self) -> None:
        for name, error in self.world.fatal:
            if isinstance(error, InvariantViolation):
                raise Violation("invariant()", f"{name}: {error}") from error
            if isinstance(error, StorageCorrupt):
                raise Violation(
                    "recovered log", f"{name} cannot read a disk that nothing has damaged: {error}"
                )
            raise Violation("member stopped", f"{name}: {error!r}") from error
        self.workload.check()

    def _probe_all(self) -> None:
        """Everybody who runs gets something done, and soon."""
        gone = self.injector.gone  # some of them run, cut off from everybody
        waiting = {
            name: process
            for name, process in self.world.processes.items()
            if process.is_up and name not in gone
        }
        done: set[str] = set()
        for process in waiting.values():
            self._probe(process, done)
        self._await(
            RECOVERY_MS_MAX,
            "after healing not everybody gets an answer",
            lambda: all(name in done or not self._is_same(process) for name, process in waiting.items()),
        )

    def _is_same(self, process: Process) -> bool:
        return process.is_up and self.world.processes.get(process.name) is process

    def _probe(self, process: Process, done: set[str]) -> None:
        """Try again and again until everything that an application does has been answered once."""
        if not self._is_same(process):
            return
        operation: Any = None

        def ended() -> None:
            # A generator may end before its operation has been returned.
            self.world.after(0, judge)

        def judge() -> None:
            if operation.error is None:
                done.add(process.name)
            else:
                self.world.after(100, lambda: self._probe(process, done))

        self._probes += 1
        operation = process.start_operation(self._probe_gen(process, self._probes), ended)

    def _probe_gen(self, process: Process, number: int) -> Generator[Any, bytes, None]:
        """A write, a read that must see it, and a lock that nobody else wants."""
        place = _MapBase("probes", None, self.plan.timing.request_timeout_ms)
        yield from place._put_gen(process.name, number, None)
        seen = yield from place._get_gen(process.name, None)
        if seen != number and self.are_clocks_bounded:
            raise Violation("current read", f"{process.name} wrote {number} and then read {seen}")
        lock = _LockBase(process, f"probe {number}", None, None, None)  # type: ignore[arg-type]  # stands for its cluster
        grant = yield from lock._acquire_gen(PROBE_SECONDS_MAX)
        yield from lock._release_gen(grant)

    def _carry_through(self, process: MemberProcess, generator: Generator[Any, bytes, Any]) -> None:
        operation = process.start_operation(generator)
        self._await(QUIET_MS_MAX, "the state cannot be read back", lambda: operation.is_done)
        if operation.error is not None:
            raise Violation("liveness", f"the state cannot be read back: {operation.error!r}")

    def _describe(self) -> str:
        lines = []
        for process in self.world.processes.values():
            line = f"{process.name}: {'up' if process.is_up else 'down'}"
            if isinstance(process, MemberProcess) and process.kernel.raft is not None:
                raft = process.kernel.raft
                line += f", {raft.role.name.lower()} of term {raft.term}, applied {raft.applied_index}/{raft.last_index}"
            session = process._kernel.session
            lines.append(f"{line}, session {session.view.session_id}, {session.pending_count} calls wait")
        return "; ".join(lines) + f"; {self.workload.describe()}"

    def _report(self) -> Report:
        world = self.world
        trace = zlib.crc32(world.choices.digest(), world.trace)
        for index in sorted(self.invariants.committed):
            trace = zlib.crc32(self.invariants.committed[index].data, trace)
        for operation in self.history.operations:
            trace = zlib.crc32(repr(operation).encode(), trace)
        digest = world.up_members[0].kernel.machine.digest()
        return Report(
            seed=self.plan.seed,
            operations=self.workload.operations,
            faults=Counter(self.injector.applied),
            leader_changes=self._leader_changes,
            simulated_ms=world.now,
            marks=self.marks.counts,
            unknown_keys=len(self.verdict.unknown_keys),
            checked_keys=self.verdict.keys,
            trace=f"{trace:08x}{digest.hex()[:24]}",
        )
