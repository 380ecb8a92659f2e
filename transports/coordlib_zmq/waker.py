"""Waking a poll from another thread, with at most one system call for any number of wake-ups."""

from __future__ import annotations

import os
from typing import Final

__all__ = ["Waker"]

_HAS_EVENTFD: Final = hasattr(os, "eventfd")


class Waker:
    """
    A descriptor that becomes readable once `wake` was called, until `clear`.

    The descriptor is closed when the last reference goes, never earlier: a thread that is inside `wake`
    while the transport closes must not write into whatever got the number next.
    """

    __slots__ = ("_is_pending", "_write_fd", "fileno")

    def __init__(self) -> None:
        if _HAS_EVENTFD:
            self.fileno = self._write_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self.fileno, self._write_fd = os.pipe()
            os.set_blocking(self.fileno, False)
            os.set_blocking(self._write_fd, False)
        self._is_pending = False

    def wake(self) -> None:
        """Make the descriptor readable. Any thread."""
        # Two threads may both see False; one write too many is harmless.
        if not self._is_pending:
            self._is_pending = True
            os.write(self._write_fd, b"\1\0\0\0\0\0\0\0")

    def clear(self) -> None:
        """Make the descriptor unreadable. Only the thread that polls."""
        # The flag falls last. A wake-up in between is not written, and need not be: whoever asked for
        # it has handed in the work before, and this poll is about to return to look for work.
        try:
            os.read(self.fileno, 64)
        except BlockingIOError:
            pass
        self._is_pending = False

    def __del__(self) -> None:
        os.close(self.fileno)
        if self._write_fd != self.fileno:
            os.close(self._write_fd)
