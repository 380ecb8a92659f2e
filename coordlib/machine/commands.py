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
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, TypeAlias

from coordlib import errors
from coordlib.cbor import CBORError, decode, encode
from coordlib.errors import (
    CoordError,
    IndeterminateError,
    RemoteProtocolError,
)
from coordlib.machine import arguments as arg
from coordlib.machine.arguments import UnknownCommand
from coordlib.machine.limits import Limits, exceeded

__all__ = [
    "ENTRY_HEADER_SIZE",
    "GTID_BYTES",
    "NO_DEADLINE",
    "AcquisitionState",
    "Condition",
    "Guard",
    "OpCode",
    "QueryCode",
    "StaleRequest",
    "TxStatus",
    "UnknownCommand",
    "Write",
    "acquire",
    "begin_epoch",
    "break_lock",
    "checkpoint_sessions",
    "close_session",
    "decode_operation",
    "decode_query",
    "decode_reply",
    "delete_key",
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
    "key_equals",
    "key_is_at",
    "map_clear",
    "map_compare_and_set",
    "map_delete",
    "map_insert",
    "map_is_at",
    "map_pop",
    "map_popitem",
    "map_put",
    "map_setdefault",
    "map_update",
    "open_session",
    "pack_entry",
    "put_key",
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
    "query_services",
    "query_time",
    "query_tx_clock",
    "query_tx_heuristics",
    "query_tx_list",
    "query_tx_read",
    "query_tx_state",
    "record_disk",
    "release",
    "service_register",
    "service_unregister",
    "tx_decide",
    "tx_forget",
    "tx_heuristic",
    "tx_resolve",
    "tx_skip",
    "unpack_entry",
]

COMMAND_VERSION = 1
_HEADER = struct.Struct(">BQQQQ")
ENTRY_HEADER_SIZE = _HEADER.size


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
    TX_DECIDE = 64
    TX_RESOLVE = 65
    TX_FORGET = 66
    TX_HEURISTIC = 67
    TX_SKIP = 68
    SERVICE_REGISTER = 72
    SERVICE_UNREGISTER = 73


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
    TX_STATE = 64
    TX_LIST = 65
    TX_HEURISTICS = 66
    TIME = 67
    TX_READ = 68
    TX_CLOCK = 69
    SERVICES = 72


class TxStatus(IntEnum):
    """The outcome of a transaction, as a number in replies. The last three are for ever."""

    NONE = 0  # not decided, and it may still be either way
    COMMITTED = 1
    ABORTED = 2
    UNKNOWN = 3  # too long ago to know: nothing may be concluded, nothing presumed


class AcquisitionState:
    """What an acquisition can be, as text in replies."""

    HELD = "held"
    QUEUED = "queued"
    NONE = "none"


Guard: TypeAlias = "tuple[bytes, int] | None"
"""
Lock and token: the command is refused with `LockLost` unless the token is that of the lock's present holder.
"""


Condition: TypeAlias = (
    "tuple[int, bytes, bytes, int] | tuple[int, bytes, int] | tuple[int, bytes, bytes, bytes | None]"
)
"""What a transaction has read. Made by `key_is_at`, `map_is_at` and `key_equals`."""

Write: TypeAlias = "tuple[int, bytes, bytes, bytes] | tuple[int, bytes, bytes]"
"""What a transaction changes. Made by `put_key` and `delete_key`."""

GTID_BYTES = 16
NO_DEADLINE = arg.UINT_MAX


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


# --- the catalogue ------------------------------------------------------------------------------------

_CONDITION = arg.variant(
    arg.record(arg.uint, arg.name, arg.map_key, arg.uint),
    arg.record(arg.uint, arg.name, arg.uint),
    arg.record(arg.uint, arg.name, arg.map_key, arg.optional(arg.map_value)),
)
_WRITES = arg.listed(
    arg.variant(
        arg.record(arg.uint, arg.name, arg.map_key, arg.map_value),
        arg.record(arg.uint, arg.name, arg.map_key),
    ),
    "tx_writes_max",
)

