"""How much applications ask for, and what: drawn once a seed, written down as JSON with the rest of its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from coordlib.testing.simulation.choices import Stream

__all__ = ["Load", "draw_load"]


@dataclass(frozen=True, kw_only=True)
class Load:
    """
    What all applications of one run do together. `Load(**json.loads(json.dumps(asdict(load)))) == load`.

    Args:
        operations_per_second: Operations of the API begun in a simulated second, over all processes that live;
            fewer only if `outstanding_max` holds them back. Whoever waits is not waited for.
        outstanding_max: Operations under way and locks held in one process at most; no more are begun.
        weights: How often each service is chosen, by its name; one that is not named is not used.
        keys: Registers in use at once; with the share `hot_share` of operations on the first of them.
        key_life_ms: After which a fresh name takes the place of a register, lock or group that was well used, so that
            histories stay short.
        counters, locks, groups: How many of each there are.
        group_keys: Keys of a group that are always written together.
        padding_size_bytes: Added to the values of groups. Large enough, a scan needs several pages.
        hold_ms_max: How long a lock is held, mostly.
        share_long_holds: Of times between two uses of a grant that last for several session TTLs, as if it were forgotten.
        share_short_timeouts: Of operations on maps that are given up after 20 to 400 ms.
        share_cancelled: Of operations whose task is cancelled while they are under way.
    """

    operations_per_second: int
    outstanding_max: int
    weights: dict[str, float]
    keys: int
    hot_share: float
    key_life_ms: int
    counters: int
    locks: int
    groups: int
    group_keys: int
    padding_size_bytes: int
    hold_ms_max: int
    share_long_holds: float
    share_short_timeouts: float
    share_cancelled: float


PADDED_SIZE_BYTES: Final = 45_000  # eight of them are more than the 256 KiB of a page


def draw_load(
    stream: Stream,
    services: Sequence[tuple[str, float]],
    *,
    operations_per_second: int | None = None,
) -> Load:
    """
    Draw how applications behave in one run.

    Args:
        services: Name and usual weight of each. The first is always in use, others are left out now and then.
        operations_per_second: Instead of one drawn from 5 to 50.
    """
    drawn_rate = stream.choice((5, 6, 8, 12, 20, 30, 50))
    weights = {}
    for place, (name, weight) in enumerate(services):
        factor = stream.choice((0.0, 0.5, 1.0, 1.0, 1.0, 2.0, 4.0))
        weights[name] = weight * (factor or (0.0 if place else 1.0))
    is_padded = stream.random() < 0.06
    if is_padded and "groups" in weights:
        weights["groups"] /= 10
    return Load(
        operations_per_second=operations_per_second or drawn_rate,
        outstanding_max=stream.choice((4, 8, 16)),
        weights=weights,
        keys=stream.choice((1, 2, 4, 12)),
        hot_share=stream.choice((0.0, 0.3, 0.8)),
        key_life_ms=stream.choice((1500, 4000, 10_000)),
        counters=stream.choice((1, 1, 3)),
        locks=stream.choice((1, 2, 4)),
        groups=stream.choice((1, 2)),
        group_keys=8 if is_padded else stream.choice((2, 4, 8)),
        padding_size_bytes=PADDED_SIZE_BYTES if is_padded else 0,
        hold_ms_max=stream.choice((50, 600, 2500)),
        share_long_holds=stream.choice((0.0, 0.1, 0.3)),
        share_short_timeouts=stream.choice((0.0, 0.1, 0.4)),
        share_cancelled=stream.choice((0.0, 0.02, 0.1)),
    )
