"""Minting: ids out of the windows that were granted, each at most once, in any number of threads.

How it is safe without a lock on the way of every id: ids are handed out from a *chunk*, one iterator over a
range. Taking the next element of a range iterator is one call into C that nothing can interrupt, so no id of a
chunk is taken twice. Chunks are made under a lock, each from ticks above all those reserved before. So ids never
repeat, whatever the threads do in between; and a mint that begins after another has ended finds that one's chunk
or a later one, so its id is larger. The clock only decides when a chunk is too old. Where the interpreter has no
global lock, taking the next element is done under the lock.

::

    install() --> chunk --mint()--> chunk used up, or its unit over --> next chunk
                                        |                  |
                          window ended: NeedsWindow   too far ahead of time: NeedsWait

Invariants: an id's unit lies in a window that was installed. Ids of one minter rise strictly: over windows, other
workers and clocks that step back. After `revoke()`, and in a forked child, nothing is minted.

What must not live here: who grants windows, and how anybody waits. Both are told by `NeedsWindow` and `NeedsWait`.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import length_hint
from typing import Final, Literal, TypeVar, TypeVarTuple, Unpack, overload

from coordlib.errors import ClusterClosed, CoordError, ForkedError, IdOverflow, UsageError
from coordlib.ids.layout import Layout

__all__ = ["IdBlock", "Minter", "MinterInfo", "NeedsWait", "NeedsWindow", "local_clock_ns"]

# Large enough that making it costs an id next to nothing (a microsecond shared by all of it), small enough that
# giving back the rest of it, which is a list, costs mint_many() next to nothing. Measured: 64 to 1024 are equal.
_CHUNK: Final = 256
# No clock is behind this, so a chunk with this deadline is looked at anew.
_LONG_AGO: Final = -(1 << 127)
# A window is renewed once this part of it has passed: with time for three more tries before half is used.
_RENEW_AFTER: Final = 4
# An answer about the time is as old as its way here: what is within this part of `max_ahead_ms` is no difference.
_LAG: Final = 4

# The chunk of those that have none: used up, for ever, and so everybody's.
_NONE: Final[Iterator[int]] = iter(range(0))

_T = TypeVar("_T")
_Arguments = TypeVarTuple("_Arguments")

# A lease must run out while the machine is suspended, too. A partial, because a function of ours costs twice as much.
local_clock_ns: Final[Callable[[], int]] = functools.partial(
    time.clock_gettime_ns, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
)
"""Nanoseconds of a clock that never goes back and goes on in suspend; the origin means nothing."""


class NeedsWindow(Exception):
    """
    No id can be minted before `install()` or `extend()`. Nothing was minted.

    `reason`: "none" was ever installed; the last one has "ended"; its ids are "used" up before its time is.
    """

    def __init__(self, reason: Literal["none", "ended", "used"]) -> None:
        super().__init__(reason)
        self.reason = reason


class NeedsWait(Exception):
    """The next id would be too far ahead of its time; it is not in about `seconds`. Nothing was minted."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class MinterInfo:
    """
    What a minter has and had to do.

    `worker` and the window `from_unit` to `until_unit` (excluded) are of the last `install()`, None before the first;
    `now_unit` is the time for ids now, not clamped to the window. `borrowed` counts units that were begun before
    their time, `regressions` how often the clock was seen to have gone back, `waits` how often a mint had to wait.
    """

    worker: int | None
    from_unit: int
    until_unit: int
    now_unit: int
    borrowed: int
    regressions: int
    waits: int


class IdBlock(Sequence[int]):
    """
    Consecutive ids, in order, of a layout whose worker is not lowest; as cheap to hold as a `range`.

    Immutable and hashable. Slices are blocks; blocks of the same ids in the same order are equal.
    """

    __slots__ = ("_base", "_mask", "_shift", "_ticks")

    def __init__(self, ticks: range, sequence_bits: int, worker_bits: int, worker: int) -> None:
        self._ticks = ticks
        self._shift = worker_bits
        self._mask = (1 << sequence_bits) - 1
        self._base = worker << sequence_bits

    def _id(self, tick: int) -> int:
        sequence = tick & self._mask
        return (tick ^ sequence) << self._shift | self._base | sequence

    def __len__(self) -> int:
        return len(self._ticks)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> IdBlock: ...
    def __getitem__(self, index: int | slice) -> int | IdBlock:
        if isinstance(index, slice):
            part = IdBlock.__new__(IdBlock)
            part._ticks, part._shift = self._ticks[index], self._shift
            part._mask, part._base = self._mask, self._base
            return part
        return self._id(self._ticks[index])

    def __iter__(self) -> Iterator[int]:
        return map(self._id, self._ticks)

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int):
            return False
        sequence = value & self._mask
        tick = (value >> self._shift) & ~self._mask | sequence
        return tick in self._ticks and self._id(tick) == value

    def _key(self) -> tuple[object, ...]:
        return (self._ticks, self._shift, self._mask, self._base) if self._ticks else ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdBlock) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"<IdBlock of {len(self)} ids from {self[0]} to {self[-1]}>" if self else "<IdBlock, empty>"


