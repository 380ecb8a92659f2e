"""The log in memory: the same contract, for tests and for clusters that live in one process.

It survives `close` and `open` of the same object, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from coordlib.errors import CoordError, ForkedError, NotStarted, StartError, invariant
from coordlib.raft.messages import Entry, HardState, SnapshotMeta
from coordlib.storage.base import (
    FORMAT_VERSION,
    DiskIdentity,
    Persist,
    Recovered,
    RecoveredGroup,
    SnapshotReader,
    SnapshotWriter,
)
from coordlib.storage.identity import check_identity

__all__ = ["MemoryStorage"]


class _Group:
    __slots__ = ("cut_from", "entries", "floor", "hard_state", "payload", "snapshot")

    def __init__(self) -> None:
        self.hard_state = HardState(0, "")
        self.floor = 0
        self.entries: list[Entry] = []  # entries[0].index == floor + 1
        self.snapshot: SnapshotMeta | None = None
        self.payload = b""
        self.cut_from = (0, 0)


class _Writer:
    __slots__ = ("_group", "_meta", "_parts", "_storage")

    def __init__(self, storage: MemoryStorage, group: int, meta: SnapshotMeta) -> None:
        self._storage = storage
        self._group = group
        self._meta = meta
        self._parts: list[bytes] | None = []

    def write(self, data: bytes) -> None:
        self._storage._check()
        if self._parts is None:
            raise ValueError("this snapshot was finished or aborted")
        self._parts.append(bytes(data))

    def finish(self) -> None:
        self._storage._check()
        if self._parts is None:
            raise ValueError("this snapshot was finished or aborted")
        parts, self._parts = self._parts, None
        state = self._storage._groups.setdefault(self._group, _Group())
        if state.snapshot is None or state.snapshot.index < self._meta.index:
            state.snapshot = self._meta
            state.payload = b"".join(parts)

    def abort(self) -> None:
        self._parts = None


class _Reader:
    __slots__ = ("_payload", "meta", "size")

    def __init__(self, meta: SnapshotMeta, payload: bytes) -> None:
        self.meta = meta
        self._payload = payload
        self.size = len(payload)

    def read(self, offset: int, size: int) -> bytes:
        return self._payload[max(offset, 0) : max(offset + size, 0)]

    def close(self) -> None:
        self._payload = b""


class MemoryStorage:
    """`LogStorage` without a disk."""

    def __init__(self, *, node_id: str, cluster_name: str, new_disk_id: bytes) -> None:
        self._node_id = node_id
        self._cluster_name = cluster_name
        self._new_disk_id = new_disk_id
        self._identity: DiskIdentity | None = None
        self._groups: dict[int, _Group] = {}
        self._counts = {"batches": 0, "entries": 0}
        self._is_open = False
        self._refusal: CoordError | None = NotStarted("call open() first")

    def _check(self) -> None:
        if self._refusal is not None:
            self._refuse()

    def _refuse(self) -> NoReturn:
        refusal = self._refusal
        assert refusal is not None
        raise type(refusal)(refusal.message, **refusal.details)

    def open(self) -> Recovered:
        if self._is_open:
            raise StartError("this storage is open already")
        if isinstance(self._refusal, ForkedError):
            self._refuse()
        is_new = self._identity is None
        if self._identity is None:
            self._identity = DiskIdentity(
                FORMAT_VERSION, self._node_id, self._new_disk_id, self._cluster_name, b"", ()
            )
        check_identity(self._identity, "this storage", self._node_id, self._cluster_name)
        groups: dict[int, RecoveredGroup] = {}
        for group in sorted(self._groups):
            state = self._groups[group]
            self._adopt(state)
            groups[group] = RecoveredGroup(
                state.hard_state, state.snapshot, list(state.entries), state.cut_from
            )
        self._is_open = True
        self._refusal = None
        return Recovered(self._identity, groups, is_new, [])

    @staticmethod
    def _adopt(state: _Group) -> None:
        """Drop what the snapshot covers, and all if the log does not lead to it (see GroupLog.adopt)."""
        if state.snapshot is None:
            return
        index, term, _ = state.snapshot
        position = index - state.floor
        if position == 0:
            return
        if 0 < position <= len(state.entries) and state.entries[position - 1].term == term:
            del state.entries[:position]
        else:
            if state.entries and (state.entries[-1].term, state.entries[-1].index) > (term, index):
                state.cut_from = (state.entries[-1].term, state.entries[-1].index)
            state.entries = []
        state.floor = index

    def set_identity(self, identity: DiskIdentity) -> None:
        self._check()
        assert self._identity is not None
        invariant(
            identity[:4] == self._identity[:4],
            "only cluster_uuid, disks, backs, recorded and cut of an identity may change",
        )
        self._identity = identity

    def write(self, batch: Sequence[Persist]) -> None:
        if self._refusal is not None:
            self._refuse()
        for group, hard_state, entries, restored in batch:
            state = self._groups.get(group)
            if state is None:
                state = self._groups[group] = _Group()
            state.cut_from = (0, 0)
            if restored is not None:
                invariant(
                    state.snapshot is not None and restored.index <= state.snapshot.index,
                    "group %d: log restarted after snapshot %d, which is not durable",
                    group,
                    restored.index,
                )
                state.floor = restored.index
                state.entries = []
            if hard_state is not None:
                state.hard_state = hard_state
            if entries:
                stored = state.entries
                position = entries[0].index - state.floor - 1
                invariant(position <= len(stored) and entries[0].index > 0, "group %d: gap in the log", group)
                if position < 0:
                    state.floor = entries[0].index - 1
                    stored.clear()
                elif position < len(stored):
                    del stored[position:]
                stored.extend(entries)
                invariant(
                    entries[-1].index - entries[0].index == len(entries) - 1,
                    "group %d: entries skip an index",
                    group,
                )
                self._counts["entries"] += len(entries)
        if batch:
            self._counts["batches"] += 1

    def create_snapshot(self, group: int, meta: SnapshotMeta) -> SnapshotWriter:
        self._check()
        return _Writer(self, group, meta)

    def open_snapshot(self, group: int) -> SnapshotReader | None:
        self._check()
        state = self._groups.get(group)
        if state is None or state.snapshot is None:
            return None
        return _Reader(state.snapshot, state.payload)

    def compact(self, group: int, index: int) -> None:
        self._check()
        state = self._groups.get(group)
        invariant(
            state is not None and state.snapshot is not None and index <= state.snapshot.index,
            "group %d: compaction to %d without a durable snapshot",
            group,
            index,
        )
        assert state is not None
        count = min(index - state.floor, len(state.entries) - 1)
        # The last entry stays: its term tells whether the log leads to the snapshot.
        if count > 0:
            del state.entries[:count]
            state.floor += count

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._refusal = NotStarted("this storage was closed; call open() first")

    def after_fork_in_child(self) -> None:
        self._is_open = False
        self._refusal = ForkedError("this storage belongs to the parent process")

    @property
    def stats(self) -> dict[str, int]:
        return {**self._counts, "groups": len(self._groups)}
