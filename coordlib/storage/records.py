"""The bytes of the log: segments, batches, records. Pure functions over bytes; no files here.

Disk: this is the layout of format 1. All integers are little-endian. docs/formats-disk.md says why.

::

    segment  = header (4096 bytes), then batches, then zeros to the end of the file
    header   = 0  magic            8   "coordlog"
               8  format version   4
              12  header size      4   4096
              16  disk id         16
              32  segment number   8
              40  checksum         4   crc32 of bytes 0..40
              44  zeros         4052

    batch    = header (32 bytes), body; starts at a multiple of 8
               0  magic            4   C5 42 41 54
               4  body size        4   a multiple of 8
               8  sequence         8   +1 with every batch, also across segments
              16  previous         4   header checksum of the batch before it in this segment;
                                       of the first batch: crc32 of the segment's header (the seed)
              20  body checksum    4   crc32 of the body, started with `previous`
              24  header checksum  4   crc32 of bytes 0..24 of this header, started with the seed
              28  zeros            4

    record   = 0  kind             1   1 ENTRY, 2 HARD_STATE, 3 RESTORED, 4 LINK, 5 CHECKPOINT, 6 CLOSED
               1  entry kind       1   ENTRY only
               2  zeros            2
               4  group            4
               8  term             8
              16  index            8
              24  payload size     4
              28  payload
    body     = records, then 0 to 7 zeros

One checksum covers a batch, because a batch is what becomes durable or does not: no part of it was ever
promised without the rest. The chain makes stale bytes invalid wherever they come from.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple
from zlib import crc32

from coordlib.errors import StartError, StorageCorrupt, invariant
from coordlib.storage.base import CORRUPT_REMEDY, FORMAT_VERSION

__all__ = [
    "BATCH_HEADER_SIZE",
    "CHECKPOINT",
    "CLOSED",
    "ENTRY",
    "HARD_STATE",
    "LINK",
    "RECORD",
    "RESTORED",
    "SEGMENT_HEADER_SIZE",
    "Batch",
    "SegmentScan",
    "iterate_records",
    "scan_segment",
    "seal_batch",
    "segment_header",
]

SEGMENT_HEADER_SIZE = 4096
BATCH_HEADER_SIZE = 32
BATCH_SIZE_MAX = 1 << 31

_SEGMENT_MAGIC = b"coordlog"
_SEGMENT_HEADER = struct.Struct("<8sII16sQ")
_BATCH_MAGIC = b"\xc5BAT"
_BATCH_HEADER = struct.Struct("<4sIQII")
_CHECKSUM = struct.Struct("<I")

RECORD = struct.Struct("<BBHIQQI")
ENTRY = 1
HARD_STATE = 2  # term; payload: vote in UTF-8
RESTORED = 3  # term and index of the snapshot after which the group's log restarts
LINK = (
    4  # first in a segment: term = number of the segment before, index = its end, payload = its last checksum
)
CHECKPOINT = 5  # after LINK, one for each group: term and vote, last index; payload: last term (8), vote
CLOSED = 6  # an orderly shutdown; proves that the batch before it was durable


def segment_header(disk_id: bytes, number: int) -> bytes:
    """The first block of a segment. Its crc32 seeds the checksums of the segment's batches."""
    fields = _SEGMENT_HEADER.pack(_SEGMENT_MAGIC, FORMAT_VERSION, SEGMENT_HEADER_SIZE, disk_id, number)
    return (fields + _CHECKSUM.pack(crc32(fields))).ljust(SEGMENT_HEADER_SIZE, b"\0")


def seal_batch(parts: list[bytes], sequence: int, previous: int, seed: int) -> tuple[bytearray, int]:
    """
    Turn encoded records into one batch, ready to be written.

    Args:
        parts: Record headers and payloads; `parts[0]` is a placeholder of BATCH_HEADER_SIZE bytes,
            so that all is joined once and never copied again.

    Returns:
        The bytes, and the header checksum: `previous` of the next batch.
    """
    data = bytearray().join(parts)
    padding = -len(data) & 7
    if padding:
        data += bytes(padding)
    invariant(len(data) < BATCH_SIZE_MAX, "a batch of %d bytes", len(data))
    with memoryview(data) as view:
        checksum = crc32(view[BATCH_HEADER_SIZE:], previous)
    header = _BATCH_HEADER.pack(_BATCH_MAGIC, len(data) - BATCH_HEADER_SIZE, sequence, previous, checksum)
    header_checksum = crc32(header, seed)
    data[:28] = header + _CHECKSUM.pack(header_checksum)
    return data, header_checksum


class Batch(NamedTuple):
    offset: int
    end: int
    sequence: int
    checksum: int


