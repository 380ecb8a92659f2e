"""A scenario as text: what it stands for, and its commands, one a line.

::

    bug: etcd #11456 - a waiter is granted the lock after its own lease has expired
    why: The next in the queue was granted without looking whether its lease was still alive.

    nodes n1 n2 n3 leader=n1 sessions     # comments go to the end of the line
    ...
    settle
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

__all__ = ["Command", "Scenario", "ScenarioError", "parse", "parse_file"]


class ScenarioError(AssertionError):
    """A scenario did not go as it says, or is not one. The message names file, line, and what was seen."""


class Command(NamedTuple):
    """One line: its words, the `key=value` ones apart."""

    line: int
    text: str
    name: str
    words: tuple[str, ...]
    options: dict[str, str]


class Scenario(NamedTuple):
    """What a file says."""

    name: str
    bug: str  # the public bug, or section of a paper
    title: str
    why: str
    commands: tuple[Command, ...]

    @property
    def area(self) -> str:
        """What the file's name begins with."""
        return self.name.partition("-")[0]


def parse_file(path: Path) -> Scenario:
    """Read a scenario; its name is the file's."""
    return parse(path.stem, path.read_text(encoding="utf-8"))


def parse(name: str, text: str) -> Scenario:
    """
    Read a scenario.

    Raises:
        ScenarioError: It does not say what it stands for, asserts nothing, or does not end in `settle`.
    """
    head: dict[str, str] = {}
    commands: list[Command] = []
    for number, line in enumerate(text.splitlines(), 1):
        key, colon, rest = line.partition(":")
        if colon and key in ("bug", "why") and not commands:
            head[key] = f"{head[key]} {rest.strip()}" if key in head else rest.strip()
            continue
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ScenarioError(f"{name}.txt:{number}: {error}: {line}") from None
        if words:
            commands.append(_command(number, words))
    bug, dash, title = head.get("bug", "").partition(" - ")
    if not (bug and dash and title and head.get("why")):
        raise ScenarioError(f"{name}.txt:1: the first lines are `bug: SOURCE - TITLE` and `why: TEXT`")
    if not commands or commands[0].name != "nodes":
        raise ScenarioError(f"{name}.txt:{commands[0].line if commands else 1}: begins with `nodes`")
    if commands[-1].name != "settle" or any(command.name == "settle" for command in commands[:-1]):
        raise ScenarioError(f"{name}.txt:{commands[-1].line}: ends with `settle`, and has no other")
    if not any(command.name == "assert" for command in commands):
        raise ScenarioError(f"{name}.txt:{commands[-1].line}: asserts nothing")
    return Scenario(name, bug, title, head["why"], tuple(commands))


def _command(number: int, words: list[str]) -> Command:
    options = {}
    plain = []
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if equals and key.isidentifier() and value:
            options[key] = value
        else:
            plain.append(word)
    return Command(number, " ".join(words), words[0], tuple(plain), options)
