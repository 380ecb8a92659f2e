"""Why a history is illegal, in words and a drawing that a person can follow (docs/histories.md has one).

What must not live here: what is left out beforehand (`reduction`), and the verdict itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from coordlib.testing.checkers.models import Model, Step, duration, frozen, shown
from coordlib.testing.checkers.reduction import reduced
from coordlib.testing.checkers.search import find_order
from coordlib.testing.history import Operation

__all__ = ["explain"]

_STEPS_MAX: Final = 500_000
_SHOWN_MAX: Final = 30  # operations; more than fits on a screen tells nothing


def explain(
    name: str,
    model: Model,
    operations: Sequence[Operation],
    judged: list[Operation],
    *,
    is_late: Callable[[], bool],
) -> str:
    """
    Tell why no order explains the operations of a key.

    Args:
        name: What to call the key.
        operations: All of the key, also those that failed.
        judged: Those that take part, sorted by call.
        is_late: True: what was found so far is told, even if less would do.
    """
    few = reduced(model, judged, is_late)
    # Asked for the drawing only: a reduced history is small, so this is quick, late or not.
    found = find_order(model, model.steps(few), steps_max=_STEPS_MAX)
    return "\n".join(_Explanation(name, model, operations, few, found.order, len(judged)).lines())


class _Explanation:
    def __init__(
        self,
        name: str,
        model: Model,
        operations: Sequence[Operation],
        few: list[Operation],
        order: tuple[int, ...],
        count: int,
    ) -> None:
        self._name = name
        self._model = model
        self._all = operations
        self._few = few
        self._steps = model.steps(few)
        self._order = order
        self._count = count
        self._origin_ns = few[0].call_ns

    def lines(self) -> list[str]:
        few, count = len(self._few), self._count
        which = f"all of its {count} operations" if few == count else f"{few} of its {count} operations"
        head = f"{self._name} is not linearizable; it takes {which} to show it."
        hidden = max(0, few - _SHOWN_MAX)
        rows = range(hidden, few)
        lines = [head, "", *self._table(rows), ""]
        if hidden:
            lines.insert(2, f"(the first {hidden} are not shown)")
        return [*lines, *self._timeline(rows), "", *self._longest(), "", *self._stuck()]

    def _table(self, rows: range) -> list[str]:
        cells = [("#", "client", "called", "returned", "operation")]
        for row in rows:
            operation = self._few[row]
            returned = operation.return_ns
            cells.append(
                (
                    str(row + 1),
                    operation.client,
                    duration(operation.call_ns - self._origin_ns),
                    "?" if returned is None else duration(returned - self._origin_ns),
                    _text(operation),
                )
            )
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        return [
            f"{row[0]:>{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}  {row[4]}"
            for row in cells
        ]

    def _timeline(self, rows: range) -> list[str]:
        """One bar for each operation, not to scale: a column for each instant at which something happens."""
        instants = set()
        for row in rows:
            instants.add(self._few[row].call_ns)
            instants.add(self._few[row].return_ns or 0)
        column = {
            instant: 2 * place for place, instant in enumerate(sorted(instants - {0} | {self._origin_ns}))
        }
        end = max(column.values()) + 3
        width = len(str(rows.stop))
        lines = ["In time (not to scale):"]
        for row in rows:
            operation = self._few[row]
            start = column[operation.call_ns]
            if operation.return_ns is None:
                bar = "|" + "." * (end - start - 1) + ">"
            else:
                length = column[operation.return_ns] - start
                bar = "|" + "-" * (length - 1) + "|" if length else "|"
            lines.append(f"{row + 1:>{width}}  {' ' * start}{bar.ljust(end + 2 - start)} {_text(operation)}")
        return lines

    def _longest(self) -> list[str]:
        state = self._model.initial
        thing = self._name.split()[0]
        lines = [f"The longest order found begins where the {thing} {self._describe(state)}:"]
        shown_from = max(0, len(self._order) - _SHOWN_MAX)
        for place, row in enumerate(self._order):
            state = self._model.apply(state, self._steps[row])
            if place < shown_from:
                continue
            assumed = "" if self._steps[row].is_required else " (taken to have happened)"
            lines.append(
                f"  {row + 1:>3}  {_text(self._few[row])}{assumed}; then the {thing} {self._describe(state)}"
            )
        if not self._order:
            lines = [f"Nothing can come first, where the {thing} {self._describe(state)}."]
        return lines

    def _stuck(self) -> list[str]:
        state = self._model.initial
        for row in self._order:
            state = self._model.apply(state, self._steps[row])
        rest = [row for row in range(len(self._few)) if row not in self._order]
        required = [row for row in rest if self._steps[row].is_required]
        first = min(required, key=lambda row: self._few[row].return_ns or 0)
        bound = self._few[first].return_ns
        assert bound is not None
        lines = ["None of the others can come next:"]
        later = []
        for row in rest:
            step = self._steps[row]
            if step.call_ns > bound:
                later.append(row)
            elif step.is_required:
                reason = self._model.why_not(state, step, self._origin_ns)
                lines.append(f"  {row + 1:>3}  {_text(self._few[row])}: {reason}{self._hint(row, step)}")
            else:
                lines.append(
                    f"  {row + 1:>3}  {_text(self._few[row])}: may have happened, but that does not help"
                )
        if later:
            numbers = ", ".join(str(row + 1) for row in later[:10]) + (" and more" if later[10:] else "")
            lines.append(f"  {numbers}: called after {first + 1} had returned")
        return lines

    def _describe(self, state: Any) -> str:
        return self._model.describe(state, self._origin_ns)

    def _hint(self, row: int, step: Step) -> str:
        """Where a value that was read came from."""
        if step.kind != "get" or step.answer is None:
            return ""
        if any(operation.op == "append" for operation in self._all):
            return ""
        writers = [operation for operation in self._all if _written(operation) == step.answer]
        if not writers:
            return "; no operation ever wrote that"
        if all(operation.status == "fail" for operation in writers):
            return f'; the only one to write that, of client {writers[0].client}, is said to have failed ("fail")'
        read = self._few[row]
        if read.return_ns is not None and all(operation.call_ns > read.return_ns for operation in writers):
            return "; that was written only later"
        return ""


def _written(operation: Operation) -> Any:
    if operation.op == "put":
        return frozen(operation.input)
    return frozen(operation.input[1]) if operation.op == "cas" else None


def _text(operation: Operation) -> str:
    """An operation and its answer: `get -> 3`."""
    value = operation.input
    if operation.op == "cas":
        asked = f"cas {shown(frozen(value[0]))} to {shown(frozen(value[1]))}"
    elif operation.op == "acquire":
        ttl_ns = value.get("ttl_ns")
        asked = f"acquire by {value['owner']}" + (f" for {duration(ttl_ns)}" if ttl_ns else "")
    elif operation.op in ("renew", "release"):
        asked = f"{operation.op} token {value['token']}"
    else:
        asked = operation.op + ("" if value is None else f" {shown(frozen(value))}")
    if operation.status is None:
        return asked + " -> ?"
    output = operation.output
    if operation.op in ("get", "cas"):
        return f"{asked} -> {shown(frozen(output))}"
    if operation.op == "delete":
        return asked + {None: "", True: " -> there was a value", False: " -> there was no value"}[output]
    if operation.op == "acquire":
        return asked + (f" -> token {output['token']}" if output["ok"] else " -> refused")
    if operation.op in ("renew", "release"):
        return asked + (" -> ok" if output["ok"] else " -> refused")
    return asked
