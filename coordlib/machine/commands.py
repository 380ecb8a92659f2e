"""Operations, queries and replies of the state machine: their numbers, how to build and how to check them.

An *operation* changes state and is the payload of a log entry; a *query* reads. Both are a CBOR array of a
number and its arguments, and `_OPERATIONS` and `_QUERIES` below are the complete list of what is accepted.
What must not live here: what any of them does.

Disk: a log entry's data is the header ``>BQQQQ`` (format version, log_time in ms, session, sequence,
acknowledged: 33 bytes) and the operation. Numbers and the shape of arguments are never changed: whatever
needs other arguments gets a new number, and members stop before a number they do not know instead of
guessing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any, TypeAlias

from coordlib import errors
from coordlib.cbor import CBORError, decode, encode
from coordlib.errors import (
    CoordError,
    FatalError,
    IndeterminateError,
    RemoteProtocolError,
    UsageError,
)
from coordlib.machine.limits import Limits, exceeded

__all__ = [
    "ENTRY_HEADER_SIZE",
    "AcquisitionState",
    "Guard",
    "OpCode",
    "QueryCode",
    "StaleRequest",
    "UnknownCommand",
    "acquire",
    "begin_epoch",
    "break_lock",
    "checkpoint_sessions",
    "close_session",
    "decode_operation",
    "decode_query",
    "decode_reply",
    "encode_coded_error",
    "encode_error",
    "error_reply",
    "expire_sessions",
    "ids_lease",
    "ids_renew",
    "ids_return",
    "ids_skip",
    "is_internal",
    "is_success",
    "map_clear",
    "map_compare_and_set",
    "map_delete",
    "map_insert",
    "map_pop",
    "map_popitem",
    "map_put",
    "map_setdefault",
    "map_update",
    "open_session",
    "pack_entry",
    "query_acquisition",
    "query_contains",
    "query_get",
    "query_get_meta",
    "query_ids_info",
    "query_ids_list",
    "query_ids_owner",
    "query_len",
    "query_lock",
    "query_locks",
    "query_maps",
    "query_members",
    "query_range",
    "record_disk",
    "release",
    "unpack_entry",
]

COMMAND_VERSION = 1
_HEADER = struct.Struct(">BQQQQ")
ENTRY_HEADER_SIZE = _HEADER.size
_UINT_MAX = (1 << 63) - 1


class UnknownCommand(FatalError):
    """
    The log holds a command of a newer version. It has not been applied; upgrade this member, then restart
    it.
    """

    code = "unknown-command"


class StaleRequest(IndeterminateError):
    """The session has said before that it has the answer to this request; it was not executed (again)."""

    code = "stale-request"


class OpCode(IntEnum):
    SESSION_OPEN = 1
    SESSION_CLOSE = 2
    SESSION_EXPIRE = 3
    SESSION_CHECKPOINT = 4
    RECORD_DISK = 8
    BEGIN_EPOCH = 9
    ACQUIRE = 16
    RELEASE = 17
    BREAK = 18
    MAP_PUT = 32
    MAP_INSERT = 33
    MAP_SETDEFAULT = 34
    MAP_DELETE = 35
    MAP_POP = 36
    MAP_POPITEM = 37
    MAP_UPDATE = 38
    MAP_CLEAR = 39
    MAP_COMPARE_AND_SET = 40
    IDS_LEASE = 48
    IDS_RENEW = 49
    IDS_RETURN = 50
    IDS_SKIP = 51


class QueryCode(IntEnum):
    GET = 1
    GET_META = 2
    CONTAINS = 3
    LEN = 4
    RANGE = 5
    MAPS = 6
    LOCK_INFO = 16
    LOCK_LIST = 17
    ACQUISITION = 18
    MEMBERS = 32
    IDS_INFO = 48
    IDS_OWNER = 49
    IDS_LIST = 50


class AcquisitionState:
    """What an acquisition can be, as text in replies."""

    HELD = "held"
    QUEUED = "queued"
    NONE = "none"


Guard: TypeAlias = "tuple[bytes, int] | None"
"""
Lock and token: the command is refused with `LockLost` unless the token is that of the lock's present holder.
"""


# --- log entries ------------------------------------------------------------------------------------------


def pack_entry(log_time_ms: int, session: int, sequence: int, acknowledged: int, operation: bytes) -> bytes:
    """Make the data of a log entry. All numbers are unsigned 64-bit."""
    return _HEADER.pack(COMMAND_VERSION, log_time_ms, session, sequence, acknowledged) + operation


def unpack_entry(data: bytes) -> tuple[int, int, int, int, bytes]:
    """
    Return (log_time_ms, session, sequence, acknowledged, operation).

    Raises:
        UnknownCommand: The entry was not written in this format.
    """
    if len(data) < ENTRY_HEADER_SIZE or data[0] != COMMAND_VERSION:
        version = data[0] if data else None
        raise UnknownCommand(
            f"the log holds a command of format {version}, this version reads {COMMAND_VERSION}: "
            "upgrade coordlib on this node",
            version=version,
        )
    _, log_time_ms, session, sequence, acknowledged = _HEADER.unpack_from(data)
    return log_time_ms, session, sequence, acknowledged, data[ENTRY_HEADER_SIZE:]


# --- arguments --------------------------------------------------------------------------------------------

_Check: TypeAlias = Callable[[Any, Limits], object]


def _malformed(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"malformed command or query: {what}")


def _code(_value: Any, _limits: Limits) -> None:
    """The number itself: looked at before its arguments are."""


def _uint(value: Any, _limits: Limits) -> None:
    if type(value) is not int or not 0 <= value <= _UINT_MAX:
        raise _malformed("not an unsigned integer")


def _bool(value: Any, _limits: Limits) -> None:
    if type(value) is not bool:
        raise _malformed("not a truth value")


def _name(value: Any, limits: Limits) -> None:
    if type(value) is not bytes:
        raise _malformed("a name must be bytes")
    if not value:
        raise UsageError("a name must not be empty")
    if len(value) > limits.name_size_bytes_max:
        raise exceeded("name_size_bytes_max", limits.name_size_bytes_max, len(value))


def _key(value: Any, limits: Limits) -> None:
    if type(value) is not bytes:
        raise _malformed("a key must be bytes")
    if len(value) > limits.key_size_bytes_max:
        raise exceeded("key_size_bytes_max", limits.key_size_bytes_max, len(value))


def _value(value: Any, limits: Limits) -> None:
    if type(value) is not bytes:
        raise _malformed("a value must be bytes")
    if len(value) > limits.value_size_bytes_max:
        raise exceeded("value_size_bytes_max", limits.value_size_bytes_max, len(value))


def _text(value: Any, limits: Limits) -> None:
    if type(value) is not str:
        raise _malformed("not text")
    # A character is at most four bytes; the exact size is worth computing only for long ones.
    if 4 * len(value) > limits.name_size_bytes_max:
        size = len(value.encode("utf-8", "surrogatepass"))
        if size > limits.name_size_bytes_max:
            raise exceeded("name_size_bytes_max", limits.name_size_bytes_max, size)


def _optional(check: _Check) -> _Check:
    def check_optional(value: Any, limits: Limits) -> None:
        if value is not None:
            check(value, limits)

    return check_optional


def _guard(value: Any, limits: Limits) -> None:
    if value is None:
        return
    if type(value) is not list or len(value) != 2:
        raise _malformed("a guard must be a lock and a token")
    _name(value[0], limits)
    _uint(value[1], limits)


def _pairs(value: Any, limits: Limits) -> None:
    if type(value) is not list or len(value) % 2:
        raise _malformed("keys and values must come in pairs")
    if len(value) > 2 * limits.update_pairs_max:
        raise exceeded("update_pairs_max", limits.update_pairs_max, len(value) // 2)
    for key in value[::2]:
        _key(key, limits)
    for item in value[1::2]:
        _value(item, limits)


def _identity16(value: Any, _limits: Limits) -> None:
    if type(value) is not bytes or len(value) != 16:
        raise _malformed("an identity must be 16 bytes")


def _ttl(value: Any, limits: Limits) -> None:
    _uint(value, limits)
    if not limits.session_ttl_ms_min <= value <= limits.session_ttl_ms_max:
        raise UsageError(
            f"a TTL must be {limits.session_ttl_ms_min} to {limits.session_ttl_ms_max} ms, not {value}"
        )


def _ids(value: Any, limits: Limits) -> None:
    if type(value) is not list:
        raise _malformed("not a list of sessions")
    for item in value:
        _uint(item, limits)


def _remaining(value: Any, limits: Limits) -> None:
    if type(value) is not list:
        raise _malformed("not a list of remaining times")
    for item in value:
        if type(item) is not list or len(item) != 2 or type(item[1]) is not int:
            raise _malformed("not a session and its remaining time")
        _uint(item[0], limits)
        if not -1 <= item[1] <= limits.session_ttl_ms_max:
            raise _malformed("remaining time out of range")


def _epoch(value: Any, limits: Limits) -> None:
    _uint(value, limits)
    if value >= 1 << 15:
        raise _malformed("a restore epoch has 15 bits")


def _layout(value: Any, limits: Limits) -> None:
    if type(value) is not list or len(value) != 6:
        raise _malformed("a layout must be six numbers")
    for item in value:
        _uint(item, limits)
    time_bits, sequence_bits, worker_bits, unit_ms, epoch_ms, worker_is_lowest = value
    if not 1 <= time_bits <= 63 or sequence_bits + worker_bits > 62:
        raise UsageError(
            f"a layout needs 1 to 63 bits of time, not {time_bits}, and at most 62 of sequence and worker, "
            f"not {sequence_bits} and {worker_bits}"
        )
    if not 1 <= unit_ms <= 10_000 or worker_is_lowest > 1:
        raise UsageError(f"a layout's unit must be 1 to 10000 ms, not {unit_ms}; its order 0 or 1")
    _instant(epoch_ms, limits)


def _instant(value: Any, limits: Limits) -> None:
    _uint(value, limits)
    if value >= 1 << 48:
        raise UsageError(f"{value} ms since 1970 is past the year 9999: is the unit right?")


def _window(value: Any, limits: Limits) -> None:
    _uint(value, limits)
    if value == 0:
        raise UsageError("a window must be at least 1 ms")
    if value > limits.ids_window_ms_max:
        raise exceeded("ids_window_ms_max", limits.ids_window_ms_max, value)


_OPERATIONS: dict[int, tuple[_Check, ...]] = {
    OpCode.SESSION_OPEN: (_code, _identity16, _ttl, _text),
    OpCode.SESSION_CLOSE: (_code,),
    OpCode.SESSION_EXPIRE: (_code, _ids),
    OpCode.SESSION_CHECKPOINT: (_code, _remaining),
    OpCode.RECORD_DISK: (_code, _text, _identity16),
    OpCode.BEGIN_EPOCH: (_code, _epoch),
    OpCode.ACQUIRE: (_code, _name, _bool),
    OpCode.RELEASE: (_code, _name, _uint),
    OpCode.BREAK: (_code, _name),
    OpCode.MAP_PUT: (_code, _name, _key, _value, _guard),
    OpCode.MAP_INSERT: (_code, _name, _key, _value, _guard),
    OpCode.MAP_SETDEFAULT: (_code, _name, _key, _value, _guard),
    OpCode.MAP_DELETE: (_code, _name, _key, _guard),
    OpCode.MAP_POP: (_code, _name, _key, _guard),
    OpCode.MAP_POPITEM: (_code, _name, _guard),
    OpCode.MAP_UPDATE: (_code, _name, _pairs, _guard),
    OpCode.MAP_CLEAR: (_code, _name, _guard),
    OpCode.MAP_COMPARE_AND_SET: (_code, _name, _key, _optional(_value), _optional(_value), _guard),
    OpCode.IDS_LEASE: (_code, _name, _layout, _window),
    OpCode.IDS_RENEW: (_code, _name, _uint, _uint, _window),
    OpCode.IDS_RETURN: (_code, _name, _uint, _uint, _uint),
    OpCode.IDS_SKIP: (_code, _instant),
}

_QUERIES: dict[int, tuple[_Check, ...]] = {
    QueryCode.GET: (_code, _name, _key),
    QueryCode.GET_META: (_code, _name, _key),
    QueryCode.CONTAINS: (_code, _name, _key),
    QueryCode.LEN: (_code, _name),
    QueryCode.RANGE: (_code, _name, _optional(_key), _uint, _uint, _optional(_uint), _bool),
    QueryCode.MAPS: (_code, _optional(_name), _uint),
    QueryCode.LOCK_INFO: (_code, _name),
    QueryCode.LOCK_LIST: (_code, _optional(_name), _uint),
    QueryCode.ACQUISITION: (_code, _name, _uint, _uint),
    QueryCode.MEMBERS: (_code,),
    QueryCode.IDS_INFO: (_code, _name),
    QueryCode.IDS_OWNER: (_code, _name, _uint, _uint),
    QueryCode.IDS_LIST: (_code, _optional(_name), _uint),
}

_INTERNAL = frozenset(
    (OpCode.SESSION_EXPIRE, OpCode.SESSION_CHECKPOINT, OpCode.RECORD_DISK, OpCode.BEGIN_EPOCH)
)


def _decode(data: bytes, specifications: dict[int, tuple[_Check, ...]], limits: Limits) -> list[Any]:
    args = decode(data)
    if type(args) is not list or not args or type(args[0]) is not int:
        raise _malformed("not an array that begins with a number")
    specification = specifications.get(args[0])
    if specification is None:
        raise UnknownCommand(
            f"command or query {args[0]} is not known to this version: upgrade coordlib on this node",
            number=args[0],
        )
    if len(args) != len(specification):
        raise _malformed(f"{len(specification) - 1} arguments expected, {len(args) - 1} given")
    for check, value in zip(specification, args, strict=True):
        check(value, limits)
    return args


def decode_operation(operation: bytes, limits: Limits) -> list[Any]:
    """
    Decode an operation and check all that can be checked without knowing the state.

    Returns:
        Its number and arguments, every one of the right type and within its limit. Not to be changed.

    Raises:
        UnknownCommand: No operation has this number.
        RemoteProtocolError: Not an operation at all.
        UsageError: An argument is out of its range.
        QuotaExceeded: An argument is larger than its limit.
    """
    if len(operation) > limits.entry_size_bytes_max:
        raise exceeded("entry_size_bytes_max", limits.entry_size_bytes_max, len(operation))
    return _decode(operation, _OPERATIONS, limits)


def decode_query(query: bytes, limits: Limits) -> list[Any]:
    """Decode a query and check its arguments. Raises as `decode_operation` does."""
    return _decode(query, _QUERIES, limits)


def is_internal(operation: bytes) -> bool:
    """
    Whether only the leader itself may propose this. Also true for what is no operation at all.

    Costs a fraction of decoding, and errs on the side of refusing: it reads the number in each form that
    fits into one or two bytes, and takes everything else for internal.
    """
    if len(operation) < 2 or not 0x81 <= operation[0] <= 0x97:
        return True
    number = operation[1]
    if number == 0x18 and len(operation) > 2:
        number = operation[2]
    elif number >= 0x18:
        return True
    return number in _INTERNAL


# --- replies ----------------------------------------------------------------------------------------------


def _error_classes() -> dict[str, type[CoordError]]:
    classes = [getattr(errors, name) for name in errors.__all__]
    found = {item.code: item for item in classes if isinstance(item, type) and issubclass(item, CoordError)}
    found.update({item.code: item for item in (CBORError, StaleRequest, UnknownCommand)})
    return found


_ERRORS = _error_classes()


def encode_error(error: CoordError) -> bytes:
    """Encode an error as ``[code, message, details]``; details that CBOR has no form for become text."""
    details = {
        name: value if value is None or isinstance(value, int | str | bytes | float) else str(value)
        for name, value in error.details.items()
    }
    return encode([error.code, error.message, details])


def encode_coded_error(code: str, message: str) -> bytes:
    """The same, for an error of which only the code and the text are known."""
    return encode([code, message, {}])


def is_success(reply: bytes) -> bool:
    """Whether a reply is one of success, without decoding it."""
    return len(reply) > 1 and 0x81 <= reply[0] <= 0x97 and reply[1] == 0


def error_reply(reply: bytes) -> CoordError | None:
    """The error that a reply stands for, None if it is a success."""
    try:
        decode_reply(reply)
    except CoordError as error:
        return error
    return None


def decode_reply(reply: bytes) -> list[Any]:
    """
    Return the results of a successful reply.

    Raises:
        CoordError: The error that the reply stands for, in its own class. One of a newer version, whose code
            is not known here, becomes an IndeterminateError: what it would allow to conclude is not known.
        RemoteProtocolError: Not a reply.
    """
    items = decode(reply)
    if type(items) is not list or not items:
        raise RemoteProtocolError("not a reply")
    if type(items[0]) is int and items[0] == 0:
        return items[1:]
    if (
        len(items) != 3
        or type(items[0]) is not str
        or type(items[1]) is not str
        or type(items[2]) is not dict
    ):
        raise RemoteProtocolError("not a reply")
    code, message, details = items
    if not all(type(name) is str and name not in ("self", "message") for name in details):
        raise RemoteProtocolError("not a reply")
    kind = _ERRORS.get(code)
    if kind is None:
        raise IndeterminateError(f"{code}: {message}", **{**details, "unknown_code": code})
    raise kind(message, **details)


# --- builders of operations -------------------------------------------------------------------------------


def open_session(nonce: bytes, ttl_ms: int, owner: str) -> bytes:
    """-> [session]. Outside of a session. The same nonce finds the same session for as long as it lives."""
    return encode((OpCode.SESSION_OPEN.value, nonce, ttl_ms, owner))


def close_session() -> bytes:
    """-> []. Ends the session that it is sent in, and frees all that it holds."""
    return encode((OpCode.SESSION_CLOSE.value,))


def expire_sessions(sessions: Iterable[int]) -> bytes:
    """-> [count]. Internal. Ends those of the sessions that are still alive."""
    return encode((OpCode.SESSION_EXPIRE.value, list(sessions)))


def checkpoint_sessions(remaining: Iterable[tuple[int, int]]) -> bytes:
    """-> []. Internal. (session, remaining ms); -1: its full TTL again. Unknown sessions are ignored."""
    return encode((OpCode.SESSION_CHECKPOINT.value, [list(item) for item in remaining]))


def record_disk(node: str, disk_id: bytes) -> bytes:
    """-> [was it new]. Internal. Raises ConditionFailed for an unknown node or another disk."""
    return encode((OpCode.RECORD_DISK.value, node, disk_id))


def begin_epoch(epoch: int) -> bytes:
    """
    -> []. Internal. After a restore from back-up: tokens rise above all that any lost history may have
    given.
    """
    return encode((OpCode.BEGIN_EPOCH.value, epoch))


def acquire(lock: bytes, wait: bool = True) -> bytes:
    """-> [is granted, token, position]. The acquisition is known by this command's session and sequence."""
    return encode((OpCode.ACQUIRE.value, lock, wait))


