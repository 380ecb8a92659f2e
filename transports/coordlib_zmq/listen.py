"""Addresses: what an endpoint names, and the sockets that listen there.

A listener can present only one CURVE server key, and a peer that knows another cannot even ask for
ours. While a secret is being changed (`secret=[new, old]`) there are peers that know only the old key
and, later, peers that know only the new one; so each key gets a listener of its own *on the same
port* (SO_REUSEPORT), the kernel deals connections out to them by chance, and whoever is dealt the
wrong one tries again from another port of its own. Linux only: elsewhere, and for `ipc`, only the first
key is presented, and a change of secret takes three rounds: `[old, new]`, `[new, old]`, `[new]`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys
from typing import NamedTuple

import zmq

from coordlib.errors import ConfigError, StartError
from coordlib_zmq.options import BACKLOG

__all__ = [
    "Endpoint",
    "can_share_port",
    "clear_stale_path",
    "is_other_end",
    "parse_endpoint",
    "remove_path",
    "share_port",
    "start_error",
]


class Endpoint(NamedTuple):
    """`tcp` with host and port, or `ipc` with a path."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.host


def parse_endpoint(endpoint: str) -> Endpoint:
    """
    Read `tcp://host:port`, `tcp://[v6 address]:port` or `ipc://path`.

    Raises:
        ConfigError: It is none of these.
    """
    scheme, separator, rest = endpoint.partition("://")
    if separator and scheme == "ipc" and rest:
        return Endpoint("ipc", "", 0, rest)
    if separator and scheme == "tcp":
        host, colon, port = rest.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            colon = ""  # a bare IPv6 address: its end could be the port or not
        if colon and host and ((port.isascii() and port.isdigit() and int(port) <= 65535) or port == "*"):
            return Endpoint("tcp", host, 0 if port == "*" else int(port), "")
    raise ConfigError(
        f"{endpoint!r} is no endpoint; write tcp://10.0.0.1:7400, tcp://[fd00::1]:7400 or ipc:///run/app/node.sock",
        endpoint=endpoint,
    )


def is_other_end(where: Endpoint, twin: socket.socket) -> bool:
    """Whether a socket's other end is what an endpoint names; a host name is taken to name any address."""
    peer = twin.getpeername()
    if twin.family == socket.AF_UNIX:
        return where.scheme == "ipc" and bool(peer == where.path)
    if where.scheme != "tcp" or twin.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    if peer[1] != where.port:
        return False
    is_numeric = where.is_ipv6 or where.host.replace(".", "").isdigit()
    return not is_numeric or where.is_ipv6 or bool(peer[0].removeprefix("::ffff:") == where.host)


def can_share_port(where: Endpoint) -> bool:
    """Whether several listeners on one port are each dealt a part of its connections."""
    return sys.platform == "linux" and where.scheme == "tcp"


def share_port(where: Endpoint, count: int) -> tuple[list[socket.socket], int]:
    """
    Return `count` listening sockets on the same port, and that port.

    Raises:
        OSError: As from bind(2); a port somebody else listens on is refused although ours would share it.
    """
    family = socket.AF_INET6 if where.is_ipv6 else socket.AF_INET
    host = {"*": "0.0.0.0"}.get(where.host, where.host)
    port = where.port
    if port:
        # A listener that shares would join anybody else's group of the same user: another node of ours,
        # started twice. One that does not share is refused, as it is when there is one key.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    listeners: list[socket.socket] = []
    try:
        for _ in range(count):
            listener = socket.socket(family, socket.SOCK_STREAM)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind((host, port))
            listener.listen(BACKLOG)
            listener.setblocking(False)
            port = listener.getsockname()[1]
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners, port


def clear_stale_path(path: str) -> None:
    """
    Remove the socket file of a process that is gone, so that the path can be bound.

    libzmq would remove any file, the socket of a live process included.

    Raises:
        StartError: Somebody listens there, or it is not a socket.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # not there; if the folder is missing or closed to us, bind says so
    if not stat.S_ISSOCK(mode):
        raise StartError(
            f"cannot listen at ipc://{path}: the file there is no socket; remove it or choose another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        refused = probe.connect_ex(path)
    if refused != errno.ECONNREFUSED:
        raise StartError(
            f"cannot listen at ipc://{path}: another process does; stop it or choose another path"
        )
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_path(path: str) -> None:
    """Remove the socket file of a listener that is about to close; libzmq leaves it behind."""
    with contextlib.suppress(OSError):  # gone already, or the folder is no longer ours: it is then stale
        os.unlink(path)


def start_error(endpoint: str, cause: OSError | zmq.ZMQError) -> StartError:
    """Say why an address cannot be listened at, and what to do."""
    code = cause.errno
    if code == errno.EADDRINUSE:
        why = "the address is taken; stop the process that listens there, or give this node another port"
    elif code in (errno.EADDRNOTAVAIL, errno.ENODEV):
        why = "the address is not one of this machine's; use one of its own, or 0.0.0.0 for all of them"
    elif code in (errno.EACCES, errno.EPERM):
        why = "permission denied; ports below 1024 and the folder of an ipc path need rights"
    elif code in (errno.EMFILE, errno.ENFILE):
        why = "too many open files; raise the limit (ulimit -n)"
    elif code == errno.ENOENT:
        why = "the folder of the path does not exist; create it with mode 0700"
    elif code == errno.ENAMETOOLONG:
        why = "the path is longer than the system allows for a socket (about 100 characters)"
    else:
        why = f"{cause}; write tcp://10.0.0.1:7400, tcp://[fd00::1]:7400 or ipc:///run/app/node.sock"
    return StartError(f"cannot listen at {endpoint}: {why}", endpoint=endpoint, errno=code)
