"""From the files of a directory back to what was promised: which bytes count, and what they say.

Reads and judges, and changes nothing: what is to be cut, written again or removed is returned, and
carried out by the storage.

Three rules tell a crash from a faulty disk:

1. A batch is written only after the batch before it was fsynced. Anything after a damaged batch (a later
   batch, a later segment, a non-zero byte) therefore proves that it had been durable: StorageCorrupt.
2. A damaged batch that nothing follows was never acknowledged, and is cut; or it was the very last
   acknowledged one, and nothing on this disk can tell. That is what the members' memory of each other's
   acknowledgements is for. A clean shutdown ends with a batch of its own, so that it leaves no such doubt.
3. Every segment begins with a checkpoint of all groups. So it is known what the segments before it held,
   whether or not they are still there, and a hole in the log is seen whatever made it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple
from zlib import crc32

from coordlib.errors import StorageCorrupt
from coordlib.raft.messages import Entry, HardState, SnapshotMeta
from coordlib.storage.base import CORRUPT_REMEDY
from coordlib.storage.files import FileSystem
from coordlib.storage.records import (
    CHECKPOINT,
    CLOSED,
    ENTRY,
    HARD_STATE,
    LINK,
    RESTORED,
    SEGMENT_HEADER_SIZE,
    Batch,
    check_segment_header,
    iterate_records,
    scan_segment,
    segment_header,
)

__all__ = [
    "LAST_TERM",
    "LINK_CHECKSUM",
    "GroupLog",
    "RecoveredSegment",
    "Replay",
    "parse_segment_name",
    "replay",
    "segment_name",
]

LAST_TERM = struct.Struct("<Q")
LINK_CHECKSUM = struct.Struct("<I")
_NO_STATE = HardState(0, "")


def segment_name(number: int) -> str:
    return f"{number:016x}.log"


def parse_segment_name(name: str) -> int | None:
    if len(name) != 20 or not name.endswith(".log"):
        return None
    try:
        return int(name[:16], 16)
    except ValueError:
        return None


class GroupLog:
    """One group's log while it is being replayed. Invariant: entries[0].index == floor + 1."""

    __slots__ = ("entries", "floor", "floor_term", "hard_state")

    def __init__(self, floor: int = 0, floor_term: int = 0, hard_state: HardState = _NO_STATE) -> None:
        self.floor = floor  # entries up to here are not in the segments that are left
        self.floor_term = floor_term  # -1 = unknown
        self.hard_state = hard_state
        self.entries: list[Entry] = []

    @property
    def last_index(self) -> int:
        return self.floor + len(self.entries)

    @property
    def last_term(self) -> int:
        return self.entries[-1].term if self.entries else self.floor_term

    def append(self, entry: Entry) -> None:
        position = entry.index - self.floor - 1
        count = len(self.entries)
        if position == count:
            self.entries.append(entry)
        elif 0 <= position < count:
            del self.entries[position:]
            self.entries.append(entry)
        elif position < 0 < entry.index:
            # Supersedes entries of which some are in segments that were removed.
            self.entries = [entry]
            self.floor = entry.index - 1
            self.floor_term = -1
        else:
            raise StorageCorrupt(f"entry {entry.index} follows entry {self.last_index}; {CORRUPT_REMEDY}")

    def restart(self, index: int, term: int) -> None:
        self.entries.clear()
        self.floor = index
        self.floor_term = term

    def adopt(self, group: int, snapshot: SnapshotMeta | None) -> bool:
        """
        Drop what the newest durable snapshot covers.

        Returns:
            True if the log does not lead to the snapshot: it must be told to restart there.

        Raises:
            StorageCorrupt: Entries that should follow the snapshot are gone.
        """
        index, term = (snapshot.index, snapshot.term) if snapshot is not None else (0, 0)
        if self.floor > index:
            raise StorageCorrupt(
                f"group {group}: the log has lost its entries {index + 1} to {self.floor}, and no snapshot "
                f"covers them; {CORRUPT_REMEDY}",
                group=group,
                index=index + 1,
            )
        position = index - self.floor  # of the first entry after the snapshot
        if position > len(self.entries):
            known = None
        elif position == 0:
            known = self.floor_term
        else:
            known = self.entries[position - 1].term
        if known != term and known != -1:
            # Received, made durable, and the crash came before the log was told (`Persist.restored`). What
            # the leader compacted is committed; entries of ours that do not lead there are not.  Raft §7
            self.restart(index, term)
            return True
        del self.entries[:position]
        return False


class RecoveredSegment(NamedTuple):
    number: int
    end: int
    checksum: int  # `previous` of the next batch
    highest: dict[int, int]  # group -> highest index of an entry in this segment


class Replay(NamedTuple):
    """What the segments say, and what must be done to the files before anything new is promised."""

    groups: dict[int, GroupLog]
    segments: list[RecoveredSegment]  # consecutive; the last is the one to go on with
    sequence: int  # of the next batch
    is_closed: bool  # the last batch says that the shutdown was orderly
    tail: bytes  # last batch of the last segment, to be written again at tail_offset and fsynced
    tail_offset: int
    cut_at: int  # where to truncate the last segment; 0 = nowhere
    obsolete: list[str]  # names of files to remove
    notes: list[str]


