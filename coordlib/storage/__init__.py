"""What a node's promises rest on: the durable log, snapshots and the identity of the disk.

`SegmentStorage` is the real one, over `PosixFileSystem` in production and over
`coordlib.testing.disk.SimulatedFileSystem` under test; `MemoryStorage` promises only to its own process.
Both keep the contract of `LogStorage` (base.py), which `coordlib.testing.suites.storage` checks.
"""

from coordlib.storage.base import (
    FORMAT_VERSION,
    DiskIdentity,
    LogStorage,
    Persist,
    Recovered,
    RecoveredGroup,
    SnapshotReader,
    SnapshotWriter,
)
from coordlib.storage.files import PosixFileSystem
from coordlib.storage.memory import MemoryStorage
from coordlib.storage.segments import SegmentStorage

__all__ = [
    "FORMAT_VERSION",
    "DiskIdentity",
    "LogStorage",
    "MemoryStorage",
    "Persist",
    "PosixFileSystem",
    "Recovered",
    "RecoveredGroup",
    "SegmentStorage",
    "SnapshotReader",
    "SnapshotWriter",
]