def release(lock: bytes, acquisition_sequence: int) -> bytes:
    """-> [what it was: "held", "queued" or "none"]. Never an error, never touches another acquisition."""
    return encode((OpCode.RELEASE.value, lock, acquisition_sequence))


def break_lock(lock: bytes) -> bytes:
    """-> [was held, token taken away]. The next waiter gets the lock."""
    return encode((OpCode.BREAK.value, lock))


def map_put(map_name: bytes, key: bytes, value: bytes, guard: Guard = None) -> bytes:
    """-> [revision]."""
    return encode((OpCode.MAP_PUT.value, map_name, key, value, guard))


def map_insert(map_name: bytes, key: bytes, value: bytes, guard: Guard = None) -> bytes:
    """-> [revision]; KeyExists if the key is there."""
    return encode((OpCode.MAP_INSERT.value, map_name, key, value, guard))


def map_setdefault(map_name: bytes, key: bytes, value: bytes, guard: Guard = None) -> bytes:
    """-> [present value, was inserted]."""
    return encode((OpCode.MAP_SETDEFAULT.value, map_name, key, value, guard))


def map_delete(map_name: bytes, key: bytes, guard: Guard = None) -> bytes:
    """-> [was there]."""
    return encode((OpCode.MAP_DELETE.value, map_name, key, guard))


