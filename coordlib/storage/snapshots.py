"""Snapshot files: written aside, synced in slices, renamed when whole; read back block by block.

Nothing here knows which snapshot is the newest or when one may go: that is the storage's business.

Disk::

    snapshot = header, blocks, footer
    header   = 0  magic         8   "coordsnp"
               8  version       4
              12  meta size     4
              16  group         4
              20  disk id      16
              36  checksum      4   crc32 of bytes 0..36 and the meta
              40  meta              CBOR [index, term, [voters, learners, outgoing]]
    block    = checksum (4), payload (65536; the last one 1 to 65536)
               checksum = crc32 of the payload, started with header checksum + block number
    footer   = 0  magic         8   "coordend"
               8  payload size  8
              16  checksum      4   crc32 of bytes 0..16, started with the header's checksum

A file with its final name and no valid footer was damaged, not interrupted: the name comes last.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NoReturn
from zlib import crc32

from coordlib import cbor
from coordlib.errors import StartError, StorageCorrupt, StorageFailed
from coordlib.raft.messages import Configuration, SnapshotMeta
from coordlib.storage.base import CORRUPT_REMEDY, FORMAT_VERSION
from coordlib.storage.files import File

__all__ = ["SnapshotFileReader", "SnapshotFileWriter", "parse_snapshot_name", "snapshot_name"]

BLOCK_SIZE = 65536
SYNC_SIZE = 1 << 20
"""Bytes between two fdatasyncs while writing: half a millisecond each, not one long one in `finish`."""

_STRIDE = BLOCK_SIZE + 4
_MAGIC = b"coordsnp"
_FOOTER_MAGIC = b"coordend"
_HEADER = struct.Struct("<8sIII16s")
_FOOTER = struct.Struct("<8sQ")
_CHECKSUM = struct.Struct("<I")
_META_SIZE_MAX = 1 << 24


def snapshot_name(group: int, index: int) -> str:
    return f"{group:08x}-{index:016x}.snap"


def parse_snapshot_name(name: str) -> tuple[int, int] | None:
    """Return (group, index), or None if this is no snapshot's name."""
    if len(name) != 30 or name[8] != "-" or not name.endswith(".snap"):
        return None
    try:
        return int(name[:8], 16), int(name[9:25], 16)
    except ValueError:
        return None


def _block_seed(seed: int, number: int) -> int:
    return (seed + number) & 0xFFFFFFFF


