"""`coordlib check FILE...`: is a recorded history linearizable? Reads files only (docs/histories.md)."""

from __future__ import annotations

import argparse

from coordlib.errors import UsageError
from coordlib.testing.checkers import check
from coordlib.testing.history import load

__all__ = ["run"]

EXITS = {"legal": 0, "illegal": 1, "unknown": 2}


def run(arguments: argparse.Namespace) -> int:
    """0 if the history is legal, 1 if it is not, 2 if that could not be found out. What is unreadable raises."""
    if not arguments.time_limit > 0:
        raise UsageError("--time-limit must be more than 0 seconds")
    operations = load(*arguments.files)
    if not operations:
        # An empty file is a recorder that did not work, not a cluster that did.
        raise UsageError("there is no operation in " + ", ".join(arguments.files))
    verdict = check(operations, steps_max=arguments.steps, time_limit_seconds=arguments.time_limit)
    unknown = sum(operation.status is None for operation in operations)
    failed = sum(operation.status == "fail" for operation in operations)
    print(
        f"{verdict.result}: {verdict.operations} operations ({failed} failed, {unknown} of unknown outcome) "
        f"on {verdict.keys} keys"
    )
    if verdict.explanation:
        print(f"\n{verdict.explanation}")
    return EXITS[verdict.result]