def _needs_lock() -> bool:
    """Whether taking the next element of a shared iterator is anything but one uninterrupted step here."""
    return sys.implementation.name != "cpython" or not getattr(sys, "_is_gil_enabled", lambda: True)()


_Publish = Callable[[Iterator[int], int], None]


def _free_path(minter: Minter) -> tuple[Callable[[], int], _Publish]:
    """The way of an id where a step in C is one step for all threads."""
    pace_ns, refill = minter._pace_ns, minter._refill
    chunk = _NONE
    deadline_ns = _LONG_AGO

    def mint() -> int:
        if pace_ns() < deadline_ns:
            for number in chunk:  # the next one, if there is one: costs no call, no name, no exception
                return number
        while True:
            refill()
            # Whatever the time is by now, or a thread that is slow enough would never get one. None is left if
            # others were faster.
            for number in chunk:
                return number

    def publish(new: Iterator[int], new_deadline_ns: int) -> None:
        nonlocal chunk, deadline_ns
        chunk = new
        deadline_ns = new_deadline_ns

    return mint, publish


def _locked_path(minter: Minter) -> tuple[Callable[[], int], _Publish]:
    """The way of an id where threads run at the same time."""
    pace_ns, refill = minter._pace_ns, minter._refill
    chunk = _NONE
    deadline_ns = _LONG_AGO

    def mint() -> int:
        with minter._lock:
            if pace_ns() < deadline_ns:
                for number in chunk:
                    return number
        while True:
            refill()
            with minter._lock:
                for number in chunk:
                    return number

    def publish(new: Iterator[int], new_deadline_ns: int) -> None:
        nonlocal chunk, deadline_ns
        chunk = new
        deadline_ns = new_deadline_ns

    return mint, publish


