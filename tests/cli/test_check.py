"""`coordlib check`: what it says of a history, and with which exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordlib.cli import main
from coordlib.testing.history import HistoryWriter


def _write(path: Path, *, seen: int, unknown: int = 0) -> str:
    writer = HistoryWriter()
    writer.ok(writer.invoke("a", "put", "x", 1, 0), None, 1_000_000)
    writer.fail(writer.invoke("a", "put", "x", 2, 2_000_000), 3_000_000)
    for n in range(unknown):
        writer.invoke(f"u{n}", "cas", "x", [n, n + 1], 3_000_000)
    writer.ok(writer.invoke("b", "get", "x", None, 4_000_000), seen, 5_000_000)
    writer.dump(path)
    return str(path)


def test_a_legal_history_is_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said in one line with what was judged."""
    assert main(["check", _write(tmp_path / "h", seen=1, unknown=2)]) == 0
    assert capsys.readouterr().out == "legal: 5 operations (1 failed, 2 of unknown outcome) on 1 keys\n"


def test_an_illegal_history_is_1_and_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The explanation is what a person has to go on with."""
    assert main(["check", _write(tmp_path / "h", seen=2)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(
        "illegal: 3 operations (1 failed, 0 of unknown outcome) on 1 keys\n\nregister 'x' is not"
    )
    assert "get -> 2: it read 2, but the register holds" in out and "said to have failed" in out


def test_a_history_that_takes_too_long_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether steps or time run out, it is unknown and never legal."""
    path = _write(tmp_path / "h", seen=1, unknown=5)
    for limit in (["--steps", "1"], ["--time-limit", "0.000000001"]):
        assert main(["check", path, *limit]) == 2
        out = capsys.readouterr().out
        assert out.startswith("unknown: ") and "could not be judged within the budget: register 'x'" in out


def test_several_files_are_one_history(tmp_path: Path) -> None:
    """What one process wrote is read in another's file."""
    writer = HistoryWriter()
    writer.ok(writer.invoke("c", "get", "x", None, 6_000_000), 7, 7_000_000)
    writer.dump(tmp_path / "reader")
    legal = _write(tmp_path / "h", seen=1)
    assert main(["check", legal, str(tmp_path / "reader")]) == 1
    writer = HistoryWriter()
    writer.ok(writer.invoke("d", "put", "x", 7, 5_500_000), None, 6_500_000)
    writer.dump(tmp_path / "writer")
    assert main(["check", legal, str(tmp_path / "reader"), str(tmp_path / "writer")]) == 0


def test_what_cannot_be_read_is_2_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file, a bad line, an empty history: each told in one message, without a traceback."""
    bad = tmp_path / "bad"
    bad.write_text('{"client": "a"}\n')
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for arguments, said in (
        ([str(tmp_path / "nowhere")], "nowhere: No such file"),
        ([_write(tmp_path / "h", seen=1), str(bad)], "bad, line 1: 'op' is missing"),
        ([str(empty)], "there is no operation in"),
        ([str(bad), "--time-limit", "0"], "--time-limit must be more than 0"),
    ):
        assert main(["check", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("coordlib check: ") and said in captured.err
