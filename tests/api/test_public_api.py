"""What is public: exactly what is listed, and all of it documented."""

from __future__ import annotations

import inspect

import coordlib


def test_the_public_names_are_sorted_and_complete() -> None:
    """Nothing is public that is not listed, and what is listed is there."""
    assert coordlib.__all__ == sorted(coordlib.__all__)
    public = {
        name
        for name, value in vars(coordlib).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(coordlib.__all__)


def test_every_public_name_is_documented() -> None:
    """Every class and function, and every public method of every class."""
    undocumented = []
    for name in coordlib.__all__:
        value = getattr(coordlib, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not inspect.getdoc(value):
            undocumented.append(name)
        if inspect.isclass(value) and value.__module__.startswith("coordlib."):
            undocumented += [
                f"{name}.{attribute}"
                for attribute, member in vars(value).items()
                if not attribute.startswith("_")
                and (inspect.isfunction(member) or isinstance(member, property | classmethod))
                and not inspect.getdoc(
                    getattr(value, attribute) if isinstance(member, classmethod) else member
                )
            ]
    assert undocumented == []