def map_pop(map_name: bytes, key: bytes, guard: Guard = None) -> bytes:
    """-> [value or None]."""
    return encode((OpCode.MAP_POP.value, map_name, key, guard))


def map_popitem(map_name: bytes, guard: Guard = None) -> bytes:
    """-> [key, value], both None if the map is empty. Which one: the first in table order."""
    return encode((OpCode.MAP_POPITEM.value, map_name, guard))


def map_update(map_name: bytes, pairs: Iterable[tuple[bytes, bytes]], guard: Guard = None) -> bytes:
    """-> [revision]. All or none; of equal keys the last one counts."""
    return encode((OpCode.MAP_UPDATE.value, map_name, [item for pair in pairs for item in pair], guard))


def map_clear(map_name: bytes, guard: Guard = None) -> bytes:
    """-> [how many there were]."""
    return encode((OpCode.MAP_CLEAR.value, map_name, guard))


def map_compare_and_set(
    map_name: bytes, key: bytes, expected: bytes | None, new: bytes | None, guard: Guard = None
) -> bytes:
    """-> [was as expected, value found if not, revision of the key]. None stands for "absent"."""
    return encode((OpCode.MAP_COMPARE_AND_SET.value, map_name, key, expected, new, guard))


def ids_lease(name: bytes, layout: Iterable[int], window_ms: int) -> bytes:
    """
    -> [worker, lease, from unit, until unit, present unit of the lease's clock, epoch in ms].

    A window that no other ever overlaps, of a worker that nobody else has. `layout` is time_bits, sequence_bits,
    worker_bits, unit_ms, epoch_ms (0: the cluster's own), worker_is_lowest (1 or 0). ConditionFailed: the name has
    another layout. QuotaExceeded: all workers are leased. IdOverflow: the layout's time is used up.
    """
    return encode((OpCode.IDS_LEASE.value, name, list(layout), window_ms))


