"""Applications in the simulator: they ask what they were told to, and no lie about what was promised goes unseen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from typing import Any
from unittest.mock import patch

import pytest

from coordlib.api.ids import _IdsBase
from coordlib.api.locks import Grant, LockInfo, _LockBase
from coordlib.api.maps import _MapBase
from coordlib.config import Timing
from coordlib.errors import ClusterClosed, CommitTimeout, CoordError, LockLost, NoQuorum
from coordlib.ids.layout import Layout
from coordlib.ids.minter import Minter, NeedsWindow
from coordlib.machine.ids import Ids as IdWindows
from coordlib.machine.ids import _Generator as IdGenerator
from coordlib.node.logtime import LogClock
from coordlib.node.operations import FOREVER_MS, OpGen, Step
from coordlib.testing.history import HistoryWriter
from coordlib.testing.simulation.choices import Choices
from coordlib.testing.simulation.processes import Process
from coordlib.testing.simulation.workload import SERVICES, Load, PromiseBroken, Workload, draw_load
from coordlib.testing.simulation.workload.ids import Ids
from coordlib.testing.simulation.workload.keys import CONCURRENT_MAX, OPERATIONS_MAX
from coordlib.testing.simulation.world import ClockProfile, World
from coordlib.wire.messages import RequestKind

TIMING = Timing(session_ttl_ms=3000, request_timeout_ms=3000)
LOAD = Load(
    operations_per_second=20,
    outstanding_max=16,
    weights={service.name: service.weight for service in SERVICES},
    keys=2,
    hot_share=0.3,
    key_life_ms=2000,
    counters=1,
    locks=2,
    groups=1,
    group_keys=4,
    padding_size_bytes=0,
    hold_ms_max=300,
    share_long_holds=0.0,
    share_short_timeouts=0.0,
    share_cancelled=0.0,
)


class Marks:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def hit(self, name: str) -> None:
        self.counts[name] += 1


class Run:
    """A world with a workload in it, from the first process to the verdict."""

    def __init__(
        self, load: Load, *, seed: int = 1, members: int = 1, clients: int = 2, **world: Any
    ) -> None:
        self.world = World(seed, members=members, timing=TIMING, **world)
        self.clients = clients
        self.marks = Marks()
        self.history = HistoryWriter()
        self.workload = Workload(self.world, load, history=self.history, marks=self.marks)

    def begin(self) -> None:
        world = self.world
        world.start_all()
        assert world.run(10_000, lambda: all(p.kernel.has_usable_leader for p in world.up_members))
        for number in range(self.clients):
            world.start_client(f"c{number}")
        for process in list(world.processes.values()):
            self.workload.start(process)

    def go_on(self, duration_ms: int) -> None:
        for _ in range(duration_ms // 50):
            self.world.run(50)
            self.workload.check()

    def end(self, process: Process, restart: Callable[[], Process]) -> None:
        """Crash a process; after a while there is another one."""
        process.crash()
        self.workload.process_ended(process)
        self.world.after(1000, lambda: self.workload.start(restart()))

    def finish(self) -> None:
        world, workload = self.world, self.workload
        workload.stop()
        if not world.run(20_000, lambda: workload.is_quiet):
            raise PromiseBroken("rest", workload.describe())
        reader = world.leader
        assert reader is not None
        operation = reader.start_operation(workload.finish(reader))
        assert world.run(30_000, lambda: operation.is_done), "the state cannot be read back"
        assert operation.error is None
        workload.judge()

    def carry_through(self, duration_ms: int) -> None:
        with self.world:
            self.begin()
            self.go_on(duration_ms)
            self.finish()


def stormy(seed: int, duration_ms: int = 20_000) -> Run:
    """Three members and two clients, with crashes, pauses and cancellations."""
    load = replace(LOAD, share_cancelled=0.1, share_short_timeouts=0.1, share_long_holds=0.1)
    run = Run(load, seed=seed, members=3)
    world = run.world

    def crash_leader() -> None:
        leader = world.leader
        if leader is not None:
            run.end(leader, lambda: world.start_member(leader.name))

    def pause(name: str, duration_ms: int) -> None:
        process = world.processes[name]
        process.pause()
        world.after(duration_ms, process.resume)

    with world:
        run.begin()
        world.after(4000, crash_leader)
        world.after(6000, lambda: pause("c1", 4500))
        world.after(9000, lambda: run.end(world.processes["c0"], lambda: world.start_client("c2")))
        world.after(12_000, crash_leader)
        run.go_on(duration_ms)
        run.finish()
    return run


def test_applications_keep_what_they_were_promised_through_crashes_and_pauses() -> None:
    """Twenty seconds with a crashing leader, a crashing client and a long pause: every service is at work, all is well."""
    run = stormy(3)
    workload, marks = run.workload, run.marks.counts
    assert workload.started >= 300
    assert workload.operations < workload.started, "after two crashes some outcomes are unknown"
    for mark in (
        "cas_failed",
        "cancelled_operation",
        "acquire_timed_out",
        "acquire_granted_after_waiting",
        "unknown_outcome_later_seen",
        "session_lost",
        "stale_read_answered",
    ):
        assert marks[mark], f"{mark} never happened: {marks}"


def test_a_run_is_repeated_by_its_seed() -> None:
    """The same seed asks for the same things at the same moments, and is answered the same."""
    one, same, other = stormy(5, 7000), stormy(5, 7000), stormy(6, 7000)
    assert one.history.operations == same.history.operations
    assert one.marks.counts == same.marks.counts
    assert one.history.operations != other.history.operations


def test_in_a_calm_world_the_rate_is_exact_and_no_session_is_lost() -> None:
    """Fifty operations a second are fifty, all of known outcome, and nobody loses a lock without a reason."""
    run = Run(replace(LOAD, operations_per_second=50), members=3)
    with run.world:
        run.begin()
        run.go_on(10_000)
        assert 495 <= run.workload.started <= 505
        run.finish()
    assert run.workload.operations == run.workload.started
    assert not {"session_lost", "session_suspended", "grant_lost", "holder_crashed"} & run.marks.counts.keys()


def test_large_groups_are_scanned_in_pages_at_one_revision() -> None:
    """Values that do not fit into one page are read in several, while others write them."""
    load = replace(
        LOAD, weights={"groups": 1.0}, group_keys=8, padding_size_bytes=45_000, operations_per_second=8
    )
    run = Run(load)
    run.carry_through(3000)
    assert run.marks.counts["scan_of_several_pages"]


def test_histories_stay_short_enough_to_be_judged() -> None:
    """However hot a key is, few operations and fewer concurrent ones belong to it."""
    load = replace(
        LOAD, operations_per_second=50, keys=1, hot_share=1.0, key_life_ms=60_000, weights={"registers": 1.0}
    )
    run = Run(load)
    run.carry_through(8000)
    keys = Counter(operation.key for operation in run.history.operations)
    assert len(keys) > 3
    assert max(keys.values()) <= OPERATIONS_MAX + CONCURRENT_MAX


def test_a_load_is_json_and_draws_every_service() -> None:
    """A plan can be written down; over many seeds each service is sometimes left out and mostly not."""
    used: Counter[str] = Counter()
    rates = set()
    for seed in range(60):
        load = draw_load(Choices(seed).stream("load"))
        assert Load(**json.loads(json.dumps(asdict(load)))) == load
        assert 5 <= load.operations_per_second <= 50
        rates.add(load.operations_per_second)
        used.update(name for name, weight in load.weights.items() if weight)
    assert used["registers"] == 60
    assert all(40 <= used[service.name] <= 60 for service in SERVICES)
    assert len(rates) > 4
    assert draw_load(Choices(1).stream("load"), operations_per_second=50).operations_per_second == 50


def test_what_was_under_way_in_a_process_that_is_gone_has_an_unknown_outcome() -> None:
    """Its operations stay open in the history, its grants are nobody's belief, and the workload is at rest."""
    run = Run(replace(LOAD, hold_ms_max=5000, weights={"locks": 1.0, "registers": 1.0}))
    with run.world:
        run.begin()
        run.go_on(2000)
        assert not run.workload.is_quiet
        for name in ("c0", "c1"):
            process = run.world.processes[name]
            process.crash()
            run.workload.process_ended(process)
        assert any(operation.status is None for operation in run.history.operations)
        assert run.marks.counts["holder_crashed"]
        run.finish()


