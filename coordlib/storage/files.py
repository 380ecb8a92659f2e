"""The narrow file interface: every effect that storage has on the world goes through here.

Narrow so that a simulated file system can stand in for it and lose, tear and reorder whatever was not
synced. Nothing here knows what the bytes mean. Paths are strings with "/" between the parts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from typing import Protocol, TypeAlias

__all__ = ["DirectoryLock", "DirectoryLocked", "File", "FileSystem", "PosixFileSystem"]

Buffer: TypeAlias = bytes | bytearray | memoryview


class DirectoryLocked(Exception):
    """Somebody holds the lock. The text says who, as far as is known, and what to do."""


class File(Protocol):
    """A file open for reading and writing. Nothing written is durable before `datasync` or `sync`."""

    def pread(self, size: int, offset: int) -> bytes:
        """Read `size` bytes; fewer only at the end of the file."""

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of it or raise OSError, in which case any part of it may have been written."""

    def datasync(self) -> None:
        """Make the content and the size durable, not necessarily the name."""

    def truncate(self, size: int) -> None: ...

    def size(self) -> int: ...

    def close(self) -> None: ...


class DirectoryLock(Protocol):
    def release(self) -> None:
        """Unlock, for forked children too. Idempotent."""

    def after_fork_in_child(self) -> None:
        """Close the inherited descriptor without unlocking what the parent holds."""


class FileSystem(Protocol):
    """All methods raise OSError as the system call does."""

    def make_directory(self, path: str) -> None:
        """Make it and missing parents (0700), durably. Existing is fine."""

    def open(self, path: str, *, create: bool = False) -> File:
        """Open an existing file, or with `create` make a new one (0600) that must not exist."""

    def names(self, directory: str) -> list[str]:
        """Sorted names in a directory."""

    def rename(self, old: str, new: str) -> None:
        """Replace `new` by `old` atomically; durable only after `sync_directory`."""

    def unlink(self, path: str) -> None: ...

    def sync_directory(self, path: str) -> None:
        """Make creates, renames and unlinks in the directory durable."""

    def lock(self, path: str) -> DirectoryLock:
        """
        Take the exclusive lock that the file at `path` stands for, creating it if need be.

        Raises:
            DirectoryLocked: Another process, or another storage of this one, has it.
        """

    def condemn(self, directory: str, reason: str) -> None:
        """Remember, for as long as this process lives, that the directory must not be opened again."""

    def condemned(self, directory: str) -> str | None:
        """The reason given to `condemn`, or None."""


# Directories on which a write or fsync of this process failed. Global because the page cache that lies
# about them is: a second storage object in this process would see pages that never reached the disk.
_condemned: dict[str, str] = {}

_FULL_SYNC = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone stops at the drive's cache


class _PosixFile:
    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pread(self, size: int, offset: int) -> bytes:
        data = os.pread(self._fd, size, offset)
        if len(data) == size or not data:
            return data
        parts = [data]
        got = len(data)
        while got < size:
            data = os.pread(self._fd, size - got, offset + got)
            if not data:
                break
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def pwrite(self, data: Buffer, offset: int) -> None:
        size = len(data)
        done = os.pwrite(self._fd, data, offset)
        while done < size:
            # A short write is how a full disk or a signal announces itself: the next call says which.
            count = os.pwrite(self._fd, memoryview(data)[done:], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "write made no progress")
            done += count

    if sys.platform == "linux":

        def datasync(self) -> None:
            os.fdatasync(self._fd)
    else:

        def datasync(self) -> None:
            if _FULL_SYNC is not None:
                fcntl.fcntl(self._fd, _FULL_SYNC)
            else:
                os.fsync(self._fd)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _PosixLock:
    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # Not just close(): a forked child that still has the descriptor would keep the lock.
            try:
                fcntl.flock(fd, fcntl.LOCK_UN)
            finally:
                os.close(fd)

    def after_fork_in_child(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # Not LOCK_UN: parent and child share the open file description, so that would unlock the parent.
            os.close(fd)


class PosixFileSystem:
    """
    The real one.

    The lock is flock(2). POSIX record locks would not be inherited by a forked child, but are lost as
    soon as *any* descriptor of that file is closed in the process (a back-up running inside of the
    application suffices), silently. Open-file-description locks are shared with forked children as
    flock is, and need a platform-dependent struct. What flock gets wrong it gets wrong safely: a child
    that was forked behind our back keeps the directory locked, and the message says so.
    """

    def make_directory(self, path: str) -> None:
        if os.path.isdir(path):
            return
        parent = os.path.dirname(os.path.abspath(path))
        if parent != path:
            self.make_directory(parent)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path):
                raise
        self.sync_directory(parent)

    def open(self, path: str, *, create: bool = False) -> File:
        flags = os.O_RDWR | os.O_CLOEXEC
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        return _PosixFile(os.open(path, flags, 0o600))

    def names(self, directory: str) -> list[str]:
        return sorted(os.listdir(directory))

    def rename(self, old: str, new: str) -> None:
        os.replace(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def sync_directory(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def lock(self, path: str) -> DirectoryLock:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DirectoryLocked(_describe_holder(os.pread(fd, 256, 0))) from None
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()}\nboot {_boot_id()}\n".encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        return _PosixLock(fd)

    def condemn(self, directory: str, reason: str) -> None:
        _condemned[os.path.realpath(directory)] = reason

    def condemned(self, directory: str) -> str | None:
        return _condemned.get(os.path.realpath(directory))


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


def _describe_holder(content: bytes) -> str:
    words = content.decode("ascii", "replace").split()
    fields = dict(zip(words[::2], words[1::2], strict=False))
    pid = fields.get("pid", "")
    if not pid.isdigit():
        return "another process is using it; stop that one, or give each node its own directory"
    if int(pid) == os.getpid():
        return "this process has it open already; close that cluster first, or give each its own directory"
    if (
        fields.get("boot") == _boot_id()
        and not os.path.exists(f"/proc/{pid}")
        and os.path.exists("/proc/self")
    ):
        return (
            f"process {pid}, which took it, is gone, but a process forked from it still holds the lock; "
            "end that child (lsof or fuser names it)"
        )
    return f"locked by process {pid}; stop that one, or give each node its own directory"
