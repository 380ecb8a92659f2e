"""The benchmarks run and say what they promise. What they measure is not looked at: that depends on the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import minting
from benchmarks.bank import prove
from benchmarks.figures import Line, Report, median, quantile
from benchmarks.load import check_notes
from benchmarks.run import PARTS, _chosen

ROOT = Path(__file__).resolve().parent.parent


def _run(script: str, *arguments: str) -> tuple[int, list[str]]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout, done.stderr
    return done.returncode, done.stdout.splitlines()


def _last(lines: list[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(lines[-1])
    return parsed


def test_a_quick_run_prints_each_line_and_ends_with_one_json_object(tmp_path: Path) -> None:
    """Three secured processes are started and measured; the JSON has the figures, the limits and the machine."""
    code, lines = _run("run.py", "--quick", "--only", "stop_graceful", "--dir", str(tmp_path))
    assert code == 0
    result = _last(lines)
    assert any(line.startswith("stop_graceful ") for line in lines)
    assert {"machine", "configuration", "stop_graceful", "floor", "missed"} == set(result)
    assert {"cores", "python", "commit", "kernel"} <= set(result["machine"])
    assert result["floor"]["p50_us"] > 0
    assert result["stop_graceful"]["limit"] == "<= 0.15s"
    assert list(tmp_path.iterdir()) == []


def test_a_few_kills_lose_nothing_and_leave_no_file(tmp_path: Path) -> None:
    """Members are killed under load and restarted; the proofs hold, and something was there to prove."""
    code, lines = _run("kill9.py", "--kills", "2", "--seed", "7", "--dir", str(tmp_path))
    result = _last(lines)["kill9"]
    assert code == 0, lines
    assert result["violations"] == 0
    assert result["acknowledged"] > 0
    assert result["lock_sections"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_lost_write_is_found_in_the_notes() -> None:
    """An acknowledged number that a member does not have, or a counter set twice, is a violation in words."""
    notes = ["try k 1", "ack k 1", "try k 2", "ack k 2", "try k 3", "add c 1", "added c 1"]
    assert check_notes([notes], {"n1": {"k": 2, "c": 1}, "n2": {"k": 3, "c": 1}}) == []
    assert len(check_notes([notes], {"n1": {"k": 1, "c": 1}})) == 1
    assert len(check_notes([notes], {"n1": {"k": 2}})) == 1
    assert len(check_notes([notes, ["add c 1", "added c 1"]], {"n1": {"k": 2, "c": 1}})) == 1
    assert len(check_notes([["try k 1"]], {"n1": {"k": 2}})) == 1


def test_a_line_says_whether_it_is_within_its_limit() -> None:
    """At most and at least, both inclusive; without a limit there is no verdict."""
    report = Report()
    report.add(Line("slow", {}, shown="", value=3.0, at_most=2.6))
    report.add(Line("quick", {}, shown="", value=2.6, at_most=2.6))
    report.add(Line("many", {}, shown="", value=5.0, at_least=5.0))
    report.add(Line("told", {"p50_us": 1}, shown="", value=9.0))
    assert report.missed == ["slow"]
    assert "MISS" in str(report.lines[0])
    assert report.lines[3].figures == {"p50_us": 1}


def test_only_the_parts_asked_for_are_measured() -> None:
    """A line's name chooses the part that gives it; an unknown name is refused with the list."""
    assert _chosen(["put_client", "put_leader"]) == ["sequential"]
    assert list(PARTS) == _chosen([])
    with pytest.raises(SystemExit, match="put_leader"):
        _chosen(["puts"])


def test_quantiles_are_samples() -> None:
    """No interpolation: a quantile is a time that was measured."""
    assert (quantile([5, 1, 3], 0.5), quantile([5, 1, 3], 0.99)) == (3, 5)
    assert median([1, 3]) == 2.0


def test_minting_is_measured_with_and_without_the_other_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    """Three lines; what is not installed is not compared with, and everything else is."""
    report = Report()
    minting.measure(report, scale=1)
    figures = {line.name: line.figures for line in report.lines}
    assert set(figures) == {"ids_mint", "ids_mint_many", "ids_cap"} == {"ids_mint", *PARTS["ids_mint"]}
    assert {"mint_ns", "nothing_ns", "uuid4_ns"} <= set(figures["ids_mint"])
    assert figures["ids_mint_many"]["limit"] == "<= 1.3x"
    assert figures["ids_cap"]["per_s"] > 0
    assert figures["ids_cap"]["waits"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_transfer_that_is_half_done_or_not_as_it_was_told_is_found() -> None:
    """Each is a violation of its own, in words; what nobody was told of may be either, but whole."""
    notes = [
        [
            "begin a first map 5",
            "done a",
            "begin b map vault 3",
            "not b",
            "begin c first second 2",
            "unsure c",
        ],
        ["begin d first vault 9", "begin e vault map 1", "done e", "begin f first map 4", "done f"],
    ]
    stores = {
        "first": {"a": -5, "c": -2, "f": -4},
        "second": {"c": 2},
        "map": {"a": 5, "f": 4},
        "vault": {},
    }
    violations, looked_at = prove(notes, stores)
    assert violations == ["e was acknowledged and is nowhere"]
    assert looked_at["unsure_and_done"] == 1
    assert looked_at["died"] == 1
    stores["vault"] = {"b": 3, "g": 1}
    stores["map"].pop("a")
    violations, _ = prove(notes, stores)
    assert sorted(violations) == [
        "a from first to map is half done: {'first': -5} (done)",
        "b from map to vault is half done: {'vault': 3} (not)",
        "e was acknowledged and is nowhere",
        "the total is -1, not 0",
        "vault has g, which nobody began",
    ]
