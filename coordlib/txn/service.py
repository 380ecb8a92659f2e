"""What travels between the initiator of a transaction and a service that takes part, and the initiator's side of it.

Wire: the body of a call is the CBOR array ``[1, verb, service, gtid, branch, seq, deadline_ms, decider_tag, operation,
payload]``, its answer ``[1, status, payload]``. Numbers and the order of fields are part of the format; a newer
first number is refused.

=======  =============================================================  ===================================
verb     asks                                                           answered with
=======  =============================================================  ===================================
CALL     run `operation` in the transaction (gtid empty: without one)   RETURNED, READ, RAISED, REFUSED, BUSY
PREPARE  vote; `seq` is one more than that of the last call             VOTED, READ_ONLY, NO, REFUSED, BUSY
COMMIT   commit what was promised                                       ENDED, PENDING, REFUSED, BUSY
ABORT    roll back, and refuse whatever still comes of it               ENDED, PENDING, REFUSED, BUSY
COMMIT_1P  commit what nobody else takes part in                        ENDED, VOTED (several branches), NO, ...
ASK      of a last resource: has it committed `gtid`?                   ENDED (payload: yes or no), BUSY (not yet)
=======  =============================================================  ===================================

A branch of a service is known by (gtid, branch), where `branch` tells two services of one process, or one service
called in two places, apart. Everything is idempotent by `seq`: asked again, the same is answered.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final, NamedTuple

from coordlib.cbor import CBORError, decode, encode
from coordlib.errors import CoordError, DefiniteError, RemoteProtocolError
from coordlib.node.operations import Failure, Outcome, Step
from coordlib.txn.branches import BranchFailed, Finish
from coordlib.txn.gtid import GTID_SIZE, TAG_SIZE
from coordlib.txn.members import Ballot, Ending, Participant
from coordlib.wire.messages import RequestKind

__all__ = [
    "Answer",
    "RemoteMember",
    "Status",
    "Verb",
    "Wish",
    "decode_answer",
    "decode_wish",
    "text_of_error",
]

FORMAT: Final = 1
_TEXT_MAX: Final = 255
_INT_MAX: Final = 1 << 62
_ERROR_SIZE_MAX: Final = 4000


def text_of_error(error: BaseException) -> str:
    """What it says, as far as that can travel: a handler's error may say a lot, what is no text, or fail to say it."""
    try:
        text = str(error)
    except Exception as failure:
        return f"(it cannot be shown: {type(failure).__name__})"
    if len(text) > _ERROR_SIZE_MAX:
        text = f"{text[:_ERROR_SIZE_MAX]}... ({len(text)} characters)"
    return text.encode(errors="backslashreplace").decode()


class Verb(IntEnum):
    CALL = 1
    PREPARE = 2
    COMMIT = 3
    ABORT = 4
    COMMIT_1P = 5
    ASK = 6


class Status(IntEnum):
    RETURNED = 1  # payload: what the handler returned
    RAISED = 2  # payload: [type's name, message]; the branch will vote no
    REFUSED = 3  # payload: why, as text; nothing was done
    BUSY = 4  # something of this branch is under way: ask again
    VOTED = 5  # payload: [[resource, node, bqual], ...]
    READ_ONLY = 6  # it has ended
    NO = 7  # payload: why; it has rolled back
    ENDED = 8  # payload: [[bqual, ...], [[bqual, finish], ...]]: obeyed, and ended otherwise before
    PENDING = 9  # the same; the rest it will do as soon as it can
    READ = 10  # as RETURNED; and nothing of the branch seems to have written so far


class Wish(NamedTuple):
    """What is asked of a service."""

    verb: int
    service: str
    gtid: bytes = b""
    branch: int = 0
    seq: int = 0
    deadline_ms: int = 0  # in log time
    decider_tag: bytes = b""  # of the last resource, where that decides
    operation: str = ""
    payload: bytes = b""

    def encode(self) -> bytes:
        return encode((FORMAT, *self))


class Answer(NamedTuple):
    status: int
    payload: Any = None

    def encode(self) -> bytes:
        return encode((FORMAT, *self))


def decode_wish(body: bytes) -> Wish:
    """
    Raises:
        RemoteProtocolError: It is none.
    """
    try:
        items = decode(body)
    except CBORError as error:
        raise RemoteProtocolError(f"not a call to a service: {error}") from error
    if type(items) is not list or len(items) != 10 or items[0] != FORMAT:
        raise RemoteProtocolError("not a call to a service of this version: upgrade coordlib on this node")
    wish = Wish(*items[1:])
    if (
        [type(item) for item in wish] != [int, str, bytes, int, int, int, bytes, str, bytes]
        or wish.verb not in tuple(Verb)
        or len(wish.gtid) not in (0, GTID_SIZE)
        or (not wish.gtid and wish.verb != Verb.CALL)
        or len(wish.decider_tag) not in (0, TAG_SIZE)
        or not all(0 <= number < _INT_MAX for number in (wish.branch, wish.seq, wish.deadline_ms))
        or max(len(wish.service), len(wish.operation)) > _TEXT_MAX
    ):
        raise RemoteProtocolError("malformed call to a service")
    return wish


