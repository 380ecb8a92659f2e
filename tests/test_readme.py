"""The README's code is run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)


def test_the_first_example_runs(tmp_path: Path) -> None:
    """In an empty folder, in a process of its own, with nothing configured."""
    result = subprocess.run(
        [sys.executable, "-c", PYTHON_BLOCKS[0]],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'transports'}", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == "2 {'invoice-42': 'paid', 'eur': 1.1}"
    assert list(tmp_path.iterdir()) == []


def test_the_first_example_is_short() -> None:
    """Fifteen lines, blank ones and comments not counted."""
    lines = [
        line for line in PYTHON_BLOCKS[0].splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    assert len(lines) <= 15


@pytest.mark.parametrize("number", range(len(PYTHON_BLOCKS)))
def test_every_example_is_python(number: int) -> None:
    """The others need machines to run on; they must at least be right in form."""
    compile(PYTHON_BLOCKS[number], f"README block {number}", "exec")


def test_every_file_that_is_linked_is_there() -> None:
    """Relative links lead somewhere."""
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []
