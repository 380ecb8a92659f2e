"""An application with an embedded member, or a client, that does as it is told on its standard input.

One JSON object a line, both ways. The measuring loops run in here, in the process that holds the handle, so that
what is measured is what an application would see; only the results cross the pipe. The process ends when its
input does: nothing outlives the one that started it.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import resource
import sys
import threading
from collections.abc import Callable
from time import monotonic, perf_counter_ns, sleep
from typing import Any

import coordlib
from benchmarks.load import MAP as LOAD_MAP
from benchmarks.load import Load
from coordlib.errors import CoordError
from coordlib.machine import commands
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import OpGen, Step
from coordlib.wire.messages import RequestKind

__all__: list[str] = []

MAP = "bench"


def _rss_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _process_facts(_: dict[str, Any]) -> dict[str, Any]:
    return {"rss_bytes": _rss_bytes(), "cpu_seconds": _cpu_seconds(), "now": monotonic()}


class _Disturbances:
    """What a host may do to the node beside it: compute in Python without a pause, or hold the GIL in C."""

    def __init__(self) -> None:
        self._stop: threading.Event | None = None
        self._threads: list[threading.Thread] = []

    def set(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"burn": bool, "hold_ms": int}: from now on; both absent ends it."""
        if self._stop is not None:
            self._stop.set()
            for thread in self._threads:
                thread.join()
            self._stop, self._threads = None, []
        stop = threading.Event()
        loops: list[Callable[[], None]] = []
        if request.get("burn"):
            loops.append(lambda: self._burn(stop))
        if request.get("hold_ms"):
            loops.append(lambda: self._hold(stop, request["hold_ms"]))
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        if loops:
            self._stop = stop
        for thread in self._threads:
            thread.start()
        return {}

    @staticmethod
    def _burn(stop: threading.Event) -> None:
        number = 0
        while not stop.is_set():
            for _ in range(10_000):
                number = (number * 31 + 7) & 0xFFFFFFFF

    @staticmethod
    def _hold(stop: threading.Event, hold_ms: int) -> None:
        # A PyDLL call keeps the GIL, as a C extension does that never lets it go.
        library = ctypes.PyDLL(None)
        while not stop.wait(1 - hold_ms / 1000):
            library.usleep(hold_ms * 1000)


