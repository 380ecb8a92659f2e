"""Drives a machine with a log, as a node would: commands in, replies and effects out."""

from __future__ import annotations

from typing import Any

from coordlib.machine import Applied, Effect, Limits, Machine, commands, decode_reply, pack_entry


class Driver:
    """A machine, the log it was given, and the sequence numbers of its sessions."""

    def __init__(self, limits: Limits | None = None, machine: Machine | None = None) -> None:
        self.machine = machine or Machine(
            limits, initial_members=(("a", "tcp://a:1", b""), ("b", "tcp://b:1", b""))
        )
        self.index = self.machine.applied_index
        self.now_ms = 1000
        self.log: list[tuple[int, bytes]] = []
        self.sequences: dict[int, int] = {}
        self.opened = 0

    def entry(self, data: bytes) -> Applied:
        """Apply the data of an entry at the next index."""
        self.index += 1
        self.log.append((self.index, data))
        return self.machine.apply(self.index, 1, data)

    def apply(
        self, session: int, operation: bytes, *, sequence: int | None = None, acknowledged: int = 0
    ) -> Applied:
        """Apply an operation of a session, by default as its next request."""
        if sequence is None:
            sequence = self.sequences.get(session, 0) + 1 if session else 0
        if session:
            self.sequences[session] = max(sequence, self.sequences.get(session, 0))
        return self.entry(pack_entry(self.now_ms, session, sequence, acknowledged, operation))

    def run(self, session: int, operation: bytes, **how: int) -> list[Any]:
        """Apply an operation; its results, or the error it was answered with."""
        return decode_reply(self.apply(session, operation, **how).reply)

    def effects(self, session: int, operation: bytes, **how: int) -> list[Effect]:
        """Apply an operation, which must succeed; its effects."""
        applied = self.apply(session, operation, **how)
        decode_reply(applied.reply)
        return list(applied.effects)

    def open(self, owner: str = "worker", ttl_ms: int = 10_000) -> int:
        """Open a session."""
        self.opened += 1
        nonce = b"%016d" % self.opened
        (session,) = self.run(0, commands.open_session(nonce, ttl_ms, owner))
        assert isinstance(session, int)
        return session

    def last(self, session: int) -> int:
        """The sequence of the session's last request."""
        return self.sequences[session]

    def ask(self, query: bytes) -> list[Any]:
        """The results of a query, or the error it was answered with."""
        return decode_reply(self.machine.query(query))

    def replay(self, limits: Limits | None = None) -> Machine:
        """Another machine that was given the same log."""
        other = Driver(limits).machine
        for index, data in self.log:
            other.apply(index, 1, data)
        return other


def snapshot(machine: Machine, size_bytes_max: int = 4096) -> bytes:
    """All of a snapshot."""
    source = machine.begin_snapshot()
    parts = []
    while (data := source.next(size_bytes_max)) is not None:
        parts.append(data)
    source.close()
    return b"".join(parts)


def restore(data: bytes, machine: Machine | None = None, slice_size: int = 1000) -> Machine:
    """A machine restored from a snapshot that was fed in slices."""
    machine = machine or Machine()
    sink = machine.begin_restore()
    for begin in range(0, len(data), slice_size):
        sink.feed(data[begin : begin + slice_size])
    sink.finish()
    return machine
