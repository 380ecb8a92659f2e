"""The words of the field as types. Imports nothing of ours, so that every layer may use them."""

from __future__ import annotations

from typing import NewType

__all__ = ["Index", "NodeId", "Revision", "SessionId", "Term", "Token"]

NodeId = NewType("NodeId", str)
"""The configured name of one member, unique in its cluster."""

Term = NewType("Term", int)
"""Raft's logical clock (Raft §5.1). 0 is before the first election."""

Index = NewType("Index", int)
"""Position in the log, 1-based; 0 means "none"."""

Revision = NewType("Revision", int)
"""Store-wide counter of changes to maps: the log index of the change."""

SessionId = NewType("SessionId", int)
"""The log index of the entry that opened the session: never used twice."""

Token = NewType("Token", int)
"""Fencing token: restore epoch (15 bits) above a replicated grant counter (48 bits)."""
