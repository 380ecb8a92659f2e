"""A file system in memory that loses, tears and reorders whatever was not synced.

`SimulatedFileSystem` is what the storage runs on under test: the very same segment, snapshot and recovery
code, on a disk that does the worst that POSIX allows. It is stricter than real file systems: every
un-synced write, truncate, create, rename and unlink has its own fate at a crash, whatever its order.

Nothing is random here. `crash` draws from the generator that it is given, and faults happen where they
were put, so that a run is repeated by its seed.

::

    write / truncate  --datasync-->  durable content        (one list of pending changes a file)
    create / rename / unlink  --sync_directory-->  durable names   (one list a directory)
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, Protocol

from coordlib.storage.files import Buffer, DirectoryLocked

__all__ = ["CrashNow", "PendingChange", "RandomSource", "SimulatedFile", "SimulatedFileSystem"]

_SECTOR_SIZES = (512, 4096)


class CrashNow(BaseException):
    """The effect before which the machine was to stop. Not an Exception, so that nobody handles it."""


class RandomSource(Protocol):
    """What `crash` needs of a `random.Random`."""

    def random(self) -> float: ...

    def randrange(self, stop: int, /) -> int: ...


class PendingChange(NamedTuple):
    """An un-synced change of content: a write, or a truncation (`data` is None, `offset` the size)."""

    offset: int
    data: bytes | None


class _Inode:
    __slots__ = ("buffered", "durable", "pending")

    def __init__(self) -> None:
        self.buffered = bytearray()  # what a reader sees
        self.durable = bytearray()  # what is there after a crash
        self.pending: list[PendingChange] = []


class _NameChange(NamedTuple):
    removed: str  # "" = none
    added: str  # "" = none
    inode: _Inode


class _Fault(NamedTuple):
    error: int
    path: str
    skip: int
    is_sticky: bool


def _apply(content: bytearray, change: PendingChange) -> None:
    offset, data = change
    if data is None:
        if offset < len(content):
            del content[offset:]
        else:
            content.extend(bytes(offset - len(content)))
        return
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


class SimulatedFile:
    """A `File`. Handles of before a crash or kill are dead: every use is EBADF."""

    __slots__ = ("_fs", "_generation", "_inode", "_path")

    def __init__(self, fs: SimulatedFileSystem, path: str, inode: _Inode) -> None:
        self._fs = fs
        self._path = path
        self._inode = inode
        self._generation = fs.generation
        fs.open_files += 1

    def _enter(self, operation: str) -> _Inode:
        fs = self._fs
        if self._generation != fs.generation:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self._path)
        fs._effect(operation, self._path)
        return self._inode

    def pread(self, size: int, offset: int) -> bytes:
        return bytes(self._enter("pread").buffered[offset : offset + size])

    def pwrite(self, data: Buffer, offset: int) -> None:
        fs = self._fs
        try:
            inode = self._enter("pwrite")
        except OSError as exc:
            if exc.errno == errno.EBADF:
                raise
            # A write that fails has done part of its work.
            self._put(self._inode, bytes(data[: len(data) // 2]), offset)
            raise
        content = bytes(data)
        if fs.capacity is not None:
            room = fs.capacity - fs.used() + max(0, len(inode.buffered) - offset)
            if len(content) > room:
                self._put(inode, content[: max(room, 0)], offset)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
        self._put(inode, content, offset)

    @staticmethod
    def _put(inode: _Inode, data: bytes, offset: int) -> None:
        if data:
            change = PendingChange(offset, data)
            _apply(inode.buffered, change)
            inode.pending.append(change)

    def datasync(self) -> None:
        try:
            inode = self._enter("datasync")
        except OSError as exc:
            if exc.errno != errno.EBADF:
                # As Linux does: the pages are marked clean, their content is still shown, and never written.
                self._inode.pending.clear()
            raise
        durable = inode.durable
        for change in inode.pending:
            _apply(durable, change)
        inode.pending.clear()

    def truncate(self, size: int) -> None:
        inode = self._enter("truncate")
        change = PendingChange(size, None)
        _apply(inode.buffered, change)
        inode.pending.append(change)

    def size(self) -> int:
        return len(self._inode.buffered)

    def close(self) -> None:
        if self._generation == self._fs.generation:
            self._generation = -1
            self._fs.open_files -= 1


class _SimulatedLock:
    __slots__ = ("_fs", "_generation", "_path")

    def __init__(self, fs: SimulatedFileSystem, path: str) -> None:
        self._fs = fs
        self._path = path
        self._generation = fs.generation

    def release(self) -> None:
        if self._generation == self._fs.generation:
            self._generation = -1
            self._fs._locks.discard(self._path)

    def after_fork_in_child(self) -> None:
        self._generation = -1


class SimulatedFileSystem:
    """
    A `FileSystem` in memory; paths are plain strings and directories exist once they are made.

    Args:
        capacity: Bytes that all files together may have; None is no limit. May be changed at any time.

    Attributes:
        counts: How often each operation was done.
        effects: How many operations that change something were begun.
        crash_at: The number of the effect before which `CrashNow` is raised; None is never.
        open_files: Handles not closed.
    """

    def __init__(self, *, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.counts: Counter[str] = Counter()
        self.effects = 0
        self.crash_at: int | None = None
        self.open_files = 0
        self.generation = 0
        self._names: dict[str, _Inode] = {}
        self._durable_names: dict[str, _Inode] = {}
        self._pending_names: list[_NameChange] = []
        self._directories: set[str] = {"/", "."}
        self._locks: set[str] = set()
        self._condemned: dict[str, str] = {}
        self._faults: dict[str, _Fault] = {}
        self._before_damage: dict[_Inode, tuple[str, bytes, bytes]] = {}  # (buffered, durable)

    # -- the FileSystem interface --------------------------------------------------------------------

    def _effect(self, operation: str, path: str) -> None:
        self.counts[operation] += 1
        if operation != "pread":
            if self.effects == self.crash_at:
                raise CrashNow(f"before effect {self.effects}: {operation} {path}")
            self.effects += 1
        if self._faults:
            fault = self._faults.get(operation)
            if fault is not None and fault.path in path:
                if fault.skip:
                    self._faults[operation] = fault._replace(skip=fault.skip - 1)
                    return
                if not fault.is_sticky:
                    del self._faults[operation]
                raise OSError(fault.error, os.strerror(fault.error), path)

    def make_directory(self, path: str) -> None:
        if path not in self._directories:
            self._effect("make_directory", path)
            self._directories.add(path)

    def open(self, path: str, *, create: bool = False) -> SimulatedFile:
        inode = self._names.get(path)
        if not create:
            if inode is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return SimulatedFile(self, path, inode)
        self._effect("create", path)
        if inode is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        inode = self._names[path] = _Inode()
        self._pending_names.append(_NameChange("", path, inode))
        return SimulatedFile(self, path, inode)

    def names(self, directory: str) -> list[str]:
        return sorted(path.rpartition("/")[2] for path in self._names if path.rpartition("/")[0] == directory)

    def rename(self, old: str, new: str) -> None:
        self._effect("rename", old)
        inode = self._names.pop(old)
        self._names[new] = inode
        self._pending_names.append(_NameChange(old, new, inode))

    def unlink(self, path: str) -> None:
        self._effect("unlink", path)
        inode = self._names.pop(path, None)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        self._pending_names.append(_NameChange(path, "", inode))

    def sync_directory(self, path: str) -> None:
        self._effect("sync_directory", path)
        rest: list[_NameChange] = []
        for change in self._pending_names:
            if (change.added or change.removed).rpartition("/")[0] == path:
                self._change_names(change)
            else:
                rest.append(change)
        self._pending_names = rest

    def _change_names(self, change: _NameChange) -> None:
        names = self._durable_names
        # A name may meanwhile stand for another file: a lost create or a kept rename lets fates cross.
        if change.removed and names.get(change.removed) is change.inode:
            del names[change.removed]
        if change.added:
            names[change.added] = change.inode

    def lock(self, path: str) -> _SimulatedLock:
        if path in self._locks:
            raise DirectoryLocked("this process has it open already")
        self._effect("lock", path)
        self._locks.add(path)
        return _SimulatedLock(self, path)

    def condemn(self, directory: str, reason: str) -> None:
        self._condemned[directory] = reason

    def condemned(self, directory: str) -> str | None:
        return self._condemned.get(directory)

    # -- faults ------------------------------------------------------------------------------------------

    def fail(
        self,
        operation: str,
        *,
        error: int = errno.EIO,
        path: str = "",
        skip: int = 0,
        is_sticky: bool = False,
    ) -> None:
        """
        Let the next `operation` on a path that contains `path` fail, after `skip` that succeed.

        A failing pwrite writes half of its data; a failing datasync loses what was pending but goes on
        showing it.

        Args:
            operation: pread, pwrite, datasync, truncate, create, rename, unlink, sync_directory, lock
                or make_directory. A later call for the same operation replaces the earlier one.
            is_sticky: All of them fail from then on, until `heal`.
        """
        self._faults[operation] = _Fault(error, path, skip, is_sticky)

    def heal(self) -> None:
        """Forget all faults that are still to come."""
        self._faults.clear()

    def kill(self) -> None:
        """End the process, not the machine: locks and handles go, what was written stays in the cache."""
        self.generation += 1
        self.open_files = 0
        self.crash_at = None
        self._locks.clear()
        self._condemned.clear()
        self._faults.clear()

    def crash(self, rng: RandomSource) -> None:
        """Stop the machine: each un-synced change is kept, lost or torn; kept ones come in any order."""

        def keep_change(change: PendingChange) -> list[PendingChange]:
            draw = rng.random()
            if draw < 0.35:
                return []
            if draw < 0.65 or change.data is None or len(change.data) < 2:
                return [change]
            return _tear(change, rng)

        self.crash_with(
            keep_change,
            lambda: rng.random() < 0.5,
            (lambda changes: _shuffle(changes, rng)) if rng.random() < 0.3 else None,
        )

    def crash_with(
        self,
        keep_change: Callable[[PendingChange], list[PendingChange]],
        keep_name: Callable[[], bool],
        order: Callable[[list[PendingChange]], None] | None = None,
    ) -> None:
        """
        Stop the machine with each change's fate decided by the caller, in a fixed order.

        Args:
            keep_change: What is left of an un-synced change of content; for exhaustive tests.
            keep_name: Whether the next un-synced create, rename or unlink is kept.
            order: Reorders in place what is left of one file's changes.
        """
        self.kill()
        pending_names, self._pending_names = self._pending_names, []
        # Files first reached by a create that may be lost are still needed to decide their content.
        inodes = dict.fromkeys([*self._durable_names.values(), *(change.inode for change in pending_names)])
        for change in pending_names:
            if keep_name():
                self._change_names(change)
        for inode in inodes:
            if inode.pending:
                kept = [part for change in inode.pending for part in keep_change(change)]
                if order is not None:
                    order(kept)
                for part in kept:
                    _apply(inode.durable, part)
                inode.pending.clear()
                inode.buffered = bytearray(inode.durable)
            elif inode.buffered != inode.durable:
                inode.buffered = bytearray(inode.durable)  # a failed sync had lost something
        self._names = dict(self._durable_names)

    def flip_bit(self, path: str, offset: int, bit: int = 0) -> None:
        """Bit rot: both what is durable and what is read."""
        inode = self._names[path]
        inode.buffered[offset] ^= 1 << bit
        if offset < len(inode.durable):
            inode.durable[offset] ^= 1 << bit

    def overwrite(self, path: str, offset: int, data: bytes) -> None:
        """Put bytes on the disk behind everybody's back: a zeroed sector, a misdirected write."""
        inode = self._names[path]
        _apply(inode.buffered, PendingChange(offset, data))
        _apply(inode.durable, PendingChange(offset, data))

    def damage(self, path: str, content: bytes) -> None:
        """Change a file behind everybody's back into `content`, which is on the disk, until `repair`."""
        inode = self._names[path]
        if inode not in self._before_damage:
            self._before_damage[inode] = (path, bytes(inode.buffered), bytes(inode.durable))
        inode.buffered[:] = content
        inode.durable[:] = content
        inode.pending.clear()

    def repair(self) -> None:
        """
        Give damaged files their content of before, as from a mirror; nobody may have written to them since. One that was
        taken for unfinished and removed is put back.
        """
        for inode, (path, buffered, durable) in self._before_damage.items():
            inode.buffered[:] = buffered
            inode.durable[:] = durable
            inode.pending.clear()
            self._pending_names = [change for change in self._pending_names if change.inode is not inode]
            self._names[path] = self._durable_names[path] = inode
        self._before_damage.clear()

    def accept_damage(self) -> None:
        """What is there is from now on what should be there: `repair` does nothing about it."""
        self._before_damage.clear()

    # -- looking at it -----------------------------------------------------------------------------------

    def used(self) -> int:
        """Bytes that all files together have."""
        return sum(len(inode.buffered) for inode in self._names.values())

    def content(self, path: str) -> bytes:
        return bytes(self._names[path].buffered)

    def paths(self) -> list[str]:
        return sorted(self._names)

    def pending(self) -> list[tuple[str, PendingChange]]:
        """Un-synced changes of content; within a file, in the order in which `crash_with` asks."""
        names = self._names
        changed = sorted([path for path, inode in names.items() if inode.pending])
        return [(path, change) for path in changed for change in names[path].pending]

    def clone(self) -> SimulatedFileSystem:
        """Return a copy on which another fate can be tried. Handles, locks and faults are not copied."""
        copies: dict[int, _Inode] = {}

        def copy(inode: _Inode) -> _Inode:
            twin = copies.get(id(inode))
            if twin is None:
                twin = copies[id(inode)] = _Inode()
                twin.buffered = bytearray(inode.buffered)
                twin.durable = bytearray(inode.durable)
                twin.pending = list(inode.pending)
            return twin

        other = SimulatedFileSystem(capacity=self.capacity)
        other._names = {path: copy(inode) for path, inode in self._names.items()}
        other._durable_names = {path: copy(inode) for path, inode in self._durable_names.items()}
        other._pending_names = [change._replace(inode=copy(change.inode)) for change in self._pending_names]
        other._directories = set(self._directories)
        return other

    @classmethod
    def load(cls, files: dict[str, bytes]) -> SimulatedFileSystem:
        """Make a file system whose files are all durable."""
        fs = cls()
        for path, data in files.items():
            inode = _Inode()
            inode.buffered = bytearray(data)
            inode.durable = bytearray(data)
            fs._names[path] = fs._durable_names[path] = inode
            fs._directories.add(path.rpartition("/")[0])
        return fs


def _shuffle(changes: list[PendingChange], rng: RandomSource) -> None:
    for position in range(len(changes) - 1, 0, -1):
        other = rng.randrange(position + 1)
        changes[position], changes[other] = changes[other], changes[position]


def _tear(change: PendingChange, rng: RandomSource) -> list[PendingChange]:
    """Keep a prefix that ends at any byte, or any of the sectors (of either size) that the write touches."""
    offset, data = change
    assert data is not None
    if rng.random() < 0.5:
        return [PendingChange(offset, data[: 1 + rng.randrange(len(data) - 1)])]
    sector = _SECTOR_SIZES[rng.randrange(2)]
    parts: list[PendingChange] = []
    start = 0
    while start < len(data):
        end = min(len(data), ((offset + start) // sector + 1) * sector - offset)
        if rng.random() < 0.5:
            parts.append(PendingChange(offset + start, data[start:end]))
        start = end
    return parts
