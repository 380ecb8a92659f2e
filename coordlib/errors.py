"""Every error of coordlib, ordered by what the caller may conclude.

::

    CoordError                    .code: stable string, on the wire and in docs   .retryable: bool
    ├─ UsageError                 the caller's bug; nothing was sent
    │  ├─ ConfigError · ClusterClosed · ForkedError · FlavourError · TransportNotFound · NotStarted
    │  └─ ResourceNotTwoPhase · TooManyLastResources
    ├─ DefiniteError              did not happen and will not
    │  ├─ NotLeader · NoQuorum · Overloaded · QuotaExceeded · StartError
    │  ├─ ConditionFailed · KeyMissing · KeyExists · RevisionCompacted
    │  ├─ LockTimeout · LockLost · NotHolder · SessionExpired · IdLeaseExpired · IdOverflow
    │  └─ ServiceUnreachable · TransactionAborted > TransactionConflict
    ├─ IndeterminateError         may have happened, or may yet
    │  ├─ CommitTimeout · LeadershipLost · CallTimeout · CallLost
    │  └─ TransactionOutcomeUnknown · HeuristicOutcome · ServiceError
    ├─ ProtocolError              LocalProtocolError · RemoteProtocolError · AuthenticationError
    └─ FatalError                 the node has stopped: StorageCorrupt · StorageFailed · InvariantViolation

Source: the split into definite and indeterminate is Maelstrom's (doc/protocol.md).
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "AuthenticationError",
    "CallLost",
    "CallTimeout",
    "ClusterClosed",
    "CommitTimeout",
    "ConditionFailed",
    "ConfigError",
    "CoordError",
    "DefiniteError",
    "FatalError",
    "FlavourError",
    "ForkedError",
    "HeuristicOutcome",
    "IdLeaseExpired",
    "IdOverflow",
    "IndeterminateError",
    "InvariantViolation",
    "KeyExists",
    "KeyMissing",
    "LeadershipLost",
    "LocalProtocolError",
    "LockLost",
    "LockTimeout",
    "NoQuorum",
    "NotHolder",
    "NotLeader",
    "NotStarted",
    "Overloaded",
    "ProtocolError",
    "QuotaExceeded",
    "RemoteProtocolError",
    "ResourceNotTwoPhase",
    "RevisionCompacted",
    "ServiceError",
    "ServiceUnreachable",
    "SessionExpired",
    "StartError",
    "StorageCorrupt",
    "StorageFailed",
    "StorageFull",
    "TooManyLastResources",
    "TransactionAborted",
    "TransactionConflict",
    "TransactionOutcomeUnknown",
    "TransportNotFound",
    "UsageError",
    "invariant",
]


class CoordError(Exception):
    """
    Root of all errors that coordlib raises on purpose.

    `details` holds the numbers a person needs (term, index, leader_hint, ...); they are also
    readable as attributes. Errors survive pickling.
    """

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __getattr__(self, name: str) -> Any:
        # Only reached when ordinary lookup failed; guards against recursion while unpickling.
        details = self.__dict__.get("details")
        if details is not None and name in details:
            return details[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.details)


def _rebuild(kind: type[CoordError], message: str, details: dict[str, Any]) -> CoordError:
    return kind(message, **details)


class UsageError(CoordError, ValueError):
    """The caller's mistake. Nothing was sent, nothing has changed."""

    code = "usage"


class ConfigError(UsageError):
    """A setting is wrong or contradicts another. The message names the setting and a value that works."""

    code = "config"


class ClusterClosed(UsageError):
    """The handle was closed; make a new one."""

    code = "closed"


class NotStarted(UsageError):
    """The handle was never started: call `start()` or use it in a `with` block."""

    code = "not-started"


class ForkedError(UsageError):
    """This handle belongs to the parent process. Make a new one here with `coordlib.connect(...)`."""

    code = "forked"


class FlavourError(UsageError):
    """A blocking operation was used where an asynchronous one is needed, or the reverse."""

    code = "flavour"


class TransportNotFound(UsageError):
    """No transport of that name is installed."""

    code = "transport-not-found"


class ResourceNotTwoPhase(UsageError):
    """The resource cannot promise to commit later, and what it would be committed with needs that promise."""

    code = "not-two-phase"


class TooManyLastResources(UsageError):
    """Two resources of one transaction cannot prepare. At most one may decide; give the other a transaction of its own."""

    code = "too-many-last-resources"


class DefiniteError(CoordError):
    """It did not happen and will not happen later."""

    code = "definite"


class NotLeader(DefiniteError):
    """The node asked is not the leader; `leader_hint` may name it."""

    code = "not-leader"
    retryable = True


class NoQuorum(DefiniteError):
    """No leader with a quorum could be reached in time, and no attempt was ever sent to one."""

    code = "no-quorum"
    retryable = True


class Overloaded(DefiniteError):
    """A bounded queue is full; nothing was appended. Back off and retry."""

    code = "overloaded"
    retryable = True


