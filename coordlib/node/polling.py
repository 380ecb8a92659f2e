"""Blocking I/O of several at once, on one thread: generators that yield what they wait for instead of waiting.

A thread for each would cost more than most databases take to answer: threads that wake each other up through the
interpreter's lock come late.

What must not live here: what is sent and received.
"""

from __future__ import annotations

import select
from collections.abc import Generator, Iterable
from time import monotonic
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar, cast

__all__ = ["READABLE", "WRITABLE", "Polled", "Wait", "poll", "poll_all"]

T = TypeVar("T")
READABLE: Final = 1
WRITABLE: Final = 2

INTERRUPTED_SECONDS: Final = 5.0
"""How long those who were interrupted have to come to an end; then they are interrupted again."""


class Wait(NamedTuple):
    """Go on when this file is ready, or broken: to be found out by using it."""

    file: int
    events: int  # READABLE, WRITABLE or both


Polled: TypeAlias = Generator[Wait, None, T]
"""
Never blocks. An interrupt of the thread (Ctrl-C) is thrown into it: it may go on yielding to bring what it uses into a
known state, but not for ever; thrown into again, it ends.
"""


class _Ended(NamedTuple):
    value: Any
    error: Exception | None


def poll(polled: Polled[T]) -> T:
    """
    Run one.

    Raises:
        BaseException: What it raises.
    """
    run = _Run([polled])
    try:
        run.waits[0] = next(polled)
    except StopIteration as stop:  # it had nothing to wait for
        return cast(T, stop.value)
    ((value, error),) = run.to_the_end()
    if error is not None:
        raise error
    return cast(T, value)


def poll_all(several: Iterable[Polled[Any]]) -> list[tuple[Any, Exception | None]]:
    """
    Run several at once: returns what each returned or raised, in the order given, when all have ended.

    Raises:
        BaseException: What interrupted it, after all have ended.
    """
    run = _Run(list(several))
    for place in range(len(run.several)):
        run.go_on(place)
    return run.to_the_end()


class _Run:
    def __init__(self, several: list[Polled[Any]]) -> None:
        self.several = several
        self.waits: dict[int, Wait] = {}
        self.ended: list[_Ended] = [_Ended(None, None)] * len(several)
        self.interrupted: BaseException | None = None
        self.until: float | None = None

    def to_the_end(self) -> list[tuple[Any, Exception | None]]:
        while self.waits:
            try:
                ready = _ready(self.waits, self.until)
            except BaseException as error:
                self.interrupt(error)
                continue
            if not ready and self.interrupted is not None:
                self.interrupt(self.interrupted)  # they have had their time
            for place in ready:
                self.go_on(place)
        if self.interrupted is not None:
            raise self.interrupted
        return list(self.ended)

    def go_on(self, place: int, error: BaseException | None = None) -> None:
        polled = self.several[place]
        try:
            self.waits[place] = next(polled) if error is None else polled.throw(error)
            return
        except StopIteration as stop:
            self.ended[place] = _Ended(stop.value, None)
        except Exception as failure:
            self.ended[place] = _Ended(None, failure)
        except BaseException as failure:
            # It was interrupted while it ran, or has ended of what was thrown into it.
            if self.interrupted is None:
                self.interrupted = failure
                self.until = monotonic() + INTERRUPTED_SECONDS
        self.waits.pop(place, None)

    def interrupt(self, error: BaseException) -> None:
        self.interrupted = error
        self.until = monotonic() + INTERRUPTED_SECONDS
        for place in list(self.waits):
            self.go_on(place, error)


def _ready(waits: dict[int, Wait], until: float | None) -> list[int]:
    """Of these, those that can go on; none when `until` has passed."""
    seconds = None if until is None else max(0.0, until - monotonic())
    if not _HAS_POLL:
        wait = waits.values()
        readable, writable, broken = select.select(
            [one.file for one in wait if one.events & READABLE],
            [one.file for one in wait if one.events & WRITABLE],
            [one.file for one in wait],
            seconds,
        )
        found = {*readable, *writable, *broken}
    else:
        poller = select.poll()
        for one in waits.values():
            poller.register(one.file, _POLL_EVENTS[one.events])
        found = {file for file, _ in poller.poll(None if seconds is None else seconds * 1000)}
    return [place for place, one in waits.items() if one.file in found]


_HAS_POLL: Final = hasattr(select, "poll")
_POLL_EVENTS: Final = (
    (0, select.POLLIN, select.POLLOUT, select.POLLIN | select.POLLOUT) if _HAS_POLL else (0, 0, 0, 0)
)
