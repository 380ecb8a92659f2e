"""Snapshots: taking our own in slices, sending one to a follower, receiving one from the leader. Sans-I/O.

Everything is cut into pieces of at most 256 KiB, one or two a round, so that none of the three ever
keeps a heartbeat waiting.
"""

from __future__ import annotations

import logging
from typing import Final

from coordlib.errors import CoordError
from coordlib.machine import Machine, SnapshotSink, SnapshotSource
from coordlib.node.effects import (
    OWN,
    RECEIVED,
    AbortSnapshot,
    BeginSnapshot,
    DiskEffect,
    EndTransfer,
    FinishSnapshot,
    LogEvent,
    SendChunk,
    WriteSnapshot,
)
from coordlib.raft import RawNode
from coordlib.raft.messages import InstallSnapshot, SnapshotMeta, SnapshotStatus
from coordlib.wire.messages import SnapshotAck, SnapshotChunk

__all__ = ["SnapshotReceiver", "SnapshotSenders", "SnapshotTaker"]

CHUNK_SIZE_BYTES: Final = 256 * 1024
CHUNKS_IN_FLIGHT_MAX: Final = 4
SILENCE_MS_MAX: Final = 10_000
RETRY_MS: Final = 20
"""How long a piece that could not be queued waits: reading it from the disk again at once would end in the same."""

HOLE_MS: Final = 200
"""A piece that was lost by itself is sent again at most so often: the pieces behind it all tell of the same hole."""

RESEND_MS: Final = 3000
"""Without any progress for so long, everything since the last acknowledgement is sent again."""

LOG_SIZE_BYTES_MAX: Final = 8 * 1024 * 1024
LOG_ENTRIES_MAX: Final = 20_000
ENTRIES_RETAINED: Final = 2_000
"""Entries kept behind a snapshot, so that a follower that is a little late catches up from the log."""

_NEVER: Final = 1 << 62


class SnapshotTaker:
    """Decides when the log has grown enough, and writes the machine's state a slice at a time."""

    def __init__(self, raft: RawNode, machine: Machine) -> None:
        self._raft = raft
        self._machine = machine
        self._source: SnapshotSource | None = None
        self._meta: SnapshotMeta | None = None
        self._log_size_bytes = 0
        self._snapshot_index = raft.log.snapshot.index
        self._snapshot_size_bytes = 0
        self._written = 0
        self._is_finishing = False
        self.taken_count = 0

    def entry_applied(self, size_bytes: int) -> None:
        self._log_size_bytes += size_bytes + 32

    @property
    def is_active(self) -> bool:
        return self._source is not None

    def restart(self, disk: list[DiskEffect]) -> None:
        """The machine was replaced by a received snapshot."""
        if self._source is not None:
            self._source.close()
            self._source = None
            disk.append(AbortSnapshot(OWN))
        self._log_size_bytes = 0
        self._snapshot_index = self._raft.log.snapshot.index

    def step(self, disk: list[DiskEffect]) -> None:
        if self._is_finishing:
            return
        if self._source is None:
            applied = self._machine.applied_index
            # A big state is not rewritten for a small log: the log may grow to the size of the last snapshot.
            if applied - self._snapshot_index < LOG_ENTRIES_MAX and self._log_size_bytes < max(
                LOG_SIZE_BYTES_MAX, self._snapshot_size_bytes
            ):
                return
            log = self._raft.log
            self._meta = SnapshotMeta(applied, log.term_at(applied), log.configuration_at(applied))
            self._source = self._machine.begin_snapshot()
            self._written = 0
            self._log_size_bytes = 0
            disk.append(BeginSnapshot(OWN, self._meta))
            return
        data = self._source.next(CHUNK_SIZE_BYTES)
        if data is not None:
            self._written += len(data)
            disk.append(WriteSnapshot(OWN, data))
            return
        self._source.close()
        self._source = None
        self._is_finishing = True
        assert self._meta is not None
        disk.append(FinishSnapshot(OWN, self._meta))

    def stored(self, meta: SnapshotMeta) -> None:
        self._is_finishing = False
        self._snapshot_size_bytes = self._written
        self._snapshot_index = meta.index
        self.taken_count += 1


