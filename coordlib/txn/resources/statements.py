"""Statements of ours on the connections of psycopg 3: what goes past the driver, and what it is told of that.

A blocking connection is polled, so that those of a transaction wait at the same time.

What must not live here: what the statements are for.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import errors as pg
from psycopg.pq import ExecStatus, PipelineStatus, TransactionStatus
from psycopg.pq.abc import PGresult
from psycopg.rows import tuple_row

from coordlib.node.polling import READABLE, WRITABLE, Wait
from coordlib.txn.resources.common import Flow

__all__ = ["Answer", "begin_gen", "exchange_gen", "execute_gen", "prepared_gen", "query_gen"]

_CANCEL_S: Final = 5.0
_HAS_PARTS: Final = hasattr(psycopg.Connection, "_get_tx_start_command")
"""Whether this version of the driver begins a two-phase transaction as we know it."""


class Answer(NamedTuple):
    """To the last one of some statements: its tag, and its first row as text."""

    tag: str
    row: tuple[str | None, ...]


def begin_gen(connection: Any, xid: Any, settings: str) -> Flow[None]:
    """
    Begin a transaction that is the driver's two-phase one, so that it refuses to end it for the application; then the
    settings, in the same message where that can be.
    """
    if not _is_exchanged(connection) or not _HAS_PARTS:
        yield connection.tpc_begin(xid)
        yield from execute_gen(connection, settings)
        return
    # Justification: the driver has no method for that. These are the parts of its tpc_begin().
    connection._tpc = (xid, False)
    yield from exchange_gen(connection, f"{connection._get_tx_start_command().decode()}; {settings}")


def prepared_gen(connection: Any) -> Flow[None]:
    """Have the driver know that its transaction is prepared, and its connection free. Sends nothing."""
    if _HAS_PARTS:
        connection._tpc = None
    else:
        yield connection.tpc_rollback()  # of what is idle: nothing


def execute_gen(connection: Any, sql: str) -> Flow[Answer]:
    """Statements of ours, in the transaction that the connection is in, or in a new one."""
    if _is_exchanged(connection) and connection.pgconn.transaction_status == TransactionStatus.INTRANS:
        return (yield from exchange_gen(connection, sql))
    cursor = connection.cursor(row_factory=tuple_row)
    yield cursor.execute(sql, prepare=False)
    row = (yield cursor.fetchone()) if cursor.description is not None else ()
    return Answer(cursor.statusmessage, row or ())


def _is_exchanged(connection: Any) -> bool:
    """Whether `exchange_gen` can have it."""
    return (
        isinstance(connection, psycopg.Connection) and connection.pgconn.pipeline_status == PipelineStatus.OFF
    )


def exchange_gen(connection: psycopg.Connection[Any], sql: str) -> Flow[Answer]:
    """
    Send statements past the driver, which begins no transaction then, and wait for the answer without blocking.

    Interrupted, it has the server cancel them, and waits for the end of that; if it is interrupted again, it closes
    the connection.

    Raises:
        psycopg.Error: As from the driver.
    """
    pgconn = connection.pgconn
    interrupt: BaseException | None = None
    results: list[PGresult] = []
    with connection.lock:
        pgconn.send_query(sql.encode())
        try:
            while pgconn.flush():
                yield Wait(pgconn.socket, READABLE | WRITABLE)
                pgconn.consume_input()
            while True:
                while pgconn.is_busy():
                    try:
                        yield Wait(pgconn.socket, READABLE)
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        if interrupt is not None:
                            raise
                        interrupt = error
                        with suppress(psycopg.Error):
                            connection.cancel_safe(timeout=_CANCEL_S)
                        continue
                    pgconn.consume_input()
                result = pgconn.get_result()
                if result is None:
                    break
                results.append(result)
        except psycopg.Error:
            raise  # libpq knows that the connection is lost
        except BaseException:
            pgconn.finish()  # nobody would read the answer
            raise
    if interrupt is not None:
        raise interrupt
    for result in results:
        if result.status not in (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK):
            raise pg.error_from_result(result, encoding=connection.info.encoding)
    last = results[-1]
    tag = (last.command_status or b"").decode()
    if not last.ntuples:
        return Answer(tag, ())
    values = [last.get_value(0, column) for column in range(last.nfields)]
    return Answer(tag, tuple([None if value is None else value.decode() for value in values]))


def query_gen(connection: Any, sql: str, parameters: Any = None) -> Flow[Any]:
    """One row, as a tuple whatever the application has set its connection to."""
    cursor = connection.cursor(row_factory=tuple_row)
    yield cursor.execute(sql, parameters)
    return (yield cursor.fetchone())
