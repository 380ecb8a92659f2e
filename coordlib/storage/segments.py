"""The durable log: append-only segments, one write and one fdatasync a round for all groups.

What is here: the order of effects. What is not: the bytes (records.py, snapshots.py, identity.py), how
they are judged after a crash (recovery.py), system calls (files.py).

A directory holds `lock`, `identity`, segments `<number>.log` and snapshots `<group>-<index>.snap`;
whatever ends in `.tmp` is unfinished and removed when the directory is opened. The order that recovery
rests on:

* the first segment is durable before the identity is: a directory with an identity has a log;
* a batch is written after the one before it was fsynced; a segment is created after the last batch of
  the one before was fsynced; a batch never spans two segments;
* what a restart finds is fsynced again (header, last batch, directory) before anything is said about it,
  because the process that wrote it may have died of a failed fsync, whose pages look clean;
* a snapshot is durable under its name before the log below it goes, and before older snapshots go.

Ahead of the write position the file is filled with zeros in small slices, so that fdatasync has neither
blocks to allocate nor a size to journal. Measured on ext4 (20 KB batches): 137 us into zero-filled blocks,
232 us into blocks that are only fallocated (each must be converted), 284 us appending. A slice of 256 KiB
costs 60 us to write, and 130 us more in the next fdatasync, once in 256 KiB of log; filling a whole segment
at once would stall a round by 10 to 30 ms. A change of segment costs two more syncs, once in 16 MiB.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import NoReturn
from zlib import crc32

from coordlib.errors import (
    CoordError,
    FatalError,
    ForkedError,
    InvariantViolation,
    NotStarted,
    StartError,
    StorageCorrupt,
    StorageFailed,
    StorageFull,
    invariant,
)
from coordlib.raft.messages import HardState, SnapshotMeta
from coordlib.storage.base import (
    CORRUPT_REMEDY,
    FORMAT_VERSION,
    DiskIdentity,
    Persist,
    Recovered,
    RecoveredGroup,
)
from coordlib.storage.files import DirectoryLock, DirectoryLocked, File, FileSystem
from coordlib.storage.identity import IDENTITY_NAME, check_identity, read_identity, write_identity
from coordlib.storage.records import (
    BATCH_HEADER_SIZE,
    CHECKPOINT,
    CLOSED,
    ENTRY,
    HARD_STATE,
    LINK,
    RECORD,
    RESTORED,
    SEGMENT_HEADER_SIZE,
    seal_batch,
    segment_header,
)
from coordlib.storage.recovery import (
    LAST_TERM,
    LINK_CHECKSUM,
    RecoveredSegment,
    Replay,
    parse_segment_name,
    replay,
    segment_name,
)
from coordlib.storage.snapshots import (
    SnapshotFileReader,
    SnapshotFileWriter,
    parse_snapshot_name,
    snapshot_name,
)

__all__ = ["SegmentStorage"]

SEGMENT_SIZE = 16 << 20
FILL_SIZE = 256 << 10
REMOVALS_MAX = 1
"""Segments removed by one call of `compact` or one change of segment: a file of 16 MiB takes ext4 4 ms."""

_LOCK_NAME = "lock"
_PLACEHOLDER = bytes(BATCH_HEADER_SIZE)
_CLOSED_RECORD = RECORD.pack(CLOSED, 0, 0, 0, 0, 0, 0)
_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


class _GroupState:
    """What the segments say of a group, as far as later writes depend on it."""

    __slots__ = ("compacted", "floor", "hard_state", "last_index", "last_term", "snapshot")

    def __init__(self) -> None:
        self.hard_state = HardState(0, "")
        self.floor = 0
        self.last_index = 0
        self.last_term = 0
        self.compacted = 0
        self.snapshot: SnapshotMeta | None = None


class SegmentStorage:
    """
    `LogStorage` on a file system.

    Args:
        directory: Made if missing, with mode 0700.
        new_disk_id: 16 random bytes, used only if the directory turns out to be empty.
        segment_size_bytes: A segment is closed when the next batch would make it larger. A batch
            that is larger than that gets a segment of its own size.
        fill_size_bytes: Size of the slices of zeros ahead of the write position.
    """

    def __init__(
        self,
        fs: FileSystem,
        directory: str,
        *,
        node_id: str,
        cluster_name: str,
        new_disk_id: bytes,
        segment_size_bytes: int = SEGMENT_SIZE,
        fill_size_bytes: int = FILL_SIZE,
    ) -> None:
        if len(new_disk_id) != 16:
            raise ValueError("new_disk_id must be 16 random bytes")
        self._fs = fs
        self._directory = directory.rstrip("/") or "/"
        self._node_id = node_id
        self._cluster_name = cluster_name
        self._new_disk_id = new_disk_id
        self._segment_size = max(segment_size_bytes, SEGMENT_HEADER_SIZE + 1024)
        self._zeros = bytes(min(fill_size_bytes, self._segment_size))
        self._lock: DirectoryLock | None = None
        self._refusal: CoordError | None = NotStarted("call open() first")
        self._identity = DiskIdentity(0, "", b"", "", b"", ())
        self._reset()

    def _reset(self) -> None:
        self._groups: dict[int, _GroupState] = {}
        self._segments: list[RecoveredSegment] = []  # those before the active one, oldest first
        self._unlinked: dict[
            int, SnapshotMeta
        ] = {}  # log must be told to restart after these, in the next batch
        self._file: File | None = None  # the active segment
        self._number = 0
        self._seed = 0
        self._position = 0
        self._filled = 0
        self._chain = 0  # checksum of the last batch
        self._sequence = 1
        self._highest: dict[int, int] = {}
        self._is_mark_due = False
        self._temporary_count = 0
        self._others: dict[int, File] = {}  # open snapshot files
        self._counts = {
            "batches": 0,
            "entries": 0,
            "bytes_written": 0,
            "segments_removed": 0,
            "snapshots_written": 0,
        }

    # -- opening -----------------------------------------------------------------------------------

    def open(self) -> Recovered:
        if self._lock is not None:
            raise StartError(f"{self._directory} is open already", path=self._directory)
        if isinstance(self._refusal, FatalError | ForkedError):
            self._refuse()
        reason = self._fs.condemned(self._directory)
        if reason is not None:
            raise StartError(
                f"{self._directory} had a failed write in this process ({reason}), after which the "
                "kernel may show what never reached the disk: check the disk, then restart the process",
                path=self._directory,
            )
        self._take_directory()
        try:
            recovered = self._recover()
        except OSError as exc:  # while reading; `_fail` has translated what happened while writing
            self._let_go()
            raise self._translate(exc) from exc
        except BaseException:
            self._let_go()
            raise
        self._refusal = None
        return recovered

    def _take_directory(self) -> None:
        directory = self._directory
        try:
            self._fs.make_directory(directory)
            self._lock = self._fs.lock(f"{directory}/{_LOCK_NAME}")
        except DirectoryLocked as exc:
            raise StartError(f"{directory} is in use: {exc}", path=directory) from exc
        except OSError as exc:
            if exc.errno in _FULL_ERRNOS:
                raise StartError(
                    f"{directory}: the disk is full; free space and start again", path=directory
                ) from exc
            raise StartError(
                f"{directory} cannot be used ({exc.strerror or exc}): data_dir must be a directory "
                "that this user can write to",
                path=directory,
            ) from exc

    def _recover(self) -> Recovered:
        fs, directory = self._fs, self._directory
        names = fs.names(directory)
        is_new = IDENTITY_NAME not in names
        if is_new:
            self._check_leftovers(names)
            try:
                self._form(names)
            except OSError as exc:
                self._fail(exc)
            names = fs.names(directory)
        self._identity = read_identity(fs, directory)
        check_identity(self._identity, directory, self._node_id, self._cluster_name)
        disk_id = self._identity.disk_id

        obsolete = [name for name in names if name.endswith(".tmp")]
        snapshots: dict[int, SnapshotMeta] = {}
        for name in sorted(names, reverse=True):  # newest first within a group
            key = parse_snapshot_name(name)
            if key is None:
                continue
            if key[0] in snapshots:
                obsolete.append(name)
                continue
            file = fs.open(f"{directory}/{name}")
            try:
                reader = SnapshotFileReader(file, f"{directory}/{name}", disk_id)
            finally:
                file.close()
            if (reader.group, reader.meta.index) != key:
                raise StorageCorrupt(f"{directory}/{name}: holds another snapshot than its name says")
            snapshots[key[0]] = reader.meta

        found = replay(fs, directory, names, disk_id)
        if not found.segments:
            raise StorageCorrupt(
                f"{directory} has an identity but no log; {CORRUPT_REMEDY}",
                path=directory,
            )
        groups: dict[int, RecoveredGroup] = {}
        for group in sorted(found.groups.keys() | snapshots.keys()):
            groups[group] = self._recover_group(group, found, snapshots.get(group))
        # Up to here nothing was changed, so that every complaint leaves the files as they were found.
        try:
            self._go_on(found)
            # Before removing, because the newest snapshot's name may not be durable yet, and the removal of
            # the one before it would be. After it, because an unfinished segment that came back would
            # seem to follow on batches that are yet to be written to the one before.
            fs.sync_directory(directory)
            obsolete += found.obsolete
            for name in obsolete:
                fs.unlink(f"{directory}/{name}")
            if obsolete:
                fs.sync_directory(directory)
        except OSError as exc:
            self._fail(exc)
        return Recovered(self._identity, groups, is_new, found.notes)

    def _check_leftovers(self, names: list[str]) -> None:
        """Without an identity there may be what an interrupted `_form` left behind, and nothing else."""
        fs, directory = self._fs, self._directory
        for name in names:
            number = parse_segment_name(name)
            if number is None and parse_snapshot_name(name) is None:
                continue
            path = f"{directory}/{name}"
            file = fs.open(path)
            try:
                is_leftover = number == 1 and not file.pread(file.size(), SEGMENT_HEADER_SIZE).strip(b"\0")
            finally:
                file.close()
            if not is_leftover:
                raise StorageCorrupt(
                    f"{directory} holds {name} but no identity; {CORRUPT_REMEDY}",
                    path=directory,
                )

    def _form(self, names: list[str]) -> None:
        """Give an empty directory its first segment and its identity, in this order."""
        fs, directory = self._fs, self._directory
        if segment_name(1) in names:
            fs.unlink(f"{directory}/{segment_name(1)}")
        self._create_segment_file(1, self._new_disk_id).close()
        identity = DiskIdentity(FORMAT_VERSION, self._node_id, self._new_disk_id, self._cluster_name, b"", ())
        write_identity(fs, directory, identity)

    def _recover_group(self, group: int, found: Replay, snapshot: SnapshotMeta | None) -> RecoveredGroup:
        state = self._groups[group] = _GroupState()
        state.snapshot = snapshot
        log = found.groups.get(group)
        if log is None:
            assert snapshot is not None
            self._unlinked[group] = snapshot
            return RecoveredGroup(state.hard_state, snapshot, [])
        state.hard_state = log.hard_state
        state.floor, state.last_index, state.last_term = log.floor, log.last_index, log.last_term
        cut_from = (0, 0)
        if log.adopt(group, snapshot):
            assert snapshot is not None
            self._unlinked[group] = snapshot
            if (state.last_term, state.last_index) > (snapshot.term, snapshot.index):
                cut_from = (state.last_term, state.last_index)
        return RecoveredGroup(log.hard_state, snapshot, log.entries, cut_from)

    def _go_on(self, found: Replay) -> None:
        """Make durable what was found, and continue the last segment."""
        active = found.segments[-1]
        file = self._fs.open(f"{self._directory}/{segment_name(active.number)}")
        self._file = file
        header = segment_header(self._identity.disk_id, active.number)
        if found.cut_at:
            file.truncate(found.cut_at)
        file.pwrite(header, 0)
        if found.tail:
            file.pwrite(found.tail, found.tail_offset)
        file.datasync()
        self._segments = found.segments[:-1]
        self._number = active.number
        self._seed = crc32(header)
        self._position = active.end
        self._filled = max(file.size(), active.end)
        self._chain = active.checksum
        self._sequence = found.sequence
        self._highest = active.highest

    # -- writing -----------------------------------------------------------------------------------

    def write(self, batch: Sequence[Persist]) -> None:
        if self._refusal is not None:
            self._refuse()
        if not batch:
            return
        parts = [_PLACEHOLDER]
        before: dict[int, tuple[HardState, int, int]] = {}
        try:
            if self._unlinked:
                self._encode_unlinked(parts, before)
            count = self._encode(batch, parts, before)
        except InvariantViolation as exc:
            self._refusal = exc  # the state of the groups may be half changed
            raise
        if len(parts) == 1:
            return
        self._append(parts, before)
        counts = self._counts
        counts["batches"] += 1
        counts["entries"] += count

    def _encode(
        self, batch: Sequence[Persist], parts: list[bytes], before: dict[int, tuple[HardState, int, int]]
    ) -> int:
        pack = RECORD.pack
        append = parts.append
        highest = self._highest
        count = 0
        for group, hard_state, entries, restored in batch:
            state = self._groups.get(group)
            if state is None:
                state = self._groups[group] = _GroupState()
            if group not in before:
                before[group] = (state.hard_state, state.last_index, state.last_term)
            if restored is not None:
                index, term, _ = restored
                invariant(
                    state.snapshot is not None and index <= state.snapshot.index,
                    "group %d: log restarted after snapshot %d, which is not durable",
                    group,
                    index,
                )
                append(pack(RESTORED, 0, 0, group, term, index, 0))
                state.floor = state.last_index = index
                state.last_term = term
                if index > highest.get(group, 0):
                    highest[group] = index
            if hard_state is not None:
                vote = hard_state.vote.encode()
                append(pack(HARD_STATE, 0, 0, group, hard_state.term, 0, len(vote)))
                append(vote)
                state.hard_state = hard_state
            if entries:
                expected = entries[0].index
                invariant(
                    0 < expected <= state.last_index + 1,
                    "group %d: entry %d after last entry %d",
                    group,
                    expected,
                    state.last_index,
                )
                term = 0
                for term, index, kind, data in entries:
                    if index != expected:
                        raise InvariantViolation(f"group {group}: entry {index} where {expected} was due")
                    expected += 1
                    append(pack(ENTRY, kind, 0, group, term, index, len(data)))
                    append(data)
                count += len(entries)
                expected -= 1
                state.last_index = expected
                state.last_term = term
                if expected > highest.get(group, 0):
                    highest[group] = expected
        return count

    def _encode_unlinked(self, parts: list[bytes], before: dict[int, tuple[HardState, int, int]]) -> None:
        """A snapshot was durable before the crash, the log not told: tell it before anything builds on it."""
        for group, meta in self._unlinked.items():
            state = self._groups[group]
            before[group] = (state.hard_state, state.last_index, state.last_term)
            parts.append(RECORD.pack(RESTORED, 0, 0, group, meta.term, meta.index, 0))
            state.floor = state.last_index = meta.index
            state.last_term = meta.term
            self._highest[group] = max(meta.index, self._highest.get(group, 0))
        self._unlinked = {}

    def _append(self, parts: list[bytes], before: dict[int, tuple[HardState, int, int]]) -> None:
        """One batch: one write, one fdatasync."""
        is_first = self._position == SEGMENT_HEADER_SIZE
        if is_first:  # of the first segment, or of one in whose creation the process before this one died
            parts[1:1] = self._encode_checkpoint(before)
        try:
            data, chain = seal_batch(parts, self._sequence, self._chain, self._seed)
            if self._position + len(data) > self._segment_size and not is_first:
                self._start_segment(before)
                parts[1:1] = self._encode_checkpoint(before)
                data, chain = seal_batch(parts, self._sequence, self._chain, self._seed)
                is_first = True
            file = self._file
            assert file is not None
            position = self._position
            file.pwrite(data, position)
            file.datasync()
        except OSError as exc:
            self._fail(exc)
        except BaseException:
            # Interrupted: part of the batch may be in the file, and nothing may ever be written over it.
            self._refusal = StorageFailed(
                f"{self._directory}: a write was interrupted; close this storage and open it again with a new one",
                path=self._directory,
            )
            raise
        size = len(data)
        self._position = position = position + size
        self._chain = chain
        self._sequence += 1
        self._is_mark_due = True
        self._counts["bytes_written"] += size
        if is_first:
            self._remove_segments()
        if position + len(self._zeros) // 2 > self._filled:
            self._fill(file)

    def _fill(self, file: File) -> None:
        """Write zeros ahead. They ride in the next fdatasync; if they are lost, nothing is."""
        start = max(self._filled, self._position)
        size = min(len(self._zeros), self._segment_size - start)
        if size <= 0:
            return
        try:
            file.pwrite(self._zeros if size == len(self._zeros) else self._zeros[:size], start)
        except OSError as exc:
            if exc.errno in _FULL_ERRNOS:
                return  # what was promised is durable; the next batch finds out whether there is room for it
            self._fail(exc)
        self._filled = start + size

    def _encode_checkpoint(self, before: dict[int, tuple[HardState, int, int]]) -> list[bytes]:
        """
        Encode what a segment's first batch begins with: what comes before it, and every group's state there.

        So no older segment is needed to know a term, a vote, or that entries are missing.
        """
        number, end, checksum = self._segments[-1][:3] if self._segments else (0, 0, 0)
        records = [
            RECORD.pack(LINK, 0, 0, 0, number, end, LINK_CHECKSUM.size),
            LINK_CHECKSUM.pack(checksum),
        ]
        for group, state in self._groups.items():
            hard_state, last_index, last_term = before.get(
                group, (state.hard_state, state.last_index, state.last_term)
            )
            payload = LAST_TERM.pack(last_term) + hard_state.vote.encode()
            records += (
                RECORD.pack(CHECKPOINT, 0, 0, group, hard_state.term, last_index, len(payload)),
                payload,
            )
        return records

    def _start_segment(self, before: dict[int, tuple[HardState, int, int]]) -> None:
        """Create the next segment and make it the active one."""
        old = self._file
        assert old is not None
        # What was encoded for this batch goes to the new segment: `highest` may stay too high for the old.
        self._file = self._create_segment_file(self._number + 1, self._identity.disk_id)
        old.close()
        self._segments.append(RecoveredSegment(self._number, self._position, self._chain, self._highest))
        self._number += 1
        self._highest = {group: self._groups[group].last_index for group in before}
        self._seed = self._chain = crc32(segment_header(self._identity.disk_id, self._number))
        self._position = self._filled = SEGMENT_HEADER_SIZE

    def _create_segment_file(self, number: int, disk_id: bytes) -> File:
        file = self._fs.open(f"{self._directory}/{segment_name(number)}", create=True)
        try:
            file.pwrite(segment_header(disk_id, number), 0)
            file.datasync()
            self._fs.sync_directory(self._directory)
        except BaseException:
            file.close()
            raise
        return file

    def set_identity(self, identity: DiskIdentity) -> None:
        if self._refusal is not None:
            self._refuse()
        invariant(
            identity[:4] == self._identity[:4],
            "only cluster_uuid, disks, backs, recorded and cut of an identity may change",
        )
        try:
            write_identity(self._fs, self._directory, identity)
        except OSError as exc:
            self._fail(exc)
        self._identity = identity

    # -- snapshots and compaction ------------------------------------------------------------------

    def create_snapshot(self, group: int, meta: SnapshotMeta) -> SnapshotFileWriter:
        if self._refusal is not None:
            self._refuse()
        self._temporary_count += 1
        key = self._temporary_count
        temporary = f"{self._directory}/snapshot-{key}.tmp"

        def on_finish() -> None:
            self._others.pop(key, None)
            self._publish_snapshot(group, meta, temporary)

        def on_abort() -> None:
            if self._others.pop(key, None) is not None and self._refusal is None:
                try:
                    self._fs.unlink(temporary)
                except OSError:
                    pass  # the next open removes it

        try:
            file = self._others[key] = self._fs.open(temporary, create=True)
        except OSError as exc:
            self._fail(exc)
        return SnapshotFileWriter(
            file,
            group,
            meta,
            self._identity.disk_id,
            check=self._check,
            on_finish=on_finish,
            on_abort=on_abort,
            on_error=self._fail,
        )

    def _publish_snapshot(self, group: int, meta: SnapshotMeta, temporary: str) -> None:
        fs, directory = self._fs, self._directory
        state = self._groups.get(group)
        if state is None:
            state = self._groups[group] = _GroupState()
        newest = state.snapshot
        try:
            if newest is not None and newest.index >= meta.index:
                fs.unlink(temporary)
                return
            fs.rename(temporary, f"{directory}/{snapshot_name(group, meta.index)}")
            fs.sync_directory(directory)
            state.snapshot = meta
            self._counts["snapshots_written"] += 1
            if newest is not None:
                fs.unlink(f"{directory}/{snapshot_name(group, newest.index)}")
        except OSError as exc:
            self._fail(exc)

    def open_snapshot(self, group: int) -> SnapshotFileReader | None:
        if self._refusal is not None:
            self._refuse()
        state = self._groups.get(group)
        if state is None or state.snapshot is None:
            return None
        path = f"{self._directory}/{snapshot_name(group, state.snapshot.index)}"
        self._temporary_count += 1
        key = self._temporary_count
        try:
            file = self._fs.open(path)
        except OSError as exc:
            raise self._translate(exc) from exc
        self._others[key] = file

        def on_close() -> None:
            self._others.pop(key, None)

        try:
            return SnapshotFileReader(file, path, self._identity.disk_id, on_close)
        except BaseException as exc:
            del self._others[key]
            file.close()
            if isinstance(exc, OSError):
                raise self._translate(exc) from exc
            raise

    def compact(self, group: int, index: int) -> None:
        if self._refusal is not None:
            self._refuse()
        state = self._groups.get(group)
        invariant(
            state is not None and state.snapshot is not None and index <= state.snapshot.index,
            "group %d: compaction to %d without a durable snapshot",
            group,
            index,
        )
        assert state is not None
        if index > state.compacted:
            state.compacted = index
        self._remove_segments()

    def _remove_segments(self) -> None:
        """Remove at most REMOVALS_MAX segments that no group needs, oldest first."""
        groups = self._groups
        for _ in range(REMOVALS_MAX):
            # While the active segment is empty, the state of the groups is only in the one before it.
            if not self._segments or self._position == SEGMENT_HEADER_SIZE or self._unlinked:
                return
            oldest = self._segments[0]
            if any(index > groups[group].compacted for group, index in oldest.highest.items()):
                return
            # Not synced: a segment that a crash brings back is not consecutive or not needed.
            try:
                self._fs.unlink(f"{self._directory}/{segment_name(oldest.number)}")
            except OSError as exc:
                self._fail(exc)
            del self._segments[0]
            self._counts["segments_removed"] += 1

    # -- failing and closing -----------------------------------------------------------------------

    def _check(self) -> None:
        if self._refusal is not None:
            self._refuse()

    def _refuse(self) -> NoReturn:
        refusal = self._refusal
        assert refusal is not None
        raise type(refusal)(refusal.message, **refusal.details) from refusal

    def _translate(self, exc: OSError) -> StorageFailed:
        if exc.errno in _FULL_ERRNOS:
            return StorageFull(
                f"{self._directory}: the disk is full; free space, then restart", path=self._directory
            )
        return StorageFailed(
            f"{self._directory}: {exc.strerror or exc}; check the disk, then restart the process",
            path=self._directory,
        )

    def _fail(self, exc: OSError) -> NoReturn:
        failure = self._translate(exc)
        self._refusal = failure
        self._fs.condemn(self._directory, failure.message)
        raise failure from exc

    def close(self) -> None:
        if self._lock is None:
            return
        if self._refusal is None and self._is_mark_due:
            self._write_closed_mark()
        self._let_go()
        if not isinstance(self._refusal, FatalError):
            self._refusal = NotStarted("this storage was closed; call open() first")

    def _write_closed_mark(self) -> None:
        """One more batch, so that the next start can tell damage of the last real one from a crash."""
        data, _ = seal_batch([_PLACEHOLDER, _CLOSED_RECORD], self._sequence, self._chain, self._seed)
        file = self._file
        if file is None or self._position + len(data) > self._segment_size:
            return
        try:
            file.pwrite(data, self._position)
            file.datasync()
        except OSError as exc:
            try:
                self._fail(exc)
            except StorageFailed:
                pass  # nothing waits for it, but the directory is condemned

    def _let_go(self) -> None:
        files = [*self._others.values(), *([] if self._file is None else [self._file])]
        lock, self._lock = self._lock, None
        self._reset()
        for file in files:
            try:
                file.close()
            except OSError:
                pass  # everything promised was fsynced, so there is nothing left to lose
        if lock is not None:
            lock.release()

    def after_fork_in_child(self) -> None:
        lock, self._lock = self._lock, None
        files = [*self._others.values(), *([] if self._file is None else [self._file])]
        self._reset()
        for file in files:
            try:
                file.close()
            except OSError:
                pass  # the parent's descriptor is another one
        if lock is not None:
            lock.after_fork_in_child()
        self._refusal = ForkedError("this storage belongs to the parent process")

    @property
    def stats(self) -> dict[str, int]:
        return {
            **self._counts,
            "segments": len(self._segments) + (self._file is not None),
            "bytes": sum(segment.end for segment in self._segments) + self._position,
            "groups": len(self._groups),
        }
