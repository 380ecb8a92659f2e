"""What docs/testing-your-application.md shows and names."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from coordlib.testing import Simulation

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "docs" / "testing-your-application.md").read_text(encoding="utf-8")


def test_its_first_example_runs_as_it_stands() -> None:
    """The job that a crash interrupted is done again, under a greater token."""
    example = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)[0]
    names: dict[str, Any] = {}
    exec(compile(example, "docs/testing-your-application.md", "exec"), names)
    done = names["done"]
    assert done[0].startswith("job 0") and done[-1].startswith("job 9")
    tokens = [int(line.split("token ")[1]) for line in done]
    assert tokens == sorted(set(tokens))
    assert names["app"].starts == 2


def test_what_it_names_exists() -> None:
    """Methods and attributes of `sim`, and arguments of `Simulation`."""
    made = Simulation()
    for name in set(re.findall(r"\bsim\.([a-z_]+)", TEXT)):
        assert hasattr(made, name), name
    arguments = inspect.signature(Simulation).parameters
    for name in ("seed", "members", "faults", "fault_seconds", "session_ttl", "stall_seconds"):
        assert name in arguments and name in TEXT, name
