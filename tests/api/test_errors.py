"""Errors: the tree says what may be concluded, and they survive the way between processes."""

from __future__ import annotations

import inspect
import pickle

import pytest

import coordlib
from coordlib import errors

ALL = sorted(
    (
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, coordlib.CoordError)
    ),
    key=lambda cls: cls.__name__,
)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_errors_survive_pickling(cls: type[coordlib.CoordError]) -> None:
    """Class, message and numbers come back."""
    error = cls("what went wrong and what to do", term=3, leader_hint="n1")
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is cls
    assert str(twin) == str(error)
    assert (twin.term, twin.leader_hint) == (3, "n1")


def test_codes_are_unique() -> None:
    """A code names one kind of error."""
    codes = [cls.code for cls in ALL]
    assert sorted(set(codes)) == sorted(codes)


def test_the_tree_says_what_may_be_concluded() -> None:
    """Definite and indeterminate never overlap; waiting too long is a TimeoutError."""
    for cls in ALL:
        assert not (issubclass(cls, coordlib.DefiniteError) and issubclass(cls, coordlib.IndeterminateError))
    assert issubclass(coordlib.LockTimeout, coordlib.DefiniteError)
    assert issubclass(coordlib.LockTimeout, TimeoutError)
    assert issubclass(coordlib.CommitTimeout, coordlib.IndeterminateError)
    assert issubclass(coordlib.CommitTimeout, TimeoutError)
    assert issubclass(coordlib.LeadershipLost, coordlib.IndeterminateError)
    assert issubclass(coordlib.KeyMissing, KeyError)
    assert issubclass(coordlib.ForkedError, coordlib.UsageError)
    assert issubclass(coordlib.IdLeaseExpired, coordlib.DefiniteError)
    assert issubclass(coordlib.IdOverflow, coordlib.DefiniteError)
    assert issubclass(coordlib.ServiceUnreachable, coordlib.DefiniteError)
    assert issubclass(coordlib.CallTimeout, coordlib.IndeterminateError)
    assert issubclass(coordlib.CallTimeout, TimeoutError)
    assert issubclass(coordlib.CallLost, coordlib.IndeterminateError)
