"""Messages as bytes: every kind both ways, and everything a correct node does not write refused."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordlib import cbor
from coordlib.errors import LocalProtocolError, RemoteProtocolError
from coordlib.raft.messages import (
    AppendEntries,
    AppendReply,
    Configuration,
    Entry,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    RaftMessage,
    RequestVote,
    SnapshotMeta,
    SnapshotStatus,
    TimeoutNow,
    VoteReply,
)
from coordlib.wire import schema
from coordlib.wire.faults import MalformedMessage
from coordlib.wire.messages import (
    Announce,
    CallStatus,
    Form,
    LeaderInfo,
    MemberStatus,
    NodeMessage,
    Refusal,
    Replies,
    Reply,
    ReplyStatus,
    Request,
    RequestKind,
    Requests,
    ServiceCall,
    ServiceReply,
    Serving,
    SnapshotAck,
    SnapshotChunk,
    StatusQuery,
    StatusReply,
)
from coordlib.wire.schema import INT_MAX, KINDS, LIMITS, Message, decode_messages, encode_messages

fuzz = settings(derandomize=True, deadline=None, max_examples=200)

CONFIGURATION = Configuration(("a", "b", "c"), ("d",), ("a", "b"))
META = SnapshotMeta(100, 7, CONFIGURATION)

EXAMPLES: list[Message] = [
    RequestVote(3, 100, 2, True, False),
    VoteReply(3, 3, True, False),
    AppendEntries(3, 100, 2, 99, 17, ()),
    AppendEntries(
        3, 100, 2, 99, 17, (Entry(3, 101, 0, b""), Entry(3, 102, 1, b"command"), Entry(3, 103, 2, b"c"))
    ),
    AppendReply(3, 17, True, 100, 103, 3, 103),
    Heartbeat(3, 99, 18),
    HeartbeatReply(3, 18),
    InstallSnapshot(3, META),
    TimeoutNow(INT_MAX),
    Requests((Request(1, RequestKind.COMMAND, 44, 5, 4, b"op"), Request(2, RequestKind.QUERY, 0, 0, 0, b""))),
    Replies((Reply(1, ReplyStatus.OK, b"reply"),)),
    LeaderInfo(3, "a", (("a", "tcp://10.0.0.1:7400"), ("b", "tcp://10.0.0.2:7400")), b"u" * 16),
    StatusQuery(9),
    StatusReply(9, b"\xa0"),
    Refusal("wiped-disk", "This node's disk was wiped: remove it from the cluster, then add it again."),
    Announce(
        b"u" * 16, b"d" * 16, b"m" * 32, False, 3, 103, 3, (("a", b"d" * 16), ("b", b"")), 2, 100, True, ""
    ),
    Form(b"u" * 16, (("a", b"d" * 16),)),
    MemberStatus(103, 1_700_000_000_000, 12),
    SnapshotChunk(0, 3, META, 1000, 256, b"x" * 500),
    SnapshotAck(0, 3, 100, 756, False),
    Serving(44),
    ServiceCall(7, 44, 45, 30_000, b"order"),
    ServiceReply(7, CallStatus.OK, b"done"),
]


def rows(*messages: tuple[int, Message]) -> Any:
    """What is on the wire, as plain lists, to be spoilt."""
    return cbor.decode(encode_messages(messages))


def refused(value: object) -> MalformedMessage:
    with pytest.raises(MalformedMessage) as caught:
        decode_messages(cbor.encode(value))
    assert isinstance(caught.value, RemoteProtocolError)
    assert caught.value.code == "malformed-authenticated"
    return caught.value


def test_every_message_has_a_number_and_an_example_here() -> None:
    """A message cannot be added without a place in the table."""
    everything = {*get_args(RaftMessage), *get_args(NodeMessage)}
    assert everything == set(KINDS)
    assert everything == {type(message) for message in EXAMPLES}


def test_numbers_of_kinds_are_what_they_were_in_the_first_release() -> None:
    """Wire: numbers are never changed and never used again."""
    assert {cls.__name__: number for cls, number in KINDS.items()} == {
        "RequestVote": 1,
        "VoteReply": 2,
        "AppendEntries": 3,
        "AppendReply": 4,
        "Heartbeat": 5,
        "HeartbeatReply": 6,
        "InstallSnapshot": 7,
        "TimeoutNow": 8,
        "Requests": 9,
        "Replies": 10,
        "LeaderInfo": 11,
        "StatusQuery": 12,
        "StatusReply": 13,
        "Refusal": 14,
        "Announce": 15,
        "Form": 16,
        "MemberStatus": 17,
        "SnapshotChunk": 18,
        "SnapshotAck": 19,
        "Serving": 20,
        "ServiceCall": 21,
        "ServiceReply": 22,
    }


def test_bytes_of_messages_are_what_they_were_in_the_first_release() -> None:
    """Wire: one short message and one with entries, byte for byte."""
    assert encode_messages([(0, Heartbeat(3, 99, 18))]).hex() == "8185050003186312"
    message = AppendEntries(3, 100, 2, 99, 17, (Entry(3, 101, 1, b"ab"),))
    expected = "818803070318640218631181830301426162"
    assert encode_messages([(7, message)]).hex() == expected


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_is_read_back_as_it_was_written(message: Message) -> None:
    """Same values, same types, all the way down."""
    ((group, decoded),) = decode_messages(encode_messages([(5, message)]))
    assert group == 5
    assert message == decoded
    assert type(message) is type(decoded)
    assert shape(message) == shape(decoded)


def shape(value: object) -> object:
    """The types of everything inside; an IntEnum counts as the int it is on the wire."""
    if isinstance(value, tuple):
        return (type(value), *map(shape, value))
    return int if isinstance(value, int) and not isinstance(value, bool) else type(value)


def test_a_batch_keeps_its_order_and_its_groups() -> None:
    """One frame carries many messages."""
    batch = [(group, message) for group in (0, 1, INT_MAX) for message in EXAMPLES]
    assert batch == decode_messages(encode_messages(batch))
    assert decode_messages(encode_messages([])) == []


def test_entries_get_their_indexes_from_their_place() -> None:
    """They are not on the wire."""
    entries = tuple(Entry(3, 101 + n, 1, b"%d" % n) for n in range(50))
    message = AppendEntries(3, 100, 2, 99, 17, entries)
    assert decode_messages(encode_messages([(0, message)])) == [(0, message)]


@pytest.mark.parametrize("first", [100, 102, 0])
def test_entries_that_do_not_follow_the_previous_index_are_not_sent(first: int) -> None:
    """Their places would give them other indexes."""
    with pytest.raises(LocalProtocolError):
        encode_messages([(0, AppendEntries(3, 100, 2, 99, 17, (Entry(3, first, 1, b""),)))])
    gap = (Entry(3, 101, 1, b""), Entry(3, 103, 1, b""))
    with pytest.raises(LocalProtocolError):
        encode_messages([(0, AppendEntries(3, 100, 2, 99, 17, gap))])


@pytest.mark.parametrize(
    "message",
    [SnapshotStatus(1, True), Entry(1, 1, 1, b""), "text", None, 7, (1, 2)],
    ids=lambda message: type(message).__name__,
)
def test_what_is_not_a_message_is_not_sent(message: Any) -> None:
    """SnapshotStatus too: a node says it to itself only."""
    with pytest.raises(LocalProtocolError):
        encode_messages([(0, message)])


def test_what_cbor_cannot_say_is_not_sent() -> None:
    """An object in a field is our bug, not the peer's."""
    with pytest.raises(LocalProtocolError):
        encode_messages([(0, StatusReply(1, object()))])  # type: ignore[arg-type]
    with pytest.raises(LocalProtocolError):
        encode_messages([(0, Refusal("code", "\ud800"))])


