"""Figures and how they are shown: quantiles, lines with a limit, the table, the machine they were taken on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Line", "Report", "machine", "median", "quantile", "quantiles"]


def quantile(samples: Sequence[float], fraction: float) -> float:
    """The sample below which `fraction` of all lie; of an empty sequence, not a number."""
    if not samples:
        return float("nan")
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def median(samples: Sequence[float]) -> float:
    """The middle sample, or the mean of the two in the middle."""
    ordered = sorted(samples)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """p50, p99 and the longest, in the unit of the samples (microseconds here)."""
    return {
        "p50_us": round(quantile(samples, 0.5), 1),
        "p99_us": round(quantile(samples, 0.99), 1),
        "max_us": round(max(samples), 1) if samples else float("nan"),
        "count": len(samples),
    }


class Line:
    """One measured thing: its figures, what it is compared with, and whether it is within its limit."""

    def __init__(
        self,
        name: str,
        figures: dict[str, Any],
        *,
        shown: str,
        value: float | None = None,
        at_most: float | None = None,
        at_least: float | None = None,
        unit: str = "",
    ) -> None:
        self.name = name
        self.figures = dict(figures)
        self.shown = shown
        self.value = value
        self.limit = ""
        self.is_ok: bool | None = None
        if value is not None and at_most is not None:
            self.limit, self.is_ok = f"<= {at_most:g}{unit}", value <= at_most
        elif value is not None and at_least is not None:
            self.limit, self.is_ok = f">= {at_least:g}{unit}", value >= at_least
        self.unit = unit
        if self.is_ok is not None:
            self.figures["limit"] = self.limit
            self.figures["is_ok"] = self.is_ok

    def __str__(self) -> str:
        value = "" if self.value is None else f"{self.value:.2f}{self.unit}"
        verdict = {None: "", True: "ok", False: "MISS"}[self.is_ok]
        return f"{self.name:<24} {self.shown:<52} {value:>10} {self.limit:>10} {verdict}"


class Report:
    """Prints each line when it is there; at the end gives the whole as one JSON object."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def add(self, line: Line) -> None:
        self.lines.append(line)
        print(line, flush=True)

    def find(self, name: str) -> Line | None:
        """The latest line of that name."""
        for line in reversed(self.lines):
            if line.name == name:
                return line
        return None

    @property
    def missed(self) -> list[str]:
        return [line.name for line in self.lines if line.is_ok is False]

    def as_json(self, configuration: dict[str, Any]) -> dict[str, Any]:
        return {
            "machine": machine(),
            "configuration": configuration,
            **{line.name: line.figures for line in self.lines},
            "missed": self.missed,
        }


def machine() -> dict[str, Any]:
    """Where and of what the figures were taken: a figure without it means nothing."""
    try:
        root = Path(__file__).resolve().parent.parent
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    model = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), ""
            )
    except OSError:
        pass
    return {
        "cores": os.cpu_count(),
        "cpu": model,
        "python": sys.version.split()[0],
        "kernel": platform.release(),
        "system": platform.system(),
        "commit": commit,
    }
