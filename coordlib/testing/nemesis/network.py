"""What the nemesis can do to a network; `netns` and `proxy` do it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

__all__ = ["Link", "Network", "Seen", "links_between"]

Link: TypeAlias = tuple[str, str]
"""From a process to a process, by name: one direction."""


class Seen(NamedTuple):
    """What a network saw of a fault: how many of what. None at all means that there was no fault."""

    number: int
    unit: str

    def __str__(self) -> str:
        return f"{self.number} {self.unit}"


class Network(Protocol):
    """
    Between the named processes. At most one of cut, hold, slow and reset is on at a time.

    Each begins one and returns at once; `heal` ends it, and tells what was seen of it.
    """

    async def open(self) -> None:
        """Make it. Leaves nothing behind if that fails."""

    async def close(self) -> None:
        """Take it away; also after a failed or half-done `open`."""

    def endpoints(self, seen_from: str) -> dict[str, str]:
        """Every member's endpoint, as it is reached from a process. A member's own is where it listens."""

    def prefix(self, name: str) -> Sequence[str]:
        """The command in front of a program that makes it run at this process's place."""

    async def cut(self, links: Iterable[Link]) -> None:
        """Nothing passes in these directions; what was sent meanwhile is lost, or late as TCP has it."""

    async def reset(self, links: Iterable[Link]) -> None:
        """End the connections that have one of these directions, by TCP reset, on both sides."""

    async def hold(self, names: Iterable[str]) -> None:
        """What these send is kept, and delivered by `heal`, at once and in order."""

    async def slow(self, names: Iterable[str], rate_bits_per_second: int) -> None:
        """What these send passes at this rate only."""

    async def heal(self) -> Seen:
        """End the fault that is on; what was seen of it."""


def links_between(left: Iterable[str], right: Iterable[str]) -> set[Link]:
    """Both directions between each of the left and each of the right."""
    pairs = {(a, b) for a in left for b in right if a != b}
    return pairs | {(b, a) for a, b in pairs}