def test_a_batch_that_is_too_large_is_not_sent_and_not_read() -> None:
    """By number of messages, and by bytes."""
    with pytest.raises(LocalProtocolError):
        encode_messages([(0, StatusQuery(1))] * (schema.MESSAGES_MAX + 1))
    with pytest.raises(LocalProtocolError):
        encode_messages([(0, SnapshotChunk(0, 1, META, 1, 0, bytes(256 * 1024)))] * 32)
    row = rows((0, StatusQuery(1)))[0]
    refused([row] * (schema.MESSAGES_MAX + 1))
    with pytest.raises(MalformedMessage):
        decode_messages(bytes(schema.BATCH_BYTES_MAX + 1))


BAD_SCALARS: list[object] = [None, -1, 2**63, 2**64 - 1, 1.0, True, "1", b"1", [], {}, [1]]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_field_of_every_message_has_one_type_and_range(message: Message) -> None:
    """Each place of each example, nested ones too, with a value of every other type."""
    data = rows((0, message))
    for parent, key in places(data[0]):
        original = parent[key]
        for bad in BAD_SCALARS:
            if type(bad) is type(original) and (not isinstance(bad, int) or 0 <= bad <= INT_MAX):
                continue
            parent[key] = bad
            refused(data)
        parent[key] = original
    assert decode_messages(cbor.encode(data)) == [(0, message)]


