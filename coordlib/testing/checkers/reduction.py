"""Fewer operations that show the same: what is left out of an illegal history before a person reads it.

Only what cannot be the reason is left out: each removal here would keep a legal history legal. (Leaving out a
write whose value is read would make illegal histories of legal ones, and tell of a bug that is not there.)

What must not live here: words (`explanation`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from coordlib.testing.checkers.models import Model, frozen
from coordlib.testing.checkers.search import find_order
from coordlib.testing.history import LOCK_OPS, Operation

__all__ = ["reduced", "takes_part"]

_STEPS_MAX: Final = 50_000  # of one search; one that needs more counts as not illegal
_STEPS_ALL_MAX: Final = 1_000_000


def takes_part(operation: Operation) -> bool:
    """
    Whether an operation can make a difference.

    What failed did not happen. A get that nobody knows the answer of has no effect, and a renew that may have
    happened only makes a lease longer, which nothing can need.
    """
    return operation.status == "ok" or (operation.status is None and operation.op not in ("get", "renew"))


def reduced(model: Model, operations: list[Operation], is_late: Callable[[], bool]) -> list[Operation]:
    """
    Some of the operations of an illegal history that are illegal for a reason that it has too.

    Args:
        operations: Of one key, sorted by call, all taking part, explained by no order.
        is_late: True ends the work early; the result is right then too, only longer.
    """
    steps_left = _STEPS_ALL_MAX

    def is_illegal(candidates: list[Operation]) -> bool:
        nonlocal steps_left
        if steps_left <= 0:
            return False
        found = find_order(model, model.steps(candidates), steps_max=_STEPS_MAX, is_late=is_late)
        steps_left -= found.steps + len(candidates)
        return found.result == "illegal"

    operations = _first_illegal_prefix(operations, is_illegal)
    rest = _lock_rest if operations[0].op in LOCK_OPS else _register_rest
    is_smaller = True
    while is_smaller:
        is_smaller = False
        groups = rest(operations)
        size = len(groups)
        while size:
            place = 0
            while place < len(groups):
                left_out = {id(operation) for group in groups[place : place + size] for operation in group}
                shorter = [operation for operation in operations if id(operation) not in left_out]
                if shorter and is_illegal(shorter):
                    operations = shorter
                    del groups[place : place + size]
                    is_smaller = True
                else:
                    place += size
            size //= 2
    return operations


def _first_illegal_prefix(
    operations: list[Operation], is_illegal: Callable[[list[Operation]], bool]
) -> list[Operation]:
    """The history up to the first return after which it was illegal; what had not returned is unknown."""
    ends = sorted({operation.return_ns for operation in operations if operation.return_ns is not None})
    low, high = 0, len(ends) - 1
    shortest = operations
    while low < high:
        middle = (low + high) // 2
        prefix = _prefix(operations, ends[middle])
        if is_illegal(prefix):
            high, shortest = middle, prefix
        else:
            low = middle + 1
    return shortest


def _prefix(operations: list[Operation], end_ns: int) -> list[Operation]:
    prefix = []
    for operation in operations:
        if operation.call_ns > end_ns:
            break
        if operation.return_ns is not None and operation.return_ns > end_ns:
            operation = operation._replace(output=None, return_ns=None, status=None)
        if takes_part(operation):
            prefix.append(operation)
    return prefix


def _register_rest(operations: list[Operation]) -> list[list[Operation]]:
    """
    Operations that may be left out, each in a group of its own.

    Without a read, or a swap that failed, everything else can still be ordered as before. So it can without a
    write, if nothing that is left can have looked at the register between it and the next write.
    """
    groups = [
        [o] for o in operations if o.status == "ok" and (o.op == "get" or (o.op == "cas" and not o.output))
    ]
    looked_for: dict[Any, int] = {}
    for operation in operations:
        if operation.op == "append" or (operation.op == "delete" and operation.output is not None):
            return groups
        if operation.op == "get":
            value = frozen(operation.output)
        elif operation.op == "cas" and (operation.status is None or operation.output):
            value = frozen(operation.input[0])
        elif operation.op == "cas":
            return groups
        else:
            continue
        looked_for[value] = looked_for.get(value, 0) + 1
    for operation in operations:
        if operation.op == "get":
            continue
        value = frozen(operation.input[1] if operation.op == "cas" else operation.input)
        if value not in looked_for:
            groups.append([operation])
    return groups


def _lock_rest(operations: list[Operation]) -> list[list[Operation]]:
    """
    Operations that may be left out, in groups: refusals, renewals, and all that was done with one token.

    A grant is left out with all of its token only if no refused acquire is left, which may need its holder.
    """
    groups = []
    of_token: dict[int, list[Operation]] = {}
    accepted = set()
    is_any_refused = False
    for operation in operations:
        is_refused = operation.status == "ok" and not operation.output["ok"]
        if is_refused or (operation.op == "renew"):
            groups.append([operation])
        if operation.op != "acquire":
            of_token.setdefault(operation.input["token"], []).append(operation)
            if not is_refused:
                accepted.add(operation.input["token"])
        elif is_refused:
            is_any_refused = True
        elif operation.status == "ok":
            of_token.setdefault(operation.output["token"], []).append(operation)
    if is_any_refused:
        return groups
    granted = {o.output["token"] for o in operations if o.op == "acquire" and o.status == "ok"}
    groups += [group for token, group in of_token.items() if token in granted]
    if accepted <= granted:
        groups += [[o] for o in operations if o.op == "acquire" and o.status is None]
    return groups
