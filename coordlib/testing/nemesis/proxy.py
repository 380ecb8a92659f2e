"""A network for everybody: one listener on loopback for each directed pair, that passes on, or does not.

Needs nothing but loopback. A connection is known by who opened it to whom, so each direction between two processes
can be treated by itself. A client that is told of members by a member may use that member's ways to them.

Servers that listen on a Unix socket (databases) can be among them: each process reaches one through a socket of its own.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from coordlib.testing.nemesis.network import Link, Seen

__all__ = ["ProxyNetwork"]

_CHUNK_BYTES: Final = 1 << 16
_PORT_MIN: Final = 12_000
_PORT_MAX: Final = 32_000
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


def _listening_port(taken: set[int]) -> int:
    """
    A port for one who listens, stops and listens again.

    Below those that the system gives to outgoing connections: one of them could have it while he is away.
    """
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(_PORT_MIN, _PORT_MAX)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in taken:
            return port


class _Direction:
    """What happens to the bytes from one process to another, on all their connections."""

    def __init__(self) -> None:
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.rate_bytes_per_second = 0
        self.kept_bytes = 0  # held back or slowed
        self.free_at = 0.0


class _Connection:
    """Two sockets and what passes between them."""

    def __init__(self, opener: str, target: str, ends: Sequence[asyncio.StreamWriter]) -> None:
        self.opener = opener
        self.target = target
        self.ends = ends
        self.has_lost = False

    def reset(self) -> None:
        for end in self.ends:
            sock = end.get_extra_info("socket")
            if sock is not None and not end.transport.is_closing():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            end.transport.abort()


class ProxyNetwork:
    """
    See `coordlib.testing.nemesis.network.Network`.

    Args:
        servers: By name, the Unix socket that each listens on.
    """

    def __init__(
        self, members: Sequence[str], clients: Sequence[str], servers: Mapping[str, str] | None = None
    ) -> None:
        self._members = list(members)
        self._servers = dict(servers or {})
        self._directory = ""
        names = [*members, *clients, *self._servers]
        self._directions = {(a, b): _Direction() for a in names for b in names if a != b}
        self._listeners: dict[Link, asyncio.Server] = {}
        self._ports: dict[Link, int] = {}
        self._own: dict[str, int] = {}
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_cut = False
        self._unit = ""
        self._count = 0

    async def open(self) -> None:
        for opener, target in self._directions:
            if target in self._members:
                server = await asyncio.start_server(
                    functools.partial(self._accept, (opener, target)),
                    "127.0.0.1",
                    0,
                )
                self._listeners[opener, target] = server
                self._ports[opener, target] = server.sockets[0].getsockname()[1]
            elif target in self._servers and opener not in self._servers:
                # Short: the path of a Unix socket has room for 107 bytes.
                self._directory = self._directory or tempfile.mkdtemp(prefix="coordlib-net-")
                path = self.socket(opener, target)
                os.mkdir(os.path.dirname(path))
                accept = functools.partial(self._accept, (opener, target))
                self._listeners[opener, target] = await asyncio.start_unix_server(accept, path)
        for name in self._members:
            self._own[name] = _listening_port(set(self._own.values()))

    async def close(self) -> None:
        for server in self._listeners.values():
            server.close()
        for connection in list(self._connections):
            connection.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    def socket(self, seen_from: str, server: str) -> str:
        """The Unix socket by which a process reaches a server; its last part is that of the server's own."""
        name = os.path.basename(self._servers[server])
        return os.path.join(self._directory, f"{seen_from}-{server}", name)

    def endpoints(self, seen_from: str) -> dict[str, str]:
        return {
            name: f"tcp://127.0.0.1:{self._own[name] if name == seen_from else self._ports[seen_from, name]}"
            for name in self._members
        }

    def prefix(self, name: str) -> Sequence[str]:
        return ()

    async def _accept(self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        opener, target = link
        try:
            if target in self._servers:
                ends = await asyncio.open_unix_connection(self._servers[target])
            else:
                ends = await asyncio.open_connection("127.0.0.1", self._own[target])
            back_reader, back_writer = ends
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(opener, target, (writer, back_writer))
        self._connections.add(connection)
        there, back = self._directions[link], self._directions[target, opener]
        ways = (
            asyncio.create_task(self._pass(reader, back_writer, there, connection)),
            asyncio.create_task(self._pass(back_reader, writer, back, connection)),
        )
        try:
            # One end that is gone ends both: ZeroMQ never closes one direction alone.
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in connection.ends:
                end.close()
            self._connections.discard(connection)

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        direction: _Direction,
        connection: _Connection,
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await reader.read(_CHUNK_BYTES):
                if not direction.is_open.is_set():
                    direction.kept_bytes += len(data)
                    connection.has_lost = self._is_cut
                    await direction.is_open.wait()
                rate = direction.rate_bytes_per_second
                if rate:
                    direction.kept_bytes += len(data)
                    direction.free_at = max(direction.free_at, loop.time()) + len(data) / rate
                    await asyncio.sleep(direction.free_at - loop.time())
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # reset by one of the ends, or by us: the other end is closed with it

    def kept_bytes(self, source: str, target: str) -> int:
        """How many bytes the fault that is on has kept from passing in a direction, or slowed."""
        return self._directions[source, target].kept_bytes

    async def cut(self, links: Iterable[Link]) -> None:
        self._unit = "bytes cut off"
        self._is_cut = True
        for link in links:
            self._directions[link].is_open.clear()

    async def reset(self, links: Iterable[Link]) -> None:
        self._unit = "connections reset"
        meant = set(links)
        for connection in list(self._connections):
            if meant & {(connection.opener, connection.target), (connection.target, connection.opener)}:
                connection.reset()
                self._count += 1

    async def hold(self, names: Iterable[str]) -> None:
        self._unit = "bytes held"
        meant = set(names)
        for (source, _), direction in self._directions.items():
            if source in meant:
                direction.is_open.clear()

    async def slow(self, names: Iterable[str], rate_bits_per_second: int) -> None:
        self._unit = "bytes slowed"
        meant = set(names)
        for (source, _), direction in self._directions.items():
            if source in meant:
                direction.rate_bytes_per_second = max(1, rate_bits_per_second // 8)

    async def heal(self) -> Seen:
        count, self._count = self._count, 0
        if self._is_cut:
            # What was cut off is lost, so the connection is: its bytes cannot go on behind a gap.
            for connection in list(self._connections):
                if connection.has_lost:
                    connection.reset()
        self._is_cut = False
        for direction in self._directions.values():
            count += direction.kept_bytes
            direction.kept_bytes = 0
            direction.rate_bytes_per_second = 0
            direction.free_at = 0.0
            direction.is_open.set()
        return Seen(count, self._unit)
