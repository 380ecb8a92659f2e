"""Where a member's data directory is: a plain directory, or a small filesystem of its own that can suffer.

The filesystem is ext4 in a file, on a loop device. It is filled by a balloon beside the data, and loses its power
by the ioctl that shuts a filesystem down without flushing its log: what was not fsynced is lost, what was is not.
Needs root.

Source: FS_IOC_SHUTDOWN with FSOP_GOING_FLAGS_NOLOGFLUSH, as xfstests' `godown`.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic
from typing import Final

from coordlib.testing.nemesis.workspace import command

__all__ = ["DiskError", "LoopDisk", "PlainDisk"]

SIZE_BYTES: Final = 64 << 20
_SHUTDOWN: Final = 0x8004587D
_WITHOUT_FLUSH: Final = struct.pack("=I", 2)
_BALLOON: Final = "balloon"
_PROBE: Final = "probe"
_PROBE_TEXT: Final = b"written, not fsynced"
_BUSY_SECONDS_MAX: Final = 10.0


class DiskError(Exception):
    """A disk cannot do what it is made for; the message says what."""


async def _until(is_so: Callable[[], Awaitable[bool]], why_not: str) -> None:
    """Ask again and again, for a while."""
    deadline = monotonic() + _BUSY_SECONDS_MAX
    while not await is_so():
        if monotonic() > deadline:
            raise DiskError(why_not)
        await asyncio.sleep(0.01)


async def _is_free(device: str) -> bool:
    """Whether no filesystem has the device, wherever it may be mounted."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


class PlainDisk:
    """A directory."""

    def __init__(self, directory: Path) -> None:
        self.data_dir = directory / "data"

    async def open(self) -> None:
        """Nothing to do: who uses it makes it."""

    async def close(self) -> None:
        """Nothing to do."""


class LoopDisk:
    """A filesystem of its own. What mounts it is taken away with the workspace."""

    def __init__(self, directory: Path) -> None:
        self._image = directory / "disk.img"
        self._device = ""
        self._mounted = directory / "disk"
        self.data_dir = self._mounted / "data"

    async def open(self) -> None:
        """
        Raises:
            CommandError: It cannot be made or mounted here.
        """
        self._mounted.mkdir(parents=True)
        with open(self._image, "wb") as image:
            image.truncate(SIZE_BYTES)
        # Without reserve, or root would write on when it is full.
        await command("mkfs.ext4", "-q", "-F", "-m", "0", str(self._image))
        self._device = (await command("losetup", "--find", "--show", str(self._image))).strip()
        await self._mount()

    async def _mount(self) -> None:
        # ext4 else writes what nobody has fsynced every five seconds, and a cut just after that loses nothing.
        await command("mount", "-o", "commit=600", self._device, str(self._mounted))

    async def _unmount(self) -> None:
        # The last descriptors of a killed process are closed after its parent hears of its end.
        await _until(self._is_unmounted, f"{self._mounted} stays busy")
        # A mount namespace that was copied meanwhile would keep the filesystem alive as it was: shut down.
        await _until(lambda: _is_free(self._device), f"{self._device} stays in use")

    async def _is_unmounted(self) -> bool:
        await command("umount", str(self._mounted), is_checked=False)
        return not os.path.ismount(self._mounted)

    async def close(self) -> None:
        """Unmount it, after every process let go of it."""
        if self._device:
            await command("umount", str(self._mounted), is_checked=False)
            await command("losetup", "--detach", self._device, is_checked=False)

    def fill(self) -> int:
        """Leave no block free; returns how many bytes that took."""
        taken = 0
        fd = os.open(self._mounted / _BALLOON, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            block = bytes(1 << 16)
            while block:
                try:
                    taken += os.write(fd, block)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    block = block[: len(block) // 2] if len(block) > 1 else b""
            os.fsync(fd)
        finally:
            os.close(fd)
        return taken

    def free(self) -> None:
        """Undo `fill`."""
        (self._mounted / _BALLOON).unlink(missing_ok=True)

    def cut_power(self) -> None:
        """
        From now on nothing reaches the disk any more, not even what was written before without fsync.

        Raises:
            DiskError: The filesystem goes on.
        """
        # Last, so that nothing has a reason to carry it to the disk.
        (self._mounted / _PROBE).write_bytes(_PROBE_TEXT)
        fd = os.open(self._mounted, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, _WITHOUT_FLUSH)
        finally:
            os.close(fd)
        try:
            (self._mounted / "after").write_bytes(b"")
        except OSError as error:
            if error.errno == errno.EIO:
                return
            raise
        raise DiskError(f"{self._mounted} was shut down and still takes writes")

    async def restore_power(self) -> bool:
        """
        Mount it anew, after every process let go of it. Whether what was not fsynced is gone, as it must be.

        Raises:
            CommandError: It cannot be mounted.
            DiskError: It cannot be unmounted.
        """
        await self._unmount()
        await self._mount()
        probe = self._mounted / _PROBE
        is_lost = not probe.exists() or probe.read_bytes() != _PROBE_TEXT
        probe.unlink(missing_ok=True)
        return is_lost
