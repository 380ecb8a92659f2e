"""Settings as the code takes them: seconds and fractions in, whole milliseconds and percent inside."""

from __future__ import annotations

import pytest

import coordlib
from coordlib.config import Timing, drift_percent
from coordlib.node.driver import ClientDriver

SECRET = "a secret that is long enough for these tests"
ENDPOINT = "tcp://127.0.0.1:7400"


@pytest.mark.parametrize(
    ("bound", "percent"),
    [(0, 0), (0.0, 0), (0.0001, 1), (0.009, 1), (0.01, 1), (0.011, 2), (0.07, 7), (0.14, 14), (0.2, 20)],
)
def test_the_drift_bound_is_rounded_up(bound: float, percent: int) -> None:
    """Never to less than what was asked for, nor up by the noise of a float."""
    assert drift_percent(bound) == percent
    timing = Timing.from_seconds(
        heartbeat=0.1,
        election_timeout=(1.0, 2.0),
        session_ttl=10,
        drift_bound=bound,
        request_timeout=10,
        start_timeout=10,
    )
    assert timing.drift_percent == percent


@pytest.mark.parametrize("bound", [-0.01, 0.21, float("nan"), float("inf"), "0.01", None, True])
def test_a_drift_bound_that_cannot_be_is_refused(bound: object) -> None:
    """By members and clients alike, at construction, by its name."""
    with pytest.raises(coordlib.ConfigError, match="drift_bound"):
        drift_percent(bound)
    for connect in (coordlib.connect, coordlib.connect_async):
        with pytest.raises(coordlib.ConfigError, match="drift_bound"):
            connect(ENDPOINT, cluster="shop", secret=SECRET, drift_bound=bound)  # type: ignore[arg-type]  # the point


@pytest.mark.parametrize(("given", "percent"), [({}, 1), ({"drift_bound": 0.05}, 5)])
def test_a_client_counts_with_the_drift_it_was_given(given: dict[str, float], percent: int) -> None:
    """Its sessions are as careful as those of the members."""
    client = coordlib.connect(ENDPOINT, cluster="shop", secret=SECRET, **given)  # type: ignore[arg-type]  # one setting
    make_driver = client._make_driver
    driver = make_driver()
    assert isinstance(driver, ClientDriver)
    assert driver._settings.timing.drift_percent == percent