def places(value: list[Any]) -> list[tuple[list[Any], int]]:
    """Every (list, index) within nested lists."""
    found: list[tuple[list[Any], int]] = []
    for key, item in enumerate(value):
        found.append((value, key))
        if isinstance(item, list):
            found += places(item)
    return found


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_field_more_or_less_is_refused(message: Message) -> None:
    """At every level where the number of fields is fixed."""
    data = rows((0, message))
    row = data[0]
    refused([row[:-1]])
    refused([[*row, 0]])
    for parent, key in places(row):
        if isinstance(parent[key], list):  # None is no element of any array either
            original = parent[key]
            parent[key] = [*original, None]
            refused(data)
            parent[key] = original


@pytest.mark.parametrize(
    "value",
    [None, 1, "x", {}, [None], [1], [{}], [[]], [[5]], [["5", 0]], [[5.0, 0]], [[None, 0]]],
    ids=repr,
)
def test_what_is_not_an_array_of_messages_is_refused(value: object) -> None:
    """The outermost shapes."""
    refused(value)


@pytest.mark.parametrize("kind", [0, 20, 23, 255, 2**40, -3, True])
def test_an_unknown_kind_is_refused(kind: int) -> None:
    """Newer messages need a newer wire version."""
    refused([[kind, 0, 1, 2, 3]])


@pytest.mark.parametrize("group", [-1, 2**63, True, None, "0", 0.0])
def test_a_group_that_is_not_a_63_bit_integer_is_refused(group: object) -> None:
    """True is not 1."""
    refused([[KINDS[StatusQuery], group, 1]])


def test_one_bad_message_refuses_the_whole_batch() -> None:
    """Nothing of what a faulty node says is acted upon."""
    data = rows((0, StatusQuery(1)), (0, StatusQuery(2)))
    data[1][2] = -1
    refused(data)


def test_entries_beyond_the_last_index_are_refused() -> None:
    """The index that follows from an entry's place must exist."""
    data = rows((0, AppendEntries(3, 100, 2, 99, 17, (Entry(3, 101, 1, b""),))))
    data[0][3] = INT_MAX
    refused(data)
    data[0][3] = INT_MAX - 1
    ((_, message),) = decode_messages(cbor.encode(data))
    assert isinstance(message, AppendEntries)
    assert message.entries[0].index == INT_MAX


