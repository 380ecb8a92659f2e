"""The contract between a node and what makes its promises durable.

A storage belongs to one node and is used by one thread at a time; `after_fork_in_child` is the
exception. It knows no clock, draws no randomness and decides nothing: which entries are right is
Raft's business, that they are still there after a crash is ours.

What must be true whatever the implementation:

* After `write` returns, a crash of the process or of the machine loses nothing of the batch (the
  memory storage is the stated exception: it promises only to its own process).
* `open` returns what was written, a later record superseding an earlier one at the same index. What
  was written but never acknowledged may or may not be there, as whole batches, oldest first.
* A failed write is for ever: every later call raises the same error, and the process does not open
  that directory again (after a failed fsync the kernel marks lost pages as clean, so that a second
  fsync "succeeds" and means nothing).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from coordlib.raft.messages import Entry, HardState, SnapshotMeta

__all__ = [
    "CORRUPT_REMEDY",
    "FORMAT_VERSION",
    "DiskIdentity",
    "LogCut",
    "LogStorage",
    "Persist",
    "Recovered",
    "RecoveredGroup",
    "SnapshotReader",
    "SnapshotWriter",
]

CORRUPT_REMEDY = (
    "put it back from a copy made since this node stopped, or leave this member down: the others go on without it "
    "while they are a majority. Do not empty the directory: a lost disk cannot rejoin under the same name"
)
"""Ends the message of every `StorageCorrupt`."""

FORMAT_VERSION = 1
"""Disk: the format that this code writes. Everything older must stay readable (tests/storage/fixtures)."""


class LogCut(NamedTuple):
    """A leader cut the log back to less, which is no loss. Both are the (term, index) of a last entry."""

    reached: tuple[int, int]  # the furthest end that the log ever had before
    end: tuple[int, int]  # where the cut left it: with less than that, the disk has lost something since


class DiskIdentity(NamedTuple):
    """Whose disk this is. Written once when the directory is empty; only the last five fields change later."""

    format_version: int
    node_id: str
    disk_id: bytes  # 16 random bytes, handed in by whoever makes the storage
    cluster_name: str
    cluster_uuid: bytes  # b"" = belongs to no cluster yet
    disks: tuple[tuple[str, bytes], ...]  # the initial members' disk ids as formed; b"" = not seen
    backs: str = ""  # before that: who may form the cluster as far as this member goes (ADR 4)
    recorded: tuple[tuple[str, bytes], ...] = ()  # disks not seen then, of which the log has told since
    cut: LogCut | None = None  # the last one that left less than the log had ever reached


class Persist(NamedTuple):
    """
    What one group needs durable in this round.

    On recovery it is as if these were done in this order: restart the log after `restored`, set
    the hard state, append the entries (replacing any suffix from the first one's index on).
    """

    group: int
    hard_state: HardState | None
    entries: Sequence[Entry]
    restored: SnapshotMeta | None = None  # the log restarts after this, already durable, snapshot


class RecoveredGroup(NamedTuple):
    hard_state: HardState  # HardState(0, "") if none was ever written
    snapshot: SnapshotMeta | None  # newest durable one
    entries: list[Entry]  # consecutive, from snapshot.index + 1 (or 1) on
    cut_from: tuple[int, int] = (0, 0)  # (term, index) of the log's end, if the snapshot cuts it back


class Recovered(NamedTuple):
    identity: DiskIdentity
    groups: dict[int, RecoveredGroup]
    is_new: bool  # the directory was empty and has been given its identity by this call
    notes: list[str]  # what a person should know, e.g. "segment 7: cut a torn tail of 312 bytes ..."


class SnapshotWriter(Protocol):
    """Writes one snapshot aside. Nothing of it exists for anybody until `finish` returns."""

    def write(self, data: bytes) -> None:
        """
        Append to the payload.

        Raises:
            StorageFailed: As for `LogStorage.write`; StorageFull is one of its kinds.
        """

    def finish(self) -> None:
        """
        Make it durable and the newest snapshot of its group; older ones are removed.

        If a newer (or as new) one became durable in the meantime, that one stays and this one is dropped.
        """

    def abort(self) -> None:
        """Drop what was written. Never raises; harmless after `finish`."""


class SnapshotReader(Protocol):
    """Reads one durable snapshot; stays readable after a newer one has replaced it, until closed."""

    @property
    def meta(self) -> SnapshotMeta: ...

    @property
    def size(self) -> int:
        """Bytes of payload."""

    def read(self, offset: int, size: int) -> bytes:
        """
        Return payload bytes whose checksums were verified; fewer than `size` only at the end.

        Raises:
            StorageCorrupt: A block is not what was written.
            StorageFailed: The disk cannot read it.
        """

    def close(self) -> None: ...


@runtime_checkable
class LogStorage(Protocol):
    """See the module's docstring. Construction touches nothing; `open` comes first."""

    def open(self) -> Recovered:
        """
        Take the directory for this process, check whose it is, and return what it holds.

        Everything returned is durable, even if the process that wrote it died before its fsync.

        Raises:
            StartError: Not writable, locked, another node's or cluster's, or written by a newer
                version. Nothing was changed; the message says what to do.
            StorageCorrupt: Something that had been acknowledged is damaged or missing.
            StorageFailed: The disk cannot be read or written.
        """

    def set_identity(self, identity: DiskIdentity) -> None:
        """Replace the identity durably and atomically; only the last five fields may differ."""

    def write(self, batch: Sequence[Persist]) -> None:
        """
        Make all of the batch durable, with one write and one fdatasync. Empty: no I/O.

        Raises:
            StorageFull: The disk is full. As final as StorageFailed.
            StorageFailed: The write or the fsync failed. Nothing of this batch may be promised, and
                every later call raises the same.
        """

    def create_snapshot(self, group: int, meta: SnapshotMeta) -> SnapshotWriter:
        """Start a snapshot of the node's own state, or one that is being received."""

    def open_snapshot(self, group: int) -> SnapshotReader | None:
        """Open the newest durable snapshot of the group, if there is one."""

    def compact(self, group: int, index: int) -> None:
        """
        Allow entries of `group` up to `index` to be forgotten; a bounded number of files goes at each call.

        A durable snapshot at or above `index` exists, and if it was a received one that replaced the
        log, the `Persist` with its `restored` has been written.
        """

    def close(self) -> None:
        """Let go of the directory. Idempotent, never raises, and after a failure writes nothing."""

    def after_fork_in_child(self) -> None:
        """In a forked child: close inherited descriptors. The parent's files and lock stay as they are."""

    @property
    def stats(self) -> dict[str, int]:
        """Counts by stable names."""
