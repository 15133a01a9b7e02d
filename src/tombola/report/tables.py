"""Tables: each the numbers of one chart, made from an analysis's table; percentages are on the scale 0..100.

Columns are named as a reader is to see them: they are the headings of the tables and the titles of the axes. Numbers
are means over the seeds that are there, unless their names say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from tombola import analysis
from tombola.analysis.accuracy import Row
from tombola.analysis.gather import ALL, DATA_ORDER, IMPORTANCES

DENSITY = "alive %"
"""The heading of the share of all connections that are alive."""

TWO, NOISE = "two importances", "two data orders"


def together(importances: int) -> str:
    """Return what the comparison of all importances is called.

    >>> together(5)
    'all 5 importances'
    """
    return f"all {importances} importances"


def accuracy(results: Sequence[Row]) -> pl.DataFrame:
    """Return the accuracy of each importance and level: importance, level, alive %, seeds, accuracy %, sd, low, high.

    Standard deviations are over seeds (n - 1), null for one seed; low and high are one of them from the mean.
    Trainings that diverged are counted in `diverged`.

    >>> rows = [Row("l1", seed, 1, 0.8, 0.9 + 0.02 * seed, 8, 0.1, False) for seed in (0, 1)]
    >>> accuracy(rows).select("level", "seeds", "accuracy %", "low", "high").row(0)
    (1, 2, 91.0, 89.586, 92.414)
    """
    frame = pl.DataFrame(
        [(r.importance, r.level, r.density, r.test_accuracy, r.diverged) for r in results],
        {"importance": pl.String, "level": pl.Int64, "d": pl.Float64, "a": pl.Float64, "diverged": pl.Boolean},
        orient="row",
    )
    mean, sd = 100 * pl.col("a").mean(), 100 * pl.col("a").std()
    return frame.group_by("importance", "level", maintain_order=True).agg(
        (100 * pl.col("d").mean()).alias(DENSITY),
        pl.col("a").count().cast(pl.Int64).alias("seeds"),
        mean.round(4).alias("accuracy %"),
        sd.round(4).alias("sd"),
        (mean - sd).round(3).alias("low"),
        (mean + sd).round(3).alias("high"),
        pl.col("diverged").sum().cast(pl.Int64),
    )


def paper(reported: pl.DataFrame, found: pl.DataFrame) -> pl.DataFrame:
    """Return the paper's accuracies at the levels and importances that `found` (of `accuracy`) has."""
    ours = found.select("importance", "level", DENSITY, "accuracy %")
    return reported.join(ours, on=["importance", "level"], how="inner", maintain_order="left").select(
        "importance",
        "level",
        DENSITY,
        (100 * pl.col("accuracy")).alias("paper %"),
        (100 * pl.col("sd")).alias("paper sd"),
        (100 * (pl.col("accuracy") - pl.col("sd"))).alias("low"),
        (100 * (pl.col("accuracy") + pl.col("sd"))).alias("high"),
        "accuracy %",
        (pl.col("accuracy %") - 100 * pl.col("accuracy")).alias("ours - paper"),
    )


def pairs(overlap: pl.DataFrame, level: int | None = None) -> pl.DataFrame:
    """Return what every two tickets share at each level, in both orders: level, ticket, other, shared %, by chance %.

    Args:
        overlap: of `tombola.analysis.overlap`.
        level: the only one, where one is given.
    """
    found = overlap.filter((pl.col("layer") == ALL) & (pl.col("k") == 2))
    if level is not None:
        found = found.filter(pl.col("level") == level)
    found = found.with_columns(
        ticket=pl.col("tickets").list.get(0),
        other=pl.col("tickets").list.get(1),
    )
    both = pl.concat([found, found.with_columns(ticket="other", other="ticket")])
    return (
        analysis.overlap.summarise(both, "level", "ticket", "other")
        .sort("level", maintain_order=True)
        .select(
            *("level", "ticket", "other"),
            (100 * pl.col("shared_of_ticket")).alias("shared %"),
            (100 * pl.col("layers_expected")).alias("by chance %"),
            (100 * pl.col("jaccard")).alias("Jaccard %"),
            pl.col("comparisons").alias("seeds"),
        )
    )


