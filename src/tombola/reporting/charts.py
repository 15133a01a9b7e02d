"""Charts: each chart is a pure function of one table of `tombola.reporting.tables`.

A chart has no width and no colours. `tombola.reporting.look` adds those of a page or of paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import polars as pl
from altair.utils.schemapi import debug_mode

from tombola.analysis.gather import ALL, DATA_ORDER, IMPORTANCES
from tombola.reporting import look
from tombola.reporting.look import Chart
from tombola.reporting.tables import DENSITY, NOISE, TWO
from tombola.training.metrics import TEST_ACCURACY, Measure

_HEIGHT = 230
_WORK = "work, in trainings"
_FOUND, _KEEPS, _FAILS = "found", "keeps the metric", "does not"
_NOT_FROM_0 = alt.Scale(zero=False, nice=True)
_LEGEND = alt.Legend(title=None, symbolOpacity=1)
_SPARSER = "connections alive, % (log scale)"
_unchecked = debug_mode(False)
"""Altair checks every part of a chart against its schema, which takes seconds; tests draw every chart in a browser."""


@_unchecked
def accuracy(
    table: pl.DataFrame,
    importances: Sequence[str],
    dense: float | None,
    paper: pl.DataFrame | None = None,
    within: float | None = None,
    measure: Measure = TEST_ACCURACY,
) -> Chart:
    """Chart accuracy against density: for each importance a line with marks and a band over seeds; the dense network.

    Args:
        table: from `tables.accuracy`.
        importances: those of the study, in its order.
        dense: accuracy of the dense network in %, or what else tickets are judged by.
        paper: from `tables.comparison`; shown as hollow marks.
        within: show only accuracies at most this many points below the dense network's.
        measure: what tickets are judged by.
    """
    x, value = _sparsity(), measure.heading
    scale, clip = alt.Scale(zero=False, nice=True), False
    if within is not None and dense is not None:
        highest = max(table["high"].fill_null(table[value]).drop_nulls().to_list(), default=dense)
        scale, clip = alt.Scale(domain=[dense - within, max(dense, highest) + 0.05 * within], nice=False), True

    def y(column: str) -> alt.Y:
        return alt.Y(f"{column}:Q", title=f"{measure.label}, %" if measure.percent else measure.label, scale=scale)

    base = alt.Chart(_data(table.filter(pl.col(value).is_not_null() & (pl.col(DENSITY) > 0))))
    layers: list[alt.Chart] = []
    if table["sd"].is_not_null().any():
        band = base.transform_filter("isValid(datum.sd)").mark_area(opacity=0.16, clip=clip)
        layers.append(band.encode(x=x, y=y("low"), y2=alt.Y2("high:Q"), color=_colour(importances)))
    if dense is not None:
        line = alt.Chart(alt.InlineData([{value: dense}])).mark_rule(strokeDash=[2, 3], size=1.3, clip=clip)
        layers.append(line.encode(y=y(value)))
    tooltip = [*_fields("importance:N", "level:Q"), *_numbers(DENSITY, value, "sd"), *_fields("seeds:Q")]
    layers.append(
        base.mark_line(clip=clip).encode(x=x, y=y(value), color=_colour(importances), strokeDash=_dash(importances))
    )
    layers.append(
        base.mark_point(filled=True, opacity=1, clip=clip).encode(
            x=x, y=y(value), color=_colour(importances), shape=_shape(importances), tooltip=tooltip
        )
    )
    if paper is not None and len(paper):
        reported = alt.Chart(_data(paper))
        layers.append(
            reported.mark_rule(clip=clip).encode(x=x, y=y("low"), y2=alt.Y2("high:Q"), color=_colour(importances))
        )
        layers.append(
            reported.mark_point(filled=False, size=90, opacity=1, clip=clip).encode(
                x=x,
                y=y("paper %"),
                color=_colour(importances),
                shape=_shape(importances),
                tooltip=[*_fields("importance:N", "level:Q"), *_numbers("paper %", "paper std", "accuracy %")],
            )
        )
    return alt.layer(*layers, height=_HEIGHT)


@_unchecked
def frontier(
    table: pl.DataFrame, importances: Sequence[str], dense: float | None, margin: float, measure: Measure
) -> Chart:
    """Chart what a search has tried: the metric against density, in the order of the search; marks grow with the work.

    The metric is that of the first trial. The lines across are the dense network's metric and the margin below it.

    Args:
        table: from `tombola.analysis.frontier.of_walk`.
        importances: those of the study, in its order.
        dense: the metric of the dense network.
        margin: by how much a ticket may be worse.
        measure: what tickets are judged by.
    """
    allowed = margin if measure.percent or dense is None else margin * abs(dense)
    value = measure.heading
    shown = table.select(
        "importance",
        "path",
        "level",
        pl.col("work").alias(_WORK),
        (100 * pl.col("density")).alias(DENSITY),
        (measure.scale * pl.col(measure.name)).alias(value),
        pl.when("found").then(pl.lit(_FOUND)).when("keeps").then(pl.lit(_KEEPS)).otherwise(pl.lit(_FAILS)).alias("is"),
    ).filter(pl.col(DENSITY) > 0)
    x = _sparsity()
    y = alt.Y(f"{value}:Q", title=f"{measure.label}, %" if measure.percent else measure.label, scale=_NOT_FROM_0)
    states = alt.Shape(
        "is:N",
        scale=alt.Scale(domain=[_FOUND, _KEEPS, _FAILS], range=["diamond", "circle", "cross"]),
        legend=alt.Legend(title=None, columns=3),
    )
    size = alt.Size(
        f"{_WORK}:Q", scale=alt.Scale(range=[25, 220], zero=False), legend=alt.Legend(title=_WORK, columns=4)
    )
    base = alt.Chart(_data(shown))
    layers: list[alt.Chart] = []
    if dense is not None:
        lines = [{value: measure.scale * each} for each in (dense, dense - measure.gain(allowed, 0.0))]
        layers += [
            alt.Chart(alt.InlineData([line])).mark_rule(strokeDash=dash).encode(y=y)
            for line, dash in zip(lines, ([1, 0], [2, 3]), strict=True)
        ]
    tooltip = [*_fields("importance:N", "path:N", "is:N"), *_numbers(DENSITY, value, _WORK)]
    layers.append(
        base.mark_line(opacity=0.4).encode(x=x, y=y, color=_colour(importances), order=alt.Order(f"{_WORK}:Q"))
    )
    layers.append(
        base.mark_point(filled=True, opacity=1).encode(
            x=x, y=y, color=_colour(importances), shape=states, size=size, tooltip=tooltip
        )
    )
    return alt.layer(*layers, height=_HEIGHT)


@_unchecked
def matrix(table: pl.DataFrame, tickets: Sequence[str], level: int, levels: Sequence[int] = ()) -> Chart:
    """Chart the share in common of each pair of tickets as a matrix, with a slider if there are several levels.

    Args:
        table: from `tables.pairs`.
        tickets: names of the tickets, in order.
        level: the level that is shown first.
        levels: the levels of the slider.
    """
    base: alt.Chart = alt.Chart(_data(table))
    if len(levels) > 1:
        slider = alt.param(
            name="level",
            value=level,
            bind=alt.binding_range(min=min(levels), max=max(levels), step=1, name="level "),
        )
        base = base.add_params(slider).transform_filter("datum.level == level")
    there = [name for name in tickets if name in set(table["ticket"])]
    x = alt.X(
        "other:N", sort=there, title=None, axis=alt.Axis(labelAngle=-40, labelLimit=110), scale=alt.Scale(domain=there)
    )
    y = alt.Y("ticket:N", sort=there, title=None, scale=alt.Scale(domain=there))
    cells = base.mark_rect().encode(
        x=x,
        y=y,
        color=alt.Color("shared %:Q", title="shared, %", scale=alt.Scale(scheme="viridis", domain=[0, 100])),
        tooltip=[*_fields("ticket:N", "other:N", "level:Q"), *_numbers("shared %", "by chance %", "Jaccard %")],
    )
    if len(there) > 8:
        return alt.layer(cells, height=26 * len(there))
    light = alt.condition(alt.datum["shared %"] < 60, alt.value("white"), alt.value("black"))
    figures = (
        base.transform_filter("isValid(datum['shared %'])")
        .mark_text()
        .encode(x=x, y=y, text=alt.Text("shared %:Q", format=".1f"), color=light)
    )
    return alt.layer(cells, figures, height=34 * len(there))


@_unchecked
def overlap(table: pl.DataFrame) -> Chart:
    """Chart the share in common against density, with chance; takes a table of `tables.overlap`."""
    names = table["comparison"].unique(maintain_order=True).to_list()
    x, table = _sparsity(), table.filter(pl.col(DENSITY) > 0)
    long = table.unpivot(
        ["shared %", "chance, by layers %", "chance, overall %"],
        index=["comparison", "level", DENSITY],
        variable_name="what",
        value_name="share",
    ).filter((pl.col("what") == "shared %") | (pl.col("comparison") != NOISE))
    long = long.with_columns(pl.col("what").replace_strict(_KINDS))
    y = alt.Y("share:Q", title="share of a ticket's connections, %", scale=alt.Scale(domain=[0, 100]))
    comparison, shape = _comparison(names)
    dash = alt.StrokeDash(
        "what:N",
        scale=alt.Scale(domain=list(_KINDS.values()), range=[[1, 0], [6, 3], [1, 3]]),
        legend=alt.Legend(columns=2, title=None, symbolSize=700, symbolType="stroke"),  # long enough for its dashes
    )
    base = alt.Chart(_data(long))
    points = alt.Chart(_data(table))
    shared = alt.Y("shared %:Q", title="share of a ticket's connections, %", scale=alt.Scale(domain=[0, 100]))
    columns = ("shared %", "lowest %", "highest %", "chance, by layers %", "chance, overall %")
    return alt.layer(
        base.mark_line().encode(x=x, y=y, color=comparison, strokeDash=dash),
        points.mark_point(filled=True, opacity=1).encode(
            x=x,
            y=shared,
            color=comparison,
            shape=shape,
            tooltip=[*_fields("comparison:N", "level:Q"), *_numbers(*columns)],
        ),
        height=_HEIGHT,
    )


def _comparison(names: Sequence[str], columns: int = 2) -> tuple[alt.Color, alt.Shape]:
    """Return the colours and shapes of comparisons. They differ from those of importances, which are compared."""
    looks = [_COMPARISONS.get(name, ("#c2571a", "triangle-up")) for name in names]
    colours, shapes = ([each[part] for each in looks] for part in (0, 1))
    legend = alt.Legend(columns=columns, title=None)
    return (
        alt.Color("comparison:N", scale=alt.Scale(domain=list(names), range=colours), legend=legend),
        alt.Shape("comparison:N", scale=alt.Scale(domain=list(names), range=shapes), legend=legend),
    )


_KINDS = {
    "shared %": "shared",
    "chance, by layers %": "chance, by layers",
    "chance, overall %": "chance, overall",
}
_COMPARISONS = {TWO: ("#3d7fb8", "circle"), NOISE: ("#7d8791", "square")}


@_unchecked
def overlap_by_layer(table: pl.DataFrame) -> Chart:
    """Chart the share in common in each layer, with chance; takes a table of `tables.overlap_by_layer`."""
    names = table["comparison"].unique(maintain_order=True).to_list()
    layers = table["layer"].unique(maintain_order=True).to_list()
    y = _layers_down(layers, offset=len(names))
    offset = alt.YOffset("comparison:N", sort=names, scale=alt.Scale(domain=names))
    base = alt.Chart(_data(table))

    def x(column: str) -> alt.X:
        return alt.X(f"{column}:Q", title="share of a ticket's connections, %", scale=alt.Scale(domain=[0, 100]))

    colour, shape = _comparison(names, columns=1)
    return alt.layer(
        base.mark_tick(thickness=1.5).encode(x=x("chance, by layers %"), y=y, yOffset=offset),
        base.mark_rule().encode(x=x("chance, by layers %"), x2=alt.X2("shared %:Q"), y=y, yOffset=offset, color=colour),
        base.mark_point(filled=True, opacity=1).encode(
            x=x("shared %"),
            y=y,
            yOffset=offset,
            color=colour,
            shape=shape,
            tooltip=[
                *_fields("comparison:N", "layer:N"),
                *_numbers("shared %", "chance, by layers %", "chance, overall %"),
            ],
        ),
        height=max(_height(layers), (12 if len(layers) <= 30 else 8) * len(names) * len(layers)),
    )


@_unchecked
def layers(table: pl.DataFrame, least: float) -> Chart:
    """Chart the density of each layer at each level as a heat map; a cross marks a collapsed layer.

    Args:
        table: from `tables.layers`.
        least: lower end of the colour scale, in %; the same for all importances of a study.
    """
    names = table["layer"].unique(maintain_order=True).to_list()
    levels = table["level"].unique().sort().to_list()
    every = max(1, -(-len(levels) // 12))
    x = alt.X(
        "level:O",
        axis=alt.Axis(labelAngle=0, values=levels[::every]),
        scale=alt.Scale(domain=levels, paddingInner=0.04),
    )
    y = alt.Y("layer:N", sort=names, title=None, scale=alt.Scale(domain=names, paddingInner=0.04))
    scale = alt.Scale(type="log", scheme="viridis", domain=[least, 100], clamp=True)
    base = alt.Chart(_data(table))
    tooltip = [*_fields("layer:N", "level:O"), *_numbers(DENSITY, "on paths %"), *_fields("collapsed:Q", "seeds:Q")]
    return alt.layer(
        base.transform_filter(f"datum['{DENSITY}'] > 0")
        .mark_rect()
        .encode(x=x, y=y, color=alt.Color(f"{DENSITY}:Q", scale=scale, title="alive, %"), tooltip=tooltip),
        base.transform_filter("datum.collapsed > 0")
        .mark_text(text="×", fontWeight="bold", style="alarm", fontSize=13)
        .encode(x=x, y=y, tooltip=tooltip),
        height=_height(names),
    )


@_unchecked
def stability(table: pl.DataFrame, importances: Sequence[str]) -> Chart:
    """Chart mean and middle half of a measure for shared (filled) and other (hollow) connections of each importance.

    Args:
        table: from `tables.stability`.
        importances: those of the study, in its order.
    """
    whole = table.filter(pl.col("layer") == ALL)
    parts = []
    for group in ("shared", "other"):
        columns = {f"{group}, {name}": name for name in ("mean", "25 %", "75 %")}
        parts.append(whole.select("importance", pl.lit(group).alias("connections"), *columns).rename(columns))
    y = alt.Y("importance:N", sort=list(importances), title=None, scale=alt.Scale(domain=list(importances)))
    offset = alt.YOffset("connections:N", scale=alt.Scale(domain=["shared", "other"]))
    base = alt.Chart(_data(pl.concat(parts)))
    colour = _colour(importances, legend=None)
    layers: list[alt.Chart] = []
    for group, solid in (("shared", True), ("other", False)):
        own = base.transform_filter(f"datum.connections == '{group}'")
        bar = own.mark_rule(size=4, opacity=1 if solid else 0.3)
        mark = own.mark_point(filled=solid, size=60, opacity=1)
        layers.append(bar.encode(x=alt.X("25 %:Q", title=None), x2=alt.X2("75 %:Q"), y=y, yOffset=offset, color=colour))
        layers.append(
            mark.encode(
                x=alt.X("mean:Q", title=None),
                y=y,
                yOffset=offset,
                color=colour,
                shape=_shape(importances, legend=None),
                tooltip=[*_fields("importance:N", "connections:N"), *_numbers("mean", "25 %", "75 %", form=".4g")],
            )
        )
    return alt.layer(*layers, height=32 * len(importances))


@_unchecked
def effects(table: pl.DataFrame, importances: Sequence[str], title: str) -> Chart:
    """Chart the effect size in each layer, shared against other connections; takes a table of `tables.stability`."""
    others = ("shared, mean", "other, mean")
    return _by_layer(table, importances, "effect", title, others, alt.Scale(domain=[-1, 1]))


@_unchecked
def reinit(table: pl.DataFrame, importances: Sequence[str]) -> Chart:
    """Chart the survival of kept connections above chance in each layer; takes a table of `tables.reinit`."""
    column = "more than chance, %"
    title, others = "survival above chance, %", ("survived", "by chance")
    return _by_layer(table, importances, column, title, others, alt.Scale(), ("low", "high"))


@_unchecked
def controls(table: pl.DataFrame, importances: Sequence[str], measure: Measure = TEST_ACCURACY) -> Chart:
    """Chart what each control loses against the ticket, with 95 % intervals; takes a table of `further.controls`."""
    kinds = table["trained"].unique(maintain_order=True).to_list()
    title = f"{measure.label} lost" + (", points" if measure.percent else "")
    scale = alt.Scale(domain=kinds, paddingInner=0.25)
    y = alt.Y("trained:N", sort=kinds, title=None, axis=alt.Axis(labelLimit=260), scale=scale)
    offset = alt.YOffset("importance:N", sort=list(importances), scale=alt.Scale(domain=list(importances)))
    colour, shape = _colour(importances), _shape(importances)
    base = alt.Chart(_data(table))
    layers: list[alt.Chart] = [alt.Chart(alt.InlineData([{"zero": 0}])).mark_rule().encode(x=alt.X("zero:Q"))]
    if table["low"].is_not_null().any():
        rules = base.transform_filter("isValid(datum.low)").mark_rule(opacity=0.6)
        layers.append(
            rules.encode(x=alt.X("low:Q", title=title), x2=alt.X2("high:Q"), y=y, yOffset=offset, color=colour)
        )
    numbers = ["lost", "low", "high", *(name for name in table.columns if name.startswith(("ticket ", "control ")))]
    layers.append(
        base.mark_point(filled=True, opacity=0.9, size=60).encode(
            x=alt.X("lost:Q", title=title),
            y=y,
            yOffset=offset,
            color=colour,
            shape=shape,
            tooltip=[*_fields("importance:N", "trained:N"), *_numbers(*numbers)],
        )
    )
    return alt.layer(*layers, height=max(22, 9 * len(importances)) * max(1, len(kinds)))


@_unchecked
def weights(table: pl.DataFrame, importances: Sequence[str]) -> Chart:
    """Chart the distribution of weights in each layer: 5 % to 95 % as a thin bar, middle half thick, median marked.

    Args:
        table: from `tables.weights`.
        importances: those of the study, in its order.
    """
    names = table["layer"].unique(maintain_order=True).to_list()
    y, rows = _layers_down(names, offset=len(importances)), len(names) * len(importances)
    height = max(_height(names), min(9 * rows, max(3 * rows, 900)))
    return _distribution(table, importances, y, height, alt.Scale(zero=False), None)


@_unchecked
def scores(table: pl.DataFrame, importance: str, importances: Sequence[str]) -> Chart:
    """Chart the distribution of one importance in each layer on a log scale, without values of 0 or below."""
    own = table.filter(pl.col("importance") == importance)
    quantiles = ("5 %", "25 %", "median", "75 %", "95 %")
    own = own.with_columns(pl.when(pl.col(name) > 0).then(pl.col(name)).alias(name) for name in quantiles)
    names = table["layer"].unique(maintain_order=True).to_list()
    rows, height = _layers_down(names), _height(names)
    return _distribution(own, importances, rows, height, alt.Scale(type="log"), "log scale", None)


@_unchecked
def connectivity(table: pl.DataFrame) -> Chart:
    """Chart the test error on the line between each pair of tickets; takes a table of `tables.connectivity`."""
    domain = [IMPORTANCES, DATA_ORDER]
    scale = alt.Scale(domain=domain, range=[_COMPARISONS[TWO][0], _COMPARISONS[NOISE][0]])
    x = alt.X("position:Q", title="position on the line between the two tickets")
    y = alt.Y("error %:Q", title="test error, %", scale=alt.Scale(zero=True))
    what = alt.Color("what differs:N", scale=scale)
    dash = alt.StrokeDash("what differs:N", scale=alt.Scale(domain=domain, range=[[1, 0], [6, 3]]))
    base = alt.Chart(_data(table))
    return alt.layer(
        base.mark_line(opacity=0.75).encode(x=x, y=y, color=what, strokeDash=dash, detail=alt.Detail("tickets:N")),
        base.mark_point(filled=True, opacity=0.75).encode(
            x=x, y=y, color=what, tooltip=[*_fields("tickets:N"), *_numbers("position", "error %", "barrier, points")]
        ),
        height=_HEIGHT,
    )


@_unchecked
def functions(table: pl.DataFrame) -> Chart:
    """Chart how often two networks make the same prediction; takes a table of `tables.functions`."""
    names = table["compared"].to_list()
    y = alt.Y("compared:N", sort=names, title=None, axis=alt.Axis(labelLimit=190), scale=alt.Scale(domain=names))
    title = "same prediction, %"
    base = alt.Chart(_data(table))
    return alt.layer(
        base.mark_rule(opacity=0.6).encode(
            x=alt.X("low:Q", title=title, scale=alt.Scale(zero=False)), x2=alt.X2("high:Q"), y=y
        ),
        base.mark_point(filled=True, opacity=1).encode(
            x=alt.X("agreement %:Q", title=title, scale=alt.Scale(zero=False)),
            y=y,
            tooltip=[
                *_fields("compared:N"),
                *_numbers("agreement %", "low", "high", "mean accuracy %", "ensemble accuracy %"),
            ],
        ),
        height=17 * len(names),
    )


def _by_layer(
    table: pl.DataFrame,
    importances: Sequence[str],
    column: str,
    title: str,
    others: Sequence[str],
    scale: alt.Scale,
    whisker: tuple[str, str] | None = None,
) -> Chart:
    """Chart a column that may have nulls: one mark per layer and importance, and a line at 0."""
    shown = table.filter(pl.col(column).is_not_null())
    names = [name for name in table["layer"].unique(maintain_order=True) if name in set(shown["layer"])]
    y = _layers_down(names)
    there = shown["importance"].unique(maintain_order=True).to_list()
    legend = alt.Legend(title=None, symbolOpacity=1, values=there)
    colour, shape = _colour(importances, legend), _shape(importances, legend)
    base = alt.Chart(_data(shown.select("importance", "layer", column, *others, *(whisker or ()))))
    layers: list[alt.Chart] = [alt.Chart(alt.InlineData([{"zero": 0}])).mark_rule().encode(x=alt.X("zero:Q"))]
    if whisker is not None and shown[whisker[0]].is_not_null().any():
        low, high = whisker
        rules = base.transform_filter(f"isValid(datum['{low}'])").mark_rule(opacity=0.6)
        layers.append(
            rules.encode(x=alt.X(f"{low}:Q", title=title, scale=scale), x2=alt.X2(f"{high}:Q"), y=y, color=colour)
        )
    layers.append(
        base.mark_point(filled=True, opacity=0.9, size=60).encode(
            x=alt.X(f"{column}:Q", title=title, scale=scale),
            y=y,
            color=colour,
            shape=shape,
            tooltip=[*_fields("importance:N", "layer:N"), *_numbers(column, *others, form=".4g")],
        )
    )
    return alt.layer(*layers, height=_height(names, least=18))


def _distribution(
    table: pl.DataFrame,
    importances: Sequence[str],
    y: alt.Y,
    height: int,
    scale: alt.Scale,
    title: str | None,
    offset: str | None = "importance",
) -> Chart:
    """Chart quantiles as bars and medians as marks; the column `offset` places them next to each other in a row."""
    base = alt.Chart(_data(table))
    place: dict[str, Any] = {"y": y}
    if offset is not None:
        place["yOffset"] = alt.YOffset(f"{offset}:N", sort=list(importances), scale=alt.Scale(domain=list(importances)))
    legend = None if offset is None else _LEGEND
    colour = _colour(importances, legend)
    numbers = _numbers("minimum", "5 %", "25 %", "median", "75 %", "95 %", "maximum", form=".4g")
    tooltip = [*_fields("importance:N", "layer:N", "connections:Q"), *numbers]

    def x(column: str) -> alt.X:
        return alt.X(f"{column}:Q", title=title, scale=scale, axis=alt.Axis(format="~g", tickCount=5))

    def spread(low: str, high: str, size: float) -> alt.Chart:
        there = base.transform_filter(f"isValid(datum['{low}']) && isValid(datum['{high}'])")
        bar: alt.Chart = there.mark_rule(size=size).encode(
            x=x(low), x2=alt.X2(f"{high}:Q"), color=colour, tooltip=tooltip, **place
        )
        return bar

    median = base.transform_filter("isValid(datum['median'])").mark_point(filled=True, opacity=1, size=34)
    return alt.layer(
        spread("5 %", "95 %", 1),
        spread("25 %", "75 %", 4),
        median.encode(
            x=x("median"),
            color=colour,
            shape=_shape(importances, legend),
            tooltip=tooltip,
            **place,
        ),
        height=height,
    )


def _data(table: pl.DataFrame) -> alt.InlineData:
    """Return a table's rows, with numbers rounded to seven significant digits: more than a chart can show."""
    short = table.with_columns(pl.col(pl.Float64).round_sig_figs(7).fill_nan(None))
    return alt.InlineData(tuple(short.to_dicts()))  # altair copies a list for each layer, with every row in it