class _Transfer:
    __slots__ = ("acked", "last_heard_ms", "meta", "offset", "progress_ms", "retry_ms", "size")

    def __init__(self, now: int) -> None:
        self.meta: SnapshotMeta | None = None  # known once the first chunk was read
        self.size = CHUNK_SIZE_BYTES
        self.offset = 0
        self.acked = 0
        self.retry_ms = 0  # nothing is sent before; 0: now
        self.last_heard_ms = now
        self.progress_ms = now  # of the last acknowledgement of more, or of going back


class SnapshotSenders:
    """The leader's transfers, one for each follower that needs one."""

    def __init__(self, raft: RawNode, events: list[LogEvent]) -> None:
        self._raft = raft
        self._events = events
        self._transfers: dict[str, _Transfer] = {}
        self._ended: dict[str, None] = {}  # whose snapshots the disk may close

    def start(self, follower: str, now: int) -> None:
        self._transfers[follower] = _Transfer(now)
        self._events.append(
            LogEvent(
                logging.INFO,
                "snapshot.send",
                f"sending a snapshot to {follower!r}: its log is too far behind",
                {"peer": follower},
            )
        )

    def stop(self, follower: str) -> None:
        if self._transfers.pop(follower, None) is not None:
            self._ended[follower] = None
            self._raft.report_snapshot(follower, SnapshotStatus(0, False))

    def stop_all(self) -> None:
        self._ended.update(dict.fromkeys(self._transfers))
        self._transfers.clear()

    def chunk_sent(self, follower: str, chunk: SnapshotChunk) -> None:
        """The driver read and sent a piece: now we know the snapshot and its size."""
        transfer = self._transfers.get(follower)
        if transfer is not None:
            transfer.meta = chunk.meta
            transfer.size = chunk.size

    def acknowledged(self, follower: str, ack: SnapshotAck, now: int) -> None:
        transfer = self._transfers.get(follower)
        if transfer is None or transfer.meta is None or ack.index != transfer.meta.index:
            return
        transfer.last_heard_ms = now
        if ack.is_refused:
            self.stop(follower)
        elif ack.offset >= transfer.size:
            index = transfer.meta.index
            del self._transfers[follower]
            self._ended[follower] = None
            self._raft.report_snapshot(follower, SnapshotStatus(index, True))
        elif ack.offset > transfer.acked:
            transfer.acked = ack.offset
            transfer.progress_ms = now
        elif ack.offset == transfer.acked and ack.offset:
            # A later piece came, and this one is wanted: it was lost by itself.
            if now - transfer.progress_ms >= HOLE_MS:
                self._go_back(transfer, now)
        elif ack.offset < transfer.acked or ack.offset == 0:
            # The receiver started over (it restarted, or lost a piece): follow it.
            transfer.acked = ack.offset
            self._go_back(transfer, now)

    @staticmethod
    def _go_back(transfer: _Transfer, now: int) -> None:
        transfer.offset = transfer.acked
        transfer.progress_ms = now

    def step(self, now: int, disk: list[DiskEffect]) -> None:
        if self._ended:
            disk.extend(map(EndTransfer, self._ended))  # before a new one to the same follower begins
            self._ended.clear()
        if not self._transfers:
            return
        for follower, transfer in list(self._transfers.items()):
            if now - transfer.last_heard_ms > SILENCE_MS_MAX:
                self.stop(follower)
                continue
            if now < transfer.retry_ms:
                continue
            if now - transfer.progress_ms >= RESEND_MS:
                self._go_back(transfer, now)
            transfer.retry_ms = 0
            # The first piece goes alone: it tells how many there are.
            window = (
                CHUNKS_IN_FLIGHT_MAX * CHUNK_SIZE_BYTES if transfer.meta is not None else CHUNK_SIZE_BYTES
            )
            while transfer.offset < transfer.size and transfer.offset - transfer.acked < window:
                disk.append(SendChunk(follower, self._raft.term, transfer.offset, CHUNK_SIZE_BYTES))
                transfer.offset += CHUNK_SIZE_BYTES

    def chunk_failed(self, follower: str, now: int) -> None:
        """A piece could not be queued (pipe full or connection lost): soon go back to what is acknowledged."""
        transfer = self._transfers.get(follower)
        if transfer is not None:
            transfer.offset = transfer.acked
            transfer.retry_ms = now + RETRY_MS

    @property
    def deadline(self) -> int:
        if not self._transfers:
            return _NEVER
        return min(
            t.retry_ms or min(t.last_heard_ms + SILENCE_MS_MAX + 1, t.progress_ms + RESEND_MS)
            for t in self._transfers.values()
        )

    @property
    def followers(self) -> list[str]:
        return list(self._transfers)


