"""Threads: no id twice, whichever thread is switched to at whatever point; and neither do signals or forks repeat one."""

from __future__ import annotations

import dis
import os
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from types import FrameType
from typing import Any

import pytest

from coordlib.errors import ClusterClosed, ForkedError, IdOverflow, UsageError
from coordlib.ids import DEFAULT, TWITTER, Layout, Minter, StandaloneIds, standalone
from tests.ids.support import MS, Clock, in_child, needs_fork, tortured

both_paths = pytest.mark.parametrize("locked", [False, True], ids=["free", "locked"])
THREADS = 8
CHUNK = 4
WINDOW = 100_000


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few ids take many turns."""
    monkeypatch.setattr("coordlib.ids.minter._CHUNK", CHUNK)


class RacingClock:
    """Half a unit further at each reading, and now and then back by three: units end while threads are at it."""

    def __init__(self) -> None:
        self._readings = count()

    def __call__(self) -> int:
        reading = next(self._readings)
        return (reading - 6 * (reading % 11 == 0)) * MS // 2


@both_paths
@pytest.mark.parametrize("layout", [DEFAULT, TWITTER], ids=["default", "twitter"])
def test_eight_threads_under_torture_mint_no_id_twice(locked: bool, layout: Layout) -> None:
    """With a Python trace function and a switch every microsecond; each thread sees its own ids rise."""
    minter = Minter(layout, clock_ns=RacingClock(), max_ahead_ms=60_000, lock_every_call=locked)
    minter.install(9, 1000, 10_000_000, 1000)

    def work() -> list[int]:
        ids: list[int] = []
        for turn in range(100):
            ids += [minter.mint() for _ in range(4)]
            if turn % 5 == 0:
                ids += minter.mint_many(7)
        return ids

    lists = tortured(work, threads=THREADS)
    assert all(a < b for ids in lists for a, b in pairwise(ids))
    every = [number for ids in lists for number in ids]
    assert len(set(every)) == len(every) == THREADS * (100 * 4 + 20 * 7)


@both_paths
def test_windows_may_change_while_threads_mint(locked: bool) -> None:
    """New workers, extensions and questions in between: every id is of a worker and unit that were granted."""
    minter = Minter(DEFAULT, clock_ns=RacingClock(), max_ahead_ms=60_000, lock_every_call=locked)
    minter.install(0, 0, WINDOW // 2, 0)
    mine = iter(range(THREADS))

    def work() -> list[int]:
        ids: list[int] = []
        if next(mine) == 0:
            for worker in range(1, 60):
                minter.install(worker, worker * WINDOW, worker * WINDOW + WINDOW // 2, 1000)
                ids.append(minter.mint())
                minter.extend((worker + 1) * WINDOW, minter.info().now_unit)
        ids += [minter.mint() for _ in range(150)]
        return ids

    lists = tortured(work, threads=THREADS)
    assert all(a < b for ids in lists for a, b in pairwise(ids))
    every = [number for ids in lists for number in ids]
    assert len(set(every)) == len(every) == THREADS * 150 + 59
    for number in every:
        unit, _, worker = DEFAULT.decompose(number)
        assert worker * WINDOW <= unit < (worker + 1) * WINDOW


def test_revoking_while_threads_mint_leaves_nothing_behind() -> None:
    """No thread has an id from beyond what was said to be used, and every one of them stops."""
    minter = Minter(DEFAULT, clock_ns=RacingClock(), max_ahead_ms=60_000)
    minter.install(1, 1000, 10_000_000, 1000)
    used: list[int] = []
    mine = iter(range(THREADS))

    def work() -> list[int]:
        ids: list[int] = []
        if next(mine) == 0:
            for _ in range(300):
                ids.append(minter.mint())
            used.append(minter.revoke())
        with pytest.raises(ClusterClosed):
            while True:
                ids.append(minter.mint())
        return ids

    lists = tortured(work, threads=THREADS)
    assert max(number for ids in lists for number in ids) < DEFAULT.compose(used[0], 0, 0)


def _is_minting(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == "coordlib.ids.minter"


class SwitchAt:
    """Trace function of one thread: at the n-th bytecode of minting, another thread does something."""

    def __init__(self, nth: int, action: Callable[[], None]) -> None:
        self._left = nth
        self._action = action
        self.reached = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not _is_minting(frame):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self._left -= 1
            if self._left == 0:
                self.reached = True
                other = threading.Thread(target=self._action)
                other.start()
                other.join()
        return self


def _switched_at(nth: int, first: str, then: str, *, locked: bool) -> tuple[bool, bool]:
    """One thread stopped at its n-th bytecode while another mints: whether there is such a one, and it could."""
    clock = Clock()
    minter = Minter(DEFAULT, clock_ns=clock, lock_every_call=locked)
    minter.install(1, 1000, 9000, 1000)
    ids = [minter.mint() for _ in range(CHUNK if first == "refill" else 1)]
    others: list[int] = []

    def other() -> None:
        # As it would be: who finds the lock taken waits, and does not run at this point.
        if minter._lock.acquire(blocking=False):
            minter._lock.release()
            if then == "later":
                clock.advance_ms(1)
            others.extend(minter.mint_many(6) if then == "many" else [minter.mint() for _ in range(6)])

    trace = SwitchAt(nth, other)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        mine: Sequence[int] = minter.mint_many(3) if first == "many" else [minter.mint()]
    finally:
        sys.settrace(before)
    everything = [*ids, *mine, *others]
    assert len(set(everything)) == len(everything)
    assert minter.mint() > max(everything)
    assert all(a < b for a, b in pairwise(others))
    assert all(a > max(ids) for a in (*mine, *others))
    return trace.reached, bool(others)


@both_paths
@pytest.mark.parametrize("first", ["mint", "refill", "many"])
@pytest.mark.parametrize("then", ["mint", "many", "later"])
def test_a_switch_at_any_bytecode_repeats_no_id(
    locked: bool, first: str, then: str, small_chunks: None
) -> None:
    """One thread is stopped at each of its bytecodes in turn; another mints, where the lock is free; then it goes on.
    No id is double, and what is minted after both is larger."""
    switched = 0
    for nth in count(1):
        reached, minted = _switched_at(nth, first, then, locked=locked)
        switched += minted
        if not reached:
            break
    assert switched > 3


@both_paths
def test_ids_are_taken_under_the_lock_where_the_interpreter_has_none(locked: bool) -> None:
    """Nobody else gets at the chunk in between; elsewhere no lock is taken for an id of a chunk."""
    could: list[bool] = []

    def look() -> None:
        could.append(minter._lock.acquire(blocking=False))
        if could[-1]:
            minter._lock.release()

    def pace() -> int:
        other = threading.Thread(target=look)
        other.start()
        other.join()
        return 0

    minter = Minter(DEFAULT, clock_ns=Clock(), pace_ns=pace, lock_every_call=locked)
    minter.install(1, 1000, 2000, 1000)
    minter.mint()
    could.clear()
    minter.mint()
    assert could == [not locked]


@both_paths
def test_a_caller_that_interrupts_a_refill_is_refused_instead_of_hanging(locked: bool) -> None:
    """A signal handler or a finaliser that mints while the same thread does: the outer one has its id."""
    caught: list[UsageError] = []

    def clock() -> int:
        if armed and not caught:
            with pytest.raises(UsageError) as error:
                minter.mint()
            caught.append(error.value)
        return 0

    armed = False
    minter = Minter(DEFAULT, clock_ns=clock, pace_ns=Clock(), lock_every_call=locked)
    minter.install(1, 1000, 9000, 1000)
    armed = True
    assert DEFAULT.decompose(minter.mint()) == (1000, 0, 1)
    assert "mint ids elsewhere" in str(caught[0])
    assert minter.mint() > 0


@pytest.mark.parametrize("call", ["mint", "many"])
def test_revoking_within_a_mint_that_it_interrupts_leaves_no_id_out(call: str) -> None:
    """A SIGTERM handler closes the cluster: what was being minted is given back, not out."""
    used: list[int] = []

    def clock() -> int:
        if armed:
            used.append(minter.revoke())
        return 0

    armed = False
    minter = Minter(DEFAULT, clock_ns=clock, pace_ns=Clock())
    minter.install(1, 1000, 9000, 1000)
    last = minter.mint()
    for _ in range(255):
        last = minter.mint()
    armed = True
    with pytest.raises(ClusterClosed):
        minter.mint() if call == "mint" else minter.mint_many(10)
    assert used[0] == DEFAULT.decompose(last)[0] + 1


class InterruptAt:
    """Trace function: KeyboardInterrupt at the n-th point of minting where the interpreter looks for signals."""

    def __init__(self, nth: int) -> None:
        self._left = nth
        self._last: dict[FrameType, str] = {}
        self.reached = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not _is_minting(frame) or self.reached:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            last = self._last.get(frame, "RESUME")
            self._last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if last.startswith(("RESUME", "CALL", "JUMP_BACKWARD")):
                self._left -= 1
            if self._left == 0:
                self.reached = True
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("call", ["mint", "many"])
def test_an_interrupt_in_the_middle_of_a_mint_loses_ids_at_most(call: str, small_chunks: None) -> None:
    """KeyboardInterrupt wherever a signal can raise it: the next mint goes on, above all before."""
    interrupted = 0
    for nth in count(1):
        minter = Minter(DEFAULT, clock_ns=Clock())
        minter.install(1, 1000, 9000, 1000)
        ids = [minter.mint() for _ in range(CHUNK if call == "mint" else 2)]
        trace = InterruptAt(nth)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            ids += [minter.mint()] if call == "mint" else minter.mint_many(3)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(before)
        ids += [minter.mint() for _ in range(3)]
        ids += minter.mint_many(3)
        ids.append(minter.mint())
        assert all(a < b for a, b in pairwise(ids))
        if not trace.reached:
            break
    assert interrupted > 10


# -- fork ----------------------------------------------------------------------------------------------------


def granted(locked: bool) -> Minter:
    minter = Minter(DEFAULT, clock_ns=Clock(), lock_every_call=locked)
    minter.install(1, 1000, 9000, 1000)
    return minter


@needs_fork
@both_paths
def test_a_forked_child_mints_nothing(locked: bool) -> None:
    """Neither from a chunk that was begun nor anew, nor by a bare `mint` whose minter nobody holds; the parent goes on."""
    minter = granted(locked)
    begun = minter.mint()
    bare = granted(locked).mint

    def check() -> None:
        for attempt in (minter.mint, lambda: minter.mint_many(1), bare):
            with pytest.raises(ForkedError, match="connect"):
                attempt()
        minter.install(2, 1000, 9000, 1000)
        minter.extend(9999, 1000)
        with pytest.raises(ForkedError):
            minter.mint()

    in_child(check)
    assert minter.mint() == begun + 1024
    bare()


@needs_fork
@both_paths
def test_a_forked_child_is_refused_though_a_thread_held_the_lock(locked: bool) -> None:
    """That thread is not there to release it: the child has a lock of its own, and does not hang."""
    minter = granted(locked)
    minter.mint()
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with minter._lock:
            held.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()

    def check() -> None:
        for attempt in (minter.mint, lambda: minter.mint_many(1)):
            with pytest.raises(ForkedError):
                attempt()
        minter.revoke()
        minter.info()

    try:
        in_child(check)
    finally:
        leave.set()
        holder.join()
    minter.mint()


@needs_fork
@pytest.mark.parametrize("call", ["mint", "many"])
def test_a_fork_in_the_middle_of_a_mint_gives_the_id_to_the_parent_alone(call: str) -> None:
    """A signal handler forks while a chunk or a block is being made."""
    children: list[int] = []

    def clock() -> int:
        if armed and not children:
            children.append(os.fork())
        return 0

    armed = False
    minter = Minter(DEFAULT, clock_ns=clock, pace_ns=Clock())
    minter.install(1, 1000, 9000, 1000)
    armed = True
    try:
        minter.mint() if call == "mint" else minter.mint_many(10)
    except ForkedError:
        if not children[0]:
            os._exit(7)
        raise
    finally:
        if children and not children[0]:
            os._exit(1)
    _, status = os.waitpid(children[0], 0)
    assert os.waitstatus_to_exitcode(status) == 7
    minter.mint()


# -- without a cluster ---------------------------------------------------------------------------------------


def test_standalone_ids_have_the_time_of_the_wall_clock_at_the_start_and_go_on_by_the_other() -> None:
    """So that a step of the wall clock changes nothing; the unit that has begun is left to an earlier run."""
    wall, elapsed = Clock(1_800_000_000_000 * MS), Clock(77)
    ids = standalone(worker=5, clock=wall, elapsed=elapsed)
    first = ids.mint()
    assert ids.inspect(first).time.timestamp() == 1_800_000_000.001
    wall.advance_ms(-3_600_000)
    elapsed.advance_ms(2000)
    second = ids.next()
    assert ids.inspect(second).time.timestamp() == 1_800_000_002.001
    assert (ids.worker, ids.inspect(second).worker, ids.layout) == (5, 5, DEFAULT)
    third = next(ids)
    assert [third, *ids.mint_many(2)] == [second + 1024 * n for n in (1, 2, 3)]
    assert [number for number, _ in zip(ids, range(2), strict=False)] == [second + 1024 * n for n in (4, 5)]
    assert ids.info().regressions == 0


def test_standalone_ids_wait_when_a_second_of_them_is_used_up() -> None:
    """By the machine's own clocks: the block after a whole second's comes all the same."""
    ids = standalone(worker=1)
    block = ids.mint_many(4_096_000)
    assert ids.mint_many(8192)[0] > block[-1]
    assert ids.info().waits > 0


@pytest.mark.parametrize("worker", [-1, 1024, True, "3"])
def test_a_worker_that_the_layout_does_not_have_is_refused(worker: int) -> None:
    """With the workers that it has."""
    with pytest.raises(UsageError, match="0 to 1023"):
        standalone(worker=worker)


def test_a_wall_clock_outside_of_the_layout_is_refused() -> None:
    """Before the epoch there are no units; after the end there are none left."""
    with pytest.raises(UsageError, match="before 2025-01-01"):
        standalone(worker=1, clock=lambda: 0)
    with pytest.raises(IdOverflow, match="2094"):
        standalone(worker=1, clock=lambda: 4_000_000_000_000 * MS)


@needs_fork
def test_a_forked_child_needs_standalone_ids_of_its_own() -> None:
    """The inherited ones refuse."""
    ids: StandaloneIds = standalone(worker=1)
    ids.mint()

    def check() -> None:
        with pytest.raises(ForkedError, match="standalone"):
            ids.mint()
        assert standalone(worker=2).mint() > 0

    in_child(check)
    ids.mint()
