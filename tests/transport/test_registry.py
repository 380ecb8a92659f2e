"""Transports are found by name, installed or not."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from coordlib.errors import TransportNotFound
from coordlib.transport import registry
from coordlib.transport.base import TransportSettings
from coordlib_memory import MemoryTransport
from coordlib_zmq import ZmqTransport


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout that was never installed: no metadata at all."""
    monkeypatch.setattr(registry, "entry_points", lambda group: ())


def test_both_transports_are_found() -> None:
    """By the names that the documentation uses."""
    assert ZmqTransport is registry.find_transport("zmq")
    assert MemoryTransport is registry.find_transport("memory")
    assert {"memory", "zmq"} <= set(registry.installed())


@pytest.mark.usefixtures("bare")
def test_a_bare_checkout_needs_no_metadata() -> None:
    """The two that live beside the library are known without being announced."""
    assert registry.installed() == ("memory", "zmq")
    assert ZmqTransport is registry.find_transport("zmq")
    assert isinstance(registry.find_transport("memory")(TransportSettings()), MemoryTransport)


@pytest.mark.usefixtures("bare")
def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    """The error says what could have been meant."""
    with pytest.raises(TransportNotFound, match=r"'carrier-pigeon'.*memory, zmq") as caught:
        registry.find_transport("carrier-pigeon")
    assert caught.value.installed == ("memory", "zmq")


def test_an_announced_transport_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation is told from a misspelt name."""
    broken = EntryPoint("broken", "no_such_package_anywhere:Transport", "coordlib.transports")
    monkeypatch.setattr(registry, "entry_points", lambda group: (broken,))
    with pytest.raises(TransportNotFound, match="no_such_package_anywhere"):
        registry.find_transport("broken")
    assert "broken" in registry.installed()


def test_an_announced_transport_is_preferred_to_the_built_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who announces a name decides what it means."""
    mine = EntryPoint("zmq", "coordlib_memory:MemoryTransport", "coordlib.transports")
    monkeypatch.setattr(registry, "entry_points", lambda group: (mine,))
    assert MemoryTransport is registry.find_transport("zmq")
