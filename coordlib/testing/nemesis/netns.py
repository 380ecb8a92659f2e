"""A network of its own: a namespace for each process, on one bridge; nftables drop and reset, tbf holds and slows.

Everything lives in namespaces with this run's names: no address, no rule and no device is in anybody else's.
Needs root, ip, tc and nft.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Sequence
from typing import Final

from coordlib.testing.nemesis.network import Link, Seen
from coordlib.testing.nemesis.workspace import command

__all__ = ["NamespaceNetwork"]

PORT: Final = 7400
_TABLE: Final = "coordlib_nemesis"
# 2 kbit/s lets a few packets through before it holds: with less tbf would refuse any packet of full size.
_HOLD: Final = ("rate", "2kbit", "burst", "4kb", "limit", "20mb")
_RELEASE: Final = ("rate", "1gbit", "burst", "1mb", "limit", "20mb")
_RELEASE_SECONDS: Final = 0.3


class NamespaceNetwork:
    """See `coordlib.testing.nemesis.network.Network`."""

    def __init__(self, tag: str, members: Sequence[str], clients: Sequence[str]) -> None:
        self._names = [*members, *clients]
        self._members = list(members)
        self._tag = tag
        self._address = {name: f"10.77.0.{number}" for number, name in enumerate(self._names, start=1)}
        self._cut: set[str] = set()  # those with a rule
        self._queued: set[str] = set()  # those with a queue
        self._unit = ""

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    async def open(self) -> None:
        hub = self._space("hub")
        await command("ip", "netns", "add", hub)
        await command("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        await command("ip", "-n", hub, "link", "set", "bridge", "up")
        for number, name in enumerate(self._names):
            space, port = self._space(name), f"port{number}"
            await command("ip", "netns", "add", space)
            peer = ("peer", "name", "eth0", "netns", space)
            await command("ip", "-n", hub, "link", "add", port, "type", "veth", *peer)
            await command("ip", "-n", hub, "link", "set", port, "master", "bridge", "up")
            await command("ip", "-n", space, "addr", "add", f"{self._address[name]}/24", "dev", "eth0")
            await command("ip", "-n", space, "link", "set", "lo", "up")
            await command("ip", "-n", space, "link", "set", "eth0", "up")

    async def close(self) -> None:
        for name in (*self._names, "hub"):
            await command("ip", "netns", "del", self._space(name), is_checked=False)

    def endpoints(self, seen_from: str) -> dict[str, str]:
        return {name: f"tcp://{self._address[name]}:{PORT}" for name in self._members}

    def prefix(self, name: str) -> Sequence[str]:
        # Not `ip netns exec`, which would also give it mounts of its own, that keep a filesystem busy.
        return ("nsenter", f"--net=/run/netns/{self._space(name)}")

    async def _nft(self, name: str, text: str) -> str:
        return await command(*self.prefix(name), "nft", "-f", "-", given=text)

    async def _rules(self, links: Iterable[Link], verdict: str) -> None:
        into: dict[str, list[str]] = {}
        for source, target in sorted(links):
            into.setdefault(target, []).append(self._address[source])
        self._cut = set(into)
        tables = []
        for target, sources in into.items():
            rules = "\n".join(f"ip saddr {source} counter {verdict}" for source in sources)
            chain = f"chain input {{\ntype filter hook input priority 0; policy accept;\n{rules}\n}}"
            tables.append(self._nft(target, f"table inet {_TABLE} {{\n{chain}\n}}\n"))
        await asyncio.gather(*tables)

    async def cut(self, links: Iterable[Link]) -> None:
        self._unit = "packets dropped"
        await self._rules(links, "drop")

    async def reset(self, links: Iterable[Link]) -> None:
        self._unit = "packets answered by a reset"
        both = {link for one in links for link in (one, one[::-1])}
        await self._rules(both, "meta l4proto tcp reject with tcp reset")

    async def hold(self, names: Iterable[str]) -> None:
        self._unit = "packets held"
        await self._queue(set(names), _HOLD)

    async def slow(self, names: Iterable[str], rate_bits_per_second: int) -> None:
        self._unit = "packets delayed"
        shape = ("rate", f"{rate_bits_per_second}bit", "burst", "4kb", "limit", "20mb")
        await self._queue(set(names), shape)

    async def _queue(self, names: set[str], shape: Sequence[str]) -> None:
        self._queued = names
        await asyncio.gather(*(self._tc(name, "replace", shape) for name in sorted(names)))

    async def _tc(self, name: str, verb: str, shape: Sequence[str]) -> str:
        return await command(
            *self.prefix(name),
            "tc",
            "qdisc",
            verb,
            "dev",
            "eth0",
            "root",
            *(["tbf", *shape] if shape else []),
        )

    async def _queue_facts(self, name: str) -> dict[str, int]:
        text = await command(*self.prefix(name), "tc", "-s", "-j", "qdisc", "show", "dev", "eth0")
        facts: dict[str, int] = json.loads(text)[0]
        return facts

    async def heal(self) -> Seen:
        count = 0
        for name in sorted(self._cut):
            listed = await command(*self.prefix(name), "nft", "list", "table", "inet", _TABLE)
            count += sum(int(packets) for packets in re.findall(r"counter packets (\d+)", listed))
            await command(*self.prefix(name), "nft", "delete", "table", "inet", _TABLE)
        self._cut = set()
        queued, self._queued = sorted(self._queued), set()
        for name in queued:
            facts = await self._queue_facts(name)
            count += facts["qlen"] if self._unit == "packets held" else facts["overlimits"]
            await self._tc(name, "change", _RELEASE)
        if queued:
            # The queue passes what it holds; without it nothing would be shaped, but what it held would be lost.
            await asyncio.sleep(_RELEASE_SECONDS)
            for name in queued:
                await self._tc(name, "del", ())
        return Seen(count, self._unit)
