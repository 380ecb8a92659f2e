"""A defect as text, put into code that is already imported.

The source of one function is changed, its module compiled anew, and the function given the code that results: the
function object stays the same, so whoever holds it (a table of handlers, a subclass, an earlier import) has the
defect too. Nothing is executed again and no file is written.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from coordlib import errors

__all__ = ["Edit", "Hits", "Mutant", "PatchError", "apply", "replace", "switch_off_invariants"]

HIT = "_mutant_hit"
"""What a defect's text calls where it is in effect; it returns its argument."""


class PatchError(Exception):
    """The text to be replaced is not there exactly once: the code has moved on, and the defect must follow it."""


class Edit(NamedTuple):
    """One replacement in one function. `target` is "module:Class.method" or "module:function"."""

    target: str
    old: str
    new: str


class Mutant(NamedTuple):
    """One defect.

    Attributes:
        name: Says what the code does wrong.
        bug: Where somebody had it, or what says that it is wrong.
        edits: All of them are made, for one defect.
        tests: Where to look if the simulator and the scenarios do not see it: pytest node ids.
        unseen: Why the simulator alone cannot see it; it is then given only a few seeds. Empty: it must.
    """

    name: str
    bug: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...] = ()
    unseen: str = ""


def replace(target: str, old: str, new: str) -> Edit:
    """Replace `old`, which occurs once in the target's source, by `new`."""
    return Edit(target, old, new)


class Hits:
    """How often the changed code ran."""

    def __init__(self) -> None:
        self.count = 0

    def hit(self, value: Any = True) -> Any:
        self.count += 1
        return value


@cache
def _source(module: ModuleType) -> str:
    return inspect.getsource(module)


def _span(source: str, qualified_name: str) -> tuple[int, int]:
    """Offsets of the text of a function."""
    body: list[ast.stmt] = ast.parse(source).body
    node: ast.stmt | None = None
    for part in qualified_name.split("."):
        found = [
            item
            for item in body
            if isinstance(item, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and item.name == part
        ]
        if not found:
            raise PatchError(f"there is no {qualified_name}")
        node = found[-1]
        body = found[-1].body
    assert node is not None and node.end_lineno is not None
    lines = source.splitlines(keepends=True)
    begin = sum(map(len, lines[: node.lineno - 1]))
    return begin, begin + sum(map(len, lines[node.lineno - 1 : node.end_lineno]))


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _function(module: ModuleType, qualified_name: str) -> FunctionType:
    found: Any = module
    for part in qualified_name.split("."):
        found = inspect.getattr_static(found, part)
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, staticmethod | classmethod):
        found = found.__func__
    found = inspect.unwrap(found)
    if not isinstance(found, FunctionType):
        raise PatchError(f"{qualified_name} is no function")
    return found


def _compile(edits: list[Edit], module: ModuleType, qualified_name: str) -> CodeType:
    source = _source(module)
    begin, end = _span(source, qualified_name)
    text = source[begin:end]
    for edit in edits:
        count = text.count(edit.old)
        if count != 1:
            raise PatchError(f"{edit.target}: found {count} times, not once: {edit.old!r}")
        text = text.replace(edit.old, edit.new)
    compiled = compile(source[:begin] + text + source[end:], module.__file__ or "", "exec", dont_inherit=True)
    code = [code for code in _codes(compiled) if code.co_qualname == qualified_name]
    if len(code) != 1:
        raise PatchError(f"{qualified_name} is compiled {len(code)} times")
    return code[0]


def prepare(mutant: Mutant) -> list[tuple[FunctionType, CodeType]]:
    """
    What `apply` would change, without changing anything.

    Raises:
        PatchError: An edit does not fit the source, or nothing counts that the defect is in effect.
    """
    if not any(HIT in edit.new for edit in mutant.edits):
        raise PatchError(f"{mutant.name}: no edit calls {HIT}()")
    changes = []
    for target in dict.fromkeys(edit.target for edit in mutant.edits):
        module_name, qualified_name = target.split(":")
        module = importlib.import_module(module_name)
        function = _function(module, qualified_name)
        code = _compile([edit for edit in mutant.edits if edit.target == target], module, qualified_name)
        if code.co_freevars != function.__code__.co_freevars:
            raise PatchError(f"{target}: closes over {code.co_freevars}, not {function.__code__.co_freevars}")
        changes.append((function, code))
    return changes


def apply(mutant: Mutant) -> Hits:
    """Put a defect in, for the rest of this process's life, and return the counter of its effects."""
    hits = Hits()
    for function, code in prepare(mutant):
        function.__globals__[HIT] = hits.hit
        function.__code__ = code
    return hits


def switch_off_invariants() -> None:
    """Let `invariant()` believe everything, wherever it was imported to."""

    def believe(condition: object, message: str, *args: object) -> None:
        pass

    errors.invariant.__code__ = believe.__code__
