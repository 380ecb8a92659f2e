"""What the audience sees: events as they come, and how the members are, redrawn in place on a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import Any, Final, TextIO

__all__ = ["View"]

PLAIN_EVERY_SECONDS: Final = 1.0
_BOLD, _DIM, _RED, _GREEN, _OFF = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[0m"


class View:
    def __init__(self, names: list[str], *, is_plain: bool = False, out: TextIO | None = None) -> None:
        self._names = names
        self._out = out or sys.stdout
        self._is_plain = is_plain or not self._out.isatty() or os.environ.get("TERM") == "dumb"
        self._start = time.monotonic()
        self._drawn = 0
        self._next_plain = 0.0

    def event(self, text: str, *, is_bad: bool = False, is_good: bool = False) -> None:
        """Something happened: it stays on the screen."""
        self._erase()
        stamp = f"[{time.monotonic() - self._start:6.2f}]"
        if not self._is_plain:
            stamp = f"{_DIM}{stamp}{_OFF}"
            if is_bad or is_good:
                text = f"{_RED if is_bad else _GREEN}{text}{_OFF}"
        self._write(f"{stamp} {text}\n")

    def line(self, text: str = "") -> None:
        """A line of the closing report."""
        self._erase()
        self._write(text + "\n")

    def status(self, statuses: dict[str, dict[str, Any]], counts: str) -> None:
        """How the members are, as they told themselves; a member without an answer is down."""
        if self._is_plain:
            now = time.monotonic()
            if now >= self._next_plain:
                self._next_plain = now + PLAIN_EVERY_SECONDS
                members = " | ".join(_short(name, statuses.get(name)) for name in self._names)
                self.event(f"{members} | {counts}")
            return
        width = shutil.get_terminal_size().columns
        lines = [f"{'member':<12}{'role':<14}{'term':>6}{'commit':>10}{'applied':>10}{'behind':>9}"]
        newest = max((status.get("commit_index", 0) for status in statuses.values()), default=0)
        lines += [_row(name, statuses.get(name), newest) for name in self._names]
        lines.append(counts)
        self._erase()
        for number, line in enumerate(lines):
            text = line[: width - 1]
            if number == 0:
                text = f"{_DIM}{text}{_OFF}"
            elif " leader" in text:
                text = f"{_BOLD}{text}{_OFF}"
            elif " down" in text:
                text = f"{_RED}{text}{_OFF}"
            self._write(text + "\n")
        self._drawn = len(lines)
        self._out.flush()

    def _erase(self) -> None:
        if self._drawn:
            self._write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0

    def _write(self, text: str) -> None:
        self._out.write(text)
        if self._is_plain:
            self._out.flush()


def _row(name: str, status: dict[str, Any] | None, newest: int) -> str:
    if status is None:
        return f"{name:<12}down"
    if "term" not in status:
        return f"{name:<12}starting"
    applied = status["applied_index"]
    behind = max(0, newest - applied)
    numbers = f"{status['term']:>6}{status['commit_index']:>10}{applied:>10}{behind:>9}"
    return f"{name:<12}{status['role']:<14}{numbers}"


def _short(name: str, status: dict[str, Any] | None) -> str:
    if status is None:
        return f"{name} down"
    if "term" not in status:
        return f"{name} starting"
    return f"{name} {status['role']} term {status['term']} commit {status['commit_index']} applied {status['applied_index']}"
