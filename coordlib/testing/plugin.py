"""The pytest plugin: the fixtures `cluster` and `sim`, the marker `coordlib`, the option `--coordlib-seed`.

pytest imports it at every start of whoever has coordlib installed, and with it coordlib itself, which takes about a
fifth of a second. Nothing is started or replaced before a test asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

import pytest

if TYPE_CHECKING:
    import coordlib
    from coordlib.testing import Simulation

MARKER: Final = (
    "coordlib(seeds=1, members=3, faults='none', ...): how the fixture `sim` is made: for how many seeds the test runs, "
    "and the arguments of coordlib.testing.Simulation"
)
_SIMULATION: Final = pytest.StashKey["Simulation"]()
_FAILURE: Final = pytest.StashKey[BaseException]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("coordlib", "simulated clusters (coordlib)")
    group.addoption(
        "--coordlib-seed",
        type=int,
        default=None,
        metavar="N",
        help="Run the simulations of the fixture `sim` with this seed only.",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Asked for by our `sim` alone: somebody else's fixture of that name is left alone.
    if "_coordlib_seed" not in metafunc.fixturenames:
        return
    definition = metafunc.definition
    count = _options(definition).get("seeds", 1)
    if not isinstance(count, int) or count < 1:
        raise pytest.UsageError(
            f"{definition.nodeid}: coordlib(seeds=...) is a number of at least 1; got {count!r}"
        )
    if count > 1:
        given = metafunc.config.getoption("coordlib_seed")
        first = _first_seed(definition)
        seeds = range(first, first + count) if given is None else [given]
        metafunc.parametrize("_coordlib_seed", seeds, ids=[f"seed={seed}" for seed in seeds])


def _options(item: Any) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for marker in reversed(list(item.iter_markers("coordlib"))):  # the closest one has the last word
        if marker.args:
            raise pytest.UsageError(f"{item.nodeid}: the marker coordlib takes names only, as seeds=20")
        options.update(marker.kwargs)
    return options


def _first_seed(item: Any) -> int:
    # The same wherever and in whatever order tests run; another one for each test.
    owner = item.cls.__name__ if item.cls is not None else ""
    return crc32(f"{item.path.name}::{owner}::{item.originalname or item.name}".encode()) % 1_000_000


@pytest.fixture
def _coordlib_seed(request: pytest.FixtureRequest) -> int:
    given: int | None = request.config.getoption("coordlib_seed")
    return _first_seed(request.node) if given is None else given


@pytest.fixture
def sim(request: pytest.FixtureRequest, _coordlib_seed: int) -> Iterator[Simulation]:
    """A simulated cluster (`coordlib.testing.Simulation`), as the marker `coordlib` describes it."""
    from coordlib.testing import Simulation

    item = request.node
    options = _options(item)
    options.pop("seeds", None)
    simulation = Simulation(_coordlib_seed, **options)
    simulation.repeat_with = f"pytest '{item.nodeid}' --coordlib-seed={_coordlib_seed}"
    item.stash[_SIMULATION] = simulation
    simulation.__enter__()
    try:
        yield simulation
    finally:
        failure = item.stash.get(_FAILURE, None)
        simulation.__exit__(type(failure) if failure is not None else None, failure, None)


@pytest.fixture
def cluster() -> Iterator[coordlib.Cluster]:
    """A started cluster of this one process (`coordlib.local()`), new for each test."""
    import coordlib

    with coordlib.local() as local:
        yield local


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    simulation = item.stash.get(_SIMULATION, None)
    if simulation is not None and call.excinfo is not None and report.failed:
        if call.when == "call":
            item.stash[_FAILURE] = call.excinfo.value
        report.sections.append(
            (
                "coordlib",
                f"simulated with seed {simulation.seed}, at {simulation.now:.3f} s. Repeat it: {simulation.repeat_with}",
            )
        )
    return report