def decode_answer(body: bytes) -> Answer:
    """
    Raises:
        RemoteProtocolError: It is none.
    """
    try:
        items = decode(body)
    except CBORError as error:
        raise RemoteProtocolError(f"not an answer of a service: {error}") from error
    if type(items) is not list or len(items) != 3 or items[0] != FORMAT or items[1] not in tuple(Status):
        raise RemoteProtocolError("not an answer of a service of this version")
    return Answer(items[1], items[2])


def _rows(value: Any, *types: type) -> list[Any]:
    if type(value) is not list or not all(
        type(row) is list and tuple(map(type, row)) == types for row in value
    ):
        raise RemoteProtocolError("malformed answer of a service")
    return value


class RemoteMember:
    """A service in another process, at one of its replicas for as long as the transaction lasts."""

    is_last_resource = False
    is_remote = True

    def __init__(
        self, service: str, target: int, gtid: bytes, branch: int, deadline_ms: int, decider_tag: bytes = b""
    ) -> None:
        self.service = service
        self.target = target  # session of the replica
        self.participants: tuple[Participant, ...] = ()
        self.expects_read_only = False
        self._gtid = gtid
        self._branch = branch
        self._deadline_ms = deadline_ms
        self._decider_tag = decider_tag
        self._seq = 0
        self._is_asked = False
        self._is_lost = False  # an answer of it was, or left open what it has done

    def __repr__(self) -> str:
        return f"<service {self.service!r} at session {self.target}>"

    def _step(self, verb: Verb, deadline_ms: int, operation: str = "", payload: bytes = b"") -> Step:
        wish = Wish(
            verb,
            self.service,
            self._gtid,
            self._branch,
            self._seq,
            self._deadline_ms,
            self._decider_tag,
            operation,
            payload,
        )
        return Step(RequestKind.CALL, wish.encode(), deadline_ms, target=self.target)

    def call(self, operation: str, payload: bytes, deadline_ms: int) -> Step:
        """The next call of the transaction. One at a time: the seq says in which order they are run."""
        self._seq += 1
        return self._step(Verb.CALL, deadline_ms, operation, payload)

    def call_again(self, operation: str, payload: bytes, deadline_ms: int) -> Step:
        """The same call, whose answer was lost: it is not run twice."""
        return self._step(Verb.CALL, deadline_ms, operation, payload)

    # -- phases, see `Member`

    def prepare(self, deadline_ms: int) -> Step:
        self._is_asked = True
        self._seq += 1
        return self._step(Verb.PREPARE, deadline_ms)

    def read_vote(self, outcome: Outcome) -> Ballot:
        return self._read_ballot(outcome, Verb.PREPARE)

    def commit_one_phase(self, deadline_ms: int) -> Step:
        if not self._is_asked:
            self._seq += 1
        self._is_asked = True
        return self._step(Verb.COMMIT_1P, deadline_ms)

    def read_one_phase(self, outcome: Outcome) -> Ballot:
        return self._read_ballot(outcome, Verb.COMMIT_1P)

    def _read_ballot(self, outcome: Outcome, verb: Verb) -> Ballot:
        try:
            answer = self._answer(outcome)
            if answer.status == Status.VOTED:
                rows = _rows(answer.payload, str, str, bytes)
                self.participants = tuple((resource, node, bqual) for resource, node, bqual in rows)
                return Ballot(self.participants)
        except DefiniteError as error:
            # It was never delivered; but an earlier attempt may have been, and its calls were: it is to be told.
            return Ballot(error=error, is_lost=verb is Verb.PREPARE or self._is_lost)
        except CoordError as error:
            self._is_lost = True
            return Ballot(error=error, is_lost=True)
        if answer.status == Status.READ_ONLY or (answer.status == Status.ENDED and verb is Verb.COMMIT_1P):
            return Ballot()
        is_certain = answer.status == Status.NO
        # Whatever is said after this one, or cannot be: it may have committed.
        self._is_lost = self._is_lost or not is_certain
        why = BranchFailed(f"service {self.service!r}: {answer.payload}")
        return Ballot(error=why, is_lost=not is_certain)

    def finish(self, commit: bool, deadline_ms: int) -> Step:
        return self._step(Verb.COMMIT if commit else Verb.ABORT, deadline_ms)

    def read_ending(self, commit: bool, outcome: Outcome) -> Ending:
        try:
            answer = self._answer(outcome)
            if answer.status not in (Status.ENDED, Status.PENDING):
                # Not known there (it was restarted), or under way: it asks for the outcome by itself.
                return Ending(False, BranchFailed(f"service {self.service!r}: {answer.payload}"))
            if type(answer.payload) is not list or len(answer.payload) != 2:
                raise RemoteProtocolError("malformed answer of a service")
            ended, odd = answer.payload
            if type(ended) is not list or not all(type(bqual) is bytes for bqual in ended):
                raise RemoteProtocolError("malformed answer of a service")
            names = {finish.value: finish for finish in Finish}
            heuristics = tuple(
                (bqual, names.get(name, Finish.HAZARD)) for bqual, name in _rows(odd, bytes, str)
            )
        except CoordError as error:
            # One that has promised nothing rolls back when its time is over.
            return Ending(not commit and not self._is_asked, error)
        return Ending(answer.status == Status.ENDED, None, heuristics, tuple(ended))

    def _answer(self, outcome: Outcome) -> Answer:
        if isinstance(outcome, Failure):
            raise outcome.error
        return decode_answer(outcome.value)
