"""What ids cost, in one process and on one thread, beside other libraries' and `range` in the same run.

CPU time of the thread, except for `ids_cap`. The others are measured in turns with ours, round by round, so that
what the machine does meanwhile is shared; each figure is the median of its rounds. `pip install coordlib[bench]`
brings them; without them there is no comparison.
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable
from time import perf_counter_ns, thread_time_ns
from typing import Any, Final

import coordlib
from benchmarks.figures import Line, Report, median

__all__ = ["measure"]

ROUNDS: Final = 15
BLOCK: Final = 1000
CAP_PER_S: Final = 4_096_000
"""What the default layout has for one worker: 4,096 a millisecond."""


def _others() -> dict[str, Callable[[], Any]]:
    """One id of each other kind; what is not installed is missing."""
    found: dict[str, Callable[[], Any]] = {"uuid4": uuid.uuid4}
    try:
        found["snowflake_id"] = importlib.import_module("snowflake").SnowflakeGenerator(1).__next__
    except ImportError:
        pass
    try:
        found["uuid_utils_uuid7"] = importlib.import_module("uuid_utils").uuid7
    except ImportError:
        pass
    return found


def _ns_per_call(call: Callable[[], Any], count: int) -> float:
    rounds = range(count)
    began = thread_time_ns()
    for _ in rounds:
        call()
    return (thread_time_ns() - began) / count


def _compared(calls: dict[str, Callable[[], Any]], count: int) -> dict[str, float]:
    """Nanoseconds of a call of each, taken in turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        _ns_per_call(call, count // 10)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(_ns_per_call(call, count))
    return {name: round(median(values), 1) for name, values in samples.items()}


def measure(report: Report, *, scale: int) -> None:
    """Add the lines ids_mint, ids_mint_many and ids_cap."""
    with coordlib.local() as cluster:
        ids = cluster.ids()
        ids.mint()
        _mint(report, ids, 2000 * scale)
        # Of their own names: what one has used of the second that ids may be ahead of the time, the next one lacks.
        _mint_many(report, cluster.ids("many"), 100)
        _cap(report, cluster.ids("cap"), seconds=0.2 * scale)


def _mint(report: Report, ids: coordlib.Ids, count: int) -> None:
    figures = _compared({"mint": ids.mint, "nothing": lambda: None, **_others()}, count)
    shown = "  ".join(f"{name} {figure:.0f}" for name, figure in figures.items() if name != "nothing")
    other = figures.get("snowflake_id")
    ratio = None if other is None else figures["mint"] / other
    figures_ns = {f"{name}_ns": figure for name, figure in figures.items()}
    report.add(Line("ids_mint", figures_ns, shown=f"{shown} ns", value=ratio, at_most=0.8, unit="x"))


def _mint_many(report: Report, ids: coordlib.Ids, count: int) -> None:
    base = ids.mint()
    calls = {
        "mint_many": lambda: list(ids.mint_many(BLOCK)),
        "range": lambda: list(range(base, base + BLOCK)),
    }
    figures = _compared(calls, count)
    ratio = figures["mint_many"] / figures["range"]
    figures_ns = {f"{name}_ns": figure for name, figure in figures.items()}
    shown = (
        f"list of {BLOCK}: {figures['mint_many'] / 1000:.1f} us, of a range {figures['range'] / 1000:.1f} us"
    )
    report.add(Line("ids_mint_many", figures_ns, shown=shown, value=ratio, at_most=1.3, unit="x"))


def _cap(report: Report, ids: coordlib.Ids, *, seconds: float) -> None:
    # Running ahead of the time is no speed: begin when that is used up, and count what comes after.
    size = 40 * BLOCK
    waits = ids.counters["waits"]
    while ids.counters["waits"] < waits + 3:
        ids.mint_many(size)
    blocks, began = 0, perf_counter_ns()
    while (spent := perf_counter_ns() - began) < seconds * 1e9:
        ids.mint_many(size)
        blocks += 1
    per_s = blocks * size / spent * 1e9
    figures = {"per_s": round(per_s), "cap_per_s": CAP_PER_S, "waits": ids.counters["waits"]}
    shown = f"{per_s:,.0f}/s in blocks of {size}; the layout has {CAP_PER_S:,}"
    report.add(Line("ids_cap", figures, shown=shown, value=per_s / CAP_PER_S, at_least=0.95, unit="x"))
