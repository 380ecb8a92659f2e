"""`coordlib tx`: which transactions were decided, which are in doubt, and what people have done about those.

What the log knows is asked for here, of the leader. A prepared branch whose database nobody looks after is known to
that database alone: `tx show` takes the name it has there, too, and says what was decided of it.

A decision cannot be changed from here. `resolve --abort` decides what nobody has decided; for everything else it
records what people say they have done, or will do, by hand.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from coordlib.api.cluster import Cluster
from coordlib.cli.ids import time_ms
from coordlib.cli.settings import client_settings
from coordlib.errors import ConditionFailed, KeyMissing, UsageError
from coordlib.machine import commands
from coordlib.machine.commands import TxStatus
from coordlib.node.clock import monotonic_ms, wall_ms
from coordlib.node.driver import ClientDriver
from coordlib.node.operations import OpGen, Step
from coordlib.txn.branches import Finish
from coordlib.txn.gtid import (
    FORMAT_ID,
    GTID_SIZE,
    BranchName,
    bqual_text,
    cluster_tag,
    gtrid_of,
    join_gtid,
    mint_ms_of,
    parse_postgresql_gid,
    postgresql_gid,
    text_of,
)
from coordlib.wire.messages import RequestKind

__all__ = ["run"]

PAGE: Final = 500
READ_MAX: Final = 2 * PAGE
"""Rows that `tx list` reads in vain, at most, before it tries a shorter time; unless more are wanted."""

WINDOW_MS: Final = 1000
AGE_MS_MAX: Final = 60_000
"""In doubt for longer than recovery needs where everybody is there: `tx in-doubt` ends with 1."""


class _Branch(NamedTuple):
    """One that has not obeyed yet, as people can find it in its database."""

    gtid: bytes
    bqual: bytes
    resource: str  # empty: not known
    node: str


class _Heuristic(NamedTuple):
    """A branch that somebody ended by himself."""

    gtid: bytes
    bqual: bytes
    outcome: str
    who: str
    time_ms: int


class _State(NamedTuple):
    """All that the cluster knows of one transaction."""

    gtid: bytes
    status: TxStatus
    reason: str
    revision: int
    is_initiator_alive: bool
    log_time_ms: int
    pending: tuple[_Branch, ...]
    heuristics: tuple[_Heuristic, ...]


class _Tool:
    """A client with the answers that this command needs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        settings = client_settings(arguments, f"tx-{os.getpid()}")
        self.cluster = Cluster._of(lambda: ClientDriver(settings), settings.timing)
        self.who = f"{_user()} by coordlib tx"
        self._timeout_ms = settings.timing.request_timeout_ms

    def __enter__(self) -> _Tool:
        self.cluster.start()
        return self

    @property
    def tag(self) -> bytes:
        """Of this cluster's branches in databases."""
        return cluster_tag(self.cluster._cluster_uuid())

    def __exit__(self, *_: object) -> None:
        self.cluster.close()

    def _ask(self, kind: int, body: bytes) -> Any:
        def operation() -> OpGen[Any]:
            return commands.decode_reply((yield Step(kind, body, monotonic_ms() + self._timeout_ms)))

        return self.cluster._run(operation())

    def query(self, body: bytes) -> Any:
        return self._ask(RequestKind.QUERY, body)

    def command(self, body: bytes) -> Any:
        return self._ask(RequestKind.COMMAND, body)

    def state(self, gtid: bytes) -> _State:
        status, reason, revision, is_alive, log_time_ms, pending, notes = self.query(
            commands.query_tx_state(gtid)
        )
        return _State(
            gtid,
            TxStatus(status),
            reason,
            revision,
            is_alive,
            log_time_ms,
            tuple(_Branch(gtid, bqual, resource, node) for resource, node, bqual in pending),
            tuple(_Heuristic(gtid, *note) for note in notes),
        )

    def rows(self, *, is_only_pending: bool = False, after: bytes | None = None) -> Iterator[Any]:
        """What is remembered of transactions, the oldest first."""
        while True:
            page, is_more = self.query(commands.query_tx_list(after, PAGE, is_only_pending))
            yield from page
            if not is_more or not page:
                return
            after = page[-1][0]

    def heuristics(self) -> Iterator[_Heuristic]:
        after: tuple[bytes, bytes] | None = None
        while True:
            page, is_more = self.query(commands.query_tx_heuristics(after, PAGE))
            yield from (_Heuristic(*row) for row in page)
            if not is_more or not page:
                return
            after = (page[-1][0], page[-1][1])

    def log_time_ms(self) -> int:
        (log_time_ms,) = self.query(commands.query_time())
        return int(log_time_ms)

    def name(self, text: str) -> tuple[bytes, bytes | None]:
        """
        (gtid, bqual) of a transaction as people write it: 32 hexadecimal digits, or PostgreSQL's name of a branch.

        Raises:
            UsageError: It is neither, or a branch of another cluster.
        """
        if text.startswith(f"{FORMAT_ID}_"):
            names = parse_postgresql_gid(self.tag, text)
            if names is None:
                raise UsageError(f"{text} is no branch of a transaction of this cluster")
            return names
        return _digits(text, "a transaction", GTID_SIZE), None

    def statements(self, branch: _Branch, *, is_commit: bool) -> list[str]:
        """By which an administrator ends a branch in its database."""
        verb = "COMMIT" if is_commit else "ROLLBACK"
        gid = postgresql_gid(self.tag, branch.gtid, branch.bqual)
        gtrid, bqual = gtrid_of(self.tag, branch.gtid), bqual_text(branch.bqual)
        return [
            f"PostgreSQL: {verb} PREPARED '{gid}';",
            f"MariaDB:    XA {verb} '{gtrid}','{bqual}',{FORMAT_ID};",
        ]


