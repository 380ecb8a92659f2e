"""log_time: the cluster's own time, carried by every entry. Pure.

The leader advances it by its monotonic clock from the last logged value, and slews it by at most 10 %
toward the median of the voters' wall clocks. It never goes back, whatever the clocks do. Nothing that
must be safe rests on its being right: it dates things.

Source: the slewing follows the usual discipline of NTP clients (RFC 5905 §11.3), much simplified.
"""

from __future__ import annotations

from typing import Final

__all__ = ["LogClock"]

SLEW_DIVISOR: Final = 10
GAP_MS_MAX: Final = 60_000
UNSET_MS_MAX: Final = 946_684_800_000
"""2000-01-01: a log that is dated before was begun when no quorum's clocks were known yet."""


class LogClock:
    """The leader's pen for log_time; made anew whenever a node becomes leader."""

    __slots__ = ("_last_ms", "_mono_ms", "_offsets", "_quorum")

    def __init__(self, last_logged_ms: int, now_ms: int, quorum: int) -> None:
        self._last_ms = last_logged_ms
        self._mono_ms = now_ms
        self._quorum = quorum
        self._offsets: dict[str, int] = {}  # voter -> its wall clock minus our monotonic one

    def follow(self, logged_ms: int) -> None:
        """
        A time that is in the log, by an earlier leader: what is read from now on is not before it.

        A leader that was elected before it had applied all of the log began with an earlier time; it would log that for
        as long as the earlier leaders had ruled, and time would stand still.
        """
        if logged_ms > self._last_ms:
            self._last_ms = logged_ms

    @property
    def is_set(self) -> bool:
        """Whether what is read is a date. Before a quorum's clocks are known, the first leader of all can give none."""
        return self._last_ms >= UNSET_MS_MAX or len(self._offsets) >= self._quorum

    def observe(self, voter: str, wall_ms: int, now_ms: int) -> None:
        """A voter's wall clock, as of about now."""
        self._offsets[voter] = wall_ms - now_ms

    def read(self, now_ms: int) -> int:
        """The time to log now: not before any that was logged, nor before any that was read."""
        elapsed = max(0, now_ms - self._mono_ms)
        self._mono_ms = max(self._mono_ms, now_ms)
        value = self._last_ms + elapsed
        target = self._median(now_ms)
        if target is not None:
            gap = target - value
            is_unset = self._last_ms < UNSET_MS_MAX
            if gap > GAP_MS_MAX or (is_unset and gap > 0):
                # A jump forward, as after a long stop of the whole cluster, needs a quorum that agrees on it. The first
                # time of all needs a quorum, but no agreement: a cluster whose clocks differ would stay in 1970.
                if len(self._offsets) >= self._quorum and (
                    is_unset or self._agreeing(target, now_ms) >= self._quorum
                ):
                    value = target
            elif gap:
                slew = elapsed // SLEW_DIVISOR
                value += max(-slew, min(slew, gap))
        self._last_ms = max(self._last_ms, value)
        return self._last_ms

    def _median(self, now_ms: int) -> int | None:
        if not self._offsets:
            return None
        ordered = sorted(self._offsets.values())
        return ordered[(len(ordered) - 1) // 2] + now_ms

    def _agreeing(self, target: int, now_ms: int) -> int:
        return sum(1 for offset in self._offsets.values() if abs(offset + now_ms - target) <= GAP_MS_MAX)
