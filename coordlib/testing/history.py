"""Histories: who asked for what, when, and what was answered; written by tests, judged by `coordlib.testing.checkers`.

A history is a file of JSON lines, one operation a line, the same from simulated and from real processes::

    {"client": "a-1", "op": "cas", "key": "x", "input": [1, 2], "output": true,
     "call_ns": 12000000, "return_ns": 15000000, "status": "ok"}

==========  =========================================  ==================================================
op          input                                      output
==========  =========================================  ==================================================
put         the value (not null)                       null
get         null                                       the value; null: the key is missing
cas         [old, new]; null stands for missing        bool: whether it was swapped
append      what is added at the end                   null
delete      null                                       null, or a bool: whether there was a value
acquire     {"owner": name, "ttl_ns": int or null}     {"ok": bool, "token": int or null}
renew       {"token": int}                             {"ok": bool}
release     {"token": int}                             {"ok": bool}
==========  =========================================  ==================================================

`status` "ok" means that `output` was answered; "fail" that the operation certainly did not happen. Without
`return_ns` nobody knows: it may take effect at any time after its call, or never. A line without `return_ns`
also announces an operation: a later line *of the same file* with the same client, op, key, input and call_ns
tells how it ended. So a process may write what it is about to do before it does it, and be killed.

All times of one history are of one clock, in nanoseconds. A client does one thing at a time.

What must not live here: what is legal (see `coordlib.testing.checkers`).
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, NamedTuple

from coordlib.errors import UsageError

__all__ = ["LOCK_OPS", "REGISTER_OPS", "HistoryError", "HistoryWriter", "Operation", "Status", "load"]

Status = Literal["ok", "fail"]

REGISTER_OPS: Final = ("put", "get", "cas", "append", "delete")
LOCK_OPS: Final = ("acquire", "renew", "release")

_KEYS: Final = ("client", "op", "key", "input", "output", "call_ns", "return_ns", "status")
_KEYS_REQUIRED: Final = ("client", "op", "key", "call_ns")


class HistoryError(UsageError):
    """A history cannot be read. The message names the file, the line and what is wrong with it."""

    code = "bad-history"


class Operation(NamedTuple):
    """
    One operation of one client.

    `status` is "ok" (`output` was answered at `return_ns`), "fail" (it certainly did not happen) or None
    (nobody knows; then `return_ns` and `output` are None).
    """

    client: str
    op: str
    key: str
    input: Any
    output: Any
    call_ns: int
    return_ns: int | None
    status: Status | None


class HistoryWriter:
    """
    Keeps the operations of one process in memory and, if it is given a path, in a file as they happen.

    With a path, `invoke` returns after the operation's line was handed to the operating system, so that a
    killed process leaves every operation it began (a power cut may not). An operation that is never ended has
    an unknown outcome. May be used from several threads.

    Args:
        path: Is created, or emptied. Each process needs its own.

    Raises:
        OSError: From any method: the file cannot be written.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self._operations: list[Operation] = []
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        if path is not None:
            # Without a buffer of our own: a line is one write, which a kill does not tear.
            self._file = Path(path).open("wb", buffering=0)  # noqa: SIM115  # closed by close()

    def invoke(self, client: str, op: str, key: str, input: Any, call_ns: int) -> int:
        """
        Note that a client begins an operation; to be called before it is begun. Returns its number here.

        Raises:
            ValueError: This is no operation of a history; the message says why. Nothing was noted.
        """
        operation = Operation(client, op, key, input, None, call_ns, None, None)
        with self._lock:
            self._check(operation)
            self._operations.append(operation)
            self._write(operation)
            return len(self._operations) - 1

    def ok(self, token: int, output: Any, return_ns: int) -> None:
        """
        Note what an operation answered; to be called after it has ended.

        Raises:
            ValueError: The operation has ended before, or the output is none of this operation's.
        """
        self._end(token, output, return_ns, "ok")

    def fail(self, token: int, return_ns: int) -> None:
        """
        Note that an operation certainly did not happen and will not.

        Raises:
            ValueError: The operation has ended before.
        """
        self._end(token, None, return_ns, "fail")

    @property
    def operations(self) -> list[Operation]:
        """All operations so far, in the order of `invoke`; what has not ended has an unknown outcome."""
        with self._lock:
            return list(self._operations)

    def dump(self, path: Path | str) -> None:
        """Write all operations so far to another file. `load` gives the same operations."""
        operations = self.operations
        # What is unknown comes last: no later line can be mistaken for its end.
        ordered = sorted(operations, key=lambda operation: operation.status is None)
        Path(path).write_bytes(b"".join(_line(operation) for operation in ordered))

    def close(self) -> None:
        """Close the file, if there is one. Nothing may be noted afterwards."""
        with self._lock:
            if self._file is not None:
                self._file.close()

    def _end(self, token: int, output: Any, return_ns: int, status: Status) -> None:
        with self._lock:
            before = self._operations[token]
            if before.status is not None:
                raise ValueError(f"operation {token} has ended before: {before}")
            operation = before._replace(output=output, return_ns=return_ns, status=status)
            self._check(operation)
            self._operations[token] = operation
            self._write(operation)

    def _check(self, operation: Operation) -> None:
        wrong = _what_is_wrong(operation)
        if wrong:
            raise ValueError(f"{wrong}: {operation}")

    def _write(self, operation: Operation) -> None:
        if self._file is not None:
            self._file.write(_line(operation))


