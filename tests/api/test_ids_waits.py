"""How long a mint waits for its time: never longer than it may."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from coordlib.api.ids import _IdsBase
from coordlib.errors import Overloaded
from coordlib.ids.layout import DEFAULT
from coordlib.ids.minter import NeedsWait
from coordlib.node.operations import Step


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
