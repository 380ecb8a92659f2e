"""Histories survive being written and read, and nothing that is wrong in one is read as something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordlib.testing.history import HistoryError, HistoryWriter, Operation, load

PUT = {"client": "a", "op": "put", "key": "x", "input": 1, "call_ns": 5}


def _example(writer: HistoryWriter) -> None:
    """One of each kind, in overlapping calls; `u` has ended neither way."""
    first = writer.invoke("a", "put", "x", {"n": [1, None, "ü"]}, 10)
    swap = writer.invoke("b", "cas", "x", [None, 2], 11)
    writer.ok(first, None, 12)
    writer.invoke("u", "append", "x", 3, 13)
    writer.fail(swap, 14)
    for op, given, answer in (
        ("get", None, [1]),
        ("delete", None, True),
        ("acquire", {"owner": "a", "ttl_ns": None}, {"ok": True, "token": 7}),
        ("acquire", {"owner": "a", "ttl_ns": 5}, {"ok": False, "token": None}),
        ("renew", {"token": 7}, {"ok": True}),
        ("release", {"token": 7}, {"ok": False}),
    ):
        writer.ok(writer.invoke("a", op, "x", given, 20), answer, 21)


def test_what_was_dumped_is_loaded(tmp_path: Path) -> None:
    """All operations come back equal, in the order of their calls."""
    writer = HistoryWriter()
    _example(writer)
    writer.dump(tmp_path / "h")
    assert load(tmp_path / "h") == writer.operations
    assert [o.status for o in writer.operations[:3]] == ["ok", "fail", None]


def test_what_is_written_as_it_happens_is_loaded_after_every_line(tmp_path: Path) -> None:
    """A process may be killed at any time: what it had announced and not ended is unknown, the rest as it was."""
    writer = HistoryWriter(tmp_path / "all")
    _example(writer)
    writer.close()
    assert load(tmp_path / "all") == writer.operations
    lines = (tmp_path / "all").read_bytes().splitlines(keepends=True)
    assert len(lines) == 17
    calls = 0
    for count in range(len(lines)):
        (tmp_path / "part").write_bytes(b"".join(lines[:count]))
        operations = load(tmp_path / "part")
        assert len(operations) in (calls, calls + 1)
        calls = len(operations)
        for operation in operations:
            assert operation in writer.operations or operation.status is None


def test_equal_announcements_of_one_client_are_told_apart(tmp_path: Path) -> None:
    """A client that gave up may ask the same again at the same instant: one is ended, the other stays unknown."""
    writer = HistoryWriter(tmp_path / "stream")
    writer.invoke("a", "put", "x", 1, 5)
    writer.ok(writer.invoke("a", "put", "x", 1, 5), None, 6)
    writer.close()
    writer.dump(tmp_path / "dump")
    for name in ("stream", "dump"):
        assert sorted(o.return_ns or 0 for o in load(tmp_path / name)) == [0, 6]


def test_files_of_several_processes_are_one_history(tmp_path: Path) -> None:
    """They are merged by time; an end in one file is not taken for that of another file's operation."""
    (tmp_path / "a").write_text(json.dumps(PUT | {"call_ns": 7}) + "\n")
    (tmp_path / "b").write_text(
        json.dumps(PUT | {"call_ns": 7, "return_ns": 8, "status": "ok"}) + "\n\n" + json.dumps(PUT) + "\n"
    )
    assert [(o.call_ns, o.return_ns) for o in load(tmp_path / "a", tmp_path / "b")] == [
        (5, None),
        (7, None),
        (7, 8),
    ]