class Minter:
    """
    Mints the ids of one process from the windows it is given. Any thread may call anything at any time.

    Id time is what the window was granted at, plus what the clock has run since. Ids of one minter rise strictly, in
    this sense: if one call ends before another begins, its ids are smaller.

    Args:
        layout: How ids are put together.
        clock_ns: Nanoseconds of a clock that runs evenly, from any origin. One that steps back repeats nothing: ids go
            on from the last, until they are `max_ahead_ms` ahead of it.
        pace_ns: A cheaper clock, which only tells when a unit is over; `clock_ns` is read for each chunk of ids. None:
            `clock_ns` itself, and for the default one the cheapest there is.
        max_ahead_ms: How far ids may be ahead of their time, when more are asked for than the layout has. With the
            layout's `on_overflow="wait"` they never are.
        on_exhausted: Called, outside of all locks, with what is needed instead of raising it. When it returns, the mint
            tries again; what it raises, the mint raises.
        on_renewal_due: Called once for each window and extension, outside of all locks, by the mint that finds a
            quarter of it passed. Must not block; what it raises, the mint raises, having minted nothing.
        lock_every_call: Whether each id is taken under the lock; None: only where the interpreter needs it.

    Raises:
        UsageError: `max_ahead_ms` is less than a unit of the layout.
    """

    mint: Callable[[], int]
    """
    A new id, 0 <= id < 2**63: larger than all whose mint had ended when this one began.

    Raises:
        NeedsWindow, NeedsWait: Nothing was minted; see `on_exhausted`.
        IdOverflow: The layout's last unit is used up; no id will be minted any more.
        ClusterClosed: After `revoke()`.
        ForkedError: In a forked child.
        UsageError: Called by a signal handler or a finaliser that interrupted this very minter.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        clock_ns: Callable[[], int] = local_clock_ns,
        pace_ns: Callable[[], int] | None = None,
        max_ahead_ms: int = 1000,
        on_exhausted: Callable[[NeedsWindow | NeedsWait], None] | None = None,
        on_renewal_due: Callable[[], None] | None = None,
        lock_every_call: bool | None = None,
    ) -> None:
        if max_ahead_ms < layout.unit_ms:
            raise UsageError(
                f"max_ahead_ms is at least {layout.unit_ms}, a unit of the layout; got {max_ahead_ms}"
            )
        self.layout = layout
        self._clock_ns = clock_ns
        # What it misses while the machine is suspended matters no longer than a chunk lasts: to the end of its unit.
        self._pace_ns = pace_ns or (time.monotonic_ns if clock_ns is local_clock_ns else clock_ns)
        self._on_exhausted = on_exhausted
        self._on_renewal_due = on_renewal_due
        self._unit_ns = layout.unit_ms * 1_000_000
        self._bits = layout.sequence_bits
        self._borrows = layout.on_overflow == "borrow"
        self._ahead_max = max_ahead_ms // layout.unit_ms if self._borrows else 0
        self._block_max = max(1, self._ahead_max) << self._bits

        # Reentrant so that being re-entered can be told from being waited for: see _guarded.
        self._lock = threading.RLock()
        self._inside = False
        self._renewal_due = False
        self._stopped: Callable[[], CoordError] | None = None

        self._worker: int | None = None
        self._from_unit = self._until_unit = 0
        # Id time: _base_unit began at _base_ns of the clock.
        self._base_unit = self._base_ns = 0
        self._latest_ns = self._latest_pace_ns = _LONG_AGO
        self._renew_at_unit: int | None = None
        # Invariant: ticks from _high on were never reserved. What is left of _chunk ends at _high and is of
        # _chunk_unit; everything else below _high is used or will never be.
        self._high = 0
        self._chunk = _NONE
        self._chunk_unit = 0
        self._borrowed = self._regressions = self._waits = 0

        locked = _needs_lock() if lock_every_call is None else lock_every_call
        self.mint, self._publish = (_locked_path if locked else _free_path)(self)
        _minters.add(self)

    # -- what is granted -------------------------------------------------------------------------------------

    def install(self, worker: int, from_unit: int, until_unit: int, now_unit: int) -> None:
        """
        Mint from a new window, [from_unit, until_unit) of `worker`, whatever is left of the last one.

        It must have been granted to this process and, ever, to nobody else. It is `now_unit` now, or `from_unit` if
        that is later. After `revoke()` and in a forked child this changes nothing.

        Raises:
            UsageError: The layout has no such worker or units.
        """
        layout = self.layout
        if not 0 <= worker < layout.workers or not 0 <= from_unit < min(until_unit, layout.units_max):
            raise UsageError(
                f"worker {worker}, units {from_unit} to {until_unit}: no window of the layout {layout.name!r}"
            )
        self._guarded(self._install, worker, from_unit, min(until_unit, layout.units_max), now_unit)

    def _install(self, worker: int, from_unit: int, until_unit: int, now_unit: int) -> None:
        if self._stopped is not None:
            return
        self._reclaim()
        if worker != self._worker:
            # Within a unit a smaller worker's ids may be smaller, so it begins with the next.
            self._high = self._used_units() << self._bits
        self._high = max(self._high, from_unit << self._bits)
        self._worker = worker
        self._from_unit, self._until_unit = from_unit, until_unit
        self._set_time(max(now_unit, from_unit), self._clock_ns())

    def extend(self, until_unit: int, now_unit: int) -> None:
        """
        The window goes on to `until_unit` (it never gets shorter), and it is `now_unit` now.

        Id time follows: at once if it was behind; by a quarter of `max_ahead_ms` at most if it was ahead, so that no
        mint has to wait for it. After `revoke()` and in a forked child this changes nothing.

        Raises:
            UsageError: There is no window.
        """
        self._guarded(self._extend, until_unit, now_unit)

    def _extend(self, until_unit: int, now_unit: int) -> None:
        if self._stopped is not None:
            return
        if self._worker is None:
            raise UsageError("there is no window to extend: install one")
        self._until_unit = max(self._until_unit, min(until_unit, self.layout.units_max))
        clock_ns = self._clock_ns()
        estimate = self._unit_at(clock_ns)
        slack = self._ahead_max // _LAG
        if estimate - slack <= now_unit <= estimate:
            self._set_time(self._base_unit, self._base_ns)
        else:
            self._set_time(max(now_unit, estimate - slack, self._from_unit), clock_ns)
        self._renew_from(self._unit_at(clock_ns))

    def rearm_renewal(self, after_ms: int = 0) -> None:
        """Have `on_renewal_due` called again, by the first mint from `after_ms` on: the renewal has failed."""
        self._guarded(self._rearm, after_ms // self.layout.unit_ms)

    def _rearm(self, after_units: int) -> None:
        if self._stopped is None and self._worker is not None:
            self._renew_at_unit = self._unit_at(self._clock_ns()) + after_units
            self._publish(self._chunk, _LONG_AGO)

    def revoke(self) -> int:
        """
        Stop for good: every mint that begins from now on raises ClusterClosed.

        May be called from a signal handler. Calling it again returns the same.

        Returns:
            The unit from which on nothing of the window was or will be used, so that the rest may be given back. Not
            below `from_unit`; 0 if there never was a window.
        """
        # Not guarded: what it interrupts, in the same thread, looks at _stopped before it hands anything out.
        with self._lock:
            if self._stopped is None:
                self._stop(
                    lambda: ClusterClosed("this generator of ids was closed with its cluster: make a new one")
                )
            return self._used_units()

    def retire_in_child(self) -> None:
        """Stop for good in a forked child, where it is called after every fork. The parent goes on."""
        # Whoever held the lock in the parent is not here to release it.
        self._lock = threading.RLock()
        self._inside = False
        self._stop(
            lambda: ForkedError(
                "this generator of ids belongs to the parent process, which goes on minting from the same window. "
                "Make one here: coordlib.connect(...).ids() gets a worker of its own; coordlib.ids.standalone(worker=...) "
                "needs a worker that no other process has"
            )
        )

    def _stop(self, error: Callable[[], CoordError]) -> None:
        self._stopped = error
        self._reclaim()

    def info(self) -> MinterInfo:
        """The window and the counters, of one moment."""
        with self._lock:
            return MinterInfo(
                self._worker,
                self._from_unit,
                self._until_unit,
                self._unit_at(self._clock_ns()) if self._worker is not None else 0,
                self._borrowed,
                self._regressions,
                self._waits,
            )

    # -- minting ---------------------------------------------------------------------------------------------

    @property
    def block_max(self) -> int:
        """The most ids of one `mint_many()`: as many as the layout has in `max_ahead_ms`, or in a unit if it waits."""
        return self._block_max

    def mint_many(self, count: int) -> Sequence[int]:
        """
        `count` new ids, consecutive and in order: a `range` where the layout's worker is lowest, else an `IdBlock`.

        All of them or none; larger than all whose mint had ended when this one began. Costs little more than one id.

        Raises:
            UsageError: `count` is negative or above `block_max`; and as for `mint`.
            NeedsWindow, NeedsWait, IdOverflow, ClusterClosed, ForkedError: As for `mint`.
        """
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= self._block_max:
            raise UsageError(
                f"mint_many() gives 0 to {self._block_max} ids of the layout {self.layout.name!r} at once; "
                f"got {count!r}: ask several times"
            )
        while True:
            outcome = self._guarded(self._take_block, count)
            if not isinstance(outcome, Exception):
                return outcome
            self._help(outcome)

    def _refill(self) -> None:
        """Publish a chunk, or have the caller helped; else raise."""
        outcome = self._guarded(self._next_chunk)
        if outcome is not None:
            self._help(outcome)

    def _help(self, need: Exception) -> None:
        if self._on_exhausted is None or not isinstance(need, NeedsWindow | NeedsWait):
            raise need
        self._on_exhausted(need)

    def _guarded(self, step: Callable[[Unpack[_Arguments]], _T], *arguments: *_Arguments) -> _T:
        with self._lock:
            # A lock that is not reentrant would never let such a caller go on, nor the one it has interrupted.
            if self._inside:
                raise UsageError(
                    "a signal handler or a finaliser wanted an id while the one it interrupted was being minted: "
                    "mint ids elsewhere"
                )
            self._inside = True
            try:
                outcome = step(*arguments)
            finally:
                self._inside = False
            if not self._renewal_due:
                return outcome
            self._renewal_due = False
        if self._on_renewal_due is not None:
            self._on_renewal_due()
        return outcome

    def _next_chunk(self) -> Exception | None:
        # The pace before the clock: a pause between the two then makes the chunk old too early, never too late.
        self._latest_pace_ns = self._pace_ns()
        now = self._now()
        if isinstance(now, Exception):
            return now
        if self._chunk_unit >= now and length_hint(self._chunk):
            # Another thread was here, or the time has been set.
            self._publish(self._chunk, self._deadline_ns())
            return None
        self._drop()
        bits = self._bits
        first = max(self._high, now << bits)
        unit = first >> bits
        obstacle = self._obstacle(unit, now)
        if obstacle is not None:
            return obstacle
        end = min(first + _CHUNK, (unit + 1) << bits)
        # In this order: whatever interrupts, what is reserved is never reserved again.
        self._reserve(first, end, now)
        assert self._worker is not None
        low = self.layout.compose(unit, first & ((1 << bits) - 1), self._worker)
        step = self.layout.workers if self.layout.worker_is_lowest else 1
        self._chunk_unit = unit
        self._chunk = iter(range(low, low + (end - first) * step, step))
        self._publish(self._chunk, self._deadline_ns())
        # By somebody who interrupted us in this thread: a fork, or revoke(), in a signal handler.
        if self._stopped is not None:
            self._reclaim()
            return self._stopped()
        return None

    def _take_block(self, count: int) -> Sequence[int] | Exception:
        now = self._now()
        if isinstance(now, Exception):
            return now
        # With few calls: this is to cost little beside the list of a thousand ids.
        if self._chunk is not _NONE:
            if self._chunk_unit >= now:
                self._reclaim()
            else:
                self._drop()
        bits = self._bits
        first = now << bits
        if first < self._high:
            first = self._high
        if not self._borrows and (first & ((1 << bits) - 1)) + count > 1 << bits:
            first = ((first >> bits) + 1) << bits
        end = first + count
        last = (end - 1 if count else first) >> bits
        if last > now or last >= self._until_unit:
            obstacle = self._obstacle(last, now)
            if obstacle is not None:
                return obstacle
        self._reserve(first, end, now)
        layout, worker = self.layout, self._worker
        assert worker is not None
        if layout.worker_is_lowest:
            shift = layout.worker_bits
            block: Sequence[int] = range(first << shift | worker, end << shift | worker, 1 << shift)
        else:
            block = IdBlock(range(first, end), bits, layout.worker_bits, worker)
        return block if self._stopped is None else self._stopped()

    # -- bookkeeping, always under the lock ------------------------------------------------------------------

    def _now(self) -> int | Exception:
        """The unit it is, having looked at what depends on it; or why nothing can be minted."""
        if self._stopped is not None:
            return self._stopped()
        if self._worker is None:
            return NeedsWindow("none")
        clock_ns = self._clock_ns()
        if clock_ns < self._latest_ns:
            self._regressions += 1
        self._latest_ns = clock_ns
        now = self._base_unit + (clock_ns - self._base_ns) // self._unit_ns
        if self._renew_at_unit is not None and now >= self._renew_at_unit:
            self._renew_at_unit = None
            self._renewal_due = True
        return now

    def _obstacle(self, unit: int, now: int) -> Exception | None:
        """Why an id of `unit` must not be minted now."""
        until = self._until_unit
        if unit >= until:
            if until == self.layout.units_max:
                return IdOverflow(
                    f"the layout {self.layout.name!r} has no units of time left: it ends at {self.layout.expires_at}. "
                    "Use a generator of another name with a later epoch"
                )
            return NeedsWindow("ended" if now >= until else "used")
        if unit - now > self._ahead_max:
            self._waits += 1
            return NeedsWait((self._start_ns(unit - self._ahead_max) - self._latest_ns) / 1e9)
        return None

    def _reserve(self, first: int, end: int, now: int) -> None:
        last = (end - 1) >> self._bits
        if last > now:
            self._borrowed += max(0, last - max(now, (first - 1) >> self._bits))
        self._high = end

    def _reclaim(self) -> None:
        """Take back what is left of the chunk. One step in C, or under the lock: nobody takes from it meanwhile."""
        self._high -= len(list(self._chunk))
        self._drop()

    def _drop(self) -> None:
        """Let the chunk go. Published first: what is not _NONE here is dropped by the next, if this is interrupted."""
        self._publish(_NONE, _LONG_AGO)
        self._chunk = _NONE

    def _used_units(self) -> int:
        return -(-self._high >> self._bits)

    def _unit_at(self, clock_ns: int) -> int:
        return self._base_unit + (clock_ns - self._base_ns) // self._unit_ns

    def _start_ns(self, unit: int) -> int:
        return self._base_ns + (unit - self._base_unit) * self._unit_ns

    def _deadline_ns(self) -> int:
        """When the chunk's unit is over, by the clock that is read for every id."""
        return self._latest_pace_ns + self._start_ns(self._chunk_unit + 1) - self._latest_ns

    def _set_time(self, base_unit: int, base_ns: int) -> None:
        self._base_unit, self._base_ns = base_unit, base_ns
        self._latest_ns = _LONG_AGO
        self._renew_from(base_unit)
        # The chunk, if there is one, is looked at again by the new time.
        self._publish(self._chunk, _LONG_AGO)

    def _renew_from(self, now: int) -> None:
        self._renew_at_unit = now + max(0, self._until_unit - now) // _RENEW_AFTER


# Process-wide on purpose: a fork copies the process, whoever holds the minters.
_minters: weakref.WeakSet[Minter] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for minter in list(_minters):
        minter.retire_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
