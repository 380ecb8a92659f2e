"""`pytest tests/raft --rewrite` writes what the transcripts give now; then read the diff."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTDATA = Path(__file__).parent / "testdata"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", default=False, help="rewrite expected transcripts")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "transcript" in metafunc.fixturenames:
        paths = sorted(TESTDATA.glob("*.txt"))
        metafunc.parametrize("transcript", paths, ids=[path.stem for path in paths])


@pytest.fixture
def is_rewriting(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--rewrite", default=False))
