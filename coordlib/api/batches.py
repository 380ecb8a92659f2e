"""Compare, then write: many keys of many maps in one entry of the log, all of it or nothing.

::

    result = (
        cluster.compare(Equals(stock, "sku-1", 3), Equals(orders, "o-1", ABSENT))
        .then(Put(stock, "sku-1", 2), Put(orders, "o-1", {"sku": "sku-1"}))
        .otherwise(Put(missed, "o-1", True))
        .commit()
    )

For those who know what they expect. Where the code must read first and then decide, use a transaction
(`transactions`): it is the same entry.

What must not live here: what the entry does (`coordlib.machine.transactions`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

from coordlib.api.codec import encode_key
from coordlib.api.guards import Guard, guard_of
from coordlib.api.maps import ABSENT, AsyncMap, Map
from coordlib.api.overlay import overlay_of
from coordlib.errors import LockLost, QuotaExceeded, UsageError, invariant
from coordlib.machine import commands
from coordlib.machine.commands import TxStatus
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import OpGen, Step
from coordlib.types import Revision
from coordlib.wire.messages import RequestKind

if TYPE_CHECKING:
    from coordlib.api.cluster import AsyncCluster, Cluster

__all__ = ["AsyncBatch", "Batch", "BatchResult", "Delete", "Equals", "Put", "Unchanged"]


class Equals(NamedTuple):
    """A condition: the key has this value, compared as encoded. `coordlib.ABSENT`: it is not there."""

    map: Map | AsyncMap
    key: Any
    value: Any


class Unchanged(NamedTuple):
    """A condition: the key was last changed at this revision (`VersionedValue.mod_revision`). 0: it is not there."""

    map: Map | AsyncMap
    key: Any
    revision: int


class Put(NamedTuple):
    """A write: the key has this value afterwards."""

    map: Map | AsyncMap
    key: Any
    value: Any


class Delete(NamedTuple):
    """A write: the key is not there afterwards, whether it was or not."""

    map: Map | AsyncMap
    key: Any


class BatchResult(NamedTuple):
    """
    What a batch came to. True if all conditions held.

    Attributes:
        succeeded: Whether all conditions held: then the writes of `then` were made, else those of `otherwise`.
        revision: Of what was written; where nothing was to be written, a revision at which this was so.
        failed: The place of the first condition that did not hold, from 0; None if all did.
    """

    succeeded: bool
    revision: Revision
    failed: int | None

    def __bool__(self) -> bool:
        return self.succeeded


class _BatchBase:
    """The operation, once, for both faces. Immutable: every method returns another batch."""

    def __init__(self, cluster: Cluster | AsyncCluster, conditions: tuple[Any, ...] = ()) -> None:
        self._cluster = cluster
        self._conditions = tuple([self._condition(condition) for condition in conditions])
        self._then: tuple[commands.Write, ...] = ()
        self._otherwise: tuple[commands.Write, ...] = ()
        self._guards: tuple[tuple[bytes, int], ...] = ()

    def __repr__(self) -> str:
        return (
            f"<coordlib.{type(self).__name__} of {len(self._conditions)} conditions, "
            f"{len(self._then)} writes then and {len(self._otherwise)} otherwise>"
        )

    def _with(self, **changes: Any) -> Self:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__, **changes)
        return made

    def then(self, *writes: Put | Delete) -> Self:
        """
        The same with these writes more, for when all conditions hold. Of several to one key the last one counts.

        Raises:
            UsageError: A map of another cluster's handle, or a key or value that cannot be stored.
        """
        return self._with(_then=self._then + tuple([self._write(write) for write in writes]))

    def otherwise(self, *writes: Put | Delete) -> Self:
        """The same with these writes more, for when a condition does not hold. Raises what `then` does."""
        return self._with(_otherwise=self._otherwise + tuple([self._write(write) for write in writes]))

    def guard(self, grant: Guard) -> Self:
        """The same, but refused with LockLost if the grant is no longer its lock's when it is carried out."""
        guard = guard_of(grant)
        assert guard is not None
        return self._with(_guards=(*self._guards, guard))

    def _place(self, item: Any) -> tuple[bytes, bytes]:
        if not isinstance(item.map, (Map, AsyncMap)) or item.map._handle is not self._cluster:
            raise UsageError(f"a batch is over maps of the handle that it is made by; got {item.map!r}")
        return item.map._name, encode_key(item.key)

    def _condition(self, item: Any) -> commands.Condition:
        if isinstance(item, Equals):
            place = self._place(item)
            return commands.key_equals(*place, None if item.value is ABSENT else item.map._encode(item.value))
        if isinstance(item, Unchanged):
            if type(item.revision) is not int or item.revision < 0:
                raise UsageError(f"a revision is a number from 0; got {item.revision!r}")
            return commands.key_is_at(*self._place(item), item.revision)
        raise UsageError(f"a condition is an Equals or an Unchanged; got {item!r}")

    def _write(self, item: Any) -> commands.Write:
        if isinstance(item, Put):
            if item.value is ABSENT:
                return commands.delete_key(*self._place(item))
            place = self._place(item)
            return commands.put_key(*place, item.map._encode(item.value))
        if isinstance(item, Delete):
            return commands.delete_key(*self._place(item))
        raise UsageError(f"a write is a Put or a Delete; got {item!r}")

    def _commit_gen(self) -> OpGen[BatchResult]:
        if overlay_of(self._cluster) is not None:
            raise UsageError("within a transaction read and write the maps themselves: it is one entry, too")
        deadline_ms = monotonic_ms() + self._cluster._request_timeout_ms
        if not (self._then or self._otherwise or self._guards):
            # Only a question. It needs a key to read beside; which one does not matter.
            query = commands.query_tx_read(b"-", b"\0", self._conditions)
            failed, _, _, _, revision = commands.decode_reply(
                (yield Step(RequestKind.QUERY, query, deadline_ms))
            )
            return _result(failed, revision)
        body = commands.tx_decide(
            b"",
            guards=self._guards,
            conditions=self._conditions,
            writes=self._then,
            otherwise=self._otherwise,
        )
        reply = yield Step(RequestKind.COMMAND, body, deadline_ms)
        status, reason, revision, _, failed = commands.decode_reply(reply)
        if status == TxStatus.COMMITTED:
            return _result(failed, revision)
        if reason == "lock-lost":
            raise LockLost("a lock that guards the batch is no longer held; nothing was written")
        invariant(reason == "quota", "a batch was refused for %r", reason)
        raise QuotaExceeded("the replicated state would become too large; nothing was written")


def _result(failed: int, revision: int) -> BatchResult:
    return BatchResult(failed < 0, Revision(revision), None if failed < 0 else failed)


class Batch(_BatchBase):
    """
    Conditions and writes that are carried out as one, for threads. Made by `Cluster.compare`; immutable.

    .. versionadded:: 0.1
    """

    _cluster: Cluster

    def commit(self) -> BatchResult:
        """
        Carry it out: one entry of the log, or none where nothing is to be written. It can be committed again.

        Raises:
            LockLost: A guard did not hold; nothing was written.
            QuotaExceeded: The state would become too large; nothing was written.
            NoQuorum, Overloaded: Nothing happened.
            CommitTimeout, LeadershipLost: It may have happened, all of it, or may yet.
            UsageError: Within a transaction of the same handle.
        """
        return self._cluster._run(self._commit_gen())


class AsyncBatch(_BatchBase):
    """
    `Batch` for tasks. A cancelled commit may still take effect, as after a CommitTimeout.

    .. versionadded:: 0.1
    """

    _cluster: AsyncCluster

    async def commit(self) -> BatchResult:
        """See `Batch.commit`."""
        return await self._cluster._arun(self._commit_gen())
