"""Pages that show a whole task: the files and commands of a page, in its order, and what the commands print.

A block of code after a line such as `` `diabetes.py`: `` is a file. A `sh` block is typed, line by line; a file whose
name is in it is run with Python. A `text` block after it is what is printed.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tombola.cli import main

_BLOCK = re.compile(r"(?:^`(?P<file>[\w.]+)`:\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e-?\d+)?")
_OF_THE_MACHINE = ("time:", "critical path:", "disk:")


@dataclass(frozen=True)
class Block:
    """A block of a page: the file that it is, if it is one, its kind and its text."""

    file: str | None
    kind: str
    text: str


def blocks(page: str) -> list[Block]:
    """Return the blocks of code of a page."""
    return [Block(found["file"], found["kind"], found["text"]) for found in _BLOCK.finditer(page)]


def type_in(page: str) -> Iterator[tuple[str, str]]:
    """Write the files of a page into the current folder and type its commands; yield each `sh` block and its output."""
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).write_text(block.text)
        elif block.kind == "sh":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                for line in block.text.splitlines():
                    program, *arguments = shlex.split(line, comments=True)
                    if program == "python":
                        runpy.run_path(arguments[0], run_name="__main__")
                    else:
                        assert program == "tombola", line
                        assert main(arguments) == 0, line
            yield block.text, printed.getvalue()


def shown(page: str) -> dict[str, str]:
    """Return what a page says its commands print, by `sh` block."""
    found = blocks(page)
    return {one.text: other.text for one, other in pairwise(found) if one.kind == "sh" and other.kind == "text"}


def list_lines(printed: str, *, exact: bool) -> list[str]:
    """Return the lines of an output that do not depend on the machine; unless `exact`, every number is `#`."""
    lines = [" ".join(line.split()) for line in printed.splitlines() if not line.startswith((*_OF_THE_MACHINE, "─"))]
    return (
        lines
        if exact
        else [re.sub(r"\b(yes|no)$", "yes or no", _NUMBER.sub("#", line).replace("*", "")) for line in lines]
    )
