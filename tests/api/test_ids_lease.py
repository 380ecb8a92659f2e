"""What a generator asks of the cluster, answer by answer: the operation alone, on a clock of the test's."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

import coordlib
from coordlib.api.ids import AHEAD_MS, FIRST_WINDOW_MS, WINDOW_MS_MAX, _IdsBase
from coordlib.cbor import decode, encode
from coordlib.ids.layout import DEFAULT, Layout
from coordlib.ids.minter import NeedsWindow
from coordlib.machine.commands import OpCode
from coordlib.node.operations import FOREVER_MS, OpGen, Step
from coordlib.node.session import Call
from coordlib.wire.messages import RequestKind

NAME = b"orders"
START = 1_000_000  # a unit; 1 ms each


class Desk(_IdsBase):
    """A generator whose requests the test answers, and whose clock it sets."""

    def __init__(self, layout: Layout = DEFAULT, window_ms: int = 60_000) -> None:
        self.now_ms = 500
        self.operation: Generator[Any, bytes, None] | None = None
        self.asked: Step | None = None
        super().__init__(
            NAME.decode(),
            layout,
            window_ms,
            request_timeout_ms=1000,
            clock_ns=lambda: self.now_ms * 1_000_000,
            begin=self._began,
        )

    def _began(self, operation: OpGen[None]) -> None:
        self.operation = operation
        self._go_on(lambda: next(operation))

    def _go_on(self, go_on: Any) -> None:
        try:
            self.asked = go_on()
        except StopIteration:
            self.operation = self.asked = None

    def body(self) -> list[Any]:
        """What is asked for now."""
        assert self.asked is not None
        body = decode(self.asked.body)
        assert isinstance(body, list)
        return body

    def answer(self, *fields: int) -> None:
        operation = self.operation
        assert operation is not None
        self._go_on(lambda: operation.send(encode([0, *fields])))

    def refuse(self, error: coordlib.CoordError) -> None:
        operation = self.operation
        assert operation is not None
        self._go_on(lambda: operation.throw(error))

    def lease(self, worker: int, number: int, begin: int, until: int) -> None:
        """Ask for a window, and get it."""
        self._ask()
        assert self.body()[0] == OpCode.IDS_LEASE
        self.answer(worker, number, begin, until, begin, DEFAULT.epoch)

    def mint(self) -> tuple[int, int]:
        """Unit and worker of a new id."""
        unit, _, worker = self.layout.decompose(self._minter.mint())
        return unit, worker


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_a_lease_is_asked_for_with_the_layout_and_a_small_window(desk: Desk) -> None:
    """Only once, however many ask meanwhile; it is asked for until it is answered."""
    desk._ask()
    operation = desk.operation
    desk._ask()
    assert desk.operation is operation
    assert desk.asked is not None and desk.asked.deadline_ms == FOREVER_MS
    assert desk.body() == [OpCode.IDS_LEASE, NAME, [41, 12, 10, 1, DEFAULT.epoch, 1], FIRST_WINDOW_MS]
    desk.answer(5, 77, START, START + FIRST_WINDOW_MS, START, DEFAULT.epoch)
    assert desk.operation is None
    assert desk.mint() == (START, 5)


def test_a_quarter_of_a_window_later_it_is_extended_to_twice_as_much(desk: Desk) -> None:
    """By the first id that is minted then, which waits for nothing; up to the length that was wanted."""
    desk.lease(5, 77, START, START + 10_000)
    desk.now_ms += 2499
    desk.mint()
    assert desk.operation is None
    until = START + 10_000
    wanted: list[int] = []
    for _ in range(4):
        while desk.operation is None:
            desk.now_ms += 100
            desk.mint()
        assert desk.body()[:4] == [OpCode.IDS_RENEW, NAME, 5, 77]
        wanted.append(desk.body()[4])
        now = desk.mint()[0]
        until = max(until, now + wanted[-1])
        desk.answer(until, now)
    assert wanted == [20_000, 40_000, 60_000, 60_000]
    assert desk.counters["renewals"] == 4


def test_who_lost_the_lease_takes_another(desk: Desk) -> None:
    """The window that was granted stays good until the other is there."""
    desk.lease(5, 77, START, START + 10_000)
    desk._ask()
    desk.refuse(coordlib.NotHolder("it has ended"))
    assert desk.body()[0] == OpCode.IDS_LEASE
    assert desk.mint()[1] == 5
    desk.answer(9, 78, START + 20_000, START + 30_000, START + 20_000, DEFAULT.epoch)
    assert desk.mint() == (START + 20_000, 9)


@pytest.mark.parametrize("error", [coordlib.SessionExpired("it ended"), coordlib.LeadershipLost("it ended")])
def test_the_end_of_a_session_ends_no_lease(desk: Desk, error: coordlib.CoordError) -> None:
    """The same is asked again in the next session; a window that was granted unheard lapses."""
    desk._ask()
    desk.refuse(error)
    assert desk.body()[0] == OpCode.IDS_LEASE
    desk.answer(5, 77, START, START + 10_000, START, DEFAULT.epoch)
    desk._ask()
    desk.refuse(error)
    assert desk.body()[:4] == [OpCode.IDS_RENEW, NAME, 5, 77]


def test_after_a_long_rest_nothing_is_extended(desk: Desk) -> None:
    """Who minted nothing for a minute after the end of the window asks for a new one at once."""
    desk.lease(5, 77, START, START + 10_000)
    desk.now_ms += 10_000 + 59_000
    with pytest.raises(NeedsWindow):
        desk.mint()
    desk._ask()
    assert desk.body()[0] == OpCode.IDS_RENEW
    desk.operation = None
    desk._asking.clear()
    desk.now_ms += 2000
    desk._ask()
    assert desk.body()[0] == OpCode.IDS_LEASE


def test_a_new_window_below_what_was_minted_is_extended_beyond_it(desk: Desk) -> None:
    """As when log_time fell behind over changes of the leader: ids go on from the last, of the new worker."""
    desk.lease(5, 77, START, START + 10_000)
    desk.now_ms += 9000
    last = desk.mint()[0]
    desk.refuse(coordlib.NotHolder("it has ended"))
    desk.answer(9, 78, START - 60_000, START - 50_000, START - 60_000, DEFAULT.epoch)
    assert desk.body() == [OpCode.IDS_RENEW, NAME, 9, 78, FIRST_WINDOW_MS]
    desk.answer(START - 49_900, START - 59_900)
    wanted = desk.body()[4]
    # Enough to get beyond the last window, and no more than a first one longer: a restore must skip what is granted.
    assert 60_000 + 10_000 <= wanted <= 60_000 + 10_000 + FIRST_WINDOW_MS
    desk.answer(START - 59_800 + wanted, START - 59_800)
    assert desk.operation is None
    unit, worker = desk.mint()
    assert worker == 9
    assert last < unit <= last + AHEAD_MS


def test_a_process_far_ahead_of_the_cluster_is_refused(desk: Desk) -> None:
    """Whoever waits is told, instead of asking again and again."""
    desk.lease(5, 77, START, START + 10_000)
    waiting = Call(RequestKind.QUERY, b"")
    desk._join(waiting)
    desk.refuse(coordlib.NotHolder("it has ended"))
    desk.answer(9, 78, 1, 10_001, 1, DEFAULT.epoch)
    desk.answer(10_101, 101)
    desk.answer(600_201, 201)
    assert desk.operation is None
    assert isinstance(waiting.error, coordlib.IdLeaseExpired)


def test_a_refusal_ends_the_wait_of_all_and_is_tried_again_with_later_ids(desk: Desk) -> None:
    """The window in hand goes on meanwhile."""
    desk.lease(5, 77, START, START + 10_000)
    waiting = [Call(RequestKind.QUERY, b"") for _ in range(3)]
    for call in waiting:
        desk._join(call)
    desk.refuse(coordlib.NotHolder("it has ended"))
    error = coordlib.QuotaExceeded("all workers are leased")
    desk.refuse(error)
    assert [call.error for call in waiting] == [error] * 3
    desk.mint()
    assert desk.operation is None
    desk.now_ms += 1001
    assert desk.mint()[1] == 5
    assert desk.body()[0] == OpCode.IDS_LEASE


def test_a_refusal_is_logged_if_nobody_is_there_to_be_told(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """A line for each mint that has the error anyway would be thousands in a second."""
    desk._join(Call(RequestKind.QUERY, b""))
    desk.refuse(coordlib.QuotaExceeded("all workers are leased"))
    assert caplog.records == []
    desk._ask()
    desk.refuse(coordlib.QuotaExceeded("all workers are leased"))
    assert [record.__dict__["event"] for record in caplog.records] == ["ids.refused"]


def test_a_cluster_before_the_epoch_is_told_at_once_and_named_when_it_ends(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """Its time stands still until the epoch: there are ids for the longest window only."""
    desk.lease(5, 77, 0, WINDOW_MS_MAX)
    assert [record.__dict__["event"] for record in caplog.records] == ["ids.before_epoch"]
    assert desk.mint() == (1, 5)
    desk.now_ms += WINDOW_MS_MAX
    waiting = Call(RequestKind.QUERY, b"")
    desk._join(waiting)
    desk.answer(WINDOW_MS_MAX, 0)
    desk.answer(WINDOW_MS_MAX, 0)
    assert isinstance(waiting.error, coordlib.IdLeaseExpired)
    assert "2025-01-01" in waiting.error.message


def test_no_id_is_zero(desk: Desk) -> None:
    """A window from the epoch on begins a unit later; one that has no other unit is refused."""
    desk.lease(0, 77, 0, 10_000)
    assert desk._minter.mint() >> 22 == 1
    slow = Desk(Layout(time_bits=20, sequence_bits=0, worker_bits=1, unit_ms=10_000))
    waiting = Call(RequestKind.QUERY, b"")
    slow._join(waiting)
    assert slow.body()[3] == 80_000  # at least eight units
    slow.answer(0, 78, 0, 1, 0, DEFAULT.epoch)
    assert isinstance(waiting.error, coordlib.IdLeaseExpired)


def test_a_window_that_comes_after_the_close_is_given_back_whole(desk: Desk) -> None:
    """And nothing is minted from it."""
    desk._ask()
    desk._revoke()
    desk.answer(5, 77, START, START + 10_000, START, DEFAULT.epoch)
    assert desk.body() == [OpCode.IDS_RETURN, NAME, 5, 77, START]
    desk.refuse(coordlib.ClusterClosed("it is closing"))
    assert desk.operation is None
    with pytest.raises(coordlib.ClusterClosed):
        desk._minter.mint()


def test_a_close_gives_back_from_the_first_unit_that_was_not_used(desk: Desk) -> None:
    """Once; a handle that never had a window gives nothing back."""
    assert list(Desk()._return_gen(0)) == []
    desk.lease(5, 77, START, START + 10_000)
    desk.now_ms += 100
    assert desk.mint() == (START + 100, 5)
    desk._revoke()
    (step,) = desk._return_gen(4711)
    assert isinstance(step, Step)
    assert step.deadline_ms == 4711
    assert decode(step.body) == [OpCode.IDS_RETURN, NAME, 5, 77, START + 101]
    assert list(desk._return_gen(0)) == []
