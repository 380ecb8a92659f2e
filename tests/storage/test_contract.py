"""Every storage of ours keeps the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordlib.storage import LogStorage, MemoryStorage, PosixFileSystem, SegmentStorage
from coordlib.testing.disk import SimulatedFileSystem
from coordlib.testing.suites.storage import StorageSuite


class TestMemoryStorage(StorageSuite):
    def make(self) -> LogStorage:
        return MemoryStorage(node_id="a", cluster_name="shop", new_disk_id=b"d" * 16)


class TestSegmentStorageOnTheRealFileSystem(StorageSuite):
    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = str(tmp_path / "data" / "a")

    def make(self) -> LogStorage:
        return SegmentStorage(
            PosixFileSystem(), self.directory, node_id="a", cluster_name="shop", new_disk_id=b"d" * 16
        )

    def reopen(self) -> LogStorage:
        return self.make()


class TestSegmentStorageOnTheSimulatedFileSystem(StorageSuite):
    """With segments so small that nearly every batch starts one."""

    @pytest.fixture(autouse=True)
    def _fs(self) -> None:
        self.fs = SimulatedFileSystem()

    def make(self) -> LogStorage:
        return SegmentStorage(
            self.fs,
            "/data",
            node_id="a",
            cluster_name="shop",
            new_disk_id=b"d" * 16,
            segment_size_bytes=1,
            fill_size_bytes=512,
        )

    def reopen(self) -> LogStorage:
        return self.make()
