"""An application with an embedded member, or a client: works, writes its history, does as it is told.

One JSON object a line on standard input: first what it is, then requests {"id", "do", ...}; one line on standard
output for each answer. It ends when its input does, and is killed when the process that started it dies:
nothing outlives that. A node that stopped for good ends the process with exit code 3 and the error on its log.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
from time import monotonic, sleep, time
from typing import Any, Final

import coordlib
from coordlib.errors import CoordError, FatalError
from coordlib.testing.history import HistoryWriter
from coordlib.testing.nemesis.work import MAPS, OWN, Sections, Work

__all__ = ["EXIT_FATAL"]

EXIT_FATAL: Final = 3
PULSE_SECONDS: Final = 0.01
_PR_SET_PDEATHSIG: Final = 1

log = logging.getLogger("nemesis.application")


class _Pulse:
    """A thread that would run every hundredth of a second, and the longest time for which it did not."""

    def __init__(self) -> None:
        self._gap_seconds = 0.0
        self._has_beaten = threading.Event()
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def _beat(self) -> None:
        last = monotonic()
        while True:
            sleep(PULSE_SECONDS)
            now = monotonic()
            self._gap_seconds = max(self._gap_seconds, now - last)
            last = now
            self._has_beaten.set()

    def take(self) -> float:
        """The longest gap since this was asked last, the one that may have just ended included."""
        self._has_beaten.clear()
        self._has_beaten.wait()
        gap, self._gap_seconds = self._gap_seconds, 0.0
        return gap


class _Application:
    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given
        make = coordlib.connect if given["kind"] == "client" else coordlib.Cluster
        self._cluster = make(*given["positional"], **given["arguments"])
        self._pulse = _Pulse()
        self._work: Work | None = None

    def start(self, _: dict[str, Any]) -> dict[str, Any]:
        self._cluster.start()
        return {}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Begin to work."""
        given = self._given
        self._work = Work(
            self._cluster,
            name=given["incarnation"],
            history=HistoryWriter(given["history"]),
            sections=Sections(given["sections"]),
            seed=request["seed"],
            pause_ms=request["pause_ms"],
            sabotage=tuple(request["sabotage"]),
            on_fatal=_end_fatally,
        )
        return {}

    def unload(self, _: dict[str, Any]) -> dict[str, Any]:
        """End it."""
        work = self._work
        if work is None:
            return {"stuck": [], "errors": {}, "done": 0}
        return {"stuck": work.stop(), "errors": work.errors, "done": work.done}

    def progress(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"done": 0 if self._work is None else self._work.done}

    def stats(self, _: dict[str, Any]) -> dict[str, Any]:
        return self._cluster.stats()

    def feel(self, _: dict[str, Any]) -> dict[str, Any]:
        """What this process sees of time: the longest gap in its own running, and its wall clock."""
        return {"gap_seconds": self._pulse.take(), "wall_seconds": time()}

    def contents(self, request: dict[str, Any]) -> dict[str, Any]:
        """All of the maps, to a file, as this very member has applied them."""
        found = {}
        for name in MAPS:
            state = self._cluster.map(name)
            found[name] = {key: state.read_stale(key) for key in state}
        with open(request["path"], "w", encoding="utf-8") as file:
            json.dump(found, file)
        return {}

    def versions(self, _: dict[str, Any]) -> dict[str, Any]:
        """How often each key of `own` was written, by the cluster's count."""
        own = self._cluster.map(OWN)
        versions = {}
        for key in own:
            found = own.get_versioned(key)
            versions[key] = 0 if found is None else found.version
        return {"versions": versions}

    def serve(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            answer: dict[str, Any]
            try:
                answer = {"answer": getattr(self, request["do"])(request)}
            except FatalError as error:
                _end_fatally(error)
            except CoordError as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            sys.stdout.write(json.dumps({"id": request["id"], **answer}) + "\n")
            sys.stdout.flush()

    def close(self) -> None:
        """Close the handle under the calls that are on their way, as an application may."""
        if self._work is not None:
            self._work.begin_stop()
        self._cluster.close()
        if self._work is not None:
            self._work.stop()


def _end_fatally(error: FatalError) -> None:
    cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
    log.critical("FATAL %s: %s%s", type(error).__name__, error, cause)
    logging.shutdown()
    os._exit(EXIT_FATAL)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _main() -> int:
    _die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    line = sys.stdin.readline()
    if not line:
        return 0
    application = _Application(json.loads(line))
    try:
        application.serve()
    finally:
        application.close()
    return 0


if __name__ == "__main__":
    sys.exit(_main())