def run(arguments: argparse.Namespace) -> int:
    actions: dict[str, Callable[[argparse.Namespace, _Tool], int]] = {
        "list": _list,
        "show": _show,
        "in-doubt": _in_doubt,
        "resolve": _resolve,
        "forget": _forget,
        "skip": _skip,
    }
    if arguments.action == "skip" and not arguments.original_is_stopped:
        raise UsageError(_NOT_STOPPED)
    with _Tool(arguments) as tool:
        return actions[arguments.action](arguments, tool)


# --- what there is ------------------------------------------------------------------------------------------


def _list(arguments: argparse.Namespace, tool: _Tool) -> int:
    if arguments.count < 1:
        raise UsageError("-n is 1 or more")
    rows = _newest(tool, arguments.count, is_only_pending=arguments.pending)
    table = [
        {
            "transaction": text_of(gtid),
            "begun": _time(mint_ms_of(gtid)),
            "outcome": TxStatus(status).name.lower(),
            "reason": reason,
            "pending": len(pending),
        }
        for gtid, status, reason, _revision, pending in rows[: arguments.count]
    ]
    if arguments.json:
        print(json.dumps(table))
    elif not table:
        print("no decision of a transaction is remembered" if not arguments.pending else "nothing is pending")
    else:
        _print_table(table)
        if len(rows) > len(table):
            print("... and older ones (-n)")
    return 0


def _newest(tool: _Tool, count: int, *, is_only_pending: bool) -> list[Any]:
    """
    The newest rows, newest first, one more than `count` if there are more.

    There may be millions, and they are told in the order of their names, which begin with the time: so it is asked for what
    is younger than a second, and longer, until that is enough; and for less, if it is far too much.
    """
    now_ms, most = tool.log_time_ms(), max(READ_MAX, 2 * count)
    too_short_ms, too_long_ms, window_ms = 0, 0, WINDOW_MS
    while True:
        since_ms = max(0, now_ms - window_ms)
        is_shortest = window_ms == too_long_ms
        found: deque[Any] = deque(maxlen=count + 1)
        rows = tool.rows(is_only_pending=is_only_pending, after=join_gtid(since_ms, 0, 0))
        for number, row in enumerate(rows, start=1):
            found.append(row)
            if number > most and not is_shortest:
                too_long_ms = window_ms
                break
        else:
            if len(found) > count or not since_ms or is_shortest:
                return list(reversed(found))
            too_short_ms = window_ms
        if not too_long_ms:
            window_ms *= 8
        elif too_long_ms - too_short_ms > 1:
            window_ms = (too_short_ms + too_long_ms) // 2
        else:
            window_ms = too_long_ms