_OPERATIONS: dict[int, tuple[arg.Check, ...]] = {
    OpCode.SESSION_OPEN: (arg.code, arg.identity16, arg.ttl, arg.text),
    OpCode.SESSION_CLOSE: (arg.code,),
    OpCode.SESSION_EXPIRE: (arg.code, arg.ids),
    OpCode.SESSION_CHECKPOINT: (arg.code, arg.remaining),
    OpCode.RECORD_DISK: (arg.code, arg.text, arg.identity16),
    OpCode.BEGIN_EPOCH: (arg.code, arg.epoch),
    OpCode.ACQUIRE: (arg.code, arg.name, arg.truth),
    OpCode.RELEASE: (arg.code, arg.name, arg.uint),
    OpCode.BREAK: (arg.code, arg.name),
    OpCode.MAP_PUT: (arg.code, arg.name, arg.map_key, arg.map_value, arg.guard),
    OpCode.MAP_INSERT: (arg.code, arg.name, arg.map_key, arg.map_value, arg.guard),
    OpCode.MAP_SETDEFAULT: (arg.code, arg.name, arg.map_key, arg.map_value, arg.guard),
    OpCode.MAP_DELETE: (arg.code, arg.name, arg.map_key, arg.guard),
    OpCode.MAP_POP: (arg.code, arg.name, arg.map_key, arg.guard),
    OpCode.MAP_POPITEM: (arg.code, arg.name, arg.guard),
    OpCode.MAP_UPDATE: (arg.code, arg.name, arg.pairs, arg.guard),
    OpCode.MAP_CLEAR: (arg.code, arg.name, arg.guard),
    OpCode.MAP_COMPARE_AND_SET: (
        arg.code,
        arg.name,
        arg.map_key,
        arg.optional(arg.map_value),
        arg.optional(arg.map_value),
        arg.guard,
    ),
    OpCode.IDS_LEASE: (arg.code, arg.name, arg.layout, arg.window),
    OpCode.IDS_RENEW: (arg.code, arg.name, arg.uint, arg.uint, arg.window),
    OpCode.IDS_RETURN: (arg.code, arg.name, arg.uint, arg.uint, arg.uint),
    OpCode.IDS_SKIP: (arg.code, arg.instant),
    OpCode.TX_DECIDE: (
        arg.code,
        arg.gtid_or_empty,
        arg.uint,
        arg.listed(arg.record(arg.text, arg.text, arg.branch_name), "tx_participants_max"),
        arg.listed(arg.record(arg.name, arg.uint), "tx_conditions_max"),
        arg.listed(_CONDITION, "tx_conditions_max"),
        _WRITES,
        arg.listed(arg.record(arg.name, arg.uint), "tx_writes_max"),
        arg.optional(_WRITES),
        arg.reserved,
    ),
    OpCode.TX_RESOLVE: (arg.code, arg.identity16),
    OpCode.TX_FORGET: (arg.code, arg.listed(arg.record(arg.identity16, arg.branch_name), "tx_writes_max")),
    OpCode.TX_HEURISTIC: (arg.code, arg.identity16, arg.branch_name, arg.text, arg.text),
    OpCode.TX_SKIP: (arg.code, arg.instant),
    OpCode.SERVICE_REGISTER: (arg.code, arg.word, arg.text),
    OpCode.SERVICE_UNREGISTER: (arg.code, arg.word),
}

_QUERIES: dict[int, tuple[arg.Check, ...]] = {
    QueryCode.GET: (arg.code, arg.name, arg.map_key),
    QueryCode.GET_META: (arg.code, arg.name, arg.map_key),
    QueryCode.CONTAINS: (arg.code, arg.name, arg.map_key),
    QueryCode.LEN: (arg.code, arg.name),
    QueryCode.RANGE: (
        arg.code,
        arg.name,
        arg.optional(arg.map_key),
        arg.uint,
        arg.uint,
        arg.optional(arg.uint),
        arg.truth,
    ),
    QueryCode.MAPS: (arg.code, arg.optional(arg.name), arg.uint),
    QueryCode.LOCK_INFO: (arg.code, arg.name),
    QueryCode.LOCK_LIST: (arg.code, arg.optional(arg.name), arg.uint),
    QueryCode.ACQUISITION: (arg.code, arg.name, arg.uint, arg.uint),
    QueryCode.MEMBERS: (arg.code,),
    QueryCode.IDS_INFO: (arg.code, arg.name),
    QueryCode.IDS_OWNER: (arg.code, arg.name, arg.uint, arg.uint),
    QueryCode.IDS_LIST: (arg.code, arg.optional(arg.name), arg.uint),
    QueryCode.TX_STATE: (arg.code, arg.identity16),
    QueryCode.TX_LIST: (arg.code, arg.optional(arg.identity16), arg.uint, arg.truth),
    QueryCode.TX_HEURISTICS: (arg.code, arg.optional(arg.record(arg.identity16, arg.branch_name)), arg.uint),
    QueryCode.TIME: (arg.code,),
    QueryCode.TX_READ: (arg.code, arg.name, arg.map_key, arg.listed(_CONDITION, "tx_conditions_max")),
    QueryCode.TX_CLOCK: (arg.code,),
    QueryCode.SERVICES: (
        arg.code,
        arg.optional(arg.word),
        arg.optional(arg.record(arg.word, arg.uint)),
        arg.uint,
    ),
}

