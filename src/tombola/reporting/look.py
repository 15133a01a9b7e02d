"""Look: the colours, dashes, shapes and fonts of charts.

The n-th importance of a study has the n-th colour, dash and shape in every chart. A search found the
twelve colours: it made their smallest distance as large as possible for readers with normal vision, protanopia,
deuteranopia and tritanopia (simulated; Machado, Oliveira and Fernandes, IEEE TVCG 15, 2009). Each colour has a contrast
of 3 or more to the page. Smallest distances in CIELAB, for the least favourable vision:

    colours                              light page    dark page
    the first five                       24            26
    all twelve                           16            15
    with the same dash or the same shape 25            25
"""

from __future__ import annotations

from typing import Any, TypeAlias

import altair as alt

from tombola.terminal import visible

LIGHT = (
    *("#2096FF", "#D1800A", "#11715C", "#8644B1", "#432356", "#888899"),
    *("#581F32", "#916400", "#A28B6B", "#143C00", "#0F00AE", "#952937"),
)
DARK = (
    *("#3B84FF", "#CD7B00", "#41FFBE", "#BC2176", "#E2B9FF", "#DFE4EE"),
    *("#CB94B0", "#BCBE70", "#8E6856", "#B6F207", "#1563C3", "#C71C06"),
)
DASHES = ([1, 0], [6, 2], [2, 2], [8, 2, 2, 2], [12, 3], [4, 4], [1, 3], [10, 2, 2, 2, 2, 2])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")

INK = {"light": "#1b1f24", "dark": "#e8eaed"}
QUIET = {"light": "#5b636d", "dark": "#a3abb5"}
GRID = {"light": "#e3e6ea", "dark": "#2e343b"}
ALARM = {"light": "#c1121f", "dark": "#ff6b6b"}

Chart: TypeAlias = alt.Chart | alt.LayerChart | alt.FacetChart

_SIZE = 12  # font size on a page, in points

COLUMN, BOTH_COLUMNS = 3.3, 6.9
"""Widths in inches: of one of a paper's two columns, and of both."""


def dash(number: int) -> list[int]:
    """Return the dash of the n-th importance, from 0."""
    return DASHES[number % len(DASHES)]


def shape(number: int) -> str:
    """Return the shape of the n-th importance, from 0. When the dashes repeat, the shapes differ.

    >>> [(dash(number), shape(number)) for number in (0, 8)]
    [([1, 0], 'circle'), ([1, 0], 'square')]
    """
    return SHAPES[(number + number // len(DASHES)) % len(SHAPES)]


def css() -> str:
    """Return the CSS variables with the colours of charts on a page, light and dark.

    >>> css().count("--c11:")
    2
    """

    def variables(theme: str, colours: tuple[str, ...]) -> str:
        named = {"ink": INK[theme], "quiet": QUIET[theme], "grid": GRID[theme], "alarm": ALARM[theme]}
        named |= {f"c{number}": colour for number, colour in enumerate(colours)}
        return "".join(f"--{name}:{value};" for name, value in named.items())

    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{variables('dark', DARK)}}}}}"
    return f":root{{{variables('light', LIGHT)}}}{dark}"


def on_page(chart: Chart) -> dict[str, Any]:
    """Return a chart as a Vega-Lite specification with the width of its container and the colours of the page."""
    colours = [f"var(--c{number})" for number in range(len(LIGHT))]
    names = {name: f"var(--{name})" for name in ("ink", "quiet", "grid", "alarm")}
    config = _config(names, colours, "system-ui, sans-serif", _SIZE, 3)
    return _specification(chart) | {"width": "container", "config": config}


def on_paper(chart: Chart, inches: float) -> dict[str, Any]:
    """Return a chart as a Vega-Lite specification of this width (1 inch = 72 points), with text of 7 to 8 points."""
    names = {"ink": INK["light"], "quiet": QUIET["light"], "grid": GRID["light"], "alarm": ALARM["light"]}
    columns, size = 3 if inches < 5 else 6, 7.5
    config = _config(names, list(LIGHT), "Liberation Sans, Arial, sans-serif", size, columns)
    specification = _specification(chart)
    height = round(specification["height"] * size / _SIZE)
    return specification | {"width": 72 * inches, "height": height, "config": config, "background": "white"}


def inline(chart: Chart, title: str) -> Chart:
    """Return a chart with a title, colours and fonts of its own, as a notebook shows it."""
    names = {"ink": INK["light"], "quiet": QUIET["light"], "grid": GRID["light"], "alarm": ALARM["light"]}
    config = _config(names, list(LIGHT), "system-ui, sans-serif", _SIZE, 3) | {"background": "white"}
    del config["legend"]["layout"]  # Altair's schema does not have it
    drawable = type(chart).from_dict(_with_visible_texts(chart.to_dict(validate=False)), validate=False)
    styled: Chart = drawable.properties(title=visible(title)).configure(**config)
    return styled


def _specification(chart: Chart) -> dict[str, Any]:
    specification: dict[str, Any] = chart.to_dict(
        validate=False
    )  # validation takes seconds; tests draw every chart in a browser
    specification.pop("config", None)
    shown: dict[str, Any] = _with_visible_texts(specification)
    return shown | {"autosize": {"type": "fit-x", "contains": "padding"}}


def _with_visible_texts(part: Any) -> Any:
    """Return a part of a specification with every text in it, keys included, made visible."""
    if isinstance(part, str):
        return visible(part)
    if isinstance(part, dict):
        return {visible(key): _with_visible_texts(value) for key, value in part.items()}
    return [_with_visible_texts(each) for each in part] if isinstance(part, list | tuple) else part


def _config(
    names: dict[str, str], colours: list[str], font: str, size: float, columns: int | dict[str, str]
) -> dict[str, Any]:
    line = size / 7
    return {
        "background": "transparent",
        "font": font,
        "aria": False,
        "padding": 2,
        "view": {"stroke": None},
        "range": {"category": colours, "symbol": list(SHAPES)},
        "axis": {
            **{f"{part}Color": names["quiet"] for part in ("label", "tick")},
            "titleColor": names["ink"],
            "gridColor": names["grid"],
            "domainColor": names["quiet"],
            "labelFontSize": size - 0.5,
            "titleFontSize": size,
            "titleFontWeight": "normal",
            "labelLimit": 12 * size,
            "labelSeparation": size / 2,
            "titlePadding": size / 2,
        },
        "axisX": {},
        "axisY": {"domain": False, "ticks": False, "labelPadding": size / 3},
        "legend": {
            "orient": "top",
            "columns": columns,
            "labelColor": names["ink"],
            "labelFontSize": size,
            "labelLimit": 11 * size,
            "title": None,
            "titleColor": names["ink"],
            "titleFontSize": size,
            "titleFontWeight": "normal",
            "symbolStrokeWidth": line,
            "symbolSize": 8 * size,
            "columnPadding": size,
            "rowPadding": 2,
            "offset": size / 2,
            "layout": {"top": {"direction": "vertical"}},
            "gradientLength": 12 * size,
            "gradientThickness": 0.7 * size,
        },
        "text": {"fontSize": size - 1, "fill": names["ink"]},
        "line": {"strokeWidth": line},
        "rule": {"strokeWidth": line / 2, "color": names["ink"]},
        "tick": {"color": names["ink"]},
        "point": {"size": 4 * size, "strokeWidth": line * 0.8},
        "style": {
            "alarm": {"fill": names["alarm"], "stroke": names["alarm"]},
        },
    }
