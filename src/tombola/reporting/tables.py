"""Tables: the numbers of each chart, computed from the table of an analysis. Percentages are in 0..100.

The names of columns are the headings that a reader sees. Numbers are means over the stored seeds, unless the name of
the column says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from tombola import analysis
from tombola.analysis.accuracy import Row, summarise
from tombola.analysis.gather import ALL, DATA_ORDER, IMPORTANCES, PRUNABLE
from tombola.analysis.verdict import Claim, describe
from tombola.pruning.coverage import Coverage
from tombola.training.metrics import TEST_ACCURACY

DENSITY = "alive %"
"""The heading of the density: alive connections in % of all."""

TWO, NOISE = "two importances", "two data orders"


def together(importances: int) -> str:
    """Return the name of the comparison of all importances.

    >>> together(5)
    'all 5 importances'
    """
    return f"all {importances} importances"


def accuracy(results: Sequence[Row]) -> pl.DataFrame:
    """Return the accuracy of each importance and level: importance, level, alive %, seeds, accuracy %, sd, low, high.

    If tickets are judged by another metric, its name stands for `accuracy %`, see `Measure.heading`.

    `sd` is the standard deviation over seeds (n - 1), null for one seed. `low` and `high` are mean - sd and mean + sd.
    `diverged` counts the trainings that diverged.

    >>> rows = [Row("l1", seed, 1, 0.8, 0.9 + 0.02 * seed, 8, 0.1, False) for seed in (0, 1)]
    >>> accuracy(rows).select("level", "seeds", "accuracy %", "low", "high").row(0)
    (1, 2, 91.0, 89.586, 92.414)
    """
    measure = results[0].measure if results else TEST_ACCURACY
    mean, std = measure.scale * pl.col("value"), measure.scale * pl.col("std")

    def round_to(column: pl.Expr, digits: int) -> pl.Expr:
        return column.round(digits) if measure.percent else column.round_sig_figs(6)

    return summarise(results).select(
        "importance",
        "level",
        (100 * pl.col("density")).alias(DENSITY),
        "seeds",
        round_to(mean, 4).alias(measure.heading),
        round_to(std, 4).alias("sd"),
        round_to(mean - std, 3).alias("low"),
        round_to(mean + std, 3).alias("high"),
        "diverged",
    )


def coverage(found: Coverage) -> pl.DataFrame:
    """Return which of the network's parameters are pruned, kept dense, left out and not chosen."""
    names = ("parameters that are", "tensors", "parameters", "%", "the largest")
    rows = [(*row[:3], 100 * row[3], row[4]) for row in found.tabulate()]
    return pl.DataFrame(
        rows, dict(zip(names, (pl.String, pl.Int64, pl.Int64, pl.Float64, pl.String), strict=True)), orient="row"
    )


def claims(found: Sequence[Claim]) -> pl.DataFrame:
    """Return the paper's claims with their verdicts and the numbers that decide, in words."""
    names = ("verdict", "ours", "chance", "noise floor", "paper")
    rows = [[claim.number, claim.statement, *(describe(claim).get(name, "–") for name in names)] for claim in found]
    return pl.DataFrame(rows, dict.fromkeys(("claim", "statement", *names), pl.String), orient="row")


def comparison(compared: pl.DataFrame, whose: str) -> pl.DataFrame:
    """Return the comparison of our accuracies with a reference's, with its verdicts.

    `low` and `high` are the reference's mean - std and mean + std. `2 SE` is two standard errors of the difference.

    Args:
        compared: from `tombola.analysis.reference.compare`.
        whose: the name of the reference, which is in the names of the columns.
    """
    ours, theirs = 100 * pl.col("accuracy"), 100 * pl.col("reference_accuracy")
    std = 100 * pl.col("reference_std")
    return compared.select(
        "importance",
        "level",
        (100 * pl.col("density")).alias(DENSITY),
        ours.round(4).alias("accuracy %"),
        (100 * pl.col("std")).round(4).alias("std"),
        "seeds",
        theirs.round(4).alias(f"{whose} %"),
        std.round(4).alias(f"{whose} std"),
        pl.col("reference_seeds").alias(f"{whose} seeds"),
        (theirs - std).round(3).alias("low"),
        (theirs + std).round(3).alias("high"),
        (100 * pl.col("difference")).round(4).alias("difference, points"),
        (200 * pl.col("standard_error")).round(4).alias("2 SE, points"),
        "verdict",
    )


