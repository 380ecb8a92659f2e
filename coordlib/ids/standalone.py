"""Ids without a cluster, and so without its guarantee."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from coordlib.errors import IdOverflow, UsageError
from coordlib.ids.inspecting import IdInfo, inspect
from coordlib.ids.layout import DEFAULT, Layout
from coordlib.ids.minter import Minter, MinterInfo, NeedsWait, NeedsWindow, local_clock_ns

__all__ = ["StandaloneIds", "standalone"]


def standalone(
    *,
    worker: int,
    layout: Layout = DEFAULT,
    clock: Callable[[], int] = time.time_ns,
    elapsed: Callable[[], int] = local_clock_ns,
) -> StandaloneIds:
    """
    A generator of ids that asks nobody; threads may share it.

    **What is lost without a cluster**: in this process ids never repeat and rise strictly, whatever the clocks do
    later; between processes nothing but the operator keeps them apart. They are unique only if every process that
    mints, at any time, has a `worker` of its own, and if, whenever a process takes a worker that was used before, the
    wall clock is not behind the time of the last id minted with it (which may be a second ahead of its clock). A
    process that is forked needs another worker; its copy of this generator raises ForkedError.

    Args:
        worker: 0 to `layout.workers - 1`, given to one process at a time by whoever runs them.
        clock: Nanoseconds since 1970. Read once, now.
        elapsed: Nanoseconds of a clock that runs evenly, from any origin: id time goes on by it.

    Raises:
        UsageError: The layout has no such worker, or the clock is before its epoch.
        IdOverflow: The clock is after its end.
    """
    return StandaloneIds(worker, layout, clock, elapsed)


class StandaloneIds:
    """See `standalone()`, which makes it."""

    mint: Callable[[], int]
    """
    A new id. Blocks while this process is a second of ids ahead of the time.

    Raises:
        IdOverflow: The layout's last unit is used up.
        ForkedError: In a forked child.
    """

    def __init__(
        self, worker: int, layout: Layout, clock: Callable[[], int], elapsed: Callable[[], int]
    ) -> None:
        if isinstance(worker, bool) or not isinstance(worker, int) or not 0 <= worker < layout.workers:
            raise UsageError(
                f"worker is 0 to {layout.workers - 1} in the layout {layout.name!r}; got {worker!r}"
            )
        self.worker = worker
        self.layout = layout
        self._minter = Minter(
            layout, clock_ns=elapsed, max_ahead_ms=max(1000, layout.unit_ms), on_exhausted=self._wait
        )
        unit = (clock() // 1_000_000 - layout.epoch) // layout.unit_ms
        if unit < 0:
            raise UsageError(
                f"the clock is before {layout.start_of(0)}, where the layout {layout.name!r} begins: "
                "set the clock, or use an earlier epoch"
            )
        # The unit that has begun may have been begun by an earlier run, too.
        first = unit + 1
        if first >= layout.units_max:
            raise IdOverflow(
                f"the clock is at or after {layout.expires_at}, where the layout {layout.name!r} ends: use a later epoch"
            )
        self._minter.install(worker, first, layout.units_max, first)
        self.mint = self._minter.mint

    @staticmethod
    def _wait(need: NeedsWindow | NeedsWait) -> None:
        if isinstance(need, NeedsWindow):
            raise need
        time.sleep(need.seconds)

    def next(self) -> int:
        """The same as `mint()`."""
        return self.mint()

    def __iter__(self) -> Iterator[int]:
        """Ids without end."""
        return self

    def __next__(self) -> int:
        return self.mint()

    def mint_many(self, count: int) -> Sequence[int]:
        """
        `count` new ids, consecutive and in order, as a `range` where the layout's worker is lowest. Blocks as `mint`.

        Raises:
            UsageError: More than the layout has in a second, or less than 0.
            IdOverflow, ForkedError: As `mint`.
        """
        return self._minter.mint_many(count)

    def inspect(self, number: int) -> IdInfo:
        """The parts of an id of this layout. Raises UsageError if it can be none."""
        return inspect(number, self.layout)

    def info(self) -> MinterInfo:
        """What the generator has done so far."""
        return self._minter.info()
