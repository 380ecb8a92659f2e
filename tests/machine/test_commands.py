"""The catalogue of commands and queries: numbers, shapes, limits and replies."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from coordlib import errors
from coordlib.cbor import encode
from coordlib.errors import (
    CoordError,
    IndeterminateError,
    KeyExists,
    QuotaExceeded,
    RemoteProtocolError,
    UsageError,
)
from coordlib.machine import Limits, StaleRequest, UnknownCommand, commands
from coordlib.machine.commands import OpCode, QueryCode
from coordlib.machine.snapshots import Block

NONCE = bytes(range(16))
LAYOUT = (41, 12, 10, 1, 0, 1)
OPERATIONS: dict[OpCode, bytes] = {
    OpCode.SESSION_OPEN: commands.open_session(NONCE, 10_000, "worker-1"),
    OpCode.SESSION_CLOSE: commands.close_session(),
    OpCode.SESSION_EXPIRE: commands.expire_sessions([3, 4]),
    OpCode.SESSION_CHECKPOINT: commands.checkpoint_sessions([(3, 500), (4, -1)]),
    OpCode.RECORD_DISK: commands.record_disk("a", NONCE),
    OpCode.BEGIN_EPOCH: commands.begin_epoch(7),
    OpCode.ACQUIRE: commands.acquire(b"lock"),
    OpCode.RELEASE: commands.release(b"lock", 1),
    OpCode.BREAK: commands.break_lock(b"lock"),
    OpCode.MAP_PUT: commands.map_put(b"m", b"k", b"v", (b"lock", 1)),
    OpCode.MAP_INSERT: commands.map_insert(b"m", b"k", b"v"),
    OpCode.MAP_SETDEFAULT: commands.map_setdefault(b"m", b"k", b"v"),
    OpCode.MAP_DELETE: commands.map_delete(b"m", b"k"),
    OpCode.MAP_POP: commands.map_pop(b"m", b"k"),
    OpCode.MAP_POPITEM: commands.map_popitem(b"m"),
    OpCode.MAP_UPDATE: commands.map_update(b"m", [(b"k", b"v"), (b"l", b"w")]),
    OpCode.MAP_CLEAR: commands.map_clear(b"m"),
    OpCode.MAP_COMPARE_AND_SET: commands.map_compare_and_set(b"m", b"k", None, b"v"),
    OpCode.IDS_LEASE: commands.ids_lease(b"orders", LAYOUT, 10_000),
    OpCode.IDS_RENEW: commands.ids_renew(b"orders", 0, 1, 10_000),
    OpCode.IDS_RETURN: commands.ids_return(b"orders", 0, 1, 5),
    OpCode.IDS_SKIP: commands.ids_skip(1_800_000_000_000),
    OpCode.TX_DECIDE: commands.tx_decide(
        NONCE,
        5000,
        participants=[("db", "a", b"branch")],
        guards=[(b"lock", 1)],
        conditions=[
            commands.key_is_at(b"m", b"k", 3),
            commands.map_is_at(b"m", 3),
            commands.key_equals(b"m", b"k", None),
        ],
        writes=[commands.put_key(b"m", b"k", b"v"), commands.delete_key(b"m", b"l")],
        releases=[(b"lock", 1)],
        otherwise=[commands.put_key(b"m", b"k", b"w")],
    ),
    OpCode.TX_RESOLVE: commands.tx_resolve(NONCE),
    OpCode.TX_FORGET: commands.tx_forget([(NONCE, b"branch")]),
    OpCode.TX_HEURISTIC: commands.tx_heuristic(NONCE, b"branch", "rolled back", "a"),
    OpCode.TX_SKIP: commands.tx_skip(1000),
    OpCode.SERVICE_REGISTER: commands.service_register("inventory", "a:1"),
    OpCode.SERVICE_UNREGISTER: commands.service_unregister("inventory"),
}
QUERIES: dict[QueryCode, bytes] = {
    QueryCode.GET: commands.query_get(b"m", b"k"),
    QueryCode.GET_META: commands.query_get_meta(b"m", b"k"),
    QueryCode.CONTAINS: commands.query_contains(b"m", b"k"),
    QueryCode.LEN: commands.query_len(b"m"),
    QueryCode.RANGE: commands.query_range(b"m", b"k", 10, 1000, 5),
    QueryCode.MAPS: commands.query_maps(),
    QueryCode.LOCK_INFO: commands.query_lock(b"lock"),
    QueryCode.LOCK_LIST: commands.query_locks(),
    QueryCode.ACQUISITION: commands.query_acquisition(b"lock", 1, 2),
    QueryCode.MEMBERS: commands.query_members(),
    QueryCode.IDS_INFO: commands.query_ids_info(b"orders"),
    QueryCode.IDS_OWNER: commands.query_ids_owner(b"orders", 0, 5),
    QueryCode.IDS_LIST: commands.query_ids_list(),
    QueryCode.TX_STATE: commands.query_tx_state(NONCE),
    QueryCode.TX_LIST: commands.query_tx_list(NONCE, 10, True),
    QueryCode.TX_HEURISTICS: commands.query_tx_heuristics((NONCE, b"branch"), 10),
    QueryCode.TIME: commands.query_time(),
    QueryCode.TX_READ: commands.query_tx_read(b"map", b"key", [commands.key_is_at(b"map", b"key", 3)]),
    QueryCode.TX_CLOCK: commands.query_tx_clock(),
    QueryCode.SERVICES: commands.query_services("inventory", ("inventory", 3), 10),
}
LIMITS = Limits()


def test_every_operation_has_a_builder_whose_result_is_accepted() -> None:
    """What the builders make is what the decoder takes, for all numbers there are."""
    assert set(OpCode) == set(OPERATIONS)
    assert {code: commands.decode_operation(data, LIMITS)[0] for code, data in OPERATIONS.items()} == {
        code: code.value for code in OpCode
    }


def test_every_query_has_a_builder_whose_result_is_accepted() -> None:
    """The same for queries."""
    assert set(QueryCode) == set(QUERIES)
    assert {code: commands.decode_query(data, LIMITS)[0] for code, data in QUERIES.items()} == {
        code: code.value for code in QueryCode
    }


def test_numbers_of_operations_are_what_old_logs_hold() -> None:
    """Disk: a number is never given another meaning."""
    assert {code.name: code.value for code in OpCode} == {
        "SESSION_OPEN": 1,
        "SESSION_CLOSE": 2,
        "SESSION_EXPIRE": 3,
        "SESSION_CHECKPOINT": 4,
        "RECORD_DISK": 8,
        "BEGIN_EPOCH": 9,
        "ACQUIRE": 16,
        "RELEASE": 17,
        "BREAK": 18,
        "MAP_PUT": 32,
        "MAP_INSERT": 33,
        "MAP_SETDEFAULT": 34,
        "MAP_DELETE": 35,
        "MAP_POP": 36,
        "MAP_POPITEM": 37,
        "MAP_UPDATE": 38,
        "MAP_CLEAR": 39,
        "MAP_COMPARE_AND_SET": 40,
        "IDS_LEASE": 48,
        "IDS_RENEW": 49,
        "IDS_RETURN": 50,
        "IDS_SKIP": 51,
        "TX_DECIDE": 64,
        "TX_RESOLVE": 65,
        "TX_FORGET": 66,
        "TX_HEURISTIC": 67,
        "TX_SKIP": 68,
        "SERVICE_REGISTER": 72,
        "SERVICE_UNREGISTER": 73,
    }


def test_every_number_is_in_the_document() -> None:
    """docs/formats-machine.md is complete: operations, and blocks of snapshots."""
    text = (Path(__file__).parents[2] / "docs" / "formats-machine.md").read_text()
    for code in (*OpCode, *Block):
        assert f"\n| {code.value} | {code.name} |" in text


def test_entry_header_is_thirty_three_bytes() -> None:
    """Disk: the layout of an entry, byte by byte."""
    data = commands.pack_entry(1, 2, 3, 4, b"operation")
    assert data == bytes.fromhex(
        "01" + "0000000000000001 0000000000000002 0000000000000003 0000000000000004"
    ) + (b"operation")
    assert commands.unpack_entry(data) == (1, 2, 3, 4, b"operation")


@pytest.mark.parametrize("data", [b"", b"\x01" * 32, b"\x02" + bytes(40), bytes(40)])
def test_entry_of_another_format_stops_the_node(data: bytes) -> None:
    """A member stops before what it cannot read."""
    with pytest.raises(UnknownCommand):
        commands.unpack_entry(data)


def test_operation_of_an_unknown_number_stops_the_node() -> None:
    """A member stops before a command it does not know."""
    with pytest.raises(UnknownCommand) as caught:
        commands.decode_operation(encode([999, b"x"]), LIMITS)
    assert caught.value.number == 999


def test_only_the_leaders_own_operations_are_internal() -> None:
    """A client may not expire sessions, nor record disks."""
    internal = {code for code, data in OPERATIONS.items() if commands.is_internal(data)}
    assert {
        OpCode.SESSION_EXPIRE,
        OpCode.SESSION_CHECKPOINT,
        OpCode.RECORD_DISK,
        OpCode.BEGIN_EPOCH,
    } == internal


@pytest.mark.parametrize("prefix", [b"\x82\x18\x03", b"\x82\x19\x00\x03", b"\x82\x1b" + bytes(7) + b"\x03"])
def test_internal_operations_cannot_be_disguised_by_another_encoding(prefix: bytes) -> None:
    """Whatever decodes to an internal number is internal, however it is spelt."""
    operation = prefix + encode([5])
    assert commands.decode_operation(operation, LIMITS) == [3, [5]]
    assert commands.is_internal(operation)


@pytest.mark.parametrize(
    "data", [b"", b"\x81", b"\x80\x01", b"\x98\x02\x03\x80", b"\xa1\x01\x02", b"\x83\x18"]
)
def test_what_is_no_operation_counts_as_internal(data: bytes) -> None:
    """In doubt, a client's request is refused."""
    assert commands.is_internal(data)


