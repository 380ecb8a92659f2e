"""How the 63 bits of an id are divided between time, sequence and worker.

::

    worker lowest   bit 63: 0 | time | sequence | worker     DEFAULT, SONYFLAKE, JS53
    worker between  bit 63: 0 | time | worker | sequence     TWITTER, DISCORD, INSTAGRAM

Bit 63 is never set: ids are positive in every language that has 64-bit integers. A *unit* is the layout's
step of time (`unit_ms`), counted from its epoch. A *tick* is `unit << sequence_bits | sequence`, one counter:
adding 1 carries from the sequence into time.

Pure arithmetic: no clock is read here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from coordlib.errors import ConfigError, UsageError

__all__ = [
    "COORDLIB_EPOCH_MS",
    "DEFAULT",
    "DISCORD",
    "INSTAGRAM",
    "JS53",
    "LAYOUTS",
    "SONYFLAKE",
    "TWITTER",
    "Layout",
]

COORDLIB_EPOCH_MS: Final = 1_735_689_600_000
"""2025-01-01T00:00Z: the epoch of a layout that names none."""

_ID_BITS: Final = 63
_UNIX: Final = datetime(1970, 1, 1, tzinfo=UTC)
_CALENDAR_MS: Final = (datetime.max.replace(tzinfo=UTC) - _UNIX) // timedelta(milliseconds=1)


def _checked(value: object, setting: str, low: int, high: int, advice: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{setting} is a whole number from {low} to {high}; got {value!r}: {advice}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """
    How ids of one kind are put together; all that mint or read them must use the same.

    Two layouts are equal when all fields are. What constructs, works: every id of the layout is positive, below
    2**63, and has a date.

    Args:
        time_bits: How many bits count units since the epoch: `expires_at` tells when they are used up.
        sequence_bits: 2**sequence_bits ids in one unit and worker, before minting borrows or waits.
        worker_bits: 2**worker_bits processes can mint at a time.
        unit_ms: The step of time, 1 to 10,000 milliseconds.
        epoch_ms: Milliseconds from 1970 to unit 0; None is the cluster's own, 2025-01-01T00:00Z.
        worker_is_lowest: The order time, sequence, worker; else time, worker, sequence, as Twitter has it.
        datacenter_bits: The high part of the worker that is read as a data centre (or Discord's worker, above its
            process). For reading alone: workers are numbered through.
        name: For people: two layouts that differ should differ in it.
        on_overflow: What happens when a unit's sequence is used up: "borrow" takes the next unit before its time
            has come, at most `max_ahead_ms` ahead; "wait" waits for it.

    Raises:
        ConfigError: The fields do not go together; the message says what would.
    """

    time_bits: int
    sequence_bits: int
    worker_bits: int
    unit_ms: int = 1
    epoch_ms: int | None = None
    worker_is_lowest: bool = True
    datacenter_bits: int = 0
    name: str = "own"
    on_overflow: Literal["borrow", "wait"] = "borrow"

    def __post_init__(self) -> None:
        _checked(self.time_bits, "time_bits", 1, _ID_BITS, "41 of 1 ms last 69 years")
        _checked(self.sequence_bits, "sequence_bits", 0, 32, "12 are 4096 ids in each unit")
        _checked(self.worker_bits, "worker_bits", 0, 32, "10 are 1024 workers")
        bits = self.time_bits + self.sequence_bits + self.worker_bits
        if bits > _ID_BITS:
            room = _ID_BITS - self.sequence_bits - self.worker_bits
            raise ConfigError(
                f"time_bits {self.time_bits}, sequence_bits {self.sequence_bits} and worker_bits {self.worker_bits} "
                f"are {bits} bits, and a positive 64-bit number has {_ID_BITS}: "
                + (
                    f"use at most {room} time_bits"
                    if room > 0
                    else "use fewer sequence_bits and worker_bits, 22 together for example"
                )
            )
        _checked(self.unit_ms, "unit_ms", 1, 10_000, "1 is usual, 10 if time_bits are scarce")
        if self.epoch_ms is not None:
            # 0 stands for "the cluster's own" in what is replicated, and so can be nobody's.
            advice = "milliseconds since 1970, or None for the cluster's own"
            _checked(self.epoch_ms, "epoch_ms", 1, _CALENDAR_MS, advice)
        if self.epoch + self.units_max * self.unit_ms > _CALENDAR_MS:
            room = ((_CALENDAR_MS - self.epoch) // self.unit_ms).bit_length() - 1
            raise ConfigError(
                f"time_bits {self.time_bits} of {self.unit_ms} ms from the epoch go beyond the year 9999, where dates "
                f"end: use at most {room} time_bits" + (", or a smaller unit_ms" if self.unit_ms > 1 else "")
            )
        _checked(
            self.datacenter_bits,
            "datacenter_bits",
            0,
            self.worker_bits,
            "they are the high part of worker_bits",
        )
        if not isinstance(self.worker_is_lowest, bool):
            raise ConfigError(f"worker_is_lowest is True or False; got {self.worker_is_lowest!r}")
        if self.on_overflow not in ("borrow", "wait"):
            raise ConfigError(f'on_overflow is "borrow" or "wait"; got {self.on_overflow!r}')
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"name is a text for people to read; got {self.name!r}")

    @property
    def epoch(self) -> int:
        """Milliseconds from 1970 to unit 0."""
        return COORDLIB_EPOCH_MS if self.epoch_ms is None else self.epoch_ms

    @property
    def units_max(self) -> int:
        """How many units there are: the last is `units_max - 1`."""
        return 1 << self.time_bits

    @property
    def workers(self) -> int:
        """How many workers there are: the last is `workers - 1`."""
        return 1 << self.worker_bits

    @property
    def sequences(self) -> int:
        """How many ids one worker has in one unit."""
        return 1 << self.sequence_bits

    @property
    def expires_at(self) -> datetime:
        """From when on there are no more ids of this layout (UTC)."""
        return self.start_of(self.units_max)

    def with_epoch(self, epoch_ms: int) -> Layout:
        """The same with another epoch: milliseconds since 1970. Raises ConfigError as construction does."""
        return dataclasses.replace(self, epoch_ms=epoch_ms)

    def start_of(self, unit: int) -> datetime:
        """When a unit begins (UTC); `units_max` is the end of the last."""
        return _UNIX + timedelta(milliseconds=self.epoch + unit * self.unit_ms)

    def compose(self, unit: int, sequence: int, worker: int) -> int:
        """
        The id of these parts, 0 <= id < 2**63.

        Raises:
            UsageError: A part does not fit into its bits.
        """
        for value, count, part in (
            (unit, self.units_max, "unit"),
            (sequence, self.sequences, "sequence"),
            (worker, self.workers, "worker"),
        ):
            if not 0 <= value < count:
                raise UsageError(
                    f"{part} {value} does not fit into the layout {self.name!r}: it is 0 to {count - 1}"
                )
        if self.worker_is_lowest:
            return (unit << self.sequence_bits | sequence) << self.worker_bits | worker
        return (unit << self.worker_bits | worker) << self.sequence_bits | sequence

    def decompose(self, number: int) -> tuple[int, int, int]:
        """
        Unit, sequence and worker of an id.

        Raises:
            UsageError: It is no id of this layout: negative, or too large for its bits.
        """
        if isinstance(number, bool) or not isinstance(number, int):
            raise UsageError(f"an id is an int; got {number!r}")
        low_bits = self.sequence_bits + self.worker_bits
        if not 0 <= number < self.units_max << low_bits:
            raise UsageError(
                f"{number} is no id of the layout {self.name!r}: those are 0 to {(self.units_max << low_bits) - 1}"
            )
        if self.worker_is_lowest:
            tick, worker = number >> self.worker_bits, number & (self.workers - 1)
            return tick >> self.sequence_bits, tick & (self.sequences - 1), worker
        rest, sequence = number >> self.sequence_bits, number & (self.sequences - 1)
        return rest >> self.worker_bits, sequence, rest & (self.workers - 1)

    def time_of(self, number: int) -> datetime:
        """When the unit of an id begins (UTC). Raises UsageError as `decompose` does."""
        return self.start_of(self.decompose(number)[0])


DEFAULT: Final = Layout(time_bits=41, sequence_bits=12, worker_bits=10, name="default")
"""41 bits of 1 ms | 12 sequence | 10 worker: 4,096 ids a millisecond for each of 1,024 workers, to 2094."""

TWITTER: Final = Layout(
    time_bits=41,
    sequence_bits=12,
    worker_bits=10,
    epoch_ms=1_288_834_974_657,
    worker_is_lowest=False,
    datacenter_bits=5,
    name="twitter",
)
"""41 ms | 5 data centre | 5 worker | 12 sequence, since 2010-11-04. Source: twitter-archive/snowflake, IdWorker."""

DISCORD: Final = Layout(
    time_bits=41,
    sequence_bits=12,
    worker_bits=10,
    epoch_ms=1_420_070_400_000,
    worker_is_lowest=False,
    datacenter_bits=5,
    name="discord",
)
"""
42 ms | 5 worker | 5 process | 12 increment, since 2015. Discord's worker is read as `datacenter`, its process as `worker`.

