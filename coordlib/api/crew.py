"""Threads for work that nobody waits for."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from coordlib.errors import ClusterClosed, CoordError, FatalError, ForkedError

__all__ = ["Crew"]

log = logging.getLogger("coordlib")

Work = Callable[[], None]


class Crew:
    """
    Daemon threads, started as they are needed and at most so many. Thread-safe; `submit` neither blocks nor raises.

    Work of a handle that was closed meanwhile ends silently; what else it raises is logged.
    """

    def __init__(self, name: str, threads_max: int) -> None:
        self._name = name
        self._threads_max = threads_max
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._unfinished = 0
        self._is_closed = False

    @property
    def backlog(self) -> int:
        """How much was submitted and has not ended yet."""
        return self._unfinished

    def submit(self, work: Work) -> None:
        """Dropped when the crew is closed."""
        with self._lock:
            if self._is_closed:
                return
            self._unfinished += 1
            self._queue.put(work)
            if len(self._threads) < min(self._unfinished, self._threads_max):
                thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()

    def close(self, timeout_seconds: float) -> None:
        """Drop what was not begun, and wait for the rest, within the timeout. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            threads = list(self._threads)
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        for _ in threads:
            self._queue.put(None)
        deadline = time.monotonic() + timeout_seconds
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except (ClusterClosed, ForkedError, FatalError):
                pass  # whoever has the resources finds what is left
            except CoordError as error:
                log.warning("transactions: %s", error, extra={"event": "transaction.agent"})
            except Exception:
                log.exception("transactions: a bug", extra={"event": "transaction.bug"})
            with self._lock:
                self._unfinished -= 1
