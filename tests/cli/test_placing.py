"""The demo's scenes of orders on a cluster of one member: with databases, and broken on purpose. Whole demos: test_demo."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from coordlib.cli import main
from coordlib.cli.demo import stores
from coordlib.cli.demo.placing import SERVICES, Placing
from coordlib.cli.demo.stores import open_store
from coordlib.cli.demo.view import View
from coordlib.testing.databases import ServerMissing
from tests.cli.conftest import Members

IS_REQUIRED = os.environ.get("COORDLIB_REQUIRE_DATABASES") == "1"


@contextmanager
def placing(solo: Members, kind: str = "", sabotage: str = "") -> Iterator[tuple[Placing, io.StringIO]]:
    directory, said = solo.directory / "placing", io.StringIO()
    directory.mkdir()
    environment = {
        "COORDLIB_CLUSTER": "shop",
        "COORDLIB_ENDPOINTS": solo.endpoints["solo"],
        "COORDLIB_SECRET": solo.secret,
        "COORDLIB_SESSION_TTL": "2",
        "ORDERS_SABOTAGE": sabotage,
    }

    def read_orders(orders: list[str]) -> dict[str, str]:
        return {order: str(solo.clusters["solo"].map("orders").get(order)) for order in orders}

    with ExitStack() as stack:
        of_services = {}
        for name in SERVICES:
            of_services[name] = open_store(kind, directory / name)
            stack.callback(of_services[name].close)
        played = Placing(View([], is_plain=True, out=said), environment, directory, of_services, read_orders)
        with played:
            played.open()
            yield played, said


def test_an_order_over_services_with_databases_is_whole(solo: Members) -> None:
    """Two PostgreSQL servers of their own; the second time they are killed, too, and their promises with them."""
    try:
        with placing(solo, "postgres") as (played, said):
            assert played.play_before_the_decision() == []
            assert played.play_after_the_decision() == []
    except ServerMissing as missing:
        if IS_REQUIRED:
            pytest.fail(f"COORDLIB_REQUIRE_DATABASES=1, but {missing}")
        pytest.skip(str(missing))
    assert "inventory with its PostgreSQL" in said.getvalue()
    assert said.getvalue().count("is dead, too") == 2


def test_an_undone_order_that_a_service_keeps_fails_the_proof(solo: Members) -> None:
    """Both services do what was to be undone, and are found out."""
    with placing(solo, sabotage="order") as (played, _):
        assert played.play_before_the_decision() == [
            "inventory has taken order o-1",
            "billing has taken order o-1",
        ]


def test_a_demo_without_its_database_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In one line, before anything is started, and nothing is left behind."""

    def missing() -> stores._Database:
        raise ServerMissing("initdb is not installed: apt-get install postgresql")

    monkeypatch.setitem(stores._DATABASES, "postgres", missing)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["demo", "--plain", "--db", "postgres"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "coordlib demo: initdb is not installed: apt-get install postgresql\n"
    assert list(tmp_path.iterdir()) == []
