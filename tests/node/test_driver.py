"""What the node thread carries out, and what may not get lost when it fails."""

from __future__ import annotations

from typing import Any, cast

import pytest

from coordlib.config import Timing
from coordlib.errors import ClusterClosed, CoordError, StorageFailed
from coordlib.machine import commands
from coordlib.node.driver import MemberDriver
from coordlib.node.effects import Effects
from coordlib.node.kernel import MemberKernel
from coordlib.node.session import SessionState
from coordlib.node.waiting import ThreadCall
from coordlib.raft.messages import HardState
from coordlib.storage.base import FORMAT_VERSION, DiskIdentity, Persist
from coordlib.wire.messages import Replies, ReplyStatus, Request, RequestKind, Requests

NOW = 1000
ROUTE = b"route"


class Disk:
    """A storage that fails, or does not."""

    def __init__(self, error: CoordError | None = None) -> None:
        self.error = error
        self.written: list[Persist] = []

    def write(self, batch: list[Persist]) -> None:
        if self.error is not None:
            raise self.error
        self.written += batch


class Script:
    """A kernel that wants what the test says."""

    def __init__(self, *effects: Effects) -> None:
        self.effects = list(effects)

    def collect(self, now: int) -> Effects | None:
        return self.effects.pop(0) if self.effects else None

    def persisted(self, now: int) -> None:
        """Nothing waits for it."""


class OutOfService:
    """Links on which nothing is sent."""

    def send(self, name: str, messages: Any) -> bool:
        return False


def driver_on(disk: Disk) -> MemberDriver:
    driver = MemberDriver.__new__(MemberDriver)  # without keys, a transport and a thread
    driver._listeners = []
    driver._name = "n1"
    driver._links = cast(Any, OutOfService())
    driver._storage = cast(Any, disk)
    driver._disk = cast(Any, object())
    return driver


def make_kernel(members: dict[str, str]) -> MemberKernel:
    return MemberKernel(
        node_id="n1",
        members=members,
        timing=Timing(),
        identity=DiskIdentity(FORMAT_VERSION, "n1", b"d" * 16, "shop", b"", ()),
        recovered=None,
        snapshot=(),
        random_bytes=lambda size: b"\1" * size,
        random_ticks=lambda low, high: low,
        now=NOW,
    )


def test_what_has_ended_is_told_even_if_the_disk_fails() -> None:
    """Its outcome is known; the caller would conclude less from the failure."""
    call = ThreadCall(RequestKind.QUERY, b"", NOW)
    call.reply = b"answer"
    effects = Effects()
    effects.completed.append(call)
    effects.persist = [Persist(0, HardState(1, "n1"), (), None)]
    driver = driver_on(Disk(StorageFailed("the disk is gone")))
    told: list[SessionState] = []
    driver.add_listener(lambda view, state: told.append(state))
    effects.changes.append((make_kernel({"n1": ""}).session.view, SessionState.LOST))
    with pytest.raises(StorageFailed):
        driver._carry_out(cast(MemberKernel, Script(effects)), NOW)
    assert call.wait(0)
    assert told == [SessionState.LOST]


def test_a_kernel_that_fails_still_tells_what_had_ended() -> None:
    """Also what ended since its effects were last carried out, each once and by its own outcome."""
    kernel = make_kernel({"n1": "tcp://a:1", "n2": "tcp://b:1"})
    waits = ThreadCall(RequestKind.COMMAND, commands.map_put(b"m", b"k", b"v"), NOW + 1000)
    kernel.submit(waits, NOW)
    kernel.begin_close(NOW, NOW + 1000)
    refused = ThreadCall(RequestKind.QUERY, b"", NOW + 1000)
    kernel.submit(refused, NOW)
    error = StorageFailed("the disk is gone")
    effects = kernel.fail(error)
    assert effects is not None
    assert effects.completed == [refused, waits]
    assert isinstance(refused.error, ClusterClosed)
    assert waits.error is error
    assert not effects.sends
    assert effects.persist is None


def test_reads_confirmed_as_the_leadership_is_lost_are_handed_back() -> None:
    """Each is answered: by the next leader, to which its asker is sent."""
    kernel = make_kernel({"n1": "tcp://a:1"})
    now = NOW

    def settle() -> list[tuple[int, int]]:
        """Carry out everything; (request id, status) of what was answered on the route."""
        answers = []
        while (effects := kernel.collect(now)) is not None:
            if effects.identity is not None:
                kernel.identity_stored(effects.identity, now)
            if effects.persist is not None:
                kernel.persisted(now)
            for _, message in effects.client_sends.get(ROUTE, ()):
                if isinstance(message, Replies):
                    answers += [(reply.request_id, reply.status) for reply in message.replies]
        return answers

    settle()
    while not kernel.is_leader:
        now += 100
        kernel.tick(now, 0)
        settle()
    kernel.client_attached(ROUTE, "c")
    settle()
    raft = kernel.raft
    assert raft is not None
    query = Request(7, RequestKind.QUERY, 0, 0, 0, commands.query_len(b"m"))
    kernel.client_messages(ROUTE, [(0, Requests((query,)))], now)
    raft._begin_read_round()
    raft._reads.confirm(1 << 60)
    raft._become_follower(raft.term + 1, "")
    assert settle() == [(7, ReplyStatus.NOT_LEADER)]
