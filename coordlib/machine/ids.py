"""Windows of id time: who may mint ids with which worker number, and for which stretch of time.

A *generator* is a name with a layout, which its first use fixes for ever. Its time is counted in units since
its epoch. A *window* is a half-open stretch [from, until) of that time, granted to one *lease* of one worker;
ids are minted only inside windows, each combination of time and sequence once.

Invariant: any two windows that were ever granted for the same name and worker are disjoint. That alone makes
ids unique, whatever clocks, pauses, partitions, forks and restarts do; log_time only decides how soon a
worker may be given away again.

A lease is not bound to the session that asked for it: minting goes on without contact. It ends by time, by
being returned, or by a skip. Its own clock is log_time, plus an *offset* if its window had to begin later
than that: so a renewal gives as much time as it says also while ids run ahead of log_time, after a skip.

What must not live here: how ids are composed and minted, and sessions (a lease's owner is a text that is asked for).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from heapq import heappush, heapreplace
from typing import Any, NamedTuple, TypeAlias

from coordlib.cbor import decode, encode
from coordlib.errors import ConditionFailed, IdOverflow, NotHolder, QuotaExceeded, UsageError, invariant
from coordlib.machine.effects import Effect, Meta
from coordlib.machine.limits import Limits, exceeded
from coordlib.machine.table import BytesTable, Reclaimer

__all__ = ["DEFAULT_EPOCH_MS", "HISTORY_MAX", "SKIP_MS_MAX", "Ids", "Layout"]

DEFAULT_EPOCH_MS = 1_735_689_600_000
"""2025-01-01T00:00Z: what a layout with epoch 0 gets. Disk: never changed, logs are replayed with it."""

HISTORY_MAX = 8  # windows remembered for each worker, the present one included
SKIP_MS_MAX = 366 * 24 * 60 * 60 * 1000  # a floor in microseconds would end a cluster's ids for good
_SKIP_LEASES_BITS = 15  # see `Ids.skip`
_GENERATORS_SHOWN = 1000
_NUMBER = struct.Struct(">Q")

Result: TypeAlias = tuple[Any, ...]


class Layout(NamedTuple):
    """
    What a generator's ids are made of, as far as it is replicated.

    Disk: the order of fields is part of commands and of the snapshot format.
    """

    time_bits: int
    sequence_bits: int
    worker_bits: int
    unit_ms: int
    epoch_ms: int
    worker_is_lowest: int  # 1: time, sequence, worker; 0: time, worker, sequence. From the highest bit down

    @property
    def workers(self) -> int:
        return 1 << self.worker_bits

    @property
    def units(self) -> int:
        """How many units there are, whose ids all leave bit 63 alone."""
        return 1 << min(self.time_bits, 63 - self.sequence_bits - self.worker_bits)

    def unit_at(self, now_ms: int) -> int:
        """The first unit that begins at `now_ms` or later; 0 before the epoch."""
        return max(0, -((self.epoch_ms - now_ms) // self.unit_ms))

    def window(self, window_ms: int) -> int:
        """How many units a window of this length has, at least one."""
        return max(1, window_ms // self.unit_ms)

    def __str__(self) -> str:
        place = "lowest" if self.worker_is_lowest else "in the middle"
        return (
            f"{self.time_bits} bits of {self.unit_ms} ms, {self.sequence_bits} of sequence, "
            f"{self.worker_bits} of worker ({place}), epoch {self.epoch_ms}"
        )


class _Worker(NamedTuple):
    """
    What is kept of a worker that was used.

    Disk: the order of fields is part of the snapshot format.
    """

    lease: int
    offset: int  # by how many units the lease's clock runs ahead of log_time
    is_returned: bool
    windows: list[
        tuple[int, int, str]
    ]  # (from, until, owner), HISTORY_MAX at most; the last is the lease's own

    @property
    def free_at(self) -> int:
        """The unit of log_time from which on the worker may be given to somebody else."""
        return self.windows[-1][1] - self.offset


class _Generator:
    """A layout, and when each of its workers becomes free. All of it is derived from the tables."""

    __slots__ = ("free_at", "heap", "layout")

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        # Invariant: the workers used are 0 .. len(free_at) - 1.
        self.free_at: dict[int, int] = {}
        # Invariant: for each worker used there is an entry with its time or an earlier one: a renewal leaves
        # the old one, which is put right when it comes to the top. Which worker is chosen depends on `free_at` alone.
        self.heap: list[tuple[int, int]] = []

    def set_free_at(self, worker: int, unit: int) -> None:
        known = self.free_at.get(worker)
        self.free_at[worker] = unit
        if known is None or unit < known:
            heappush(self.heap, (unit, worker))
            if len(self.heap) > 2 * len(self.free_at) + 64:
                self.heap = sorted([(at, number) for number, at in self.free_at.items()])
        else:
            # Those that are renewed are about those that would be free first: so `first_free` finds little to do.
            for _ in range(2):
                self._put_first_right()

    def free_all(self) -> None:
        self.free_at = dict.fromkeys(self.free_at, 0)
        self.heap = [(0, worker) for worker in sorted(self.free_at)]

    def first_free(self) -> tuple[int, int] | None:
        """
        (unit, worker) of the one used that becomes free first, or did so longest ago; None if none was used.
        """
        while self._put_first_right():
            pass
        return self.heap[0] if self.heap else None

    def _put_first_right(self) -> bool:
        """Whether the first entry was not its worker's time. It is put where it belongs."""
        if self.heap:
            unit, worker = self.heap[0]
            actual = self.free_at[worker]
            if unit != actual:
                heapreplace(self.heap, (actual, worker))
                return True
        return False


