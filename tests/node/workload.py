"""A seeded run of a whole cluster: applications at work, faults, and the promises that must hold throughout."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Generator
from typing import Any
from unittest.mock import patch

from coordlib.api.locks import Grant, _LockBase
from coordlib.api.maps import _MapBase
from coordlib.config import Timing
from coordlib.errors import CoordError, DefiniteError, IndeterminateError
from coordlib.machine.effects import Applied
from coordlib.raft.messages import Entry
from coordlib.testing.simulation.processes import MemberProcess, Operation, Process
from coordlib.testing.simulation.world import DiskProfile, NetworkProfile, World
from tests.node.linearizable import FOREVER, Event, is_linearizable

FORBIDDEN = ("conflicts_with_committed", "two_leaders", "malformed", "acknowledged_entries_lost")
LOCKS = ("door", "gate")
KEY_LIFE_MS = 3000

logging.getLogger("coordlib").addHandler(logging.NullHandler())


class Run:
    """One seed's run. Raises AssertionError when a promise is broken."""

    def __init__(self, seed: int, *, faults_ms: int = 15_000, is_sealed: bool = False) -> None:
        self.seed = seed
        timing = Timing(session_ttl_ms=3000, request_timeout_ms=3000)
        self.world = world = World(
            seed,
            members=3 if seed % 5 else 5,
            timing=timing,
            is_sealed=is_sealed,
            reads_by_lease=seed % 4 == 3,
            network=NetworkProfile(
                delay_ms_mean=(1.5, 0.5, 15.0)[seed % 3], delay_ms_max=(6, 2, 60)[seed % 3]
            ),
            disk=DiskProfile(write_ms_mean=(1, 0, 10)[seed // 3 % 3], write_ms_max=(4, 0, 40)[seed // 3 % 3]),
        )
        self.rng = rng = random.Random(seed)
        self.faults_ms = faults_ms
        self.is_working = True
        self.pending: dict[Operation, str] = {}
        self.registers: dict[str, list[Event]] = defaultdict(list)
        self.inserted: dict[str, bool] = {}  # unique key -> acknowledged
        self.counted = 0  # acknowledged increments
        self.uncertain = 0  # increments that may have happened
        self.tokens: dict[str, int] = defaultdict(int)
        self.grants: list[tuple[Process, Grant]] = []
        self.guarded: dict[str, int] = {}
        self.leaders: dict[int, str] = {}
        self.entries: dict[int, tuple[int, bytes]] = {}
        self.applied_max = 0
        self.marks: dict[str, int] = defaultdict(int)
        self.serial = 0
        self.rates = {
            fault: rng.choice((0.0, 0.5, 1.0)) * rate
            for fault, rate in {
                "crash": 0.05,
                "crash_leader": 0.04,
                "crash_within": 0.06,
                "kill": 0.03,
                "isolate": 0.05,
                "one_way": 0.05,
                "reset": 0.3,
                "pause": 0.06,
                "kill_client": 0.03,
            }.items()
        }
        world.on_applied = self._applied

    # -- what must hold ------------------------------------------------------------------------------------

    def _applied(self, name: str, entry: Entry, applied: Applied) -> None:
        known = self.entries.setdefault(entry.index, (entry.term, entry.data))
        assert known == (entry.term, entry.data), f"{name} applies something else at index {entry.index}"
        self.applied_max = max(self.applied_max, entry.index)

    def _check(self) -> None:
        world = self.world
        assert not world.fatal, f"a node stopped: {world.fatal}"
        for process in world.up_members:
            raft = process.kernel.raft
            if raft is None:
                continue
            raft.check_invariants()
            for count in FORBIDDEN:
                assert not raft.counters.get(count), f"{process.name} counted {count}"
            if raft.is_leader:
                assert self.leaders.setdefault(raft.term, process.name) == process.name, (
                    "two leaders in a term"
                )
        self._check_locks()

    def _check_locks(self) -> None:
        believers: dict[str, str] = {}
        remaining = []
        for process, grant in self.grants:
            if not process.is_up or grant._is_released:
                continue
            remaining.append((process, grant))
            with process.reading_clock():
                is_believed = not grant.lost
            if is_believed:
                other = believers.get(grant.name)
                assert other is None, f"lock {grant.name}: {other} and {process.name} both believe to hold it"
                believers[grant.name] = process.name
        self.grants = remaining

    # -- applications --------------------------------------------------------------------------------------

    def _start_workers(self, process: Process) -> None:
        for work in (self._registers, self._registers, self._count, self._insert, self._lock, self._lock):
            self._again(process, work)

    def _again(self, process: Process, work: Callable[[Process], None]) -> None:
        def go() -> None:
            if process.is_up and self.is_working:
                work(process)

        self.world.after(self.rng.randint(20, 800), go)

    def _start(
        self,
        process: Process,
        work: Callable[[Process], None],
        generator: Generator[Any, bytes, Any],
        done: Callable[[Operation], None],
    ) -> None:
        def ended() -> None:
            # A generator may end before its operation has been returned.
            self.world.after(0, finish)

        def finish() -> None:
            self.pending.pop(operation, None)
            if operation.error is not None:
                self.marks[type(operation.error).__name__] += 1
            else:
                self.marks[work.__name__] += 1
            done(operation)
            self._again(process, work)

        operation = process.start_operation(generator, ended)
        self.pending[operation] = f"{process.name} {work.__name__}"

    def _map(self, name: str) -> _MapBase:
        return _MapBase(name, None, self.world.timing.request_timeout_ms)

    def _registers(self, process: Process) -> None:
        rng, world = self.rng, self.world
        begin = world.now
        key = f"r{rng.randint(0, 1)}-{begin // KEY_LIFE_MS}"
        registers = self._map("registers")
        self.serial += 1
        argument: Any
        kind, argument = rng.choice((("put", self.serial), ("get", None), ("cas", (None, self.serial))))
        if kind == "cas":
            known = [event.argument for event in self.registers[key] if event.kind == "put"]
            argument = (rng.choice(known) if known else 0, self.serial)
        if kind == "put":
            generator: Any = registers._put_gen(key, argument, None)
        elif kind == "get":
            generator = registers._get_gen(key, None)
        else:
            generator = registers._compare_and_set_gen(key, argument[0], argument[1], None)
        history = self.registers[key]
        place = len(history)
        history.append(Event(begin, FOREVER, kind, argument, None))

        def done(operation: Operation) -> None:
            if operation.error is None:
                result = None if kind == "put" else operation.result
                history[place] = Event(begin, world.now, kind, argument, result)
            elif isinstance(operation.error, DefiniteError):
                history[place] = Event(begin, FOREVER, "get", None, None)  # nothing happened
            else:
                assert isinstance(operation.error, IndeterminateError), operation.error

        self._start(process, self._registers, generator, done)

    def _count(self, process: Process) -> None:
        counter = self._map("counter")

        def increment() -> Generator[Any, bytes, bool]:
            value = yield from counter._get_gen("n", 0)
            if value == 0:
                swapped = yield from counter._setdefault_gen("n", 0)
                value = swapped
            return (yield from counter._compare_and_set_gen("n", value, value + 1, None))

        def done(operation: Operation) -> None:
            if operation.error is None:
                self.counted += bool(operation.result)
            elif isinstance(operation.error, IndeterminateError):
                self.uncertain += 1

        self._start(process, self._count, increment(), done)

    def _insert(self, process: Process) -> None:
        self.serial += 1
        key = f"u{self.serial}"
        self.inserted[key] = False

        def done(operation: Operation) -> None:
            if operation.error is None:
                self.inserted[key] = True
            elif isinstance(operation.error, DefiniteError):
                assert operation.error.code != "key-exists", f"{key} was inserted twice"
                del self.inserted[key]

        self._start(process, self._insert, self._map("unique")._insert_gen(key, 1, None), done)

    def _lock(self, process: Process) -> None:
        rng, world = self.rng, self.world
        name = rng.choice(LOCKS)
        lock = _LockBase(process, name, None, None, None)  # type: ignore[arg-type]  # stands for its cluster
        timeout = rng.choice((0, 0.3, 2.0, 8.0))

        def acquired(operation: Operation) -> None:
            if operation.error is not None:
                return
            grant: Grant = operation.result
            self.grants.append((process, grant))
            assert grant.token > self.tokens[name], f"{name}: token {grant.token} after {self.tokens[name]}"
            self.tokens[name] = grant.token
            self._check_locks()
            world.after(rng.randint(0, 600), lambda: self._use(process, lock, grant))

        self._start(process, self._lock, lock._acquire_gen(timeout), acquired)

    def _use(self, process: Process, lock: _LockBase, grant: Grant) -> None:
        if not process.is_up:
            return
        world = self.world
        if process.is_paused:
            world.after(100, lambda: self._use(process, lock, grant))
            return

        def work() -> Generator[Any, bytes, None]:
            try:
                yield from self._map("guarded")._put_gen(grant.name, grant.token, grant)
            except CoordError:
                pass  # the end of a `with` block comes all the same
            yield from lock._release_gen(grant)

        def ended() -> None:
            self.pending.pop(operation, None)
            if operation.error is not None:
                grant._is_released = True

        operation = process.start_operation(work(), lambda: world.after(0, ended))
        self.pending[operation] = f"{process.name} use"

    # -- faults --------------------------------------------------------------------------------------------

    def _fault_round(self) -> None:
        world, rng = self.world, self.rng
        for fault, rate in self.rates.items():
            if rng.random() < rate:
                getattr(self, f"_fault_{fault}")()
        if world.cuts and rng.random() < 0.15:
            world.heal()

    def _some_member(self) -> MemberProcess | None:
        up = self.world.up_members
        # More than a minority down for long would only be a long silence.
        return self.rng.choice(up) if len(up) > len(self.world.members) // 2 else None

    def _restart_later(self, process: Process) -> None:
        self.marks["restarts"] += 1
        self.world.after(self.rng.randint(50, 4000), lambda: self._restart(process))

    def _restart(self, process: Process) -> None:
        for operation in [o for o in self.pending if o.process is process]:
            if self.pending.pop(operation).endswith("_count"):
                self.uncertain += 1
        if isinstance(process, MemberProcess):
            self._start_workers(self.world.start_member(process.name))
        else:
            self.serial += 1
            self._start_workers(self.world.start_client(f"c{self.serial}"))

    def _fault_crash(self, process: MemberProcess | None = None) -> None:
        process = process or self._some_member()
        if process is not None:
            process.crash()

    def _fault_crash_leader(self) -> None:
        leader = self.world.leader
        if leader is not None and self._some_member():
            self._fault_crash(leader)

    def _fault_crash_within(self) -> None:
        process = self._some_member()
        if process is not None:
            process.crash_within(200)

    def _fault_kill(self) -> None:
        process = self._some_member()
        if process is not None:
            process.kill()

    def _fault_isolate(self) -> None:
        process = self._some_member()
        if process is not None and not self.world.cuts:
            self.world.isolate(process.name)

    def _fault_one_way(self) -> None:
        one, other = self.rng.sample(list(self.world.members), 2)
        self.world.cut(one, other)

    def _fault_reset(self) -> None:
        self.world.reset_some_link()

    def _fault_pause(self) -> None:
        process = self.rng.choice(list(self.world.processes.values()))
        if process.is_up and not process.is_paused:
            process.pause()
            self.world.after(self.rng.randint(50, 5000), process.resume)

    def _fault_kill_client(self) -> None:
        clients = [p for p in self.world.processes.values() if not isinstance(p, MemberProcess) and p.is_up]
        if clients:
            self.rng.choice(clients).crash()

    # -- the run -------------------------------------------------------------------------------------------

    def _watch_dead(self, seen: set[int]) -> None:
        for process in list(self.world.processes.values()):
            if not process.is_up and process.incarnation not in seen:
                seen.add(process.incarnation)
                self._restart_later(process)

    def run(self) -> None:
        try:
            with (
                self.world,
                patch("coordlib.node.transfer.LOG_ENTRIES_MAX", self.rng.choice((20, 100, 20_000))),
                patch("coordlib.node.kernel.ENTRIES_RETAINED", 5),
                patch("coordlib.node.transfer.CHUNK_SIZE_BYTES", self.rng.choice((300, 256 * 1024))),
            ):
                self._run()
        except AssertionError as error:
            raise AssertionError(f"seed {self.seed}: {error} [{self.world.now} ms]") from error
        except CoordError as error:
            raise AssertionError(f"seed {self.seed}: {error!r} [{self.world.now} ms]") from error

    def _run(self) -> None:
        world = self.world
        world.start_all()
        assert world.run(10_000, lambda: all(p.kernel.has_usable_leader for p in world.up_members)), (
            "the cluster did not form"
        )
        for name in ("c1", "c2"):
            world.start_client(name)
        for process in list(world.processes.values()):
            self._start_workers(process)
        dead: set[int] = set()
        end = world.now + self.faults_ms
        while world.now < end:
            world.run(100)
            self._fault_round()
            self._watch_dead(dead)
            self._check()
        self._heal(dead)
        self._judge()

    def _heal(self, dead: set[int]) -> None:
        world = self.world
        self.rates = {}
        world.heal()
        for process in list(world.processes.values()):
            if process.is_up and process.is_paused:
                process.resume()
            if isinstance(process, MemberProcess):
                process.effects_left = process.fs.crash_at = None
        self._watch_dead(dead)
        world.run(4100)  # whatever is dead is started again within this time
        self._watch_dead(dead)
        world.run(4100)
        self._check()
        self.is_working = False

        def is_quiet() -> bool:
            self._check_locks()
            return not self.pending and not self.grants

        assert world.run(15_000, is_quiet), f"does not end: {list(self.pending.values())}, {self.grants}"
        self._check()
        assert world.leader is not None, "no leader after everything was healed"

        def is_settled() -> bool:
            live = [p for p in world.processes.values() if p.is_up]
            members = world.up_members
            return (
                len(members) == len(world.members)
                and len({p.kernel.machine.applied_index for p in members}) == 1
                and members[0].kernel.machine.applied_index >= self.applied_max
                and all(len(p.kernel.machine.sessions) == len(live) for p in members)
                and all(p.kernel.session.view.session_id for p in live)
                and not any(p.kernel.session.pending_count for p in live)
            )

        assert world.run(12_000, is_settled), f"the cluster does not settle: {self._describe()}"
        self._check()

    def _describe(self) -> list[Any]:
        return [
            (
                p.name,
                p.is_up,
                p.kernel.machine.applied_index if isinstance(p, MemberProcess) else None,
                len(p.kernel.machine.sessions) if isinstance(p, MemberProcess) else None,
                p.kernel.session.view.session_id,
                p.kernel.session.pending_count,
            )
            for p in self.world.processes.values()
        ]

    def _judge(self) -> None:
        digests = {p.name: _digest(p) for p in self.world.up_members}
        assert len(set(digests.values())) == 1, "the members' states differ"
        leader = self.world.leader
        assert leader is not None
        done: list[Operation] = []

        def read(name: str) -> Any:
            operation = leader.start_operation(self._map(name)._scan_gen())
            assert self.world.run(5000, lambda: operation.is_done) and operation.error is None
            done.append(operation)
            return dict(operation.result)

        unique = read("unique")
        for key, is_acknowledged in self.inserted.items():
            assert key in unique or not is_acknowledged, f"the acknowledged insert of {key} is lost"
        count = read("counter").get("n", 0)
        assert self.counted <= count <= self.counted + self.uncertain, (
            f"{self.counted} increments acknowledged, {self.uncertain} uncertain, and the counter shows {count}"
        )
        for key, history in self.registers.items():
            assert is_linearizable(history), f"the history of {key} is not linearizable: {sorted(history)}"
        for name in LOCKS:
            operation = leader.start_operation(_LockBase(leader, name, None, None, None)._info_gen())  # type: ignore[arg-type]  # stands for its cluster
            assert self.world.run(5000, lambda: operation.is_done) and operation.error is None  # noqa: B023  # used at once
            assert operation.result.token == 0, f"lock {name} is held by nobody: {operation.result}"


def _digest(process: MemberProcess) -> bytes:
    source = process.kernel.machine.begin_snapshot()
    parts = []
    while (data := source.next(1 << 20)) is not None:
        parts.append(data)
    source.close()
    return b"".join(parts)
