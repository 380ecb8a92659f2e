"""Defects of snapshots and compaction: what they lack, when they count, what they replace."""

from __future__ import annotations

from tests.mutants.patching import Mutant, replace

__all__ = ["MUTANTS"]

_KERNEL = "coordlib.node.kernel:MemberKernel."
_RESTORE = "coordlib.machine:_Restore.load"

MUTANTS = (
    Mutant(
        "snapshot-lacks-the-replies",
        "Thesis §6.3: without its table of replies, a restored member executes retries again",
        (
            replace(
                "coordlib.machine.sessions:_freeze",
                "[item for pair in sorted(session.replies.items()) for item in pair]",
                "_mutant_hit([])",
            ),
        ),
        tests=("tests/machine",),
    ),
    Mutant(
        "snapshot-lacks-the-queue-of-a-lock",
        "RedisRaft: state beside the keys is not in the snapshot; those who wait are forgotten",
        (
            replace(
                "coordlib.machine.locks:_freeze",
                "[number for waiter in lock.waiters or () for number in waiter]",
                "_mutant_hit([])",
            ),
        ),
    ),
    Mutant(
        "snapshot-lacks-the-token-counter",
        "fencing tokens begin anew after a restore (DDIA ch. 8: they must rise for ever)",
        (replace(_RESTORE, "self.parts.locks.counter = counter", "_mutant_hit()"),),
    ),
    Mutant(
        "snapshot-lacks-the-sessions",
        "Thesis §6.3; RedisRaft: everybody's session has ended after a restore, on one member",
        (
            replace(
                _RESTORE,
                "                parts.sessions.load(record)\n",
                "                _mutant_hit()\n",
            ),
        ),
    ),
    Mutant(
        "snapshot-lacks-the-remaining-time-of-sessions",
        "leases restored with their full time, forgetting what was spent (etcd #9888)",
        (
            replace(
                "coordlib.machine.sessions:Sessions.load",
                "session.remaining_ms = remaining_ms",
                "_mutant_hit()",
            ),
        ),
    ),
    Mutant(
        "snapshot-forgets-the-marks-of-sessions",
        "a request below the mark, answered long ago, is executed again after a restore",
        (replace("coordlib.machine.sessions:Sessions.load", "session.mark = mark", "_mutant_hit()"),),
    ),
    Mutant(
        "older-snapshot-replaces-newer-state",
        "etcd #18055; Raft §7: a snapshot below the commit index is to be ignored",
        (
            replace(
                "coordlib.node.transfer:SnapshotReceiver.receive",
                "if chunk.meta.index <= self._raft.commit_index:",
                "if chunk.meta.index <= self._raft.commit_index and not _mutant_hit():",
            ),
            replace(
                "coordlib.raft.replication:Replication._handle_install_snapshot",
                "if meta.index <= self.commit_index:",
                "if False:",
            ),
            replace(
                "coordlib.raft.replication:Replication._handle_install_snapshot",
                "elif log.term_at(meta.index) == meta.term:",
                "elif meta.index > self.commit_index and log.term_at(meta.index) == meta.term:",
            ),
        ),
        tests=("tests/raft/test_paper.py",),
    ),
    Mutant(
        "snapshot-throws-away-the-entries-after-it",
        "Raft §7: a suffix that goes on from the snapshot had been acknowledged and is to be kept",
        (
            replace(
                "coordlib.raft.replication:Replication._handle_install_snapshot",
                "elif log.term_at(meta.index) == meta.term:",
                "elif log.term_at(meta.index) == meta.term and not _mutant_hit():",
            ),
        ),
        tests=("tests/raft/test_paper.py",),
    ),
    Mutant(
        "snapshot-claims-less-than-it-holds",
        "etcd 3.5 #13766: the index stored with the state is not that of the state, and entries are applied again",
        (
            replace(
                "coordlib.node.transfer:SnapshotTaker.step",
                "            log = self._raft.log\n",
                "            log = self._raft.log\n            if applied > log.start_index + 1:\n"
                "                applied -= _mutant_hit(1)\n",
            ),
        ),
    ),
    Mutant(
        "snapshot-is-of-no-one-moment",
        "what changes while a snapshot is written gets into it (fuzzy snapshots without redo)",
        (
            replace(
                "coordlib.machine.table:BytesTable.put",
                "        if self.views:\n",
                "        if self.views and not _mutant_hit():\n",
            ),
        ),
        tests=("tests/machine",),
    ),
    Mutant(
        "snapshot-is-not-synced",
        "a segment is deleted before the snapshot that stands for it is durable (RedisRaft #654)",
        (
            replace(
                "coordlib.storage.snapshots:SnapshotFileWriter.finish",
                "            file.datasync()\n",
                "            _mutant_hit()\n",
            ),
        ),
    ),
    Mutant(
        "entries-are-applied-on-top-of-a-snapshot-that-has-them",
        "etcd 3.5 #13766, RedisRaft #449: what waited to be applied goes on after the restore",
        (
            replace(
                _KERNEL + "_install",
                "        self._to_apply.clear()\n",
                "        self._to_apply and _mutant_hit()\n",
            ),
        ),
    ),
    Mutant(
        "log-that-contradicts-the-snapshot-is-kept",
        "openraft #753: a snapshot is adopted, and entries that conflict with it stay behind it",
        (
            replace(
                "coordlib.storage.recovery:GroupLog.adopt",
                "if known != term and known != -1:",
                "if known is None and not _mutant_hit():",
            ),
        ),
        tests=("tests/storage",),
    ),
)
