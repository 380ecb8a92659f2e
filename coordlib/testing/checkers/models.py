"""What a register and a lock may answer: the sequential objects that histories are compared with.

A model turns the operations of one key into steps, and says for a state and a step what the state is after
it, or that the step cannot come next. It never looks at the order in which operations were called, except for
leases, which end by time.

**Register.** Holds a value, or none (JSON null). `put` sets it, `delete` removes it (and may tell whether there
was one), `get` tells it, `cas [old, new]` sets it to new if it is old, where null stands for "none" on either
side. `append` adds an element at the end of a list, or text at the end of text; on a key without a value it
begins a list, or a text if what this key is known to hold is text.

**Lock.** Free, or held with a token. Not reentrant: a second grant to one owner is a grant like any other.

- A grant (an `acquire` answered ok) needs a token larger than that of every grant before it, and a lock that
  is free, or whose holder's grant has ended by expiry.
- A grant ends by its `release` or by expiry. Expiry is not an operation: it is found out when something shows
  that it has happened (another grant; a renew or release that is refused), and may come as late as it likes.
- With a lease (`ttl_ns` > 0) expiry is legal only when at least `ttl_ns` have passed since the acquire or the
  last successful renew took effect, which was at the earliest when it, and everything ordered before it, had been
  called. What shows the expiry cannot have taken effect before that, and must have returned after it.
- Without one (`ttl_ns` null or 0) the grant is bound to a session, whose end is in no history: it may have
  expired at any time. Mutual exclusion is then that of tokens: once a larger token was granted, or a smaller
  one refused, the old one is never accepted again.
- `renew` and `release` are answered ok if and only if theirs is the token of the present grant.
- An `acquire` that was answered not ok needs a lock that is held. One exception: acquires that were given up
  may hold the lock for the moment between their grant and their withdrawal. So a lock that is free may refuse,
  if another acquire was refused or failed at an overlapping time.
- An `acquire` with an unknown outcome may have been granted a token that nobody saw: at least the next one.

Sources: Herlihy and Wing, "Linearizability: a correctness condition for concurrent objects", TOPLAS 1990;
tokens that fence: Gray and Cheriton, "Leases", SOSP 1989, and Kleppmann, "Designing Data-Intensive
Applications", chapter 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

from coordlib.testing.history import Operation

__all__ = ["IMPOSSIBLE", "LockModel", "Model", "RegisterModel", "Step", "duration", "frozen", "shown"]


class _Impossible:
    def __repr__(self) -> str:
        return "IMPOSSIBLE"


IMPOSSIBLE: Final = _Impossible()

FREE: Final = -1  # instead of a holder's token
UNSEEN: Final = -2  # held with a token that no answer told


class Step(NamedTuple):
    """An operation, made ready for its model. `is_required` is False if nobody knows whether it took effect."""

    kind: str
    is_required: bool
    argument: Any
    answer: Any
    call_ns: int
    return_ns: int | None


class Model(Protocol):
    """The behaviour of one key. States are hashable."""

    initial: Any  # the state before the first operation

    def steps(self, operations: Sequence[Operation]) -> list[Step]:
        """One step for each operation; none of them failed."""

    def apply(self, state: Any, step: Step) -> Any:
        """The state after a step that takes effect in this state, or IMPOSSIBLE. For the unknown: any answer."""

    def why_not(self, state: Any, step: Step, origin_ns: int) -> str:
        """In words, why `apply` said IMPOSSIBLE. Times are told from the origin on."""

    def describe(self, state: Any, origin_ns: int) -> str:
        """The state in words: "holds 3"."""


def duration(nanoseconds: int) -> str:
    """A duration in the unit that suits it: milliseconds, or nanoseconds if it is shorter than one of those."""
    if abs(nanoseconds) < 1_000_000:
        return f"{nanoseconds} ns" if nanoseconds else "0"
    return f"{nanoseconds / 1e6:.3f}".rstrip("0").rstrip(".") + " ms"


def shown(value: Any) -> str:
    """A frozen value as JSON would show it."""
    if value is None:
        return "nothing"
    if isinstance(value, tuple):
        kind, *parts = value
        if kind == "bool":
            return "true" if parts[0] else "false"
        if kind == "list":
            return "[" + ", ".join("null" if part is None else shown(part) for part in parts) + "]"
        return "{" + ", ".join(f'"{name}": {"null" if v is None else shown(v)}' for name, v in parts) + "}"
    return f'"{value}"' if isinstance(value, str) else str(value)


def frozen(value: Any) -> Any:
    """A JSON value that can be hashed, and compared as JSON values are (true is not 1)."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, list | tuple):
        return ("list", *(frozen(part) for part in value))
    if isinstance(value, dict):
        return ("dict", *((name, frozen(value[name])) for name in sorted(value)))
    return value


