"""What a run leaves in the machine while it lasts, under names of its own, and how all of it is taken away again.

A run's tag is `coordlib-nemesis-PID-STARTED`: its directory is called that, its network namespaces begin with
it. So a later run can tell what a killed one left behind from what a living one uses, and touches nothing else.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Final

__all__ = ["CommandError", "Workspace", "command", "own_mounts", "sweep"]

PREFIX: Final = "coordlib-nemesis"
_TAG: Final = re.compile(rf"{PREFIX}-(\d+)-(\d+)")
_NEW_MOUNTS: Final = 0x00020000
_SLAVES_BELOW: Final = 0x4000 | 0x80000
COMMAND_SECONDS_MAX: Final = 30.0


class CommandError(Exception):
    """A command of the system failed; the message has it and what it said."""


async def command(*words: str, given: str | None = None, is_checked: bool = True) -> str:
    """
    Run a command of the system to its end; returns what it printed.

    Raises:
        CommandError: It failed and `is_checked`, or it did not end in time.
    """
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL if given is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, error = await asyncio.wait_for(
            process.communicate(None if given is None else given.encode()), COMMAND_SECONDS_MAX
        )
    except TimeoutError:
        process.kill()
        await process.wait()
        raise CommandError(f"{' '.join(words)} did not end within {COMMAND_SECONDS_MAX:g} s") from None
    if process.returncode != 0 and is_checked:
        raise CommandError(f"{' '.join(words)} failed ({process.returncode}): {error.decode().strip()}")
    return out.decode()


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]


def _is_left_behind(name: str) -> bool:
    found = _TAG.match(name)
    return found is not None and _started(int(found[1])) != found[2]


def own_mounts() -> None:
    """
    Give this process, and those it starts, mounts of their own, if it may.

    Others do not see what is mounted from now on, so a mount namespace that one of them makes does not keep a
    filesystem alive that lost its power here; and no mount outlives the run. What others unmount goes here too.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS) == 0:
        libc.mount(None, b"/", None, _SLAVES_BELOW, None)


class Workspace:
    """A directory for one run. Leaving the `with` block takes away all that bears its tag."""

    def __init__(self, parent: Path) -> None:
        self.tag = f"{PREFIX}-{os.getpid()}-{_started(os.getpid())}"
        self.directory = parent / self.tag

    def __enter__(self) -> Workspace:
        sweep(self.directory.parent)
        self.directory.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        _take_away(self.tag, self.directory)


def sweep(parent: Path) -> list[str]:
    """Take away what killed runs left behind, in this directory or mounted anywhere; returns their tags."""
    left = {name: parent / name for name in os.listdir(parent) if _TAG.fullmatch(name)}
    left |= {found[0]: parent / found[0] for name in _namespaces() if (found := _TAG.match(name))}
    for mounted in _mounts():
        left |= {path.name: path for path in Path(mounted).parents if _TAG.fullmatch(path.name)}
    tags = sorted(tag for tag in left if _is_left_behind(tag))
    for tag in tags:
        _take_away(tag, left[tag])
    return tags


def _namespaces() -> list[str]:
    try:
        return sorted(os.listdir("/run/netns"))
    except OSError:
        return []


def _take_away(tag: str, directory: Path) -> None:
    """Processes, namespaces, mounts, files. Each even if another could not be."""
    for space in _namespaces():
        if space.startswith(f"{tag}-"):
            for pid in _run("ip", "netns", "pids", space).split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            _run("ip", "netns", "del", space)
    for mounted in _mounts():
        if not mounted.startswith(f"{directory}/"):
            continue
        # Lazily if need be: a killed process may still be about to let go of it.
        if subprocess.run(["umount", mounted], capture_output=True, check=False).returncode != 0:
            _run("umount", "-l", mounted)
    for line in _run("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE").splitlines():
        device, _, file = line.partition(" ")
        if file.strip().startswith(f"{directory}/"):
            _run("losetup", "--detach", device)
    shutil.rmtree(directory, ignore_errors=True)


def _run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def _mounts() -> list[str]:
    """Where something is mounted, the deepest first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return sorted((line.split()[4].encode().decode("unicode_escape") for line in lines), reverse=True)