def ids_renew(name: bytes, worker: int, lease: int, window_ms: int) -> bytes:
    """
    -> [until unit, present unit of the lease's clock]. Never shortens the window.

    NotHolder: it has ended, or the lease is not the worker's; nothing was changed.
    """
    return encode((OpCode.IDS_RENEW.value, name, worker, lease, window_ms))


def ids_return(name: bytes, worker: int, lease: int, used_until_unit: int) -> bytes:
    """
    -> [until unit]. Ends the lease; from `used_until_unit` on (exclusive: the first unit not used) its time is free.

    Again: the same answer, nothing is changed. NotHolder: the lease is not the worker's any more.
    """
    return encode((OpCode.IDS_RETURN.value, name, worker, lease, used_until_unit))


def ids_skip(floor_ms: int) -> bytes:
    """
    -> [floor in force in ms, was it raised]. After a restore from back-up: no window of any generator begins
    before the floor from now on, and all present leases are ended. A floor that is no later changes nothing.
    """
    return encode((OpCode.IDS_SKIP.value, floor_ms))


# --- builders of queries ----------------------------------------------------------------------------------


def query_get(map_name: bytes, key: bytes) -> bytes:
    """-> [value or None]."""
    return encode((QueryCode.GET.value, map_name, key))


def query_get_meta(map_name: bytes, key: bytes) -> bytes:
    """-> [value or None, create revision, mod revision, version]."""
    return encode((QueryCode.GET_META.value, map_name, key))


