"""A member of the cluster that dies at a named point of a decision while it leads, or whose clock jumps.

What `benchmarks.application` does, and besides: `arm` says where it is to die, `jump` has its wall clock jump. What it had
in its log when it died is in what it wrote to its standard error.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from benchmarks import application
from coordlib import cbor
from coordlib.machine import Applied, commands
from coordlib.machine.commands import OpCode
from coordlib.node.clock import wall_ms
from coordlib.node.driver import Driver
from coordlib.node.service import RequestService, Source
from coordlib.raft.messages import Entry
from coordlib.wire.messages import Request

__all__: list[str] = []


def _is_decision(operation: bytes) -> bool:
    number, *arguments = cbor.decode(operation)
    return number == OpCode.TX_DECIDE and bool(arguments[0])


def _die(service: RequestService, moment: str, index: int) -> None:
    sys.stderr.write(f"died: decision {moment}, entry {index}, committed {service._raft.commit_index}\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _dies_when_proposed() -> None:
    """It has appended the decision, and sent it to nobody."""
    original = RequestService._command

    def command(self: RequestService, source: Source, request: Request, now: int) -> None:
        original(self, source, request, now)
        if _is_decision(request.body):
            _die(self, "proposed", self._raft.log.last_index)

    RequestService._command = command  # type: ignore[method-assign]


def _dies_when_committed() -> None:
    """The decision is committed and applied here, and nobody is told so."""
    original = RequestService.applied

    def applied(self: RequestService, entry: Entry, applied: Applied, now: int) -> None:
        if entry.index in self._proposed and _is_decision(commands.unpack_entry(entry.data)[4]):
            _die(self, "committed", entry.index)
        original(self, entry, applied, now)

    RequestService.applied = applied  # type: ignore[method-assign]


def _arm(_: Any, request: dict[str, Any]) -> dict[str, Any]:
    {"proposed": _dies_when_proposed, "committed": _dies_when_committed}[request["moment"]]()
    return {}


def _jump(_: Any, request: dict[str, Any]) -> dict[str, Any]:
    """By so many ms, from where it really is."""
    Driver._read_wall_clock = staticmethod(lambda: wall_ms() + request["ms"])
    return {}


if __name__ == "__main__":
    application._ThreadApplication.arm = _arm  # type: ignore[attr-defined]
    application._ThreadApplication.jump = _jump  # type: ignore[attr-defined]
    application._main()
