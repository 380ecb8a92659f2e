"""How bad the surroundings are: frozen settings of plain values, the same for a whole run. The defaults are mild.

Delays are given as shares: most are exponential around a mean and end at a maximum, a few are far slower. They
are drawn through a table of their quantiles, so that a frame or a write costs one draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from coordlib.testing.simulation.choices import Stream

__all__ = ["ClockProfile", "DiskProfile", "NetworkProfile", "quantiles"]

QUANTILES: Final = 1024


def quantiles(low: int, mean: float, high: int, slow_chance: float, slow: int) -> list[int]:
    """A delay for each of `QUANTILES` equal shares of chance, in whole milliseconds, growing."""
    slow_count = round(slow_chance * QUANTILES)
    usual_count = QUANTILES - slow_count
    table = []
    for place in range(usual_count):
        delay = low - (mean - low) * math.log(1 - (place + 0.5) / usual_count) if mean > low else low
        table.append(min(round(delay), high))
    for place in range(slow_count):
        table.append(high + round((slow - high) * (place + 1) / slow_count))
    return table


@dataclass(frozen=True)
class NetworkProfile:
    """
    What happens to frames that no fault was aimed at. Chances are those of one frame.

    Frames of one connection stay in order; those of two do not, nor those of a connection and the one after it.
    """

    delay_ms_min: int = 0
    delay_ms_mean: float = 1.5
    delay_ms_max: int = 6
    slow_chance: float = 0.01
    slow_ms_max: int = 60
    late_chance: float = 0.3  # that a frame under way arrives although its connection is gone
    duplicate_chance: float = 0.0  # a second copy, a little later
    replay_chance: float = 0.0  # a frame of the past between the same two, whatever has become of its session
    corrupt_chance: float = 0.0  # flipped bits, a cut, noise, a frame of another cluster
    queue_frames_max: int = 1000  # on the way in one direction of a connection; then sending fails
    bulk_queue_frames_max: int = 64

    @classmethod
    def draw(cls, chance: Stream) -> NetworkProfile:
        """Every misbehaviour is absent from about half of the seeds."""
        low = chance.choice((0, 0, 0, 1, 5))
        mean = low + chance.choice((0.7, 1.5, 1.5, 4.0, 12.0))

        def rare(most: float) -> float:
            return round(chance.random() * most, 5) if chance.random() < 0.5 else 0.0

        return cls(
            delay_ms_min=low,
            delay_ms_mean=mean,
            delay_ms_max=low + round(4 * (mean - low)),
            slow_chance=chance.choice((0.0, 0.003, 0.01, 0.03)),
            slow_ms_max=chance.choice((30, 60, 200, 600)),
            late_chance=chance.choice((0.0, 0.3, 0.9)),
            duplicate_chance=rare(0.05),
            replay_chance=rare(0.02),
            corrupt_chance=rare(0.01),
            queue_frames_max=chance.choice((1000, 1000, 100, 20)),
            bulk_queue_frames_max=chance.choice((64, 64, 4)),
        )


@dataclass(frozen=True)
class DiskProfile:
    """How long a durable write takes."""

    write_ms_min: int = 0
    write_ms_mean: float = 1.0
    write_ms_max: int = 4
    slow_chance: float = 0.005
    slow_ms_max: int = 200

    @classmethod
    def draw(cls, chance: Stream) -> DiskProfile:
        mean = chance.choice((0.0, 1.0, 1.0, 3.0, 10.0))
        return cls(
            write_ms_mean=mean,
            write_ms_max=round(4 * mean),
            slow_chance=chance.choice((0.0, 0.002, 0.005, 0.02)),
            slow_ms_max=chance.choice((20, 200, 1000)),
        )


@dataclass(frozen=True)
class ClockProfile:
    """
    Every process has a monotonic clock with a rate of its own, and a wall clock that is off.

    While no two rates differ by the drift bound of `Timing` or more (`is_bounded`), leases must keep their
    promises; beyond it only fencing tokens must.
    """

    rate_error_permille_max: int = 4
    wall_offset_ms_max: int = 3000

    def is_bounded(self, drift_percent: int) -> bool:
        fast, slow = 1000 + self.rate_error_permille_max, 1000 - self.rate_error_permille_max
        return fast * 100 <= slow * (100 + drift_percent)

    @classmethod
    def draw(cls, chance: Stream) -> ClockProfile:
        """Within a drift bound of one percent."""
        return cls(
            rate_error_permille_max=chance.choice((0, 1, 4, 4)),
            wall_offset_ms_max=chance.choice((0, 3000, 3_600_000)),
        )

    @classmethod
    def unbounded(cls) -> ClockProfile:
        """Clocks that drift apart by far more than is promised."""
        return cls(rate_error_permille_max=150)
