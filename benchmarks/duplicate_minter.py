"""A process of `benchmarks.duplicate_hunt`: a client that mints as long as it lives, and writes down every id.

One JSON object a line, both ways: first what it is, then requests. Its ids go into a file, 8 bytes each in the order in
which they were minted, with one write a batch: whatever kills it, what was written is there. It ends when its input
does, and is killed when the process that started it dies.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import threading
from array import array
from collections import Counter
from itertools import islice
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any, Final

import coordlib
from coordlib.errors import CoordError, ForkedError
from coordlib.ids.layout import Layout

__all__: list[str] = []

PROGRAM: Final = "benchmarks.duplicate_minter"
GENERATOR: Final = "hunted"
BATCH_MAX: Final = 4000
RETRY_SECONDS: Final = 0.02
JUMP_SECONDS: Final = 1800
WAIT_SECONDS: Final = 20.0
SABOTAGED_BLOCKS: Final = 500
_PR_SET_PDEATHSIG: Final = 1

EXIT_OF_CHILD: Final = 17
"""Of a forked child that was refused its parent's generator, and minted by one of its own."""


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class _Writer:
    """A file of ids."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)

    def write(self, batch: array[int]) -> None:
        data = memoryview(batch).cast("B")
        while data:
            data = data[os.write(self._file, data) :]

    def close(self) -> None:
        os.close(self._file)


class _Minting:
    """A thread that mints until it is told to stop."""

    def __init__(self, ids: coordlib.Ids, path: str, *, seed: int, pause_seconds: float) -> None:
        self.errors: Counter[str] = Counter()
        self.jumps = 0  # of the wall clock, by an hour or two
        self.minted = 0
        self._ids = ids
        self._writer = _Writer(path)
        self._chance = random.Random(seed)
        self._pause_seconds = pause_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._mint)
        self._thread.start()

    def _mint(self) -> None:
        off = time() - monotonic()
        while not self._stop.is_set():
            self.batch()
            now_off = time() - monotonic()
            self.jumps += abs(now_off - off) > JUMP_SECONDS
            off = now_off
            sleep(self._pause_seconds)
        self._writer.close()

    def batch(self) -> None:
        """Some ids one by one, or a block; what was minted before an error is written too."""
        count = self._chance.randint(1, BATCH_MAX)
        batch = array("q")
        try:
            if self._chance.random() < 0.5:
                batch.extend(islice(iter(self._ids.mint, -1), count))
            else:
                batch.extend(self._ids.mint_many(count))
        except CoordError as error:
            self.errors[error.code] += 1
            sleep(RETRY_SECONDS)
        self._writer.write(batch)
        self.minted += len(batch)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


class _Minter:
    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given
        self._cluster = self._connect()
        self._ids: coordlib.Ids
        self._minting: _Minting | None = None

    def _connect(self) -> coordlib.Cluster:
        given = self._given
        return coordlib.connect(given["endpoints"], cluster="bench", secret=given["secret"])

    def _ids_of(self, cluster: coordlib.Cluster) -> coordlib.Ids:
        layout = Layout(**self._given["layout"])
        return cluster.ids(GENERATOR, layout=layout, window=self._given["window"])

    def start(self, _: dict[str, Any]) -> dict[str, Any]:
        """Connect, and begin to mint."""
        given = self._given
        self._cluster.start()
        self._ids = self._ids_of(self._cluster)
        if given["sabotage"] == "same-window":
            self._share_window()
        self._minting = _Minting(
            self._ids, given["path"], seed=given["seed"], pause_seconds=given["pause_seconds"]
        )
        return {}

    def _share_window(self) -> None:
        """What must never happen: the second process that comes by takes the first one's window as well."""
        path = Path(self._given["window_path"])
        self._ids.mint()
        if self._given["is_second"]:
            deadline = monotonic() + WAIT_SECONDS
            while not path.exists() and monotonic() < deadline:
                sleep(0.01)
            worker, begin, until, now = json.loads(path.read_text())
            self._ids._minter.install(worker, begin, until, now)
        elif not path.exists():
            info = self._ids._minter.info()
            made = path.with_suffix(".new")
            made.write_text(json.dumps([info.worker, info.from_unit, info.until_unit, info.now_unit]))
            made.rename(path)

    def fork(self, request: dict[str, Any]) -> dict[str, Any]:
        """Fork while ids are minted; the child attaches, mints and ends. Returns how it ended."""
        process = os.fork()
        if not process:
            code = 1
            try:
                code = self._be_a_child(request)
            finally:
                os._exit(code)
        _, status = os.waitpid(process, 0)
        return {"exit": os.waitstatus_to_exitcode(status)}

    def _be_a_child(self, request: dict[str, Any]) -> int:
        _die_with_parent()
        writer = _Writer(request["path"])
        if self._given["sabotage"] == "fork-keeps-lease":
            self._ids._minter._stopped = None
            for _ in range(SABOTAGED_BLOCKS):
                writer.write(array("q", self._ids._minter.mint_many(100)))
                sleep(0.001)
            return EXIT_OF_CHILD
        refused = 0
        for mint in (self._ids.mint, lambda: self._ids.mint_many(10)):
            try:
                mint()
            except ForkedError:
                refused += 1
        with self._connect() as cluster:
            ids = self._ids_of(cluster)
            left, deadline = request["count"], monotonic() + WAIT_SECONDS
            while left > 0 and monotonic() < deadline:
                try:
                    writer.write(array("q", ids.mint_many(100)))
                    left -= 100
                except CoordError:
                    sleep(RETRY_SECONDS)  # no worker is free, or no leader there
        return EXIT_OF_CHILD if refused == 2 and left <= 0 else 1

    def facts(self, _: dict[str, Any]) -> dict[str, Any]:
        minting = self._minting
        assert minting is not None
        return {
            "errors": minting.errors,
            "jumps": minting.jumps,
            "minted": minting.minted,
            **self._ids.counters,
        }

    def serve(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(self, request["do"])(request)
            except CoordError as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()

    def close(self) -> None:
        if self._minting is not None:
            self._minting.stop()
        self._cluster.close()


def _main() -> None:
    _die_with_parent()
    line = sys.stdin.readline()
    if not line:
        return
    minter = _Minter(json.loads(line))
    try:
        minter.serve()
    finally:
        minter.close()


if __name__ == "__main__":
    _main()
