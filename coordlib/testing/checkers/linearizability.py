"""Whether a history is linearizable: key by key, since it is if and only if each of its keys is.

What must not live here: how an order is searched (`search`), what is legal (`models`).

Source: Herlihy and Wing, TOPLAS 1990, theorem 1 (locality): a history is linearizable if it is for each object.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from coordlib.testing.checkers.explanation import explain
from coordlib.testing.checkers.models import LockModel, Model, RegisterModel
from coordlib.testing.checkers.reduction import takes_part
from coordlib.testing.checkers.search import find_order
from coordlib.testing.history import LOCK_OPS, Operation

__all__ = ["STEPS_MAX", "Verdict", "check"]

# About a second a key here; keys that are checked by the hundred need thousands at most.
STEPS_MAX: Final = 500_000

_UNKNOWN_PERCENT_MAX: Final = 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    What `check` found.

    Args:
        result: "legal", "illegal", or "unknown"; only "legal" is a success.
        explanation: For people, in lines. Empty if there is nothing to say.
        keys: How many keys there were.
        unknown_keys: Those not judged within the budget. A legal history may have a few: 1 % of the keys.
        illegal_keys: Those that no order explains.
        operations: How many operations there were.
        steps: How many steps the search took, over all keys.
    """

    result: Literal["legal", "illegal", "unknown"]
    explanation: str
    keys: int
    unknown_keys: tuple[str, ...]
    illegal_keys: tuple[str, ...]
    operations: int
    steps: int

    @property
    def is_legal(self) -> bool:
        """Whether the history was found to be linearizable."""
        return self.result == "legal"


def check(
    operations: Iterable[Operation],
    *,
    steps_max: int = STEPS_MAX,
    time_limit_seconds: float | None = None,
    clock: Callable[[], float] | None = None,
) -> Verdict:
    """
    Judge a history of registers and locks.

    Registers and locks with equal names are different keys. A history with more than 1 % of its keys
    unknown is unknown; one with an illegal key is illegal, whatever else is unknown. Without a time limit the
    verdict is a function of the operations alone.

    Args:
        operations: In any order. Those that failed take no part.
        steps_max: The budget of the search for each key.
        time_limit_seconds: For all keys together.
        clock: Tells the time for the limit, in seconds; by default `time.monotonic`.
    """
    now = clock or time.monotonic
    end = None if time_limit_seconds is None else now() + time_limit_seconds

    def is_late() -> bool:
        return end is not None and now() >= end

    by_key: dict[tuple[str, str], list[Operation]] = {}
    count = 0
    for operation in operations:
        kind = "lock" if operation.op in LOCK_OPS else "register"
        by_key.setdefault((kind, operation.key), []).append(operation)
        count += 1
    unknown: list[str] = []
    illegal: list[str] = []
    explanation = ""
    steps = 0
    for (kind, key), of_key in by_key.items():
        name = f"{kind} {key!r}"
        of_key.sort(key=lambda operation: operation.call_ns)
        model: Model = LockModel(of_key) if kind == "lock" else RegisterModel(of_key)
        judged = [operation for operation in of_key if takes_part(operation)]
        found = find_order(
            model, model.steps(judged), steps_max=steps_max, is_late=is_late if end is not None else None
        )
        steps += found.steps
        if found.result == "unknown":
            unknown.append(name)
        elif found.result == "illegal":
            illegal.append(name)
            # One is explained in full; minimising it takes some time.
            explanation = explanation or explain(name, model, of_key, judged, is_late=is_late)
    return _verdict(explanation, len(by_key), unknown, illegal, count, steps)


def _verdict(
    explanation: str, keys: int, unknown: list[str], illegal: list[str], count: int, steps: int
) -> Verdict:
    result: Literal["legal", "illegal", "unknown"] = "legal"
    if illegal:
        result = "illegal"
        if len(illegal) > 1:
            explanation += f"\n\nAlso not linearizable: {_listed(illegal[1:])}."
    elif len(unknown) * 100 > keys * _UNKNOWN_PERCENT_MAX:
        result = "unknown"
    if unknown:
        explanation += (
            f"\n{len(unknown)} of {keys} keys could not be judged within the budget: {_listed(unknown)}."
        )
    return Verdict(result, explanation.strip("\n"), keys, tuple(unknown), tuple(illegal), count, steps)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
