"""Figures: the charts of a report as files, for a paper with two columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import vl_convert

from tombola.errors import UserError
from tombola.files import write_output
from tombola.reporting.look import Chart, on_paper
from tombola.reporting.page import VEGA_LITE
from tombola.reporting.sections import Part

FORMATS = ("pdf", "svg", "png")
_DOTS = 600  # resolution of PNG files in dots per inch, as journals require it for line drawings


def write(parts: Sequence[Part], folder: Path, formats: Sequence[str], inches: float) -> list[Path]:
    """Write each chart in each format, and return the paths.

    Args:
        parts: parts that have a chart, see `tombola.reporting.sections`.
        folder: created if it does not exist.
        formats: some of `FORMATS`.
        inches: width of a figure.

    Raises:
        UserError: if the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be created: {error.strerror or error}") from error
    written = []
    for part in parts:
        assert part.chart is not None
        specification = json.dumps(on_paper(part.chart, inches))
        for name in formats:
            path = folder / f"{part.name}.{name}"
            write_output(path, _draw(specification, name))
            written.append(path)
    return written


def draw(chart: Chart, form: str, inches: float) -> bytes:
    """Return a chart as a file of one of `FORMATS`, or as an HTML page that needs no network.

    Args:
        chart: made by `tombola.reporting.charts`.
        form: one of `FORMATS`, or "html".
        inches: the width of the figure.
    """
    return _draw(json.dumps(on_paper(chart, inches)), form)


def _draw(specification: str, form: str) -> bytes:
    draw: dict[str, Callable[..., Any]] = {
        "pdf": vl_convert.vegalite_to_pdf,
        "svg": vl_convert.vegalite_to_svg,
        "png": partial(vl_convert.vegalite_to_png, ppi=_DOTS),
        "html": partial(vl_convert.vegalite_to_html, bundle=True),
    }
    drawn = draw[form](specification, vl_version=VEGA_LITE)
    return drawn.encode() if isinstance(drawn, str) else bytes(drawn)
