"""The form of a snapshot: a stream of blocks, made and read a slice at a time.

Disk: ``CLSN``, format version ``>H``, then blocks: length ``>I`` and that many bytes, a CBOR array that
begins with the kind of block. Where one block ends and the next begins follows from the content alone, so
that the bytes are the same on every member that applied the same log. Integrity is the business of those who
store and send it.

What must not live here: what is in the blocks of each kind of state (see `machine/__init__`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import Any

from coordlib.cbor import decode, encode
from coordlib.errors import CoordError, FatalError, LocalProtocolError, RemoteProtocolError

__all__ = ["Block", "SnapshotSink", "SnapshotSource", "UnknownSnapshot", "pack_block", "pack_records"]

MAGIC = b"CLSN"
SNAPSHOT_VERSION = 2  # 2: ids, transactions and services, and their limits
_READABLE = (1, SNAPSHOT_VERSION)
_PREAMBLE = struct.Struct(">4sH")
_LENGTH = struct.Struct(">I")

PREAMBLE = _PREAMBLE.pack(MAGIC, SNAPSHOT_VERSION)
RECORDS_BYTES = 32 * 1024  # a block of records ends with the first that reaches it
BLOCK_BYTES_MAX = 64 * 1024 * 1024  # far above the largest record; below what would hurt to allocate
_BLOCKS_MAX = 64  # made for one call of `next`, however small they are


class Block(IntEnum):
    HEADER = 0  # applied index, log_time, limits, restore epoch, grant counter
    MEMBERS = 1  # [key, record, ...]
    SESSIONS = 2  # [key, record, ...]
    LOCKS = 3  # [key, record, ...]
    MAP = 4  # name, revision: the map that the following ENTRIES belong to
    ENTRIES = 5  # [key, record, ...]
    END = 6  # number of records in all
    IDS = 7  # floor in ms, last lease, fence, by how many ms leases may be ahead
    ID_LAYOUTS = 8  # [key, record, ...]
    ID_WORKERS = 9  # [key, record, ...]
    TRANSACTIONS = 10  # horizon in ms, close in ms
    TX_OUTCOMES = 11  # [key, record, ...]
    TX_HEURISTICS = 12  # [key, record, ...]
    SERVICES = 13  # [key, record, ...]
    TX_FINISHED = 14  # records of a ledger
    TX_ABORTED = 15  # records of a ledger


class UnknownSnapshot(FatalError):
    """The snapshot is of a newer format. Nothing was changed; upgrade this member."""

    code = "unknown-snapshot"


def pack_block(kind: Block, *fields: object) -> bytes:
    """Make a block."""
    body = encode((kind.value, *fields))
    return _LENGTH.pack(len(body)) + body


def pack_records(kind: Block, pairs: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Yield (number of records, block) for all pairs of key and record."""
    flat: list[bytes] = []
    size = 0
    for key, record in pairs:
        flat.append(key)
        flat.append(record)
        size += len(key) + len(record)
        if size >= RECORDS_BYTES:
            yield len(flat) // 2, pack_block(kind, flat)
            flat = []
            size = 0
    if flat:
        yield len(flat) // 2, pack_block(kind, flat)


