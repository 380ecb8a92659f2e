"""The operating system's side of connections: what libzmq has no option for.

libzmq bounds neither the number of frames in a message nor the memory they take before the last one,
cannot close one peer of a ROUTER, and leaves its descriptors open in a forked child. Each of these is
done here on the connection's own descriptor, whose number libzmq reports.

Rule: a number is not a connection. libzmq may have closed the descriptor and somebody else may have
been given its number, so nothing is done to one before its inode has been compared, on a duplicate
that cannot change hands meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
import sys
from collections.abc import Callable, Collection
from typing import Final

__all__ = ["Wire", "identify", "let_go_of_inherited"]

_IS_LINUX: Final = sys.platform == "linux"
_TCP_INFO_BYTES_RECEIVED: Final = 128  # offset of tcpi_bytes_received in struct tcp_info, since Linux 4.1
_FIONREAD: Final = 0x541B

# Heartbeats and acknowledgements of an idle connection; a peer that sends less than this unfinished
# is not worth cutting.
_IDLE_BYTES_PER_SECOND: Final = 256


class Wire:
    """
    One TCP or Unix connection, and how many bytes came in on it that were never delivered as frames.

    `delivered` is added to by the owner for every frame (with its wire overhead) and taken by `sample`.
    """

    __slots__ = (
        "_consumed",
        "_is_tcp",
        "address",
        "connection",
        "delivered",
        "fd",
        "inode",
        "route",
        "sampled_at",
        "successes_before",
        "undelivered",
    )

    def __init__(self, fd: int, inode: int, address: str, is_tcp: bool, now: float) -> None:
        self.fd = fd
        self.inode = inode
        self.address = address
        self.connection = 0
        self.route = b""
        self.successes_before = 0
        self.delivered = 0
        self.undelivered = 0
        self.sampled_at = now
        self._consumed = 0
        self._is_tcp = is_tcp

    def settle(self) -> int:
        """Take off what has been delivered since the last sample; return what is still undelivered of it."""
        # May fall below zero: some of it came in after the sample, and the next one adds it.
        self.undelivered -= self.delivered
        self.delivered = 0
        return self.undelivered

    def sample(self, now: float) -> None:
        """Add what libzmq has read from the connection since the last sample. Linux and TCP only."""
        elapsed = now - self.sampled_at
        self.sampled_at = now
        if not (_IS_LINUX and self._is_tcp):
            return
        twin = self._twin()
        if twin is None:
            return
        try:
            info = twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES_RECEIVED + 8)
            waiting = _waiting_bytes(twin)
        except OSError:
            return  # it has ended, and libzmq is about to say so
        finally:
            twin.close()
        if len(info) < _TCP_INFO_BYTES_RECEIVED + 8:
            return  # an older kernel, which does not count them
        consumed = struct.unpack_from("=Q", info, _TCP_INFO_BYTES_RECEIVED)[0] - waiting
        grown = consumed - self._consumed - int(elapsed * _IDLE_BYTES_PER_SECOND)
        self._consumed = consumed
        self.undelivered = max(0, self.undelivered + grown)

    def cut(self) -> bool:
        """Close the connection under libzmq, which then sees its end. False if it was gone already."""
        twin = self._twin()
        if twin is None:
            return False
        try:
            twin.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False  # the peer was quicker
        finally:
            twin.close()
        return True

    def _twin(self) -> socket.socket | None:
        try:
            twin_fd = os.dup(self.fd)
        except OSError:
            return None
        if os.fstat(twin_fd).st_ino != self.inode:
            os.close(twin_fd)
            return None
        return socket.socket(fileno=twin_fd)


def identify(fd: int, belongs: Callable[[socket.socket], bool], now: float) -> Wire | None:
    """
    Return the connection behind a descriptor number, or None when it is not (any more) one of ours.

    Args:
        belongs: Tells from a socket's addresses whether it is ours.
    """
    try:
        twin_fd = os.dup(fd)
    except OSError:
        return None
    try:
        status = os.fstat(twin_fd)
        if not stat.S_ISSOCK(status.st_mode):
            os.close(twin_fd)
            return None
        twin = socket.socket(fileno=twin_fd)
    except OSError:
        os.close(twin_fd)
        return None
    with twin:
        try:
            if not belongs(twin):
                return None
            is_tcp = twin.family in (socket.AF_INET, socket.AF_INET6)
            address = _peer_name(twin)
        except OSError:
            return None
    return Wire(fd, status.st_ino, address, is_tcp, now)


def let_go_of_inherited(inodes: Collection[int], belongs: Callable[[socket.socket], bool]) -> int:
    """
    Replace every inherited descriptor of ours by /dev/null, and return how many there were.

    As long as a child keeps them open, the parent's death closes nothing and its port stays taken.
    The numbers stay allocated, so that inherited objects which hold them can do no harm.
    """
    replaced = 0
    for fd in _open_descriptors():
        try:
            status = os.fstat(fd)
            if not stat.S_ISSOCK(status.st_mode):
                continue
            is_ours = status.st_ino in inodes
            if not is_ours:
                with socket.socket(fileno=os.dup(fd)) as twin:
                    is_ours = belongs(twin)
            if is_ours:
                null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                os.dup2(null, fd, inheritable=False)
                os.close(null)
                replaced += 1
        except OSError:
            continue  # closed meanwhile, or not an address family that we know
    return replaced


def _open_descriptors() -> list[int]:
    for folder in ("/proc/self/fd", "/dev/fd"):
        try:
            return [int(name) for name in os.listdir(folder)]
        except OSError:
            continue
    return []


def _waiting_bytes(twin: socket.socket) -> int:
    return int(struct.unpack("=i", fcntl.ioctl(twin.fileno(), _FIONREAD, b"\0\0\0\0"))[0])


def _peer_name(twin: socket.socket) -> str:
    try:
        peer = twin.getpeername()
    except OSError:  # a listener
        return ""
    if isinstance(peer, tuple):
        host, port = peer[0], peer[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return "ipc"
