"""The replicated table of members: who they are, where they are, and which disk each has.

A member's disk id is empty until it is first seen; from then on it never changes by itself: a member that
comes back with another disk has lost what it promised and must not count (see the node's documentation).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from coordlib.cbor import decode, encode
from coordlib.errors import ConditionFailed
from coordlib.machine.effects import Effect, MembersChanged, Meta
from coordlib.machine.table import BytesTable, Reclaimer

__all__ = ["Members"]


class Members:
    """Node id -> endpoint and disk id."""

    __slots__ = ("table",)

    def __init__(self, reclaimer: Reclaimer, initial: Iterable[tuple[str, str, bytes]] = ()) -> None:
        self.table = BytesTable(reclaimer)
        for node, endpoint, disk_id in initial:
            self.table.put(node.encode(), encode((endpoint, disk_id)))

    def all(self) -> list[tuple[str, str, bytes]]:
        """Return (node, endpoint, disk id) of every member, sorted by node."""
        view = self.table.view()
        try:
            found = [(key.decode(), *decode(value)) for key, value in view.drain()]
        finally:
            view.close()
        return sorted(found)

    def load(self, record: tuple[bytes, bytes]) -> None:
        """Take a record of a snapshot."""
        key, value = record
        endpoint, disk_id = decode(value)
        self.table.put(key, encode((str(endpoint), bytes(disk_id))))

    def record_disk(
        self, _meta: Meta, _session: int, _sequence: int, args: list[Any], effects: list[Effect]
    ) -> tuple[Any, ...]:
        _, node, disk_id = args
        key = node.encode("utf-8", "surrogatepass")
        record = self.table.get(key)
        if record is None:
            raise ConditionFailed(f"{node!r} is not a member", node=node)
        endpoint, known = decode(record)
        if known == disk_id:
            return (0, False)
        if known:
            raise ConditionFailed(
                f"{node!r} is known with disk {known.hex()}, not {disk_id.hex()}", node=node, known=known
            )
        self.table.put(key, encode((endpoint, disk_id)))
        effects.append(MembersChanged())
        return (0, True)

    def query(self, _args: list[Any]) -> tuple[Any, ...]:
        return (0, self.all())