def _sparsity() -> alt.X:
    scale = alt.Scale(type="log", reverse=True, nice=False)
    axis = alt.Axis(
        format="~g", tickCount=6, grid=False, titleAnchor="middle"
    )  # the end of a reversed axis is on the left
    return alt.X(f"{DENSITY}:Q", title=_SPARSER, scale=scale, axis=axis)


def _colour(importances: Sequence[str], legend: alt.Legend | None = _LEGEND) -> alt.Color:
    scale = alt.Scale(domain=list(importances))
    return alt.Color("importance:N", scale=scale, legend=legend)


def _dash(importances: Sequence[str]) -> alt.StrokeDash:
    scale = alt.Scale(domain=list(importances), range=[look.dash(number) for number in range(len(importances))])
    return alt.StrokeDash("importance:N", scale=scale, legend=_LEGEND)


def _shape(importances: Sequence[str], legend: alt.Legend | None = _LEGEND) -> alt.Shape:
    scale = alt.Scale(domain=list(importances), range=[look.shape(number) for number in range(len(importances))])
    return alt.Shape("importance:N", scale=scale, legend=legend)


def _layers_down(names: Sequence[str], offset: int = 0) -> alt.Y:
    scale = alt.Scale(domain=list(names), paddingInner=0.25) if offset else alt.Scale(domain=list(names))
    return alt.Y("layer:N", sort=list(names), title=None, scale=scale)


def _height(layers: Sequence[str], least: int = 0) -> int:
    """Return the height of a chart with one row per layer, in points; many layers get lower rows."""
    return max(least, 22 if len(layers) <= 8 else 16 if len(layers) <= 30 else 12) * max(1, len(layers))


def _fields(*columns: str) -> list[alt.Tooltip]:
    """Return what is shown of a point; for plain strings, altair looks through all of its classes each time."""
    return [alt.Tooltip(column) for column in columns]


def _numbers(*columns: str, form: str = ".2f") -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{column}:Q", format=form) for column in columns]