def load(*paths: Path | str) -> list[Operation]:
    """
    Read the operations of one or several files as one history, in the order of their calls.

    Args:
        paths: Files of one run, with times of one clock; for example one of each process.

    Raises:
        HistoryError: A line is not as the format says, or a file cannot be read. Names the line.
    """
    operations: list[Operation] = []
    for path in paths:
        operations += _load_file(Path(path))
    return sorted(operations, key=lambda operation: operation.call_ns)


def _load_file(path: Path) -> list[Operation]:
    operations: list[Operation] = []
    announced: dict[tuple[str, str, str, str, int], list[int]] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise HistoryError(f"{path}: {error.strerror or error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            operation = _parse(line)
        except ValueError as error:
            raise HistoryError(f"{path}, line {number}: {error}") from error
        identity = (operation.client, operation.op, operation.key, _text(operation.input), operation.call_ns)
        if operation.status is None:
            announced.setdefault(identity, []).append(len(operations))
        elif announced.get(identity):
            operations[announced[identity].pop()] = operation
            continue
        operations.append(operation)
    return operations


def _parse(line: bytes) -> Operation:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    for key in fields:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r}; known are {', '.join(_KEYS)}")
    for key in _KEYS_REQUIRED:
        if key not in fields:
            raise ValueError(f"{key!r} is missing")
    client, status, return_ns = fields["client"], fields.get("status"), fields.get("return_ns")
    if isinstance(client, int) and not isinstance(client, bool):
        client = str(client)
    if status == "unknown":
        # Nothing but another way to say it; when the client gave up waiting does not matter.
        status = return_ns = None
    elif status is None and return_ns is not None:
        status = "ok"
    elif status == "ok" and return_ns is None:
        raise ValueError("status is 'ok', but there is no return_ns")
    operation = Operation(
        client=client,
        op=fields["op"],
        key=fields["key"],
        input=fields.get("input"),
        output=fields.get("output") if status == "ok" else None,
        call_ns=fields["call_ns"],
        return_ns=return_ns,
        status=status,
    )
    wrong = _what_is_wrong(operation)
    if wrong:
        raise ValueError(wrong)
    return operation


def _line(operation: Operation) -> bytes:
    fields = operation._asdict()
    if operation.status is None:
        del fields["output"], fields["return_ns"], fields["status"]
    return _text(fields).encode() + b"\n"


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _what_is_wrong(operation: Operation) -> str:
    """What contradicts the table above, in words; empty if nothing does."""
    for name in ("client", "key"):
        if not isinstance(getattr(operation, name), str):
            return f"{name} is not a string: {getattr(operation, name)!r}"
    if operation.op not in REGISTER_OPS + LOCK_OPS:
        return f"unknown op {operation.op!r}; known are {', '.join(REGISTER_OPS + LOCK_OPS)}"
    if not _is_int(operation.call_ns, 0):
        return f"call_ns is not a whole number of at least 0: {operation.call_ns!r}"
    if operation.return_ns is not None and not _is_int(operation.return_ns, operation.call_ns):
        return f"return_ns is not a whole number of at least call_ns, {operation.call_ns}: {operation.return_ns!r}"
    if operation.status not in ("ok", "fail", None):
        return f"status is neither 'ok' nor 'fail': {operation.status!r}"
    return _wrong_input(operation) or (_wrong_output(operation) if operation.status == "ok" else "")


def _wrong_input(operation: Operation) -> str:
    op, value = operation.op, operation.input
    is_right = {
        "put": value is not None,
        "append": value is not None,
        "get": value is None,
        "delete": value is None,
        "cas": isinstance(value, list | tuple) and len(value) == 2,
        "acquire": _has(value, "owner", "ttl_ns")
        and isinstance(value.get("owner"), str | int)
        and (value.get("ttl_ns") is None or _is_int(value["ttl_ns"], 0)),
        "renew": _has(value, "token") and _is_int(value.get("token"), 0),
        "release": _has(value, "token") and _is_int(value.get("token"), 0),
    }[op]
    wanted = {
        "put": "a value that is not null",
        "append": "a value that is not null",
        "get": "null",
        "delete": "null",
        "cas": "[old, new]",
        "acquire": '{"owner", "ttl_ns"}',
        "renew": '{"token"}',
        "release": '{"token"}',
    }[op]
    return "" if is_right else f"the input of {op} is not {wanted}: {value!r}"


def _wrong_output(operation: Operation) -> str:
    op, value = operation.op, operation.output
    if op == "get":
        return ""
    if op in ("put", "append"):
        return "" if value in (None, True) else f"the output of {op} is not null: {value!r}"
    if op == "cas":
        return "" if isinstance(value, bool) else f"the output of cas is not a bool: {value!r}"
    if op == "delete":
        return "" if value is None or isinstance(value, bool) else f"not null or a bool: {value!r}"
    if op == "acquire":
        is_right = _has(value, "ok", "token") and isinstance(value.get("ok"), bool)
        if is_right and value["ok"] and not _is_int(value.get("token"), 0):
            return f"acquire answered ok without a token: {value!r}"
        return "" if is_right else f'the output of acquire is not {{"ok", "token"}}: {value!r}'
    is_right = _has(value, "ok") and isinstance(value.get("ok"), bool)
    return "" if is_right else f'the output of {op} is not {{"ok"}}: {value!r}'


def _has(value: Any, *keys: str) -> bool:
    """Whether the value is an object with no other than these keys."""
    return isinstance(value, dict) and all(key in keys for key in value)