def _counted(operation: Callable[[int], object], count: int, deadline: float | None = None) -> dict[str, Any]:
    samples: list[int] = []
    began = perf_counter_ns()
    for number in range(count):
        start = perf_counter_ns()
        operation(number)
        samples.append((perf_counter_ns() - start) // 1000)
        if deadline is not None and monotonic() > deadline:
            break
    return {"samples_us": samples, "seconds": (perf_counter_ns() - began) / 1e9}


class _Writer:
    """A thread that writes one value after another and notes when each was acknowledged."""

    def __init__(self, cluster: coordlib.Cluster) -> None:
        self._map = cluster.map(MAP)
        self._stop = threading.Event()
        self._times: list[float] = []
        self._errors: list[str] = []
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        value, key, number = "w" * 100, f"writer-{os.getpid()}", 0
        while not self._stop.is_set():
            number += 1
            try:
                self._map.put(f"{key}-{number % 100}", value)
            except CoordError as error:
                self._errors.append(f"{type(error).__name__}: {error}")
                sleep(0.002)
            else:
                self._times.append(monotonic())

    def stop(self) -> dict[str, Any]:
        self._stop.set()
        self._thread.join(15)
        return {"acknowledged_at": self._times, "errors": self._errors[:20]}


class _ThreadApplication:
    def __init__(self, cluster: coordlib.Cluster) -> None:
        self._cluster = cluster
        self._map = cluster.map(MAP)
        self._disturbances = _Disturbances()
        self._writer: _Writer | None = None
        self._load: Load | None = None
        self._tellers: Any = None
        self._bank: Any = None

    def start(self, _: dict[str, Any]) -> dict[str, Any]:
        self._cluster.start()
        return {}

    def close(self, _: dict[str, Any]) -> dict[str, Any]:
        began = monotonic()
        self._cluster.close()
        return {"seconds": monotonic() - began, "now": monotonic()}

    def stats(self, _: dict[str, Any]) -> dict[str, Any]:
        return self._cluster.stats()

    def process(self, request: dict[str, Any]) -> dict[str, Any]:
        return _process_facts(request)

    def put(self, request: dict[str, Any]) -> dict[str, Any]:
        put, value, keys = self._map.put, "v" * request.get("size", 100), request.get("keys", 1000)
        seconds = request.get("seconds")
        deadline = None if seconds is None else monotonic() + seconds
        return _counted(lambda number: put(f"key-{number % keys}", value), request["count"], deadline)

    def read(self, request: dict[str, Any]) -> dict[str, Any]:
        get = self._map.get
        self._map.put("key-0", "v" * 100)
        return _counted(lambda _: get("key-0"), request["count"])

    def lock_unlock(self, request: dict[str, Any]) -> dict[str, Any]:
        lock, prefix = self._cluster.lock, request["prefix"]

        def once(number: int) -> None:
            with lock(f"{prefix}-{number}"):
                pass

        return _counted(once, request["count"])

    def put_in_flight(self, request: dict[str, Any]) -> dict[str, Any]:
        """`threads` threads put one after another, `count` in all."""
        put, value, threads = self._map.put, "v" * 100, request["threads"]
        each = request["count"] // threads
        ready = threading.Barrier(threads + 1)
        samples: list[list[int]] = [[] for _ in range(threads)]

        def work(number: int) -> None:
            own = samples[number]
            ready.wait()
            for turn in range(each):
                start = perf_counter_ns()
                put(f"key-{number}-{turn % 16}", value)
                own.append((perf_counter_ns() - start) // 1000)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        ready.wait()
        began = perf_counter_ns()
        for worker in workers:
            worker.join()
        seconds = (perf_counter_ns() - began) / 1e9
        return {"samples_us": [sample for own in samples for sample in own], "seconds": seconds}

    def disturb(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._disturbances.set(request)

    def write(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"on": true} begins to write in the background; false ends it and tells when what was acknowledged."""
        if request["on"]:
            self._writer = _Writer(self._cluster)
            return {}
        assert self._writer is not None
        return self._writer.stop()

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Begin what `benchmarks.kill9` has its processes do."""
        self._load = Load(self._cluster, request["directory"], request["name"], request["seed"])
        return {}

    def unload(self, _: dict[str, Any]) -> dict[str, Any]:
        """End it."""
        assert self._load is not None
        self._load.stop()
        return {"errors": self._load.errors}

    def contents(self, _: dict[str, Any]) -> dict[str, Any]:
        """All of the map of `benchmarks.load`, as this very member has applied it."""
        state = self._cluster.map(LOAD_MAP)
        return {"contents": {key: state.read_stale(key) for key in state}}

    def tellers(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take the databases of `benchmarks.transacting`, whose driver nobody else here needs."""
        from benchmarks.transacting import Tellers

        self._tellers = Tellers(self._cluster, request["dsns"])
        return {}

    def transfer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Transfers, and how many entries of the log they waited for."""
        counters = self._cluster._coordinator.counters
        before = counters.get("log_entries", 0)
        result = self._tellers.run(request["way"], threads=request["threads"], count=request["count"])
        return {**result, "log_entries": counters.get("log_entries", 0) - before}

    def bank(self, request: dict[str, Any]) -> dict[str, Any]:
        """Begin what `benchmarks.bank` has its processes do."""
        from benchmarks.tellers import Bank

        self._bank = Bank(self._cluster, **request["arguments"])
        return {}

    def unbank(self, _: dict[str, Any]) -> dict[str, Any]:
        """End it."""
        self._bank.stop()
        counters = dict(self._cluster._coordinator.counters)
        return {"outcomes": self._bank.outcomes, "waits": self._bank.waits[-2000:], "counters": counters}

    def books(self, _: dict[str, Any]) -> dict[str, Any]:
        """What the maps of `benchmarks.tellers` hold, and what the log has pending."""
        transfers = dict(self._cluster.map("transfers").items())
        return {"transfers": transfers, "balances": dict(self._cluster.map("balances").items())}

    def pending(self, _: dict[str, Any]) -> dict[str, Any]:
        """Who has not obeyed, as text: (resource, node, branch) by transaction."""

        def ask() -> OpGen[list[Any]]:
            step = Step(RequestKind.QUERY, commands.query_tx_list(None, 100, True), monotonic_ms() + 5000)
            return commands.decode_reply((yield step))

        rows = self._cluster._run(ask())[0]
        who = self._cluster._coordinator.who
        return {
            "who": who,
            "pending": {gtid.hex(): [[r, n, b.hex()] for r, n, b in branches] for gtid, *_, branches in rows},
        }

    def put_in_transaction(self, request: dict[str, Any]) -> dict[str, Any]:
        """As `put`, each in a transaction of its own."""
        cluster, state, value = self._cluster, self._map, "v" * 100

        def once(number: int) -> None:
            with cluster.transaction():
                state.put(f"key-{number % 1000}", value)

        return _counted(once, request["count"])

    def wake_up(self, request: dict[str, Any]) -> dict[str, Any]:
        """How late a thread of this process is when it sleeps a millisecond: the wait for core and GIL, with no library."""
        return _counted(lambda _: sleep(0.001), request["count"])

    def serve(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(self, request["do"])(request)
            except CoordError as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


class _AsyncApplication:
    def __init__(self, cluster: coordlib.AsyncCluster) -> None:
        self._cluster = cluster
        self._map = cluster.map(MAP)

    async def start(self, _: dict[str, Any]) -> dict[str, Any]:
        await self._cluster.start()
        return {}

    async def close(self, _: dict[str, Any]) -> dict[str, Any]:
        await self._cluster.close()
        return {}

    async def stats(self, _: dict[str, Any]) -> dict[str, Any]:
        return await self._cluster.stats()

    async def process(self, request: dict[str, Any]) -> dict[str, Any]:
        return _process_facts(request)

    async def put_in_flight(self, request: dict[str, Any]) -> dict[str, Any]:
        """`tasks` tasks put one after another, `count` in all, over `keys` keys."""
        put, value, keys = self._map.put, "v" * 100, request.get("keys", 1000)
        tasks = request["tasks"]
        each = request["count"] // tasks
        samples: list[int] = []

        async def work(number: int) -> None:
            for turn in range(each):
                start = perf_counter_ns()
                await put(f"key-{(number + turn * tasks) % keys}", value)
                samples.append((perf_counter_ns() - start) // 1000)

        began = perf_counter_ns()
        await asyncio.gather(*(work(number) for number in range(tasks)))
        seconds = (perf_counter_ns() - began) / 1e9
        return {"samples_us": samples if len(samples) <= 100_000 else samples[::20], "seconds": seconds}

    async def serve(self) -> None:
        while line := await asyncio.to_thread(sys.stdin.readline):
            request = json.loads(line)
            try:
                answer = await getattr(self, request["do"])(request)
            except CoordError as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


def _main() -> None:
    line = sys.stdin.readline()
    if not line:
        return
    given = json.loads(line)
    arguments = given["arguments"]
    if given["face"] == "asyncio":
        make = coordlib.connect_async if given["kind"] == "client" else coordlib.AsyncCluster
        handle = make(*given["positional"], **arguments)
        asyncio.run(_AsyncApplication(handle).serve())
        return
    cluster = (coordlib.connect if given["kind"] == "client" else coordlib.Cluster)(
        *given["positional"], **arguments
    )
    try:
        _ThreadApplication(cluster).serve()
    finally:
        cluster.close(timeout=1)


if __name__ == "__main__":
    _main()
