"""A few real power cuts of a real file system; `make powercuts` does a thousand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "powercuts.py"
IMPOSSIBLE = 3


def _cut(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if done.returncode == IMPOSSIBLE:
        if os.environ.get("COORDLIB_REQUIRE_FAULTS") == "1":
            pytest.fail(f"power cuts were required: {done.stderr}")
        pytest.skip(f"NO POWER WAS CUT: {done.stderr.strip()}")
    return done.returncode, done.stdout


def test_a_power_cut_loses_nothing_acknowledged_and_the_control_does(tmp_path: Path) -> None:
    """Ten cuts of the log as it is, after ten without fsync, of which some must have lost something."""
    code, out = _cut("--cuts", "10", "--seed", "3", "--dir", str(tmp_path))
    result = json.loads(out.splitlines()[-1])["powercuts"]
    assert code == 0, out
    assert (result["cuts"], result["violations"], result["control_cuts"]) == (10, 0, 10)
    assert result["acknowledged"] > 0 and result["control_violations"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_does_not_sync_is_found_out(tmp_path: Path) -> None:
    """It ends with 1 and says what was lost."""
    code, out = _cut("--cuts", "3", "--seed", "3", "--dir", str(tmp_path), "--sabotage", "no-fsync")
    assert code == 1 and "VIOLATION: cut " in out


def test_without_root_it_says_so_and_proves_nothing(tmp_path: Path) -> None:
    """Exit code 3, and no claim."""
    if os.geteuid() == 0:
        code = "import os, sys; os.geteuid = lambda: 1000; from benchmarks.powercuts import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code]
    else:
        command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(
        [*command, "--cuts", "1", "--dir", str(tmp_path)],
        cwd=SCRIPT.parents[1],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == IMPOSSIBLE
    assert "cannot be done here: it takes root" in done.stderr and "violations" not in done.stdout
