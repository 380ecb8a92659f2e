"""Carries out a kernel's disk effects on a storage: snapshots written, read and sent, logs compacted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from coordlib.node.effects import (
    AbortSnapshot,
    BeginSnapshot,
    CompactLog,
    DiskEffect,
    EndTransfer,
    FinishSnapshot,
    SendChunk,
    WriteSnapshot,
)
from coordlib.storage.base import LogStorage, SnapshotReader, SnapshotWriter
from coordlib.wire.messages import SnapshotChunk

if TYPE_CHECKING:
    from coordlib.node.kernel import MemberKernel
    from coordlib.node.links import Links

__all__ = ["DiskAgent"]

GROUP: Final = 0
READ_SIZE_BYTES: Final = 256 * 1024


class DiskAgent:
    def __init__(self, storage: LogStorage) -> None:
        self._storage = storage
        self._writers: dict[str, SnapshotWriter] = {}
        self._readers: dict[str, SnapshotReader] = {}

    def read_snapshot(self) -> Iterator[bytes]:
        """The newest snapshot's payload, in pieces; nothing when there is none."""
        reader = self._storage.open_snapshot(GROUP)
        if reader is None:
            return
        try:
            offset = 0
            while offset < reader.size:
                data = reader.read(offset, READ_SIZE_BYTES)
                yield data
                offset += len(data)
        finally:
            reader.close()

    def carry_out(self, effects: Sequence[DiskEffect], kernel: MemberKernel, links: Links) -> None:
        """
        Do them in order.

        Raises:
            StorageFailed: The node must stop.
        """
        for effect in effects:
            if isinstance(effect, WriteSnapshot):
                self._writers[effect.origin].write(effect.data)
            elif isinstance(effect, SendChunk):
                self._send_chunk(effect, kernel, links)
            elif isinstance(effect, BeginSnapshot):
                self._abort(effect.origin)
                self._writers[effect.origin] = self._storage.create_snapshot(GROUP, effect.meta)
            elif isinstance(effect, FinishSnapshot):
                self._writers.pop(effect.origin).finish()
                kernel.snapshot_stored(effect.origin, effect.meta)
            elif isinstance(effect, AbortSnapshot):
                self._abort(effect.origin)
            elif isinstance(effect, EndTransfer):
                self._close_reader(effect.peer)
            else:
                assert isinstance(effect, CompactLog)
                self._storage.compact(GROUP, effect.up_to)

    def _abort(self, origin: str) -> None:
        writer = self._writers.pop(origin, None)
        if writer is not None:
            writer.abort()

    def _send_chunk(self, effect: SendChunk, kernel: MemberKernel, links: Links) -> None:
        # A transfer stays with the file it began with; the first piece begins a new one.
        if effect.offset == 0:
            self._close_reader(effect.peer)
        reader = self._readers.get(effect.peer)
        if reader is None:
            if effect.offset:
                kernel.chunk_failed(effect.peer)
                return
            reader = self._storage.open_snapshot(GROUP)
            if reader is None:
                kernel.chunk_failed(effect.peer)
                return
            self._readers[effect.peer] = reader
        data = reader.read(effect.offset, effect.size)
        chunk = SnapshotChunk(GROUP, effect.term, reader.meta, reader.size, effect.offset, data)
        if links.send(effect.peer, [(GROUP, chunk)], is_bulk=True):
            kernel.chunk_sent(effect.peer, chunk)
        else:
            kernel.chunk_failed(effect.peer)

    def _close_reader(self, peer: str) -> None:
        reader = self._readers.pop(peer, None)
        if reader is not None:
            reader.close()

    def close(self) -> None:
        for origin in list(self._writers):
            self._abort(origin)
        for peer in list(self._readers):
            self._close_reader(peer)