def overlap(table: pl.DataFrame, importances: int) -> pl.DataFrame:
    """Return what tickets share at each level: every two importances, all, and two data orders.

    Columns: comparison, level, alive %, shared % (of a ticket's connections), lowest %, highest % (over pairs and
    seeds), and what chance gives: for random tickets with the same number of connections in each layer, and with the
    same number in all.

    Args:
        table: of `tombola.analysis.overlap`.
        importances: how many the study has.
    """
    means = analysis.overlap.summarise(table.filter(pl.col("layer") == ALL), "kind", "k", "level")
    return pl.concat(
        means.filter((pl.col("kind") == kind) & (pl.col("k") == k))
        .sort("level")
        .select(
            pl.lit(name).alias("comparison"),
            "level",
            (100 * pl.col("density")).alias(DENSITY),
            (100 * pl.col("shared_of_ticket")).alias("shared %"),
            (100 * pl.col("lowest")).alias("lowest %"),
            (100 * pl.col("highest")).alias("highest %"),
            *_BY_CHANCE,
        )
        for name, kind, k in _comparisons(importances)
    )


def _comparisons(importances: int) -> list[tuple[str, str, int]]:
    """Return (name, kind, how many tickets) of what is compared."""
    every = [(together(importances), IMPORTANCES, importances)] if importances > 2 else []
    return [(TWO, IMPORTANCES, 2), *every, (NOISE, DATA_ORDER, 2)]


_BY_CHANCE = (
    (100 * pl.col("layers_expected")).alias("chance, by layers %"),
    (100 * pl.col("global_expected")).alias("chance, overall %"),
)
"""What random tickets share, in % of a ticket."""


def overlap_by_layer(table: pl.DataFrame, level: int, importances: int) -> pl.DataFrame:
    """Return what all importances (or the two) and two data orders share in each layer at a level."""
    means = analysis.overlap.summarise(table.filter(pl.col("level") == level), "kind", "k", "layer")
    return pl.concat(
        means.filter((pl.col("kind") == kind) & (pl.col("k") == k)).select(
            pl.lit(name).alias("comparison"),
            "layer",
            "connections",
            (100 * pl.col("shared_of_ticket")).alias("shared %"),
            *_BY_CHANCE,
        )
        for name, kind, k in _comparisons(importances)
    )


def layers(table: pl.DataFrame, importance: str) -> pl.DataFrame:
    """Return how dense each layer of an importance's tickets is: layer, level, alive %, on paths %, collapsed, seeds.

    `collapsed` is in how many of the seeds the layer has no connection alive.

    Args:
        table: of `tombola.analysis.layers`.
        importance: whose.
    """
    own = table.filter((pl.col("importance") == importance) & (pl.col("layer") != ALL))
    return analysis.layers.summarise(own).select(
        "layer",
        "level",
        (100 * pl.col("density")).alias(DENSITY),
        (100 * pl.col("effective_density")).alias("on paths %"),
        "collapsed",
        "seeds",
    )


def by_level(table: pl.DataFrame, value: str) -> pl.DataFrame:
    """Return a table of `layers` with a row for each layer and a column for each level."""
    return table.with_columns(pl.col("level").cast(pl.String)).pivot("level", index="layer", values=value)


def stability(table: pl.DataFrame, measure: str) -> pl.DataFrame:
    """Return one measure of shared and other connections: importance, layer, of each its mean and quartiles, effect.

    Args:
        table: of `tombola.analysis.stability`.
        measure: one of `tombola.analysis.stability.MEASURES`.
    """
    names = {
        f"{group}_{figure}": f"{group}, {text}"
        for group in ("shared", "other")
        for figure, text in (("mean", "mean"), ("q25", "25 %"), ("q50", "median"), ("q75", "75 %"))
    }
    return (
        table.filter(pl.col("measure") == measure)
        .group_by("importance", "layer", maintain_order=True)
        .agg(
            pl.col("shared", "other").mean().round(1),
            *(pl.col(column).mean().alias(name) for column, name in names.items()),
            pl.col("effect").mean(),
        )
        .rename({"shared": "shared connections", "other": "other connections"})
    )


