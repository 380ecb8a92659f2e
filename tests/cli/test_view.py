"""What the audience sees, on a terminal and in a file."""

from __future__ import annotations

import io
from typing import Any

import pytest

from coordlib.cli.demo.view import View

STATUSES: dict[str, dict[str, Any]] = {
    "a": {"role": "leader", "term": 3, "commit_index": 120, "applied_index": 120},
    "b": {"role": "follower", "term": 3, "commit_index": 110, "applied_index": 100},
    "d": {"is_formed": False},
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_plain_lines_and_at_most_one_status_a_second() -> None:
    out = io.StringIO()
    view = View(["a", "b", "c", "d"], out=out)
    view.event("begun")
    view.status(STATUSES, "9 locks")
    view.status(STATUSES, "10 locks")
    first, second = out.getvalue().splitlines()
    assert first.endswith("begun")
    for text in ("a leader term 3", "b follower", "applied 100", "c down", "d starting", "9 locks"):
        assert text in second
    assert "\x1b" not in out.getvalue()


def test_a_terminal_is_redrawn_in_place_and_keeps_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of six lines is erased before anything else is written."""
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    view = View(["a", "b", "c", "d"], out=out)
    view.status(STATUSES, "9 locks")
    view.event("killed", is_bad=True)
    view.line("the end")
    block, after = out.getvalue().split("\x1b[6F\x1b[J")
    assert "behind" in block
    assert "20" in next(line for line in block.splitlines() if line.startswith("b"))
    assert "killed" in after
    assert after.endswith("the end\n")


def test_plain_wins_over_a_terminal() -> None:
    out = Terminal()
    View(["a"], is_plain=True, out=out).event("begun", is_good=True)
    assert "\x1b" not in out.getvalue()