def query_contains(map_name: bytes, key: bytes) -> bytes:
    """-> [is there]."""
    return encode((QueryCode.CONTAINS.value, map_name, key))


def query_len(map_name: bytes) -> bytes:
    """-> [number of keys]."""
    return encode((QueryCode.LEN.value, map_name))


def query_range(
    map_name: bytes,
    after: bytes | None = None,
    limit_items: int = 1000,
    limit_bytes: int = 256 * 1024,
    expected_revision: int | None = None,
    keys_only: bool = False,
) -> bytes:
    """
    -> [revision, are there more, [key, value, key, value, ...]] or, with `keys_only`, [..., [key, key, ...]].

    The first page names no revision and gives the map's; the following ones name it, and their `after` is the
    last key of the page before. RevisionCompacted: too much has changed, begin again. At least one item comes
    even if it is larger than `limit_bytes`.
    """
    return encode(
        (QueryCode.RANGE.value, map_name, after, limit_items, limit_bytes, expected_revision, keys_only)
    )


def query_maps(after: bytes | None = None, limit: int = 1000) -> bytes:
    """-> [[[name, number of keys, size in bytes, revision], ...], are there more]. Sorted by name."""
    return encode((QueryCode.MAPS.value, after, limit))


def query_lock(lock: bytes) -> bytes:
    """
    -> [[session, owner, token, since ms] or None, [[session, owner], ...] first waiters, number of waiters].
    """
    return encode((QueryCode.LOCK_INFO.value, lock))


