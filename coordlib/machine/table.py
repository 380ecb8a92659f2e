"""A map from bytes to values that can be read as it was while it goes on changing, and never stalls.

Keys are spread over a fixed number of small dicts by CRC-32. So no dict is ever large enough for its
resizing, sorting or freeing to be noticed, there is no object for the garbage collector to visit for each key
(a dict of bytes to bytes is not tracked), and everything that takes long over the whole is done
bucket by bucket.

Order is by bucket, then by key: the same on every member. The order *within* a dict is not, because it
depends on history, which a member restored from a snapshot does not share; nothing here lets it out.

What must not live here: any knowledge of what keys and values mean.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar
from zlib import crc32

from coordlib.machine.limits import ENTRY_OVERHEAD_BYTES

__all__ = ["BUCKETS", "Allowance", "BytesTable", "Reclaimer", "Table", "View", "ViewLost"]

V = TypeVar("V")

BUCKETS = 256  # at a million keys: 4,000 a bucket, sorted in about 1 ms
_MASK = BUCKETS - 1

# Stands for every bucket that was never written to: a map of three keys should not cost 256 dicts. Never
# written.
_EMPTY: dict[bytes, Any] = {}

_BACKLOG_BUCKETS_MAX = 16 * BUCKETS


class ViewLost(Exception):
    """The view had to be given up because too much has changed since it was opened."""


class Reclaimer:
    """
    Frees what tables and views let go of, a few buckets at a time.

    Whoever drives the machine calls `free` in quiet moments. When it does not and the backlog grows beyond 16
    cleared tables, adding to it frees the surplus at once: late rather than never.
    """

    __slots__ = ("_buckets",)

    def __init__(self) -> None:
        self._buckets: list[dict[bytes, Any]] = []

    def add(self, buckets: Iterable[dict[bytes, Any]]) -> None:
        """Take over buckets that nobody changes any more; O(buckets), whatever they hold."""
        self._buckets.extend([bucket for bucket in buckets if bucket])
        if len(self._buckets) > _BACKLOG_BUCKETS_MAX:
            del self._buckets[: len(self._buckets) - _BACKLOG_BUCKETS_MAX]

    def free(self, count: int) -> bool:
        """Free at most `count` buckets, at least one. True if more are left."""
        del self._buckets[-max(1, count) :]
        return bool(self._buckets)

    def __len__(self) -> int:
        return len(self._buckets)


class Allowance:
    """Bytes that several views may spend together on remembering old values."""

    __slots__ = ("remaining_bytes",)

    def __init__(self, size_bytes: int) -> None:
        self.remaining_bytes = size_bytes


class Table(Generic[V]):
    """
    An ordered map whose values may be changed in place by those who call `touch` first.

    Args:
        reclaimer: Takes what is cleared.
        freeze: Turns a value into the bytes that views show of it. It is called before the value changes, at
            most once for each view.
    """

    __slots__ = ("_buckets", "_count", "_freeze", "_reclaimer", "views")

    def __init__(self, reclaimer: Reclaimer, freeze: Callable[[V], bytes]) -> None:
        self._buckets: list[dict[bytes, V]] = [_EMPTY] * BUCKETS
        self._count = 0
        self._reclaimer = reclaimer
        self._freeze: Callable[[V], bytes] | None = freeze
        self.views: tuple[View, ...] = ()

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: bytes) -> bool:
        return key in self._buckets[crc32(key) & _MASK]

    def get(self, key: bytes) -> V | None:
        return self._buckets[crc32(key) & _MASK].get(key)

    def put(self, key: bytes, value: V) -> None:
        """Set `key`; the value it had stays visible to open views."""
        number = crc32(key) & _MASK
        bucket = self._buckets[number]
        if self.views:
            self._remember(number, key)
        if bucket is _EMPTY:
            bucket = self._buckets[number] = {}
        if key not in bucket:
            self._count += 1
        bucket[key] = value

    def delete(self, key: bytes) -> V | None:
        """Remove `key` and return what it had; None if it was not there."""
        number = crc32(key) & _MASK
        bucket = self._buckets[number]
        if key not in bucket:
            return None
        if self.views:
            self._remember(number, key)
        self._count -= 1
        return bucket.pop(key)

    def touch(self, key: bytes) -> None:
        """Announce that the value of `key` is about to be changed in place."""
        if self.views:
            self._remember(crc32(key) & _MASK, key)

    def first_key(self) -> bytes | None:
        """The first key in order, None if empty. Reads one bucket."""
        for bucket in self._buckets:
            if bucket:
                return min(bucket)
        return None

    def clear(self) -> None:
        """
        Empty the table in a time that does not depend on what it holds. Open views keep seeing all of it.
        """
        # A view goes on with the list of buckets that it was opened on, which is never changed from now on.
        self._reclaimer.add(self._buckets)
        self._buckets = [_EMPTY] * BUCKETS
        self._count = 0
        self.views = ()

    def view(self, allowance: Allowance | None = None) -> View:
        """
        Open a view of the table as it is now; O(1). To be closed.

        It remembers the old value of each key that changes while it is open, at most once for each key: at
        most as much as the table held. With an allowance, a view that would exceed it is lost instead.
        """
        view = View(self, self._buckets, self._freeze, self._reclaimer, allowance)
        self.views = (*self.views, view)
        return view

    def _remember(self, number: int, key: bytes) -> None:
        value = self._buckets[number].get(key)
        for view in self.views:
            if number >= view._position:
                view._remember(number, key, value)


class BytesTable(Table[bytes]):
    """A table of bytes, which knows its size: keys, values, and `ENTRY_OVERHEAD_BYTES` for each key."""

    __slots__ = ("size_bytes",)

    def __init__(self, reclaimer: Reclaimer) -> None:
        super().__init__(reclaimer, bytes)
        self._freeze = None
        self.size_bytes = 0

    def put(self, key: bytes, value: bytes) -> None:
        number = crc32(key) & _MASK
        bucket = self._buckets[number]
        if self.views:
            self._remember(number, key)
        if bucket is _EMPTY:
            bucket = self._buckets[number] = {}
        old = bucket.get(key)
        if old is None:
            self._count += 1
            self.size_bytes += len(key) + len(value) + ENTRY_OVERHEAD_BYTES
        else:
            self.size_bytes += len(value) - len(old)
        bucket[key] = value

    def delete(self, key: bytes) -> bytes | None:
        old = super().delete(key)
        if old is not None:
            self.size_bytes -= len(key) + len(old) + ENTRY_OVERHEAD_BYTES
        return old

    def clear(self) -> None:
        super().clear()
        self.size_bytes = 0


class View:
    """
    A table as it was when the view was opened. Read it either with `drain`, once, or with `keys_after` and
    `get`.

    Made by `Table.view`.
    """

    __slots__ = (
        "_allowance",
        "_buckets",
        "_freeze",
        "_is_closed",
        "_old",
        "_position",
        "_reclaimer",
        "_sorted",
        "_sorted_number",
        "_spent_bytes",
        "_table",
    )

    def __init__(
        self,
        table: Table[Any],
        buckets: list[dict[bytes, Any]],
        freeze: Callable[[Any], bytes] | None,
        reclaimer: Reclaimer,
        allowance: Allowance | None,
    ) -> None:
        self._table = table
        self._buckets = buckets
        self._freeze = freeze
        self._reclaimer = reclaimer
        self._allowance = allowance
        self._old: dict[int, dict[bytes, bytes | None]] = {}  # by bucket; None: the key was not there
        self._position = 0  # buckets below it have been drained: their changes need not be remembered
        self._spent_bytes = 0
        self._sorted: list[bytes] = []
        self._sorted_number = -1
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Closed, or lost because the allowance was spent."""
        return self._is_closed

    def _remember(self, number: int, key: bytes, value: Any) -> None:
        old = self._old.get(number)
        if old is None:
            old = self._old[number] = {}
        elif key in old:
            return
        if value is not None and self._freeze is not None:
            value = self._freeze(value)
        old[key] = value
        if self._allowance is not None:
            cost = len(key) + (0 if value is None else len(value)) + ENTRY_OVERHEAD_BYTES
            self._spent_bytes += cost
            self._allowance.remaining_bytes -= cost
            if self._allowance.remaining_bytes < 0:
                self.close()

    def _keys(self, number: int) -> list[bytes]:
        if number == self._sorted_number:
            return self._sorted
        bucket = self._buckets[number]
        old = self._old.get(number)
        if old:
            keys = sorted([key for key in {**bucket, **old} if key not in old or old[key] is not None])
        else:
            keys = sorted(bucket)
        # Kept for the next page: what a view shows of a bucket never changes.
        self._sorted_number, self._sorted = number, keys
        return keys

    def keys_after(self, after: bytes | None, limit: int) -> list[bytes]:
        """
        At most `limit` keys that follow `after` in order; all from the start if it is None.

        Raises:
            ViewLost: The view is closed.
        """
        if self._is_closed:
            raise ViewLost
        result: list[bytes] = []
        start = 0 if after is None else crc32(after) & _MASK
        for number in range(start, BUCKETS):
            if not self._buckets[number] and number not in self._old:
                continue
            keys = self._keys(number)
            first = 0 if after is None or number != start else bisect_right(keys, after)
            result += keys[first : first + limit - len(result)]
            if len(result) >= limit:
                break
        return result

    def get(self, key: bytes) -> bytes | None:
        """
        The value `key` had, None if it was not there.

        Raises:
            ViewLost: The view is closed.
        """
        if self._is_closed:
            raise ViewLost
        number = crc32(key) & _MASK
        old = self._old.get(number)
        if old is not None and key in old:
            return old[key]
        value = self._buckets[number].get(key)
        if value is None or self._freeze is None:
            return value
        return self._freeze(value)

    def drain(self) -> Iterator[tuple[bytes, bytes]]:
        """
        Yield all keys and values in order, letting go of old values on the way. May be resumed much later.
        """
        freeze = self._freeze
        if self._is_closed:
            raise ViewLost
        # Nobody else runs but between two yields of pairs: until then `_position` may lag, and nothing is closed.
        for number, bucket in enumerate(self._buckets):
            if not bucket and number not in self._old:
                continue
            keys = self._keys(number)
            old = self._old.pop(number, None)
            # The whole bucket is taken now, so that later changes to it need not be remembered.
            pairs: list[tuple[bytes, bytes]]
            if not old:
                if freeze is None:
                    pairs = [(key, bucket[key]) for key in keys]
                else:
                    pairs = [(key, freeze(bucket[key])) for key in keys]
            else:
                pairs = []
                for key in keys:
                    value = old.get(key)
                    if value is None:
                        current = bucket[key]
                        value = current if freeze is None else freeze(current)
                    pairs.append((key, value))
            self._position = number + 1
            yield from pairs
            if self._is_closed:
                raise ViewLost
        self._position = BUCKETS

    def close(self) -> None:
        """Let go of everything; idempotent. What it remembered is freed by the reclaimer."""
        if self._is_closed:
            return
        self._is_closed = True
        table = self._table
        if self in table.views:
            table.views = tuple([view for view in table.views if view is not self])
        if table._buckets is not self._buckets:
            # The table was cleared under us: perhaps nobody else holds these buckets any more.
            self._reclaimer.add(self._buckets)
        self._reclaimer.add(self._old.values())
        self._buckets = [_EMPTY] * BUCKETS
        self._old = {}
        self._sorted, self._sorted_number = [], -1
        if self._allowance is not None:
            self._allowance.remaining_bytes += self._spent_bytes
            self._spent_bytes = 0
