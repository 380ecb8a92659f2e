"""Whether a history of one register has an order that explains it (Wing and Gong, with Lowe's memory)."""

from __future__ import annotations

from typing import Any, NamedTuple

FOREVER = 1 << 62


class Event(NamedTuple):
    """One operation on one register. `end` is FOREVER if nobody knows whether it took effect."""

    begin: int
    end: int
    kind: str  # "put", "get" or "cas"
    argument: Any  # put: the value; cas: (expected, new)
    result: Any  # get: the value read; cas: whether it was swapped; None if unknown


def _step(state: Any, event: Event) -> tuple[bool, Any]:
    """Whether the event may happen in a state, and the state after."""
    if event.kind == "put":
        return True, event.argument
    if event.kind == "get":
        return event.end == FOREVER or state == event.result, state
    expected, new = event.argument
    is_swapped = state == expected
    if event.end != FOREVER and is_swapped != event.result:
        return False, state
    return True, new if is_swapped else state


def is_linearizable(events: list[Event], initial: Any = None) -> bool:
    """Whether all events with a known end, and any of the others, can be put in one order."""
    events = sorted(event for event in events if event.kind != "get" or event.end != FOREVER)
    count = len(events)
    required = sum(1 << i for i, event in enumerate(events) if event.end != FOREVER)
    seen: set[tuple[int, Any]] = set()
    stack: list[tuple[int, Any]] = [(0, initial)]
    while stack:
        done, state = stack.pop()
        if done & required == required:
            return True
        if (done, state) in seen:
            continue
        seen.add((done, state))
        # Whatever began after the earliest end of what is left cannot come next.
        left = [i for i in range(count) if not done >> i & 1]
        earliest = min(events[i].end for i in left)
        for i in left:
            event = events[i]
            if event.begin > earliest:
                break
            is_possible, after = _step(state, event)
            if is_possible:
                stack.append((done | 1 << i, after))
    return False
