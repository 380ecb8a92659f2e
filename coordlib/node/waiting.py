"""How a caller waits for its call: a thread on a lock, a task on a future. Woken in batches by the node thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable

from coordlib.node.session import Call, SessionView

__all__ = ["AsyncCall", "ThreadCall", "wake_all"]


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


def _resolve(calls: list[AsyncCall]) -> None:
    for call in calls:
        if not call.future.done():
            call.future.set_result(None)


def wake_all(calls: Iterable[Call]) -> None:
    """Wake everybody whose call has ended: one wake-up for each event loop, however many calls it has here."""
    by_loop: dict[asyncio.AbstractEventLoop, list[AsyncCall]] = {}
    for call in calls:
        if isinstance(call, ThreadCall):
            call.wake()
        elif isinstance(call, AsyncCall):
            by_loop.setdefault(call.loop, []).append(call)
    for loop, batch in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, batch)
        except RuntimeError:
            # The loop was closed: nobody waits there any more.
            pass
