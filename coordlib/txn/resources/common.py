"""What the adapters share: idle connections, and one text for two flavours of a driver."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Final, Generic, TypeVar

from coordlib.errors import UsageError, invariant
from coordlib.node.polling import Polled, Wait
from coordlib.txn.gtid import BranchName, resource_tag

__all__ = [
    "HAS_ENDED",
    "Failures",
    "Flow",
    "IdleConnections",
    "ResourceBase",
    "ResourceBusy",
    "arun",
    "missing_driver",
    "polled",
    "run",
    "warn_of_late_use",
]

log = logging.getLogger("coordlib")
HAS_ENDED: Final = "this connection was given to a transaction, which has ended"
T = TypeVar("T")
C = TypeVar("C")

Flow = Generator[Any, Any, T]
"""
Yields what a driver's method returned: the result where the driver blocks, an awaitable where it does not; or a `Wait`,
where a blocking driver's connection is polled.
"""


class ResourceBusy(Exception):
    """The branch cannot be ended just now: somebody is at it, or its connection has not gone yet. Ask again."""


def run(flow: Flow[T]) -> T:
    """Run it with a blocking driver: what it yields is the result already."""
    value = None
    while True:
        try:
            value = flow.send(value)
        except StopIteration as stop:
            result: T = stop.value
            return result


def polled(flow: Flow[T]) -> Polled[T]:
    """Run it with a blocking driver that is polled, where it can be: of what it yields, the waits are left to the caller."""
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            value = flow.send(value) if error is None else flow.throw(error)
        except StopIteration as stop:
            result: T = stop.value
            return result
        error = None
        if type(value) is Wait:
            try:
                yield value
            except BaseException as exc:  # an interrupt, too, is for the flow to hear of
                error = exc
            value = None


async def arun(flow: Flow[T]) -> T:
    """Run it with an asynchronous driver: what it yields is awaited."""
    step: Callable[[], Any] = lambda: flow.send(None)  # noqa: E731
    while True:
        try:
            awaitable: Awaitable[Any] = step()
        except StopIteration as stop:
            result: T = stop.value
            return result
        try:
            value = await awaitable
        except BaseException as exc:  # cancellation, too, is for the flow to hear of
            step = lambda exc=exc: flow.throw(exc)  # type: ignore[misc]  # noqa: E731
        else:
            step = lambda value=value: flow.send(value)  # type: ignore[misc]  # noqa: E731


def missing_driver(module: str, needs: str, extra: str) -> ImportError:
    return ImportError(f"{module} needs {needs}, which is not installed: pip install 'coordlib[{extra}]'")


def warn_of_late_use(name: str) -> None:
    """An idle connection is in a transaction: somebody has kept it, and worked on it. That must hit nobody else."""
    log.warning(
        "a connection to %r was used after the transaction had ended that it was given to; what was done on it is rolled "
        "back",
        name,
        extra={"event": "transaction.late-use"},
    )


class IdleConnections(Generic[C]):
    """
    Connections that nobody uses, the last one used first; no more than `idle_max` are kept.

    Thread-safe. In a forked child it is empty: a connection belongs to the process that opened it. With `key`
    connections are given back only to who asks with the same one (an event loop).
    """

    def __init__(self, idle_max: int, close: Callable[[C], object]) -> None:
        self._idle_max = idle_max
        self._close: Final = close
        self._lock = threading.Lock()
        self._idle: list[tuple[object, C]] = []
        self._pid = os.getpid()

    def take(self, key: object = None) -> C | None:
        self._leave_the_parents()
        with self._lock:
            for position in range(len(self._idle) - 1, -1, -1):
                if self._idle[position][0] is key:
                    return self._idle.pop(position)[1]
        return None

    def give(self, connection: C, key: object = None) -> None:
        self._leave_the_parents()
        with self._lock:
            if len(self._idle) < self._idle_max:
                self._idle.append((key, connection))
                return
        self._close(connection)

    def clear(self) -> None:
        self._leave_the_parents()
        with self._lock:
            idle, self._idle = self._idle, []
        for _, connection in idle:
            self._close(connection)

    def _leave_the_parents(self) -> None:
        if self._pid != os.getpid():
            # Not closed: that would end the parent's sessions. The lock may be held by a thread that is not here.
            self._pid, self._lock, self._idle = os.getpid(), threading.Lock(), []


_SAVEPOINTS: Final = re.compile(
    r"\s*(?P<verb>SAVEPOINT|ROLLBACK\s+(?:(?:WORK|TRANSACTION)\s+)?TO|RELEASE)\s+(?:SAVEPOINT\s+)?"
    r"(?P<name>`[^`]+`|\"[^\"]+\"|\[[^\]]+\]|\w+)",
    re.IGNORECASE,
)


class Failures:
    """
    Which failed statements of a transaction have not been undone by going back to a savepoint from before them: for
    databases that roll a failed statement back alone and go on.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._savepoints: list[str] = []
        self._failed_at = 0  # how many savepoints there were

    def note(self, error: Exception) -> None:
        """A statement failed."""
        if self.error is None:
            self.error, self._failed_at = error, len(self._savepoints)

    def statement(self, sql: str) -> None:
        """A statement succeeded."""
        found = _SAVEPOINTS.match(sql)
        if found is None:
            return
        verb, name = found["verb"].upper(), found["name"].strip('`"[]').lower()
        if verb == "SAVEPOINT":
            self._savepoints.append(name)
        elif name in self._savepoints:
            # The last of this name, and those after it.
            position = len(self._savepoints) - 1 - self._savepoints[::-1].index(name)
            del self._savepoints[position + (verb != "RELEASE") :]
            if verb != "RELEASE" and self.error is not None and self._failed_at > position:
                self.error = None

    def problem(self) -> str | None:
        """Why the transaction must not commit."""
        if self.error is None:
            return None
        return (
            f"a statement failed in it ({self.error}), though its error went no further; to go on after an error, have "
            "the statement in a savepoint and roll back to it"
        )


class ResourceBase:
    """A name, its tag, and the cluster whose branches are ours."""

    def __init__(self, name: str) -> None:
        if not name:
            raise UsageError("a resource needs a name: the same on every node that reaches the same database")
        self._name = name
        self._tag = resource_tag(name)
        self._cluster: bytes | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def tag(self) -> bytes:
        return self._tag

    @property
    def cluster(self) -> bytes:
        if self._cluster is None:
            raise UsageError(f"resource {self._name!r} is not open: register it with the cluster first")
        return self._cluster

    def is_mine(self, bqual: bytes) -> bool:
        """Whether a branch of our cluster belongs to this resource."""
        name = BranchName.unpack(bqual)
        return name is not None and name.resource_tag == self._tag

    def check_bqual(self, bqual: bytes) -> bytes:
        invariant(self.is_mine(bqual), "the bqual %s is not of resource %r", bqual.hex(), self._name)
        return bqual
