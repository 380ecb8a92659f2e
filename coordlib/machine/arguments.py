"""The arguments of operations and queries: which values are taken, without knowing the state.

Each check takes a decoded value and the limits, and raises: `RemoteProtocolError` for what no builder makes,
`UsageError` for a value out of its range, `QuotaExceeded` for one larger than its limit, `UnknownCommand` for a kind
that a newer version added.

What must not live here: which command takes which arguments (see `commands`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from coordlib.errors import FatalError, RemoteProtocolError, UsageError
from coordlib.machine.limits import Limits, exceeded

__all__ = [
    "UINT_MAX",
    "Check",
    "UnknownCommand",
    "branch_name",
    "code",
    "epoch",
    "gtid_or_empty",
    "guard",
    "identity16",
    "ids",
    "instant",
    "layout",
    "listed",
    "malformed",
    "map_key",
    "map_value",
    "name",
    "optional",
    "pairs",
    "record",
    "remaining",
    "reserved",
    "text",
    "truth",
    "ttl",
    "uint",
    "variant",
    "window",
    "word",
]

UINT_MAX = (1 << 63) - 1


class UnknownCommand(FatalError):
    """
    The log holds a command of a newer version. It has not been applied; upgrade this member, then restart
    it.
    """

    code = "unknown-command"


Check: TypeAlias = Callable[[Any, Limits], object]


def malformed(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"malformed command or query: {what}")


def code(value: Any, _limits: Limits) -> None:
    """The number itself: looked at before its arguments are."""


def uint(value: Any, _limits: Limits) -> None:
    if type(value) is not int or not 0 <= value <= UINT_MAX:
        raise malformed("not an unsigned integer")


def truth(value: Any, _limits: Limits) -> None:
    if type(value) is not bool:
        raise malformed("not a truth value")


def name(value: Any, limits: Limits) -> None:
    if type(value) is not bytes:
        raise malformed("a name must be bytes")
    if not value:
        raise UsageError("a name must not be empty")
    if len(value) > limits.name_size_bytes_max:
        raise exceeded("name_size_bytes_max", limits.name_size_bytes_max, len(value))


def map_key(value: Any, limits: Limits) -> None:
    if type(value) is not bytes:
        raise malformed("a key must be bytes")
    if len(value) > limits.key_size_bytes_max:
        raise exceeded("key_size_bytes_max", limits.key_size_bytes_max, len(value))


def map_value(value: Any, limits: Limits) -> None:
    if type(value) is not bytes:
        raise malformed("a value must be bytes")
    if len(value) > limits.value_size_bytes_max:
        raise exceeded("value_size_bytes_max", limits.value_size_bytes_max, len(value))


def text(value: Any, limits: Limits) -> None:
    if type(value) is not str:
        raise malformed("not text")
    # A character is at most four bytes; the exact size is worth computing only for long ones.
    if 4 * len(value) > limits.name_size_bytes_max:
        size = len(value.encode("utf-8", "surrogatepass"))
        if size > limits.name_size_bytes_max:
            raise exceeded("name_size_bytes_max", limits.name_size_bytes_max, size)


def optional(check: Check) -> Check:
    def check_optional(value: Any, limits: Limits) -> None:
        if value is not None:
            check(value, limits)

    return check_optional


def guard(value: Any, limits: Limits) -> None:
    if value is None:
        return
    if type(value) is not list or len(value) != 2:
        raise malformed("a guard must be a lock and a token")
    name(value[0], limits)
    uint(value[1], limits)


def pairs(value: Any, limits: Limits) -> None:
    if type(value) is not list or len(value) % 2:
        raise malformed("keys and values must come in pairs")
    if len(value) > 2 * limits.update_pairs_max:
        raise exceeded("update_pairs_max", limits.update_pairs_max, len(value) // 2)
    for key in value[::2]:
        map_key(key, limits)
    for item in value[1::2]:
        map_value(item, limits)


def identity16(value: Any, _limits: Limits) -> None:
    if type(value) is not bytes or len(value) != 16:
        raise malformed("an identity must be 16 bytes")


def ttl(value: Any, limits: Limits) -> None:
    uint(value, limits)
    if not limits.session_ttl_ms_min <= value <= limits.session_ttl_ms_max:
        raise UsageError(
            f"a TTL must be {limits.session_ttl_ms_min} to {limits.session_ttl_ms_max} ms, not {value}"
        )


def ids(value: Any, limits: Limits) -> None:
    if type(value) is not list:
        raise malformed("not a list of sessions")
    for item in value:
        uint(item, limits)


def remaining(value: Any, limits: Limits) -> None:
    if type(value) is not list:
        raise malformed("not a list of remaining times")
    for item in value:
        if type(item) is not list or len(item) != 2 or type(item[1]) is not int:
            raise malformed("not a session and its remaining time")
        uint(item[0], limits)
        if not -1 <= item[1] <= limits.session_ttl_ms_max:
            raise malformed("remaining time out of range")


def epoch(value: Any, limits: Limits) -> None:
    uint(value, limits)
    if value >= 1 << 15:
        raise malformed("a restore epoch has 15 bits")


def layout(value: Any, limits: Limits) -> None:
    if type(value) is not list or len(value) != 6:
        raise malformed("a layout must be six numbers")
    for item in value:
        uint(item, limits)
    time_bits, sequence_bits, worker_bits, unit_ms, epoch_ms, worker_is_lowest = value
    if not 1 <= time_bits <= 63 or sequence_bits + worker_bits > 62:
        raise UsageError(
            f"a layout needs 1 to 63 bits of time, not {time_bits}, and at most 62 of sequence and worker, "
            f"not {sequence_bits} and {worker_bits}"
        )
    if not 1 <= unit_ms <= 10_000 or worker_is_lowest > 1:
        raise UsageError(f"a layout's unit must be 1 to 10000 ms, not {unit_ms}; its order 0 or 1")
    instant(epoch_ms, limits)


def instant(value: Any, limits: Limits) -> None:
    uint(value, limits)
    if value >= 1 << 48:
        raise UsageError(f"{value} ms since 1970 is past the year 9999: is the unit right?")


def listed(check: Check, limit: str) -> Check:
    """A list of at most as many as the limit of that name says."""

    def check_listed(value: Any, limits: Limits) -> None:
        if type(value) is not list:
            raise malformed("not a list")
        maximum = getattr(limits, limit)
        if len(value) > maximum:
            raise exceeded(limit, maximum, len(value))
        for item in value:
            check(item, limits)

    return check_listed


def record(*checks: Check) -> Check:
    """A list with exactly these items."""

    def check_record(value: Any, limits: Limits) -> None:
        if type(value) is not list or len(value) != len(checks):
            raise malformed(f"not a list of {len(checks)}")
        for check, item in zip(checks, value, strict=True):
            check(item, limits)

    return check_record


def variant(*checks: Check) -> Check:
    """A list that begins with its kind: 0 is laid out as the first of `checks` says, 1 as the second, ..."""

    def check_variant(value: Any, limits: Limits) -> None:
        if type(value) is not list or not value:
            raise malformed("not a list that begins with a kind")
        uint(value[0], limits)
        if value[0] >= len(checks):
            raise UnknownCommand(
                f"part of kind {value[0]} of a command is not known to this version: upgrade coordlib on this node",
                number=value[0],
            )
        checks[value[0]](value, limits)

    return check_variant


def reserved(value: Any, _limits: Limits) -> None:
    """What a newer version may put there is not skipped: the members would differ."""
    if type(value) is not list:
        raise malformed("not a list")
    if value:
        raise UnknownCommand(
            "a command has an extension that this version does not know: upgrade coordlib on this node"
        )


def gtid_or_empty(value: Any, limits: Limits) -> None:
    if value != b"":
        identity16(value, limits)


def word(value: Any, limits: Limits) -> None:
    text(value, limits)
    if not value:
        raise UsageError("a name must not be empty")


def branch_name(value: Any, _limits: Limits) -> None:
    if type(value) is not bytes or not 1 <= len(value) <= 64:
        raise malformed("a branch's name must be 1 to 64 bytes")


def window(value: Any, limits: Limits) -> None:
    uint(value, limits)
    if value == 0:
        raise UsageError("a window must be at least 1 ms")
    if value > limits.ids_window_ms_max:
        raise exceeded("ids_window_ms_max", limits.ids_window_ms_max, value)
