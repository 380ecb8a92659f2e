"""A checker too simple to be wrong, for histories of a few operations: every choice is tried.

Time goes on one by one; at each instant any of the operations under way may take effect. There is no memory, no
list, no earliest instant, and the objects are written anew.
"""

from __future__ import annotations

from typing import Any

from coordlib.testing.history import Operation

MISSING = "missing"


def is_register_legal(operations: list[Operation]) -> bool:
    """Whether a register that is sound could have answered so."""
    return _try([o for o in operations if o.status != "fail"], 0, MISSING, _register)


def is_lock_legal(operations: list[Operation]) -> bool:
    """
    Whether a sound lock could have answered so. Tokens are up to 7.

    The state is (holder or None, largest token, lease, since when).
    """
    given_up = [o for o in operations if o.op == "acquire" and not (o.status == "ok" and o.output["ok"])]

    def lock(state: Any, operation: Operation, now: int) -> list[Any]:
        return _lock(state, operation, now, given_up)

    return _try([o for o in operations if o.status != "fail"], 0, (None, -1, 0, 0), lock)


def _try(left: list[Operation], now: int, state: Any, model: Any) -> bool:
    if all(operation.status is None for operation in left):
        return True
    if any(operation.return_ns is not None and operation.return_ns < now for operation in left):
        return False
    for place, operation in enumerate(left):
        if operation.call_ns <= now:
            for after in model(state, operation, now):
                if _try(left[:place] + left[place + 1 :], now, after, model):
                    return True
    # Something is left that returns, at this instant or later; so this ends.
    return _try(left, now + 1, state, model)


def _register(state: Any, operation: Operation, _now: int) -> list[Any]:
    is_known = operation.status == "ok"
    if operation.op == "put":
        return [operation.input]
    if operation.op == "get":
        wanted = MISSING if operation.output is None else operation.output
        return [state] if not is_known or wanted == state else []
    if operation.op == "cas":
        old, new = (MISSING if value is None else value for value in operation.input)
        is_swapped = state == old
        if is_known and operation.output != is_swapped:
            return []
        return [new if is_swapped else state]
    if operation.op == "delete":
        if is_known and operation.output is not None and operation.output != (state != MISSING):
            return []
        return [MISSING]
    assert operation.op == "append"
    if state == MISSING:
        return [[operation.input]]
    return [[*state, operation.input]] if isinstance(state, list) else []


def _lock(state: Any, operation: Operation, now: int, given_up: list[Operation]) -> list[Any]:
    holder, largest, lease, since = state
    is_known = operation.status == "ok"
    states = [state]
    if holder is not None and now >= since + lease:
        states.append((None, largest, 0, 0))  # without a lease: it may have ended at any time
    after: list[Any] = []
    for holder, largest, lease, since in states:
        if operation.op == "acquire":
            if is_known and not operation.output["ok"]:
                may_be_free = any(
                    other is not operation
                    and other.call_ns <= (operation.return_ns or 0)
                    and (other.return_ns is None or operation.call_ns <= other.return_ns)
                    for other in given_up
                )
                if holder is not None or may_be_free:
                    after.append((holder, largest, lease, since))
            elif holder is None:
                tokens = [operation.output["token"]] if is_known else range(8)
                ttl = operation.input["ttl_ns"] or 0
                after += [(token, token, ttl, now) for token in tokens if token > largest]
        else:
            is_holder = holder == operation.input["token"]
            if is_known and operation.output["ok"] != is_holder:
                continue
            if is_holder and operation.op == "release":
                after.append((None, largest, 0, 0))
            elif is_holder:
                after.append((holder, largest, lease, now))
            else:
                after.append((holder, largest, lease, since))
    return after
