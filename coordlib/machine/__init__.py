"""The replicated state machine: log entries in, replies and effects out, the same on every member.

`Machine` alone composes the kinds of state (sessions, locks, maps, ids, transactions, services,
members); they do not know each other. It
has no clock, no randomness and does no I/O: time is the log's (`Meta.now_ms`). What it does with an entry
depends on nothing but the entries before it.

An entry is checked completely before it is appended (`check`) and again before anything is changed (`apply`).
What a command got wrong is its reply, the same everywhere, never an exception: an entry that raised would
stop every member at every restart. Replies are kept for retries, so the texts of errors are state too: like numbers and
shapes of commands, they are changed only together with a format version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from coordlib.cbor import encode
from coordlib.errors import CoordError, FatalError, InvariantViolation, RemoteProtocolError, invariant
from coordlib.machine import commands
from coordlib.machine.commands import (
    OpCode,
    QueryCode,
    StaleRequest,
    UnknownCommand,
    decode_operation,
    decode_query,
    decode_reply,
    encode_error,
    is_internal,
    pack_entry,
    unpack_entry,
)
from coordlib.machine.effects import (
    Applied,
    Effect,
    LockGranted,
    LockWithdrawn,
    MembersChanged,
    Meta,
    SessionEnded,
    SessionOpened,
)
from coordlib.machine.ids import Ids
from coordlib.machine.kv import CURSOR_IDLE_MS_MAX, Maps
from coordlib.machine.ledger import packed
from coordlib.machine.limits import Limits
from coordlib.machine.locks import Locks
from coordlib.machine.members import Members
from coordlib.machine.services import Services
from coordlib.machine.sessions import LiveSession, Sessions
from coordlib.machine.snapshots import (
    Block,
    SnapshotSink,
    SnapshotSource,
    UnknownSnapshot,
    pack_block,
    pack_records,
)
from coordlib.machine.table import BytesTable, Reclaimer, View
from coordlib.machine.transactions import Transactions

__all__ = [
    "Applied",
    "Effect",
    "Limits",
    "LiveSession",
    "LockGranted",
    "LockWithdrawn",
    "Machine",
    "MembersChanged",
    "Meta",
    "SessionEnded",
    "SessionOpened",
    "SnapshotSink",
    "SnapshotSource",
    "StaleRequest",
    "UnknownCommand",
    "UnknownSnapshot",
    "commands",
    "decode_reply",
    "encode_error",
    "is_internal",
    "pack_entry",
    "unpack_entry",
]

_CHECKED_MAX = 4096
_CHECKED_SIZE_BYTES_MAX = 4096
_OUTSIDE_OF_SESSIONS = frozenset(
    (
        OpCode.SESSION_OPEN,
        OpCode.SESSION_EXPIRE,
        OpCode.SESSION_CHECKPOINT,
        OpCode.RECORD_DISK,
        OpCode.BEGIN_EPOCH,
    )
)
_TIME_QUERIES = frozenset((QueryCode.TIME, QueryCode.TX_CLOCK))
_GROWING = frozenset(
    (
        OpCode.MAP_PUT,
        OpCode.MAP_INSERT,
        OpCode.MAP_SETDEFAULT,
        OpCode.MAP_UPDATE,
        OpCode.MAP_COMPARE_AND_SET,
    )
)

_Handler = Callable[[Meta, int, int, list[Any], list[Effect]], tuple[Any, ...]]


class _Parts(NamedTuple):
    limits: Limits
    sessions: Sessions
    locks: Locks
    maps: Maps
    members: Members
    ids: Ids
    transactions: Transactions
    services: Services


def _new_parts(
    limits: Limits, reclaimer: Reclaimer, initial_members: tuple[tuple[str, str, bytes], ...] = ()
) -> _Parts:
    sessions = Sessions(limits, reclaimer)
    locks = Locks(limits, reclaimer, is_alive=sessions.is_alive, owner_of=sessions.owner_of)
    maps = Maps(limits, reclaimer, check_guard=locks.check_guard)
    members = Members(reclaimer, initial_members)
    ids = Ids(limits, reclaimer, owner_of=sessions.owner_of)

    def release(
        meta: Meta, session: int, sequence: int, lock: bytes, acquisition: int, effects: list[Effect]
    ) -> None:
        # The same as the command, for one that is part of another.
        locks.release(meta, session, sequence, [OpCode.RELEASE, lock, acquisition], effects)
        owner = sessions.get(session)
        if owner is not None and acquisition < sequence:
            sessions.forbid(owner, acquisition)

    transactions = Transactions(
        limits,
        reclaimer,
        store=maps,
        check_guard=locks.check_guard,
        release=release,
        is_alive=sessions.is_alive,
    )
    services = Services(limits, reclaimer, owner_of=sessions.owner_of)
    return _Parts(limits, sessions, locks, maps, members, ids, transactions, services)


class Machine:
    """
    See the module's docstring. Not thread-safe.

    `sessions`, `limits` and everything else that is read through an attribute is replaced by a restore: read it
    from the machine each time.

    Args:
        limits: Of a new cluster. A restored snapshot brings its own.
        initial_members: (node, endpoint, disk id or empty) of a new cluster, the same on every member.
    """

    __slots__ = (
        "_checked",
        "_duplicates",
        "_errors",
        "_handlers",
        "_ids",
        "_locks",
        "_maps",
        "_members",
        "_queries",
        "_reclaimer",
        "_refused",
        "_services",
        "_snapshots",
        "_transactions",
        "applied_index",
        "limits",
        "log_time_ms",
        "sessions",
    )

    sessions: Sessions

    def __init__(
        self, limits: Limits | None = None, *, initial_members: tuple[tuple[str, str, bytes], ...] = ()
    ) -> None:
        self.applied_index = 0
        self.log_time_ms = 0
        self._reclaimer = Reclaimer()
        # What `check` has decoded, for `apply` to use when it is given the very same operation.
        self._checked: dict[tuple[int, int], tuple[bytes, list[Any]]] = {}
        self._duplicates = 0
        self._errors = 0
        self._refused = 0
        self._snapshots = 0
        self._install(_new_parts(Limits() if limits is None else limits, self._reclaimer, initial_members))

    def _install(self, parts: _Parts) -> None:
        self.limits, self.sessions, self._locks, self._maps, self._members, self._ids = parts[:6]
        self._transactions, self._services = parts[6:]
        sessions, locks, maps, members, ids, transactions, services = parts[1:]
        self._handlers: dict[int, _Handler] = {
            OpCode.SESSION_OPEN: sessions.open,
            OpCode.SESSION_CLOSE: self._close_session,
            OpCode.SESSION_EXPIRE: self._expire_sessions,
            OpCode.SESSION_CHECKPOINT: sessions.checkpoint,
            OpCode.RECORD_DISK: members.record_disk,
            OpCode.BEGIN_EPOCH: locks.begin_epoch,
            OpCode.ACQUIRE: locks.acquire,
            OpCode.RELEASE: locks.release,
            OpCode.BREAK: locks.break_,
            OpCode.MAP_PUT: maps.put,
            OpCode.MAP_INSERT: maps.insert,
            OpCode.MAP_SETDEFAULT: maps.setdefault,
            OpCode.MAP_DELETE: maps.delete,
            OpCode.MAP_POP: maps.pop,
            OpCode.MAP_POPITEM: maps.popitem,
            OpCode.MAP_UPDATE: maps.update,
            OpCode.MAP_CLEAR: maps.clear,
            OpCode.MAP_COMPARE_AND_SET: maps.compare_and_set,
            OpCode.IDS_LEASE: ids.lease,
            OpCode.IDS_RENEW: ids.renew,
            OpCode.IDS_RETURN: ids.return_,
            OpCode.IDS_SKIP: ids.skip,
            OpCode.TX_DECIDE: transactions.decide,
            OpCode.TX_RESOLVE: transactions.resolve,
            OpCode.TX_FORGET: transactions.forget,
            OpCode.TX_HEURISTIC: transactions.heuristic,
            OpCode.TX_SKIP: transactions.skip,
            OpCode.SERVICE_REGISTER: services.register,
            OpCode.SERVICE_UNREGISTER: services.unregister,
        }
        self._queries: dict[int, Callable[[list[Any]], tuple[Any, ...]]] = {
            QueryCode.GET: maps.get,
            QueryCode.GET_META: maps.get_meta,
            QueryCode.CONTAINS: maps.contains,
            QueryCode.LEN: maps.length,
            QueryCode.RANGE: self._scan,
            QueryCode.MAPS: maps.listing,
            QueryCode.LOCK_INFO: locks.info,
            QueryCode.LOCK_LIST: locks.listing,
            QueryCode.ACQUISITION: locks.acquisition,
            QueryCode.MEMBERS: members.query,
            QueryCode.IDS_INFO: self._ids_info,
            QueryCode.IDS_OWNER: ids.owner,
            QueryCode.IDS_LIST: ids.listing,
            QueryCode.TX_STATE: self._tx_state,
            QueryCode.TX_LIST: transactions.listing,
            QueryCode.TX_HEURISTICS: transactions.heuristics_listing,
            QueryCode.TIME: self._time,
            QueryCode.TX_READ: self._tx_read,
            QueryCode.TX_CLOCK: self._tx_clock,
            QueryCode.SERVICES: services.query,
        }

    # --- before append ------------------------------------------------------------------------------------

    def check(
        self,
        session: int,
        sequence: int,
        acknowledged: int,
        operation: bytes,
        pending: int = 0,
        pending_bytes: int = 0,
    ) -> None:
        """
        Refuse what must not be appended. Changes nothing.

        It is no promise: what was appended before is applied first, and may change the outcome.

        Args:
            pending: Commands of this session that were appended and are not yet applied.
            pending_bytes: Size of all operations that were appended and are not yet applied.

        Raises:
            RemoteProtocolError: Not an operation, of a newer version, or in the wrong place.
            UsageError: An argument is out of its range.
            QuotaExceeded: A limit would be exceeded; it is named.
            Overloaded: The session has too many unanswered requests.
            SessionExpired, StaleRequest: It would not be executed.
        """
        try:
            args = decode_operation(operation, self.limits)
        except UnknownCommand as error:
            raise RemoteProtocolError(error.message, **error.details) from error
        opcode = args[0]
        if (opcode in _OUTSIDE_OF_SESSIONS) != (session == 0):
            raise RemoteProtocolError(f"command {opcode} in session {session}")
        if session:
            self.sessions.check(session, sequence, acknowledged, pending)
        elif opcode == OpCode.SESSION_OPEN:
            self.sessions.check_open(args[1])
        if opcode in _GROWING:
            self._maps.check_growth(args, pending_bytes)
        elif opcode == OpCode.ACQUIRE:
            self._locks.check_acquire(session, args)
        elif opcode == OpCode.IDS_LEASE:
            self._ids.check_lease(args)
        elif opcode == OpCode.TX_DECIDE:
            self._transactions.check_decide(args, pending_bytes)
        elif opcode == OpCode.SERVICE_REGISTER:
            self._services.check_register(session, args)
        if session and len(operation) <= _CHECKED_SIZE_BYTES_MAX:
            if len(self._checked) >= _CHECKED_MAX:
                self._checked.clear()
            self._checked[(session, sequence)] = (operation, args)

    def lookup(self, session: int, sequence: int) -> bytes | None:
        """
        The reply of a request that was applied already; None if it was not.

        Raises:
            SessionExpired: The session is gone, or never was.
            StaleRequest: The session has said that it has the reply.
        """
        return self.sessions.lookup(session, sequence)

    # --- applying -----------------------------------------------------------------------------------------

    def apply(self, index: int, term: int, data: bytes) -> Applied:
        """
        Apply the command at `index`, which must be greater than any before.

        Raises:
            UnknownCommand: It is of a newer version. Nothing was changed: stop the node.
            InvariantViolation: A bug. The state is not to be trusted: stop the node.
        """
        entry_ms, session_id, sequence, acknowledged, operation = unpack_entry(data)
        invariant(index > self.applied_index, "entry %d applied after %d", index, self.applied_index)
        error: CoordError | None = None
        args: list[Any] = []
        checked = self._checked.pop((session_id, sequence), None)
        if checked is not None and checked[0] == operation:
            args = checked[1]
        else:
            try:
                args = decode_operation(operation, self.limits)
            except UnknownCommand:
                raise
            except CoordError as exc:
                error = exc
        # Nothing has been changed above this line.
        self.applied_index = index
        now_ms = self.log_time_ms
        if entry_ms > now_ms:
            self.log_time_ms = now_ms = entry_ms
        effects: list[Effect] = []
        session = None
        try:
            if session_id:
                begun = self.sessions.begin(session_id, sequence, acknowledged)
                if isinstance(begun, bytes):
                    self._duplicates += 1
                    return Applied(session_id, sequence, begun, ())
                session = begun
                if self.sessions.is_overloaded(session):
                    self._refused += 1
                    error = self.sessions.refusal()
        except CoordError as exc:
            # Not executed, and not to be remembered either: there is no session to remember it in.
            self._refused += 1
            return Applied(session_id, sequence, encode_error(exc), ())
        try:
            if error is not None:
                raise error
            opcode = args[0]
            if (opcode in _OUTSIDE_OF_SESSIONS) != (session is None):
                raise RemoteProtocolError(f"command {opcode} in session {session_id}")
            meta = Meta(index, term, now_ms)
            reply = encode(self._handlers[opcode](meta, session_id, sequence, args, effects))
        except FatalError:
            raise
        except CoordError as exc:
            self._errors += 1
            reply = encode_error(exc)
        except Exception as exc:
            # Justification: whatever it is, part of the command may have been carried out.
            raise InvariantViolation(f"entry {index} could not be applied: {exc!r}", index=index) from exc
        if session is not None and self.sessions.is_alive(session_id):
            self.sessions.finish(session, sequence, reply)
            if args and args[0] == OpCode.RELEASE and args[2] < sequence:
                self.sessions.forbid(session, args[2])
            if self.sessions.is_hopeless(session):
                self._end_sessions([session_id], "overloaded", now_ms, effects)
        return Applied(session_id, sequence, reply, tuple(effects))

    def skip(self, index: int) -> None:
        """Pass over an entry that is no command (a leader's no-op, a configuration)."""
        invariant(index > self.applied_index, "entry %d applied after %d", index, self.applied_index)
        self.applied_index = index

    def _close_session(
        self, meta: Meta, session: int, _sequence: int, _args: list[Any], effects: list[Effect]
    ) -> tuple[Any, ...]:
        self._end_sessions([session], "closed", meta.now_ms, effects)
        return (0,)

    def _expire_sessions(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], effects: list[Effect]
    ) -> tuple[Any, ...]:
        return (0, self._end_sessions(args[1], "expired", meta.now_ms, effects))

    def _end_sessions(self, sessions: list[int], reason: str, now_ms: int, effects: list[Effect]) -> int:
        # All are dead before anything is granted to anybody.
        ended = [session for session in sorted(set(sessions)) if self.sessions.remove(session)]
        self._locks.end_sessions(ended, now_ms, effects)
        self._services.end_sessions(ended)
        effects.extend([SessionEnded(session, reason) for session in ended])
        return len(ended)

    # --- reading ------------------------------------------------------------------------------------------

    def query(self, query: bytes, log_now: Callable[[], int] | None = None) -> bytes:
        """
        The reply to a query, an error being one. Changes nothing that is replicated.

        Args:
            log_now: What would be logged as the time now, where anybody knows: for TIME and TX_CLOCK, which else tell when
                the last command was logged. Nothing else may be answered by it: a command of an earlier time may yet come.
        """
        try:
            args = decode_query(query, self.limits)
            reply = self._queries[args[0]](args)
            if args[0] in _TIME_QUERIES and log_now is not None:
                reply = (0, max(self.log_time_ms, log_now()), *reply[2:])
            return encode(reply)
        except CoordError as exc:
            return encode_error(_as_remote(exc))

    def wait_condition(self, query: bytes) -> bytes | None:
        """
        The reply to a query that waits, if what it waits for has come; None if it has not.

        An ACQUISITION waits to be no longer queued: held, or gone. Any other query gets an error.
        """
        try:
            args = decode_query(query, self.limits)
            if args[0] != QueryCode.ACQUISITION:
                raise RemoteProtocolError(f"query {args[0]} is none that can be waited for")
            if self._locks.is_waiting(args):
                return None
            return encode(self._locks.acquisition(args))
        except CoordError as exc:
            return encode_error(_as_remote(exc))

    def members(self) -> list[tuple[str, str, bytes]]:
        """(node, endpoint, disk id) of every member, sorted by node."""
        return self._members.all()

    @property
    def restore_epoch(self) -> int:
        return self._locks.epoch

    @property
    def counters(self) -> dict[str, int]:
        """What this machine holds and has done, by stable names. Not replicated as a whole."""
        return {
            "applied_index": self.applied_index,
            "duplicates": self._duplicates,
            "refused": self._refused,
            "errors": self._errors,
            "sessions": len(self.sessions),
            "replies_bytes": self.sessions.replies_bytes,
            "locks": len(self._locks.table),
            "acquisitions": self._locks.acquisitions,
            "grants": self._locks.counter,
            "maps": len(self._maps.maps),
            "keys": self._maps.keys,
            "state_bytes": self._maps.size_bytes,
            "cursors": self._maps.cursors,
            "id_generators": len(self._ids.layouts),
            "id_workers": len(self._ids.workers),
            **self._transactions.counters,
            "services": len(self._services.table),
            "snapshots_open": self._snapshots,
            "garbage_buckets": len(self._reclaimer),
        }

    def _scan(self, args: list[Any]) -> tuple[Any, ...]:
        return self._maps.scan(args, self.log_time_ms)

    def _ids_info(self, args: list[Any]) -> tuple[Any, ...]:
        return self._ids.info(args, self.log_time_ms)

    def _tx_state(self, args: list[Any]) -> tuple[Any, ...]:
        return self._transactions.state(args, self.log_time_ms)

    def _tx_read(self, args: list[Any]) -> tuple[Any, ...]:
        return (*self._maps.read_with(args), self.applied_index)

    def _tx_clock(self, _args: list[Any]) -> tuple[Any, ...]:
        return (0, self.log_time_ms, self.limits.tx_lifetime_ms, self._transactions.horizon_ms)

    def _time(self, _args: list[Any]) -> tuple[Any, ...]:
        return (0, self.log_time_ms)

    # --- housekeeping -------------------------------------------------------------------------------------

    def free_slice(self, buckets: int = 4) -> bool:
        """
        Free a little of what was let go of, and idle cursors. True if there is more. To be called between
        rounds.

        At a million keys in one table that was cleared, four buckets take a millisecond or two.
        """
        self._maps.close_cursors(self.log_time_ms - CURSOR_IDLE_MS_MAX)
        return self._reclaimer.free(buckets)

    def close_cursors(self) -> None:
        """Give up all iterations in progress; on losing the leadership, for example."""
        self._maps.close_cursors()

    # --- snapshots ----------------------------------------------------------------------------------------

    def begin_snapshot(self) -> SnapshotSource:
        """
        A snapshot of the state as it is now. Commands may be applied while it is read.

        It takes no time that depends on the number of keys. Any number may be open. To be closed.
        """
        views: list[View] = [
            self._members.table.view(),
            self.sessions.table.view(),
            self._locks.table.view(),
            self._ids.layouts.view(),
            self._ids.workers.view(),
            self._transactions.outcomes.view(),
            self._transactions.heuristics.view(),
            self._services.table.view(),
        ]
        ledgers = [
            (Block.TX_FINISHED, self._transactions.finished.blocks()),
            (Block.TX_ABORTED, self._transactions.aborted.blocks()),
        ]
        maps: list[tuple[bytes, int, View]] = []
        for name in sorted(self._maps.maps):
            found = self._maps.maps[name]
            maps.append((name, found.revision, found.table.view()))
        views += [view for _, _, view in maps]
        header = b"".join(
            [
                pack_block(
                    Block.HEADER,
                    self.applied_index,
                    self.log_time_ms,
                    list(self.limits),
                    self._locks.epoch,
                    self._locks.counter,
                ),
                pack_block(
                    Block.IDS, self._ids.floor_ms, self._ids.last_lease, self._ids.fence, self._ids.ahead_ms
                ),
                pack_block(Block.TRANSACTIONS, self._transactions.horizon_ms, self._transactions.close_ms),
            ]
        )
        self._snapshots += 1

        def close() -> None:
            self._snapshots -= 1
            for view in views:
                view.close()

        return SnapshotSource(_blocks(header, views, ledgers, maps), close)

    def begin_restore(self) -> SnapshotSink:
        """Begin to replace the state; until `finish` it stays what it is and may be used."""
        restore = _Restore(self._reclaimer)

        def finish() -> None:
            parts = restore.parts
            if parts is None:
                raise RemoteProtocolError("the snapshot has no header")
            self._retire()
            self._install(parts)
            self._checked.clear()
            self.applied_index = restore.applied_index
            self.log_time_ms = restore.log_time_ms

        return SnapshotSink(restore.load, finish)

    def _retire(self) -> None:
        self._maps.retire()
        for table in (self.sessions.table, self._locks.table, self._members.table):
            table.clear()
        self._ids.layouts.clear()
        self._ids.workers.clear()
        self._transactions.outcomes.clear()
        self._transactions.heuristics.clear()
        self._services.table.clear()

    def digest(self) -> bytes:
        """
        A hash over the whole canonical state: equal on two machines if and only if they agree. Takes long.
        """
        source = self.begin_snapshot()
        digest = hashlib.sha256()
        try:
            while True:
                data = source.next(1 << 20)
                if data is None:
                    return digest.digest()
                digest.update(data)
        finally:
            source.close()

    def check_invariants(self) -> None:
        """For tests and the simulator: everything derived agrees with what it is derived from. Takes long."""
        self._locks.check_invariants()
        self._ids.check_invariants()
        self._transactions.check_invariants()
        self._services.check_invariants(self.sessions.is_alive)
        self._maps.check_invariants()
        self.sessions.check_invariants()


