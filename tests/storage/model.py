"""What a storage must remember, in a few lines: the reference that crashes are judged by.

A call that returned has happened. A call that was cut off has happened as a whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from random import Random

from coordlib.errors import StartError, StorageFailed
from coordlib.raft.messages import Entry, HardState, SnapshotMeta
from coordlib.storage import LogStorage, Persist, Recovered, RecoveredGroup, SegmentStorage
from coordlib.storage.files import FileSystem
from coordlib.testing.disk import CrashNow, SimulatedFileSystem
from coordlib.testing.suites.storage import make_entries, make_meta

DIRECTORY = "/data"


def make_storage(fs: FileSystem, **options: int) -> SegmentStorage:
    options = {"segment_size_bytes": 5200, "fill_size_bytes": 300, **options}
    return SegmentStorage(
        fs, DIRECTORY, node_id="a", cluster_name="shop", new_disk_id=b"0123456789abcdef", **options
    )


class ModelGroup:
    def __init__(self) -> None:
        self.hard_state = HardState(0, "")
        self.snapshot: SnapshotMeta | None = None
        self.floor = 0
        self.floor_term = 0
        self.entries: list[Entry] = []

    @property
    def last_index(self) -> int:
        return self.floor + len(self.entries)

    @property
    def base(self) -> int:
        return 0 if self.snapshot is None else self.snapshot.index

    def term_at(self, index: int) -> int:
        return self.floor_term if index == self.floor else self.entries[index - self.floor - 1].term

    def recovered(self) -> RecoveredGroup:
        snapshot = self.snapshot
        entries = self.entries
        if snapshot is not None:
            if snapshot.index > self.last_index or self.term_at(snapshot.index) != snapshot.term:
                entries = []
            else:
                entries = entries[snapshot.index - self.floor :]
        return RecoveredGroup(self.hard_state, snapshot, list(entries))


class Model:
    """State as of the last call that returned, and as it would be after the call in progress."""

    def __init__(self) -> None:
        self.groups: dict[int, ModelGroup] = {}
        self.cluster_uuid = b""
        self.next: Model | None = None

    def recovered(self) -> tuple[bytes, dict[int, RecoveredGroup]]:
        nothing = RecoveredGroup(HardState(0, ""), None, [])
        groups = {number: group.recovered() for number, group in self.groups.items()}
        return self.cluster_uuid, {number: group for number, group in groups.items() if group != nothing}

    def group(self, number: int) -> ModelGroup:
        return self.groups.setdefault(number, ModelGroup())

    def write(self, batch: list[Persist]) -> None:
        for number, hard_state, entries, restored in batch:
            group = self.group(number)
            if restored is not None:
                group.floor, group.floor_term, group.entries = restored.index, restored.term, []
            if hard_state is not None:
                group.hard_state = hard_state
            for entry in entries:
                del group.entries[entry.index - group.floor - 1 :]
                group.entries.append(entry)

    def finish_snapshot(self, number: int, meta: SnapshotMeta) -> None:
        group = self.group(number)
        if meta.index > group.base:
            group.snapshot = meta

    def attempt(self, change: Callable[[Model], None], action: Callable[[], None]) -> None:
        """Do `action`; only if it returns, `change` has certainly happened."""
        following = deepcopy(self)
        change(following)
        self.next = following
        action()
        change(self)
        self.next = None

    def check(self, recovered: Recovered) -> None:
        """The recovered state must be one of the two possible ones; go on from there."""
        nothing = RecoveredGroup(HardState(0, ""), None, [])
        # `cut_from` tells of what is not there any more, which the model does not keep.
        known = {number: group._replace(cut_from=(0, 0)) for number, group in recovered.groups.items()}
        groups = {number: group for number, group in known.items() if group != nothing}
        found = (recovered.identity.cluster_uuid, groups)
        candidates = [self.recovered()]
        if self.next is not None:
            candidates.append(self.next.recovered())
        assert found in candidates, f"{found}\nis none of\n{candidates}"
        self.next = None
        self.cluster_uuid = recovered.identity.cluster_uuid
        self.groups = {}
        for number, (hard_state, snapshot, entries, _) in recovered.groups.items():
            group = self.groups[number] = ModelGroup()
            group.hard_state, group.snapshot, group.entries = hard_state, snapshot, list(entries)
            if snapshot is not None:
                group.floor, group.floor_term = snapshot.index, snapshot.term


class Driver:
    """Does what a node would do with its storage, drawn from a seed, and keeps the model beside it."""

    def __init__(self, fs: SimulatedFileSystem, rng: Random, **options: int) -> None:
        self.fs = fs
        self.rng = rng
        self.options = options
        self.model = Model()
        self.storage: LogStorage = make_storage(fs, **options)
        self.term = 1

    def open(self) -> Recovered:
        """Open what is there and compare. May raise CrashNow, if one is due."""
        self.storage = make_storage(self.fs, **self.options)
        recovered = self.storage.open()
        self.identity = recovered.identity
        self.model.check(recovered)
        return recovered

    def open_after_crash(self) -> None:
        """Open what is there, with more crashes in the midst of it."""
        rng = self.rng
        while True:
            self.fs.crash_at = self.fs.effects + rng.randrange(12) if rng.random() < 0.3 else None
            try:
                self.open()
                if rng.random() < 0.5:
                    for number, group in self.model.groups.items():
                        if group.snapshot is not None:
                            self.storage.compact(number, group.base)
                self.fs.crash_at = None
                return
            except CrashNow:
                self.fs.crash(rng)

    def write(self, batch: list[Persist]) -> None:
        self.model.attempt(lambda model: model.write(batch), lambda: self.storage.write(batch))

    def persist(self, number: int) -> Persist:
        rng = self.rng
        group = self.model.group(number)
        base = max(group.base, group.floor)
        hard_state = None
        entries: list[Entry] = []
        if rng.random() < 0.3:
            self.term += 1
            hard_state = HardState(self.term, rng.choice(["", "a", "b"]))
        if hard_state is None or rng.random() < 0.7:
            last = max(group.last_index, base)
            if rng.random() < 0.25 and last > base:
                self.term += 1
                first = rng.randrange(base + 1, last + 1)
            else:
                first = last + 1
            entries = make_entries(first, first + rng.randrange(4), self.term, rng.choice([0, 10, 100, 700]))
        return Persist(number, hard_state, entries)

    def step(self) -> None:
        rng = self.rng
        draw = rng.random()
        number = rng.randrange(2)
        group = self.model.group(number)
        if draw < 0.6:
            self.write([self.persist(number) for number in rng.choice([[0], [1], [0, 1], [1, 0]])])
        elif draw < 0.75:
            if group.last_index > group.base:
                index = rng.randrange(group.base + 1, group.last_index + 1)
                self.snapshot(number, make_meta(index, group.term_at(index)))
                self.storage.compact(number, rng.randrange(index + 1))
        elif draw < 0.85:
            self.receive_snapshot(number, group)
        elif draw < 0.9:
            uuid = b"%016d" % rng.randrange(100)
            identity = self.identity._replace(cluster_uuid=uuid)
            self.model.attempt(
                lambda model: setattr(model, "cluster_uuid", uuid),
                lambda: self.storage.set_identity(identity),
            )
        elif draw < 0.95:
            self.storage.close()
            assert self.open().notes == []
        else:
            writer = self.storage.create_snapshot(number, make_meta(10**6))
            writer.write(bytes(1000))
            writer.abort()

    def snapshot(self, number: int, meta: SnapshotMeta) -> None:
        writer = self.storage.create_snapshot(number, meta)
        writer.write(self.payload(meta))
        self.model.attempt(lambda model: model.finish_snapshot(number, meta), writer.finish)

    @staticmethod
    def payload(meta: SnapshotMeta) -> bytes:
        return b"%d.%d" % (meta.index, meta.term) * (meta.index % 7)

    def receive_snapshot(self, number: int, group: ModelGroup) -> None:
        rng = self.rng
        self.term += 1
        meta = make_meta(max(group.base, group.last_index - 3) + 1 + rng.randrange(5), self.term)
        self.snapshot(number, meta)
        entries = make_entries(meta.index + 1, meta.index + rng.randrange(3), self.term)
        hard_state = HardState(self.term, "") if rng.random() < 0.5 else None
        self.write([Persist(number, hard_state, entries, meta)])

    def check_snapshots(self) -> None:
        for number, group in self.model.groups.items():
            reader = self.storage.open_snapshot(number)
            assert (None if reader is None else reader.meta) == group.snapshot
            if reader is not None:
                assert reader.read(0, reader.size) == self.payload(reader.meta)
                reader.close()

    def run_until_crash(self, steps: int) -> bool:
        """Do that many steps; True if a crash or a failure of the disk ended them."""
        try:
            for _ in range(steps):
                self.step()
        except CrashNow:
            return True
        except (StorageFailed, StartError):
            assert self.fs.condemned(DIRECTORY)
            self.fs.heal()
            self.storage.close()
            return True
        return False