class RegisterModel:
    """A register; the state is its frozen value."""

    initial: Any = None

    def __init__(self, operations: Sequence[Operation]) -> None:
        """Takes all operations of the key, to see whether what is appended is text."""
        values: list[Any] = []
        for operation in operations:
            if operation.op == "put":
                values.append(operation.input)
            elif operation.op == "cas":
                values += operation.input
            elif operation.op == "get":
                values.append(operation.output)
        self._is_text = any(isinstance(value, str) for value in values) and not any(
            isinstance(value, list) for value in values
        )

    def steps(self, operations: Sequence[Operation]) -> list[Step]:
        return [
            Step(
                operation.op,
                operation.status is not None,
                tuple(frozen(value) for value in operation.input)
                if operation.op == "cas"
                else frozen(operation.input),
                frozen(operation.output) if operation.op == "get" else operation.output,
                operation.call_ns,
                operation.return_ns,
            )
            for operation in operations
        ]

    def apply(self, state: Any, step: Step) -> Any:
        kind, is_required, argument, answer, _, _ = step
        if kind == "put":
            return argument
        if kind == "get":
            return state if state == answer or not is_required else IMPOSSIBLE
        if kind == "cas":
            is_swapped = state == argument[0]
            if is_required and is_swapped is not answer:
                return IMPOSSIBLE
            return argument[1] if is_swapped else state
        if kind == "delete":
            if is_required and answer is not None and answer is not (state is not None):
                return IMPOSSIBLE
            return None
        return self._appended(state, argument)

    def _appended(self, state: Any, argument: Any) -> Any:
        if isinstance(state, tuple) and state[0] == "list":
            return (*state, argument)
        if isinstance(argument, str) and (isinstance(state, str) or (state is None and self._is_text)):
            return (state or "") + argument
        return ("list", argument) if state is None else IMPOSSIBLE

    def why_not(self, state: Any, step: Step, origin_ns: int) -> str:
        if step.kind == "get":
            return f"it read {shown(step.answer)}, but the register {self.describe(state, origin_ns)}"
        if step.kind == "cas":
            did = "swapped" if step.answer else "did not swap"
            return f"it {did}, expecting {shown(step.argument[0])}, but the register {self.describe(state, origin_ns)}"
        if step.kind == "delete":
            saw = "a value" if step.answer else "no value"
            return f"it found {saw}, but the register {self.describe(state, origin_ns)}"
        return f"nothing can be appended, for the register {self.describe(state, origin_ns)}"

    def describe(self, state: Any, origin_ns: int) -> str:
        return f"holds {shown(state)}"


