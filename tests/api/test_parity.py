"""Both faces offer the same operations with the same arguments."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import coordlib

# What `MutableMapping` calls by other means, a task must call by name.
ONLY_ASYNC_MAP = {"contains", "size"}
ONLY_ASYNC_CLUSTER = {"local"}  # `coordlib.local()` for threads


def operations(cls: type[Any]) -> dict[str, Any]:
    return {
        name: value for name, value in inspect.getmembers(cls, inspect.isroutine) if not name.startswith("_")
    }


@pytest.mark.parametrize(
    ("plain", "asynchronous", "only_asynchronous"),
    [
        (coordlib.Cluster, coordlib.AsyncCluster, ONLY_ASYNC_CLUSTER),
        (coordlib.Map, coordlib.AsyncMap, ONLY_ASYNC_MAP),
        (coordlib.Lock, coordlib.AsyncLock, set()),
        (coordlib.Service, coordlib.AsyncService, set()),
        (coordlib.Batch, coordlib.AsyncBatch, set()),
        (coordlib.Transaction, coordlib.AsyncTransaction, set()),
        (coordlib.Ids, coordlib.AsyncIds, set()),
    ],
)
def test_both_faces_have_the_same_operations(
    plain: type[Any], asynchronous: type[Any], only_asynchronous: set[str]
) -> None:
    """The same names, and for each the same parameters with the same defaults."""
    ours, theirs = operations(plain), operations(asynchronous)
    assert set(theirs) - only_asynchronous == set(ours)
    for name, function in ours.items():
        parameters = list(inspect.signature(function).parameters.values())
        others = list(inspect.signature(theirs[name]).parameters.values())
        assert [(p.name, p.kind, p.default) for p in parameters] == [
            (p.name, p.kind, p.default) for p in others
        ], name


def test_the_ways_to_make_a_client_take_the_same_arguments() -> None:
    """`connect` and `connect_async` differ in what they return."""
    ours = inspect.signature(coordlib.connect).parameters
    assert ours == inspect.signature(coordlib.connect_async).parameters
