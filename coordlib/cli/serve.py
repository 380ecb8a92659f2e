"""`coordlib serve`: a plain member, for a machine that shall vote without running an application."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from types import FrameType

from coordlib.api.cluster import Cluster
from coordlib.cli.settings import member_arguments

__all__ = ["run"]

LOOK_SECONDS = 0.5


class _Asked(BaseException):
    """SIGTERM or SIGINT: leave in good order."""


def _ask(_signal: int, _frame: FrameType | None) -> None:
    raise _Asked


def run(arguments: argparse.Namespace) -> int:
    """0 after having been asked to stop; a node that stops by itself is an error."""
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    values = member_arguments(arguments)
    cluster = Cluster(**values)
    signals = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, _ask) for number in signals}
    try:
        try:
            cluster.start()
            driver = cluster._driver
            assert driver is not None
            stats = cluster.stats()
            print(
                f"coordlib: {values['node']} serves cluster {values['name']!r} at {values['members'][values['node']]}; "
                f"{stats.get('leader') or 'nobody'} leads term {stats.get('term', 0)}",
                flush=True,
            )
            while driver.is_running:
                time.sleep(LOOK_SECONDS)
            if driver.fatal is not None:
                raise driver.fatal
            return 1
        except _Asked:
            # A second signal while it leaves ends it at once.
            for number in signals:
                signal.signal(number, signal.SIG_DFL)
            print("coordlib: leaving", file=sys.stderr)
            return 0
        finally:
            cluster.close()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