def _show(arguments: argparse.Namespace, tool: _Tool) -> int:
    gtid, bqual = tool.name(arguments.transaction)
    state = tool.state(gtid)
    if arguments.json:
        print(json.dumps(_as_json(state)))
        return 0
    print(f"transaction {text_of(gtid)}, begun {_time(mint_ms_of(gtid))}, {_age(state)} ago")
    print(f"outcome: {_outcome(state)}")
    for branch in state.pending:
        print(f"pending: {_called(branch)}")
        for statement in tool.statements(branch, is_commit=True):
            print(f"    {statement}")
    for note in state.heuristics:
        print(f"ended otherwise: {note.bqual.hex()}: {note.outcome}, {_time(note.time_ms)}, {note.who}")
    if bqual is not None:
        print(_advice(_Branch(gtid, bqual, "", ""), state))
    return 0


def _in_doubt(arguments: argparse.Namespace, tool: _Tool) -> int:
    now_ms = tool.log_time_ms()
    pending = [
        (max(0, now_ms - mint_ms_of(gtid)), _Branch(gtid, bqual, resource, node))
        for gtid, _status, _reason, _revision, branches in tool.rows(is_only_pending=True)
        for resource, node, bqual in branches
    ]
    pending.sort(key=lambda found: (-found[0], found[1]))
    notes = list(tool.heuristics())
    oldest_ms = max((age_ms for age_ms, _ in pending), default=0)
    if arguments.json:
        told = {
            "pending": [{"age_s": round(age_ms / 1000, 1), **_branch_json(one)} for age_ms, one in pending],
            "heuristics": [_note_json(note) for note in notes],
            "oldest_s": round(oldest_ms / 1000, 1),
        }
        print(json.dumps(told))
    else:
        for age_ms, branch in pending:
            print(f"{text_of(branch.gtid)}  committed, not obeyed for {_duration(age_ms)}: {_called(branch)}")
        for note in notes:
            print(
                f"{text_of(note.gtid)}  branch {note.bqual.hex()}: {note.outcome}, {_time(note.time_ms)}, {note.who}"
            )
        if not pending and not notes:
            print("nothing is in doubt as far as the log knows")
        print(
            "branches that are prepared in a database, and not decided, are known there alone: "
            "pg_prepared_xacts, XA RECOVER; `coordlib tx show NAME` says what became of each"
        )
    return 1 if notes or oldest_ms > AGE_MS_MAX else 0


# --- what people decide -------------------------------------------------------------------------------------

_NOT_FORCED: Final = """nothing was changed. What --force would do here:

{what}

A decision by hand can contradict what other branches have done or will do; then the transaction is half done and only
people can repair it. It is for what can never be finished: a database that is gone for good, a last resource whose disk is
lost, an outcome that is no longer kept. While the cluster has a quorum and the databases can be reached, recovery
finishes everything else by itself, within seconds. If you are sure, repeat this with --force"""


def _resolve(arguments: argparse.Namespace, tool: _Tool) -> int:
    gtid, bqual = tool.name(arguments.transaction)
    if arguments.branch is not None:
        bqual = _digits(arguments.branch, "a branch")
    state = tool.state(gtid)
    name = None if bqual is None else BranchName.unpack(bqual)
    if bqual is not None and name is None:
        raise UsageError(
            f"{bqual.hex()} is not the name of a branch: `coordlib tx show` and `tx in-doubt` show it"
        )
    if state.status is TxStatus.NONE and (name is None or not name.decider_tag):
        return _decide(arguments, tool, state)
    return _record(arguments, tool, state, bqual)