class LockModel:
    """
    A lock; the state is (token of the holder or FREE or UNSEEN, largest token, expiry, lease, now).

    The largest token is the smallest that is possible, where it was not seen. Expiry is the earliest instant
    at which the present grant may end by itself (0: at any time), `now` the earliest at which the last
    operation may have taken effect. That the earliest instants are enough follows from every condition on
    them being of the form "not before".
    """

    initial: Any = (FREE, -1, 0, 0, 0)

    def __init__(self, operations: Sequence[Operation]) -> None:
        """Takes all operations of the key, those that failed included."""
        acquires = [operation for operation in operations if operation.op == "acquire"]
        self._has_leases = any(operation.input.get("ttl_ns") for operation in acquires)
        self._given_up = [o for o in acquires if o.status != "ok" or not o.output["ok"]]
        self._tokens_seen = {o.output["token"] for o in acquires if o.status == "ok" and o.output["ok"]}

    def steps(self, operations: Sequence[Operation]) -> list[Step]:
        return [self._step(operation) for operation in operations]

    def _step(self, operation: Operation) -> Step:
        answer: Any = None
        argument = operation.input.get("token")
        if operation.op == "acquire":
            argument = operation.input.get("ttl_ns") or 0
        if operation.status is not None:
            answer = operation.output["ok"]
        kind = operation.op
        if kind == "acquire" and answer:
            answer = operation.output["token"]
        elif kind == "acquire" and operation.status is not None:
            # Refused: the answer is whether a free lock may have done that.
            kind, answer = "refused", self._may_refuse_when_free(operation)
        return Step(
            kind, operation.status is not None, argument, answer, operation.call_ns, operation.return_ns
        )

    def _may_refuse_when_free(self, operation: Operation) -> bool:
        assert operation.return_ns is not None
        return any(
            other is not operation
            and other.call_ns <= operation.return_ns
            and (other.return_ns is None or operation.call_ns <= other.return_ns)
            for other in self._given_up
        )

    def apply(self, state: Any, step: Step) -> Any:
        kind, is_required, argument, answer, call_ns, return_ns = step
        holder, largest, expiry, lease, now = state
        if self._has_leases and call_ns > now:
            now = call_ns
        if kind == "acquire":
            now = max(now, expiry)
            token = answer if is_required else largest + 1
            if token <= largest:
                return IMPOSSIBLE
            after = (
                token if is_required else UNSEEN,
                token,
                now + argument if argument else 0,
                argument,
                now,
            )
        elif kind == "refused":
            if holder == FREE and not answer:
                return IMPOSSIBLE
            after = (holder, largest, expiry, lease, now)
        else:
            is_holder = self._is_holder(state, step)
            if not is_required and not is_holder:
                return state
            if answer or not is_required:
                if not is_holder:
                    return IMPOSSIBLE
                largest = max(largest, argument)
                if kind == "release":
                    after = (FREE, largest, 0, 0, now)
                else:
                    after = (argument, largest, now + lease if lease else 0, lease, now)
            elif is_holder:
                # It was refused, so its grant has expired.
                now = max(now, expiry)
                after = (FREE, largest, 0, 0, now)
            else:
                after = (holder, largest, expiry, lease, now)
        return IMPOSSIBLE if return_ns is not None and now > return_ns else after

    def _is_holder(self, state: Any, step: Step) -> bool:
        holder, largest = state[:2]
        if holder != UNSEEN:
            return bool(holder == step.argument)
        # An unseen token may be any that is large enough and not known to be another grant's; and if what
        # names it was refused, it is rather assumed to be a different one.
        return (
            step.argument >= largest
            and step.argument not in self._tokens_seen
            and (step.answer is True or not step.is_required)
        )

    def why_not(self, state: Any, step: Step, origin_ns: int) -> str:
        holder, largest, _, _, now = state
        now = max(now, step.call_ns)
        described = f"the lock {self.describe(state, origin_ns)}"
        if step.kind == "acquire":
            if step.answer <= largest:
                return f"it was granted token {step.answer}, but {self._token(largest)} was granted before it"
            return f"it was granted the lock before the lease could have expired: {described}"
        if step.kind == "refused" and holder == FREE:
            return f"it was refused, but {described}"
        if step.return_ns is not None and now > step.return_ns:
            return "it had returned before what is ordered before it can have happened"
        if step.answer:
            return f"it was accepted with token {step.argument}, but {described}"
        return f"it was refused before its lease could have expired: {described}"

    def _token(self, largest: int) -> str:
        return f"token {largest}" if largest in self._tokens_seen else f"one of at least {largest}"

    def describe(self, state: Any, origin_ns: int) -> str:
        holder, largest, expiry, _, _ = state
        if holder == FREE:
            return "is free" + (f" (largest token so far: {largest})" if largest >= 0 else "")
        by = "a token that nobody saw" if holder == UNSEEN else f"token {holder}"
        return f"is held with {by}" + (f", until {duration(expiry - origin_ns)} at least" if expiry else "")
