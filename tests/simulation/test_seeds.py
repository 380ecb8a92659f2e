"""The simulator itself, on the first seeds: every promise holds, and the same seed is the same run everywhere."""

from __future__ import annotations

import subprocess
import sys

import pytest

SEEDS = 40
TWICE = 10


@pytest.mark.timeout(600)
def test_the_first_seeds_hold_every_promise_and_are_the_same_in_another_process() -> None:
    """Whole clusters under every fault; some again under another PYTHONHASHSEED, with the same trace."""
    command = [sys.executable, "-m", "coordlib.testing.simulation"]
    run = subprocess.run(
        [*command, "--seeds", str(SEEDS), "--twice", str(TWICE)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-2000:]}"
    assert f"{SEEDS} seeds" in run.stdout
    assert f"{TWICE} seeds run again" in run.stdout
