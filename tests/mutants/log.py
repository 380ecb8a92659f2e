"""Defects of the log on the disk: what is synced, what a restart finds, what is thrown away."""

from __future__ import annotations

from tests.mutants.patching import Mutant, replace

__all__ = ["MUTANTS"]

_SEGMENTS = "coordlib.storage.segments:SegmentStorage."
_RECOVERY = "coordlib.storage.recovery:"
_SYNC = "            file.datasync()\n"

MUTANTS = (
    Mutant(
        "log-is-never-synced",
        "NATS 2025, etcd #14143: acknowledged before fsync",
        (replace(_SEGMENTS + "_append", _SYNC, "            _mutant_hit()\n"),),
    ),
    Mutant(
        "small-batches-are-not-synced",
        "lazy fsync: a batch is thought too small to be worth one (NATS, tikv #994)",
        (
            replace(
                _SEGMENTS + "_append",
                _SYNC,
                "            if len(data) >= 400 or not _mutant_hit():\n                file.datasync()\n",
            ),
        ),
    ),
    Mutant(
        "votes-are-not-synced",
        "Raft §5: entries are synced, the vote beside them only when entries come with it",
        (
            replace(
                _SEGMENTS + "_append",
                _SYNC,
                "            if len(parts) > 3 or not _mutant_hit():\n                file.datasync()\n",
            ),
        ),
    ),
    Mutant(
        "synced-before-it-is-written",
        "the fsync is in the wrong place, and makes the batch before durable",
        (
            replace(
                _SEGMENTS + "_append",
                "            file.pwrite(data, position)\n            file.datasync()\n",
                "            file.datasync()\n            file.pwrite(_mutant_hit(data), position)\n",
            ),
        ),
    ),
    Mutant(
        "failed-sync-is-tried-again",
        "fsyncgate (ATC'20), cockroach #37102: the second fsync succeeds, and the data is gone",
        (
            replace(
                _SEGMENTS + "_append",
                _SYNC,
                "            try:\n                file.datasync()\n            except OSError:\n"
                "                _mutant_hit()\n                file.datasync()\n",
            ),
        ),
    ),
    Mutant(
        "new-segment-is-not-in-its-directory",
        "a created file without fsync of the directory (ALICE, OSDI'14; LevelDB)",
        (
            replace(
                _SEGMENTS + "_create_segment_file",
                "            self._fs.sync_directory(self._directory)\n",
                "            _mutant_hit()\n",
            ),
        ),
    ),
    Mutant(
        "renamed-snapshot-is-not-in-its-directory",
        "a rename without fsync of the directory; the older snapshot is removed after it",
        (
            replace(
                _SEGMENTS + "_publish_snapshot",
                "            fs.sync_directory(directory)\n",
                "            _mutant_hit()\n",
            ),
        ),
    ),
    Mutant(
        "identity-is-not-in-its-directory",
        "a rename without fsync of the directory: after a power cut the member is nobody's",
        (
            replace(
                "coordlib.storage.identity:write_identity",
                "    fs.sync_directory(directory)\n",
                "    _mutant_hit()\n",
            ),
        ),
        tests=("tests/storage",),
    ),
    Mutant(
        "torn-tail-is-cut-one-batch-too-early",
        "PAR (FAST'18): the repair of an unacknowledged write takes an acknowledged one with it",
        (
            replace(
                _RECOVERY + "replay",
                "        if scan.damage:\n",
                "        if scan.damage and len(scan.batches) > 1 and is_last:\n"
                "            scan = scan._replace(batches=_mutant_hit(scan.batches[:-1]), end=scan.batches[-1].offset)\n"
                "        if scan.damage:\n",
            ),
        ),
    ),
    Mutant(
        "damage-in-the-middle-is-cut-in-silence",
        "PAR (FAST'18), NATS 2025: a bad record with good ones after it is taken for a torn tail",
        (
            replace(
                _RECOVERY + "replay",
                "if scan.is_proven or not is_last:",
                "if (scan.is_proven and not _mutant_hit()) or not is_last:",
            ),
        ),
        tests=("tests/storage/test_corruption.py",),
    ),
    Mutant(
        "checksum-of-a-batch-is-not-checked",
        "FAST'17: half of a write is read as a whole one",
        (
            replace(
                "coordlib.storage.records:scan_segment",
                "if end > size or crc32(view[body:end], previous) != checksum:",
                "if end > size or (crc32(view[body:end], previous) != checksum and not _mutant_hit()):",
            ),
        ),
    ),
    Mutant(
        "chain-of-checksums-is-not-checked",
        "stale bytes of an earlier batch are taken for the next (recycled files; etcd #6191)",
        (
            replace(
                "coordlib.storage.records:scan_segment",
                "if found_previous != previous or (sequence is not None and found != sequence):",
                "if found_previous != previous:\n                previous = _mutant_hit(found_previous)\n"
                "            if sequence is not None and found != sequence:",
            ),
        ),
        tests=("tests/storage/test_corruption.py",),
        unseen="segments are not recycled and one batch is under way at a time, so that no crash leaves stale ones",
    ),
    Mutant(
        "checkpoint-forgets-the-vote",
        "RedisRaft: what is thrown away with the log's beginning held the only record of the vote",
        (
            replace(
                _SEGMENTS + "_encode_checkpoint",
                "LAST_TERM.pack(last_term) + hard_state.vote.encode()",
                "LAST_TERM.pack(last_term) + _mutant_hit(b'')",
            ),
            replace(
                _RECOVERY + "_apply",
                "(log.hard_state, log.last_index) != (state, index)",
                "(log.hard_state.term, log.last_index) != (state.term, index)",
            ),
        ),
        tests=("tests/storage",),
    ),
    Mutant(
        "segments-are-removed-before-a-snapshot-covers-them",
        "RedisRaft #43: the log is compacted past the snapshot",
        (
            replace(
                _SEGMENTS + "_remove_segments",
                "index > groups[group].compacted",
                "index > _mutant_hit(groups[group].last_index)",
            ),
        ),
    ),
    Mutant(
        "log-is-not-told-of-the-snapshot-it-begins-after",
        "RedisRaft #43: a crash between a received snapshot and the log's restart leaves a gap",
        (
            replace(
                _SEGMENTS + "_recover_group",
                "            self._unlinked[group] = snapshot\n            if (",
                "            _mutant_hit()\n            if (",
            ),
        ),
        tests=("tests/storage/test_contract.py",),
    ),
    Mutant(
        "restart-brings-truncated-entries-back",
        "cockroach #63302: what a new leader replaced is there again behind its entries",
        (
            replace(
                _RECOVERY + "GroupLog.append",
                "            del self.entries[position:]\n            self.entries.append(entry)\n",
                "            self.entries[position] = _mutant_hit(entry)\n",
            ),
        ),
        tests=("tests/storage",),
    ),
    Mutant(
        "full-disk-is-not-an-error",
        "tikv #6224: half a record, and the log goes on after it",
        (
            replace(
                _SEGMENTS + "_append",
                "            file.pwrite(data, position)\n",
                "            try:\n                file.pwrite(data, position)\n            except OSError as exc:\n"
                "                if exc.errno not in _FULL_ERRNOS or not _mutant_hit():\n                    raise\n",
            ),
        ),
    ),
)
