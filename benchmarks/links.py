"""What is between the processes of a measurement, where it is to be cut: a proxy network on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

from coordlib.testing.nemesis.network import Link, Seen, links_between
from coordlib.testing.nemesis.proxy import ProxyNetwork

__all__ = ["Links"]

T = TypeVar("T")


class Links:
    """
    See `coordlib.testing.nemesis.proxy.ProxyNetwork`; all methods block.

    Args:
        servers: By name, the Unix socket that each listens on.
    """

    def __init__(self, members: Sequence[str], others: Sequence[str], servers: Mapping[str, str]) -> None:
        self._network = ProxyNetwork(members, others, servers)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._do(self._network.open())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._network.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def endpoints(self, seen_from: str) -> dict[str, str]:
        """Every member's endpoint as this process reaches it; its own is where it listens."""
        return self._network.endpoints(seen_from)

    def socket(self, seen_from: str, server: str) -> str:
        """The Unix socket by which this process reaches a server."""
        return self._network.socket(seen_from, server)

    def cut(self, links: Iterable[Link]) -> None:
        """Nothing passes in these directions any more, until `heal`."""
        self._do(self._network.cut(links))

    def isolate(self, name: str, others: Iterable[str]) -> None:
        """Cut both directions between one and the others."""
        self.cut(links_between([name], others))

    def kept_bytes(self, source: str, target: str) -> int:
        """How many bytes have been kept from passing since the cut."""
        return self._network.kept_bytes(source, target)

    def heal(self) -> Seen:
        """Everything passes again; connections that lost something are reset. Returns what was kept from passing."""
        return self._do(self._network.heal())
