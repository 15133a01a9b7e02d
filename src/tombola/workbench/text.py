"""Text: the console, and numbers with their units."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table


def open_console() -> Console:
    """Return a console as wide as the terminal; without a terminal, its width is practically unlimited."""
    width = None if sys.stdout.isatty() else 10_000
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)


def empty_table() -> Table:
    """Return a table without columns."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def count(number: int, what: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1.

    >>> count(1, "worker"), count(2, "worker")
    ('1 worker', '2 workers')
    """
    return f"{number} {what}" + ("s" if number != 1 else "")


def duration(seconds: float) -> str:
    """Return a duration as text with units.

    >>> duration(3.21), duration(75), duration(7320), duration(200000)
    ('3.2 s', '1 min 15 s', '2 h 2 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    for big, small, length, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= length:
            return f"{int(seconds // length)} {big} {int(seconds % length // part)} {small}"
    raise AssertionError