_INTERNAL = frozenset(
    (OpCode.SESSION_EXPIRE, OpCode.SESSION_CHECKPOINT, OpCode.RECORD_DISK, OpCode.BEGIN_EPOCH)
)


def _decode(data: bytes, specifications: dict[int, tuple[arg.Check, ...]], limits: Limits) -> list[Any]:
    args = decode(data)
    if type(args) is not list or not args or type(args[0]) is not int:
        raise arg.malformed("not an array that begins with a number")
    specification = specifications.get(args[0])
    if specification is None:
        raise UnknownCommand(
            f"command or query {args[0]} is not known to this version: upgrade coordlib on this node",
            number=args[0],
        )
    if len(args) != len(specification):
        raise arg.malformed(f"{len(specification) - 1} arguments expected, {len(args) - 1} given")
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


def key_is_at(map_name: bytes, key: bytes, mod_revision: int) -> Condition:
    """The key was last changed at this revision; 0: it is not there."""
    return (0, map_name, key, mod_revision)


def map_is_at(map_name: bytes, revision: int) -> Condition:
    """Nothing in the map was changed after this revision; 0: it is empty."""
    return (1, map_name, revision)


def key_equals(map_name: bytes, key: bytes, value: bytes | None) -> Condition:
    """The key has this value, whenever it got it; None: it is not there."""
    return (2, map_name, key, value)


def put_key(map_name: bytes, key: bytes, value: bytes) -> Write:
    return (0, map_name, key, value)


def delete_key(map_name: bytes, key: bytes) -> Write:
    """A key that is not there stays so."""
    return (1, map_name, key)


def tx_decide(
    gtid: bytes,
    deadline_ms: int = NO_DEADLINE,
    *,
    participants: Iterable[tuple[str, str, bytes]] = (),
    guards: Iterable[tuple[bytes, int]] = (),
    conditions: Iterable[Condition] = (),
    writes: Iterable[Write] = (),
    releases: Iterable[tuple[bytes, int]] = (),
    otherwise: Iterable[Write] | None = None,
) -> bytes:
    """
    -> [`TxStatus`, reason, revision, branch, failed condition]. The decision of a transaction: all of it or nothing.

    Committed: every guard held, and every condition, so `writes` are carried out (branch 0); or a condition failed
    and there is `otherwise`, so that is carried out instead (branch 1). Either way the locks in `releases` are free, and the
    participants are pending until they are forgotten. Of several writes to one key the last one counts.
    Aborted: nothing is changed. The reason is "deadline", "lock-lost", "conflict", "quota" or "resolved". Unknown ("horizon"):
    too long ago to say whether it was committed; nothing is changed.

    Asked again, in whatever session, it answers what it answered. With an empty gtid nothing is remembered but
    the reply of the request: a conditional batch, which can have no participants. ConditionFailed: the gtid was
    minted so far ahead of log_time that nothing may be decided yet; nothing was.

    Args:
        deadline_ms: In log_time. A transaction has at most `tx_lifetime_ms` since it was minted, whatever it says.
        participants: (resource, node, branch): who has prepared.
        guards: (lock, token): must be that of the lock's holder.
        releases: (lock, sequence of the acquisition) of this session.
    """
    return encode(
        (
            OpCode.TX_DECIDE.value,
            gtid,
            deadline_ms,
            list(participants),
            list(guards),
            list(conditions),
            list(writes),
            list(releases),
            None if otherwise is None else list(otherwise),
            [],
        )
    )


