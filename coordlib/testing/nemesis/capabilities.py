"""What the nemesis can do on this machine, found out by doing it once."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from coordlib.testing.nemesis.disks import DiskError, LoopDisk
from coordlib.testing.nemesis.netns import NamespaceNetwork
from coordlib.testing.nemesis.network import links_between
from coordlib.testing.nemesis.shim import ShimError, build
from coordlib.testing.nemesis.workspace import CommandError, Workspace, command

__all__ = ["ALL", "DISKS", "NAMESPACES", "SHIM", "find"]

NAMESPACES: Final = "network namespaces"
DISKS: Final = "loop-mounted filesystems"
SHIM: Final = "a library in front of libc"
ALL: Final = (NAMESPACES, DISKS, SHIM)


async def find(workspace: Workspace, wanted: Iterable[str]) -> dict[str, str]:
    """For each capability that is wanted, why it is missing; empty if it is there."""
    found = {}
    for what in wanted:
        if what == NAMESPACES:
            found[what] = await _namespaces(workspace)
        elif what == DISKS:
            found[what] = await _disks(workspace)
        else:
            found[what] = _shim(workspace)
    return found


def _tools(*names: str) -> str:
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in names if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


async def _namespaces(workspace: Workspace) -> str:
    if missing := _tools("ip", "tc", "nft", "nsenter"):
        return missing
    network = NamespaceNetwork(f"{workspace.tag}-try", ["a"], ["b"])
    try:
        await network.open()
        await network.cut(links_between("a", "b"))
        await command(*network.prefix("b"), *_KNOCK, is_checked=False)
        seen = await network.heal()
        await network.hold("a")
        await network.heal()
    except CommandError as error:
        return str(error)
    finally:
        await network.close()
    return "" if seen.number else "nft takes the rules, but drops nothing"


_KNOCK: Final = (
    sys.executable,
    "-c",
    "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'knock', ('10.77.0.1', 7400))",
)


async def _disks(workspace: Workspace) -> str:
    if missing := _tools("mkfs.ext4", "losetup", "mount", "umount"):
        return missing
    disk = LoopDisk(workspace.directory / "try")
    try:
        await disk.open()
        disk.cut_power()
        is_lost = await disk.restore_power()
    except (CommandError, DiskError, OSError) as error:
        return str(error)
    finally:
        await disk.close()
    return "" if is_lost else "a shut down filesystem keeps what was never fsynced"


def _shim(workspace: Workspace) -> str:
    directory: Path = workspace.directory
    try:
        build(directory)
    except ShimError as error:
        return str(error)
    return ""
