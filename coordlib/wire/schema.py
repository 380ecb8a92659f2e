"""Messages as bytes: the table of message kinds, and the strict reading of what others wrote.

The shape of every message is derived once, at import, from the annotations of its NamedTuple; reading
then costs a few C-level comparisons for each message. What is *not* here: sealing (channel.py) and what the
messages mean.

Wire: one plaintext is one batch::

    [[kind, group, field, field, ...], ...]         CBOR, at most MESSAGES_MAX messages

    fields         in the order of the NamedTuple
    int            0 .. 2^63-1                      bool    true or false
    str, bytes     at most the bound of LIMITS      tuple   array, at most the bound of LIMITS
    NamedTuple     array of its fields; Entry is [term, kind, data]: its index follows from its place

Changing a number of KINDS, the order of fields or their types breaks peers: raise the wire version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

import cbor2

from coordlib import cbor
from coordlib.errors import LocalProtocolError, RemoteProtocolError
from coordlib.raft.messages import (
    AppendEntries,
    AppendReply,
    Entry,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    RaftMessage,
    RequestVote,
    TimeoutNow,
    VoteReply,
)
from coordlib.wire.faults import MalformedMessage
from coordlib.wire.messages import (
    Announce,
    Form,
    LeaderInfo,
    MemberStatus,
    NodeMessage,
    Refusal,
    Replies,
    Requests,
    ServiceCall,
    ServiceReply,
    Serving,
    SnapshotAck,
    SnapshotChunk,
    StatusQuery,
    StatusReply,
)

__all__ = [
    "BATCH_BYTES_MAX",
    "INT_MAX",
    "KINDS",
    "LIMITS",
    "MESSAGES_MAX",
    "Message",
    "decode_messages",
    "encode_messages",
]

Message: TypeAlias = RaftMessage | NodeMessage

INT_MAX = 2**63 - 1

# One frame of the transport (8 MiB) less the frame's header and seal, generously.
BATCH_BYTES_MAX = 8 * 1024 * 1024 - 4096

MESSAGES_MAX = 4096

# Wire: never reuse a number. Below 24, because such a number is one byte.
KINDS: dict[type[Any], int] = {
    RequestVote: 1,
    VoteReply: 2,
    AppendEntries: 3,
    AppendReply: 4,
    Heartbeat: 5,
    HeartbeatReply: 6,
    InstallSnapshot: 7,
    TimeoutNow: 8,
    Requests: 9,
    Replies: 10,
    LeaderInfo: 11,
    StatusQuery: 12,
    StatusReply: 13,
    Refusal: 14,
    Announce: 15,
    Form: 16,
    MemberStatus: 17,
    SnapshotChunk: 18,
    SnapshotAck: 19,
    Serving: 20,
    ServiceCall: 21,
    ServiceReply: 22,
}

_KIB = 1024
_MIB = 1024 * 1024
_NAME_MAX = 255  # characters of a node id; the same bound as for a DNS name
_MEMBERS_MAX = 1024

# Bounds by (class, field): bytes for bytes, characters for str, elements for tuples. A str inside of a
# tuple has the bound of a name unless it says otherwise ("field[]").
LIMITS: dict[tuple[str, str], int] = {
    ("Configuration", "voters"): _MEMBERS_MAX,
    ("Configuration", "learners"): _MEMBERS_MAX,
    ("Configuration", "outgoing"): _MEMBERS_MAX,
    ("AppendEntries", "entries"): 16_384,
    ("Entry", "data"): 4 * _MIB + 64 * _KIB,  # an entry of 4 MiB and what the node wraps around it
    ("Request", "body"): 4 * _MIB,
    ("Requests", "requests"): 16_384,
    ("Reply", "body"): 7 * _MIB,
    ("Replies", "replies"): 16_384,
    ("LeaderInfo", "leader"): _NAME_MAX,
    ("LeaderInfo", "endpoints"): _MEMBERS_MAX,
    ("LeaderInfo", "endpoints[]"): 1024,
    ("LeaderInfo", "cluster_uuid"): 64,
    ("Announce", "cluster_uuid"): 64,
    ("Announce", "disk_id"): 64,
    ("Announce", "members_digest"): 64,
    ("Announce", "known_disks"): _MEMBERS_MAX,
    ("Announce", "backs"): _NAME_MAX,
    ("Form", "cluster_uuid"): 64,
    ("Form", "disks"): _MEMBERS_MAX,
    ("Refusal", "code"): 64,
    ("Refusal", "message"): 4096,
    ("SnapshotChunk", "data"): 256 * _KIB,
    ("StatusReply", "body"): 4 * _MIB,
    ("ServiceCall", "body"): 4 * _MIB,
    ("ServiceReply", "body"): 4 * _MIB,
}

_Convert: TypeAlias = Callable[[Any], Any]
_DecodeFields: TypeAlias = Callable[[list[Any]], Any]


def _bounded(where: str, limit: int) -> _Convert:
    """Checks the length of what is known to be bytes or str."""

    def check(value: Any) -> Any:
        if len(value) > limit:
            raise MalformedMessage(f"{where}: {len(value)} long, the limit is {limit}")
        return value

    return check


def _compile_record(cls: type[Any]) -> _DecodeFields:
    """
    Compile the reader of one NamedTuple: from a list of raw fields to an instance.

    The types of all fields are compared at once, then the extremes of all integers; only bytes, str
    and nested fields cost a call each.
    """
    hints = get_type_hints(cls)
    names: tuple[str, ...] = cls._fields
    signature: list[type] = []
    int_positions: list[int] = []
    converts: list[tuple[int, _Convert]] = []
    for position, name in enumerate(names):
        raw_type, convert = _compile_field(cls.__name__, name, hints[name])
        signature.append(raw_type)
        if raw_type is int:
            int_positions.append(position)
        if convert is not None:
            converts.append((position, convert))
    # min() and max() want two values; naming one twice is cheaper than a case for it.
    numbers = (
        itemgetter(*(int_positions * 2 if len(int_positions) == 1 else int_positions))
        if int_positions
        else None
    )
    label = cls.__name__
    new = tuple.__new__

    def decode_record(values: list[Any]) -> Any:
        if list(map(type, values)) != signature:
            raise MalformedMessage(f"{label}: fields of the wrong number or type")
        if numbers is not None:
            ints = numbers(values)
            if min(ints) < 0 or max(ints) > INT_MAX:
                raise MalformedMessage(f"{label}: integer out of range")
        for position, convert in converts:
            values[position] = convert(values[position])
        return new(cls, values)

    return decode_record


def _compile_field(owner: str, name: str, hint: Any) -> tuple[type, _Convert | None]:
    """The raw type that CBOR must give for a field, and what to do with it besides."""
    if hint is int or hint is bool:
        return hint, None
    if hint is str or hint is bytes:
        limit = LIMITS.get((owner, name), _NAME_MAX if name.endswith("[]") else None)
        if limit is None:
            raise TypeError(f"{owner}.{name} has no entry in LIMITS")
        return hint, _bounded(f"{owner}.{name}", limit)
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        if len(parts) == 2 and parts[1] is Ellipsis:
            return list, _compile_array(owner, name, parts[0])
        return list, _compile_pair(owner, name, parts)
    if isinstance(hint, type) and hasattr(hint, "_fields"):
        return list, _compile_record(hint)
    raise TypeError(f"{owner}.{name}: {hint!r} cannot go over the wire")


def _compile_array(owner: str, name: str, element: Any) -> _Convert:
    limit = LIMITS[owner, name]
    where = f"{owner}.{name}"
    raw_type, convert = _compile_field(owner, f"{name}[]", element)

    def decode_array(values: list[Any]) -> tuple[Any, ...]:
        if len(values) > limit:
            raise MalformedMessage(f"{where}: {len(values)} elements, the limit is {limit}")
        for value in values:
            if type(value) is not raw_type:
                raise MalformedMessage(f"{where}: element of the wrong type")
        return tuple(values) if convert is None else tuple(map(convert, values))

    return decode_array


def _compile_pair(owner: str, name: str, parts: tuple[Any, ...]) -> _Convert:
    where = f"{owner}.{name}"
    fields = [_compile_field(owner, name, part) for part in parts]
    signature = [raw_type for raw_type, _ in fields]
    if int in signature:
        raise TypeError(f"{where}: integers in bare tuples are not range checked; use a NamedTuple")
    converts = [convert for _, convert in fields]

    def decode_pair(values: list[Any]) -> tuple[Any, ...]:
        if list(map(type, values)) != signature:
            raise MalformedMessage(f"{where}: wrong number or type of parts")
        return tuple(
            value if convert is None else convert(value)
            for value, convert in zip(values, converts, strict=True)
        )

    return decode_pair


_ENTRIES_MAX = LIMITS["AppendEntries", "entries"]
_ENTRY_DATA_MAX = LIMITS["Entry", "data"]
_APPEND_SIGNATURE: list[type] = [int, int, int, int, int, list]
_ENTRY_SIGNATURE: list[type] = [int, int, bytes]
_ENTRY_KIND_MAX = 255


def _decode_append_entries(values: list[Any]) -> AppendEntries:
    """By hand: the one message whose elements depend on its other fields, and the one that costs most."""
    if list(map(type, values)) != _APPEND_SIGNATURE:
        raise MalformedMessage("AppendEntries: fields of the wrong number or type")
    term, prev_index, prev_term, commit, round_, raw_entries = values
    count = len(raw_entries)
    if (
        min(term, prev_index, prev_term, commit, round_) < 0
        or max(term, prev_term, commit, round_) > INT_MAX
        or prev_index > INT_MAX - count
    ):
        raise MalformedMessage("AppendEntries: integer out of range")
    if count > _ENTRIES_MAX:
        raise MalformedMessage(f"AppendEntries: {count} entries, the limit is {_ENTRIES_MAX}")
    index = prev_index
    entries: list[Entry] = []
    append = entries.append
    new = tuple.__new__
    for raw in raw_entries:
        if type(raw) is not list or list(map(type, raw)) != _ENTRY_SIGNATURE:
            raise MalformedMessage("Entry: fields of the wrong number or type")
        entry_term, kind, data = raw
        if not 0 <= entry_term <= INT_MAX or not 0 <= kind <= _ENTRY_KIND_MAX:
            raise MalformedMessage("Entry: integer out of range")
        if len(data) > _ENTRY_DATA_MAX:
            raise MalformedMessage(f"Entry.data: {len(data)} long, the limit is {_ENTRY_DATA_MAX}")
        index += 1
        append(new(Entry, (entry_term, index, kind, data)))
    return new(AppendEntries, (term, prev_index, prev_term, commit, round_, tuple(entries)))


def _encode_append_entries(kind: int, group: int, message: AppendEntries) -> tuple[Any, ...]:
    term, prev_index, prev_term, commit, round_, entries = message
    if entries and (entries[0].index != prev_index + 1 or entries[-1].index != prev_index + len(entries)):
        raise LocalProtocolError(
            f"entries {entries[0].index}..{entries[-1].index} do not follow index {prev_index} one by one"
        )
    rows = [(entry_term, entry_kind, data) for entry_term, _, entry_kind, data in entries]
    return (kind, group, term, prev_index, prev_term, commit, round_, rows)


def _compile_all() -> dict[int, _DecodeFields]:
    table = {kind: _compile_record(cls) for cls, kind in KINDS.items() if cls is not AppendEntries}
    table[KINDS[AppendEntries]] = _decode_append_entries
    return table


_DECODERS = _compile_all()


def encode_messages(messages: Sequence[tuple[int, Message]]) -> bytes:
    """
    Encode a batch of (group, message) as one plaintext, in order.

    Raises:
        LocalProtocolError: Not a message of ours, entries with gaps, more than MESSAGES_MAX messages or
            more than BATCH_BYTES_MAX bytes: the caller is to split the batch. Nothing was sent.
    """
    if len(messages) > MESSAGES_MAX:
        raise LocalProtocolError(f"{len(messages)} messages in one batch, the limit is {MESSAGES_MAX}")
    rows: list[Any] = []
    append = rows.append
    kinds = KINDS
    try:
        for group, message in messages:
            cls = type(message)
            kind = kinds[cls]
            if cls is AppendEntries:
                append(_encode_append_entries(kind, group, message))  # type: ignore[arg-type]  # just checked
            else:
                append((kind, group, *message))
        data = cbor.encode(rows)
    except KeyError as exc:
        raise LocalProtocolError(f"{exc.args[0]!r} is not a message") from exc
    except (cbor2.CBOREncodeError, TypeError, ValueError, UnicodeError) as exc:
        raise LocalProtocolError(f"cannot be encoded: {exc}") from exc
    if len(data) > BATCH_BYTES_MAX:
        raise LocalProtocolError(f"{len(data)} bytes in one batch, the limit is {BATCH_BYTES_MAX}: split it")
    return data


def decode_messages(data: bytes) -> list[tuple[int, Message]]:
    """
    Decode what `encode_messages` made. All or nothing: one bad message refuses the batch.

    Raises:
        MalformedMessage: No correct node writes this. Nothing else is ever raised, whatever the bytes.
    """
    if len(data) > BATCH_BYTES_MAX:
        raise MalformedMessage(f"{len(data)} bytes in one batch, the limit is {BATCH_BYTES_MAX}")
    try:
        rows = cbor.decode(data)
    except RemoteProtocolError as exc:
        raise MalformedMessage(exc.message) from exc
    if type(rows) is not list or len(rows) > MESSAGES_MAX:
        raise MalformedMessage("not an array of messages, or too many of them")
    messages: list[tuple[int, Message]] = []
    append = messages.append
    decoders = _DECODERS
    for row in rows:
        if type(row) is not list or len(row) < 2:
            raise MalformedMessage("a message is an array [kind, group, ...]")
        kind, group = row[0], row[1]
        if type(kind) is not int or type(group) is not int or not 0 <= group <= INT_MAX:
            raise MalformedMessage("kind and group are integers of at most 63 bits")
        decode = decoders.get(kind)
        if decode is None:
            raise MalformedMessage(f"unknown kind of message {kind}")
        append((group, decode(row[2:])))
    return messages


# What the readers derive from the annotations, tied to the places that know it by heart.
assert AppendEntries._fields == ("term", "prev_index", "prev_term", "commit", "round", "entries")
assert Entry._fields == ("term", "index", "kind", "data")
