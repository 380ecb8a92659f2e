"""What the tests of ids share: clocks by hand, threads under torture, children that are forked."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

MS = 1_000_000

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Clock:
    """Nanoseconds that pass only when told to."""

    def __init__(self, now_ns: int = 0) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns

    def advance_ms(self, milliseconds: float) -> None:
        self.now_ns += round(milliseconds * MS)


def tortured(work: Callable[[], T], *, threads: int = 8) -> list[T]:
    """What `work` returns in each thread, all at once, with a Python trace function and a switch every microsecond."""
    results: list[T] = []
    errors: list[BaseException] = []
    together = threading.Barrier(threads)

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return trace

    def run() -> None:
        try:
            together.wait()
            results.append(work())
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    before = threading.gettrace()
    threading.settrace(trace)
    sys.setswitchinterval(1e-6)
    try:
        running = [threading.Thread(target=run) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        threading.settrace(before)
    assert errors == []
    return results


def in_child(check: Callable[[], object]) -> None:
    """Run a check in a forked child; fail as it fails."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            check()
            os._exit(0)
        except BaseException as error:
            os.write(writer, repr(error).encode()[:4000])
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, text