class _Restore:
    """A new state in the making."""

    def __init__(self, reclaimer: Reclaimer) -> None:
        self._reclaimer = reclaimer
        self._table: BytesTable | None = None
        self.parts: _Parts | None = None
        self.applied_index = 0
        self.log_time_ms = 0

    def load(self, kind: Block, fields: list[Any]) -> int:
        """Take a block; returns how many records it held."""
        if kind is Block.HEADER:
            if self.parts is not None:
                raise RemoteProtocolError("two headers in a snapshot")
            self.applied_index, self.log_time_ms, limits, epoch, counter = fields
            self.parts = _new_parts(Limits(*limits), self._reclaimer)
            self.parts.locks.epoch = epoch
            self.parts.locks.counter = counter
            return 0
        parts = self.parts
        if parts is None:
            raise RemoteProtocolError("a snapshot begins with its header")
        if kind is Block.MAP:
            name, revision = fields
            self._table = parts.maps.begin_map(name, revision)
            return 0
        if kind is Block.IDS:
            parts.ids.floor_ms, parts.ids.last_lease, parts.ids.fence, parts.ids.ahead_ms = fields
            return 0
        if kind is Block.TRANSACTIONS:
            parts.transactions.horizon_ms, parts.transactions.close_ms = fields
            return 0
        (flat,) = fields
        if kind is Block.TX_FINISHED:
            return parts.transactions.finished.load(flat)
        if kind is Block.TX_ABORTED:
            return parts.transactions.aborted.load(flat)
        pairs = zip(flat[::2], flat[1::2], strict=True)
        if kind is Block.ENTRIES:
            table = self._table
            if table is None:
                raise RemoteProtocolError("entries of no map in a snapshot")
            for key, record in pairs:
                parts.maps.load(table, key, record)
        elif kind is Block.SESSIONS:
            for _, record in pairs:
                parts.sessions.load(record)
        elif kind is Block.LOCKS:
            for key, record in pairs:
                parts.locks.load(key, record)
        elif kind is Block.ID_LAYOUTS:
            for key, record in pairs:
                parts.ids.load_layout(key, record)
        elif kind is Block.ID_WORKERS:
            for key, record in pairs:
                parts.ids.load_worker(key, record)
        elif kind is Block.TX_OUTCOMES:
            for key, record in pairs:
                parts.transactions.load(key, record)
        elif kind is Block.TX_HEURISTICS:
            for key, record in pairs:
                parts.transactions.load_heuristic(key, record)
        elif kind is Block.SERVICES:
            for key, record in pairs:
                parts.services.load(key, record)
        else:
            for pair in pairs:
                parts.members.load(pair)
        return len(flat) // 2


_RECORDS = (
    Block.MEMBERS,
    Block.SESSIONS,
    Block.LOCKS,
    Block.ID_LAYOUTS,
    Block.ID_WORKERS,
    Block.TX_OUTCOMES,
    Block.TX_HEURISTICS,
    Block.SERVICES,
)


def _blocks(
    header: bytes,
    views: list[View],
    ledgers: list[tuple[Block, Sequence[bytes]]],
    maps: list[tuple[bytes, int, View]],
) -> Iterator[bytes]:
    yield header
    total = 0
    for kind, view in zip(_RECORDS, views, strict=False):
        for count, block in pack_records(kind, view.drain()):
            total += count
            yield block
    for kind, blocks in ledgers:
        for count, data in packed(blocks):
            total += count
            yield pack_block(kind, data)
    for name, revision, view in maps:
        yield pack_block(Block.MAP, name, revision)
        for count, block in pack_records(Block.ENTRIES, view.drain()):
            total += count
            yield block
    yield pack_block(Block.END, total)


def _as_remote(error: CoordError) -> CoordError:
    """A query of a newer version is answered, not died of: it is in nobody's log."""
    if isinstance(error, UnknownCommand):
        return RemoteProtocolError(error.message, **error.details)
    return error