class Ids:
    """All generators, and the windows of their workers."""

    __slots__ = (
        "_generators",
        "_limits",
        "_owner_of",
        "ahead_ms",
        "fence",
        "floor_ms",
        "last_lease",
        "layouts",
        "workers",
    )

    def __init__(self, limits: Limits, reclaimer: Reclaimer, *, owner_of: Callable[[int], str]) -> None:
        self._limits = limits
        self._owner_of = owner_of
        self.layouts = BytesTable(reclaimer)  # name -> Layout
        self.workers = BytesTable(reclaimer)  # name and >Q number -> _Worker
        self._generators: dict[bytes, _Generator] = {}  # derived from both
        self.last_lease = 0
        self.fence = 0  # leases up to this one were ended by a skip
        self.floor_ms = 0  # no window begins before it
        # Invariant: no lease's clock was ever further ahead of log_time, in any history that goes on from this state
        # without another skip. So who restores it knows how far beyond the time windows may have been granted.
        self.ahead_ms = 0

    # --- commands -----------------------------------------------------------------------------------------

    def check_lease(self, args: list[Any]) -> None:
        """
        Refuse a generator too many.

        Whether a worker is free is known only when the command is applied, at its log_time.

        Raises:
            QuotaExceeded: Of `id_generators_max`.
        """
        count = len(self._generators)
        if count >= self._limits.id_generators_max and args[1] not in self._generators:
            raise exceeded("id_generators_max", self._limits.id_generators_max, count + 1)

    def lease(
        self, meta: Meta, session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        _, name, fields, window_ms = args
        layout = Layout(*fields)
        if layout.epoch_ms == 0:
            layout = layout._replace(epoch_ms=DEFAULT_EPOCH_MS)
        self.check_lease(args)
        generator = self._generators.get(name)
        if generator is None:
            generator = _Generator(layout)
        elif generator.layout != layout:
            raise ConditionFailed(
                f"ids {_shown(name)} are laid out as {generator.layout}, not as {layout}: take another name",
                name=name,
                present=str(generator.layout),
                wanted=str(layout),
            )
        now = layout.unit_at(meta.now_ms)
        worker = self._choose(name, generator, now)
        key = _key(name, worker)
        record = self.workers.get(key)
        windows = [] if record is None else _decoded(record).windows
        ended = windows[-1][1] if windows else 0
        begin = max(now, ended, layout.unit_at(self.floor_ms))
        if begin >= layout.units:
            raise IdOverflow(
                f"the time of ids {_shown(name)} ({layout}) is used up: go on under another name with a later "
                "epoch or more bits of time",
                name=name,
                units=layout.units,
            )
        until = min(begin + layout.window(window_ms), layout.units)
        # Nothing has been changed above this line.
        invariant(ended <= begin < until, "window %d..%d of %r after %d", begin, until, key, ended)
        if name not in self._generators:
            self._generators[name] = generator
            self.layouts.put(name, encode(tuple(layout)))
        self.last_lease += 1
        window = (begin, until, self._owner_of(session))
        held = _Worker(self.last_lease, begin - now, False, [*windows[1 - HISTORY_MAX :], window])
        self._put(generator, key, worker, held)
        return (0, worker, held.lease, begin, until, begin, layout.epoch_ms)

    def renew(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        _, name, worker, lease, window_ms = args
        generator, key, held = self._held(name, worker, lease)
        begin, until, owner = held.windows[-1]
        layout = generator.layout
        now = layout.unit_at(meta.now_ms) + held.offset
        if held.is_returned or now >= until:
            raise _not_held(name, worker, lease)
        until = max(until, min(now + layout.window(window_ms), layout.units))
        held.windows[-1] = (begin, until, owner)
        self._put(generator, key, worker, held)
        return (0, until, now)

    def return_(
        self, _meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        _, name, worker, lease, used_until = args
        generator, key, held = self._held(name, worker, lease)
        begin, until, owner = held.windows[-1]
        # What was returned once stays as it is: a second, smaller mark must not give back what was used.
        if not held.is_returned:
            until = max(begin, min(until, used_until))
            held.windows[-1] = (begin, until, owner)
            self._put(generator, key, worker, held._replace(is_returned=True))
        return (0, until)

    def skip(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        floor_ms = args[1]
        if floor_ms > meta.now_ms + SKIP_MS_MAX:
            raise UsageError(
                f"a floor of {floor_ms} ms is more than a year after log_time ({meta.now_ms} ms): is the unit right?"
            )
        is_raised = floor_ms > self.floor_ms
        if is_raised:
            self.floor_ms = floor_ms
            # By the floor; or by the last window of a worker that is given away at once, whose lease was ahead itself.
            self.ahead_ms = max(floor_ms - meta.now_ms, self.ahead_ms + self._limits.ids_window_ms_max)
            # A history that was lost may have given the same numbers to other leases. It cannot have come so
            # far: that would be 32,768 leases in each millisecond since 1970.
            self.last_lease = self.fence = max(self.last_lease, floor_ms << _SKIP_LEASES_BITS)
            for generator in self._generators.values():
                generator.free_all()
        return (0, self.floor_ms, is_raised)

    # --- queries ------------------------------------------------------------------------------------------

    def info(self, args: list[Any], now_ms: int) -> Result:
        generator = self._generators.get(args[1])
        if generator is None:
            return (0, None, 0, 0, 0, 0, self.floor_ms)
        layout = generator.layout
        now = layout.unit_at(now_ms)
        leased = sum([1 for unit in generator.free_at.values() if unit > now])
        return (0, tuple(layout), layout.workers, len(generator.free_at), leased, now, self.floor_ms)

    def owner(self, args: list[Any]) -> Result:
        _, name, worker, unit = args
        record = self.workers.get(_key(name, worker))
        if record is not None:
            for begin, until, owner in _decoded(record).windows:
                if begin <= unit < until:
                    return (0, owner)
        return (0, None)

    def listing(self, args: list[Any]) -> Result:
        _, after, limit = args
        limit = max(1, min(limit, _GENERATORS_SHOWN))
        names = sorted([name for name in self._generators if after is None or name > after])
        rows = [
            (name, tuple(self._generators[name].layout), len(self._generators[name].free_at))
            for name in names[:limit]
        ]
        return (0, rows, len(names) > limit, self.ahead_ms)

    # --- state --------------------------------------------------------------------------------------------

    def load_layout(self, name: bytes, record: bytes) -> None:
        """Take a record of a snapshot. All layouts come before all workers, and the fence before both."""
        self._generators[name] = _Generator(Layout(*decode(record)))
        self.layouts.put(name, record)

    def load_worker(self, key: bytes, record: bytes) -> None:
        """Take a record of a snapshot."""
        name, worker = key[: -_NUMBER.size], _NUMBER.unpack(key[-_NUMBER.size :])[0]
        held = _decoded(record)
        self._generators[name].set_free_at(worker, 0 if held.lease <= self.fence else held.free_at)
        self.workers.put(key, record)

    def check_invariants(self) -> None:
        """For tests: windows are disjoint, and what is derived agrees with what it is derived from."""
        seen: dict[bytes, dict[int, int]] = {name: {} for name in self._generators}
        view = self.workers.view()
        for key, record in view.drain():
            name, (worker,) = key[: -_NUMBER.size], _NUMBER.unpack(key[-_NUMBER.size :])
            held = _decoded(record)
            invariant(held.lease <= self.last_lease, "lease %d was never given", held.lease)
            ended = 0
            for begin, until, _ in held.windows:
                invariant(ended <= begin <= until, "windows of %r overlap: %r", key, held.windows)
                ended = until
            invariant(ended <= self._generators[name].layout.units, "a window beyond the time of %r", name)
            seen[name][worker] = 0 if held.lease <= self.fence else held.free_at
        view.close()
        for name, generator in self._generators.items():
            invariant(
                seen[name] == generator.free_at, "index of the workers of %r differs from the table", name
            )
            invariant(
                set(seen[name]) == set(range(len(seen[name]))), "workers of %r are not consecutive", name
            )
            due = {worker for at, worker in generator.heap if at <= generator.free_at[worker]}
            invariant(due == set(seen[name]), "a worker of %r would never be found free", name)
        invariant(len(self.layouts) == len(self._generators), "a layout without a generator")

    def _choose(self, name: bytes, generator: _Generator, now: int) -> int:
        """A worker that was never used, else the free one whose window ended longest ago."""
        used, workers = len(generator.free_at), generator.layout.workers
        has_unused = used < workers
        if has_unused and len(self.workers) < self._limits.id_workers_max:
            return used
        first = generator.first_free()
        if first is not None and first[0] <= now:
            return first[1]
        if has_unused:
            raise exceeded("id_workers_max", self._limits.id_workers_max, len(self.workers) + 1)
        assert first is not None  # there is at least one worker, and all were used
        free_in_ms = (first[0] - now) * generator.layout.unit_ms
        raise QuotaExceeded(
            f"all {workers} workers of ids {_shown(name)} are leased ({generator.layout}); the first becomes free in "
            f"{free_in_ms} ms",
            limit="worker_bits",
            maximum=workers,
            wanted=workers + 1,
            free_in_ms=free_in_ms,
        )

    def _held(self, name: bytes, worker: int, lease: int) -> tuple[_Generator, bytes, _Worker]:
        key = _key(name, worker)
        record = self.workers.get(key)
        held = None if record is None else _decoded(record)
        if held is None or held.lease != lease or lease <= self.fence:
            raise _not_held(name, worker, lease)
        return self._generators[name], key, held

    def _put(self, generator: _Generator, key: bytes, worker: int, held: _Worker) -> None:
        self.workers.put(key, encode(tuple(held)))
        generator.set_free_at(worker, held.free_at)


def _key(name: bytes, worker: int) -> bytes:
    return name + _NUMBER.pack(worker)


def _decoded(record: bytes) -> _Worker:
    lease, offset, is_returned, windows = decode(record)
    return _Worker(lease, offset, is_returned, [(begin, until, owner) for begin, until, owner in windows])


def _shown(name: bytes) -> str:
    return repr(name.decode("utf-8", "backslashreplace"))


def _not_held(name: bytes, worker: int, lease: int) -> NotHolder:
    return NotHolder(
        f"lease {lease} of worker {worker} of ids {_shown(name)} has ended: take a new one",
        name=name,
        worker=worker,
        lease=lease,
    )