@pytest.mark.parametrize(
    "operation",
    [
        b"",
        b"\xff",
        encode([]),
        encode([True, b"x"]),
        encode({}),
        encode(7),
        encode([OpCode.MAP_PUT.value]),
        encode([OpCode.MAP_PUT.value, b"m", b"k", b"v", None, None]),
        encode([OpCode.MAP_PUT.value, "m", b"k", b"v", None]),
        encode([OpCode.MAP_PUT.value, b"m", 1, b"v", None]),
        encode([OpCode.MAP_PUT.value, b"m", b"k", None, None]),
        encode([OpCode.MAP_PUT.value, b"m", b"k", b"v", [b"lock"]]),
        encode([OpCode.MAP_PUT.value, b"m", b"k", b"v", [b"lock", -1]]),
        encode([OpCode.MAP_PUT.value, b"m", b"k", b"v", [b"lock", True]]),
        encode([OpCode.MAP_UPDATE.value, b"m", [b"k"], None]),
        encode([OpCode.MAP_UPDATE.value, b"m", [[b"k", b"v"]], None]),
        encode([OpCode.ACQUIRE.value, b"lock", 1]),
        encode([OpCode.RELEASE.value, b"lock", 1 << 63]),
        encode([OpCode.SESSION_OPEN.value, b"short", 1000, "x"]),
        encode([OpCode.SESSION_OPEN.value, NONCE, 1000, b"x"]),
        b"\x84\x01\x50" + NONCE + b"\x19\x03\xe8\x63\xed\xa0\x80",
        encode([OpCode.SESSION_EXPIRE.value, [1, "2"]]),
        encode([OpCode.SESSION_EXPIRE.value, 1]),
        encode([OpCode.SESSION_CHECKPOINT.value, [[1, -2]]]),
        encode([OpCode.SESSION_CHECKPOINT.value, [[1]]]),
        encode([OpCode.SESSION_CHECKPOINT.value, {}]),
        encode([OpCode.BEGIN_EPOCH.value, 1 << 15]),
        encode([OpCode.IDS_LEASE.value, b"n", [41, 12, 10, 1, 0], 1000]),
        encode([OpCode.IDS_LEASE.value, b"n", [41, 12, 10, 1, 0, True], 1000]),
        encode([OpCode.IDS_LEASE.value, b"n", "layout", 1000]),
        encode([OpCode.IDS_RENEW.value, b"n", -1, 1, 1000]),
    ],
)
def test_malformed_operations_are_a_protocol_error(operation: bytes) -> None:
    """Shapes that no builder makes."""
    with pytest.raises(RemoteProtocolError):
        commands.decode_operation(operation, LIMITS)


