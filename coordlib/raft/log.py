"""The log in memory: the entries after `start_index`, which are durable, which configuration is in force.

What must not live here: who leads, what is committed. The caller says what to append and what to
truncate; this file says which durable acknowledgement still means what it meant when it was asked for.

::

    0 ......... start_index | entries ... stable_index ... handed_index ... last_index
                compacted     durable       on the way to the disk            not yet handed over
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from coordlib.errors import invariant
from coordlib.raft.messages import Configuration, Entry, EntryKind, SnapshotMeta

__all__ = ["ENTRY_OVERHEAD_BYTES", "ConfigurationDecoder", "RaftLog"]

ConfigurationDecoder = Callable[[bytes], Configuration]

ENTRY_OVERHEAD_BYTES = 24
"""Charged for each entry beside its data: about what term, index, kind and framing take on the wire."""

_CONFIGURATION = int(EntryKind.CONFIGURATION)


def _entry_term(entry: Entry) -> int:
    return entry.term


class RaftLog:
    """
    The entries after the last compaction, and the newest snapshot of the machine.

    `start_index` may be below `snapshot.index`: entries are kept for followers that are a little behind.
    """

    __slots__ = (
        "_configurations",
        "_decode_configuration",
        "_entries",
        "epoch",
        "handed_index",
        "last_index",
        "last_term",
        "snapshot",
        "stable_index",
        "start_index",
        "start_term",
    )

    def __init__(
        self,
        snapshot: SnapshotMeta,
        entries: Sequence[Entry],
        decode_configuration: ConfigurationDecoder | None = None,
    ) -> None:
        """
        Take over what storage recovered; all of it is durable.

        Args:
            snapshot: The newest durable one; index 0 and term 0 with the first configuration if none.
            entries: Consecutive. They may begin before the snapshot (kept for followers) and must not
                begin later than right after it. If they contradict the snapshot or end before it, a crash
                came between the snapshot and the log that restarts after it, and they are dropped. Storage
                must drop them too, or the next entries would follow a gap.

        Raises:
            InvariantViolation: There is a gap between the snapshot and the entries, or within these.
        """
        self._decode_configuration = decode_configuration
        self.snapshot = snapshot
        self.start_index, self.start_term = snapshot.index, snapshot.term
        kept: list[Entry] = []
        if entries:
            first = entries[0].index
            invariant(
                first <= snapshot.index + 1, "log begins at %d, snapshot is at %d", first, snapshot.index
            )
            offset = snapshot.index - first
            if offset < 0:
                kept = list(entries)
            elif offset < len(entries) and entries[offset].term == snapshot.term:
                # The term before the first entry is not known, so that entry becomes the starting point.
                self.start_index, self.start_term = first, entries[0].term
                kept = list(entries[1:])
        index, term = self.start_index, self.start_term
        for entry in kept:
            invariant(entry.index == index + 1, "log has entry %d after %d", entry.index, index)
            invariant(entry.term >= term, "term falls from %d to %d at %d", term, entry.term, entry.index)
            index, term = entry.index, entry.term
        self._entries = kept
        self.last_index = self.handed_index = self.stable_index = index
        self.last_term = term
        # Invariant: ascending by index; the first is in force at `start_index` or from the snapshot on.
        self._configurations: list[tuple[int, Configuration]] = [(snapshot.index, snapshot.configuration)]
        for entry in kept:
            if entry.kind == _CONFIGURATION and entry.index > snapshot.index:
                self._configurations.append((entry.index, self.decode_configuration(entry.data)))
        # Counts the times that something already handed to the disk was superseded. See `stable_to`.
        self.epoch = 0

    # -- looking

    @property
    def configuration(self) -> Configuration:
        """The newest in the log, committed or not (Thesis §4.1)."""
        return self._configurations[-1][1]

    @property
    def configuration_index(self) -> int:
        return self._configurations[-1][0]

    @property
    def previous_configuration(self) -> Configuration:
        """The one before the newest, or the newest if the log knows no other."""
        return self._configurations[max(0, len(self._configurations) - 2)][1]

    def configuration_at(self, index: int) -> Configuration:
        """The one in force at `index`, which is not below the snapshot's."""
        found = self._configurations[0][1]
        for position, configuration in self._configurations:
            if position > index:
                break
            found = configuration
        return found

    def decode_configuration(self, data: bytes) -> Configuration:
        invariant(self._decode_configuration is not None, "a configuration entry, and nothing to decode it")
        assert self._decode_configuration is not None
        return self._decode_configuration(data)

    @property
    def can_decode_configuration(self) -> bool:
        return self._decode_configuration is not None

    def term_at(self, index: int) -> int:
        """The term of the entry at `index`; -1, which no entry has, when it is compacted or not there yet."""
        if index == self.last_index:
            return self.last_term
        offset = index - self.start_index - 1
        if offset < 0:
            return self.start_term if offset == -1 else -1
        if index > self.last_index:
            return -1
        return self._entries[offset].term

    def slice(self, after: int, to: int) -> list[Entry]:
        """Entries with after < index <= to; none of them compacted."""
        start = self.start_index
        return self._entries[after - start : to - start]

    def slice_bounded(self, after: int, count_max: int, size_bytes_max: int) -> tuple[tuple[Entry, ...], int]:
        """Entries after `after` within the bounds, but always one if there is one; and their size."""
        offset = after - self.start_index
        entries = self._entries[offset : offset + count_max]
        size = 0
        for position, entry in enumerate(entries):
            size_next = size + len(entry[3]) + ENTRY_OVERHEAD_BYTES
            if size_next > size_bytes_max and position:
                return tuple(entries[:position]), size
            size = size_next
        return tuple(entries), size

    def size_bytes(self, after: int, to: int) -> int:
        """What these entries are charged."""
        entries = self.slice(after, to)
        return sum([len(entry[3]) for entry in entries]) + ENTRY_OVERHEAD_BYTES * len(entries)

    def last_with_term_at_most(self, index: int, term: int) -> int:
        """
        The last position not above `index` whose term is not above `term`; `start_index` at the least.

        Terms never fall along a log, so this is where a log that has `term` at `index` may still agree.
        """
        index = min(index, self.last_index)
        if index <= self.start_index:
            return index
        count = bisect_right(self._entries, term, hi=index - self.start_index, key=_entry_term)
        return self.start_index + count

    # -- changing

    def append_own(self, entry: Entry) -> None:
        """Append one entry of the leader itself."""
        self._entries.append(entry)
        self.last_index = entry.index
        self.last_term = entry.term
        if entry.kind == _CONFIGURATION:
            self._configurations.append((entry.index, self.decode_configuration(entry.data)))

    def append(self, entries: Sequence[Entry], configurations: Sequence[tuple[int, Configuration]]) -> None:
        """Append entries that follow on the last one, with the configurations that are among them."""
        self._entries.extend(entries)
        last = entries[-1]
        self.last_index = last.index
        self.last_term = last.term
        self._configurations.extend(configurations)

    def truncate(self, index: int) -> None:
        """Drop the entries from `index` on, with their configurations. The caller has checked the commit."""
        del self._entries[index - self.start_index - 1 :]
        self.last_index = index - 1
        self.last_term = self._entries[-1].term if self._entries else self.start_term
        while self._configurations[-1][0] >= index:
            self._configurations.pop()
        if index <= self.handed_index:
            self.epoch += 1
            self.handed_index = index - 1
            self.stable_index = min(self.stable_index, index - 1)

    def take_unhanded(self) -> list[Entry]:
        """The entries that the disk was not yet asked to keep; from now on it was."""
        entries = self._entries[self.handed_index - self.start_index :]
        self.handed_index = self.last_index
        return entries

    def stable_to(self, index: int, term: int, epoch: int) -> None:
        """
        Note that everything handed over up to this entry is durable.

        An acknowledgement from before a truncation is ignored, even if the log has (term, index) again: on
        the disk, what was truncated may still come in between (the ABA race). What was written after the
        truncation will be acknowledged, and covers all that is before it.
        """
        if epoch == self.epoch and index > self.stable_index:
            invariant(self.term_at(index) == term, "durable entry %d has another term than %d", index, term)
            self.stable_index = index

    def compact(self, meta: SnapshotMeta, start_index: int) -> None:
        """Note a newer snapshot of the machine; drop the log up to `start_index`, as far as it is durable."""
        start_index = min(start_index, meta.index, self.stable_index)
        self.snapshot = meta
        if start_index > self.start_index:
            start_term = self.term_at(start_index)
            del self._entries[: start_index - self.start_index]
            self.start_index, self.start_term = start_index, start_term
        later = [item for item in self._configurations if item[0] > meta.index]
        self._configurations = [(meta.index, meta.configuration), *later]

    def restore(self, meta: SnapshotMeta) -> None:
        """Forget all entries: the log goes on after a snapshot that a leader sent. Its file is durable."""
        self._entries = []
        self.snapshot = meta
        self.start_index = self.last_index = self.handed_index = self.stable_index = meta.index
        self.start_term = self.last_term = meta.term
        self._configurations = [(meta.index, meta.configuration)]
        self.epoch += 1

    def check_invariants(self) -> None:
        invariant(self.last_index == self.start_index + len(self._entries), "last index is off")
        invariant(
            self.last_term == (self._entries[-1].term if self._entries else self.start_term), "last term"
        )
        invariant(self.start_index <= self.snapshot.index, "compacted past the snapshot")
        invariant(self.start_index <= self.stable_index, "compacted what is not durable")
        invariant(self.stable_index <= self.handed_index <= self.last_index, "durable past the log")
        invariant(
            self.configuration_index <= max(self.last_index, self.snapshot.index), "phantom configuration"
        )
        tail = self._entries[-16:]
        term, index = -1, self.last_index - len(tail)
        for entry in tail:
            invariant(entry.index == index + 1 and entry.term >= term, "log is not a log at %d", entry.index)
            index, term = entry.index, entry.term
