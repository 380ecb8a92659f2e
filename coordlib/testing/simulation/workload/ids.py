"""Ids: minted in every process, from windows that the cluster grants, and compared with all others for ever.

Each process that works has a handle for some of three generators: one with room for everybody, one with few workers
and short windows, and one whose clock is wrong. Ids are minted in *series*, one after the other or in blocks, most of
them without asking anybody; handles are given back, and end with their processes.

What was granted is known here from the replies that a process got, so that an id can be held against it at once.
What must not live here: what the log has granted (see `coordlib.testing.simulation.model`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from coordlib.api.ids import _IdsBase
from coordlib.cbor import decode
from coordlib.errors import (
    ClusterClosed,
    DefiniteError,
    IdLeaseExpired,
    NotHolder,
    Overloaded,
    QuotaExceeded,
    UsageError,
)
from coordlib.ids.inspecting import IdInfo
from coordlib.ids.layout import Layout
from coordlib.ids.minter import NeedsWait, NeedsWindow
from coordlib.machine import commands
from coordlib.machine.commands import OpCode
from coordlib.node.operations import OpGen, Step
from coordlib.testing.simulation.choices import Stream
from coordlib.testing.simulation.processes import WALL_MS
from coordlib.testing.simulation.workload.site import Outcome, Service, Site, Task, Worker
from coordlib.wire.messages import RequestKind

__all__ = ["Handle", "Ids", "Name"]

EPOCH_MS: Final = 1_600_000_000_000
UNSET_EPOCH_MS: Final = 1
"""Where wall clocks differ so much that log_time may stay in 1970."""

SANE_OFFSET_MS_MAX: Final = 3000
AHEAD_MS_MAX: Final = 3000
"""Ids may be a second ahead, when many are wanted; the rest is for clocks and answers that are late."""

BEHIND_MS_MAX: Final = 62_000
"""log_time may be behind the median of the wall clocks by a minute before it jumps."""

CLOSE_MS: Final = 1000
PAUSED_MS: Final = 50
SERIES_MAX: Final = 30
KEPT_MAX: Final = 20
SKIP_SHARE: Final = 0.01
CLOCK_STEPS_MS: Final = (-3_600_000, -5000, -800, -50, 50, 800, 5000, 3_600_000)


class _Window:
    """As its holder knows it."""

    __slots__ = ("begin", "extended_at", "handle", "is_given_back", "number", "until", "worker")

    def __init__(self, handle: Handle | None, worker: int, number: int, begin: int, until: int) -> None:
        self.handle = handle
        self.worker = worker
        self.number = number
        self.begin = begin
        self.until = until
        self.extended_at = begin
        self.is_given_back = False

    def __str__(self) -> str:
        who = "who reads back" if self.handle is None else self.handle.worker.name
        return f"lease {self.number} of worker {self.worker}, {self.begin} to {self.until}, of {who}"


class _Runs:
    """Ticks that one worker's ids have used: stretches, in order and disjoint."""

    __slots__ = ("ends", "starts", "who")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.who: list[Handle] = []

    def add(self, start: int, end: int, who: Handle) -> Handle | None:
        """Returns who minted one of them before."""
        starts, ends = self.starts, self.ends
        place = bisect_right(starts, start)
        if place and ends[place - 1] > start:
            return self.who[place - 1]
        if place < len(starts) and starts[place] < end:
            return self.who[place]
        if place and ends[place - 1] == start and self.who[place - 1] is who:
            ends[place - 1] = end
        else:
            starts.insert(place, start)
            ends.insert(place, end)
            self.who.insert(place, who)
        return None


class Name:
    """One name, its layout, and all that was minted and granted under it."""

    __slots__ = ("is_steady", "layout", "name", "runs", "stretch_ms", "window_ms", "windows")

    def __init__(self, name: str, layout: Layout, window_ms: int, *, is_steady: bool = True) -> None:
        self.name = name
        self.layout = layout
        self.window_ms = window_ms
        self.is_steady = is_steady  # its clock is the process's own
        self.stretch_ms = window_ms  # the longest window that was ever asked for
        self.runs: dict[int, _Runs] = {}  # by worker
        self.windows: dict[int, list[_Window]] = {}

    def parts(self, number: int) -> tuple[int, int]:
        """Tick and worker of an id, by the order of bits that the layout's documentation gives."""
        layout = self.layout
        if layout.worker_is_lowest:
            return number >> layout.worker_bits, number & ((1 << layout.worker_bits) - 1)
        high, sequence = number >> layout.sequence_bits, number & ((1 << layout.sequence_bits) - 1)
        unit, worker = high >> layout.worker_bits, high & ((1 << layout.worker_bits) - 1)
        return unit << layout.sequence_bits | sequence, worker

    def time_ms(self, unit: int) -> int:
        return self.layout.epoch + unit * self.layout.unit_ms