@pytest.mark.parametrize(
    ("limit", "make"),
    [
        ("name_size_bytes_max", lambda size: commands.map_clear(b"n" * size)),
        ("name_size_bytes_max", lambda size: commands.acquire(b"n" * size)),
        ("name_size_bytes_max", lambda size: commands.open_session(NONCE, 1000, "n" * size)),
        ("name_size_bytes_max", lambda size: commands.map_delete(b"m", b"k", (b"n" * size, 1))),
        ("key_size_bytes_max", lambda size: commands.map_delete(b"m", b"k" * size)),
        ("key_size_bytes_max", lambda size: commands.map_update(b"m", [(b"k" * size, b"v")])),
        ("value_size_bytes_max", lambda size: commands.map_put(b"m", b"k", b"v" * size)),
        ("value_size_bytes_max", lambda size: commands.map_compare_and_set(b"m", b"k", None, b"v" * size)),
        ("ids_window_ms_max", lambda size: commands.ids_lease(b"n", LAYOUT, size)),
        ("ids_window_ms_max", lambda size: commands.ids_renew(b"n", 0, 1, size)),
        ("update_pairs_max", lambda size: commands.map_update(b"m", [(b"%d" % n, b"") for n in range(size)])),
    ],
)
def test_limit_itself_is_allowed_and_one_more_is_refused_by_name(
    limit: str, make: Callable[[int], bytes]
) -> None:
    """Limits are inclusive, and the error names the one that was hit."""
    limits = Limits()._replace(**{limit: 150})
    commands.decode_operation(make(150), limits)
    with pytest.raises(QuotaExceeded) as caught:
        commands.decode_operation(make(151), limits)
    assert (limit, 150, 151) == (caught.value.limit, caught.value.maximum, caught.value.wanted)