def test_a_line_may_leave_out_what_it_does_not_know(tmp_path: Path) -> None:
    """Without return_ns the outcome is unknown, whatever is said beside it; with it, it is ok unless it failed."""
    path = tmp_path / "h"
    for more, expected in (
        ({}, (None, None)),
        ({"return_ns": None, "status": None, "output": None}, (None, None)),
        ({"return_ns": 9, "status": "unknown"}, (None, None)),
        ({"return_ns": 9}, (9, "ok")),
        ({"return_ns": 9, "status": "ok", "output": None}, (9, "ok")),
        ({"return_ns": 9, "status": "fail"}, (9, "fail")),
        ({"status": "fail"}, (None, "fail")),
    ):
        path.write_text(json.dumps(PUT | more))
        (operation,) = load(path)
        assert (operation.return_ns, operation.status) == expected
    path.write_text(json.dumps(PUT | {"client": 3}))
    assert load(path)[0].client == "3"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"retrun_ns": 3}, "unknown key 'retrun_ns'"),
        ({"op": None}, "unknown op None"),
        ({"op": "puts"}, "unknown op 'puts'"),
        ({"key": 1}, "key is not a string: 1"),
        ({"client": [1]}, "client is not a string"),
        ({"call_ns": "5"}, "call_ns is not a whole number"),
        ({"call_ns": 1.5}, "call_ns is not a whole number"),
        ({"call_ns": True}, "call_ns is not a whole number"),
        ({"return_ns": 4}, "return_ns is not a whole number of at least call_ns"),
        ({"return_ns": 6, "status": "done"}, "status is neither"),
        ({"status": "ok"}, "there is no return_ns"),
        ({"input": None}, "the input of put is not a value"),
        ({"return_ns": 6, "output": False}, "the output of put is not null"),
        ({"op": "get"}, "the input of get is not null: 1"),
        ({"op": "cas", "input": [1]}, "the input of cas is not [old, new]"),
        ({"op": "cas", "input": [1, 2], "return_ns": 6}, "the output of cas is not a bool: None"),
        ({"op": "acquire", "input": {}}, "the input of acquire is not"),
        ({"op": "acquire", "input": {"owner": "a", "ttl": 5}}, "the input of acquire is not"),
        ({"op": "acquire", "input": {"owner": "a", "ttl_ns": -5}}, "the input of acquire is not"),
        ({"op": "acquire", "input": {"owner": "a"}, "return_ns": 6}, "the output of acquire is not"),
        (
            {"op": "acquire", "input": {"owner": "a"}, "return_ns": 6, "output": {"ok": True, "token": None}},
            "acquire answered ok without a token",
        ),
        ({"op": "release", "input": {"token": None}}, "the input of release is not"),
        (
            {"op": "renew", "input": {"token": 1}, "return_ns": 6, "output": True},
            "the output of renew is not",
        ),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path: Path, line: Any, said: str) -> None:
    """Nothing is guessed: a wrong key would else turn an answer into an unknown outcome, and hide a violation."""
    path = tmp_path / "h"
    text = line if isinstance(line, str) else json.dumps(PUT | line)
    path.write_text(json.dumps(PUT) + "\n" + text + "\n")
    with pytest.raises(HistoryError) as caught:
        load(path)
    assert f"{path}, line 2: " in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize("key", ["client", "op", "key", "call_ns"])
def test_a_line_must_say_who_did_what_and_when(tmp_path: Path, key: str) -> None:
    """The other keys may be missing."""
    (tmp_path / "h").write_text(json.dumps({k: v for k, v in PUT.items() if k != key}))
    with pytest.raises(HistoryError, match=f"line 1: '{key}' is missing"):
        load(tmp_path / "h")


def test_a_torn_last_line_is_an_error(tmp_path: Path) -> None:
    """Half a line is no operation, and no reason to forget one."""
    (tmp_path / "h").write_text(json.dumps(PUT) + "\n" + json.dumps(PUT)[:-9])
    with pytest.raises(HistoryError, match="line 2: not JSON"):
        load(tmp_path / "h")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """As an error of the caller, not as an empty history."""
    with pytest.raises(HistoryError, match="nowhere: No such file"):
        load(tmp_path / "nowhere")


def test_the_writer_refuses_what_is_no_operation() -> None:
    """And notes nothing then."""
    writer = HistoryWriter()
    with pytest.raises(ValueError, match="unknown op"):
        writer.invoke("a", "push", "x", 1, 0)
    with pytest.raises(ValueError, match="input of put"):
        writer.invoke("a", "put", "x", None, 0)
    assert writer.operations == []
    token = writer.invoke("a", "cas", "x", [1, 2], 5)
    with pytest.raises(ValueError, match="output of cas"):
        writer.ok(token, 1, 6)
    with pytest.raises(ValueError, match="return_ns"):
        writer.ok(token, True, 4)
    writer.ok(token, True, 6)
    with pytest.raises(ValueError, match="has ended before"):
        writer.fail(token, 7)
    assert writer.operations == [Operation("a", "cas", "x", [1, 2], True, 5, 6, "ok")]
