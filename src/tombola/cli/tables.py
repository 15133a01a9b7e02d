"""Tables as text, csv or json, and the formats of numbers in them."""

from __future__ import annotations

import csv
import ctypes
import io
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO

from rich.cells import cell_len
from rich.measure import Measurement
from rich.table import Table

from tombola.terminal import visible, visible_lines
from tombola.workbench.text import empty_table, open_console

if TYPE_CHECKING:
    import polars as pl

    from tombola.training.metrics import Measure

BLANK = "\ue000"
"""A placeholder in cells without a star, so that the columns stay aligned; rich would strip a space."""


_OUTPUT: ContextVar[TextIO | None] = ContextVar("output", default=None)


@contextmanager
def reserve_output(*, to_the_end: bool = False) -> Iterator[None]:
    """Reserve standard output for `emit`. What else is printed, by a user's module for example, goes to stderr.

    Args:
        to_the_end: whether nothing else reaches standard output after the block either: a user's code may print when
            the process ends.
    """
    with _keep_output(to_the_end=to_the_end) as output:
        token = _OUTPUT.set(output)
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _OUTPUT.reset(token)


@contextmanager
def _keep_output(*, to_the_end: bool) -> Iterator[TextIO]:
    """Yield standard output. What programs and libraries write to its number meanwhile goes to stderr."""
    try:
        number, errors = sys.stdout.fileno(), sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # a stream without a number, as in a notebook
        yield sys.stdout
        return
    sys.stdout.flush()
    kept = os.dup(number)
    os.dup2(errors, number)
    try:
        with open(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=False) as output:
            yield output
    finally:
        _flush_elsewhere()
        if not to_the_end:
            os.dup2(kept, number)
        os.close(kept)


def _flush_elsewhere() -> None:
    """Write what Python's first standard output and libraries in C have buffered; the number is standard error's."""
    for stream in (sys.stdout, sys.__stdout__):
        with suppress(OSError, ValueError, AttributeError):  # it is broken, closed or None
            stream.flush()  # type: ignore[union-attr]
    with suppress(OSError, TypeError, AttributeError):  # Windows has no library of the process itself
        ctypes.CDLL(None).fflush(None)


def emit(text: str) -> None:
    """Print csv or json to standard output: for a program as it is, and for a person without control characters."""
    output = _OUTPUT.get() or sys.stdout
    print(visible_lines(text) if output.isatty() else text, file=output)


def print_table(table: Table) -> None:
    """Print a table without empty lines and trailing spaces."""
    console = open_console()
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().replace(BLANK, " ").splitlines()
    print("\n".join(line.rstrip().removeprefix(" ") for line in lines if line.strip()))  # noqa: T201 (it has colours)


def too_wide(table: Table) -> bool:
    """Return whether a table is wider than the terminal."""
    console = open_console()
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum > console.width


def show_table(header: Sequence[str], lines: Sequence[Sequence[Any]], form: str) -> None:
    """Print a table as a table, csv or json; in csv and json the words of a header are joined by `_`."""
    keys = [title.replace(" ", "_") for title in header]
    if form == "json":
        emit(json.dumps([dict(zip(keys, line, strict=True)) for line in lines], indent=1))
    elif form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([keys, *([_in_csv(value) for value in line] for line in lines)])
        emit(out.getvalue().removesuffix("\n"))
    else:
        columns = list(zip(header, *lines, strict=True))
        to_right = [all(isinstance(value, int) for value in values) for _, *values in columns]
        cells = [[visible(str(value)) for value in values] for values in columns]
        table = empty_table()
        first, *others = map("  ".join, zip(*map(_align, cells, to_right), strict=True))
        table.add_column(first)
        table.add_row("\n".join(others))  # rich takes a minute for ten thousand rows, and a moment for one
        if too_wide(table):  # its cells are wrapped
            table = empty_table()
            for (title, *_), right in zip(cells, to_right, strict=True):
                table.add_column(title, justify="right" if right else "left")
            for row in zip(*(values[1:] for values in cells), strict=True):
                table.add_row(*row)
        print_table(table)


