"""psycopg cursors that notice when something may have been written: a guess at no cost, from the tags of the answers.

They also refuse a connection that somebody has kept: it waits for the next transaction.

A SELECT of a function that writes looks like one that does not. Whoever asks must be right with a wrong answer, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Self

import psycopg

from coordlib.txn.resources.common import HAS_ENDED

__all__ = ["AsyncCursor", "Cursor", "expect_reads", "has_written", "lend", "take_back", "watch"]

_READS: Final = frozenset(
    ("SELECT", "SHOW", "SET", "FETCH", "DECLARE", "CLOSE", "SAVEPOINT", "RELEASE", "EXPLAIN")
)
_FLAG: Final = "_coordlib_has_written"


def watch(connection: Any) -> None:
    """Have a new connection make these cursors, if it has no others of its own."""
    if connection.cursor_factory is psycopg.Cursor:
        connection.cursor_factory = Cursor
    elif connection.cursor_factory is psycopg.AsyncCursor:
        connection.cursor_factory = AsyncCursor


def expect_reads(connection: Any) -> None:
    """From now on it is to be noticed."""
    connection.__dict__[_FLAG] = connection.cursor_factory not in (Cursor, AsyncCursor)


def has_written(connection: Any) -> bool:
    """Whether something may have been written since; yes, if nobody was looking."""
    return bool(connection.__dict__.get(_FLAG, True))


def take_back(connection: Any) -> None:
    """It is nobody's until it is lent again."""
    connection.__dict__[_FLAG] = None


def lend(connection: Any) -> None:
    connection.__dict__.pop(_FLAG, None)


def _check_lent(cursor: Any) -> None:
    if cursor.connection.__dict__.get(_FLAG, True) is None:
        raise psycopg.ProgrammingError(HAS_ENDED)


def _note(cursor: Any) -> None:
    message = cursor.statusmessage  # none: in a pipeline, where it is not known yet
    if message is None or message.partition(" ")[0] not in _READS:
        cursor.connection.__dict__[_FLAG] = True


def _note_written(cursor: Any) -> None:
    cursor.connection.__dict__[_FLAG] = True


class Cursor(psycopg.Cursor[Any]):
    """As its parent."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        _check_lent(self)
        super().execute(query, params, **options)
        _note(self)
        return self

    def executemany(self, query: Any, params_seq: Iterable[Any], **options: Any) -> None:
        _check_lent(self)
        _note_written(self)
        super().executemany(query, params_seq, **options)

    def copy(self, *args: Any, **options: Any) -> Any:
        _check_lent(self)
        _note_written(self)
        return super().copy(*args, **options)


class AsyncCursor(psycopg.AsyncCursor[Any]):
    """As its parent."""

    async def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        _check_lent(self)
        await super().execute(query, params, **options)
        _note(self)
        return self

    async def executemany(self, query: Any, params_seq: Iterable[Any], **options: Any) -> None:
        _check_lent(self)
        _note_written(self)
        await super().executemany(query, params_seq, **options)

    def copy(self, *args: Any, **options: Any) -> Any:
        _check_lent(self)
        _note_written(self)
        return super().copy(*args, **options)
