"""Replicated maps, linearizable: a MutableMapping for threads, the same in awaits for tasks.

Every method that changes something is one command, executed exactly once however often it had to be sent;
every method that reads asks the leader, who confirms that it still is one, and makes no log entry.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from coordlib.api.codec import CANONICAL, Codec, decode_key, encode_key, encode_name
from coordlib.api.guards import Guard, guard_of
from coordlib.api.overlay import Overlay, overlay_of, pages_gen
from coordlib.errors import KeyExists, KeyMissing, UsageError
from coordlib.machine import commands
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import OpGen, Step
from coordlib.types import Revision
from coordlib.wire.messages import RequestKind

if TYPE_CHECKING:
    from coordlib.api.cluster import AsyncCluster, Cluster

__all__ = ["AsyncMap", "Map", "VersionedValue"]

T = TypeVar("T")
_MISSING: Final[Any] = object()


class VersionedValue(NamedTuple):
    """A value with the revisions that belong to it."""

    value: Any
    create_revision: Revision
    mod_revision: Revision
    version: int


class _MapBase:
    """The operations, once, for both faces."""

    def __init__(self, name: str, codec: Codec | None, request_timeout_ms: int) -> None:
        self.name = name
        self._name = encode_name(name, "map")
        self._codec = codec or CANONICAL
        self._timeout_ms = request_timeout_ms
        self._handle: object = None  # the cluster that a transaction must be of, to be this map's

    def _encode(self, value: Any) -> bytes:
        data = self._codec.encode(value)
        if type(data) is not bytes:
            raise UsageError(f"the map's codec must encode to bytes, not {type(data).__name__}")
        return data

    def _execute(self, body: bytes) -> OpGen[list[Any]]:
        reply = yield Step(RequestKind.COMMAND, body, monotonic_ms() + self._timeout_ms)
        return commands.decode_reply(reply)

    def _query(self, body: bytes, *, is_stale: bool = False) -> OpGen[list[Any]]:
        kind = RequestKind.STALE_QUERY if is_stale else RequestKind.QUERY
        reply = yield Step(kind, body, monotonic_ms() + self._timeout_ms)
        return commands.decode_reply(reply)

    def _overlay(self) -> Overlay | None:
        """Of the transaction that the caller is in: everything is read through it and written to it then."""
        return overlay_of(self._handle)

    def _own_gen(self, overlay: Overlay, key: bytes) -> OpGen[bytes | None]:
        return (yield from overlay.get_gen(self._name, key, monotonic_ms() + self._timeout_ms))

    def _missing(self, key: Any) -> KeyMissing:
        return KeyMissing(f"key {key!r} is not in map {self.name!r}", key=key)

    def _get_gen(self, key: Any, default: Any, *, is_stale: bool = False) -> OpGen[Any]:
        overlay = None if is_stale else self._overlay()
        if overlay is not None:
            found = yield from self._own_gen(overlay, encode_key(key))
        else:
            (found,) = yield from self._query(
                commands.query_get(self._name, encode_key(key)), is_stale=is_stale
            )
        if found is None:
            if default is _MISSING:
                raise self._missing(key)
            return default
        return self._codec.decode(found)

    def _get_versioned_gen(self, key: Any) -> OpGen[VersionedValue | None]:
        if self._overlay() is not None:
            raise UsageError("in a transaction a value has no version yet: use get(), or read it before")
        found, create, mod, version = yield from self._query(
            commands.query_get_meta(self._name, encode_key(key))
        )
        if found is None:
            return None
        return VersionedValue(self._codec.decode(found), Revision(create), Revision(mod), version)

    def _contains_gen(self, key: Any) -> OpGen[bool]:
        overlay = self._overlay()
        if overlay is not None:
            return (yield from self._own_gen(overlay, encode_key(key))) is not None
        (found,) = yield from self._query(commands.query_contains(self._name, encode_key(key)))
        return bool(found)

    def _len_gen(self) -> OpGen[int]:
        overlay = self._overlay()
        if overlay is not None:
            return len((yield from overlay.scan_gen(self._name, monotonic_ms() + self._timeout_ms)))
        (count,) = yield from self._query(commands.query_len(self._name))
        return int(count)

    def _scan_gen(self, *, keys_only: bool = False) -> OpGen[list[Any]]:
        """All keys, or all (key, value) pairs, at one revision."""
        overlay = self._overlay()
        if overlay is not None:
            items = yield from overlay.scan_gen(self._name, monotonic_ms() + self._timeout_ms)
            if keys_only:
                return [decode_key(key) for key in items]
            return [(decode_key(key), self._codec.decode(value)) for key, value in items.items()]
        _, flat = yield from pages_gen(
            self._name, keys_only=keys_only, deadline_ms=monotonic_ms() + self._timeout_ms
        )
        if keys_only:
            return list(map(decode_key, flat))
        decode = self._codec.decode
        return [(decode_key(key), decode(value)) for key, value in zip(flat[::2], flat[1::2], strict=True)]

    def _put_gen(self, key: Any, value: Any, guard: Guard | None) -> OpGen[Revision]:
        overlay = self._overlay()
        if overlay is not None:
            overlay.put(self._name, encode_key(key), self._encode(value), guard_of(guard))
            return Revision(0)
        body = commands.map_put(self._name, encode_key(key), self._encode(value), guard_of(guard))
        (revision,) = yield from self._execute(body)
        return Revision(revision)

    def _insert_gen(self, key: Any, value: Any, guard: Guard | None) -> OpGen[Revision]:
        overlay = self._overlay()
        if overlay is not None:
            if (yield from self._own_gen(overlay, encode_key(key))) is not None:
                raise KeyExists(f"key {key!r} is in map {self.name!r}", key=key)
            overlay.put(self._name, encode_key(key), self._encode(value), guard_of(guard))
            return Revision(0)
        body = commands.map_insert(self._name, encode_key(key), self._encode(value), guard_of(guard))
        (revision,) = yield from self._execute(body)
        return Revision(revision)

    def _delete_gen(self, key: Any, guard: Guard | None) -> OpGen[bool]:
        overlay = self._overlay()
        if overlay is not None:
            return (yield from self._take_gen(overlay, encode_key(key), guard)) is not None
        (was_there,) = yield from self._execute(
            commands.map_delete(self._name, encode_key(key), guard_of(guard))
        )
        return bool(was_there)

    def _delitem_gen(self, key: Any) -> OpGen[None]:
        was_there = yield from self._delete_gen(key, None)
        if not was_there:
            raise self._missing(key)

    def _take_gen(self, overlay: Overlay, key: bytes, guard: Guard | None) -> OpGen[bytes | None]:
        found = yield from self._own_gen(overlay, key)
        if found is not None:
            overlay.put(self._name, key, None, guard_of(guard))
        return found

    def _pop_gen(self, key: Any, default: Any, guard: Guard | None) -> OpGen[Any]:
        overlay = self._overlay()
        if overlay is not None:
            found = yield from self._take_gen(overlay, encode_key(key), guard)
        else:
            (found,) = yield from self._execute(
                commands.map_pop(self._name, encode_key(key), guard_of(guard))
            )
        if found is None:
            if default is _MISSING:
                raise self._missing(key)
            return default
        return self._codec.decode(found)

    def _popitem_gen(self) -> OpGen[tuple[Any, Any]]:
        key: bytes | None
        value: bytes | None
        overlay = self._overlay()
        if overlay is not None:
            items = yield from overlay.scan_gen(self._name, monotonic_ms() + self._timeout_ms)
            key, value = next(iter(items.items()), (None, None))
            if key is not None:
                overlay.put(self._name, key, None)
        else:
            key, value = yield from self._execute(commands.map_popitem(self._name))
        if key is None or value is None:
            raise KeyMissing(f"map {self.name!r} is empty")
        return decode_key(key), self._codec.decode(value)

    def _setdefault_gen(self, key: Any, default: Any) -> OpGen[Any]:
        overlay = self._overlay()
        if overlay is not None:
            found = yield from self._own_gen(overlay, encode_key(key))
            if found is None:
                found = self._encode(default)
                overlay.put(self._name, encode_key(key), found)
            return self._codec.decode(found)
        body = commands.map_setdefault(self._name, encode_key(key), self._encode(default))
        present, _ = yield from self._execute(body)
        return self._codec.decode(present)

    def _update_gen(self, other: Any, pairs: dict[str, Any], guard: Guard | None) -> OpGen[Revision | None]:
        collected: dict[bytes, bytes] = {}
        items: Iterable[tuple[Any, Any]]
        if isinstance(other, Mapping):
            items = other.items()
        elif hasattr(other, "keys"):
            items = ((key, other[key]) for key in other.keys())  # noqa: SIM118  # the protocol of dict.update
        else:
            items = other
        for key, value in items:
            collected[encode_key(key)] = self._encode(value)
        for name, value in pairs.items():
            collected[encode_key(name)] = self._encode(value)
        if not collected:
            return None
        overlay = self._overlay()
        if overlay is not None:
            for name_of_key, data in collected.items():
                overlay.put(self._name, name_of_key, data, guard_of(guard))
            return Revision(0)
        (revision,) = yield from self._execute(
            commands.map_update(self._name, collected.items(), guard_of(guard))
        )
        return Revision(revision)

    def _clear_gen(self) -> OpGen[int]:
        overlay = self._overlay()
        if overlay is not None:
            items = yield from overlay.scan_gen(self._name, monotonic_ms() + self._timeout_ms)
            for key in items:
                overlay.put(self._name, key, None)
            return len(items)
        (count,) = yield from self._execute(commands.map_clear(self._name))
        return int(count)

    def _compare_and_set_gen(self, key: Any, expected: Any, new: Any, guard: Guard | None) -> OpGen[bool]:
        old = None if expected is ABSENT else self._encode(expected)
        data = None if new is ABSENT else self._encode(new)
        overlay = self._overlay()
        if overlay is not None:
            if (yield from self._own_gen(overlay, encode_key(key))) != old:
                return False
            overlay.put(self._name, encode_key(key), data, guard_of(guard))
            return True
        body = commands.map_compare_and_set(self._name, encode_key(key), old, data, guard_of(guard))
        was_expected, _, _ = yield from self._execute(body)
        return bool(was_expected)


class _Absent:
    """For `compare_and_set`: no value at all, where None is a value like others."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "coordlib.ABSENT"

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT: Final = _Absent()


