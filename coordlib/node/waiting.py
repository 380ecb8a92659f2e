"""
How a caller waits for its call: a thread on a lock, a task on a future. Woken in batches by the node thread.
What goes on in the background waits on neither: it is called.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import Final

from coordlib.node.clock import monotonic_ms
from coordlib.node.session import Call, SessionView

__all__ = ["AsyncCall", "BackgroundCall", "LoopWatch", "ThreadCall", "wake_all"]

WATCH_SECONDS: Final = 0.25


class ThreadCall(Call):
    """A thread waits on it, once."""

    __slots__ = ("_done",)

    def __init__(
        self, kind: int, body: bytes, deadline_ms: int, *, sequence: int = 0, view: SessionView | None = None
    ) -> None:
        super().__init__(kind, body, deadline_ms, sequence=sequence, view=view)
        # A bare lock: an Event costs five times as much, and this is on the path of every operation.
        self._done = threading.Lock()
        self._done.acquire()

    def wait(self, timeout_seconds: float) -> bool:
        """Until the node has ended the call; False after the timeout."""
        return self._done.acquire(timeout=min(timeout_seconds, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        self._done.release()


class AsyncCall(Call):
    """A task waits for its future."""

    __slots__ = ("future", "loop")

    def __init__(
        self, kind: int, body: bytes, deadline_ms: int, *, sequence: int = 0, view: SessionView | None = None
    ) -> None:
        super().__init__(kind, body, deadline_ms, sequence=sequence, view=view)
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()


class BackgroundCall(Call):
    """
    Nobody waits for it, but somebody goes on with its outcome: `ended` is called where the call ends, mostly on
    the node thread, and must neither block nor raise.
    """

    __slots__ = ("_ended",)

    is_heard = True

    def __init__(
        self,
        kind: int,
        body: bytes,
        deadline_ms: int,
        ended: Callable[[Call], None],
        *,
        sequence: int = 0,
        view: SessionView | None = None,
    ) -> None:
        super().__init__(kind, body, deadline_ms, sequence=sequence, view=view, is_detached=True)
        self._ended = ended

    def wake(self) -> None:
        self._ended(self)


def _resolve(calls: list[AsyncCall]) -> None:
    for call in calls:
        if not call.future.done():
            call.future.set_result(None)


def wake_all(calls: Iterable[Call]) -> None:
    """Wake everybody whose call has ended: one wake-up for each event loop, however many calls it has here."""
    by_loop: dict[asyncio.AbstractEventLoop, list[AsyncCall]] = {}
    for call in calls:
        if isinstance(call, AsyncCall):
            by_loop.setdefault(call.loop, []).append(call)
        else:
            call.wake()
    for loop, batch in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, batch)
        except RuntimeError:
            # The loop was closed: nobody waits there any more.
            pass


class LoopWatch:
    """
    Ends the calls of one event loop whose node does not: a stalled node thread keeps no task waiting for ever.

    One timer for the loop, however many calls: a timer for each would cost more than the call.
    """

    __slots__ = ("_calls", "_is_running")

    def __init__(self) -> None:
        self._calls: dict[AsyncCall, None] = {}  # in the order of their coming, not of their addresses
        self._is_running = False  # not the handle: it would keep the loop alive

    def add(self, call: AsyncCall) -> None:
        self._calls[call] = None
        if not self._is_running:
            self._is_running = True
            call.loop.call_later(WATCH_SECONDS, self._look)

    def discard(self, call: AsyncCall) -> None:
        self._calls.pop(call, None)

    def _look(self) -> None:
        overdue = monotonic_ms() - round(WATCH_SECONDS * 1000)
        for call in list(self._calls):
            if call.deadline_ms < overdue and not call.future.done():
                call.future.set_result(None)
        # Not kept running for nothing, and no reference kept to a loop that may be closed by then.
        self._is_running = bool(self._calls)
        if self._is_running:
            asyncio.get_running_loop().call_later(WATCH_SECONDS, self._look)
