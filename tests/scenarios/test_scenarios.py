"""Every scenario of this directory, one test a file; and that their runner notices what it is there to notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordlib.testing.scenarios import parse_file, run_scenario

HERE = Path(__file__).resolve().parent
FILES = sorted(HERE.glob("*.txt"))
HEAD = "bug: nobody #1 - nothing\nwhy: For the test.\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_scenario_goes_as_it_says(path: Path) -> None:
    """The invariants hold after every step, its claims do, and the cluster works in the end."""
    run_scenario(parse_file(path))