class Map(_MapBase, MutableMapping[Any, Any]):
    """
    A linearizable mapping. Keys: str, bytes, int; values: see `coordlib.api.codec`, or give a codec.

    Every method raises NoQuorum (nothing happened), Overloaded (nothing happened), or, for those that
    change something, CommitTimeout and LeadershipLost (it may have happened, or may yet). Iteration, `keys()`,
    `items()` and `values()` show the map at one revision; the whole of it is fetched first.

    In a transaction of the same handle (see `Cluster.transaction`) everything but `read_stale` is read at one revision
    and written when it commits; methods that change something return the revision 0 then.

    .. versionadded:: 0.1
    """

    def __init__(self, cluster: Cluster, name: str, codec: Codec | None = None) -> None:
        super().__init__(name, codec, cluster._request_timeout_ms)
        self._handle = self._cluster = cluster

    def __repr__(self) -> str:
        return f"<coordlib.Map {self.name!r}>"

    def __getitem__(self, key: Any) -> Any:
        return self._cluster._run(self._get_gen(key, _MISSING))

    def get(self, key: Any, default: Any = None) -> Any:
        """The value, or `default`."""
        return self._cluster._run(self._get_gen(key, default))

    def get_versioned(self, key: Any) -> VersionedValue | None:
        """The value with its revisions, or None."""
        return self._cluster._run(self._get_versioned_gen(key))

    def read_stale(self, key: Any, default: Any = None) -> Any:
        """What this node has applied so far, without asking anyone: may be out of date by any amount."""
        return self._cluster._run(self._get_gen(key, default, is_stale=True))

    def __contains__(self, key: object) -> bool:
        return self._cluster._run(self._contains_gen(key))

    def __len__(self) -> int:
        return self._cluster._run(self._len_gen())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._cluster._run(self._scan_gen(keys_only=True)))

    def snapshot(self) -> dict[Any, Any]:
        """All of it at one revision."""
        return dict(self._cluster._run(self._scan_gen()))

    def items(self) -> Any:
        """The items at one revision: a snapshot, not a view."""
        return self.snapshot().items()

    def values(self) -> Any:
        """The values at one revision: a snapshot, not a view."""
        return self.snapshot().values()

    def keys(self) -> Any:
        """The keys at one revision: a snapshot, not a view."""
        return dict.fromkeys(self._cluster._run(self._scan_gen(keys_only=True))).keys()

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __setitem__(self, key: Any, value: Any) -> None:
        self._cluster._run(self._put_gen(key, value, None))

    def put(self, key: Any, value: Any, *, guard: Guard | None = None) -> Revision:
        """
        Set a key; returns the revision of the change.

        Args:
            guard: A grant: the write is refused if it is no longer its lock's. The check is part of the write.

        Raises:
            LockLost: The guard did not hold; nothing was written.
        """
        return self._cluster._run(self._put_gen(key, value, guard))

    def insert(self, key: Any, value: Any, *, guard: Guard | None = None) -> Revision:
        """
        Set a key that is not there yet.

        Raises:
            KeyExists: It is there; nothing was changed.
        """
        return self._cluster._run(self._insert_gen(key, value, guard))

    def __delitem__(self, key: Any) -> None:
        self._cluster._run(self._delitem_gen(key))

    def delete(self, key: Any, *, guard: Guard | None = None) -> bool:
        """Remove a key; whether it was there."""
        return self._cluster._run(self._delete_gen(key, guard))

    def pop(self, key: Any, default: Any = _MISSING, *, guard: Guard | None = None) -> Any:
        """Remove a key and return its value, in one command."""
        return self._cluster._run(self._pop_gen(key, default, guard))

    def popitem(self) -> tuple[Any, Any]:
        """Remove some item and return it, in one command."""
        return self._cluster._run(self._popitem_gen())

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """The present value, or `default` after setting it, in one command."""
        return self._cluster._run(self._setdefault_gen(key, default))

    def update(self, other: Any = (), /, *, guard: Guard | None = None, **pairs: Any) -> None:
        """Set many keys in one command: all or none."""
        self._cluster._run(self._update_gen(other, pairs, guard))

    def clear(self) -> None:
        """Remove everything in one command."""
        self._cluster._run(self._clear_gen())

    def compare_and_set(self, key: Any, expected: Any, new: Any, *, guard: Guard | None = None) -> bool:
        """
        Set `key` to `new` if its value is `expected`; whether it was.

        Values are compared as encoded. `coordlib.ABSENT` stands for no value, on either side.
        """
        return self._cluster._run(self._compare_and_set_gen(key, expected, new, guard))


