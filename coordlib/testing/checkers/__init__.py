"""Checkers: judge what was recorded, without knowing how it came about.

`check(operations)` says whether a history (`coordlib.testing.history`) of registers and locks is linearizable,
and explains to a person why it is not. The models are in `models`.
"""

from coordlib.testing.checkers.linearizability import STEPS_MAX, Verdict, check

__all__ = ["STEPS_MAX", "Verdict", "check"]
