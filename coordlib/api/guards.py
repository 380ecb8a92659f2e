"""What a write can be guarded by: a grant of a lock, checked where the write is applied."""

from __future__ import annotations

from typing import Protocol

from coordlib.errors import UsageError

__all__ = ["Guard", "guard_of"]


class Guard(Protocol):
    """A grant of a lock of the same cluster."""

    @property
    def token(self) -> int: ...

    @property
    def _lock_name(self) -> bytes: ...


def guard_of(guard: Guard | None) -> tuple[bytes, int] | None:
    if guard is None:
        return None
    try:
        return guard._lock_name, guard.token
    except AttributeError:
        raise UsageError(f"guard must be the grant of a lock; got {type(guard).__name__}") from None