class AsyncMap(_MapBase):
    """
    `Map` for tasks. A cancelled call may still take effect, as after a CommitTimeout.

    .. versionadded:: 0.1
    """

    def __init__(self, cluster: AsyncCluster, name: str, codec: Codec | None = None) -> None:
        super().__init__(name, codec, cluster._request_timeout_ms)
        self._handle = self._cluster = cluster

    def __repr__(self) -> str:
        return f"<coordlib.AsyncMap {self.name!r}>"

    async def get(self, key: Any, default: Any = None) -> Any:
        """The value, or `default`."""
        return await self._cluster._arun(self._get_gen(key, default))

    async def get_versioned(self, key: Any) -> VersionedValue | None:
        """The value with its revisions, or None."""
        return await self._cluster._arun(self._get_versioned_gen(key))

    async def read_stale(self, key: Any, default: Any = None) -> Any:
        """What this node has applied so far, without asking anyone."""
        return await self._cluster._arun(self._get_gen(key, default, is_stale=True))

    async def contains(self, key: Any) -> bool:
        """Whether the key is there."""
        return await self._cluster._arun(self._contains_gen(key))

    async def size(self) -> int:
        """The number of keys."""
        return await self._cluster._arun(self._len_gen())

    async def snapshot(self) -> dict[Any, Any]:
        """All of it at one revision."""
        return dict(await self._cluster._arun(self._scan_gen()))

    async def keys(self) -> list[Any]:
        """The keys at one revision."""
        return await self._cluster._arun(self._scan_gen(keys_only=True))

    async def items(self) -> list[tuple[Any, Any]]:
        """The items at one revision."""
        return await self._cluster._arun(self._scan_gen())

    async def values(self) -> list[Any]:
        """The values at one revision."""
        return [value for _, value in await self._cluster._arun(self._scan_gen())]

    async def __aiter__(self) -> AsyncIterator[Any]:
        for key in await self.keys():
            yield key

    async def put(self, key: Any, value: Any, *, guard: Guard | None = None) -> Revision:
        """Set a key; returns the revision of the change. See `Map.put`."""
        return await self._cluster._arun(self._put_gen(key, value, guard))

    async def insert(self, key: Any, value: Any, *, guard: Guard | None = None) -> Revision:
        """Set a key that is not there yet. See `Map.insert`."""
        return await self._cluster._arun(self._insert_gen(key, value, guard))

    async def delete(self, key: Any, *, guard: Guard | None = None) -> bool:
        """Remove a key; whether it was there."""
        return await self._cluster._arun(self._delete_gen(key, guard))

    async def pop(self, key: Any, default: Any = _MISSING, *, guard: Guard | None = None) -> Any:
        """Remove a key and return its value, in one command."""
        return await self._cluster._arun(self._pop_gen(key, default, guard))

    async def popitem(self) -> tuple[Any, Any]:
        """Remove some item and return it, in one command."""
        return await self._cluster._arun(self._popitem_gen())

    async def setdefault(self, key: Any, default: Any = None) -> Any:
        """The present value, or `default` after setting it, in one command."""
        return await self._cluster._arun(self._setdefault_gen(key, default))

    async def update(self, other: Any = (), /, *, guard: Guard | None = None, **pairs: Any) -> None:
        """Set many keys in one command: all or none."""
        await self._cluster._arun(self._update_gen(other, pairs, guard))

    async def clear(self) -> None:
        """Remove everything in one command."""
        await self._cluster._arun(self._clear_gen())

    async def compare_and_set(self, key: Any, expected: Any, new: Any, *, guard: Guard | None = None) -> bool:
        """Set `key` to `new` if its value is `expected`. See `Map.compare_and_set`."""
        return await self._cluster._arun(self._compare_and_set_gen(key, expected, new, guard))