class Handle:
    """What one process has of a generator."""

    __slots__ = (
        "generator",
        "ids",
        "is_closed",
        "kept",
        "last",
        "shift_ms",
        "was_paused",
        "window",
        "worker",
    )

    def __init__(self, worker: Worker, generator: Name) -> None:
        self.worker = worker
        self.generator = generator
        self.ids: _IdsBase
        self.window: _Window | None = None
        self.last = -1  # the greatest id of it
        self.kept: deque[int] = deque(maxlen=KEPT_MAX)  # the latest of them
        self.shift_ms = 0
        self.was_paused = False
        self.is_closed = False

    def __str__(self) -> str:
        return f"{self.worker.name} ({self.generator.name}, {self.window})"

    def clock_ns(self) -> int:
        return (self.worker.process.clock() + self.shift_ms) * 1_000_000


class _Series:
    __slots__ = ("block", "gap_ms", "handle", "left")

    def __init__(self, handle: Handle, left: int, gap_ms: int, block: int) -> None:
        self.handle = handle
        self.left = left
        self.gap_ms = gap_ms
        self.block = block  # so many at once; 0: one by one


class Ids(Service):
    """Series of ids, handles that are given back, clocks that step, and now and then an operator who skips time."""

    name = "ids"
    weight = 1.2

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        chance = site.world.choices.stream("ids")
        offset_ms = site.world.clock.wall_offset_ms_max
        epoch = EPOCH_MS if offset_ms <= SANE_OFFSET_MS_MAX else UNSET_EPOCH_MS
        self._generators = (
            Name(
                "wide",
                Layout(time_bits=41, sequence_bits=12, worker_bits=10, epoch_ms=epoch, name="wide"),
                chance.choice((2000, 6000, 15_000)),
            ),
            Name(
                "few",
                Layout(
                    time_bits=39,
                    sequence_bits=3,
                    worker_bits=chance.choice((1, 2, 3)),
                    unit_ms=10,
                    epoch_ms=epoch,
                    worker_is_lowest=False,
                    name="few",
                    on_overflow=chance.choice(("borrow", "wait")),
                ),
                chance.choice((800, 1500, 3000)),
            ),
            Name(
                "unsteady",
                Layout(time_bits=41, sequence_bits=6, worker_bits=6, epoch_ms=epoch, name="unsteady"),
                chance.choice((2000, 5000)),
                is_steady=False,
            ),
        )
        self._handles: dict[Worker, dict[Name, Handle]] = {}
        self._leaving: dict[Worker, None] = {}
        self._has_sane_clocks = site.are_clocks_bounded and offset_ms <= SANE_OFFSET_MS_MAX
        self._skipped_ms = 0  # by so much a skip has put ids ahead of time
        self._may_skip = chance.random() < 0.5  # once
        self._has_skipped = False

    # -- what applications do

    def begin(self, worker: Worker) -> None:
        if worker in self._leaving:
            return
        stream = worker.stream(self.site, self.name)
        generator = stream.choice(self._generators)
        handle = self._handles[worker].get(generator) or self._open(worker, generator)
        chance = stream.random()
        if handle.window is not None and chance < (0.2 if generator.layout.workers < 16 else 0.05):
            self._give_back(handle, lambda: None)
        elif chance > 0.95 and handle.kept:
            self._inspect(handle, stream)
        elif chance > 0.95 - SKIP_SHARE and self._may_skip:
            self._skip(worker, stream)
        else:
            if not generator.is_steady and stream.random() < 0.5:
                self._step_clock(handle, stream)
            block = 0 if stream.random() < 0.6 else stream.choice((1, 7, 100, 700, 5000))
            block = min(block, handle.ids._minter.block_max)
            self._pay(worker)
            self.site.known += 1
            series = _Series(handle, stream.randint(1, SERIES_MAX), stream.choice((0, 20, 100, 400)), block)
            self._go_on(series, stream)

    def _open(self, worker: Worker, generator: Name) -> Handle:
        handle = self._handles[worker][generator] = Handle(worker, generator)

        def begin(operation: OpGen[None]) -> None:
            worker.process.start_operation(self._watched(handle, operation))

        handle.ids = _IdsBase(
            generator.name,
            generator.layout,
            generator.window_ms,
            request_timeout_ms=self.site.world.timing.request_timeout_ms,
            clock_ns=handle.clock_ns,
            begin=begin,
        )
        return handle

    def _step_clock(self, handle: Handle, stream: Stream) -> None:
        step_ms = stream.choice(CLOCK_STEPS_MS)
        handle.shift_ms += step_ms
        if step_ms < 0 and handle.window is not None:
            self.site.marks.hit("id_clock_stepped_back")

    def _pay(self, worker: Worker) -> None:
        """For an operation that is not a task: another is not begun for it."""
        self.site.started += 1
        worker.credit -= 1

    # -- minting

    def _go_on(self, series: _Series, stream: Stream) -> None:
        handle = series.handle
        process, world = handle.worker.process, self.site.world
        if self.site.is_stopped or handle.is_closed or handle.worker.is_ended or not process.is_up:
            return
        if process.is_paused:
            world.after(PAUSED_MS, self._go_on, series, stream)
            return
        series.left -= 1
        for _ in range(stream.choice((1, 1, 1, 3, 20)) if not series.block else 1):
            if not self._mint(series, stream):
                return  # and it goes on when it need not wait any more
        if len(world.up_members) <= len(world.members) // 2:
            self.site.marks.hit("ids_minted_without_quorum")
        self._later(series, stream)

    def _later(self, series: _Series, stream: Stream) -> None:
        if series.left > 0:
            self.site.world.after(1 + stream.randint(0, series.gap_ms), self._go_on, series, stream)

    def _mint(self, series: _Series, stream: Stream) -> bool:
        """As both faces do: at once if it can be, else by an operation that waits. Whether it was at once."""
        handle, count = series.handle, series.block
        minter = handle.ids._minter
        try:
            numbers = minter.mint_many(count) if count else (minter.mint(),)
        except (NeedsWindow, NeedsWait) as need:
            if not count and self._has_window(handle):
                self.site.broken("ids", f"{handle} is to wait ({need!r}), and may mint: {minter.info()}")
            self._look_at_pause(handle)
            self._wait(series, stream, isinstance(need, NeedsWindow))
            return False
        self._minted(handle, numbers, handle.last)
        return True

    def _has_window(self, handle: Handle) -> bool:
        """Whether an id must be there without any wait: by what the cluster has granted, and the time for ids now."""
        window, info, layout = handle.window, handle.ids._minter.info(), handle.generator.layout
        if window is None or info.worker != window.worker or layout.on_overflow != "borrow":
            return False
        last = handle.generator.parts(max(handle.last, 0))[0] >> layout.sequence_bits
        # A clock that steps back between the request and the grant is before the window: to be borrowed from it, too.
        first = max(last, window.begin)
        is_within = max(info.now_unit, first) + 2 < window.until
        return is_within and first - info.now_unit < 1000 // layout.unit_ms - 2

    def _look_at_pause(self, handle: Handle) -> None:
        window = handle.window
        if handle.was_paused and window is not None and handle.ids._minter.info().now_unit >= window.until:
            self.site.marks.hit("id_window_ended_while_paused")
        handle.was_paused = False

    def _wait(self, series: _Series, stream: Stream, is_for_window: bool) -> None:
        handle, worker = series.handle, series.handle.worker
        floor = handle.last
        count = series.block

        def ended(task: Task) -> None:
            if task.outcome is Outcome.DONE:
                self._minted(handle, task.result, floor)
            elif isinstance(task.error, IdLeaseExpired):
                self.site.marks.hit("id_lease_expired")
            elif isinstance(task.error, QuotaExceeded):
                self.site.marks.hit("id_workers_exhausted")
            elif isinstance(task.error, UsageError) and not isinstance(task.error, ClusterClosed):
                self.site.broken("ids", f"{task}: nothing was wrong with what was asked")
            elif isinstance(task.error, Overloaded) and not worker.is_ended and not handle.is_closed:
                self._give_back(handle, lambda: None)  # its clock is behind by too much
                return
            if not worker.is_ended:
                self._later(series, stream)

        what = (
            f"{count or 1} of {handle.generator.name}, for want of {'a window' if is_for_window else 'time'}"
        )
        self.site.begin(
            worker, self.name, what, lambda _: handle.ids._mint_many_gen(count or 1), ended, cost=0
        )

    def _minted(self, handle: Handle, numbers: Sequence[int], floor: int) -> None:
        """Hold new ids against all there ever were. `floor`: the greatest whose mint had ended when this one began."""
        generator = handle.generator
        first, last = numbers[0], numbers[-1]
        start, worker = generator.parts(first)
        end, worker_of_last = generator.parts(last)

        def broken(check: str, why: str) -> NoReturn:
            self.site.broken(check, f"{len(numbers)} ids from {first} to {last} of {handle}: {why}")

        if not 0 <= first <= last < 1 << 63 or worker != worker_of_last or end - start != len(numbers) - 1:
            broken(
                "ids",
                f"no block of one worker: ticks {start} to {end}, workers {worker} and {worker_of_last}",
            )
        if first <= floor:
            broken("ids", f"not above {floor}, which this process had minted before")
        handle.last = max(handle.last, last)
        handle.kept.append(last)
        runs = generator.runs.get(worker)
        if runs is None:
            runs = generator.runs[worker] = _Runs()
        other = runs.add(start, end + 1, handle)
        if other is not None:
            broken("unique ids", f"one of them was minted before, by {other}")
        bits = generator.layout.sequence_bits
        start, end = start >> bits, end >> bits
        window = handle.window
        if window is None or window.worker != worker or not window.begin <= start <= end < window.until:
            broken("ids", f"units {start} to {end} of worker {worker} are not in its window")
        if generator.is_steady and self._has_sane_clocks:
            ahead_ms = generator.time_ms(end) - (WALL_MS + self.site.world.now) - self._skipped_ms
            if self._has_skipped:
                ahead_ms -= generator.stretch_ms  # where a lease was to end that a skip has ended
            if ahead_ms > SANE_OFFSET_MS_MAX + AHEAD_MS_MAX:
                broken("id time", f"{ahead_ms} ms ahead of time")

    # -- windows

    def _watched(self, handle: Handle, operation: OpGen[None]) -> OpGen[None]:
        """The same operation; what it is granted is noted."""
        try:
            step = next(operation)
            while True:
                assert isinstance(step, Step)
                args = decode(step.body) if step.kind == RequestKind.COMMAND else [0]
                asked_ms = self.site.world.now
                if args[0] == OpCode.IDS_RETURN:
                    self._giving_back(handle, args)
                elif args[0] in (OpCode.IDS_LEASE, OpCode.IDS_RENEW):
                    self._pay(handle.worker)
                    handle.generator.stretch_ms = max(handle.generator.stretch_ms, args[-1])
                try:
                    reply = yield step
                except GeneratorExit:
                    operation.close()
                    raise
                except BaseException as error:
                    self.site.known += args[0] != OpCode.IDS_RETURN and isinstance(error, DefiniteError)
                    if args[0] == OpCode.IDS_RENEW and isinstance(error, NotHolder):
                        self.site.marks.hit("id_lease_lapsed")
                    step = operation.throw(error)
                else:
                    self.site.known += args[0] in (OpCode.IDS_LEASE, OpCode.IDS_RENEW)
                    if args[0] == OpCode.IDS_LEASE:
                        self._granted(handle, commands.decode_reply(reply), asked_ms)
                    elif args[0] == OpCode.IDS_RENEW:
                        self._extended(handle, args, commands.decode_reply(reply))
                    step = operation.send(reply)
        except StopIteration:
            pass

    def _granted(self, handle: Handle, results: list[Any], asked_ms: int) -> None:
        worker, number, begin, until, _, _ = results
        site, generator = self.site, handle.generator
        window = _Window(handle, worker, number, begin, until)
        self._note(generator, window)
        if not handle.is_closed:
            handle.window = window
        if self._has_sane_clocks:
            behind_ms = WALL_MS + asked_ms - generator.time_ms(begin)
            if behind_ms > SANE_OFFSET_MS_MAX + BEHIND_MS_MAX:
                site.broken("id time", f"{window} begins {behind_ms} ms before it was asked for")

    def _note(self, generator: Name, window: _Window) -> None:
        """A window that was granted to somebody: no other of its worker overlaps with it."""
        others = generator.windows.setdefault(window.worker, [])
        for other in others:
            if other.begin < window.until and window.begin < other.until:
                self.site.broken("id windows", f"{window} overlaps with {other}")
        if others and others[-1].handle is not None and window.handle is not None:
            last, new = others[-1].handle, window.handle
            if last.worker is not new.worker:
                self.site.marks.hit("id_worker_passed_on")
        others.append(window)

    def _extended(self, handle: Handle, args: list[Any], results: list[Any]) -> None:
        _, _, worker, number, _ = args
        until, _ = results
        generator = handle.generator
        windows = generator.windows.get(worker, [])
        window = next((w for w in windows if w.number == number and w.handle is handle), None)
        if window is None:
            self.site.broken("id windows", f"{handle} was granted more of lease {number}, which it never had")
        if window.is_given_back:
            return
        if until < window.until:
            self.site.broken("id windows", f"{window} was cut short to {until} by its renewal")
        now = handle.ids._minter.info().now_unit
        if now > (window.extended_at + window.until) // 2:
            self.site.marks.hit("id_renewal_late")
        window.extended_at = now
        window.until = until
        for other in windows:
            if other is not window and other.begin < until and window.begin < other.until:
                self.site.broken("id windows", f"{window} is extended and overlaps with {other}")

    def _giving_back(self, handle: Handle, args: list[Any]) -> None:
        """From the moment it is sent, the rest may be anybody's."""
        _, _, worker, number, used_until = args
        generator = handle.generator
        for window in generator.windows.get(worker, []):
            if window.number == number and window.handle is handle:
                window.is_given_back = True
                used = [end for end, who in self._ends(generator, worker) if who is handle]
                last = (max(used) - 1) >> generator.layout.sequence_bits if used else -1
                if last >= max(used_until, window.begin):
                    self.site.broken(
                        "ids", f"{window} is given back from {used_until} on, and used was {last}"
                    )
                window.until = max(window.begin, min(window.until, used_until))

    @staticmethod
    def _ends(generator: Name, worker: int) -> list[tuple[int, Handle]]:
        runs = generator.runs.get(worker)
        return [] if runs is None else list(zip(runs.ends, runs.who, strict=True))

    # -- the end of a handle

    def _give_back(self, handle: Handle, then: Callable[[], None]) -> None:
        """As `close` of the cluster does: nothing is minted any more, and the rest of the window goes back."""
        site, worker = self.site, handle.worker
        handle.is_closed = True
        self._handles.get(worker, {}).pop(handle.generator, None)
        handle.ids._revoke()
        for mint in (handle.ids._minter.mint, lambda: handle.ids._minter.mint_many(3)):
            try:
                number = mint()
            except ClusterClosed:
                continue
            site.broken("ids", f"{handle} was closed, and minted {number}")
        if handle.ids.counters["borrowed"]:
            site.marks.hit("id_time_borrowed")
        if handle.window is not None:
            site.marks.hit("id_window_given_back")
        deadline = worker.process.clock() + CLOSE_MS
        operation = self._watched(handle, handle.ids._return_gen(deadline))
        site.begin(worker, self.name, f"return of {handle}", operation, lambda _: then())

    def _leave(self, worker: Worker, leave: Callable[[int], None], patience_ms: int) -> None:
        """A process ends in good order: first its windows go back, then its session ends."""
        if worker in self._leaving or not worker.process.is_up:
            return
        self._leaving[worker] = None
        handles = [handle for handle in self._handles.get(worker, {}).values() if handle.window is not None]
        left = len(handles)

        def given_back() -> None:
            nonlocal left
            left -= 1
            if left <= 0 and not worker.is_ended:
                leave(patience_ms)

        for handle in handles:
            self._give_back(handle, given_back)
        if not handles:
            given_back()

    def worker_started(self, worker: Worker) -> None:
        self._handles[worker] = {}
        process = worker.process
        leave = process.leave

        def leave_in_order(patience_ms: int = 3000) -> None:
            self._leave(worker, leave, patience_ms)

        process.leave = leave_in_order  # type: ignore[method-assign]  # as a handle's close() does more than its node's

    def worker_ended(self, worker: Worker) -> None:
        self._look_at_clock(worker)
        self._handles.pop(worker, None)
        self._leaving.pop(worker, None)

    # -- looking from outside

    def check(self) -> None:
        for worker, handles in self._handles.items():
            self._look_at_clock(worker)
            if worker.process.is_paused:
                for handle in handles.values():
                    handle.was_paused = True

    def _look_at_clock(self, worker: Worker) -> None:
        process = worker.process
        if process.wall_rate != 1000 or abs(process.wall_offset) > SANE_OFFSET_MS_MAX:
            self._has_sane_clocks = False

    def _inspect(self, handle: Handle, stream: Stream) -> None:
        """Whose an id is, is known for a while; and never is another named."""
        site, number = self.site, handle.kept[stream.randrange(len(handle.kept))]

        def ended(task: Task) -> None:
            if task.outcome is not Outcome.DONE:
                return
            info: IdInfo = task.result
            if info.node not in (None, handle.worker.name):
                site.broken("ids", f"{task}: {info} was minted by {handle}")

        site.begin(handle.worker, self.name, f"inspect {number}", handle.ids._inspect_gen(number), ended)

    def _skip(self, worker: Worker, stream: Stream) -> None:
        """What an operator does after a restore: no window begins before a floor. Harmless where nothing was lost."""
        site = self.site
        ahead_ms = stream.choice((-5000, 0, 2000, 60_000))
        self._may_skip, self._has_skipped = False, True
        self._skipped_ms = max(0, ahead_ms)  # whatever comes of it
        body = commands.ids_skip(WALL_MS + site.world.now + ahead_ms)

        def skip() -> OpGen[bool]:
            try:
                yield Step(RequestKind.COMMAND, body, worker.process.clock() + 3000)
            except UsageError:
                return False  # log_time is in 1970, as no quorum of clocks has agreed yet
            return True

        def ended(task: Task) -> None:
            if task.outcome is Outcome.DONE and task.result:
                site.marks.hit("id_time_skipped")

        site.begin(worker, self.name, f"skip to {ahead_ms} ms from now", skip(), ended)

    # -- the end

    @property
    def is_quiet(self) -> bool:
        return not any(
            handle.ids._asking for handles in self._handles.values() for handle in handles.values()
        )

    def read_back(self, worker: Worker, client: str) -> OpGen[None]:
        """All workers of the generator that has few of them are free when all windows have ended, and no more than all."""
        generator = self._generators[1]
        if not generator.windows or generator.stretch_ms > 3000:
            return  # nobody would wait for it
        layout = generator.layout
        fields = (
            layout.time_bits,
            layout.sequence_bits,
            layout.worker_bits,
            layout.unit_ms,
            layout.epoch,
            int(layout.worker_is_lowest),
        )
        body = commands.ids_lease(generator.name.encode(), fields, 30_000)
        process = worker.process
        limit = process.clock() + 2 * generator.stretch_ms + 5000
        taken: dict[int, None] = {}
        while len(taken) < layout.workers:
            try:
                reply = yield Step(RequestKind.COMMAND, body, process.clock() + 5000)
            except QuotaExceeded as error:
                if process.clock() > limit:
                    self.site.broken(
                        "id workers",
                        f"only {sorted(taken)} of {generator.name} are free, and all have ended: {error}",
                    )
                yield Step.pause(0.1)
                continue
            number, lease, begin, until, _, _ = commands.decode_reply(reply)
            self._note(generator, _Window(None, number, lease, begin, until))
            taken[number] = None
        try:
            yield Step(RequestKind.COMMAND, body, process.clock() + 5000)
        except QuotaExceeded:
            return
        self.site.broken("id workers", f"{generator.name} has more than its {layout.workers} workers")
