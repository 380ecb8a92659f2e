"""Maps: every operation against a dictionary, for threads and for tasks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

import coordlib
from coordlib import ABSENT

VALUES: list[Any] = [None, True, False, 0, -1, 2**62, 1.5, "", "x", b"", b"\0", [1, [None]], {"a": {"b": 1}}]
KEYS: list[Any] = ["a", "b", "", "é", b"a", b"", 1, 0, -5]


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or which of a dictionary's errors it raises."""
    try:
        return call()
    except KeyError:
        return KeyError


def test_a_map_behaves_as_a_dictionary(cluster: coordlib.Cluster) -> None:
    """A thousand random operations give what a dict gives."""
    rng = random.Random(1)
    ours, model = cluster.map("m"), dict[Any, Any]()
    for _ in range(1000):
        key, value = rng.choice(KEYS), rng.choice(VALUES)
        kind = rng.randrange(14)
        if kind <= 1:
            ours[key] = model[key] = value
        elif kind == 2:
            assert outcome(lambda: ours[key]) == outcome(lambda: model[key])  # noqa: B023  # called at once
        elif kind == 3:
            assert ours.get(key, "none") == model.get(key, "none")
        elif kind == 4:
            assert outcome(lambda: ours.__delitem__(key)) == outcome(lambda: model.__delitem__(key))  # noqa: B023
        elif kind == 5:
            assert outcome(lambda: ours.pop(key)) == outcome(lambda: model.pop(key))  # noqa: B023
        elif kind == 6:
            assert ours.pop(key, "none") == model.pop(key, "none")
        elif kind == 7:
            assert ours.setdefault(key, value) == model.setdefault(key, value)
        elif kind == 8:
            pairs = {rng.choice(KEYS): rng.choice(VALUES) for _ in range(3)}
            ours.update(pairs)
            model.update(pairs)
        elif kind == 9:
            assert (key in ours) is (key in model)
        elif kind == 10:
            assert len(ours) == len(model)
        elif kind == 11 and model and rng.random() < 0.3:
            found, its_value = ours.popitem()
            assert model.pop(found) == its_value
        elif kind == 12 and rng.random() < 0.1:
            ours.clear()
            model.clear()
        elif kind == 13:
            assert ours.snapshot() == model
            assert dict(ours.items()) == model
            assert set(ours) == set(ours.keys()) == set(model)
            assert len(ours.values()) == len(model)
    assert bool(ours) is bool(model)


def test_popitem_of_an_empty_map_is_a_key_error(cluster: coordlib.Cluster) -> None:
    """As with a dict."""
    with pytest.raises(KeyError):
        cluster.map("m").popitem()


def test_update_takes_what_a_dictionary_takes(cluster: coordlib.Cluster) -> None:
    """Pairs, mappings and keywords, with the later winning."""
    ours = cluster.map("m")
    ours.update([("a", 1), ("b", 2)], b=3, c=4)
    assert ours.snapshot() == {"a": 1, "b": 3, "c": 4}
    ours.update({})
    assert len(ours) == 3


def test_compare_and_set_swaps_only_what_was_expected(cluster: coordlib.Cluster) -> None:
    """ABSENT stands for no value; None is a value."""
    ours = cluster.map("m")
    assert ours.compare_and_set("k", ABSENT, None)
    assert not ours.compare_and_set("k", ABSENT, 1)
    assert not ours.compare_and_set("k", 0, 1)
    assert ours.compare_and_set("k", None, 1)
    assert ours.compare_and_set("k", 1, ABSENT)
    assert "k" not in ours


def test_insert_refuses_a_key_that_is_there(cluster: coordlib.Cluster) -> None:
    """And changes nothing."""
    ours = cluster.map("m")
    ours.insert("k", 1)
    with pytest.raises(coordlib.KeyExists):
        ours.insert("k", 2)
    assert ours["k"] == 1


