"""Further tables of the report: of the analyses that ask what the paper does not ask; percentages in 0..100."""

from __future__ import annotations

import polars as pl

from tombola.analysis import initial as initial_analysis
from tombola.analysis import matching as matching_analysis
from tombola.analysis import similarity as similarity_analysis


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
        (100 * pl.col("expected")).alias("chance %"),
        "excess",
        "seeds",
    )


def similarity(table: pl.DataFrame) -> pl.DataFrame:
    """Return how alike each two networks are as functions; means over seeds.

    Args:
        table: from `tombola.analysis.similarity`.
    """
    means = similarity_analysis.summarise(table.filter(pl.col("layer") == similarity_analysis.OUTPUTS))
    return means.select(
        pl.col("kind").alias("what differs"),
        "tickets",
        (100 * pl.col("disagreement")).alias("disagreement %"),
        pl.col("kl").alias("KL"),
        pl.col("js").alias("JS"),
        pl.col("cka").alias("CKA"),
        (100 * pl.col("accuracy")).alias("accuracy %"),
        (100 * pl.col("gain")).alias("ensemble gain, points"),
        (100 * pl.col("ece")).alias("calibration error %"),
        "pairs",
    )


def alignment(table: pl.DataFrame) -> pl.DataFrame:
    """Return the linear centred kernel alignment of each layer of each two networks; means over seeds.

    Args:
        table: from `tombola.analysis.similarity`.
    """
    means = similarity_analysis.summarise(table.filter(pl.col("layer") != similarity_analysis.OUTPUTS))
    return means.select(pl.col("kind").alias("what differs"), "tickets", "layer", pl.col("cka").alias("CKA"))
