"""Tells holders that their locks are in danger or lost, on a thread of its own: callbacks are users' code."""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING

from coordlib.node.session import SessionState, SessionView

if TYPE_CHECKING:
    from coordlib.api.locks import Grant

__all__ = ["Grants"]

log = logging.getLogger("coordlib")


class Grants:
    """The grants of one process that are not released yet."""

    def __init__(self) -> None:
        # Adding, discarding and copying are one step each for the interpreter: no lock is taken on the way of a lock.
        # A dict and no set, whose order would depend on where in memory the grants are.
        self._live: dict[Grant, None] = {}
        self._queue: queue.SimpleQueue[tuple[Grant, SessionState] | None] | None = None

    def add(self, grant: Grant) -> None:
        self._live[grant] = None

    def discard(self, grant: Grant) -> None:
        self._live.pop(grant, None)

    def session_changed(self, view: SessionView, state: SessionState) -> None:
        """From the node thread: pass it on to those whose callbacks wait for it."""
        if state not in (SessionState.SUSPENDED, SessionState.LOST):
            return
        affected = [grant for grant in self._live.copy() if grant._view is view]
        for grant in affected:
            if state is SessionState.LOST:
                grant._is_known_lost = True
                self._live.pop(grant, None)
            callback = grant._on_lost if state is SessionState.LOST else grant._on_suspended
            log.warning(
                "lock %r (token %d): %s",
                grant.name,
                grant._token,
                "lost"
                if state is SessionState.LOST
                else "contact to the cluster is lost, the lock may be soon",
                extra={"event": f"lock.{state.name.lower()}", "lock": grant.name},
            )
            if callback is not None:
                self._notify(grant, state)

    def _notify(self, grant: Grant, state: SessionState) -> None:
        if self._queue is None:
            self._queue = queue.SimpleQueue()
            threading.Thread(
                target=self._call_back, args=(self._queue,), name="coordlib-callbacks", daemon=True
            ).start()
        self._queue.put((grant, state))

    @staticmethod
    def _call_back(waiting: queue.SimpleQueue[tuple[Grant, SessionState] | None]) -> None:
        while True:
            item = waiting.get()
            if item is None:
                return
            grant, state = item
            callback = grant._on_lost if state is SessionState.LOST else grant._on_suspended
            try:
                if callback is not None:
                    callback(grant)
            except Exception:
                # A user's callback must not end the thread that others' callbacks wait for.
                log.exception(
                    "lock %r: the callback failed", grant.name, extra={"event": "lock.callback-failed"}
                )

    def close(self) -> None:
        if self._queue is not None:
            self._queue.put(None)
            self._queue = None