def replay(fs: FileSystem, directory: str, names: list[str], disk_id: bytes) -> Replay:
    """
    Read all segments.

    Raises:
        StartError: A segment was written by a newer version.
        StorageCorrupt: See the module's docstring.
        OSError: As the file system raises it.
    """
    numbers = sorted(number for name in names if (number := parse_segment_name(name)) is not None)
    notes: list[str] = []
    # Removed segments go oldest first but are not synced, so a crash may bring any of them back: only the
    # consecutive ones at the end count. If one that matters is missing, the next one's checkpoint tells.
    start = len(numbers) - 1
    while start > 0 and numbers[start - 1] == numbers[start] - 1:
        start -= 1
    obsolete = [segment_name(number) for number in numbers[: max(start, 0)]]
    numbers = numbers[max(start, 0) :]

    groups: dict[int, GroupLog] = {}
    segments: list[RecoveredSegment] = []
    sequence: int | None = None
    is_closed = False
    tail, tail_offset, cut_at = b"", 0, 0
    for number in numbers:
        is_last = number == numbers[-1]
        path = f"{directory}/{segment_name(number)}"
        file = fs.open(path)
        try:
            data = file.pread(file.size(), 0)
        finally:
            file.close()
        if not check_segment_header(data, disk_id, number, path):
            if not is_last or data[SEGMENT_HEADER_SIZE:].strip(b"\0"):
                raise StorageCorrupt(f"{path}: its header is damaged; {CORRUPT_REMEDY}", path=path)
            # A header is durable before anything follows it: the crash came while this file was being made.
            obsolete.append(segment_name(number))
            notes.append(f"segment {number}: removed, its creation was interrupted")
            break
        seed = crc32(segment_header(disk_id, number))
        scan = scan_segment(data, seed, sequence)
        if scan.damage:
            if scan.is_proven or not is_last:
                raise StorageCorrupt(
                    f"{path}: {scan.damage} at byte {scan.end}, but it had been acknowledged: "
                    f"the disk returns other bytes than were written; {CORRUPT_REMEDY}",
                    path=path,
                    offset=scan.end,
                )
            size = len(data[scan.end :].rstrip(b"\0"))
            notes.append(
                f"segment {number}: cut a torn tail of {size} bytes at byte {scan.end} ({scan.damage}); "
                "it was never acknowledged, unless the disk has damaged the very last write"
            )
            cut_at = scan.end
        elif not scan.batches and not is_last:
            raise StorageCorrupt(f"{path}: empty, but a later segment exists; {CORRUPT_REMEDY}", path=path)
        if not scan.batches and not segments and number != 1:
            raise StorageCorrupt(f"{path}: the segments before it are missing; {CORRUPT_REMEDY}", path=path)
        highest: dict[int, int] = {}
        checksum = seed
        for batch in scan.batches:
            is_first = batch.offset == SEGMENT_HEADER_SIZE
            is_closed = _apply(data, batch, groups, highest, segments[-1:] if is_first else None, path)
            checksum = batch.checksum
            sequence = batch.sequence + 1
        segments.append(RecoveredSegment(number, scan.end, checksum, highest))
        if scan.batches:
            tail_offset = scan.batches[-1].offset
            tail = data[tail_offset : scan.end]
        else:
            tail, tail_offset = b"", 0
    return Replay(groups, segments, sequence or 1, is_closed, tail, tail_offset, cut_at, obsolete, notes)


def _apply(
    data: bytes,
    batch: Batch,
    groups: dict[int, GroupLog],
    highest: dict[int, int],
    before: list[RecoveredSegment] | None,
    path: str,
) -> bool:
    """
    Apply a batch's records; True if it ends with CLOSED.

    Args:
        before: For the first batch of a segment, the segment before it, if it is still there.
    """
    is_closed = False
    is_linked = False
    try:
        for kind, entry_kind, group, term, index, payload in iterate_records(data, batch):
            is_closed = False
            if kind == ENTRY:
                log = groups.get(group)
                if log is None:
                    log = groups[group] = GroupLog()
                log.append(Entry(term, index, entry_kind, payload))
                if index > highest.get(group, 0):
                    highest[group] = index
            elif kind == HARD_STATE:
                groups.setdefault(group, GroupLog()).hard_state = HardState(term, payload.decode())
            elif kind == RESTORED:
                groups.setdefault(group, GroupLog()).restart(index, term)
                highest[group] = max(index, highest.get(group, 0))
            elif kind == LINK and before is not None:
                is_linked = True
                if before and (term, index, payload) != (
                    before[0].number,
                    before[0].end,
                    LINK_CHECKSUM.pack(before[0].checksum),
                ):
                    raise StorageCorrupt(
                        f"segment {before[0].number} ends at byte {before[0].end}, but had been longer: "
                        f"the disk has lost acknowledged writes; {CORRUPT_REMEDY}"
                    )
            elif kind == CHECKPOINT and before is not None:
                state = HardState(term, payload[8:].decode())
                (last_term,) = LAST_TERM.unpack_from(payload)
                log = groups.setdefault(group, GroupLog())
                if not before:
                    groups[group] = GroupLog(index, last_term, state)
                elif (log.hard_state, log.last_index) != (state, index):
                    raise StorageCorrupt(
                        f"group {group}: its checkpoint contradicts the log; {CORRUPT_REMEDY}"
                    )
            elif kind == CLOSED:
                is_closed = True
            else:
                raise StorageCorrupt(f"record of unknown kind {kind}; {CORRUPT_REMEDY}")
        if before is not None and not is_linked:
            raise StorageCorrupt(f"the segment does not say what comes before it; {CORRUPT_REMEDY}")
    except (StorageCorrupt, UnicodeDecodeError, struct.error) as exc:
        raise StorageCorrupt(
            f"{path}: batch {batch.sequence} at byte {batch.offset}: {exc}", path=path
        ) from exc
    return is_closed