def test_an_entry_kind_is_one_byte() -> None:
    """255 is the last."""
    data = rows((0, AppendEntries(3, 100, 2, 99, 17, (Entry(3, 101, 255, b""),))))
    data[0][7][0][1] = 256
    refused(data)


def longer(where: tuple[str, str], by: int) -> Message:
    """A message in which one bounded field has its greatest length, and `by` more."""
    size = LIMITS[where] + by
    names = tuple(f"n{n}" for n in range(size)) if size < 100_000 else ()
    makers: dict[tuple[str, str], Any] = {
        ("Configuration", "voters"): lambda: InstallSnapshot(1, SnapshotMeta(1, 1, Configuration(names))),
        ("Configuration", "learners"): lambda: InstallSnapshot(
            1, SnapshotMeta(1, 1, Configuration((), names))
        ),
        ("Configuration", "outgoing"): lambda: InstallSnapshot(
            1, SnapshotMeta(1, 1, Configuration((), (), names))
        ),
        ("AppendEntries", "entries"): lambda: AppendEntries(
            1, 0, 0, 0, 0, tuple(Entry(1, 1 + n, 1, b"") for n in range(size))
        ),
        ("Entry", "data"): lambda: AppendEntries(1, 0, 0, 0, 0, (Entry(1, 1, 1, bytes(size)),)),
        ("Request", "body"): lambda: Requests((Request(1, 1, 1, 1, 1, bytes(size)),)),
        ("Requests", "requests"): lambda: Requests((Request(1, 1, 1, 1, 1, b""),) * size),
        ("Reply", "body"): lambda: Replies((Reply(1, 0, bytes(size)),)),
        ("Replies", "replies"): lambda: Replies((Reply(1, 0, b""),) * size),
        ("LeaderInfo", "leader"): lambda: LeaderInfo(1, "n" * size, (), b""),
        ("LeaderInfo", "endpoints"): lambda: LeaderInfo(1, "", (("n", "e"),) * size, b""),
        ("LeaderInfo", "endpoints[]"): lambda: LeaderInfo(1, "", (("n", "e" * size),), b""),
        ("LeaderInfo", "cluster_uuid"): lambda: LeaderInfo(1, "", (), b"u" * size),
        ("Announce", "cluster_uuid"): lambda: Announce(
            bytes(size), b"", b"", False, 1, 1, 1, (), 0, 0, False, ""
        ),
        ("Announce", "disk_id"): lambda: Announce(b"", bytes(size), b"", False, 1, 1, 1, (), 0, 0, False, ""),
        ("Announce", "members_digest"): lambda: Announce(
            b"", b"", bytes(size), False, 1, 1, 1, (), 0, 0, False, ""
        ),
        ("Announce", "known_disks"): lambda: Announce(
            b"", b"", b"", False, 1, 1, 1, (("n", b""),) * size, 0, 0, False, ""
        ),
        ("Announce", "backs"): lambda: Announce(b"", b"", b"", False, 1, 1, 1, (), 0, 0, False, "n" * size),
        ("Form", "cluster_uuid"): lambda: Form(bytes(size), ()),
        ("Form", "disks"): lambda: Form(b"", (("n", b""),) * size),
        ("Refusal", "code"): lambda: Refusal("c" * size, ""),
        ("Refusal", "message"): lambda: Refusal("", "m" * size),
        ("SnapshotChunk", "data"): lambda: SnapshotChunk(0, 1, META, 1, 0, bytes(size)),
        ("StatusReply", "body"): lambda: StatusReply(1, bytes(size)),
        ("ServiceCall", "body"): lambda: ServiceCall(1, 2, 3, 4, bytes(size)),
        ("ServiceReply", "body"): lambda: ServiceReply(1, 0, bytes(size)),
    }
    message: Message = makers[where]()
    return message


