"""`coordlib keys new`: a secret for a cluster."""

from __future__ import annotations

import argparse
import os

from coordlib.wire.keys import generate_secret

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    print(generate_secret(os.urandom))
    return 0