def test_beyond_the_drift_bound_only_fencing_is_asked_for() -> None:
    """Two believers are no violation if clocks may do as they like; they are if they may not."""
    for is_bounded in (True, False):
        clock = ClockProfile() if is_bounded else ClockProfile(rate_error_permille_max=100)
        run = Run(replace(LOAD, hold_ms_max=5000, weights={"locks": 1.0}), clock=clock)
        with run.world, patch.object(_LockBase, "_acquire_gen", believing_without_asking()):
            run.begin()
            if is_bounded:
                with pytest.raises(PromiseBroken, match="both believe to hold") as caught:
                    run.go_on(3000)
                assert caught.value.check == "lock holders"
            else:
                run.go_on(3000)


# -- lies --------------------------------------------------------------------------------------------------

Lie = Callable[..., Generator[Any, bytes, Any]]


class Nth:
    """True at every n-th call: a lie that is told each time is too easily seen."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.calls = 0

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls % self.n == 0


def lying(kind: type, method: str, lie: Callable[[Lie, Any, tuple[Any, ...]], Any], n: int = 5) -> Any:
    """The method of production, which at every n-th call does `lie(method, self, arguments)` instead."""
    true: Lie = getattr(kind, method)
    is_due = Nth(n)

    def told(self: Any, *arguments: Any, **more: Any) -> Generator[Any, bytes, Any]:
        if is_due():
            return (yield from lie(true, self, arguments))
        return (yield from true(self, *arguments, **more))

    return patch.object(kind, method, told)


def believing_without_asking() -> Lie:
    """Every acquisition is granted at once, with ever larger tokens."""
    tokens = iter(range(1 << 40, 1 << 41))

    def granted(self: Any, timeout: float | None) -> Generator[Any, bytes, Grant]:
        ask = yield from _MapBase("other", None, 3000)._len_gen()
        assert ask >= 0
        view = self._grants._worker.process._kernel.session.view
        return Grant(self.name, self._lock_name, next(tokens), view, 1, None, None)

    return granted


def instead(answer: Any) -> Callable[..., OpGen[Any]]:
    """Nothing is done, and `answer` is given; a function of the operation's arguments, or an error to raise."""

    def lie(_: Lie, self: Any, arguments: tuple[Any, ...]) -> OpGen[Any]:
        yield from _MapBase("other", None, 3000)._len_gen()
        if isinstance(answer, Exception):
            raise answer
        return answer(self, *arguments) if callable(answer) else answer

    return lie


