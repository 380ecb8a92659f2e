"""What happens to running nodes when the host forks: the child keeps none of them.

gunicorn, Celery and multiprocessing fork. The threads do not come along, the descriptors do: a child that
kept them would hold the parent's port and directory lock after the parent's death, and its peers would
never see the parent die.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["register", "unregister"]


class _Forkable(Protocol):
    def after_fork_in_child(self) -> None: ...


# Process-wide on purpose: a fork copies the process, whoever holds the handles.
_live: weakref.WeakSet[_Forkable] = weakref.WeakSet()
_graveyard: list[object] = []


def register(node: _Forkable) -> None:
    _live.add(node)


def unregister(node: _Forkable) -> None:
    _live.discard(node)


def _after_fork_in_child() -> None:
    for node in list(_live):
        # Never finalised: closing inherited ZeroMQ objects would wait for threads that are not here.
        _graveyard.append(node)
        node.after_fork_in_child()
    _live.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
