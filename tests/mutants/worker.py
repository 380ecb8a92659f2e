"""One defect in one process of its own: seeds one after the other, or tests, until something notices.

    python -m tests.mutants.worker '{"mutant": NAME, "first": 0, "count": 40, "is_checking": false}'
    python -m tests.mutants.worker '{"mutant": NAME, "tests": ["tests/scenarios"]}'

Without a name the code stays as it is. The last line of the output is a JSON object, see `Finding`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import resource
import signal
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, process_time
from typing import Any

from tests.mutants.patching import Hits, apply, switch_off_invariants
from tests.mutants.table import MUTANTS

__all__ = ["Finding", "main"]

SEED_CPU_SECONDS_MAX = 180.0
"""A seed takes a few seconds. One that takes so long is caught in a loop that virtual time never sees."""

MEMORY_BYTES_MAX = 4 << 30

ROOT = Path(__file__).resolve().parents[2]


class Hang(BaseException):
    """Not an Exception: nothing on its way out of the loop may take it for one."""


@dataclass
class Finding:
    """What came of it. `check` is empty if nobody noticed."""

    check: str = ""
    message: str = ""
    runs: int = 0  # seeds, the one that failed included; or tests
    hits: int = 0
    seconds: float = 0.0


def _simulate(finding: Finding, first: int, count: int, seconds_max: float) -> None:
    from coordlib.testing.simulation.invariants import Violation
    from coordlib.testing.simulation.run import simulate

    def expired(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, expired)
    began = process_time()  # not by the clock on the wall: others may want the same processor
    for seed in range(first, first + count):
        if process_time() - began > seconds_max:
            return
        finding.runs += 1
        signal.setitimer(signal.ITIMER_PROF, SEED_CPU_SECONDS_MAX)
        gc.disable()
        try:
            simulate(seed)
        except Violation as violation:
            message = violation.message.replace(f"{ROOT}/", "")  # traces name files: not those of one machine
            finding.check, finding.message = violation.check, f"seed {seed}: {message}"
            return
        except Hang:
            finding.check, finding.message = "hang", f"seed {seed} does not end"
            return
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            finding.check = "crash"
            finding.message = f"seed {seed}: {error!r} in {where.name}, line {where.lineno}"
            return
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            gc.enable()
            gc.collect()


class _FirstFailure:
    """A pytest plugin."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            self.finding.runs += 1
        if report.failed and not self.finding.check:
            is_scenario = report.nodeid.startswith("tests/scenarios")
            self.finding.check = "scenario" if is_scenario else "unit test"
            self.finding.message = report.nodeid


def _test(finding: Finding, tests: list[str]) -> None:
    import pytest

    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main(
            ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", *tests], plugins=[_FirstFailure(finding)]
        )
    if code and not finding.check:
        raise SystemExit(f"pytest ended with {code!r}")


def main(arguments: dict[str, Any]) -> Finding:
    """Do what the arguments ask for, in this process, which is of no other use afterwards."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    logging.getLogger("coordlib").addHandler(logging.NullHandler())
    logging.getLogger("coordlib").propagate = bool(arguments.get("tests"))
    tests = arguments.get("tests")
    if not tests:
        import coordlib.testing.simulation.run  # noqa: F401  # whatever it imports is there before anything is changed

        if not arguments["is_checking"]:
            switch_off_invariants()
    name = arguments["mutant"]
    hits = apply(MUTANTS[name]) if name else Hits()
    finding = Finding()
    began = monotonic()
    if tests:
        _test(finding, tests)
    else:
        _simulate(finding, arguments["first"], arguments["count"], arguments.get("seconds_max", 1e9))
    finding.hits = hits.count
    finding.seconds = monotonic() - began
    return finding


if __name__ == "__main__":
    result = json.dumps(asdict(main(json.loads(sys.argv[1]))))
    sys.stdout.write(result + "\n")
    sys.stdout.flush()
