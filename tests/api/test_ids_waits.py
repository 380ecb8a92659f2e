"""How long a mint waits for its time, and how much of it is asked for: never more than need be."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from coordlib.api.ids import _IdsBase
from coordlib.cbor import decode, encode
from coordlib.errors import Overloaded
from coordlib.ids.layout import DEFAULT
from coordlib.ids.minter import NeedsWait
from coordlib.node.operations import OpGen, Step


def test_a_mint_waits_no_longer_than_its_deadline_whatever_its_clock_does() -> None:
    """A clock that goes back by an hour costs whoever mints the request timeout, and not an hour."""
    now_ms = 5_000_000
    began: list[Any] = []
    ids = _IdsBase(
        "orders",
        DEFAULT,
        10_000,
        request_timeout_ms=2000,
        clock_ns=lambda: now_ms * 1_000_000,
        begin=began.append,
    )
    ids._minter.install(0, 1, 20_000, 1)
    ids._minter.mint()
    now_ms -= 3_600_000
    with patch("coordlib.api.ids.monotonic_ms", lambda: now_ms):
        operation = ids._mint_gen()
        step = next(operation)
        assert isinstance(step, Step)
        assert step.pause_seconds == 2.0
        now_ms += 2000
        with pytest.raises(Overloaded, match="no id was minted"):
            operation.send(b"")
    with pytest.raises(NeedsWait):
        ids._minter.mint()
    assert began == []


def test_a_process_ahead_of_the_clusters_time_asks_for_a_window_beyond_its_ids_and_no_more() -> None:
    """A renewal that ends before what was minted is asked for again, longer by what log_time is behind."""
    began: list[OpGen[None]] = []
    ids = _IdsBase("orders", DEFAULT, 10_000, request_timeout_ms=2000, clock_ns=lambda: 0, begin=began.append)
    ids._ask()
    (operation,) = began
    step = next(operation)
    asked = []
    # Granted at 50,000; then log_time is read as 45,000, when 10,000 more end before the window that there is.
    for reply in ((0, 3, 1, 50_000, 60_000, 50_000, 1), (0, 60_000, 45_000), (0, 70_000, 45_000)):
        assert isinstance(step, Step)
        asked.append(decode(step.body)[-1])
        try:
            step = operation.send(encode(reply))
        except StopIteration:
            ids._asking.clear()
            ids._ask()
            operation = began[-1]
            step = next(operation)
    assert asked == [10_000, 10_000, 25_000]
    operation.close()
