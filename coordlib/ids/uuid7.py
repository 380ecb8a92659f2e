"""UUIDs of version 7, for where 128 bits and chance are wanted instead of a worker.

::

    0                   48   52           64 66                                             128
    | unix time, ms     | 7  | counter hi | 2 | counter lo (30 bits) | random (32 bits)      |

The counter has 42 bits: 12 of RFC 9562's `rand_a` and 30 of `rand_b`. At each new millisecond it begins at random
with its top bit zero, so that 2**41 more fit in; then it counts. Past its end it carries into the time.

Source: RFC 9562, 5.7 and 6.2, method 1 ("fixed bit-length dedicated counter"), with its advice on seeding and
rollover; the division of bits is that of CPython 3.14's `uuid.uuid7()`.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from coordlib.errors import IdOverflow, UsageError

__all__ = ["uuid7", "uuid7_time"]

_COUNTER_BITS: Final = 42
_TIME_BITS: Final = 48
_UNIX: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Source:
    """
    One source of rising UUIDs. Any thread may call it.

    Args:
        clock_ns: Nanoseconds since 1970. When it stands still or steps back, the counter goes on.
        random: So many random bytes, fit for secrets and safe over forks.
    """

    def __init__(
        self, clock_ns: Callable[[], int] = time.time_ns, random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._clock_ns = clock_ns
        self._random = random
        # Reentrant so that being re-entered can be told from being waited for.
        self._lock = threading.RLock()
        self._inside = False
        self._reseed = False
        # Time and counter of the last UUID, as one number: adding 1 carries.
        self._last = -1
        _sources.add(self)

    def _seeded(self, time_ms: int) -> int:
        # The top bit is zero: room to count.
        seed = int.from_bytes(self._random(6), "big") >> 48 - (_COUNTER_BITS - 1)
        return time_ms << _COUNTER_BITS | seed

    def __call__(self) -> uuid.UUID:
        with self._lock:
            if self._inside:
                raise UsageError(
                    "a signal handler or a finaliser wanted a UUID while the one it interrupted was being made: "
                    "make it elsewhere"
                )
            self._inside = True
            try:
                # Taken before it is looked at: a fork in between asks again.
                reseed, self._reseed = self._reseed, False
                now_ms = max(0, self._clock_ns() // 1_000_000)
                last_ms = self._last >> _COUNTER_BITS  # -1 before the first
                if now_ms > last_ms:
                    number = self._seeded(now_ms)
                elif reseed:
                    number = self._seeded(last_ms + 1)
                else:
                    number = self._last + 1
                if number >> _COUNTER_BITS + _TIME_BITS:
                    raise IdOverflow("the clock is past the year 10889, where UUIDs of version 7 end: set it")
                self._last = number
            finally:
                self._inside = False
        tail = int.from_bytes(self._random(4), "big")
        # 48 bits of time, version, 12 bits of counter, variant, 30 bits of counter, 32 random.
        high, low = number >> 30, number & 0x3FFF_FFFF
        return uuid.UUID(int=(high >> 12) << 80 | 7 << 76 | (high & 0xFFF) << 64 | 2 << 62 | low << 32 | tail)

    def after_fork_in_child(self) -> None:
        """Go on with another counter than the parent, above all that this process has inherited."""
        self._lock = threading.RLock()
        self._inside = False
        self._reseed = True


# Process-wide on purpose: a fork copies the process, whoever holds the sources.
_sources: weakref.WeakSet[Source] = weakref.WeakSet()
_source = Source()


def uuid7() -> uuid.UUID:
    """
    A new UUID of version 7 (RFC 9562): its first 48 bits are the milliseconds since 1970.

    Rises strictly in this process, over threads and a clock that stands still or steps back. Unique among processes
    by chance: at least 73 random bits at each new millisecond, 32 within one. A forked child begins anew.

    Raises:
        UsageError: Called by a signal handler or a finaliser that interrupted this very function.
    """
    return _source()


def uuid7_time(value: uuid.UUID) -> datetime:
    """
    When it was made (UTC, whole milliseconds), by the clock of whoever made it.

    Raises:
        UsageError: It is no UUID of version 7, or its time is past the year 9999.
    """
    if not isinstance(value, uuid.UUID) or value.variant != uuid.RFC_4122 or value.version != 7:
        raise UsageError(f"a UUID of version 7 is needed; got {value!r}")
    try:
        return _UNIX + timedelta(milliseconds=value.int >> 80)
    except OverflowError as exc:
        raise UsageError(
            f"{value} says {value.int >> 80} ms since 1970, which is past the year 9999"
        ) from exc


def _after_fork_in_child() -> None:
    for source in list(_sources):
        source.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
