"""What every log storage must do: subclass `StorageSuite`, say how one is made, and run it with pytest.

::

    class TestMine(StorageSuite):
        def make(self) -> LogStorage:
            return MyStorage(...)

The suite stays within one process and breaks nothing; crashes and faulty disks are the business of tests
that know the implementation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import pytest

from coordlib.errors import ClusterClosed, InvariantViolation, NotStarted, StartError, UsageError
from coordlib.raft.messages import Configuration, Entry, EntryKind, HardState, SnapshotMeta
from coordlib.storage.base import LogCut, LogStorage, Persist, RecoveredGroup

__all__ = ["StorageSuite", "make_entries", "make_meta", "write_snapshot"]

CUT = LogCut((7, 1 << 40), (6, 3))


def make_entries(first: int, last: int, term: int = 1, size: int = 20) -> list[Entry]:
    """Consecutive entries whose content tells their index and term."""
    return [
        Entry(term, index, EntryKind.COMMAND, (b"%d.%d;" % (term, index)).ljust(size, b"x"))
        for index in range(first, last + 1)
    ]


def make_meta(index: int, term: int = 1) -> SnapshotMeta:
    return SnapshotMeta(index, term, Configuration(("a", "b", "c"), ("d",)))


def write_snapshot(storage: LogStorage, group: int, meta: SnapshotMeta, payload: bytes = b"state") -> None:
    writer = storage.create_snapshot(group, meta)
    writer.write(payload)
    writer.finish()


class StorageSuite(ABC):
    """See the module's docstring. Every test gets one fresh, empty storage."""

    storage: LogStorage

    @abstractmethod
    def make(self) -> LogStorage:
        """Make an empty storage of node "a" in cluster "shop", not opened."""

    def reopen(self) -> LogStorage:
        """Return a storage, not opened, on what the closed one has left. By default the same object."""
        return self.storage

    @pytest.fixture(autouse=True)
    def _one_storage(self) -> object:
        self.storage = self.make()
        yield
        self.storage.close()

    def restart(self) -> dict[int, RecoveredGroup]:
        self.storage.close()
        self.storage = self.reopen()
        recovered = self.storage.open()
        assert not recovered.is_new
        assert recovered.notes == []
        return recovered.groups

    def write(self, *batch: Persist) -> None:
        self.storage.write(batch)

    def append(self, entries: Sequence[Entry], group: int = 0) -> None:
        self.storage.write([Persist(group, None, entries)])

    # -- identity and life --------------------------------------------------------------------------

    def test_first_open_is_new_and_belongs_to_no_cluster(self) -> None:
        recovered = self.storage.open()
        assert recovered.is_new
        assert recovered.groups == {}
        identity = recovered.identity
        assert (
            identity.node_id,
            identity.cluster_name,
            identity.cluster_uuid,
            identity.disks,
        ) == ("a", "shop", b"", ())
        assert len(identity.disk_id) == 16

    def test_identity_is_kept_and_can_be_given_a_cluster(self) -> None:
        identity = self.storage.open().identity
        formed = identity._replace(cluster_uuid=b"u" * 16, disks=(("a", identity.disk_id), ("b", b"")))
        backing = identity._replace(backs="b")
        recording = formed._replace(recorded=(("b", b"d" * 16),))
        for written in (
            backing,
            formed,
            formed._replace(cut=CUT),
            recording,
            recording._replace(cut=CUT),
        ):
            self.storage.set_identity(written)
            self.storage.close()
            self.storage = self.reopen()
            assert written == self.storage.open().identity

    def test_the_fixed_part_of_the_identity_cannot_be_changed(self) -> None:
        identity = self.storage.open().identity
        with pytest.raises(InvariantViolation):
            self.storage.set_identity(identity._replace(disk_id=b"z" * 16))

    def test_nothing_works_before_open_and_after_close(self) -> None:
        for _ in range(2):
            with pytest.raises((NotStarted, ClusterClosed)):
                self.append(make_entries(1, 1))
            with pytest.raises((NotStarted, ClusterClosed)):
                self.storage.open_snapshot(0)
            self.storage.open()
            self.storage.close()

    def test_close_may_come_twice(self) -> None:
        self.storage.open()
        self.storage.close()
        self.storage.close()

    def test_opening_twice_is_refused(self) -> None:
        self.storage.open()
        with pytest.raises(StartError):
            self.storage.open()
        self.append(make_entries(1, 1))

    def test_after_a_fork_the_child_cannot_use_it(self) -> None:
        self.storage.open()
        self.storage.after_fork_in_child()
        with pytest.raises(UsageError):
            self.append(make_entries(1, 1))
        with pytest.raises(UsageError):
            self.storage.open()

    # -- log ------------------------------------------------------------------------------------------

    def test_what_was_written_comes_back(self) -> None:
        self.storage.open()
        entries = make_entries(1, 3)
        self.write(Persist(0, HardState(1, "b"), entries))
        assert {0: RecoveredGroup(HardState(1, "b"), None, entries)} == self.restart()

    def test_kind_and_binary_content_of_entries_come_back(self) -> None:
        self.storage.open()
        entries = [
            Entry(1, 1, EntryKind.NOOP, b""),
            Entry(1, 2, EntryKind.CONFIGURATION, bytes(range(256))),
            Entry(2**63, 3, EntryKind.COMMAND, bytes(1000)),
        ]
        self.append(entries)
        assert entries == self.restart()[0].entries

    def test_an_empty_batch_does_nothing(self) -> None:
        self.storage.open()
        self.write()
        self.write(Persist(0, None, []))
        assert self.restart().get(0, RecoveredGroup(HardState(0, ""), None, [])).entries == []

    def test_the_last_hard_state_counts(self) -> None:
        self.storage.open()
        for state in (HardState(1, "a"), HardState(2, ""), HardState(3, "nœud")):
            self.write(Persist(0, state, []))
        assert HardState(3, "nœud") == self.restart()[0].hard_state

    def test_groups_are_separate(self) -> None:
        self.storage.open()
        self.write(
            Persist(0, HardState(1, "a"), make_entries(1, 2)),
            Persist(7, HardState(5, "c"), make_entries(1, 4, 5)),
        )
        self.append(make_entries(3, 3), 0)
        groups = self.restart()
        assert (HardState(1, "a"), None, make_entries(1, 3)) == groups[0][:3]
        assert (HardState(5, "c"), None, make_entries(1, 4, 5)) == groups[7][:3]

    def test_a_later_entry_supersedes_the_suffix_from_its_index_on(self) -> None:
        self.storage.open()
        self.append(make_entries(1, 5))
        self.append(make_entries(3, 4, term=2))
        assert make_entries(1, 2) + make_entries(3, 4, term=2) == self.restart()[0].entries

    def test_superseding_goes_on_after_a_restart(self) -> None:
        self.storage.open()
        self.append(make_entries(1, 5))
        self.restart()
        self.append(make_entries(2, 2, term=2))
        self.restart()
        self.append(make_entries(3, 3, term=3))
        assert (
            make_entries(1, 1) + make_entries(2, 2, term=2) + make_entries(3, 3, term=3)
            == self.restart()[0].entries
        )

    def test_a_gap_is_refused(self) -> None:
        self.storage.open()
        self.append(make_entries(1, 2))
        with pytest.raises(InvariantViolation):
            self.append(make_entries(4, 4))

    def test_entries_that_skip_an_index_are_refused(self) -> None:
        self.storage.open()
        with pytest.raises(InvariantViolation):
            self.append(make_entries(1, 2) + make_entries(4, 4))

    def test_many_batches_come_back_in_order(self) -> None:
        self.storage.open()
        for index in range(1, 200):
            self.append(make_entries(index, index, size=index * 3))
        assert list(range(1, 200)) == [entry.index for entry in self.restart()[0].entries]

    # -- snapshots --------------------------------------------------------------------------------------

    def test_without_a_snapshot_there_is_none_to_read(self) -> None:
        self.storage.open()
        assert self.storage.open_snapshot(0) is None

    @pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 300_000])
    def test_a_snapshot_is_read_back_in_any_pieces(self, size: int) -> None:
        self.storage.open()
        self.append(make_entries(1, 9))
        payload = bytes(range(251)) * (size // 251 + 1)
        payload = payload[:size]
        writer = self.storage.create_snapshot(0, make_meta(7))
        for start in range(0, size, 70_001):
            writer.write(payload[start : start + 70_001])
        writer.finish()
        self.restart()
        reader = self.storage.open_snapshot(0)
        assert reader is not None
        assert (make_meta(7), size) == (reader.meta, reader.size)
        for piece in (1 + size // 3, 65536, 262_144):
            assert payload == b"".join(reader.read(start, piece) for start in range(0, size, piece))
        assert reader.read(size, 10) == b""
        reader.close()

    def test_an_unfinished_or_aborted_snapshot_does_not_exist(self) -> None:
        self.storage.open()
        self.append(make_entries(1, 9))
        aborted = self.storage.create_snapshot(0, make_meta(3))
        aborted.write(b"x" * 100_000)
        aborted.abort()
        aborted.abort()
        unfinished = self.storage.create_snapshot(0, make_meta(4))
        unfinished.write(b"x" * 100_000)
        assert self.storage.open_snapshot(0) is None
        assert make_entries(1, 9) == self.restart()[0].entries
        assert self.storage.open_snapshot(0) is None
        unfinished.abort()

    def test_the_newest_snapshot_counts_whatever_the_order_they_end_in(self) -> None:
        self.storage.open()
        self.append(make_entries(1, 9))
        older = self.storage.create_snapshot(0, make_meta(3))
        newer = self.storage.create_snapshot(0, make_meta(6))
        newer.write(b"newer")
        older.write(b"older")
        newer.finish()
        older.finish()
        group = self.restart()[0]
        assert (make_meta(6), make_entries(7, 9)) == (group.snapshot, group.entries)
        reader = self.storage.open_snapshot(0)
        assert reader is not None
        assert reader.read(0, 100) == b"newer"
        reader.close()

    def test_a_snapshot_being_read_survives_its_successor(self) -> None:
        self.storage.open()
        self.append(make_entries(1, 9))
        write_snapshot(self.storage, 0, make_meta(3), b"o" * 100_000)
        reader = self.storage.open_snapshot(0)
        assert reader is not None
        write_snapshot(self.storage, 0, make_meta(6), b"n")
        assert reader.read(0, 100_000) == b"o" * 100_000
        reader.close()

    def test_snapshots_of_groups_are_separate(self) -> None:
        self.storage.open()
        self.write(Persist(1, None, make_entries(1, 5)), Persist(2, None, make_entries(1, 5)))
        write_snapshot(self.storage, 1, make_meta(4), b"one")
        write_snapshot(self.storage, 2, make_meta(2), b"two")
        groups = self.restart()
        assert (make_entries(5, 5), make_entries(3, 5)) == (groups[1].entries, groups[2].entries)

    def test_entries_covered_by_the_snapshot_are_not_recovered(self) -> None:
        self.storage.open()
        self.append(make_entries(1, 9))
        write_snapshot(self.storage, 0, make_meta(5))
        self.storage.compact(0, 5)
        self.append(make_entries(10, 11))
        assert make_entries(6, 11) == self.restart()[0].entries

    def test_compaction_without_a_snapshot_is_refused(self) -> None:
        self.storage.open()
        self.append(make_entries(1, 9))
        with pytest.raises(InvariantViolation):
            self.storage.compact(0, 5)

    def test_entries_above_a_compacted_index_may_still_be_superseded(self) -> None:
        self.storage.open()
        self.append(make_entries(1, 9))
        write_snapshot(self.storage, 0, make_meta(5))
        self.storage.compact(0, 5)
        self.append(make_entries(6, 7, term=2))
        assert make_entries(6, 7, term=2) == self.restart()[0].entries

    # -- snapshots that replace the log -------------------------------------------------------------------

    def test_the_log_restarts_after_a_restored_snapshot(self) -> None:
        self.storage.open()
        self.write(Persist(0, HardState(1, "a"), make_entries(1, 3)))
        write_snapshot(self.storage, 0, make_meta(100, 4))
        self.write(Persist(0, HardState(4, ""), make_entries(101, 102, 4), make_meta(100, 4)))
        assert (HardState(4, ""), make_meta(100, 4), make_entries(101, 102, 4)) == self.restart()[0][:3]
        self.append(make_entries(103, 103, 5))
        assert make_entries(101, 102, 4) + make_entries(103, 103, 5) == self.restart()[0].entries

    def test_restoring_a_snapshot_that_is_not_durable_is_refused(self) -> None:
        self.storage.open()
        with pytest.raises(InvariantViolation):
            self.write(Persist(0, None, [], make_meta(100, 4)))

    def test_a_snapshot_of_a_group_without_a_log_starts_it(self) -> None:
        self.storage.open()
        write_snapshot(self.storage, 3, make_meta(50, 2))
        self.write(Persist(3, None, make_entries(51, 51, 2), make_meta(50, 2)))
        assert (HardState(0, ""), make_meta(50, 2), make_entries(51, 51, 2)) == self.restart()[3][:3]

    @pytest.mark.parametrize("last", [0, 5, 10, 15])
    def test_a_durable_snapshot_counts_even_if_the_log_was_not_told(self, last: int) -> None:
        """A crash came between `finish` and the `write` with `restored`; our log does not lead there."""
        self.storage.open()
        if last:
            self.append(make_entries(1, last))
        write_snapshot(self.storage, 0, make_meta(10, 3))
        assert (make_meta(10, 3), []) == self.restart()[0][1:3]
        self.append(make_entries(11, 12, 3))
        assert (make_meta(10, 3), make_entries(11, 12, 3)) == self.restart()[0][1:3]

    @pytest.mark.parametrize("index", [1, 4, 5, 9])
    def test_the_end_of_a_log_that_a_snapshot_cuts_back_is_told(self, index: int) -> None:
        """Until the log restarts there: the disk had it, and may have promised it."""
        self.storage.open()
        self.append([*make_entries(1, 2), *make_entries(3, 4, 5)])
        write_snapshot(self.storage, 0, make_meta(index, 3))
        for _ in range(2):
            group = self.restart()[0]
            assert (group.entries, group.cut_from) == ([], (5, 4))
        self.write(Persist(0, None, make_entries(index + 1, index + 1, 6), make_meta(index, 3)))
        assert self.restart()[0].cut_from == (0, 0)

    def test_a_log_that_a_snapshot_takes_further_is_not_cut_back(self) -> None:
        self.storage.open()
        self.append(make_entries(1, 4))
        write_snapshot(self.storage, 0, make_meta(9, 3))
        assert self.restart()[0].cut_from == (0, 0)

    def test_what_follows_a_snapshot_that_the_log_leads_to_is_kept(self) -> None:
        """Raft §7: our entry at the snapshot's index has its term, so what follows was acknowledged."""
        self.storage.open()
        self.append(make_entries(1, 12, 3))
        write_snapshot(self.storage, 0, make_meta(10, 3))
        assert make_entries(11, 12, 3) == self.restart()[0].entries

    def test_stats_are_numbers_by_name(self) -> None:
        self.storage.open()
        self.append(make_entries(1, 5))
        stats = self.storage.stats
        assert all(isinstance(name, str) and isinstance(value, int) for name, value in stats.items())
        assert stats["entries"] == 5
