"""What applying a command yields: a reply, and effects as data, which only a node interprets.

The machine never acts. It says what has become true ("this waiter now holds that lock"), and the node that
has somebody waiting for it passes it on.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

__all__ = [
    "Applied",
    "Effect",
    "LockGranted",
    "LockWithdrawn",
    "MembersChanged",
    "Meta",
    "SessionEnded",
    "SessionOpened",
]


class Meta(NamedTuple):
    """What a command may know besides its arguments; all of it came through the log."""

    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    term: int
    now_ms: int  # log_time: monotone over the whole log


class LockGranted(NamedTuple):
    """A *waiting* acquisition now holds its lock. (One that is granted at once is told by its reply.)"""

    session: int
    sequence: int
    lock: bytes
    token: int


class LockWithdrawn(NamedTuple):
    """An acquisition was removed: one that was held otherwise than by its own release, one that waited anyhow."""

    session: int
    sequence: int


class SessionOpened(NamedTuple):
    session: int
    ttl_ms: int


class SessionEnded(NamedTuple):
    session: int
    reason: str  # "closed" | "expired" | "overloaded"


class MembersChanged(NamedTuple):
    """The member table is different now; read it from the machine."""


Effect: TypeAlias = LockGranted | LockWithdrawn | SessionOpened | SessionEnded | MembersChanged


class Applied(NamedTuple):
    """The outcome of one log entry. `session` is 0 for commands outside of any session."""

    session: int
    sequence: int
    reply: bytes
    effects: tuple[Effect, ...]