def test_revisions_rise_with_every_change(cluster: coordlib.Cluster) -> None:
    """A put returns the revision that the value then has."""
    ours = cluster.map("m")
    first, second = ours.put("k", 1), ours.put("k", 2)
    assert first < second
    versioned = ours.get_versioned("k")
    assert versioned is not None
    assert (versioned.value, versioned.create_revision, versioned.mod_revision, versioned.version) == (
        2,
        first,
        second,
        2,
    )
    assert ours.get_versioned("other") is None
    assert ours.read_stale("k") == 2


@pytest.mark.parametrize(
    "value",
    [object(), float("nan"), float("inf"), 2**63, {1: 2}, (1, 2), {1}],
    ids=lambda value: type(value).__name__,
)
def test_values_that_mean_nothing_elsewhere_are_refused(cluster: coordlib.Cluster, value: Any) -> None:
    """Before anything is sent."""
    with pytest.raises(coordlib.UsageError):
        cluster.map("m")["k"] = value
    assert "k" not in cluster.map("m")


@pytest.mark.parametrize("key", [None, 1.5, True, ("a",)], ids=repr)
def test_keys_that_are_none_are_refused(cluster: coordlib.Cluster, key: Any) -> None:
    """Keys are str, bytes and int; True is not 1."""
    with pytest.raises(coordlib.UsageError):
        cluster.map("m")[key] = 1


def test_what_is_too_large_is_refused_by_its_limit(cluster: coordlib.Cluster) -> None:
    """And the map goes on working."""
    ours = cluster.map("m")
    too_large = (coordlib.UsageError, coordlib.QuotaExceeded)
    with pytest.raises(too_large, match="1048576"):
        ours["k"] = b"x" * (1024 * 1024 + 64)
    with pytest.raises(too_large, match="4096"):
        ours["k" * 5000] = 1
    ours["k"] = 1


def test_a_codec_stores_what_the_user_wants(cluster: coordlib.Cluster) -> None:
    """Values go through it both ways."""

    codec = coordlib.Codec(
        encode=lambda value: bytes(reversed(value.encode())),
        decode=lambda data: bytes(reversed(data)).decode(),
    )
    ours = cluster.map("m", codec=codec)
    ours["k"] = "abc"
    assert ours["k"] == "abc"
    assert ours.compare_and_set("k", "abc", "d")


def test_a_big_map_is_read_in_one_piece(cluster: coordlib.Cluster) -> None:
    """Iteration shows all of it, in several pages."""
    ours = cluster.map("m")
    expected = {}
    for start in range(0, 5000, 500):
        page = {f"key-{i:05}": "v" * 50 for i in range(start, start + 500)}
        expected.update(page)
        ours.update(page)
    assert ours.snapshot() == expected
    assert len(ours) == 5000


def test_the_face_for_tasks_does_the_same() -> None:
    """Every operation, awaited."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            ours = cluster.map("m")
            first = await ours.put("a", 1)
            assert await ours.insert("b", 2) > first
            assert await ours.get("a") == 1
            assert await ours.get("x", 9) == 9
            assert await ours.contains("a")
            assert await ours.size() == 2
            assert sorted(await ours.keys()) == ["a", "b"]
            assert sorted(await ours.items()) == [("a", 1), ("b", 2)]
            assert sorted(await ours.values()) == [1, 2]
            assert sorted([key async for key in ours]) == ["a", "b"]
            assert await ours.snapshot() == {"a": 1, "b": 2}
            assert await ours.read_stale("b") == 2
            assert (await ours.get_versioned("a")) == (1, first, first, 1)
            assert await ours.compare_and_set("a", 1, 3)
            assert await ours.setdefault("a", 4) == 3
            assert await ours.delete("a")
            assert not await ours.delete("a")
            assert await ours.pop("b") == 2
            with pytest.raises(KeyError):
                await ours.pop("b")
            await ours.update({"c": 1}, d=2)
            assert await ours.popitem() in [("c", 1), ("d", 2)]
            await ours.clear()
            assert await ours.size() == 0
            await asyncio.gather(*(ours.put(i, i) for i in range(200)))
            assert await ours.size() == 200

    asyncio.run(check())