def elsewhere(true: Lie, self: Any, arguments: tuple[Any, ...]) -> OpGen[Any]:
    """It is done, but to another map."""
    return (yield from true(_MapBase("other", None, 3000), *arguments))


def afterwards(answer: Any) -> Callable[..., OpGen[Any]]:
    """It is done, and then `answer` is given instead of what it was answered: a function of that, or an error."""

    def lie(true: Lie, self: Any, arguments: tuple[Any, ...]) -> OpGen[Any]:
        result = yield from true(self, *arguments)
        if isinstance(answer, Exception):
            raise answer
        return answer(result)

    return lie


def remembered(true: Lie, self: Any, arguments: tuple[Any, ...]) -> OpGen[Any]:
    """What a read of this key answered the first time is answered again."""
    now = yield from true(self, *arguments)
    return STALE.setdefault(arguments[0], now)


STALE: dict[str, Any] = {}


def twice(true: Lie, self: Any, arguments: tuple[Any, ...]) -> OpGen[Any]:
    yield from true(self, *arguments)
    return (yield from true(self, *arguments))


def in_halves(true: Lie, self: Any, arguments: tuple[Any, ...]) -> OpGen[Any]:
    """One update in two commands."""
    pairs, more, guard = arguments
    half = dict(list(pairs.items())[: len(pairs) // 2])
    yield from true(self, half, more, guard)
    for _ in range(20):
        yield from _MapBase("other", None, 3000)._len_gen()
    return (yield from true(self, pairs, more, guard))


def unguarded(true: Lie, self: Any, arguments: tuple[Any, ...]) -> OpGen[Any]:
    return (yield from true(self, *arguments[:-1], None))


def same_token_again(true: Lie, self: Any, arguments: tuple[Any, ...]) -> OpGen[Any]:
    grant = yield from true(self, *arguments)
    grant._token -= 1
    return grant


def left_alone(true: Lie, self: Any, arguments: tuple[Any, ...]) -> OpGen[Any]:
    """A release that is acknowledged and was never sent."""
    (grant,) = arguments
    grant._is_released = True
    self._grants.discard(grant)
    yield from _MapBase("other", None, 3000)._len_gen()
    return True


def given_up_and_left_there(true: Lie, self: Any, arguments: tuple[Any, ...]) -> OpGen[Any]:
    """An acquisition that gives up without taking back what it asked for."""
    yield from true(self, *arguments)
    raise CommitTimeout("given up")


def freed(true: Lie, self: Any, arguments: tuple[Any, ...]) -> OpGen[Any]:
    """A grant whose acquisition is ended behind its holder, as by somebody else's release."""
    grant = yield from true(self, *arguments)
    yield Step(
        RequestKind.COMMAND,
        self._release_body(grant._sequence),
        FOREVER_MS,
        view=grant._view,
        is_detached=True,
    )
    return grant


def without_session(true: Lie, self: Any, arguments: tuple[Any, ...]) -> OpGen[Any]:
    """The cluster ends the session long before its time."""
    grant = yield from true(self, *arguments)
    process = self._grants._worker.process
    process._kernel.session._lose(process.clock())
    return grant


def one_window_for_all(*, is_told: bool) -> AbstractContextManager[Any]:
    """Everybody is granted the same window of worker 0, and it may be that nobody compares windows."""
    true = IdWindows.lease

    def lease(self: Any, meta: Any, session: int, sequence: int, args: Any, effects: Any) -> Any:
        begin = self._generators[args[1]].layout.unit_at(meta.now_ms) if args[1] in self._generators else 0
        code, _, number, since, until, _, epoch = true(self, meta, session, sequence, args, effects)
        return (code, 0, number, begin or since, until, begin or since, epoch)

    stack = ExitStack()
    stack.enter_context(patch.object(IdWindows, "lease", lease))
    if not is_told:
        stack.enter_context(patch.object(Ids, "_note", lambda self, name, window: None))
        stack.enter_context(patch.object(Ids, "_extended", lambda self, handle, args, results: None))
        stack.enter_context(patch.object(Ids, "_inspect", lambda self, handle, stream: None))
    return stack


def a_late_stop(minter: Minter) -> int:
    """What is used is said, and minting goes on."""
    return max(minter._from_unit, minter._used_units())


def an_early_stop(minter: Minter) -> int:
    minter.retire_in_child()
    minter._stopped = lambda: ClusterClosed("closed")
    return minter._from_unit


def an_hour_ahead(clock: LogClock, now_ms: int) -> int:
    return READ_LOG_TIME(clock, now_ms) + 3_600_000


READ_LOG_TIME = LogClock.read

LIES: dict[str, tuple[str, str, Callable[[], AbstractContextManager[Any]]]] = {
    "a read answers an earlier value": (
        "registers", "history", lambda: lying(_MapBase, "_get_gen", remembered, 2),
    ),
    "a read answers what nobody wrote": (
        "registers", "values", lambda: lying(_MapBase, "_get_gen", afterwards(lambda _: 999_999)),
    ),
    "a put is acknowledged and is not there": (
        "registers", "history", lambda: lying(_MapBase, "_put_gen", elsewhere, 1),
    ),
    "a put that happened is told to be refused": (
        "registers", "definite errors", lambda: lying(_MapBase, "_put_gen", afterwards(NoQuorum("never sent"))),
    ),
    "a cas that swapped is told not to have": (
        "registers", "definite errors", lambda: lying(_MapBase, "_compare_and_set_gen", afterwards(lambda _: False), 1),
    ),
    "a cas that did not swap is told to have": (
        "registers", "history", lambda: lying(_MapBase, "_compare_and_set_gen", afterwards(lambda _: True), 1),
    ),
    "a delete removes nothing": (
        "registers", "history", lambda: lying(_MapBase, "_delete_gen", instead(True), 1),
    ),
    "a pop answers what is not there": (
        "registers", "values", lambda: lying(_MapBase, "_pop_gen", instead(999_999)),
    ),
    "revisions are given out twice": (
        "registers", "registers", lambda: lying(_MapBase, "_put_gen", afterwards(lambda _: 1)),
    ),
    "a value has another revision than its put": (
        "registers",
        "registers",
        lambda: lying(
            _MapBase, "_get_versioned_gen", afterwards(lambda v: v and v._replace(mod_revision=1 << 40)), 1
        ),
    ),
    "an insert of what is there succeeds": (
        "inserts", "inserts", lambda: lying(_MapBase, "_insert_gen", instead(1), 2),
    ),
    "an insert is executed twice": (
        "inserts", "inserts", lambda: lying(_MapBase, "_insert_gen", twice),
    ),
    "an acknowledged insert is not there": (
        "inserts", "inserts", lambda: lying(_MapBase, "_contains_gen", afterwards(lambda _: False)),
    ),
    "an increment is acknowledged and was never sent": (
        "counters", "counters", lambda: lying(_MapBase, "_compare_and_set_gen", instead(True), 3),
    ),
    "an increment that happened is told to be refused": (
        "counters", "definite errors", lambda: lying(_MapBase, "_compare_and_set_gen", afterwards(lambda _: False)),
    ),
    "a counter falls": (
        "counters", "counters", lambda: lying(_MapBase, "_get_gen", remembered, 2),
    ),
    "a ticket is taken twice": (
        "tickets", "tickets", lambda: lying(_MapBase, "_popitem_gen", instead(lambda *_: (1, 1)), 2),
    ),
    "two tickets are taken by one": (
        "tickets", "tickets", lambda: lying(_MapBase, "_popitem_gen", twice),
    ),
    "an update is two commands": (
        "groups", "groups", lambda: lying(_MapBase, "_update_gen", in_halves, 1),
    ),
    "a clear leaves something": (
        "groups", "groups", lambda: lying(_MapBase, "_clear_gen", afterwards(lambda count: count and 1), 1),
    ),
    "a lock is freed behind its holder": (
        "locks", "locks", lambda: lying(_LockBase, "_acquire_gen", freed, 1),
    ),
    "a token is given twice": (
        "locks", "lock tokens", lambda: lying(_LockBase, "_acquire_gen", same_token_again),
    ),
    "guards are not looked at": (
        "locks", "guards", lambda: lying(_MapBase, "_put_gen", unguarded, 1),
    ),
    "a guarded write is refused to the holder": (
        "locks", "locks", lambda: lying(_MapBase, "_put_gen", instead(LockLost("not yours")), 1),
    ),
    "the cluster names another holder": (
        "locks", "locks", lambda: lying(_LockBase, "_info_gen", instead(LockInfo("x", 77, 0)), 1),
    ),
    "a lock that is held is told to be lost": (
        "locks", "locks", lambda: lying(_LockBase, "_release_gen", afterwards(lambda _: False)),
    ),
    "a release is acknowledged and was never sent": (
        "locks", "guards", lambda: lying(_LockBase, "_release_gen", left_alone),
    ),
    "an acquisition that gave up stays": (
        "locks", "rest", lambda: lying(_LockBase, "_acquire_gen", given_up_and_left_there),
    ),
    "a session ends before its time": (
        "locks", "session promises", lambda: lying(_LockBase, "_acquire_gen", without_session),
    ),
    "two processes are granted one window": (
        "ids", "id windows", lambda: one_window_for_all(is_told=True),
    ),
    "two processes mint in one window": (
        "ids", "unique ids", lambda: one_window_for_all(is_told=False),
    ),
    "ids are minted twice": (
        "ids", "ids", lambda: patch.object(Minter, "_reserve", lambda self, first, end, now: None),
    ),
    "ids name another worker": (
        "ids", "ids", lambda: patch.object(Layout, "compose", lambda self, unit, sequence, worker: unit << 22 | 1023),
    ),
    "a window is said to have ended": (
        "ids", "ids", lambda: patch.object(Minter, "_obstacle", lambda self, unit, now: NeedsWindow("ended")),
    ),
    "ids are minted after all was given back": (
        "ids", "ids", lambda: patch.object(Minter, "revoke", a_late_stop),
    ),
    "what was used is given back": (
        "ids", "ids", lambda: patch.object(Minter, "revoke", an_early_stop),
    ),
    "an id is said to be another's": (
        "ids", "ids", lambda: lying(_IdsBase, "_inspect_gen", afterwards(lambda info: replace(info, node="n9")), 1),
    ),
    "ids are an hour ahead": (
        "ids", "id time", lambda: patch.object(LogClock, "read", an_hour_ahead),
    ),
    "workers never become free": (
        "ids", "id workers", lambda: patch.object(IdGenerator, "first_free", lambda self: (1 << 40, 0)),
    ),
    "an error says nothing about the outcome": (
        "registers", "outcomes", lambda: lying(_MapBase, "_get_gen", instead(CoordError("hm"))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_seen(lie: str) -> None:
    """Each promise is watched: the same run passes without the lie (above), and with it names what was broken."""
    service, check, tell = LIES[lie]
    STALE.clear()
    run = Run(replace(LOAD, weights={service: 1.0}))
    with tell(), pytest.raises(PromiseBroken) as caught:
        run.carry_through(6000)
    assert caught.value.check == check, caught.value


def test_a_lock_that_nobody_gave_back_is_found_at_the_end() -> None:
    """Whoever holds a lock when everybody has given it up and the dead are forgotten, holds it by mistake."""
    run = Run(replace(LOAD, weights={"locks": 1.0}))
    with run.world:
        run.begin()
        run.go_on(1000)
        run.workload.stop()
        process = run.world.processes["c0"]
        lock = _LockBase(process, "lock-0.0", None, None, None)  # type: ignore[arg-type]  # stands for its cluster
        forgotten = process.start_operation(lock._acquire_gen(None))
        assert run.world.run(5000, lambda: forgotten.is_done and run.workload.is_quiet)
        with pytest.raises(PromiseBroken, match="is not free") as caught:
            run.finish()
    assert caught.value.check == "lock release"


def test_every_service_passes_alone() -> None:
    """What the lies are compared with."""
    for service in SERVICES:
        Run(replace(LOAD, weights={service.name: 1.0})).carry_through(6000)
