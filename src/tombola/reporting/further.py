"""Further tables of the report: of the analyses that ask what the paper does not ask; percentages in 0..100."""

from __future__ import annotations

import polars as pl

from tombola.analysis import controls as controls_analysis
from tombola.analysis import early as early_analysis
from tombola.analysis import initial as initial_analysis
from tombola.analysis import matching as matching_analysis
from tombola.analysis import similarity as similarity_analysis
from tombola.study.controls import KINDS
from tombola.training.metrics import Measure


def matching(table: pl.DataFrame) -> pl.DataFrame:
    """Return the overlap of each two tickets before and after matching, each beside chance; means over seeds.

    Args:
        table: from `tombola.analysis.matching`.
    """
    return matching_analysis.summarise(table).select(
        pl.col("kind").alias("what differs"),
        "tickets",
        (100 * pl.col("jaccard")).alias("overlap %"),
        (100 * pl.col("layers_jaccard")).alias("chance %"),
        (100 * pl.col("matched_jaccard")).alias("matched %"),
        (100 * pl.col("chance_jaccard")).alias("chance, matched %"),
        *_bounds("chance_"),
        (100 * pl.col("moved")).alias("units moved %"),
        "pairs",
    )


def initial(table: pl.DataFrame) -> pl.DataFrame:
    """Return how many of the largest initial weights of each layer are in the tickets; means over seeds.

    Args:
        table: from `tombola.analysis.initial`.
    """
    return initial_analysis.summarise(table).select(
        *("importance", "quantity", "layer"),
        (100 * pl.col("density")).alias("density %"),
        (100 * pl.col("kept")).alias("largest kept %"),
        *_bounds(),
        (100 * pl.col("expected")).alias("chance %"),
        "excess",
        "seeds",
    )


def similarity(means: pl.DataFrame) -> pl.DataFrame:
    """Return how the predictions of each two networks differ; means over seeds, with their 95 % intervals.

    Args:
        means: from `tombola.analysis.similarity.summarise`.
    """
    return similarity_analysis.select_outputs(means).select(
        *(pl.col("kind").alias("what differs"), "tickets"),
        *_with_interval("disagreement", "disagreement %", 100),
        *(each for name in ("kl", "js", "cka") for each in _with_interval(name, name.upper())),
        "pairs",
    )


def calibration(means: pl.DataFrame) -> pl.DataFrame:
    """Return how good the predictions of each two networks and of their ensemble are; means over seeds, with intervals.

    Args:
        means: from `tombola.analysis.similarity.summarise`.
    """
    return similarity_analysis.select_outputs(means).select(
        *(pl.col("kind").alias("what differs"), "tickets"),
        *_with_interval("accuracy", "accuracy %", 100),
        *_with_interval("gain", "ensemble gain, points", 100),
        *_with_interval("ece", "calibration error %", 100),
        "pairs",
    )


def alignment(means: pl.DataFrame) -> pl.DataFrame:
    """Return the linear centred kernel alignment of each layer of each two networks; means over seeds, with intervals.

    Args:
        means: from `tombola.analysis.similarity.summarise`.
    """
    layers = means.filter(pl.col("layer") != similarity_analysis.OUTPUTS)
    return layers.select(pl.col("kind").alias("what differs"), "tickets", "layer", *_with_interval("cka", "CKA"))


def _with_interval(name: str, title: str, scale: float = 1) -> list[pl.Expr]:
    """Return a column and its bounds, see `tombola.analysis.values.intervals`, under a title."""
    titles = {name: title, f"{name}_low": f"{title}, low", f"{name}_high": f"{title}, high"}
    return [(scale * pl.col(column)).alias(each) for column, each in titles.items()]


def controls(table: pl.DataFrame, measure: Measure) -> pl.DataFrame:
    """Return what each control loses against the ticket; means over seeds, with the 95 % interval of what is lost.

    Args:
        table: from `tombola.analysis.controls.of_controls`, for one level.
        measure: what tickets are judged by.
    """
    value = measure.heading
    return controls_analysis.summarise(table).select(
        pl.col("kind").replace_strict(KINDS, return_dtype=pl.String).alias("trained"),
        "importance",
        (pl.col("ticket") * measure.scale).alias(f"ticket {value}"),
        (pl.col("value") * measure.scale).alias(f"control {value}"),
        *(pl.col(name) * measure.scale for name in ("lost", "low", "high")),
        "seeds",
    )


