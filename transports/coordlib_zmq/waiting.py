"""Waiting for descriptors, and waking who waits: what the loop needs from the operating system."""

from __future__ import annotations

import ctypes
import os
import select
import sys
from collections.abc import Callable
from typing import Any, Final

__all__ = ["Waker", "open_selector"]

_HAS_EVENTFD: Final = hasattr(os, "eventfd")


def _signal_function() -> Callable[[int], object]:
    """
    What adds one to an eventfd. The C library's own function, if there is one, called without letting go of the
    interpreter: the write never blocks, and os.write would cost its caller a fight to get the interpreter back.
    """
    if sys.platform == "linux":
        try:
            write = ctypes.PyDLL(None).eventfd_write
        except (OSError, AttributeError):
            pass
        else:
            write.argtypes = (ctypes.c_int, ctypes.c_uint64)
            return lambda fd: write(fd, 1)
    return lambda fd: os.write(fd, b"\1\0\0\0\0\0\0\0")


_signal: Final = _signal_function()


def open_selector() -> Any:
    """Return an epoll object, or the nearest thing that this system has."""
    return select.epoll() if hasattr(select, "epoll") else _PortableEpoll()


class Waker:
    """
    Wakes a poll from another thread, with at most one system call for any number of wake-ups.

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
            _signal(self._write_fd)

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


class _PortableEpoll:
    """`select.epoll` where there is none: the same few calls, over poll(2)."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self.register = self._poll.register
        self.unregister = self._poll.unregister

    def poll(self, timeout_seconds: float) -> list[tuple[int, int]]:
        return self._poll.poll(timeout_seconds * 1000)

    def close(self) -> None:
        """There is nothing to close."""
