"""Named maps from bytes to bytes, each change at a revision: the log index of the command that made it.

Every method of a Python mapping is one command here, so that each is atomic. A command is checked completely
before anything is changed. A map exists while it has a key.

A stored value is ``>QQQ`` (create revision, mod revision, version) and then the value itself.

What must not live here: what values mean (they are compared as bytes), and locks: whether a guard holds is
asked through a callable.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

from coordlib.errors import KeyExists, RevisionCompacted, invariant
from coordlib.machine.commands import OpCode
from coordlib.machine.effects import Effect, Meta
from coordlib.machine.limits import ENTRY_OVERHEAD_BYTES, Limits, exceeded
from coordlib.machine.table import Allowance, BytesTable, Reclaimer, View

__all__ = ["Maps"]

_REVISIONS = struct.Struct(">QQQ")
_PREFIX = _REVISIONS.size
_pack = _REVISIONS.pack
_unpack_from = _REVISIONS.unpack_from

PAGE_ITEMS_MAX = 4096
PAGE_BYTES_MAX = 1024 * 1024
CURSORS_MAX = 64
CURSORS_BYTES_MAX = 64 * 1024 * 1024  # of old values, remembered for all cursors together
CURSOR_IDLE_MS_MAX = 30_000

Result = tuple[Any, ...]
Changes: TypeAlias = dict[bytes, dict[bytes, bytes | None]]
"""What is to be in which map under which key; None: nothing."""


class _Map:
    __slots__ = ("revision", "table")

    def __init__(self, reclaimer: Reclaimer) -> None:
        self.table = BytesTable(reclaimer)
        self.revision = 0  # log index of the last change


class _Cursor:
    """
    A map as it was at a revision, for those who iterate over it. Soft state of one node, not replicated.
    """

    __slots__ = ("used_ms", "view")

    def __init__(self, view: View, used_ms: int) -> None:
        self.view = view
        self.used_ms = used_ms


class Maps:
    """All maps."""

    __slots__ = (
        "_allowance",
        "_check_guard",
        "_cursors",
        "_limits",
        "_reclaimer",
        "keys",
        "maps",
        "size_bytes",
    )

    def __init__(
        self, limits: Limits, reclaimer: Reclaimer, *, check_guard: Callable[[list[Any]], None]
    ) -> None:
        self._limits = limits
        self._reclaimer = reclaimer
        self._check_guard = check_guard
        self.maps: dict[bytes, _Map] = {}
        self.keys = 0
        self.size_bytes = 0  # Invariant: the sum over all tables
        self._cursors: OrderedDict[tuple[bytes, int], _Cursor] = OrderedDict()
        self._allowance = Allowance(CURSORS_BYTES_MAX)

    # --- commands -----------------------------------------------------------------------------------------

    def check_growth(self, args: list[Any], pending_bytes: int = 0) -> None:
        """
        Refuse a command that would make the state too large; never one that does not make it larger.

        Args:
            pending_bytes: What may be added by commands that were appended and are not yet applied.

        Raises:
            QuotaExceeded: Of `state_size_bytes_max` or `maps_max`.
        """
        opcode = args[0]
        if opcode == OpCode.MAP_UPDATE:
            if args[2]:
                self._check_room(args[1], self._growth(args[1], _last_of_equals(args[2])), pending_bytes)
        elif opcode == OpCode.MAP_PUT:
            self._check_room(args[1], self._growth(args[1], {args[2]: args[3]}), pending_bytes)
        elif opcode in (OpCode.MAP_INSERT, OpCode.MAP_SETDEFAULT):
            if self._record(args[1], args[2]) is None:
                self._check_room(args[1], self._growth(args[1], {args[2]: args[3]}), pending_bytes)
        elif opcode == OpCode.MAP_COMPARE_AND_SET and args[4] is not None:
            record = self._record(args[1], args[2])
            if args[3] == (None if record is None else record[_PREFIX:]):
                self._check_room(args[1], self._growth(args[1], {args[2]: args[4]}), pending_bytes)

    def put(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        _, name, key, value, guard = args
        if guard is not None:
            self._check_guard(guard)
        self._store(name, key, value, meta.index)
        return (0, meta.index)

    def insert(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        _, name, key, value, guard = args
        if guard is not None:
            self._check_guard(guard)
        present = self._record(name, key)
        if present is not None:
            revision = _unpack_from(present)[1]
            raise KeyExists(f"the key has been there since revision {revision}", revision=revision)
        self._store(name, key, value, meta.index)
        return (0, meta.index)

    def setdefault(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        _, name, key, value, guard = args
        if guard is not None:
            self._check_guard(guard)
        present = self._record(name, key)
        if present is not None:
            return (0, present[_PREFIX:], False)
        self._store(name, key, value, meta.index)
        return (0, value, True)

    def delete(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        _, name, key, guard = args
        if guard is not None:
            self._check_guard(guard)
        return (0, self._remove(name, key, meta.index) is not None)

    def pop(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        _, name, key, guard = args
        if guard is not None:
            self._check_guard(guard)
        record = self._remove(name, key, meta.index)
        return (0, None if record is None else record[_PREFIX:])

    def popitem(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        _, name, guard = args
        if guard is not None:
            self._check_guard(guard)
        found = self.maps.get(name)
        if found is None:
            return (0, None, None)
        key = found.table.first_key()
        assert key is not None  # a map exists while it has a key
        record = self._remove(name, key, meta.index)
        assert record is not None
        return (0, key, record[_PREFIX:])

    def update(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        _, name, flat, guard = args
        if guard is not None:
            self._check_guard(guard)
        if flat:
            pairs = _last_of_equals(flat)
            # All or none: the whole is checked before the first is stored.
            self._check_room(name, self._growth(name, pairs), 0)
            for key, value in pairs.items():
                self._store(name, key, value, meta.index, is_checked=True)
        return (0, meta.index)

    def clear(
        self, _meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        _, name, guard = args
        if guard is not None:
            self._check_guard(guard)
        found = self.maps.pop(name, None)
        if found is None:
            return (0, 0)
        count = len(found.table)
        self.keys -= count
        self.size_bytes -= found.table.size_bytes
        found.table.clear()
        return (0, count)

    def compare_and_set(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        _, name, key, expected, new, guard = args
        if guard is not None:
            self._check_guard(guard)
        record = self._record(name, key)
        current = None if record is None else record[_PREFIX:]
        if current != expected:
            return (0, False, current, 0 if record is None else _unpack_from(record)[1])
        if new is not None:
            self._store(name, key, new, meta.index)
        elif record is not None:
            self._remove(name, key, meta.index)
        else:
            return (0, True, None, 0)
        return (0, True, None, meta.index)

    # --- for transactions ---------------------------------------------------------------------------------

    def failed_condition(self, conditions: list[list[Any]]) -> int:
        """The place of the first condition that does not hold, -1 if all do. See `commands.Condition`."""
        for place, (kind, name, *rest) in enumerate(conditions):
            if kind == 1:
                found = self.maps.get(name)
                holds = (0 if found is None else found.revision) == rest[0]
            else:
                record = self._record(name, rest[0])
                if kind == 0:
                    holds = (0 if record is None else _unpack_from(record)[1]) == rest[1]
                else:
                    holds = (None if record is None else record[_PREFIX:]) == rest[1]
            if not holds:
                return place
        return -1

    def check_changes(self, changes: Changes, pending_bytes: int = 0) -> None:
        """
        Refuse changes that together would make the state too large; never any that do not make it larger.

        Raises:
            QuotaExceeded: Of `state_size_bytes_max` or `maps_max`.
        """
        growth = more_maps = 0
        for name, values in changes.items():
            found = self.maps.get(name)
            keys = before = 0 if found is None else len(found.table)
            for key, value in values.items():
                old = None if found is None else found.table.get(key)
                if value is not None:
                    growth += _PREFIX + len(value)
                if old is not None:
                    growth -= len(old)
                if (old is None) != (value is None):
                    sign = 1 if old is None else -1
                    keys += sign
                    growth += sign * (ENTRY_OVERHEAD_BYTES + len(key))
            more_maps += bool(keys) - bool(before)
        limits = self._limits
        if growth > 0 and self.size_bytes + growth + pending_bytes > limits.state_size_bytes_max:
            wanted = self.size_bytes + growth + pending_bytes
            raise exceeded("state_size_bytes_max", limits.state_size_bytes_max, wanted)
        if more_maps > 0 and len(self.maps) + more_maps > limits.maps_max:
            raise exceeded("maps_max", limits.maps_max, len(self.maps) + more_maps)

    def change(self, changes: Changes, index: int) -> None:
        """Carry out changes that were checked."""
        for name, values in changes.items():
            for key, value in values.items():
                if value is None:
                    self._remove(name, key, index)
                else:
                    self._store(name, key, value, index, is_checked=True)

    # --- queries ------------------------------------------------------------------------------------------

    def get(self, args: list[Any]) -> Result:
        record = self._record(args[1], args[2])
        return (0, None if record is None else record[_PREFIX:])

    def get_meta(self, args: list[Any]) -> Result:
        record = self._record(args[1], args[2])
        if record is None:
            return (0, None, 0, 0, 0)
        return (0, record[_PREFIX:], *_unpack_from(record))

    def read_with(self, args: list[Any]) -> Result:
        """A key with its revision and the map's, and whether the conditions hold, all at one moment."""
        _, name, key, conditions = args
        record = self._record(name, key)
        found = self.maps.get(name)
        return (
            0,
            self.failed_condition(conditions),
            None if record is None else record[_PREFIX:],
            0 if record is None else _unpack_from(record)[1],
            0 if found is None else found.revision,
        )

    def contains(self, args: list[Any]) -> Result:
        return (0, self._record(args[1], args[2]) is not None)

    def length(self, args: list[Any]) -> Result:
        found = self.maps.get(args[1])
        return (0, 0 if found is None else len(found.table))

    def listing(self, args: list[Any]) -> Result:
        _, after, limit = args
        limit = max(1, min(limit, PAGE_ITEMS_MAX))
        names = sorted([name for name in self.maps if after is None or name > after])
        rows = []
        for name in names[:limit]:
            found = self.maps[name]
            rows.append((name, len(found.table), found.table.size_bytes, found.revision))
        return (0, rows, len(names) > limit)

    def scan(self, args: list[Any], now_ms: int) -> Result:
        """
        One page of a map as it is, or was at the revision that the query names.

        Raises:
            RevisionCompacted: The map has changed since, and this node does not remember it as it was.
        """
        _, name, after, limit_items, limit_bytes, expected, is_keys_only = args
        found = self.maps.get(name)
        revision = 0 if found is None else found.revision
        wanted = revision if expected is None else expected
        cursor = self._cursors.get((name, wanted))
        if cursor is not None:
            if not cursor.view.is_closed:
                self._cursors.move_to_end((name, wanted))
                cursor.used_ms = now_ms
                return self._page(cursor.view, wanted, after, limit_items, limit_bytes, is_keys_only)
            del self._cursors[(name, wanted)]
        if wanted != revision:
            raise RevisionCompacted(
                f"the map has changed since revision {wanted}: begin again", revision=wanted, oldest=revision
            )
        if found is None:
            return (0, 0, False, [])
        view = found.table.view(self._allowance)
        page = self._page(view, wanted, after, limit_items, limit_bytes, is_keys_only)
        if not page[2]:
            view.close()
            return page
        while len(self._cursors) >= CURSORS_MAX:
            self._cursors.popitem(last=False)[1].view.close()
        self._cursors[(name, wanted)] = _Cursor(view, now_ms)
        return page

    def close_cursors(self, before_ms: int | None = None) -> None:
        """Give up the cursors last used before a log time, or all of them."""
        for key in [
            key for key, item in self._cursors.items() if before_ms is None or item.used_ms < before_ms
        ]:
            self._cursors.pop(key).view.close()

    @property
    def cursors(self) -> int:
        return len(self._cursors)

    # --- state --------------------------------------------------------------------------------------------

    def begin_map(self, name: bytes, revision: int) -> BytesTable:
        """Begin to take a map from a snapshot; its records are `load`ed into the table returned."""
        found = self.maps[name] = _Map(self._reclaimer)
        found.revision = revision
        return found.table

    def load(self, table: BytesTable, key: bytes, record: bytes) -> None:
        """Take a record of a snapshot."""
        _unpack_from(record)
        before = table.size_bytes
        table.put(key, record)
        self.size_bytes += table.size_bytes - before
        self.keys += 1

    def retire(self) -> None:
        """Let go of everything; what is large is freed by the reclaimer."""
        self.close_cursors()
        for found in self.maps.values():
            found.table.clear()
        self.maps = {}

    def check_invariants(self) -> None:
        """For tests: the sums are right and no map is empty."""
        tables = [found.table for found in self.maps.values()]
        invariant(self.keys == sum(map(len, tables)), "number of keys")
        invariant(self.size_bytes == sum(table.size_bytes for table in tables), "size of the maps")
        invariant(all(len(table) for table in tables), "an empty map")

    def _record(self, name: bytes, key: bytes) -> bytes | None:
        found = self.maps.get(name)
        return None if found is None else found.table.get(key)

    def _growth(self, name: bytes, pairs: dict[bytes, bytes]) -> int:
        found = self.maps.get(name)
        growth = 0
        for key, value in pairs.items():
            old = None if found is None else found.table.get(key)
            if old is None:
                growth += ENTRY_OVERHEAD_BYTES + len(key) + _PREFIX + len(value)
            else:
                growth += _PREFIX + len(value) - len(old)
        return growth

    def _check_room(self, name: bytes, growth: int, pending_bytes: int) -> None:
        limits = self._limits
        if growth > 0 and self.size_bytes + growth + pending_bytes > limits.state_size_bytes_max:
            wanted = self.size_bytes + growth + pending_bytes
            raise exceeded("state_size_bytes_max", limits.state_size_bytes_max, wanted)
        if len(self.maps) >= limits.maps_max and name not in self.maps:
            raise exceeded("maps_max", limits.maps_max, len(self.maps) + 1)

    def _store(self, name: bytes, key: bytes, value: bytes, index: int, is_checked: bool = False) -> None:
        found = self.maps.get(name)
        old = None if found is None else found.table.get(key)
        if old is None:
            growth = ENTRY_OVERHEAD_BYTES + len(key) + _PREFIX + len(value)
            created, version = index, 1
        else:
            growth = _PREFIX + len(value) - len(old)
            created, _, version = _unpack_from(old)
            version += 1
        if not is_checked and (found is None or growth > 0):
            self._check_room(name, growth, 0)
        if found is None:
            found = self.maps[name] = _Map(self._reclaimer)
        found.table.put(key, _pack(created, index, version) + value)
        found.revision = index
        self.size_bytes += growth
        if old is None:
            self.keys += 1

    def _remove(self, name: bytes, key: bytes, index: int) -> bytes | None:
        found = self.maps.get(name)
        record = None if found is None else found.table.delete(key)
        if found is not None and record is not None:
            found.revision = index
            self.size_bytes -= ENTRY_OVERHEAD_BYTES + len(key) + len(record)
            self.keys -= 1
            if not len(found.table):
                del self.maps[name]
        return record

    @staticmethod
    def _page(
        view: View, revision: int, after: bytes | None, limit_items: int, limit_bytes: int, is_keys_only: bool
    ) -> Result:
        limit_items = max(1, min(limit_items, PAGE_ITEMS_MAX))
        limit_bytes = min(limit_bytes, PAGE_BYTES_MAX)
        keys = view.keys_after(after, limit_items + 1)
        items: list[bytes] = []
        size = 0
        for count, key in enumerate(keys):
            if count == limit_items:
                return (0, revision, True, items)
            record = None if is_keys_only else view.get(key)
            size += len(key) + (0 if record is None else len(record) - _PREFIX)
            if size > limit_bytes and items:
                return (0, revision, True, items)
            items.append(key)
            if record is not None:
                items.append(record[_PREFIX:])
        return (0, revision, False, items)


def _last_of_equals(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
