"""`coordlib status`: how the members are, as each tells itself. Needs no quorum and opens no session."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any, Final

from coordlib.cli.settings import client_settings
from coordlib.config import ClientSettings
from coordlib.errors import StartError
from coordlib.node.driver import ClientDriver

__all__ = ["render", "run"]

SETTLE_SECONDS: Final = 1.0
PROBLEM_COUNTERS: Final = {
    "auth-failed": "messages that failed authentication",
    "quarantined": "messages of peers held off for failing to authenticate",
    "untrusted_messages": "messages of members that are not trusted yet",
}


def run(arguments: argparse.Namespace) -> int:
    """0 if there is a leader and every member answers, 1 if not; nobody to ask is an error."""
    settings = client_settings(arguments, f"status-{os.getpid()}")
    driver = ClientDriver(settings, wants_session=False)
    try:
        driver.start()
        _await_members(driver, settings)
        statuses = driver.ask_status(arguments.timeout)
        observer = driver.stats()
    except StartError as error:
        if not arguments.json:
            raise
        reasons = [line.removeprefix("  - ") for line in error.message.splitlines()]
        print(json.dumps({"cluster": settings.cluster, "members": {}, "problems": reasons}))
        return 2
    finally:
        driver.stop(0)
    # By endpoint where nobody answers: the name is not known then.
    problems = list(observer["wire_problems"].values())
    if arguments.json:
        answer = {"cluster": settings.cluster, "members": statuses, "problems": problems}
        print(json.dumps(answer, sort_keys=True))
    else:
        print(render(settings.cluster, statuses, problems))
    is_well = _leader(statuses) != "" and set(_endpoints(statuses)) == set(statuses)
    return 0 if is_well else 1


def _await_members(driver: ClientDriver, settings: ClientSettings) -> None:
    """Give the members that one of them told of a moment to answer too."""
    deadline = time.monotonic() + min(SETTLE_SECONDS, settings.timing.start_timeout_ms / 1000)
    while time.monotonic() < deadline:
        known = _endpoints(driver.ask_status(0.3))
        connected = driver.stats()["connected"]
        if known and set(known) <= set(connected):
            return
        time.sleep(0.05)


def _endpoints(statuses: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Every member that some member lists, with its endpoint."""
    found: dict[str, str] = {}
    for name, status in statuses.items():
        found.setdefault(name, "")
        for member, entry in status.get("members", {}).items():
            found[member] = entry["endpoint"]
    return found


def _leader(statuses: dict[str, dict[str, Any]]) -> str:
    """Who leads the newest term, by its own word; empty if nobody says so."""
    leaders = [(s["term"], name) for name, s in statuses.items() if s.get("role") == "leader"]
    newest = max((s.get("term", 0) for s in statuses.values()), default=0)
    return max(leaders)[1] if leaders and max(leaders)[0] == newest else ""


def render(cluster: str, statuses: dict[str, dict[str, Any]], problems: list[str]) -> str:
    """The answer for people: a table of the members, then what is wrong, in words."""
    leader = _leader(statuses)
    endpoints = _endpoints(statuses)
    formed = [status for status in statuses.values() if status.get("is_formed")]
    if not formed:
        head = f"cluster {cluster!r}: not formed yet"
    elif leader:
        head = f"cluster {cluster!r}: {leader} leads term {statuses[leader]['term']}"
    else:
        head = f"cluster {cluster!r}: NO LEADER: nothing can be written, and nothing read but stale state"
    lines = [head, ""]
    columns = ("member", "role", "term", "commit", "applied", "lag", "sessions", "clients", "endpoint")
    commit = max((status.get("commit_index", 0) for status in statuses.values()), default=0)
    rows = [columns, *(_row(name, statuses.get(name), commit, endpoints[name]) for name in sorted(endpoints))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    troubles = list(problems)
    for name in sorted(endpoints):
        if name in statuses:
            troubles.extend(f"{name}: {text}" for text in _troubles(statuses[name]))
        else:
            troubles.append(
                f"{name} at {endpoints[name]} does not answer: is it running, and can it be reached?"
            )
    if troubles:
        lines += ["", "problems:", *(f"  - {text}" for text in dict.fromkeys(troubles))]
    return "\n".join(lines)


def _row(name: str, status: dict[str, Any] | None, commit: int, endpoint: str) -> tuple[str, ...]:
    if status is None:
        return (name, "no answer", *["-"] * 6, endpoint)
    if "term" not in status:
        return (name, "not formed", *["-"] * 5, str(status.get("clients", "-")), endpoint)
    applied = status["applied_index"]
    numbers = (status["term"], status["commit_index"], applied, max(0, commit - applied))
    return (name, status["role"], *map(str, (*numbers, status["sessions"], status["clients"])), endpoint)


def _troubles(status: dict[str, Any]) -> list[str]:
    texts = [str(text) for text in status.get("problems", [])]
    texts += [str(text) for text in status.get("wire_problems", {}).values()]
    counters = {**status.get("counters", {}), **status.get("wire", {})}
    for code, count in sorted(counters.items()):
        if not isinstance(count, int) or count == 0:
            continue
        if code in PROBLEM_COUNTERS:
            texts.append(f"{count:,} {PROBLEM_COUNTERS[code]}")
        elif code.startswith("refused-"):
            texts.append(
                f"{count:,} connections refused ({code.removeprefix('refused-')}): a wrong secret, or not one of ours"
            )
    return texts
