"""Outcomes that nobody waits for any more, packed: 24 bytes each, in the order of gtids.

=======  ====  ==========================================================
offset   size  field (big-endian)
=======  ====  ==========================================================
0        16    gtid
16       6     log index of the command that decided
22       2     1 + number of the condition that failed, times 8; plus the kind
=======  ====  ==========================================================

Records are in blocks of bytes that are never changed, only replaced: whoever holds them has the ledger as it
was. How records are spread over blocks depends on history, and is never let out.

What must not live here: what outcomes mean, and how long they are kept.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from coordlib.errors import invariant

__all__ = ["RECORD_BYTES", "Ledger", "Line", "packed"]

RECORD_BYTES = 24
_GTID = 16
_RECORDS_MAX = 512  # in a block: what one insertion copies, and what each object's header is spread over
_BLOCK_BYTES_MAX = _RECORDS_MAX * RECORD_BYTES
_CHUNK_BYTES = 1024 * RECORD_BYTES  # of what is handed out
_RECORD = struct.Struct(">16sQ")
_KINDS = 8


class Line(NamedTuple):
    """What is kept of an outcome, beside its gtid."""

    kind: int  # 0 to 7
    revision: int
    failed: int  # -1: none


class Ledger:
    """A sorted map of gtids to lines. Insertion costs microseconds, at the end less."""

    __slots__ = ("_blocks", "_count", "_firsts")

    def __init__(self) -> None:
        self._blocks: list[bytes] = []  # none is empty
        self._firsts: list[bytes] = []  # the first gtid of each
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, gtid: bytes) -> Line | None:
        number = bisect_right(self._firsts, gtid) - 1
        if number < 0:
            return None
        block = self._blocks[number]
        offset = _offset_of(block, gtid)
        if block[offset : offset + _GTID] != gtid:
            return None
        _, word = _RECORD.unpack_from(block, offset)
        low = word & 0xFFFF
        return Line(low % _KINDS, word >> 16, low // _KINDS - 1)

    def insert(self, gtid: bytes, line: Line) -> None:
        """Add one that is not there."""
        record = _RECORD.pack(gtid, line.revision << 16 | (line.failed + 1) * _KINDS | line.kind)
        self._count += 1
        self._insert(max(0, bisect_right(self._firsts, gtid) - 1), record)

    def _insert(self, number: int, record: bytes) -> None:
        blocks, firsts = self._blocks, self._firsts
        gtid = record[:_GTID]
        if number == len(blocks):
            blocks.append(record)
            firsts.append(gtid)
            return
        block = blocks[number]
        offset = _offset_of(block, gtid)
        invariant(block[offset : offset + _GTID] != gtid, "transaction %r is in the ledger already", gtid)
        block = block[:offset] + record + block[offset:]
        if len(block) > _BLOCK_BYTES_MAX:
            # The last one goes on to the next block if there is room. So blocks stay full when records come about
            # in order, as they do.
            last, block = block[-RECORD_BYTES:], block[:-RECORD_BYTES]
            if number + 1 < len(blocks) and len(blocks[number + 1]) == _BLOCK_BYTES_MAX:
                blocks.insert(number + 1, last)
                firsts.insert(number + 1, last[:_GTID])
            else:
                self._insert(number + 1, last)
        blocks[number] = block
        firsts[number] = block[:_GTID]

    def first(self) -> bytes | None:
        """The smallest gtid."""
        return self._firsts[0] if self._firsts else None

    def remove_first(self) -> None:
        """Drop the smallest."""
        self._count -= 1
        block = self._blocks[0][RECORD_BYTES:]
        if block:
            self._blocks[0] = block
            self._firsts[0] = block[:_GTID]
        else:
            del self._blocks[0], self._firsts[0]

    def after(self, gtid: bytes | None, limit: int) -> list[bytes]:
        """At most `limit` gtids, in order, that are greater; all from the start if it is None."""
        found: list[bytes] = []
        number = 0 if gtid is None else max(0, bisect_right(self._firsts, gtid) - 1)
        for block in self._blocks[number : number + limit // 2 + 2]:
            for offset in range(0, len(block), RECORD_BYTES):
                each = block[offset : offset + _GTID]
                if gtid is None or each > gtid:
                    found.append(each)
                    if len(found) == limit:
                        return found
        return found

    def blocks(self) -> Sequence[bytes]:
        """All of it as it is now, for `packed`."""
        return list(self._blocks)

    def load(self, data: bytes) -> int:
        """
        Add records as `packed` gave them; returns how many.

        Raises:
            ValueError: They are malformed, or do not follow those that are there.
        """
        if len(data) % RECORD_BYTES:
            raise ValueError(f"{len(data)} bytes are no records of a ledger")
        last = self._blocks[-1][-RECORD_BYTES:][:_GTID] if self._blocks else b""
        for offset in range(0, len(data), RECORD_BYTES):
            gtid = data[offset : offset + _GTID]
            if gtid <= last:
                raise ValueError("records of a ledger are out of order")
            last = gtid
        for offset in range(0, len(data), _BLOCK_BYTES_MAX):
            block = data[offset : offset + _BLOCK_BYTES_MAX]
            self._blocks.append(block)
            self._firsts.append(block[:_GTID])
        self._count += len(data) // RECORD_BYTES
        return len(data) // RECORD_BYTES

    def check_invariants(self) -> list[bytes]:
        """For tests: all gtids."""
        invariant(
            all(0 < len(block) <= _BLOCK_BYTES_MAX for block in self._blocks), "a block of a wrong size"
        )
        invariant([block[:_GTID] for block in self._blocks] == self._firsts, "the firsts are not the blocks'")
        data = b"".join(self._blocks)
        gtids = [data[offset : offset + _GTID] for offset in range(0, len(data), RECORD_BYTES)]
        invariant(len(gtids) == self._count, "%d records are counted as %d", len(gtids), self._count)
        invariant(all(a < b for a, b in pairwise(gtids)), "a ledger is out of order")
        return gtids


def packed(blocks: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (number of records, records) of `Ledger.blocks`, in pieces that follow from the content alone."""
    waiting = bytearray()
    for block in blocks:
        waiting += block
        while len(waiting) >= _CHUNK_BYTES:
            yield _CHUNK_BYTES // RECORD_BYTES, bytes(waiting[:_CHUNK_BYTES])
            del waiting[:_CHUNK_BYTES]
    if waiting:
        yield len(waiting) // RECORD_BYTES, bytes(waiting)


def _offset_of(block: bytes, gtid: bytes) -> int:
    """Where it is, or would be."""
    low, high = 0, len(block) // RECORD_BYTES
    while low < high:
        middle = (low + high) // 2
        if block[middle * RECORD_BYTES : middle * RECORD_BYTES + _GTID] < gtid:
            low = middle + 1
        else:
            high = middle
    return low * RECORD_BYTES