def _decide(arguments: argparse.Namespace, tool: _Tool, state: _State) -> int:
    """Of what nobody has decided, the log can only be told that it is aborted."""
    if arguments.is_commit:
        raise ConditionFailed(
            f"transaction {text_of(state.gtid)} is not decided, and cannot be committed by hand: only its initiator knows "
            "whether all have promised, and has the replicated changes. It commits by itself, or not at all: with "
            "--abort, or when anybody in doubt asks for it"
        )
    alive = " (its initiator is alive and will be told so)" if state.is_initiator_alive else ""
    if not arguments.force:
        what = f"abort transaction {text_of(state.gtid)}, which nobody has decided{alive}, for ever and for everybody."
        raise UsageError(_NOT_FORCED.format(what=what))
    status, reason, _revision = tool.command(commands.tx_resolve(state.gtid))
    if status != TxStatus.ABORTED:
        # Its initiator was faster.
        raise ConditionFailed(
            f"transaction {text_of(state.gtid)} was decided meanwhile: {TxStatus(status).name.lower()}. "
            "Nothing was changed"
        )
    print(f"transaction {text_of(state.gtid)} is aborted ({reason}){alive}; whoever is in doubt rolls back")
    return 0


def _record(arguments: argparse.Namespace, tool: _Tool, state: _State, bqual: bytes | None) -> int:
    """What is decided, or not for the log to decide, is ended by hand in its database, and that is put on record."""
    branches = [branch for branch in state.pending if bqual in (None, branch.bqual)]
    if bqual is not None and not branches:
        branches = [_Branch(state.gtid, bqual, "", "")]
    if not branches:
        print(
            f"nothing to do: transaction {text_of(state.gtid)} is {_outcome(state)}, and nothing is pending"
        )
        return 0
    contradicts = {TxStatus.COMMITTED: False, TxStatus.ABORTED: True}.get(state.status) is arguments.is_commit
    verb = "committed" if arguments.is_commit else "rolled back"
    text = "\n".join(
        f"    record branch {branch.bqual.hex()} of {text_of(state.gtid)} as {verb} by hand, and expect nothing more of it"
        for branch in branches
    )
    if contradicts:
        text += f"\n\nThis CONTRADICTS the decision: the transaction is {_outcome(state)}."
    if not arguments.force:
        raise UsageError(_NOT_FORCED.format(what=text))
    outcome = Finish.HEURISTIC_COMMIT if arguments.is_commit else Finish.HEURISTIC_ROLLBACK
    for branch in branches:
        tool.command(commands.tx_heuristic(state.gtid, branch.bqual, outcome.value, tool.who))
        print(
            f"on record: {_called(branch)} {verb} by hand. If its database still holds it prepared, end it there (where the "
            "outcome is not known to anybody, recovery does so, too):"
        )
        for statement in tool.statements(branch, is_commit=arguments.is_commit):
            print(f"    {statement}")
    print(f"when everything is repaired: coordlib tx forget {text_of(state.gtid)}")
    return 0


def _forget(arguments: argparse.Namespace, tool: _Tool) -> int:
    gtid, bqual = tool.name(arguments.transaction)
    if arguments.branch is not None:
        bqual = _digits(arguments.branch, "a branch")
    state = tool.state(gtid)
    notes = [note for note in state.heuristics if bqual in (None, note.bqual)]
    if not notes:
        waits = ". What is pending is not forgotten: see `coordlib tx resolve`" if state.pending else ""
        raise KeyMissing(f"of transaction {text_of(gtid)} no branch is on record that ended otherwise{waits}")
    for note in notes:
        tool.command(commands.tx_heuristic(gtid, note.bqual, "", tool.who))
        print(f"forgotten: branch {note.bqual.hex()}, {note.outcome} of {_time(note.time_ms)}")
    return 0


_NOT_STOPPED: Final = (
    "after a restore from back-up, this lets nobody presume that a transaction was aborted which the original may have "
    "committed. It cannot know of an original that still runs, and goes on to decide. Make sure that none does, its "
    "applications included; then repeat this with --original-is-stopped"
)


