"""The `coordlib` command."""

from coordlib.cli.app import main

__all__ = ["main"]