The 42nd bit of time is bit 63, which coordlib never sets: here the layout ends in 2084, half-way of Discord's.
Source: Discord's developer documentation, "Snowflakes".
"""

INSTAGRAM: Final = Layout(
    time_bits=40,
    sequence_bits=10,
    worker_bits=13,
    epoch_ms=1_314_220_021_721,
    worker_is_lowest=False,
    name="instagram",
)
"""
41 ms | 13 shard | 10 sequence, since 2011-08-24. The 41st bit of time is bit 63: here the layout ends in 2046.

Source: Instagram Engineering, "Sharding & IDs at Instagram".
"""

SONYFLAKE: Final = Layout(
    time_bits=39,
    sequence_bits=8,
    worker_bits=16,
    unit_ms=10,
    epoch_ms=1_409_529_600_000,
    name="sonyflake",
)
"""39 bits of 10 ms | 8 sequence | 16 machine, since 2014-09-01, to 2188. Source: sony/sonyflake."""

JS53: Final = Layout(time_bits=37, sequence_bits=8, worker_bits=8, unit_ms=10, name="js53")
"""37 bits of 10 ms | 8 sequence | 8 worker: below 2**53, exact as a JavaScript number, to 2068."""

LAYOUTS: Final = {layout.name: layout for layout in (DEFAULT, TWITTER, DISCORD, INSTAGRAM, SONYFLAKE, JS53)}
"""The presets by name."""
