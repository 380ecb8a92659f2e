"""The search for an order: Wing and Gong's algorithm, with Lowe's memory.

An order explains a history if every operation that returned is in it, none comes before one that had returned
before it was called, and the model accepts the answers one after the other. The search puts one operation after
the other, takes back the last one when nothing can follow, and remembers where it has been. Operations of
unknown outcome may be put anywhere after their call, or be left out.

Where it has been is (what is done, state). What is done is kept as a bitmap above the first operation that is
not done, which is short however long the history is. Of two visits with the same operations done and the same
state, one that has used fewer of the unknown ones can do whatever the other can.

What must not live here: what is legal in which state (`models`), and words for people (`explanation`).

Sources: Wing and Gong, "Testing and verifying concurrent objects", JPDC 1993; Lowe, "Testing for
linearizability", CCPE 2017; Porcupine (github.com/anishathalye/porcupine) for the undoable list.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple

from coordlib.testing.checkers.models import IMPOSSIBLE, Model, Step

__all__ = ["Found", "find_order"]

_ASK_EVERY_STEPS: Final = 256


class Found(NamedTuple):
    """
    What the search found.

    Args:
        result: "unknown" if the budget or the time was used up first.
        order: Numbers of the steps in an order that explains them; if there is none, in one of the longest
            that could be found.
        steps: How many times the model was asked.
    """

    result: Literal["legal", "illegal", "unknown"]
    order: tuple[int, ...]
    steps: int


def find_order(
    model: Model, steps: Sequence[Step], *, steps_max: int, is_late: Callable[[], bool] | None = None
) -> Found:
    """
    Whether an order explains the steps.

    Args:
        steps: Sorted by their calls.
        steps_max: How many times the model may be asked. This is what bounds time and memory.
        is_late: Asked now and then; True ends the search.
    """
    return _Search(model, steps, steps_max, is_late).run()


class _Search:
    """
    One search.

    `_next` and `_previous` link the events of what is not done yet: step number n is called by event n and
    returns by event count + n. Steps of unknown outcome have lists of their own, for they are tried last
    and never return.
    """

    def __init__(
        self, model: Model, steps: Sequence[Step], steps_max: int, is_late: Callable[[], bool] | None
    ) -> None:
        self._model = model
        self._steps = steps
        self._steps_max = steps_max
        self._is_late = is_late
        count = self._count = len(steps)
        self._required = [n for n in range(count) if steps[n].is_required]
        self._optional = [n for n in range(count) if not steps[n].is_required]
        # At equal times calls come before returns: what touches is taken to overlap.
        events: list[tuple[int, bool, int]] = []
        for n in self._required:
            returned = steps[n].return_ns
            assert returned is not None
            events += [(steps[n].call_ns, False, n), (returned, True, count + n)]
        events.sort()
        self._head = 2 * count
        order = [self._head, *(event for _, _, event in events), self._head]
        self._next = [0] * (2 * count + 1)
        self._previous = [0] * (2 * count + 1)
        for before, after in itertools.pairwise(order):
            self._next[before] = after
            self._previous[after] = before

    def run(self) -> Found:
        model_apply, steps, count, head = self._model.apply, self._steps, self._count, self._head
        following, optional, is_late = self._next, self._optional, self._is_late
        # What is done of the required steps, numbered as they were called: all below base, then a bitmap.
        rank = {n: place for place, n in enumerate(self._required)}
        place_of = {n: place for place, n in enumerate(optional)}
        done_count = base = window = used = 0
        state = self._model.initial
        memory: dict[tuple[int, int, Any], list[int]] = {(base, window, state): [used]}
        stack: list[tuple[int, int, int, int, Any]] = []  # (step, base, window, used, state) before each
        best: tuple[int, ...] = ()
        best_count = asked = 0
        event = following[head]
        place = 0  # in the unknown ones, which are tried once the required ones were
        while done_count < len(rank):
            # -- the next candidate: the required called before the first return, then the unknown
            number = event
            if event >= count:
                place = self._next_unknown(place, used, event)
                if place == len(optional):
                    # -- nothing can follow: take the last one back
                    # Of equals, the one that assumes the fewest unknown operations to have happened.
                    if done_count > best_count or (done_count == best_count and len(stack) < len(best)):
                        best_count, best = done_count, tuple(entry[0] for entry in stack)
                    if not stack:
                        return Found("illegal", best, asked)
                    number, base, window, used, state = stack.pop()
                    if number in rank:
                        done_count -= 1
                        self._put_back(number)
                        event, place = following[number], 0
                    else:
                        event, place = self._first_return(), place_of[number] + 1
                    continue
                number = optional[place]
            if asked >= self._steps_max or (
                is_late is not None and asked % _ASK_EVERY_STEPS == 0 and is_late()
            ):
                return Found("unknown", max(best, tuple(entry[0] for entry in stack), key=len), asked)
            asked += 1
            # -- whether it may follow, and leads to where nobody has been
            after = model_apply(state, steps[number])
            if after is not IMPOSSIBLE:
                base_after, window_after, used_after = base, window, used
                if event < count:
                    window_after |= 1 << (rank[number] - base)
                    while window_after & 1:
                        window_after >>= 1
                        base_after += 1
                else:
                    used_after |= 1 << place
                visits = memory.setdefault((base_after, window_after, after), [])
                if all(visit & ~used_after for visit in visits):
                    visits.append(used_after)
                    stack.append((number, base, window, used, state))
                    base, window, used, state = base_after, window_after, used_after, after
                    if event < count:
                        done_count += 1
                        self._take_out(number)
                    event, place = following[head], 0
                    continue
            if event < count:
                event = following[event]
            else:
                place += 1
        return Found("legal", tuple(entry[0] for entry in stack), asked)

    def _next_unknown(self, place: int, used: int, event: int) -> int:
        """The next place that is not used and was called before the return that is this event; or the end."""
        bound = self._steps[event - self._count].return_ns
        assert bound is not None
        while place < len(self._optional):
            if self._steps[self._optional[place]].call_ns > bound:
                break
            if not used >> place & 1:
                return place
            place += 1
        return len(self._optional)

    def _first_return(self) -> int:
        event = self._next[self._head]
        while event < self._count:
            event = self._next[event]
        return event

    def _take_out(self, number: int) -> None:
        for event in (number, number + self._count):
            before, after = self._previous[event], self._next[event]
            self._next[before] = after
            self._previous[after] = before

    def _put_back(self, number: int) -> None:
        # In the reverse order: each still knows its neighbours.
        for event in (number + self._count, number):
            before, after = self._previous[event], self._next[event]
            self._next[before] = self._previous[after] = event