def weights(table: pl.DataFrame, quantity: str) -> pl.DataFrame:
    """Return how one quantity is distributed: importance, layer, connections, and its quantiles.

    Args:
        table: of `tombola.analysis.weights`.
        quantity: "initial", "rewind", "end" or "score".
    """
    names = {"min": "least", "q05": "5 %", "q25": "25 %", "q50": "median", "q75": "75 %", "q95": "95 %", "max": "most"}
    return (
        table.filter(pl.col("quantity") == quantity)
        .group_by("importance", "layer", maintain_order=True)
        .agg(
            pl.col("count").mean().round(1).alias("connections"),
            *(pl.col(column).mean().alias(name) for column, name in names.items()),
        )
    )


def reinit(table: pl.DataFrame) -> pl.DataFrame:
    """Return how often kept connections survive: importance, layer, and their excess over chance in %.

    Counts are means over seeds and draws; `draws` is how many each of the seeds has. `low` and `high` are the 95 %
    interval over draws, `chance low` and `chance high` that of one draw by chance.

    Args:
        table: of `tombola.analysis.reinit`, of one level and one set of importances.
    """
    bounds = ("low", "high", "chance_low", "chance_high")
    return table.group_by("importance", "layer", maintain_order=True).agg(
        pl.col("connections").first(),
        pl.col("kept").mean().round(1),
        pl.col("draws").first(),
        pl.len().cast(pl.Int64).alias("seeds"),
        pl.col("survived").mean(),
        pl.col("expected").mean().alias("by chance"),
        (100 * pl.col("excess").mean()).alias("more than chance, %"),
        *((100 * pl.col(name).mean()).alias(name.replace("_", " ")) for name in bounds),
    )


def connectivity(table: pl.DataFrame) -> pl.DataFrame:
    """Return the error between every two tickets: what differs, tickets, position on the line, error %, barrier.

    Args:
        table: of `tombola.analysis.connectivity`.
    """
    return (
        table.with_columns(pl.col("tickets").list.join(" & "))
        .group_by("kind", "tickets", "alpha", maintain_order=True)
        .agg(
            (100 * pl.col("error").mean()).alias("error %"),
            (100 * pl.col("barrier").mean()).alias("barrier, points"),
            pl.len().cast(pl.Int64).alias("seeds"),
        )
        .rename({"kind": "what differs", "alpha": "position"})
    )


def functions(table: pl.DataFrame) -> pl.DataFrame:
    """Return how alike every two tickets predict, and dense networks: comparison, agreement and what chance gives.

    Args:
        table: of `tombola.analysis.functions`.
    """
    named = table.filter(pl.col("k") == 2).with_columns(
        pl.when(pl.col("kind") == "seeds")
        .then(pl.lit("dense, two seeds"))
        .when((pl.col("level") == 0) & (pl.col("kind") == DATA_ORDER))
        .then(pl.lit("dense, two data orders"))
        .otherwise(pl.col("tickets").list.join(" & "))
        .alias("compared"),
        order=pl.when(pl.col("level") == 0).then(2).when(pl.col("kind") == DATA_ORDER).then(1).otherwise(0),
    )
    return (
        named.sort("order", maintain_order=True)
        .group_by("compared", maintain_order=True)
        .agg(
            (100 * pl.col("agreement").mean()).alias("agreement %"),
            (100 * pl.col("low").min()).alias("low"),
            (100 * pl.col("high").max()).alias("high"),
            (100 * pl.col("expected").mean()).alias("if independent %"),
            pl.col("kappa").mean(),
            (100 * pl.col("accuracy").mean()).alias("mean accuracy %"),
            (100 * pl.col("ensemble_accuracy").mean()).alias("ensemble accuracy %"),
            pl.len().cast(pl.Int64).alias("comparisons"),
        )
    )
