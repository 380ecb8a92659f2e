"""Members with a disk and a machine around the core, for tests. Everything is decided by the caller."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from coordlib.cbor import decode, encode
from coordlib.raft import RaftConfig, RawNode, Ready
from coordlib.raft.messages import (
    Configuration,
    Entry,
    HardState,
    RaftMessage,
    SnapshotMeta,
)

EMPTY = HardState(0, "")


def encode_configuration(configuration: Configuration) -> bytes:
    return encode([list(names) for names in configuration])


def decode_configuration(data: bytes) -> Configuration:
    voters, learners, outgoing = decode(data)
    return Configuration(tuple(voters), tuple(learners), tuple(outgoing))


def rising_timeouts() -> Callable[[int, int], int]:
    """Timeouts that differ from one draw to the next, without randomness."""
    counter = itertools.count()
    return lambda low, high: low + (next(counter) * 37) % (high - low + 1)


def make_node(
    node_id: str,
    voters: Sequence[str],
    *,
    term: int = 0,
    vote: str = "",
    entries: Sequence[Entry] = (),
    snapshot: SnapshotMeta | None = None,
    learners: Sequence[str] = (),
    now: int = 0,
    random_ticks: Callable[[int, int], int] | None = None,
    **settings: Any,
) -> RawNode:
    """A node that starts at tick `now` with what its disk holds."""
    configuration = Configuration(tuple(voters), tuple(learners))
    return RawNode(
        RaftConfig(node_id=node_id, **settings),
        hard_state=HardState(term, vote),
        snapshot=snapshot or SnapshotMeta(0, 0, configuration),
        entries=entries,
        random_ticks=random_ticks or (lambda low, high: low),
        now=now,
        decode_configuration=decode_configuration,
    )


def log_of(*terms: int, start: int = 0) -> list[Entry]:
    """Entries with these terms at consecutive indexes."""
    return [Entry(term, start + position, 1, b"") for position, term in enumerate(terms, 1)]


def drain(node: RawNode) -> list[tuple[str, RaftMessage]]:
    """Let the disk do everything at once; return all messages in the order in which they may leave."""
    messages: list[tuple[str, RaftMessage]] = []
    while node.has_ready():
        ready = node.ready()
        messages += ready.messages
        messages += node.persisted(ready)
        if ready.committed:
            node.applied_to(ready.committed[-1].index)
        node.check_invariants()
    return messages


class Disk:
    """What survives a crash: exactly the Readies that were written, in order."""

    def __init__(self, snapshot: SnapshotMeta) -> None:
        self.hard_state = EMPTY
        self.snapshot = snapshot
        self.entries: list[Entry] = []

    def write(self, ready: Ready) -> None:
        if ready.hard_state is not None:
            self.hard_state = ready.hard_state
        if ready.snapshot is not None:
            self.entries = []
        if ready.entries:
            first = ready.entries[0].index
            if self.entries and first <= self.entries[-1].index:
                del self.entries[max(0, first - self.entries[0].index) :]
            self.entries.extend(ready.entries)

    def forget_below(self, index: int) -> None:
        """Drop entries that a snapshot makes superfluous, as storage does."""
        self.entries = [entry for entry in self.entries if entry.index > index]

    def holds(self, index: int, term: int) -> bool:
        """Whether entry (index, term), or a snapshot of it, is durable here."""
        if index <= self.snapshot.index:
            return True
        position = index - self.entries[0].index if self.entries else -1
        return 0 <= position < len(self.entries) and self.entries[position].term == term


class Member:
    """One node with its disk, the Readies on their way to it, and a machine that remembers."""

    def __init__(self, node_id: str, configuration: Configuration, **settings: Any) -> None:
        self.node_id = node_id
        self.config = RaftConfig(node_id=node_id, **settings)
        self.disk = Disk(SnapshotMeta(0, 0, configuration))
        self.outstanding: deque[Ready] = deque()
        self.applied_index = 0
        self.applied: list[Entry] = []  # in this incarnation
        self.reads: list[tuple[object, int]] = []
        self.failed_reads: list[object] = []
        self.node: RawNode | None = None

    @property
    def core(self) -> RawNode:
        assert self.node is not None, f"{self.node_id} is down"
        return self.node

    def start(self, now: int, random_ticks: Callable[[int, int], int]) -> None:
        disk = self.disk
        self.applied_index = disk.snapshot.index
        self.applied = []
        self.node = RawNode(
            self.config,
            hard_state=disk.hard_state,
            snapshot=disk.snapshot,
            entries=list(disk.entries),
            random_ticks=random_ticks,
            now=now,
            decode_configuration=decode_configuration,
        )
        # As storage does: entries that a newer snapshot makes void must not come back below later ones.
        log = self.node.log
        disk.entries = [entry for entry in disk.entries if log.term_at(entry.index) == entry.term]

    def crash(self) -> None:
        self.node = None
        self.outstanding.clear()

    def take_ready(self) -> Ready:
        ready = self.core.ready()
        self.outstanding.append(ready)
        if ready.snapshot is not None:
            self.applied_index = ready.snapshot.index
        for entry in ready.committed:
            assert entry.index == self.applied_index + 1, f"{self.node_id} skips to {entry.index}"
            self.applied_index = entry.index
        self.applied.extend(ready.committed)
        self.core.applied_to(self.applied_index)
        self.reads.extend(ready.reads)
        self.failed_reads.extend(ready.failed_reads)
        return ready

    def write_next(self) -> list[tuple[str, RaftMessage]]:
        ready = self.outstanding.popleft()
        self.disk.write(ready)
        return self.core.persisted(ready)

    def snapshot_at(self, index: int, retain: int) -> None:
        """The machine's snapshot at `index` is durable; forget what is below."""
        core = self.core
        core.compact(index, retain)
        if core.log.snapshot.index > self.disk.snapshot.index:
            self.disk.snapshot = core.log.snapshot
        self.disk.forget_below(core.log.start_index)