class SnapshotFileWriter:
    """
    Any OSError goes to `on_error`, which translates, latches and raises.

    Args:
        check: Raises if the storage has failed or was closed.
        on_finish: Called when content is durable; renames, and makes that durable.
        on_abort: Called when the file is to go.
    """

    __slots__ = (
        "_buffer",
        "_check",
        "_file",
        "_number",
        "_on_abort",
        "_on_error",
        "_on_finish",
        "_position",
        "_seed",
        "_size",
        "_synced",
    )

    def __init__(
        self,
        file: File,
        group: int,
        meta: SnapshotMeta,
        disk_id: bytes,
        *,
        check: Callable[[], None],
        on_finish: Callable[[], None],
        on_abort: Callable[[], None],
        on_error: Callable[[OSError], NoReturn],
    ) -> None:
        self._file: File | None = file
        self._check = check
        self._on_finish = on_finish
        self._on_abort = on_abort
        self._on_error = on_error
        body = cbor.encode([meta.index, meta.term, [list(names) for names in meta.configuration]])
        fields = _HEADER.pack(_MAGIC, FORMAT_VERSION, len(body), group, disk_id)
        self._seed = crc32(body, crc32(fields))
        self._buffer = bytearray()
        self._number = 0
        self._size = 0
        self._position = 0
        self._synced = 0
        self._append(fields + _CHECKSUM.pack(self._seed) + body)

    def _append(self, data: bytes | bytearray) -> None:
        file = self._file
        assert file is not None
        try:
            file.pwrite(data, self._position)
            self._position += len(data)
            if self._position - self._synced >= SYNC_SIZE:
                file.datasync()
                self._synced = self._position
        except OSError as exc:
            self._on_error(exc)

    def write(self, data: bytes) -> None:
        self._check()
        if self._file is None:
            raise ValueError("this snapshot was finished or aborted")
        buffer = self._buffer
        buffer += data
        self._size += len(data)
        if len(buffer) < BLOCK_SIZE:
            return
        whole = len(buffer) - len(buffer) % BLOCK_SIZE
        # Several blocks in one system call, but never more than a sync's worth.
        for start in range(0, whole, SYNC_SIZE):
            parts: list[bytes | memoryview] = []
            with memoryview(buffer) as view:
                for offset in range(start, min(start + SYNC_SIZE, whole), BLOCK_SIZE):
                    block = bytes(view[offset : offset + BLOCK_SIZE])
                    parts += (self._next_checksum(block), block)
            self._append(b"".join(parts))
        del buffer[:whole]

    def _next_checksum(self, block: bytes | bytearray) -> bytes:
        checksum = _CHECKSUM.pack(crc32(block, _block_seed(self._seed, self._number)))
        self._number += 1
        return checksum

    def finish(self) -> None:
        self._check()
        file = self._file
        if file is None:
            raise ValueError("this snapshot was finished or aborted")
        tail = b""
        if self._buffer:
            tail = self._next_checksum(self._buffer) + bytes(self._buffer)
            self._buffer.clear()
        fields = _FOOTER.pack(_FOOTER_MAGIC, self._size)
        self._append(tail + fields + _CHECKSUM.pack(crc32(fields, self._seed)))
        try:
            file.datasync()
            file.close()
        except OSError as exc:
            self._on_error(exc)
        self._file = None
        self._on_finish()

    def abort(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            self._buffer.clear()
            try:
                file.close()
            except OSError:
                pass  # nothing of it is wanted
            self._on_abort()


class SnapshotFileReader:
    """Construction verifies header and footer; `read` verifies the blocks that it touches."""

    __slots__ = ("_body", "_file", "_on_close", "_path", "_seed", "group", "meta", "size")

    def __init__(
        self, file: File, path: str, disk_id: bytes, on_close: Callable[[], None] | None = None
    ) -> None:
        self._file = file
        self._path = path
        self._on_close = on_close
        header = file.pread(40, 0)
        if len(header) < 40:
            raise self._damaged("its header is cut off")
        magic, version, meta_size, group, found_disk_id = _HEADER.unpack_from(header)
        body = file.pread(min(meta_size, _META_SIZE_MAX), 40)
        self._seed = crc32(body, crc32(header[:36]))
        if magic != _MAGIC or _CHECKSUM.unpack_from(header, 36)[0] != self._seed:
            raise self._damaged("its header fails its checksum")
        if version > FORMAT_VERSION:
            raise StartError(
                f"{path} has disk format {version}, this version of coordlib reads up to {FORMAT_VERSION}: "
                "upgrade coordlib",
                path=path,
                format_version=version,
            )
        if found_disk_id != disk_id:
            raise self._damaged(f"it was written on another disk ({found_disk_id.hex()})")
        try:
            index, term, (voters, learners, outgoing) = cbor.decode(body)
            configuration = Configuration(tuple(voters), tuple(learners), tuple(outgoing))
        except (cbor.CBORError, ValueError, TypeError) as exc:
            raise self._damaged("its meta data make no sense") from exc
        self.group: int = group
        self.meta = SnapshotMeta(index, term, configuration)
        self._body = 40 + meta_size
        blocks_size = file.size() - self._body - 20
        footer = file.pread(20, self._body + blocks_size) if blocks_size >= 0 else b""
        if len(footer) < 20:
            raise self._damaged("its end is missing")
        footer_magic, self.size = _FOOTER.unpack_from(footer)
        count = -(-self.size // BLOCK_SIZE)
        if (
            footer_magic != _FOOTER_MAGIC
            or self.size + 4 * count != blocks_size
            or _CHECKSUM.unpack_from(footer, 16)[0] != crc32(footer[:16], self._seed)
        ):
            raise self._damaged("its end is missing")

    def _damaged(self, what: str) -> StorageCorrupt:
        return StorageCorrupt(
            f"{self._path}: {what}; {CORRUPT_REMEDY}",
            path=self._path,
        )

    def read(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self.size)
        if offset < 0 or offset >= end:
            return b""
        first = offset // BLOCK_SIZE
        last = (end - 1) // BLOCK_SIZE
        stored_size = min((last + 1) * BLOCK_SIZE, self.size) + 4 * (last + 1) - first * _STRIDE
        try:
            data = self._file.pread(stored_size, self._body + first * _STRIDE)
        except OSError as exc:
            raise StorageFailed(f"{self._path} cannot be read: {exc}", path=self._path) from exc
        parts = []
        with memoryview(data) as view:
            position = 0
            for number in range(first, last + 1):
                block = view[position + 4 : position + _STRIDE]
                if len(data) - position < 5 or _CHECKSUM.unpack_from(data, position)[0] != crc32(
                    block, _block_seed(self._seed, number)
                ):
                    raise self._damaged(f"block {number} fails its checksum")
                parts.append(block)
                position += _STRIDE
            start = offset - first * BLOCK_SIZE
            if len(parts) == 1:
                return bytes(parts[0][start : start + end - offset])
            return b"".join(parts)[start : start + end - offset]

    def close(self) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # it was only read
        if self._on_close is not None:
            self._on_close()
            self._on_close = None
