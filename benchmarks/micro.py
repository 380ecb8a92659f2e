"""What the parts cost, one at a time: for finding out where a put's time goes, and what a change would bring.

Prints a line for each, and as its last line one JSON object. Figures of the pure parts are of a warm loop on one
thread; in a node, between system calls, the same code takes several times as long (cold caches).

    python -m benchmarks.micro [--quick] [--dir PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter_ns, thread_time_ns
from typing import Any

# So that it also runs as a file, from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.figures import machine, quantiles
from benchmarks.floor import measure_floor
from coordlib.machine import Machine, commands
from coordlib.raft import RaftConfig, RawNode
from coordlib.raft.messages import (
    AppendEntries,
    Configuration,
    Entry,
    EntryKind,
    HardState,
    SnapshotMeta,
)
from coordlib.storage.base import LogStorage, Persist
from coordlib.storage.files import PosixFileSystem
from coordlib.storage.segments import SegmentStorage
from coordlib.transport.base import ConnectionUp, FrameReceived, TransportKeys, TransportSettings
from coordlib.transport.registry import find_transport
from coordlib.wire.cose import Encrypt0Opener, Encrypt0Seal
from coordlib.wire.keys import ClusterKeys, generate_secret
from coordlib.wire.schema import decode_messages, encode_messages

__all__ = ["main"]

BODY_SIZE_BYTES = 150
BLOCKS = 10
MEMBERS = ("n1", "n2", "n3")


class Micro:
    """Collects figures, and prints each as it comes."""

    def __init__(self, directory: str, *, is_quick: bool) -> None:
        self.directory = directory
        self.scale = 10 if is_quick else 1
        self.figures: dict[str, Any] = {}

    def count(self, full: int) -> int:
        return full // self.scale

    def add(self, name: str, **figures: float) -> None:
        self.figures[name] = figures
        print(f"{name:<36} " + "  ".join(f"{key} {value:g}" for key, value in figures.items()), flush=True)

    def per_call(self, name: str, call: Callable[[], object], count: int, *, divide_by: int = 1) -> None:
        """CPU time of a call in a warm loop."""
        for _ in range(count // 10 + 1):
            call()
        start = thread_time_ns()
        for _ in range(count):
            call()
        self.add(name, cpu_us=round((thread_time_ns() - start) / count / 1000 / divide_by, 2))

    def latency(self, count: int, **calls: Callable[[int], object]) -> None:
        """
        Wall time of each of `count` calls of every one, and their CPU time on this thread.

        In turns, block by block: what else the machine does meanwhile is shared by all that are compared.
        """
        samples: dict[str, list[int]] = {name: [] for name in calls}
        cpu = dict.fromkeys(calls, 0)
        block = max(1, count // BLOCKS)
        for call in calls.values():
            call(0)
        for number in range(1, block * BLOCKS + 1, block):
            for name, call in calls.items():
                began = thread_time_ns()
                for turn in range(number, number + block):
                    start = perf_counter_ns()
                    call(turn)
                    samples[name].append((perf_counter_ns() - start) // 1000)
                cpu[name] += thread_time_ns() - began
        for name, own in samples.items():
            self.add(name, **quantiles(own), cpu_us=round(cpu[name] / len(own) / 1000, 1))

    # -- pure parts ----------------------------------------------------------------------------------------

    def wire(self) -> None:
        for size in (1, 64):
            entries = tuple(
                Entry(3, 101 + number, EntryKind.COMMAND, os.urandom(BODY_SIZE_BYTES))
                for number in range(size)
            )
            messages = [(0, AppendEntries(3, 100, 3, 100, 7, entries))]
            data = encode_messages(messages)
            count = self.count(20_000 // size)
            self.per_call(f"schema_encode_append_{size}", lambda m=messages: encode_messages(m), count)  # type: ignore[misc]
            self.per_call(f"schema_decode_append_{size}", lambda d=data: decode_messages(d), count)  # type: ignore[misc]
        key, iv, kid, aad = os.urandom(32), os.urandom(12), os.urandom(4), os.urandom(60)
        seal = Encrypt0Seal(key, iv, kid, aad)
        plaintext = os.urandom(200)
        count = self.count(20_000)
        frames = [seal.seal(plaintext) for _ in range(count * 2)]
        self.per_call("cose_seal_200", lambda: seal.seal(plaintext), count)
        opener, left = Encrypt0Opener(key, iv, kid, aad), iter(frames)
        self.per_call("cose_open_200", lambda: opener.open(next(left), 0), count)

    def raft(self) -> None:
        """Propose, replicate to two, commit: the work of all three cores, for each entry."""
        data = os.urandom(BODY_SIZE_BYTES)
        for batch in (1, 64):
            nodes = _elected()
            leader = next(node for node in nodes.values() if node.is_leader)

            def cycle(
                leader: RawNode = leader, nodes: dict[str, RawNode] = nodes, batch: int = batch
            ) -> None:
                for _ in range(batch):
                    leader.propose(data)
                _exchange(nodes)
                # The log would grow for ever otherwise.
                if leader.applied_index % 4096 < batch:
                    for node in nodes.values():
                        node.compact(node.applied_index, 16)

            self.per_call(
                f"raft_three_cores_batch_{batch}", cycle, self.count(4000 // batch * 2), divide_by=batch
            )

    def machine(self) -> None:
        state = Machine()
        opening = commands.open_session(bytes(16), 10_000, "micro")
        opened = state.apply(1, 1, commands.pack_entry(1, 0, 0, 0, opening))
        session = int(commands.decode_reply(opened.reply)[0])
        number = 1
        value = b"v" * 100

        def put() -> None:
            nonlocal number
            number += 1
            operation = commands.map_put(b"bench", b"key-%d" % (number % 10_000), value)
            state.apply(number, 1, commands.pack_entry(number, session, number - 1, number - 1, operation))

        self.per_call("machine_encode_and_apply_put", put, self.count(20_000))

    # -- disk ----------------------------------------------------------------------------------------------

    def _storage(self, name: str) -> LogStorage:
        storage = SegmentStorage(
            PosixFileSystem(),
            os.path.join(self.directory, name),
            node_id="n1",
            cluster_name="micro",
            new_disk_id=os.urandom(16),
        )
        storage.open()
        return storage

    def disk(self) -> None:
        """
        The log against what is below it, and the same write handed to a thread whose answer is polled for.

        Then rounds a second when every round also costs the node thread some Python: inline one comes after the
        other; on a thread the next round is computed while the last one is on the disk.
        """
        count = self.count(2000)
        fds = [
            os.open(os.path.join(self.directory, name), os.O_RDWR | os.O_CREAT, 0o600) for name in ("a", "b")
        ]
        for fd in fds:
            os.pwrite(fd, bytes(256 * (count + 64)), 0)
            os.fsync(fd)
        data = os.urandom(256)

        def raw(number: int) -> None:
            os.pwrite(fds[0], data, number * 256)
            os.fdatasync(fds[0])

        def synced(number: int) -> None:
            os.pwritev(fds[1], [data], number * 256, os.RWF_DSYNC)

        storage = self._storage("inline")
        writer = _Writer(self._storage("thread"))
        self.latency(
            count,
            disk_pwrite_fdatasync=raw,
            disk_pwritev_dsync=synced,
            storage_write_inline=lambda number: storage.write(_round(number + 1)),
            storage_write_on_thread=lambda number: writer.write_and_wait(_round(number + 1)),
        )
        storage.close()
        writer.close()
        for fd in fds:
            os.close(fd)
        for work_us in (0, 100, 300):
            self._rounds(work_us, count)

    def _rounds(self, work_us: int, count: int) -> None:
        storage = self._storage(f"inline-{work_us}")
        writer = _Writer(self._storage(f"thread-{work_us}"))
        inline_ns = thread_ns = 0
        block = count // BLOCKS
        for first in range(0, block * BLOCKS, block):
            began = perf_counter_ns()
            for number in range(first, first + block):
                _spin(work_us)
                storage.write(_round(number + 1))
            between = perf_counter_ns()
            for number in range(first, first + block):
                _spin(work_us)
                writer.wait_for(number)
                writer.hand_over(_round(number + 1))
            writer.wait_for(first + block)
            inline_ns += between - began
            thread_ns += perf_counter_ns() - between
        storage.close()
        writer.close()
        rounds = block * BLOCKS * 1e9
        self.add(
            f"rounds_with_{work_us}_us_of_work",
            inline_per_s=round(rounds / inline_ns),
            thread_per_s=round(rounds / thread_ns),
        )

    # -- sockets -------------------------------------------------------------------------------------------

    def sockets(self) -> None:
        floor = measure_floor(self.directory, count=self.count(1000))
        self.add("zmq_round_trip_bare", p50_us=floor.round_trip_p50, p99_us=floor.round_trip_p99)
        secret = generate_secret(os.urandom)
        command = [sys.executable, os.path.abspath(__file__), "--echo", secret]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            try:
                transport = _transport(secret)
                transport.connect(child.stdout.readline().strip())
                connection = 0
                while not connection:
                    connection = next(
                        (event.connection for event in transport.poll(5) if type(event) is ConnectionUp), 0
                    )
                frame = os.urandom(256)

                def round_trip(_: int) -> None:
                    transport.send(connection, frame)
                    while not any(type(event) is FrameReceived for event in transport.poll(5)):
                        pass

                self.latency(self.count(2000), transport_round_trip_curve=round_trip)
                transport.close()
            finally:
                child.kill()


def _spin(microseconds: int) -> None:
    end = perf_counter_ns() + microseconds * 1000
    while perf_counter_ns() < end:
        pass


def _round(index: int) -> list[Persist]:
    return [Persist(0, None, [Entry(1, index, EntryKind.COMMAND, b"x" * BODY_SIZE_BYTES)], None)]


class _Writer:
    """A storage on a thread of its own."""

    def __init__(self, storage: LogStorage) -> None:
        self._storage = storage
        self._todo: queue.SimpleQueue[list[Persist] | None] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.epoll()
        self._poll.register(self._wake, select.EPOLLIN)
        self._done = 0
        self._handed_over = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (batch := self._todo.get()) is not None:
            self._storage.write(batch)
            self._done += 1
            os.eventfd_write(self._wake, 1)

    def hand_over(self, batch: list[Persist]) -> None:
        self._handed_over += 1
        self._todo.put(batch)

    def wait_for(self, number: int) -> None:
        """Until so many are durable."""
        while self._done < number:
            self._poll.poll(1)
            try:
                os.eventfd_read(self._wake)
            except BlockingIOError:
                pass

    def write_and_wait(self, batch: list[Persist]) -> None:
        self.hand_over(batch)
        self.wait_for(self._handed_over)

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join()
        self._storage.close()
        self._poll.close()
        os.close(self._wake)


def _elected() -> dict[str, RawNode]:
    chance = random.Random(1)
    configuration = Configuration(MEMBERS)
    nodes = {
        name: RawNode(
            RaftConfig(node_id=name),
            hard_state=HardState(0, ""),
            snapshot=SnapshotMeta(0, 0, configuration),
            entries=(),
            random_ticks=chance.randint,
            now=0,
        )
        for name in MEMBERS
    }
    now = 0
    while not any(node.is_leader for node in nodes.values()):
        now += 10
        for node in nodes.values():
            node.tick(now)
        _exchange(nodes)
    return nodes


def _exchange(nodes: dict[str, RawNode]) -> None:
    """Carry messages until nobody has any."""
    is_busy = True
    while is_busy:
        is_busy = False
        for name, node in nodes.items():
            while node.has_ready():
                is_busy = True
                ready = node.ready()
                messages = [*ready.messages, *node.persisted(ready)]
                if ready.committed:
                    node.applied_to(ready.committed[-1].index)
                for receiver, message in messages:
                    nodes[receiver].step(name, message)


def _transport(secret: str) -> Any:
    keys = ClusterKeys.from_secrets((secret,), "micro")
    settings = TransportSettings(keys=tuple(TransportKeys(*pair) for pair in keys.curve))
    return find_transport("zmq")(settings)


def _echo(secret: str) -> None:
    transport = _transport(secret)
    print(transport.bind("tcp://127.0.0.1:*"), flush=True)
    while True:
        for event in transport.poll(10):
            if type(event) is FrameReceived:
                transport.reply(event.route, event.frame)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all, print, and return 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.micro", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the counts")
    parser.add_argument("--dir", default="/var/tmp")
    parser.add_argument("--echo", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.echo:
        _echo(options.echo)
    with tempfile.TemporaryDirectory(prefix="coordlib-micro-", dir=options.dir) as scratch:
        micro = Micro(scratch, is_quick=options.quick)
        for part in (micro.wire, micro.raft, micro.machine, micro.disk, micro.sockets):
            part()
    print(json.dumps({"machine": machine(), **micro.figures}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
