"""Connections to servers that neither answer nor hang up: broken when their transaction's time is over.

Servers end statements and idle sessions in time by themselves. This is for one that is stopped, or behind a network that
drops everything: the operating system would wait for two hours. No driver can be told how long to wait for each of its
answers, but every one stops waiting at once when its socket is shut down.

What must not live here: what a broken connection means for its branch (the adapters).
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import threading
from time import monotonic
from typing import Final, NamedTuple

__all__ = ["GRACE_SECONDS", "Watchdog", "watchdog"]

log = logging.getLogger("coordlib")

GRACE_SECONDS: Final = 2.0
"""After the transaction's time, for the server to end what was not in time by itself."""

_LOOK_EVERY_SECONDS: Final = 0.25
_IDLE_LOOKS_MAX: Final = 20  # then the thread ends


class _Watched(NamedTuple):
    file: int
    inode: int  # tells whether the file is still that socket: numbers are given again
    until: float


class Watchdog:
    """Thread-safe; a forked child watches nothing of its parent's. Its thread ends when there is nothing to be watched."""

    def __init__(self) -> None:
        self._forget_all()

    def _forget_all(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._watched: dict[int, _Watched] = {}
        self._numbers = itertools.count(1)
        self._thread: threading.Thread | None = None

    def watch(self, file: int, seconds: float) -> int:
        """
        Shut this socket down in so many seconds, unless `unwatch` is called with the returned number before.

        Raises:
            OSError: It is closed.
        """
        self._leave_the_parents()
        watched = _Watched(file, os.fstat(file).st_ino, monotonic() + seconds)
        number = next(self._numbers)
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="coordlib-watchdog", daemon=True)
                thread.start()  # where that fails, the next one tries again
                self._thread = thread
            self._watched[number] = watched
        return number

    def unwatch(self, number: int) -> None:
        """Nothing if it was broken, or is not watched any more."""
        self._leave_the_parents()
        with self._lock:
            self._watched.pop(number, None)

    def _leave_the_parents(self) -> None:
        # Of the parent's lock nobody knows who held it.
        if self._pid != os.getpid():
            self._forget_all()

    def _work(self) -> None:
        pause, idle_looks = threading.Event(), 0
        while True:
            pause.wait(_LOOK_EVERY_SECONDS)
            with self._lock:
                idle_looks = 0 if self._watched else idle_looks + 1
                if idle_looks > _IDLE_LOOKS_MAX:
                    self._thread = None
                    return
                now = monotonic()
                late = [number for number, watched in self._watched.items() if now >= watched.until]
                broken = [self._watched.pop(number) for number in late]
            for watched in broken:
                _break(watched)


def _break(watched: _Watched) -> None:
    try:
        # The number may be given to another file at any moment, a duplicate's not.
        duplicate = os.dup(watched.file)
    except OSError:
        return  # closed meanwhile
    try:
        if os.fstat(duplicate).st_ino == watched.inode:
            log.warning(
                "a database does not answer though the transaction's time is over: its connection is broken",
                extra={"event": "transaction.no-answer"},
            )
            with socket.socket(fileno=os.dup(duplicate)) as connection:
                connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it was broken already
    finally:
        os.close(duplicate)


watchdog: Final = Watchdog()
"""Of this process."""