class SnapshotReceiver:
    """
    A follower's side: pieces go to the disk and into a new machine at the same time.

    The new state replaces the old one only when the file is durable *and* the core takes it.
    """

    def __init__(self, raft: RawNode, machine: Machine, group: int, events: list[LogEvent]) -> None:
        self._raft = raft
        self._machine = machine
        self._group = group
        self._events = events
        self._sender = ""
        self._meta: SnapshotMeta | None = None
        self._term = 0
        self._size = 0
        self._offset = 0
        self._is_finishing = False
        self._sink: SnapshotSink | None = None

    def receive(self, sender: str, chunk: SnapshotChunk, disk: list[DiskEffect]) -> SnapshotAck | None:
        if chunk.term < self._raft.term:
            return self._ack(chunk, 0, is_refused=True)
        if chunk.meta.index <= self._raft.commit_index:
            # All of it is here already. To refuse would have the leader begin anew for ever.
            self.abort(disk)
            return self._ack(chunk, chunk.size)
        if self._is_finishing:
            return None
        if self._meta != chunk.meta or self._sender != sender or (chunk.offset == 0 and self._offset):
            if chunk.offset != 0:
                return self._ack(chunk, 0)
            self.abort(disk)
            self._sender, self._meta, self._size, self._offset = sender, chunk.meta, chunk.size, 0
            self._sink = self._machine.begin_restore()
            disk.append(BeginSnapshot(RECEIVED, chunk.meta))
        self._term = chunk.term
        if chunk.offset != self._offset:
            # A piece is missing or came twice, perhaps because an answer was lost: say what comes next.
            return self._ack(chunk, self._offset)
        assert self._sink is not None
        try:
            self._sink.feed(chunk.data)
        except CoordError as error:
            self._events.append(
                LogEvent(
                    logging.ERROR,
                    "snapshot.unreadable",
                    f"the snapshot from {sender!r} cannot be read: {error}",
                    {"peer": sender},
                )
            )
            self.abort(disk)
            return self._ack(chunk, 0, is_refused=True)
        disk.append(WriteSnapshot(RECEIVED, chunk.data))
        self._offset += len(chunk.data)
        if self._offset < self._size:
            return self._ack(chunk, self._offset)
        self._is_finishing = True
        disk.append(FinishSnapshot(RECEIVED, chunk.meta))
        return None

    def stored(self, meta: SnapshotMeta) -> tuple[str, SnapshotAck]:
        """The file is durable: offer it to the core."""
        self._is_finishing = False
        ack = SnapshotAck(self._group, self._term, meta.index, self._size, False)
        sender = self._sender
        self._raft.step(sender, InstallSnapshot(self._term, meta))
        return sender, ack

    def install(self, meta: SnapshotMeta) -> None:
        """The core took it: the machine becomes what the snapshot says."""
        assert self._sink is not None and self._meta is not None and self._meta.index == meta.index
        self._sink.finish()
        self._forget()
        self._events.append(
            LogEvent(
                logging.INFO,
                "snapshot.installed",
                f"installed a snapshot at index {meta.index}",
                {"index": meta.index, "term": meta.term},
            )
        )

    def abort(self, disk: list[DiskEffect]) -> None:
        if self._meta is not None and not self._is_finishing:
            disk.append(AbortSnapshot(RECEIVED))
        self._forget()

    def _forget(self) -> None:
        self._meta = None
        self._sink = None
        self._sender = ""
        self._offset = self._size = 0
        self._is_finishing = False

    def _ack(self, chunk: SnapshotChunk, offset: int, *, is_refused: bool = False) -> SnapshotAck:
        return SnapshotAck(chunk.group, chunk.term, chunk.meta.index, offset, is_refused)