def pairs(overlap: pl.DataFrame, level: int | None = None) -> pl.DataFrame:
    """Return the share in common of each pair of tickets, in both orders: level, ticket, other, shared %, by chance %.

    Args:
        overlap: from `tombola.analysis.overlap`.
        level: the level to select; None for all.
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


def overlap(table: pl.DataFrame, importances: int, total: str = ALL) -> pl.DataFrame:
    """Return the share in common at each level: of two importances, of all importances, and of two data orders.

    Columns: comparison, level, alive %, shared % (of a ticket's connections), lowest % and highest % (over pairs and
    seeds), and the expected share of random tickets with the same number of connections in each layer (chance, by
    layers %) and in the whole network (chance, overall %).

    Args:
        table: from `tombola.analysis.overlap`.
        importances: number of importances of the study.
        total: `ALL` for all counted connections, or `PRUNABLE` for those of layers that are not kept dense.
    """
    means = analysis.overlap.summarise(table.filter(pl.col("layer") == total), "kind", "k", "level")
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
    """Return (name, kind, number of tickets) of each comparison."""
    every = [(together(importances), IMPORTANCES, importances)] if importances > 2 else []
    return [(TWO, IMPORTANCES, 2), *every, (NOISE, DATA_ORDER, 2)]


_BY_CHANCE = (
    (100 * pl.col("layers_expected")).alias("chance, by layers %"),
    (100 * pl.col("global_expected")).alias("chance, overall %"),
)
"""The expected share in common of random tickets, in % of a ticket."""


def overlap_by_layer(table: pl.DataFrame, level: int, importances: int) -> pl.DataFrame:
    """Return the share in common in each layer at one level, of the same comparisons as `overlap`."""
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
    """Return the density of each layer for one importance: layer, level, alive %, on paths %, collapsed, seeds.

    `collapsed` is the number of seeds in which the layer has no connection left.

    Args:
        table: from `tombola.analysis.layers`.
        importance: its name.
    """
    own = table.filter((pl.col("importance") == importance) & ~pl.col("layer").is_in([ALL, PRUNABLE]))
    return analysis.layers.summarise(own).select(
        "layer",
        "level",
        (100 * pl.col("density")).alias(DENSITY),
        (100 * pl.col("effective_density")).alias("on paths %"),
        "collapsed",
        "seeds",
    )


def by_level(table: pl.DataFrame, value: str) -> pl.DataFrame:
    """Return a table of `layers` with one row per layer and one column per level."""
    return table.with_columns(pl.col("level").cast(pl.String)).pivot("level", index="layer", values=value)


def stability(table: pl.DataFrame, measure: str) -> pl.DataFrame:
    """Return mean and quartiles of one measure for shared and other connections, and the effect size, in each layer.

    Args:
        table: from `tombola.analysis.stability`.
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
    """Return the distribution of one quantity: importance, layer, connections, and quantiles.

    Args:
        table: from `tombola.analysis.weights`.
        quantity: "initial", "rewind", "end" or "score".
    """
    quartiles = {"q05": "5 %", "q25": "25 %", "q50": "median", "q75": "75 %", "q95": "95 %"}
    names = {"min": "minimum", **quartiles, "max": "maximum"}
    return (
        table.filter(pl.col("quantity") == quantity)
        .group_by("importance", "layer", maintain_order=True)
        .agg(
            pl.col("count").mean().round(1).alias("connections"),
            *(pl.col(column).mean().alias(name) for column, name in names.items()),
        )
    )


def reinit(table: pl.DataFrame) -> pl.DataFrame:
    """Return how often kept connections survive in each layer, and the excess over chance in %.

    Counts are means over seeds and draws; `draws` is the number of draws of each seed. `low` and `high` are the 95 %
    interval over draws; `chance low` and `chance high` are the 95 % interval of one draw under chance.

    Args:
        table: from `tombola.analysis.reinit`, for one level and one set of importances.
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
    """Return the error on the line between pairs of tickets: what differs, tickets, position, error %, barrier, seeds.

    Args:
        table: from `tombola.analysis.connectivity`.
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
    """Return how often two tickets, or two dense networks, make the same prediction, and the expectation by chance.

    Args:
        table: from `tombola.analysis.functions`.
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
