"""The floor: what the disk and the sockets of this machine allow, measured beside everything that is compared with it.

*Floor* is the p50 of appending 256 B to a growing file and fdatasync, with three processes doing so at once,
plus the p50 of one ZeroMQ round trip (DEALER to ROUTER, two processes, 256 B, no encryption). A durable put needs at
least both: the round trip to a follower, and a disk write on a quorum. The same append into a file that was
filled with zeros before is measured too (`disk_preallocated`); it is what the log does, and no part of the floor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter_ns
from typing import NamedTuple

import zmq

from benchmarks.figures import quantile

__all__ = ["Floor", "measure_floor"]

APPEND_SIZE_BYTES = 256
WRITERS = 3


class Floor(NamedTuple):
    """All in microseconds."""

    disk_p50: float
    disk_p99: float
    preallocated_p50: float
    round_trip_p50: float
    round_trip_p99: float

    @property
    def us(self) -> float:
        return self.disk_p50 + self.round_trip_p50


def _append(path: str, count: int, *, is_preallocated: bool) -> list[int]:
    data = os.urandom(APPEND_SIZE_BYTES)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    if is_preallocated:
        os.pwrite(fd, bytes(APPEND_SIZE_BYTES * (count + 64)), 0)
    os.fsync(fd)
    samples = []
    for number in range(count + 50):
        start = perf_counter_ns()
        os.pwrite(fd, data, number * APPEND_SIZE_BYTES)
        os.fdatasync(fd)
        samples.append((perf_counter_ns() - start) // 1000)
    os.close(fd)
    os.unlink(path)
    return samples[50:]


def _round_trips(endpoint: str, count: int) -> list[int]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(endpoint)
    data = os.urandom(APPEND_SIZE_BYTES)
    samples = []
    for _ in range(count + 100):
        start = perf_counter_ns()
        socket.send(data)
        socket.recv()
        samples.append((perf_counter_ns() - start) // 1000)
    socket.send(b"end")
    socket.close()
    return samples[100:]


def _echo() -> None:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(f"tcp://127.0.0.1:{port}", flush=True)
    while True:
        parts = socket.recv_multipart()
        if parts[-1] == b"end":
            return
        socket.send_multipart(parts)


def _child(*arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "benchmarks.floor", *arguments]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _say(child: subprocess.Popen[str], line: str = "go") -> None:
    assert child.stdin is not None
    child.stdin.write(line + "\n")
    child.stdin.flush()


def _hear(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise RuntimeError("a process that measures the floor has ended: see its traceback above")
    return line.strip()


def _appends(directory: str, count: int, kind: str) -> list[int]:
    children = [
        _child(kind, os.path.join(directory, f"floor-{number}"), str(count)) for number in range(WRITERS)
    ]
    try:
        for child in children:
            _hear(child)
        for child in children:
            _say(child)
        return [sample for child in children for sample in json.loads(_hear(child))]
    finally:
        for child in children:
            child.kill()
            child.communicate()


def measure_floor(directory: str, *, count: int = 1000) -> Floor:
    """Measure in files below `directory`, which must be on the disk that the logs are on."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        extending = _appends(scratch, count, "append")
        preallocated = _appends(scratch, count, "preallocated")
    echo = _child("echo")
    client = None
    try:
        endpoint = _hear(echo)
        client = _child("ping", endpoint, str(count * 2))
        _hear(client)
        _say(client)
        round_trips = json.loads(_hear(client))
    finally:
        for child in (echo, client):
            if child is not None:
                child.kill()
                child.communicate()
    return Floor(
        quantile(extending, 0.5),
        quantile(extending, 0.99),
        quantile(preallocated, 0.5),
        quantile(round_trips, 0.5),
        quantile(round_trips, 0.99),
    )


def _main(kind: str, *arguments: str) -> None:
    if kind == "echo":
        _echo()
        return
    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    where, count = arguments[0], int(arguments[1])
    if kind == "ping":
        samples = _round_trips(where, count)
    else:
        samples = _append(where, count, is_preallocated=kind == "preallocated")
    print(json.dumps(samples), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