def combinations(table: pl.DataFrame, measure: Measure) -> pl.DataFrame:
    """Return how unions and intersections of tickets do, beside tickets of their density; means over seeds.

    Args:
        table: from `tombola.analysis.controls.of_combinations`, for one level.
        measure: what tickets are judged by.
    """
    value = measure.heading
    return controls_analysis.summarise_combinations(table).select(
        "kind",
        pl.col("tickets").list.join(" & "),
        (100 * pl.col("density")).alias("density %"),
        (pl.col("ticket") * measure.scale).alias(f"tickets {value}"),
        (pl.col("value") * measure.scale).alias(f"combined {value}"),
        (pl.col("same_density") * measure.scale).alias("tickets as dense"),
        *(pl.col(name) * measure.scale for name in ("difference", "low", "high")),
        "seeds",
    )


def transfers(table: pl.DataFrame, measure: Measure) -> pl.DataFrame:
    """Return how masks of another study do, beside shuffled ones and the study's own tickets; means over seeds.

    Args:
        table: from `tombola.analysis.controls.of_transfers`, for one source and level.
        measure: what tickets are judged by.
    """
    value = measure.heading
    return controls_analysis.summarise_transfers(table).select(
        "importance",
        (100 * pl.col("density")).alias("density %"),
        (pl.col("dense") * measure.scale).alias(f"dense {value}"),
        (pl.col("own") * measure.scale).alias(f"own ticket {value}"),
        (pl.col("value") * measure.scale).alias(f"transferred {value}"),
        (pl.col("shuffled") * measure.scale).alias(f"shuffled {value}"),
        (pl.col("gained") * measure.scale).alias("better than shuffled by"),
        *(pl.col(name) * measure.scale for name in ("low", "high")),
        (pl.col("difference") * measure.scale).alias("better than own by"),
        "seeds",
    )


def basins(means: pl.DataFrame) -> pl.DataFrame:
    """Return the barriers of each level to the next and to the dense network, with two verdicts.

    Args:
        means: from `tombola.analysis.basins.summarise`.
    """
    return means.select(
        *("importance", "level"),
        (100 * pl.col("density")).alias("density %"),
        (100 * pl.col("next")).alias("barrier to the next level, points"),
        *_bounds(),
        (100 * pl.col("dense")).alias("to the dense network"),
        (100 * pl.col("other_order")).alias("to another data order"),
        *(_say(name) for name in ("connected", "keeps")),
        "seeds",
    )


def rewind_point(means: pl.DataFrame) -> pl.DataFrame:
    """Return the barrier between two data orders that share the first iterations; means over seeds.

    Args:
        means: from `tombola.analysis.rewind_point.summarise`.
    """
    return means.select(
        *("level", "iteration"),
        *((100 * pl.col(name)).alias(f"{name} error %") for name in ("first", "second")),
        (100 * pl.col("barrier")).alias("barrier, points"),
        *_bounds(),
        (100 * pl.col("jaccard")).alias("overlap of masks %"),
        (100 * pl.col("chance")).alias("chance %"),
        _say("connected"),
        "seeds",
    )


def early(table: pl.DataFrame) -> pl.DataFrame:
    """Return how much of the mask at the end, and of the ticket, is known at each iteration; means over seeds.

    Args:
        table: from `tombola.analysis.early`.
    """
    return early_analysis.summarise(table).select(
        *("importance", "iteration"),
        (100 * pl.col("distance")).alias("distance to the end %"),
        (100 * pl.col("known")).alias("of the mask at the end %"),
        *_bounds(),
        (100 * pl.col("chance")).alias("chance %"),
        (100 * pl.col("ticket")).alias("of the ticket %"),
        (100 * pl.col("ticket_chance")).alias("chance, ticket %"),
        "seeds",
    )


def _say(name: str) -> pl.Expr:
    """Return a column of answers as yes and no."""
    return pl.col(name).replace_strict({True: "yes", False: "no"}, return_dtype=pl.String).alias(name)


def _bounds(prefix: str = "") -> list[pl.Expr]:
    """Return the columns low and high, the 95 % interval of the share in the column before."""
    return [(100 * pl.col(f"{prefix}{bound}")).alias(bound) for bound in ("low", "high")]
