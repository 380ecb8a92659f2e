"""Which session hosts which service. A registration ends with its session.

What must not live here: sessions (whose owner is asked for through a callable), and how a service is reached.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from coordlib.cbor import decode, encode
from coordlib.errors import invariant
from coordlib.machine.effects import Effect, Meta
from coordlib.machine.limits import Limits, exceeded
from coordlib.machine.table import BytesTable, Reclaimer

__all__ = ["Services"]

_SESSION = struct.Struct(">Q")
_ROWS_MAX = 1000

Result: TypeAlias = tuple[Any, ...]


class Services:
    """(service, session) -> instance, a text that tells hosts apart, and since when."""

    __slots__ = ("_by_session", "_limits", "_owner_of", "_sessions_of", "table")

    def __init__(self, limits: Limits, reclaimer: Reclaimer, *, owner_of: Callable[[int], str]) -> None:
        self._limits = limits
        self._owner_of = owner_of
        self.table = BytesTable(reclaimer)  # >Q session and service -> instance, log_time
        # Both derived from the table; never iterated without sorting.
        self._by_session: dict[int, dict[str, None]] = {}
        self._sessions_of: dict[str, dict[int, None]] = {}

    def check_register(self, session: int, args: list[Any]) -> None:
        """
        Refuse a registration too many.

        Raises:
            QuotaExceeded: Names the limit: of this session, or of all.
        """
        mine = self._by_session.get(session, {})
        if args[1] in mine:
            return
        if len(mine) >= self._limits.session_services_max:
            raise exceeded("session_services_max", self._limits.session_services_max, len(mine) + 1)
        if len(self.table) >= self._limits.services_max:
            raise exceeded("services_max", self._limits.services_max, len(self.table) + 1)

    def register(
        self, meta: Meta, session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        self.check_register(session, args)
        _, service, instance = args
        key = _key(session, service)
        record = self.table.get(key)
        if record is None or decode(record)[0] != instance:
            self.table.put(key, encode((instance, meta.now_ms)))
            self._note(session, service)
        return (0, record is None)

    def unregister(
        self, _meta: Meta, session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> Result:
        return (0, self._remove(session, args[1]))

    def end_sessions(self, sessions: Iterable[int]) -> None:
        """Forget what was registered by sessions that are no longer alive."""
        for session in sessions:
            for service in sorted(self._by_session.get(session, ())):
                self._remove(session, service)

    def query(self, args: list[Any]) -> Result:
        _, wanted, after, limit = args
        limit = max(1, min(limit, _ROWS_MAX))
        start = None if after is None else (after[0], after[1])
        names = sorted(self._sessions_of) if wanted is None else [wanted]
        rows: list[Result] = []
        for name in names:
            if start is not None and name < start[0]:
                continue
            for session in sorted(self._sessions_of.get(name, ())):
                if start is not None and (name, session) <= start:
                    continue
                if len(rows) == limit:
                    return (0, rows, True)
                record = self.table.get(_key(session, name))
                assert record is not None
                instance, since_ms = decode(record)
                rows.append((name, session, self._owner_of(session), instance, since_ms))
        return (0, rows, False)

    def load(self, key: bytes, record: bytes) -> None:
        """Take a record of a snapshot."""
        self.table.put(key, record)
        self._note(_SESSION.unpack(key[: _SESSION.size])[0], key[_SESSION.size :].decode())

    def check_invariants(self, is_alive: Callable[[int], bool]) -> None:
        """For tests: what is derived agrees with the table, and everybody who is registered is alive."""
        seen = set()
        view = self.table.view()
        for key, _ in view.drain():
            seen.add((_SESSION.unpack(key[: _SESSION.size])[0], key[_SESSION.size :].decode()))
        view.close()
        by_session = {(session, name) for session, names in self._by_session.items() for name in names}
        by_name = {(session, name) for name, sessions in self._sessions_of.items() for session in sessions}
        invariant(seen == by_session == by_name, "an index of the services differs from the table")
        invariant(all(self._by_session.values()) and all(self._sessions_of.values()), "an empty index")
        invariant(all(is_alive(session) for session, _ in seen), "a service of a session that is gone")

    def _note(self, session: int, service: str) -> None:
        self._by_session.setdefault(session, {})[service] = None
        self._sessions_of.setdefault(service, {})[session] = None

    def _remove(self, session: int, service: str) -> bool:
        if self.table.delete(_key(session, service)) is None:
            return False
        mine = self._by_session[session]
        del mine[service]
        if not mine:
            del self._by_session[session]
        others = self._sessions_of[service]
        del others[session]
        if not others:
            del self._sessions_of[service]
        return True


def _key(session: int, service: str) -> bytes:
    return _SESSION.pack(session) + service.encode()
