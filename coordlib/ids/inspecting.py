"""What can be read from an id alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from coordlib.ids.layout import DEFAULT, Layout

__all__ = ["IdInfo", "inspect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IdInfo:
    """
    The parts of an id.

    `time` is when its unit begins by id time (UTC); `worker` the whole number of the worker, as granted;
    `datacenter` the high part of it where the layout has one, else None; `sequence` its number within unit and worker.
    `node` is who minted it, where a cluster was asked and still knows.
    """

    id: int
    time: datetime
    worker: int
    datacenter: int | None
    sequence: int
    layout: Layout
    node: str | None = None

    @property
    def worker_in_datacenter(self) -> int:
        """The low part of `worker`, below `datacenter`: Twitter's worker, Discord's process. Else all of it."""
        return self.worker & ((1 << self.layout.worker_bits - self.layout.datacenter_bits) - 1)

    def __str__(self) -> str:
        where = f"worker {self.worker}"
        if self.datacenter is not None:
            where += f" (data centre {self.datacenter}, worker {self.worker_in_datacenter} in it)"
        by = "" if self.node is None else f", minted by {self.node}"
        time = self.time.replace(tzinfo=None).isoformat(timespec="milliseconds")
        return f"{self.id}: {time}Z, {where}, sequence {self.sequence}, layout {self.layout.name}{by}"


def inspect(number: int, layout: Layout = DEFAULT) -> IdInfo:
    """
    The parts of an id that was minted by `layout`; by another layout they mean nothing.

    Raises:
        UsageError: It can be no id of this layout: negative, or too large for its bits.
    """
    unit, sequence, worker = layout.decompose(number)
    low_bits = layout.worker_bits - layout.datacenter_bits
    return IdInfo(
        id=number,
        time=layout.start_of(unit),
        worker=worker,
        datacenter=worker >> low_bits if layout.datacenter_bits else None,
        sequence=sequence,
        layout=layout,
    )