def query_locks(after: bytes | None = None, limit: int = 1000) -> bytes:
    """-> [[[name, session, owner, token, since ms, waiters], ...], are there more]. In table order."""
    return encode((QueryCode.LOCK_LIST.value, after, limit))


def query_acquisition(lock: bytes, session: int, sequence: int) -> bytes:
    """-> [state, token, position]. As a WAIT request: answered when it no longer waits."""
    return encode((QueryCode.ACQUISITION.value, lock, session, sequence))


def query_members() -> bytes:
    """-> [[[node, endpoint, disk id], ...]]. Sorted by node."""
    return encode((QueryCode.MEMBERS.value,))


def query_ids_info(name: bytes) -> bytes:
    """
    -> [layout or None, workers there are, ever used, leased, present unit, floor in ms]. Leased and present unit
    are as of the last entry's log_time.
    """
    return encode((QueryCode.IDS_INFO.value, name))


def query_ids_owner(name: bytes, worker: int, unit: int) -> bytes:
    """-> [who had the worker at that unit, None if unknown]. Only a worker's last 8 windows are remembered."""
    return encode((QueryCode.IDS_OWNER.value, name, worker, unit))


def query_ids_list(after: bytes | None = None, limit: int = 1000) -> bytes:
    """-> [[[name, layout, workers ever used], ...], are there more]. Sorted by name."""
    return encode((QueryCode.IDS_LIST.value, after, limit))