class SegmentScan(NamedTuple):
    """What a segment holds, and why the scan stopped."""

    batches: list[Batch]
    end: int  # where the next batch would go
    damage: str  # "" = only zeros follow
    is_proven: bool  # the damaged batch had been durable: something was written after it


def check_segment_header(data: bytes, disk_id: bytes, number: int, path: str) -> bool:
    """
    Verify the first block of a segment.

    Returns:
        False if it was never completed (the caller knows whether that can be).

    Raises:
        StartError: A newer version wrote it.
        StorageCorrupt: It is whole, but another disk's or another segment's.
    """
    if data[:SEGMENT_HEADER_SIZE] == segment_header(disk_id, number):
        return True
    if len(data) < 44 or _CHECKSUM.unpack_from(data, 40)[0] != crc32(data[:40]):
        return False
    magic, version, _, found_id, found_number = _SEGMENT_HEADER.unpack_from(data)
    if magic == _SEGMENT_MAGIC and version > FORMAT_VERSION:
        raise StartError(
            f"{path} has disk format {version}, this coordlib reads up to {FORMAT_VERSION}: upgrade coordlib",
            path=path,
            format_version=version,
        )
    if found_id != disk_id or found_number != number:
        raise StorageCorrupt(
            f"{path} is segment {found_number} of disk {found_id.hex()}, not {number} of {disk_id.hex()}: "
            f"files were mixed up; {CORRUPT_REMEDY}",
            path=path,
        )
    return False


def scan_segment(data: bytes, seed: int, sequence: int | None) -> SegmentScan:
    """
    Walk over the batches of a segment up to the first that is not there or not whole.

    A batch is written only after the one before it has been fsynced. So whatever follows a damaged batch
    proves that it had been durable, and that not a crash but the disk has damaged it; and a damaged batch
    that nothing follows never was acknowledged, or was the very last one.

    Args:
        sequence: What the first batch must have; None accepts any.
    """
    batches: list[Batch] = []
    position = SEGMENT_HEADER_SIZE
    size = len(data)
    previous = seed
    with memoryview(data) as view:
        while position + BATCH_HEADER_SIZE <= size:
            magic, body_size, found, found_previous, checksum = _BATCH_HEADER.unpack_from(data, position)
            header_checksum = crc32(view[position : position + 24], seed)
            if magic != _BATCH_MAGIC or data[position + 24 : position + 32] != (
                _CHECKSUM.pack(header_checksum) + b"\0\0\0\0"
            ):
                break
            if found_previous != previous or (sequence is not None and found != sequence):
                # A whole header of this very segment in a place where it does not belong.
                return SegmentScan(batches, position, f"batch {found} is out of order", True)
            body = position + BATCH_HEADER_SIZE
            end = body + body_size
            if end > size or crc32(view[body:end], previous) != checksum:
                is_proven = bool(data[end:].lstrip(b"\0"))
                return SegmentScan(batches, position, f"batch {found} is not whole", is_proven)
            batches.append(Batch(position, end, found, header_checksum))
            position = end
            previous = header_checksum
            sequence = found + 1
    rest = data[position:].lstrip(b"\0")
    if not rest:
        return SegmentScan(batches, position, "", False)
    return SegmentScan(
        batches,
        position,
        "no batch can be read",
        _has_batch_after(data, position, seed, 0 if sequence is None else sequence),
    )


def _has_batch_after(data: bytes, position: int, seed: int, sequence: int) -> bool:
    """Is there a whole batch header with a higher sequence? Payloads can only quote older ones."""
    while (position := data.find(_BATCH_MAGIC, position + 1)) >= 0:
        header = data[position : position + 28]
        if (
            not position & 7
            and len(header) == 28
            and _CHECKSUM.unpack_from(header, 24)[0] == crc32(header[:24], seed)
            and _BATCH_HEADER.unpack_from(header)[2] > sequence
        ):
            return True
    return False


def iterate_records(data: bytes, batch: Batch) -> Iterator[tuple[int, int, int, int, int, bytes]]:
    """
    Yield (kind, entry kind, group, term, index, payload) of a batch whose checksum holds.

    Raises:
        StorageCorrupt: The records do not fill the body: the writer was faulty.
    """
    position = batch.offset + BATCH_HEADER_SIZE
    end = batch.end
    unpack = RECORD.unpack_from
    while end - position >= 28:
        kind, entry_kind, _, group, term, index, size = unpack(data, position)
        position += 28
        if size > end - position or not kind:
            raise StorageCorrupt(f"batch {batch.sequence}: a record does not fit its batch")
        yield kind, entry_kind, group, term, index, data[position : position + size]
        position += size
    if data[position:end].strip(b"\0"):
        raise StorageCorrupt(f"batch {batch.sequence}: bytes after the last record")
