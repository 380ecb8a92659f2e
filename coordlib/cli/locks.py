"""`coordlib locks`: who holds which lock. Asks the leader, as any client does."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any, Final

from coordlib.api.cluster import Cluster
from coordlib.cli.settings import client_settings
from coordlib.machine import commands
from coordlib.node.clock import monotonic_ms
from coordlib.node.driver import ClientDriver
from coordlib.node.operations import OpGen, Step
from coordlib.wire.messages import RequestKind

__all__ = ["run"]

PAGE: Final = 500


def run(arguments: argparse.Namespace) -> int:
    settings = client_settings(arguments, f"locks-{os.getpid()}")
    with Cluster._of(lambda: ClientDriver(settings), settings.timing) as cluster:
        rows = cluster._run(_locks_gen(settings.timing.request_timeout_ms))
    locks = [
        {
            "lock": name.decode("utf-8", "backslashreplace"),
            "holder": owner,
            "token": token,
            "waiters": waiters,
        }
        for name, _session, owner, token, _since_ms, waiters in rows
    ]
    locks.sort(key=lambda lock: str(lock["lock"]))
    if arguments.json:
        print(json.dumps(locks))
    elif not locks:
        print("no lock is held")
    else:
        table = [("lock", "holder", "token", "waiters")]
        table += [tuple(str(cell) for cell in lock.values()) for lock in locks]  # type: ignore[misc]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        for row in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _locks_gen(timeout_ms: int) -> OpGen[list[Any]]:
    rows: list[Any] = []
    after: bytes | None = None
    while True:
        body = commands.query_locks(after, PAGE)
        reply = yield Step(RequestKind.QUERY, body, monotonic_ms() + timeout_ms)
        page, is_more = commands.decode_reply(reply)
        rows.extend(page)
        if not is_more or not page:
            return rows
        after = page[-1][0]