def _align(cells: Sequence[str], to_right: bool) -> list[str]:
    """Fill the cells of a column with spaces so that all are equally wide."""
    widths = [cell_len(cell) for cell in cells]
    widest = max(widths)
    spaces = [" " * (widest - width) for width in widths]
    return [space + cell if to_right else cell + space for cell, space in zip(cells, spaces, strict=True)]


def _in_csv(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return " ".join(value)
    return str(value).lower() if isinstance(value, bool) else value


_WORDS = {"importance", "kind", "tickets", "layer", "measure", "quantity", "collapsed", "verdict", "trained"}
"""Columns of text; all others are numbers, which are aligned to the right."""


def show_frame(table: pl.DataFrame, form: str) -> None:
    """Print a polars table; join lists of names by `&`, and write `-` for missing values."""
    import polars as pl

    if form != "json":
        table = table.with_columns(pl.col(pl.List(pl.String)).list.join(" & "))
    if form != "table":
        show_table(table.columns, table.rows(), form)
        return
    columns = []
    for series in table:
        cells = ["-" if value is None else visible(str(value)) for value in series]
        width = 0 if series.name in _WORDS else max(map(len, cells), default=0)
        columns.append([cell.rjust(width) for cell in cells])
    show_table([name.replace("_", " ") for name in table.columns], list(zip(*columns, strict=True)), form)


def percent(column: str, digits: int = 2, *, sign: bool = False) -> pl.Expr:
    """Return a column of shares in 0..1 as text in percent."""
    import polars as pl

    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    return (pl.col(column) * 100).map_elements(form.format, return_dtype=pl.String)


def yes_or_no(column: str) -> pl.Expr:
    """Return a column of truth values as the words yes and no."""
    import polars as pl

    return pl.col(column).replace_strict({True: "yes", False: "no"}, return_dtype=pl.String)


def figure(column: str, measure: Measure, *, sign: bool = False) -> pl.Expr:
    """Return a column of values of what tickets are judged by as text."""
    import polars as pl

    return pl.col(column).map_elements(lambda value: measure.figure(value, sign=sign), return_dtype=pl.String)


def figure_range(low: str, high: str, measure: Measure) -> pl.Expr:
    """Return two columns of differences of what tickets are judged by as the text of a range."""
    return _range(low, high, lambda value: measure.figure(value, sign=True))


def number(column: str, form: str = "{:.3f}") -> pl.Expr:
    """Return a column of numbers as text."""
    import polars as pl

    return pl.col(column).map_elements(form.format, return_dtype=pl.String)


def number_range(low: str, high: str, form: str = "{:.3f}") -> pl.Expr:
    """Return two columns of numbers as the text of a range."""
    return _range(low, high, form.format)


def percent_range(low: str, high: str, digits: int = 2, *, sign: bool = False) -> pl.Expr:
    """Return two columns of shares in 0..1 as the text of a range in percent."""
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    return _range(low, high, lambda value: form.format(100 * value))


def _range(low: str, high: str, show: Callable[[float], str]) -> pl.Expr:
    """Return two columns as the text of a range, `-` where a bound is missing."""
    import polars as pl

    def text(pair: dict[str, float | None]) -> str:
        first, last = pair.values()
        return "-" if first is None or last is None else f"{show(first)} .. {show(last)}"

    return pl.struct(low, high).map_elements(text, return_dtype=pl.String)


def wrap(text: str, indent: int = 0) -> str:
    """Return a text in lines of at most 100 characters, or of the terminal's width if that is less.

    Args:
        text: the text; its leading spaces are kept.
        indent: the number of spaces in front of every line except the first.
    """
    start = len(text) - len(text.lstrip())
    width = max(40, min(100, shutil.get_terminal_size().columns)) if sys.stdout.isatty() else 100
    lines = textwrap.wrap(text.strip(), width, initial_indent=" " * start, subsequent_indent=" " * indent)
    return "\n".join(lines)


def size(count: float) -> str:
    """Return a number of bytes as text with a unit.

    >>> size(1_234_567)
    '1.2 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
