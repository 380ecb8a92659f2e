"""`coordlib bench`: the benchmarks of the source tree."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import coordlib
from coordlib.errors import UsageError

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    root = Path(coordlib.__file__).resolve().parent.parent
    program = root / "benchmarks" / "run.py"
    if not (root / "pyproject.toml").exists() or not program.exists():
        raise UsageError(
            "the benchmarks are not installed with the package: run `make bench` in the source tree"
        )
    return subprocess.call([sys.executable, str(program), *arguments.rest])