@pytest.mark.parametrize("where", list(LIMITS), ids=".".join)
def test_every_length_is_bounded_and_the_bound_itself_is_allowed(where: tuple[str, str]) -> None:
    """Each line of LIMITS, from both sides."""
    allowed = longer(where, 0)
    assert decode_messages(encode_messages([(0, allowed)])) == [(0, allowed)]
    with pytest.raises(MalformedMessage, match="limit"):
        decode_messages(encode_messages([(0, longer(where, 1))]))


def test_names_inside_of_arrays_are_bounded() -> None:
    """A node's name has at most 255 characters wherever it stands."""
    for message in (
        InstallSnapshot(1, SnapshotMeta(1, 1, Configuration(("n" * 256,)))),
        Form(b"", (("n" * 256, b""),)),
        Form(b"", (("n", bytes(256)),)),
    ):
        with pytest.raises(MalformedMessage, match="limit"):
            decode_messages(encode_messages([(0, message)]))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("", "empty"),
        ("8000", "trailing byte"),
        ("9f830c0001ff", "indefinite array"),
        ("81830c00c001", "tag"),
        ("81830c00c24101", "big number"),
        ("81830c00f7", "undefined"),
        ("81830c00e0", "simple value"),
        ("81830c00a2010201f6", "duplicate keys"),
        ("81830c0f", "truncated"),
        ("81" * 40 + "00", "too deep"),
        ("9bffffffffffffffff00", "an array of 16 EiB"),
    ],
)
def test_what_the_strict_reader_refuses_is_malformed_after_authentication(data: str, why: str) -> None:
    """A bug or a compromised node, so it has the loud code, not CBOR's own."""
    with pytest.raises(MalformedMessage) as caught:
        decode_messages(bytes.fromhex(data))
    assert caught.value.code == "malformed-authenticated", why


def test_integers_may_be_longer_than_needed() -> None:
    """Not canonical, but unambiguous; refusing it would cost a second encoding of every message."""
    assert decode_messages(bytes.fromhex("81830c001b0000000000000001")) == [(0, StatusQuery(1))]


@fuzz
@given(st.binary(max_size=80))
def test_arbitrary_bytes_never_raise_anything_else(data: bytes) -> None:
    """RemoteProtocolError or a list of messages."""
    try:
        decode_messages(data)
    except MalformedMessage:
        pass


@fuzz
@given(st.data())
def test_changed_batches_never_raise_anything_else_and_what_is_read_can_be_written(
    data: st.DataObject,
) -> None:
    """Some bytes replaced, cut or inserted: refused, or a batch that is a fixed point of both directions."""
    chosen = data.draw(st.lists(st.sampled_from(EXAMPLES), min_size=1, max_size=4))
    encoded = bytearray(encode_messages([(0, message) for message in chosen]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(encoded) - 1))
        encoded[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        if not encoded:
            break
    try:
        batch = decode_messages(bytes(encoded))
    except MalformedMessage:
        return
    assert batch == decode_messages(encode_messages(batch))


numbers = st.integers(0, INT_MAX)


@fuzz
@given(
    st.lists(
        st.tuples(
            numbers,
            st.builds(RequestVote, numbers, numbers, numbers, st.booleans(), st.booleans())
            | st.builds(Heartbeat, numbers, numbers, numbers)
            | st.builds(
                lambda term, prev, blobs: AppendEntries(
                    term,
                    prev,
                    1,
                    2,
                    3,
                    tuple(Entry(term, prev + 1 + n, 1, blob) for n, blob in enumerate(blobs)),
                ),
                numbers,
                st.integers(0, INT_MAX - 10),
                st.lists(st.binary(max_size=20), max_size=5),
            )
            | st.builds(Refusal, st.text(max_size=20), st.text(max_size=20)),
        ),
        max_size=6,
    )
)
def test_generated_batches_are_read_back_as_they_were_written(batch: list[tuple[int, Message]]) -> None:
    """Round trip with numbers of every size."""
    assert batch == decode_messages(encode_messages(batch))
