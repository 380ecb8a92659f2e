"""What a transaction has read of replicated maps and will write to them: nothing leaves before it commits.

Reads come from one revision. The first read pins it; one that finds its key changed since is a conflict at once, so that
the code of a transaction never sees two halves that do not belong together. What was read once is read again from
here, and a transaction reads its own writes.

What must not live here: keys and values as users have them (`maps`), and when anything is committed (`transactions`).
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from coordlib.errors import ForkedError, RevisionCompacted, TransactionConflict, UsageError
from coordlib.machine import commands
from coordlib.node.operations import OpGen, Step
from coordlib.txn.transaction import StateChange
from coordlib.wire.messages import RequestKind

__all__ = ["Enclosing", "Overlay", "current_overlay", "overlay_of", "pages_gen"]

SCAN_ATTEMPTS_MAX: Final = 5
Name = bytes
Place = tuple[bytes, bytes]


class Enclosing(NamedTuple):
    """A transaction that a thread or task is in: of which handle, what it has read, and the one around it."""

    handle: object
    overlay: Overlay
    outer: Enclosing | None


current_overlay: ContextVar[Enclosing | None] = ContextVar("coordlib_overlay", default=None)
"""The innermost transaction that this thread or task is in, of whatever handle."""


def overlay_of(handle: object) -> Overlay | None:
    """Of the innermost transaction of this handle that the caller is in; those of other handles may be within it."""
    found = current_overlay.get()
    while found is not None and found.handle is not handle:
        found = found.outer
    return None if found is None else found.overlay


def pages_gen(name: bytes, *, keys_only: bool, deadline_ms: int) -> OpGen[tuple[int, list[bytes]]]:
    """The revision of a map and all its keys, or keys and values in turn, at that revision."""
    for attempt in range(SCAN_ATTEMPTS_MAX):
        found: list[bytes] = []
        after: bytes | None = None
        expected: int | None = None
        try:
            while True:
                body = commands.query_range(name, after, 1000, 256 * 1024, expected, keys_only)
                reply = yield Step(RequestKind.QUERY, body, deadline_ms)
                expected, is_more, flat = commands.decode_reply(reply)
                assert expected is not None
                found += flat
                if not is_more:
                    return expected, found
                after = flat[-1 if keys_only else -2]
        except RevisionCompacted:
            # The revision that the pages belong to is no longer kept (a new leader, or too many changes since).
            if attempt == SCAN_ATTEMPTS_MAX - 1:
                raise
    raise AssertionError("unreachable")


class Overlay:
    """
    One transaction's view of the maps. For one thread or task at a time.

    Args:
        why_read_only: What is said to who writes, if it is read only.
    """

    def __init__(
        self,
        *,
        is_read_only: bool,
        is_serializable: bool,
        why_read_only: str = "this transaction was begun with read_only=True, and cannot write",
    ) -> None:
        self.is_read_only = is_read_only
        self._why_read_only = why_read_only
        self._is_serializable = is_serializable
        self._pin: int | None = None
        self._reads: dict[Place, tuple[bytes | None, int]] = {}  # as stored, and the revision
        self._scans: dict[Name, tuple[int, dict[bytes, bytes]]] = {}
        self._writes: dict[Place, bytes | None] = {}
        self._guards: dict[tuple[bytes, int], None] = {}
        self._releases: dict[tuple[bytes, int], None] = {}
        self.has_ended = False
        self._pid = os.getpid()

    # -- reading

    def get_gen(self, name: bytes, key: bytes, deadline_ms: int) -> OpGen[bytes | None]:
        """
        Raises:
            TransactionConflict: It has changed since the first read.
        """
        value, _ = yield from self.read_gen(name, key, deadline_ms)
        return value

    def read_gen(self, name: bytes, key: bytes, deadline_ms: int) -> OpGen[tuple[bytes | None, int]]:
        """The value and its revision; 0 for one that is not there or that this transaction has written."""
        self.check_open()
        place = (name, key)
        if place in self._writes:
            return self._writes[place], 0
        if name in self._scans:
            return self._scans[name][1].get(key), 0
        if place not in self._reads:
            self._reads[place] = yield from self._fetch_gen(name, key, deadline_ms)
        return self._reads[place]

    def _fetch_gen(self, name: bytes, key: bytes, deadline_ms: int) -> OpGen[tuple[bytes | None, int]]:
        reply = yield Step(RequestKind.QUERY, commands.query_tx_read(name, key), deadline_ms)
        _, value, mod, map_revision, index = commands.decode_reply(reply)
        if self._pin is None:
            self._pin = index
        elif mod > self._pin:
            raise self._conflict(mod)
        elif value is None and (map_revision > self._pin or not map_revision):
            # It is not there; was it at the pinned revision? If everything read so far still holds at this moment,
            # that is the revision from now on.
            known = -1
            while known != (
                known := len(self._reads) + len(self._scans)
            ):  # reads of other tasks meanwhile, too
                body = commands.query_tx_read(name, key, self._read_conditions())
                reply = yield Step(RequestKind.QUERY, body, deadline_ms)
                failed, value, mod, map_revision, index = commands.decode_reply(reply)
                if failed >= 0:
                    raise self._conflict(map_revision)
            self._pin = index
        return value, mod

    def scan_gen(self, name: bytes, deadline_ms: int) -> OpGen[dict[bytes, bytes]]:
        """All of a map, this transaction's own changes included."""
        self.check_open()
        if name not in self._scans:
            if self._pin is None:
                # The revision of a map may be an old one: the pin is that of now.
                reply = yield Step(RequestKind.QUERY, commands.query_tx_read(name, b"\x00"), deadline_ms)
                self._pin = commands.decode_reply(reply)[4]
            revision, flat = yield from pages_gen(name, keys_only=False, deadline_ms=deadline_ms)
            if revision > self._pin:
                raise self._conflict(revision)
            if not revision:
                # It is empty; was it at the pinned revision? As for a key that is not there.
                body = commands.query_tx_read(
                    name, b"\x00", [*self._read_conditions(), commands.map_is_at(name, 0)]
                )
                reply = yield Step(RequestKind.QUERY, body, deadline_ms)
                failed, _, _, _, index = commands.decode_reply(reply)
                if failed >= 0:
                    raise self._conflict(index)
                self._pin = index
            self._scans[name] = revision, dict(zip(flat[::2], flat[1::2], strict=True))
        found = dict(self._scans[name][1])
        for (map_name, key), value in self._writes.items():
            if map_name == name:
                if value is None:
                    found.pop(key, None)
                else:
                    found[key] = value
        return found

    def _conflict(self, revision: int) -> TransactionConflict:
        return TransactionConflict(
            f"what the transaction reads was changed (revision {revision}) after its first read (revision {self._pin}); "
            "run it again",
            reason="conflict",
            gtid=b"",
        )

    # -- writing

    def put(
        self, name: bytes, key: bytes, value: bytes | None, guard: tuple[bytes, int] | None = None
    ) -> None:
        """None: remove it."""
        self.check_open()
        if self.is_read_only:
            raise UsageError(self._why_read_only)
        if guard is not None:
            self._guards[guard] = None
        self._writes.pop((name, key), None)
        self._writes[(name, key)] = value

    def guard(self, guard: tuple[bytes, int]) -> None:
        self.check_open()
        self._guards[guard] = None

    def release(self, lock: bytes, sequence: int) -> None:
        self.check_open()
        self._releases[(lock, sequence)] = None

    def check_open(self) -> None:
        if self._pid != os.getpid():
            raise ForkedError(
                "this transaction belongs to the parent process, where it goes on; begin another one here"
            )
        if self.has_ended:
            raise UsageError(
                "the transaction has ended, and this task was begun in it: begin tasks that outlive it before it, or with "
                "context=contextvars.Context()"
            )

    # -- savepoints and the end

    def save(self) -> Any:
        return dict(self._writes), dict(self._guards), dict(self._releases)

    def restore(self, saved: Any) -> None:
        """Writes are as they were; what was read stays read, and stays a condition."""
        self._writes, self._guards, self._releases = (dict(part) for part in saved)

    @property
    def has_writes(self) -> bool:
        return bool(self._writes or self._releases)

    def _read_conditions(self) -> list[Any]:
        return self._conditions(lambda name, key: True)

    def _conditions(self, is_wanted: Any) -> list[Any]:
        found: list[Any] = [
            commands.map_is_at(name, revision)
            for name, (revision, _) in self._scans.items()
            if is_wanted(name, None)
        ]
        found += [
            commands.key_is_at(name, key, mod)
            for (name, key), (_, mod) in self._reads.items()
            if name not in self._scans and is_wanted(name, key)
        ]
        return found

    def change(self, *, has_branches: bool) -> StateChange:
        """
        What the decision is to carry. Nothing, if all was read at one revision and nothing depends on what it is now.
        """
        if not self.has_writes and not has_branches:
            return StateChange(guards=tuple(self._guards)) if self._guards else StateChange()
        if self._is_serializable:
            conditions = self._read_conditions()
        else:
            # Snapshot isolation: of what it writes nobody else may have written since; what it only read may change.
            written = set(self._writes)
            names = {name for name, _ in written}
            conditions = self._conditions(
                lambda name, key: (name, key) in written if key is not None else name in names
            )
        writes = tuple(
            commands.delete_key(name, key) if value is None else commands.put_key(name, key, value)
            for (name, key), value in self._writes.items()
        )
        return StateChange(
            guards=tuple(self._guards),
            conditions=tuple(conditions),
            writes=writes,
            releases=tuple(self._releases),
        )
