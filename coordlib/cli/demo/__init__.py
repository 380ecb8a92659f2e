"""`coordlib demo`: three applications through kill -9, and the proofs afterwards."""

from __future__ import annotations

import argparse

from coordlib.errors import UsageError

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    from coordlib.cli.demo import story

    if not 0.5 <= arguments.seconds <= 3600:
        raise UsageError(f"--seconds is between 0.5 and 3600; got {arguments.seconds:g}")
    return story.run(
        seconds=arguments.seconds,
        is_plain=arguments.plain,
        sabotage=arguments.sabotage,
        database=arguments.db,
    )