class SnapshotSource:
    """
    Reads a state as it was when the snapshot was begun, while it goes on changing.

    Costs memory for what has changed since, at most as much again as the state; so close it.
    """

    __slots__ = ("_blocks", "_buffer", "_close", "_is_closed", "_offset")

    def __init__(self, blocks: Iterator[bytes], close: Callable[[], None]) -> None:
        self._blocks = blocks
        self._close = close
        self._buffer = bytearray(PREAMBLE)
        self._offset = 0
        self._is_closed = False

    def next(self, size_bytes_max: int) -> bytes | None:
        """
        Return the next bytes, at most `size_bytes_max` (> 0) and possibly fewer; None at the end.

        Takes a few milliseconds at most for a quarter of a megabyte.

        Raises:
            LocalProtocolError: It was closed.
        """
        if self._is_closed:
            raise LocalProtocolError("the snapshot was closed")
        buffer = self._buffer
        for _ in range(_BLOCKS_MAX):
            if len(buffer) - self._offset >= size_bytes_max:
                break
            block = next(self._blocks, None)
            if block is None:
                break
            buffer += block
        if self._offset == len(buffer):
            return None
        end = min(len(buffer), self._offset + size_bytes_max)
        result = bytes(memoryview(buffer)[self._offset : end])
        if end == len(buffer):
            self._buffer = bytearray()
            self._offset = 0
        else:
            self._offset = end
        return result

    def close(self) -> None:
        """Let go of what was remembered for this snapshot. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._buffer = bytearray()
            self._blocks = iter(())
            self._close()


class SnapshotSink:
    """
    Takes a snapshot in pieces of any size, and replaces the state only when all of it is there and right.

    After an error or without `finish`, the state is what it was; the sink is of no further use then.
    """

    __slots__ = ("_buffer", "_finish", "_has_ended", "_has_preamble", "_is_dead", "_load", "_records")

    def __init__(self, load: Callable[[Block, list[Any]], int], finish: Callable[[], None]) -> None:
        self._load = load
        self._finish = finish
        self._buffer = bytearray()
        self._records = 0
        self._has_preamble = False
        self._has_ended = False
        self._is_dead = False

    def feed(self, data: bytes) -> None:
        """
        Take the next bytes. Time is proportional to their number: hand over slices.

        Raises:
            RemoteProtocolError: This is not a snapshot, or a damaged one.
            UnknownSnapshot: It is of a newer format.
        """
        if self._is_dead:
            raise LocalProtocolError("the restore has failed or is finished: begin another")
        try:
            self._buffer += data
            self._take_blocks()
        except CoordError:
            self._is_dead = True
            raise
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error) as exc:
            self._is_dead = True
            raise RemoteProtocolError(f"malformed snapshot: {exc!r}") from exc

    def finish(self) -> None:
        """
        Replace the state with what was fed.

        Raises:
            RemoteProtocolError: The end is missing. The state is unchanged.
        """
        if self._is_dead:
            raise LocalProtocolError("the restore has failed or is finished: begin another")
        self._is_dead = True
        if not self._has_ended:
            raise RemoteProtocolError("the snapshot ends too early")
        self._finish()

    def _take_blocks(self) -> None:
        buffer = self._buffer
        offset = 0
        if not self._has_preamble:
            if len(buffer) < _PREAMBLE.size:
                return
            magic, version = _PREAMBLE.unpack_from(buffer)
            if magic != MAGIC:
                raise RemoteProtocolError("not a snapshot")
            if version not in _READABLE:
                raise UnknownSnapshot(
                    f"the snapshot is of format {version}, this version reads {SNAPSHOT_VERSION}: "
                    "upgrade coordlib on this node",
                    version=version,
                )
            self._has_preamble = True
            offset = _PREAMBLE.size
        while len(buffer) - offset >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, offset)
            if length > BLOCK_BYTES_MAX:
                raise RemoteProtocolError(f"a block of {length} bytes in a snapshot")
            begin = offset + _LENGTH.size
            if len(buffer) - begin < length:
                break
            body = decode(bytes(memoryview(buffer)[begin : begin + length]))
            offset = begin + length
            self._take(body)
        del buffer[:offset]
        if self._has_ended and buffer:
            raise RemoteProtocolError("bytes after the end of a snapshot")

    def _take(self, body: Any) -> None:
        if self._has_ended:
            raise RemoteProtocolError("blocks after the end of a snapshot")
        kind = Block(body[0])
        if kind is Block.END:
            if body[1:] != [self._records]:
                raise RemoteProtocolError(f"snapshot of {body[1:]} records has {self._records}")
            self._has_ended = True
        else:
            self._records += self._load(kind, body[1:])