def tx_resolve(gtid: bytes) -> bytes:
    """
    -> [`TxStatus`, reason, revision], never NONE. What was decided; if nothing was, it is aborted now, for ever.

    ConditionFailed: as of `tx_decide`.
    """
    return encode((OpCode.TX_RESOLVE.value, gtid))


def tx_forget(branches: Iterable[tuple[bytes, bytes]]) -> bytes:
    """-> [how many were pending]. (gtid, branch): they have obeyed the decision. Unknown ones are ignored."""
    return encode((OpCode.TX_FORGET.value, [list(branch) for branch in branches]))


def tx_heuristic(gtid: bytes, branch: bytes, outcome: str, who: str) -> bytes:
    """
    -> [was it pending]. A branch came to an outcome of its own: kept for people to see, and no longer pending.

    With an empty outcome: it has been seen to, and is no longer kept.
    """
    return encode((OpCode.TX_HEURISTIC.value, gtid, branch, outcome, who))


def tx_skip(horizon_ms: int) -> bytes:
    """
    -> [horizon in force in ms, was it raised]. After a restore from back-up: of what was minted before the horizon, and has
    no record, nothing is known from now on: it may have been decided, and nobody presumes. Records stay.

    UsageError: It is further ahead of log_time than two longest lives of a transaction: none could begin for long.
    """
    return encode((OpCode.TX_SKIP.value, horizon_ms))


def service_register(service: str, instance: str) -> bytes:
    """-> [is it new]. The session hosts the service from now on, until it says otherwise or ends."""
    return encode((OpCode.SERVICE_REGISTER.value, service, instance))


def service_unregister(service: str) -> bytes:
    """-> [was it registered]."""
    return encode((OpCode.SERVICE_UNREGISTER.value, service))


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


def query_tx_state(gtid: bytes) -> bytes:
    """
    -> [`TxStatus`, reason, revision, is the initiator's session alive, log_time in ms, pending, heuristics].

    Pending: [[resource, node, branch], ...]; heuristics: [[branch, outcome, who, log_time in ms], ...].
    """
    return encode((QueryCode.TX_STATE.value, gtid))


def query_tx_list(after: bytes | None = None, limit: int = 1000, only_pending: bool = False) -> bytes:
    """
    -> [[[gtid, `TxStatus`, reason, revision, pending], ...], are there more].

    A page may be shorter than `limit`. In table order; those that are pending in the order of gtids.
    """
    return encode((QueryCode.TX_LIST.value, after, limit, only_pending))


def query_tx_heuristics(after: tuple[bytes, bytes] | None = None, limit: int = 1000) -> bytes:
    """-> [[[gtid, branch, outcome, who, log_time in ms], ...], are there more]. Sorted by gtid and branch."""
    return encode((QueryCode.TX_HEURISTICS.value, after, limit))


def query_time() -> bytes:
    """-> [log_time in ms]: what the leader would log now; elsewhere, that of the last entry."""
    return encode((QueryCode.TIME.value,))


def query_tx_clock() -> bytes:
    """
    -> [log_time in ms, as of `query_time`; longest life of a transaction in ms; horizon in ms].

    What is minted before the horizon is decided no more: mint at the later of the first and the last.
    """
    return encode((QueryCode.TX_CLOCK.value,))


def query_tx_read(map_name: bytes, key: bytes, conditions: Iterable[Condition] = ()) -> bytes:
    """
    -> [failed condition or -1, value or None, its mod_revision or 0, the map's revision or 0, revision of now].

    All of it at one moment: what a transaction reads is consistent with what it read before if that still holds.
    """
    return encode((QueryCode.TX_READ.value, map_name, key, list(conditions)))


def query_services(
    service: str | None = None, after: tuple[str, int] | None = None, limit: int = 1000
) -> bytes:
    """
    -> [[[service, session, owner, instance, since ms], ...], are there more]. Sorted; of one service, or of all.

    Args:
        after: Service and session of the last row of the page before.
    """
    return encode((QueryCode.SERVICES.value, service, after, limit))
