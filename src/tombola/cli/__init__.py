"""The command line."""

from tombola.cli.main import main

__all__ = ["main"]