def test_an_owner_is_measured_in_bytes() -> None:
    """Sizes are those of the UTF-8 form."""
    limits = Limits(name_size_bytes_max=10)
    commands.decode_operation(commands.open_session(NONCE, 1000, "éé" * 2 + "ab"), limits)
    with pytest.raises(QuotaExceeded):
        commands.decode_operation(commands.open_session(NONCE, 1000, "éé" * 3), limits)


def test_an_entry_too_large_is_refused_before_it_is_decoded() -> None:
    """The limit on the whole operation comes first."""
    with pytest.raises(QuotaExceeded) as caught:
        commands.decode_operation(b"\xff" * 101, Limits(entry_size_bytes_max=100))
    assert caught.value.limit == "entry_size_bytes_max"


@pytest.mark.parametrize(
    "operation",
    [
        commands.acquire(b""),
        commands.map_clear(b""),
        commands.open_session(NONCE, 1, "x"),
        commands.ids_lease(b"n", (0, 12, 10, 1, 0, 1), 1000),
        commands.ids_lease(b"n", (64, 12, 10, 1, 0, 1), 1000),
        commands.ids_lease(b"n", (1, 53, 10, 1, 0, 1), 1000),
        commands.ids_lease(b"n", (41, 12, 10, 0, 0, 1), 1000),
        commands.ids_lease(b"n", (41, 12, 10, 10_001, 0, 1), 1000),
        commands.ids_lease(b"n", (41, 12, 10, 1, 1 << 48, 1), 1000),
        commands.ids_lease(b"n", (41, 12, 10, 1, 0, 2), 1000),
        commands.ids_lease(b"n", LAYOUT, 0),
        commands.ids_renew(b"n", 0, 1, 0),
        commands.ids_skip(1 << 48),
    ],
)
def test_values_out_of_range_are_the_callers_mistake(operation: bytes) -> None:
    """Well formed, but not allowed: an empty name, a TTL too short, ids without time."""
    with pytest.raises(UsageError):
        commands.decode_operation(operation, LIMITS)


def test_every_error_comes_back_in_its_own_class() -> None:
    """A reply raises what the machine meant, with its numbers, and it can be pickled."""
    classes = [getattr(errors, name) for name in errors.__all__]
    for kind in [item for item in classes if isinstance(item, type)] + [StaleRequest, UnknownCommand]:
        error = commands.error_reply(commands.encode_error(kind("what to do", limit="x", maximum=3)))
        assert error is not None
        assert type(error) is kind
        assert (error.message, error.maximum) == ("what to do", 3)
        assert type(pickle.loads(pickle.dumps(error))) is kind


def test_error_of_a_newer_version_allows_no_conclusion() -> None:
    """An unknown code is indeterminate, because nothing else would be safe."""
    with pytest.raises(IndeterminateError) as caught:
        commands.decode_reply(encode(["novel", "something new", {"x": 1}]))
    assert caught.value.unknown_code == "novel"


def test_details_without_a_cbor_form_become_text() -> None:
    """Whatever an error carries, its reply can be encoded."""
    error = commands.error_reply(commands.encode_error(KeyExists("there", keys=[1, 2])))
    assert error is not None and error.keys == "[1, 2]"


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        encode([]),
        encode([1]),
        encode([False]),
        encode(["quota", "x"]),
        encode(["quota", b"x", {}]),
        encode(["quota", "x", {"message": 1}]),
        encode(["quota", "x", {"self": 1}]),
        encode(["quota", "x", {1: 1}]),
        encode(["quota", "x", []]),
    ],
)
def test_what_is_no_reply_is_a_protocol_error(reply: bytes) -> None:
    """Bytes from a peer never raise anything else."""
    with pytest.raises(RemoteProtocolError):
        commands.decode_reply(reply)


def test_success_replies_are_no_errors() -> None:
    """`error_reply` tells the two kinds apart."""
    assert commands.error_reply(encode([0, 7])) is None
    assert isinstance(commands.error_reply(encode(["quota", "x", {}])), CoordError)