class QuotaExceeded(DefiniteError):
    """A replicated limit would be exceeded; `limit` names it. Deletes and releases still work."""

    code = "quota"


class StartError(DefiniteError):
    """The node could not start; the message says what to do. The handle may be started again."""

    code = "start"


class ConditionFailed(DefiniteError):
    """The condition of a conditional command did not hold; nothing was changed."""

    code = "condition"


class KeyMissing(DefiniteError, KeyError):
    """The key is not in the map."""

    code = "key-missing"

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return self.message


class KeyExists(DefiniteError):
    """The key is in the map already."""

    code = "key-exists"


class RevisionCompacted(DefiniteError):
    """The revision asked for is no longer kept; `oldest` is the first that is."""

    code = "compacted"
    retryable = True


class LockTimeout(DefiniteError, TimeoutError):
    """The lock was not granted in time and the request has been withdrawn: it will not be granted later."""

    code = "lock-timeout"
    retryable = True


class LockLost(DefiniteError):
    """The grant is no longer the lock's; whatever was guarded by it has been refused."""

    code = "lock-lost"


class NotHolder(DefiniteError):
    """Release of a lock that this handle does not hold, or use of a lease of ids that has ended."""

    code = "not-holder"


class SessionExpired(DefiniteError):
    """The session is gone, and with it every lock it held. The request was refused, not executed."""

    code = "session-expired"


class IdLeaseExpired(DefiniteError):
    """The window of id time has ended and no other was granted in time. No id was minted; ask again."""

    code = "id-lease-expired"
    retryable = True


class IdOverflow(DefiniteError):
    """The layout's last unit of time is reached: no further id fits. Go on under another name and epoch."""

    code = "id-overflow"


class ServiceUnreachable(DefiniteError):
    """No way led to the application that was called: the call was not delivered and will not be."""

    code = "service-unreachable"
    retryable = True


class TransactionAborted(DefiniteError):
    """Nothing of the transaction has happened, anywhere, nor will. `reason` is a word, `gtid` its name."""

    code = "transaction-aborted"


class TransactionConflict(TransactionAborted):
    """Something that the transaction had read was changed by others before it could commit. Run it again."""

    code = "transaction-conflict"
    retryable = True


class IndeterminateError(CoordError):
    """It may have happened, or may happen yet. `request_id` identifies the request in logs."""

    code = "indeterminate"


class CommitTimeout(IndeterminateError, TimeoutError):
    """No answer in time after the request had been sent."""

    code = "commit-timeout"


class LeadershipLost(IndeterminateError):
    """The answer was lost with the leader, and the request can no longer be asked about."""

    code = "leadership-lost"


class CallTimeout(IndeterminateError, TimeoutError):
    """No answer came in time from the application that was called: it may have acted on the call, or may yet."""

    code = "call-timeout"


class CallLost(IndeterminateError):
    """The way to the application that was called broke before its answer came: it may have acted on the call."""

    code = "call-lost"


class ServiceError(IndeterminateError):
    """The called operation itself raised: what it had done before is its own affair. In a transaction it votes no."""

    code = "service-error"


class TransactionOutcomeUnknown(IndeterminateError):
    """Whether the transaction was committed could not be learnt in time; it has one outcome. Ask again by `gtid`."""

    code = "transaction-unknown"


class HeuristicOutcome(IndeterminateError):
    """Somebody ended a prepared branch by hand, otherwise than decided: `branches` of `gtid` must be repaired by people."""

    code = "heuristic"


class ProtocolError(CoordError):
    """Somebody broke the protocol."""

    code = "protocol"


class LocalProtocolError(ProtocolError):
    """We would have broken it; nothing was sent."""

    code = "local-protocol"


class RemoteProtocolError(ProtocolError):
    """A peer sent what no correct peer sends; the input was dropped."""

    code = "remote-protocol"


class AuthenticationError(ProtocolError):
    """A peer could not prove that it holds the cluster's secret, or we could not prove it to the peer."""

    code = "authentication"


class FatalError(CoordError):
    """The node has stopped to stay correct. Restart the process after reading the message."""

    code = "fatal"


class StorageCorrupt(FatalError):
    """What is on the disk is not what was written there, in a place where a crash cannot explain it."""

    code = "storage-corrupt"


class StorageFailed(FatalError):
    """A write or an fsync failed; nothing that waited for it was promised to anybody."""

    code = "storage-failed"


class StorageFull(StorageFailed):
    """The disk is full. Free space, then restart."""

    code = "storage-full"


class InvariantViolation(FatalError):
    """A bug: something that can never be true is. The node stopped rather than go on wrongly."""

    code = "invariant"


def invariant(condition: object, message: str, *args: object) -> None:
    """
    Raise InvariantViolation unless `condition` holds. Never compiled out.

    Args:
        message: %-format for `args`; formatted only on failure.
    """
    if not condition:
        raise InvariantViolation(message % args if args else message)