def _skip(arguments: argparse.Namespace, tool: _Tool) -> int:
    log_time_ms, lifetime_ms, _ = tool.query(commands.query_tx_clock())
    not_before_ms = 0 if arguments.not_before is None else time_ms(arguments.not_before)
    # Whatever was decided had been minted no further ahead of the time than the longest life of a transaction.
    wanted_ms = max(log_time_ms, wall_ms(), not_before_ms) + lifetime_ms
    horizon_ms, is_raised = tool.command(commands.tx_skip(wanted_ms))
    if not is_raised:
        print(f"nothing to do: of what was begun before {_time(horizon_ms)} nobody presumes anything already")
        return 0
    print(
        f"of transactions with names from before {_time(horizon_ms)} that this log does not know, nobody presumes anything. "
        "Applications may run now; whatever they find prepared from before is in doubt until people have compared the "
        "databases: `coordlib tx show`, `coordlib tx resolve`"
    )
    return 0


# --- in words -----------------------------------------------------------------------------------------------


def _advice(branch: _Branch, state: _State) -> str:
    """What is to be done about a branch that a database still holds."""
    name = BranchName.unpack(branch.bqual)
    if name is not None and name.decider_tag:
        return (
            "of this branch not the log decides but a last resource (an SQLite database): start the application that has "
            "it. Recovery does the rest"
        )
    if state.status is TxStatus.NONE and state.is_initiator_alive:
        return "this branch waits for its initiator, which is alive"
    if state.status is TxStatus.UNKNOWN:
        return "nobody knows any more: compare with what the other databases of the transaction hold, then `tx resolve`"
    return "this branch is ended by any process that has registered its database, within half a minute"


def _called(branch: _Branch) -> str:
    where = f"{branch.resource} on {branch.node}" if branch.resource else "of a resource not known here"
    return f"branch {branch.bqual.hex()} ({where})"


def _outcome(state: _State) -> str:
    if state.status is TxStatus.NONE:
        return "not decided; its initiator " + (
            "is alive" if state.is_initiator_alive else "is gone: whoever is in doubt aborts it"
        )
    if state.status is TxStatus.UNKNOWN:
        return "not known: so old that it is no longer kept, or from before a restore from back-up"
    if state.status is TxStatus.COMMITTED:
        where = (
            "all have obeyed" if not state.pending else f"{len(state.pending)} branches have not obeyed yet"
        )
        return f"committed at log index {state.revision}; {where}"
    where = f" at log index {state.revision}" if state.revision else ""
    return f"aborted{where} ({state.reason})"


def _as_json(state: _State) -> dict[str, Any]:
    return {
        "transaction": text_of(state.gtid),
        "begun_ms": mint_ms_of(state.gtid),
        "log_time_ms": state.log_time_ms,
        "outcome": state.status.name.lower(),
        "reason": state.reason,
        "index": state.revision,
        "is_initiator_alive": state.is_initiator_alive,
        "pending": [_branch_json(branch) for branch in state.pending],
        "heuristics": [_note_json(note) for note in state.heuristics],
    }


def _branch_json(branch: _Branch) -> dict[str, Any]:
    return {
        "transaction": text_of(branch.gtid),
        "branch": branch.bqual.hex(),
        "resource": branch.resource,
        "node": branch.node,
    }


def _note_json(note: _Heuristic) -> dict[str, Any]:
    return {
        "transaction": text_of(note.gtid),
        "branch": note.bqual.hex(),
        "outcome": note.outcome,
        "who": note.who,
        "time_ms": note.time_ms,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = [tuple(rows[0]), *(tuple(str(cell) for cell in row.values()) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _digits(text: str, what: str, size: int = 0) -> bytes:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if not data or (size and len(data) != size):
        wanted = f"{2 * size} hexadecimal digits" if size else "hexadecimal digits"
        where = "errors and `coordlib tx list`" if size else "`coordlib tx show` and `tx in-doubt`"
        raise UsageError(f"{text!r} is not the name of {what}: {wanted}, as {where} show it")
    return data


def _age(state: _State) -> str:
    return _duration(max(0, state.log_time_ms - mint_ms_of(state.gtid)))


def _duration(milliseconds: int) -> str:
    if milliseconds < 120_000:
        return f"{milliseconds / 1000:.1f} s"
    if milliseconds < 7_200_000:
        return f"{milliseconds // 60_000} min"
    return f"{milliseconds // 3_600_000} h"


def _time(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds")


def _user() -> str:
    # Not getpass: an account without an entry, as containers have, is no error here.
    return os.environ.get("USER") or f"uid {os.getuid()}"
